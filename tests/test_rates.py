"""Sizes of records and rates of blocks: bytes asked for are bytes spent, and go where they lower the error most."""

import numpy as np
import pytest

from tiny_qmoe_mlx.codecs import trellis
from tiny_qmoe_mlx.conversion.rates import (
    distortion,
    file_bytes,
    keeps_row_gains,
    layer_bits,
    record_bytes_for,
    water_fill,
)
from tiny_qmoe_mlx.errors import BudgetError

QWEN3_30B = ([(768, 2048), (768, 2048), (2048, 768)], 128)
DEMO = ([(64, 576), (64, 576), (576, 64)], 12)
GPT_OSS = ([(2880, 2880), (2880, 2880), (2880, 2880)], 32)
DENSE = ([(1536, 576), (1536, 576), (576, 1536)], 1)


# ---- sizes


@pytest.mark.parametrize("layer", [QWEN3_30B, DEMO, GPT_OSS, DENSE], ids=["qwen3-30b", "demo", "gpt-oss", "dense"])
@pytest.mark.parametrize("bits", [1.0, 1.5, 2.0, 2.37, 3.0])
def test_file_spends_the_asked_bits_within_one_percent(layer, bits):
    shapes, experts = layer
    size, alignment = record_bytes_for(bits, shapes, experts)
    weights = experts * sum(rows * columns for rows, columns in shapes)
    spent = 8 * file_bytes(size, experts, alignment, 512) / weights
    assert 0.99 * bits <= spent <= bits
    assert size % alignment == 0


def test_large_records_are_aligned_coarsely_and_small_ones_finely():
    assert record_bytes_for(2.0, *GPT_OSS)[1] >= 4096
    assert record_bytes_for(2.0, *DEMO)[1] == 128


def test_no_record_is_larger_than_its_highest_rates_need():
    size, alignment = record_bytes_for(64.0, *DEMO)
    payload = sum(rows * columns for rows, columns in DEMO[0]) // 2
    assert payload < size < payload + 4096 + alignment


def test_too_few_bits_are_refused_with_the_fewest_that_work():
    with pytest.raises(BudgetError, match=r"need at least 0\.\d+ bits per weight, received 0\.1"):
        record_bytes_for(0.1, *DEMO)


# ---- rates


def test_rates_follow_reverse_water_filling():
    """Against the definition: some lambda makes every block's rate minimise error + lambda x bytes."""
    rng = np.random.default_rng(1)
    importance = [np.exp(2 * rng.standard_normal(12)) for _ in range(3)]
    rows, budget = [64, 64, 32], 40000
    rates = water_fill(importance, rows, budget, 12)
    cost = [np.array([trellis.block_bytes(r, rate) for rate in range(8)]) for r in rows]
    spent = sum(cost[m][rates[m]].sum() for m in range(3))
    assert budget - 2 * cost[0][1] < spent <= budget
    lowest, highest = 0.0, np.inf  # the lambdas that each block's own choice allows
    for m, d in enumerate(importance):
        for b, rate in enumerate(rates[m]):
            saved = d[b] * -np.diff(distortion(12)) / np.diff(cost[m])
            lowest = max(lowest, saved[rate] if rate < 7 else 0)
            highest = min(highest, saved[rate - 1] if rate else np.inf)
    # the last step may be one that fitted where a better one no longer did: a factor, not an equality
    assert lowest <= 1.5 * highest


def test_distortion_is_convex_in_bytes():
    for length in trellis.LENGTHS:
        slopes = -np.diff(distortion(length)) / np.diff(trellis.PLANES)
        assert (np.diff(slopes) < 0).all()


def test_row_gains_are_kept_where_rows_differ_or_are_long():
    even, uneven = np.ones(64), np.exp(np.linspace(-1, 1, 64))
    assert not keeps_row_gains(even, 576, 2.0)
    assert keeps_row_gains(uneven, 576, 2.0)
    assert not keeps_row_gains(np.exp(np.linspace(-0.5, 0.5, 576)), 64, 2.0)
    outlier = even.copy()
    outlier[3] = 1e4
    assert keeps_row_gains(outlier, 64, 2.0)


def damage(sensitivity: np.ndarray, bits: np.ndarray) -> float:
    return float((sensitivity * 10 ** (-0.55 * bits)).sum())


def test_layer_bits_against_every_way_to_cut():
    """At most 2 sizes over 6 layers: all assignments of layers to 2 groups, the bits by a fine search."""
    sensitivity = np.exp(np.random.default_rng(15).standard_normal(6))
    found = layer_bits(sensitivity, np.full(6, 100), 2.0, 0.5, 4.0, sizes=2)
    best = np.inf
    for choice in range(1, 63):
        high = np.array([choice >> i & 1 for i in range(6)], bool)
        for more in np.arange(0, 1.2, 0.01):
            bits = np.where(high, 2 + more, 2 - more * high.sum() / (~high).sum())
            best = min(best, damage(sensitivity, bits))
    assert damage(sensitivity, found) < 1.001 * best


@pytest.mark.parametrize("bits", [0.8, 1.0, 2.0, 3.9])
def test_layer_bits_keep_mean_bounds_and_number_of_sizes(bits):
    rng = np.random.default_rng(16)
    sensitivity, weights = np.exp(2 * rng.standard_normal(30)), rng.integers(1, 5, 30) * 1000
    found = layer_bits(sensitivity, weights, bits, 0.75, 4.0)
    np.testing.assert_allclose((found * weights).sum() / weights.sum(), bits, rtol=1e-9)
    assert len(np.unique(found)) <= 4
    assert found.min() >= 0.75 and found.max() <= 4.0
    order = np.argsort(sensitivity / weights)
    assert (np.diff(found[order]) >= 0).all()


def test_layers_alike_get_the_same_bits():
    np.testing.assert_allclose(layer_bits(np.ones(5), np.full(5, 10), 1.5, 0.75, 4.0), 1.5)
    np.testing.assert_allclose(layer_bits(np.zeros(5), np.full(5, 10), 1.5, 0.75, 4.0), 1.5)


@pytest.mark.parametrize("sensitivity, bits", [(np.array([1.0, np.nan]), 2.0), (np.ones(2), 5.0)])
def test_layer_bits_refuse_what_makes_no_sense(sensitivity, bits):
    with pytest.raises(ValueError, match=r"\[rates\]"):
        layer_bits(sensitivity, np.full(2, 10), bits, 0.75, 4.0)
