"""The inputs of the comparison with llama.cpp: its file by the gguf package's own reader, and the ratios."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
gguf = pytest.importorskip("gguf", reason="the file is checked by the gguf package")

import bench_side_by_side  # noqa: E402
import gguf_random  # noqa: E402


@pytest.mark.parametrize("kind", ["Q3_K", "IQ3_S", "Q4_K"])
def test_a_file_of_noise_is_the_model_it_says(tmp_path, kind):
    size = gguf_random.write(tmp_path / "m.gguf", gguf_random.TINY, kind)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    expected = {name: (matrix, count) for name, matrix, _, count in gguf_random.tensors(gguf_random.TINY, kind, "Q8_0")}
    assert set(found) == set(expected)
    for name, (matrix, count) in expected.items():
        assert int(np.prod(found[name].shape)) == matrix[0] * matrix[1] * count
    experts = [tensor for name, tensor in found.items() if "_exps" in name]
    assert sum(int(t.n_bytes) for t in experts) == gguf_random.expert_bytes(gguf_random.TINY, kind) < size
    for tensor in (*experts, found["output.weight"]):
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(weights).all() and 0.01 < weights.std() < 0.04
        assert abs(weights.mean()) < 0.2 * weights.std()


def test_a_type_whose_blocks_do_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="should be a multiple of 256 for Q3_K, received 128"):
        gguf_random.write(tmp_path / "m.gguf", {**gguf_random.TINY, "width": 128}, "Q3_K")
    with pytest.raises(ValueError, match="should be one of"):
        gguf_random.write(tmp_path / "m.gguf", gguf_random.TINY, "Q9")


def test_both_engines_get_the_same_shape():
    shape = bench_side_by_side.gguf_shape(bench_side_by_side.SHAPE, 48)
    assert shape == gguf_random.SHAPE


def test_the_goals_ratios():
    ours = {"bytes_per_token": 60.0, "experts_s": 0.2, "token_s": 0.5, "first_s": 2.0}
    llama = {"bytes_per_token": 100.0, "token_s": 1.0, "first_s": 1.0}
    found = bench_side_by_side.against(ours, llama)
    assert found == {"bytes": 0.6, "experts_over_llama": 0.2, "speed": 2.0, "first_token": 0.5}
    assert bench_side_by_side.against(ours, {"killed": 3}) == {}


@pytest.mark.slow
def test_quick(tmp_path):
    pytest.importorskip("llama_cpp")
    command = [
        sys.executable,
        BENCHMARKS / "bench_side_by_side.py",
        "--quick",
        "--runs",
        "1",
        "--types",
        "Q3_K",
        "--json",
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["engine"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}
    assert len(rows) == 4 and all(row["token_s"] > 0 and not row["killed"] for row in rows.values())
    streamed = next(row for name, row in rows.items() if name.startswith("ours") and "limit" in row)
    assert streamed["experts_s"] < streamed["token_s"] and streamed["peak_bytes"] <= streamed["limit"]
