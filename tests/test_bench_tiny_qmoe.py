"""benchmarks/bench_tiny_qmoe.py: the published sizes to the printed digit, and rates of a small model of noise."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_tiny_qmoe as bench  # noqa: E402
from dense_llama import Dense  # noqa: E402

SHAPES = {
    "attn_q": (64, 64),
    "attn_k": (32, 64),
    "attn_v": (32, 64),
    "attn_output": (64, 64),
    "ffn_gate": (192, 64),
    "ffn_up": (192, 64),
    "ffn_down": (64, 192),
}


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    layers = [{n: rng.normal(0, 0.02, s).astype(np.float32) for n, s in SHAPES.items()} for _ in range(4)]
    return Dense(layers, rng.normal(0, 0.02, (512, 64)).astype(np.float32), np.ones(64), 4, 2, 1e-5, 1e4, None)


def test_the_published_sizes_follow_from_the_configs():
    assert bench.faulty_bytes(128256, 2048, 16) == 131_372_288 and bench.faulty_bytes(128256, 3072, 28) == 197_096_192
    for shape in bench.LLAMA.values():
        size = bench.faulty_bytes(shape["vocabulary"], shape["hidden"], shape["layers"])
        assert round(size / 2**20, 2) == shape["published"]


def test_an_embedding_cut_to_bytes_is_zeros_and_takes_two_bytes_for_four(model):
    *_, embedding = bench.audit(model)
    assert embedding["zeros"] == 1.0 and embedding["bytes_of_4"] == 2.0


@pytest.mark.parametrize("group", bench.GROUPS.values())
def test_rates_of_noise(model, group):
    """The stated coder makes 8-bit codes larger, unless a table of their own size holds them all."""
    found = bench.rates(model, group)
    assert 6 < found["entropy"] < 8 and found["entropy"] < found["rans"]
    assert found["tuples"] > 8 and found["tuples_or_raw"] < found["tuples"] + 1e-9
    assert (found["scales"] > 0.1) == (group > 0)


@pytest.mark.parametrize("coder", ["tuples", "rans"])
def test_as_a_method_of_the_rivals(model, coder):
    weights, bits = bench.tiny_qmoe(model, np.zeros((1, 1), int), 0, coder)
    assert len(weights) == 4 and 6 < bits < 30
    for got, layer in zip(weights, model.layers, strict=True):
        for w, name in zip(got, ("ffn_gate", "ffn_up", "ffn_down"), strict=True):
            assert np.abs(w - layer[name]).max() <= np.ptp(layer[name]) / 255 * 0.51


@pytest.mark.parametrize("kind", bench.SHIPPED.values(), ids=bench.SHIPPED)
def test_lossless_of_what_is_shipped(model, kind):
    found = bench.shipped(model, kind, 2)
    assert 0 < found["after"] and found["saved"] == pytest.approx(1 - found["after"] / found["before"])
