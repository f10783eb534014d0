"""Conversion between two repositories: shards come from the hub one by one, finished files go to it."""

import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from commands import SMALL, names, refusal

from tiny_qmoe_mlx import native

pytest_plugins = ["command_fixtures", "hub_server"]
pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")


@pytest.fixture
def sharded(checkpoint, tmp_path) -> Path:
    """The tiny checkpoint in four shards; layers lie across them."""
    directory = tmp_path / "repository"
    directory.mkdir()
    weights = mx.load(str(checkpoint / "model.safetensors"))
    order = sorted(weights)
    for i in range(4):
        part = {name: weights[name] for name in order[i * len(order) // 4 : (i + 1) * len(order) // 4]}
        mx.save_safetensors(str(directory / f"model-{i + 1:05d}-of-00004.safetensors"), part, {"format": "mlx"})
    for path in checkpoint.iterdir():
        if path.suffix == ".json" and "index" not in path.name:
            shutil.copyfile(path, directory / path.name)
    return directory


def line(out: str, text: Path) -> tuple:
    return ("convert", "--hf-path", "org/name", "--mlx-path", out, "--calibration", text, *SMALL)


def test_shards_come_and_finished_files_go(hub, run, sharded, text, tmp_path):
    hub.repositories["org/name"] = sharded
    plain = run(*line("plain", text))
    assert plain.status == 0 and plain.err == "", plain
    done = run(*line("out", text), "--stream-shards", "--upload-repo", "org/out")
    assert done.status == 0 and done.err == "", done
    assert {"out", "plain"} <= set(names(tmp_path)) and "out.source" not in names(tmp_path)
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("out", "plain"))
    weights = [name for name in ours if name.endswith(".safetensors")]
    assert set(ours) == set(theirs) and len(weights) == 6 and all(ours[n] == theirs[n] for n in weights)
    sent = hub.repositories["org/out"]
    assert {p.name: p.read_bytes() for p in sent.iterdir() if p.name != ".gitattributes"} == ours


def test_an_upload_without_a_login_is_refused_before_any_work(hub, run, sharded, text, tmp_path):
    hub.repositories["org/name"] = sharded
    sentence = refusal(run(*line("out", text), "--upload-repo", "org/out", HF_TOKEN=""))
    assert "the hub wants a login" in sentence and "out" not in names(tmp_path)


def test_a_finished_model_is_uploaded_by_running_again(hub, run, sharded, text, tmp_path):
    hub.repositories["org/name"] = sharded
    assert run(*line("out", text)).status == 0
    done = run(*line("out", text), "--upload-repo", "org/out")
    assert done.status == 0 and done.err == "", done
    sent = hub.repositories["org/out"]
    assert {p.name for p in sent.iterdir()} >= set(names(tmp_path / "out"))


def test_shards_of_a_directory_cannot_be_streamed(run, checkpoint, text, tmp_path):
    sentence = refusal(
        run("convert", "--hf-path", checkpoint, "--mlx-path", "out", "--calibration", text, *SMALL,
            "--stream-shards")
    )  # fmt: skip
    assert "is on this disk already" in sentence and not {"out", "out.partial", "out.source"} & set(names(tmp_path))
