"""bench_stream on tiny shapes: every case runs, and its counts are those of the replay; the model of noise is sound."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tiny_qmoe_mlx import container, native, verify

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import random_model  # noqa: E402
import routing  # noqa: E402
from bench_convert import SHAPE  # noqa: E402
from bench_stream import SMALL, plot_residency, residency  # noqa: E402

from tiny_qmoe_mlx.streaming.trace import read_trace  # noqa: E402


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
    import mlx.core as mx

    from tiny_qmoe_mlx import models

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


def test_residency_picture(small, tmp_path):
    pytest.importorskip("matplotlib")
    routing.make("uniform", tmp_path / "t", 20, 30, small)
    trace = read_trace(tmp_path / "t")
    held = residency(trace, 0, 4)
    assert held.shape == (31, 2, 16) and (held[1:].sum((1, 2)) == 4).all()
    plot_residency(held, tmp_path / "p.png", "t")
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.skipif(not native.available(), reason="needs the C++ library")
def test_quick(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "bench_stream.py"), "--quick", "--runs", "1", "--whole", "--json"]
    picture = ["--residency", str(tmp_path / "p.png")]
    done = subprocess.run([*command, *picture, "--dir", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {row["case"] for row in found["rows"]} == {"decode", "batch 8", "prompt", "whole"}
    assert {"read_bandwidth_ratio", "overlap_ratio", "peak_over_budget"} <= set(found)
    for row in (r for r in found["rows"] if r.get("mode") == "streamed" and r["case"] != "whole"):
        assert 0 < row["bytes_read"] and row["hit_rate"] < 1
        if row["case"] == "decode":
            assert row["bytes_over_lru"] == pytest.approx(1, rel=0.1)
        assert row["bytes_over_belady"] >= 1 or row["case"] == "prompt"
    assert (tmp_path / "p.png").exists()
