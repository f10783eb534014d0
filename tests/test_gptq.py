"""GPTQ over a batch of experts and QMoE's grids, against definitions that need no Cholesky factor."""

import numpy as np
import pytest

from tiny_qmoe_mlx.codecs import qmoe
from tiny_qmoe_mlx.conversion import gptq as g

KINDS = ["ternary", "2-bit"]


def nearest_in_float64(kind, row):
    """Values of a row's weights on its grid, as the published quantizer's formulas say."""
    low, high = min(row.min(), 0), max(row.max(), 0)
    if low == high == 0:
        low, high = -1, 1
    if kind == "ternary":
        return np.where(row > high / 2, high, 0) + np.where(row < low / 2, low, 0)
    scale = (high - low) / 3
    zero = np.round(-low / scale)
    return scale * (np.clip(np.round(row / scale) + zero, 0, 3) - zero)


def values_of(grid, symbols):
    return np.take_along_axis(grid.value, symbols.astype(np.int64), -1)


def rows(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_grids_are_the_published_ones(rng, kind):
    w = g.bfloat16(rows(rng, 3, 9, 40))  # as the published models are
    w[0, 0], w[0, 1], w[0, 2] = 0, np.abs(w[0, 1]), -np.abs(w[0, 2])
    grid = g.grid_of(w, kind)
    got = values_of(grid, np.stack([grid.symbols(w[..., i]) for i in range(40)], -1))
    want = np.stack([[nearest_in_float64(kind, row.astype(np.float64)) for row in e] for e in w])
    np.testing.assert_allclose(got, want, rtol=2**-8, atol=0)  # rounded to bfloat16


@pytest.mark.parametrize(("sign", "symbol"), [(1, 2), (-1, 1)])
def test_a_row_of_one_sign_keeps_its_zeros_as_zeros(rng, sign, symbol):
    """Published: its end is 0, so that all its zeros are coded as that end. Feedback pushes weights past the end."""
    w = np.abs(rows(rng, 1, 16, 256)) * np.float32(sign)
    x = rows(rng, 400, 256) @ rows(rng, 256, 256) * np.float32(0.1) + 1
    grid = g.grid_of(w, "ternary")
    assert not grid.value[..., 3 - symbol].any()
    nearest = np.stack([grid.symbols(w[..., i]) for i in range(256)], -1)
    for symbols in (nearest, g.gptq(w, g.hessians([x]), grid)):
        assert set(np.unique(symbols)) == {0, symbol}
    assert (symbols != nearest).any()


def test_a_row_without_negative_weights_takes_no_more_codewords_for_its_zeros(rng):
    w = np.abs(rows(rng, 1, 64, 512))
    grid = g.grid_of(w, "ternary")
    symbols = g.gptq(w, g.hessians([rows(rng, 900, 512) @ rows(rng, 512, 512) * np.float32(0.1) + 1]), grid)
    coded = qmoe.encode(symbols[0], grid.bits16()[0], qmoe.Coding(qmoe.TERNARY, qmoe.DICTIONARY, 16))
    assert 16 * coded.codewords / symbols.size < 1.6  # seen: 1.41; with zeros as the smallest weight: 2.06


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_bfloat16_and_stored_as_such(rng, kind):
    grid = g.grid_of(rows(rng, 2, 5, 30), kind)
    stored = (grid.bits16().astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(stored, grid.value[..., 1:])
    assert not grid.value[..., 0].any()


def one_by_one(w, h, grid):
    """Optimal brain quantization in a fixed order: the inverse of what is left of H is taken anew for every column."""
    rest, out = w.astype(np.float64), np.empty(w.shape, np.uint8)
    for i in range(w.shape[2]):
        out[:, :, i] = grid.symbols(rest[:, :, i])
        rounded = values_of(grid, out)[:, :, i].astype(np.float64)
        for e in range(len(w)):
            inverse = np.linalg.inv(h[e][i:, i:])
            rest[e][:, i:] -= np.outer((rest[e][:, i] - rounded[e]) / inverse[0, 0], inverse[0])
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [128, 7])
def test_a_batch_equals_experts_rounded_one_by_one(rng, kind, block, monkeypatch):
    monkeypatch.setattr(g, "BLOCK", block)
    w = rows(rng, 3, 8, 24)
    mixing = rng.normal(size=(24, 24))
    h = g.hessians([(rng.normal(size=(n, 24)) @ mixing).astype(np.float32) for n in (40, 5, 0)])
    grid = g.grid_of(w, kind)
    damped = [one.astype(np.float64) + max(0.1 * np.diag(one).mean(), 1e-6) * np.eye(24) for one in h]
    np.testing.assert_array_equal(g.gptq(w, h, grid), one_by_one(w, damped, grid))


def test_the_damping_has_a_least_value(rng):
    upper = g.upper_factors(np.zeros((1, 4, 4), np.float32))
    np.testing.assert_allclose(upper[0], np.eye(4) * 1e3, rtol=1e-5)


def test_an_expert_without_tokens_is_rounded_to_nearest(rng):
    w = rows(rng, 2, 6, 20)
    h = g.hessians([rows(rng, 30, 20), np.empty((0, 20), np.float32)])
    np.testing.assert_array_equal(h[1], np.eye(20))
    grid = g.grid_of(w, "ternary")
    nearest = np.stack([grid.symbols(w[..., i]) for i in range(20)], -1)
    symbols = g.gptq(w, h, grid)
    np.testing.assert_array_equal(symbols[1], nearest[1])
    assert (symbols[0] != nearest[0]).any()


@pytest.mark.parametrize("bad", [-1.0, np.nan, 1e38])
def test_an_expert_whose_hessian_has_no_factor_is_rounded_to_nearest(rng, bad):
    w, h = rows(rng, 3, 6, 20), g.hessians([rows(rng, 30, 20) for _ in range(3)])
    grid = g.grid_of(w, "ternary")
    alone = g.gptq(w, h, grid)
    h[1] = bad
    symbols = g.gptq(w, h, grid)
    nearest = np.stack([grid.symbols(w[..., i]) for i in range(20)], -1)
    np.testing.assert_array_equal(symbols[1], nearest[1])
    np.testing.assert_array_equal(symbols[[0, 2]], alone[[0, 2]])


def test_feedback_makes_outputs_better_than_rounding_to_nearest(rng):
    w, x = rows(rng, 1, 64, 96), rows(rng, 400, 96) @ rows(rng, 96, 96)
    grid = g.grid_of(w, "2-bit")
    nearest = np.stack([grid.symbols(w[..., i]) for i in range(96)], -1)
    h = g.hessians([x])
    errors = [np.square(x @ (values_of(grid, s) - w)[0].T).sum() for s in (g.gptq(w, h, grid), nearest)]
    assert errors[0] < 0.7 * errors[1]  # seen: 0.52


def test_the_most_tokens_are_four_times_the_average():
    assert g.most_tokens(10_000, 1, 128) == 312  # int(4 * tokens / experts) of a router that picks one expert
    assert g.most_tokens(1000, 4, 8) == 2000
