"""bench_stream on tiny shapes: every case runs, and its counts are those of the replay."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_qmoe_mlx import native

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import random_model  # noqa: E402
import routing  # noqa: E402
from bench_stream import SMALL, plot_residency, residency  # noqa: E402

from tiny_qmoe_mlx.streaming.trace import read_trace  # noqa: E402


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return random_model.make(tmp_path_factory.mktemp("noise") / "m", 2.0, 2, SMALL, "small noise", page=128)


def test_residency_picture(small, tmp_path):
    pytest.importorskip("matplotlib")
    routing.make("uniform", tmp_path / "t", 20, 30, small)
    trace = read_trace(tmp_path / "t")
    held = residency(trace, 0, 4)
    assert held.shape == (31, 2, 16) and (held[1:].sum((1, 2)) == 4).all()
    plot_residency(held, tmp_path / "p.png", "t")
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.slow
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
            assert row["bytes_over_replay"] == pytest.approx(1, rel=0.1)
            assert row["bytes_over_lru"] <= 1.1
        assert row["bytes_over_belady"] >= 1 or row["case"] == "prompt"
    assert (tmp_path / "p.png").exists()
