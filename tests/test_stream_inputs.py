"""What the streaming benchmarks run on: the model of noise is sound, and routing traces have the shares they claim."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tiny_qmoe_mlx import container, models, verify
from tiny_qmoe_mlx.streaming.profile import identity
from tiny_qmoe_mlx.streaming.trace import read_trace

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import random_model  # noqa: E402
import routing  # noqa: E402
from bench_convert import SHAPE  # noqa: E402

SMALL = {
    **SHAPE,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return random_model.make(tmp_path_factory.mktemp("noise") / "m", 2.0, 2, SMALL, "small noise", page=128)


def test_the_model_of_noise_passes_every_check(small):
    assert list(verify.find_problems(small)) == []
    opened = container.open_model(small, hash_files=True)
    assert opened.spec.bits == pytest.approx(2.0, abs=0.05)
    assert opened.config["hidden_size"] == SMALL["hidden_size"]


def test_it_is_left_alone_where_it_is_there_already(small):
    before = {p.name: p.stat().st_mtime_ns for p in small.iterdir()}
    random_model.make(small, 2.0, 2, SMALL, "small noise", page=128)
    assert {p.name: p.stat().st_mtime_ns for p in small.iterdir()} == before
    random_model.make(small.with_name("n"), 2.0, 1, SMALL, "small noise", page=128)
    random_model.make(small.with_name("n"), 2.0, 2, SMALL, "small noise", page=128)
    assert len(container.open_model(small.with_name("n")).spec.layers) == 2


def test_the_shape_of_30b():
    config = random_model.model_config(SHAPE, 48, 2.0, "x")
    layers = config["tiny_qmoe"]["layers"]
    assert len(layers) == 48 and all(x["experts"] == 128 for x in layers)
    assert config["tiny_qmoe"]["alignment"] >= 4096
    assert sum(x["experts"] * x["record_bytes"] for x in layers) == pytest.approx(7.24e9, rel=0.01)


def test_gains_keep_activations_sane(small):
    model, _ = models.load(small, "2GB")
    try:
        logits = np.array(model(mx.array([[5, 6, 7, 8]])).astype(mx.float32))
        x = mx.array(np.random.default_rng(0).standard_normal((4, SMALL["hidden_size"]), np.float32))
        y = np.array(models.record_layers(model)[0](x, mx.array(np.tile(np.arange(4, dtype=np.uint32), (4, 1)))))
    finally:
        model.close()
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 10
    assert 0.3 < np.sqrt(np.mean(y**2)) < 3


def test_uniform_routing(tmp_path):
    found = routing.make("uniform", tmp_path / "t", 40, 10)
    trace = read_trace(tmp_path / "t")
    assert trace.tokens(cold=True) == 40 and trace.tokens(cold=False) == 10
    assert len(trace.calls) == 48 * 11 and trace.calls[0].chosen.shape == (40, 8)
    assert abs(found["shared"] - found["chance"]) < 0.02


def test_share_and_spread_of_routing():
    chosen = np.array([[[0, 1], [1, 2], [1, 2], [3, 0]]])
    assert routing.shared_share(chosen) == pytest.approx((1 + 2 + 0) / 6)
    assert routing.load_spread(chosen, 4) == pytest.approx(np.std([2, 3, 2, 1]) / 2)


def test_smoother_states_share_more():
    rng = np.random.default_rng(0)
    seen = [routing.whitened(rng.standard_normal((300, 32), np.float32))]
    shares = [routing.shared_share(routing.routed(seen, 32, 4, keep)) for keep in (0.0, 0.4, 0.8)]
    assert shares[0] < shares[1] < shares[2]
    assert routing.load_spread(routing.routed(seen, 32, 4, 0.0), 32) == pytest.approx(routing.LOAD_SPREAD, abs=0.3)


def test_routing_of_a_model_is_a_trace_of_it(small, tmp_path):
    routing.make("uniform", tmp_path / "t", 8, 4, small)
    trace = read_trace(tmp_path / "t")
    trace.check(identity(container.open_model(small)))
    assert len(trace.experts) == 2 and trace.calls[0].chosen.shape == (8, SMALL["num_experts_per_tok"])


def test_rates_fill_a_record_of_any_size():
    shapes = random_model.expert_shapes(SHAPE)
    for bits in (1.0, 2.0, 2.98, 3.5, 4.0):
        size = random_model.model_config(SHAPE, 1, bits, "x")["tiny_qmoe"]["layers"][0]["record_bytes"]
        record, places = random_model.template(shapes, size)
        filled = sum(place.stop - place.start for place in places)
        assert len(record) == size and filled > 0.97 * size, bits
