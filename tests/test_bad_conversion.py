"""Conversions that cannot be: checkpoints that do not serve, places that do not take the result, full disks; and
commands that are stopped. One sentence each, and nothing half-written.
"""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from commands import INTERRUPTED, Result, environment, finish, linux, mapped, names, refusal, start
from mlx_lm.utils import _get_classes, save_model

from tiny_qmoe_mlx import native

pytest_plugins = ["command_fixtures"]
pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
MANIFEST = "tiny_qmoe_manifest.json"


@pytest.fixture
def source(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "hf"))


# ---- checkpoints that cannot be converted


def edit_weights(source: Path, change) -> None:
    weights = {name: np.array(w) for name, w in mx.load(str(source / "model.safetensors")).items()}
    change(weights)
    mx.save_safetensors(
        str(source / "model.safetensors"), {n: mx.array(w) for n, w in weights.items()}, {"format": "mlx"}
    )


def edit_config(source: Path, **changes) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))


def spoil(name: str, place: tuple[int, ...], value: float):
    def change(weights):
        weights[name][place] = value

    return lambda source: edit_weights(source, change)


def cut_weights(size: int):
    def cut(source):
        data = (source / "model.safetensors").read_bytes()
        (source / "model.safetensors").write_bytes(data[:size])

    return cut


def make_dense(source: Path) -> None:
    """A dense model whose feed-forward layers have no gate."""
    config = {**tiny_models.BASE, "model_type": "starcoder2"}
    kind, args = _get_classes(config)
    save_model(source, kind(args.from_dict(config)))
    (source / "config.json").write_text(json.dumps(config))


LAYER = "model.layers.{}.mlp.switch_mlp.{}_proj.weight"
SOURCES = {
    "NaN in an expert": (
        spoil(LAYER.format(2, "up"), (5, 3, 2), np.nan),
        r"\[model\.layers\.2\.mlp.* up_proj of expert 5 should be finite, received NaN or Inf",
    ),
    "Inf in an expert": (
        spoil(LAYER.format(1, "down"), (7, 0, 0), np.inf),
        r"layers\.1\..* down_proj of expert 7 should be finite",
    ),
    "-Inf in an expert": (
        spoil(LAYER.format(1, "gate"), (0, 63, 63), -np.inf),
        r"layers\.1\..* gate_proj of expert 0 should be finite",
    ),
    "NaN in attention": (
        spoil("model.layers.1.self_attn.q_proj.weight", (3, 2), np.nan),
        r"\[checkpoint\] model.layers.1.self_attn.q_proj.weight should be finite",
    ),
    "Inf in the last norm": (spoil("model.norm.weight", (0,), np.inf), "model.norm.weight should be finite"),
    "missing expert tensor": (
        lambda s: edit_weights(s, lambda w: w.pop(LAYER.format(1, "up"))),
        "Missing 1 parameters: model.layers.1.mlp.switch_mlp.up_proj",
    ),
    "missing norm": (
        lambda s: edit_weights(s, lambda w: w.pop("model.norm.weight")),
        "Missing 1 parameters: model.norm.weight",
    ),
    "strange tensor": (
        lambda s: edit_weights(s, lambda w: w.update(strange=np.zeros(3, np.float32))),
        "not in model: strange",
    ),
    "misshapen tensor": (
        lambda s: edit_weights(s, lambda w: w.update({"model.norm.weight": np.zeros(3, np.float32)})),
        "model.norm.weight",
    ),
    "unknown model type": (lambda s: edit_config(s, model_type="qwen9_moe"), "Model type qwen9_moe not supported"),
    "path as model type": (lambda s: edit_config(s, model_type="../x"), "not supported"),
    "code to run": (lambda s: edit_config(s, model_file="evil.py"), "evil.py"),
    "other shapes in config": (lambda s: edit_config(s, hidden_size=128), r"\(258, 128\)"),
    "too many experts a token": (lambda s: edit_config(s, num_experts_per_tok=9), "9"),
    "dense model without gates": (make_dense, "should have routed experts .* or feed-forward .* neither was found"),
    "cut weights": (cut_weights(900_000), "should take the file's 896040 bytes of data"),
    "cut header": (cut_weights(100), "header"),
    "empty weights": (cut_weights(0), "its header is damaged"),
    "garbage weights": (lambda s: (s / "model.safetensors").write_bytes(b"\xff" * 5000), "header"),
    "no weights": (lambda s: (s / "model.safetensors").unlink(), "should hold model.*safetensors and does not"),
    "no tokenizer": (
        lambda s: [(s / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        "should hold a tokenizer .* and holds none",
    ),
    "damaged tokenizer": (
        lambda s: (s / "tokenizer.json").write_text("{"),
        r"\[tokenizer\] .* cannot: JSONDecodeError",
    ),
    "empty tokenizer": (lambda s: (s / "tokenizer.json").write_text("{}"), r"\[tokenizer\] .* cannot: "),
    "damaged config": (lambda s: (s / "config.json").write_text("{"), r"config\.json\] should be JSON"),
    "config that is a list": (
        lambda s: (s / "config.json").write_text("[]"),
        r"config\.json\] should be a JSON object",
    ),
    "binary config": (lambda s: (s / "config.json").write_bytes(b"\xff\xfe\0"), r"config\.json\] should be JSON"),
}  # fmt: skip


@pytest.mark.parametrize("what", SOURCES)
def test_a_checkpoint_that_cannot_be_converted(source, text, here, what):
    spoiler, message = SOURCES[what]
    spoiler(source)
    sentence = refusal(
        here(
            "convert",
            "--hf-path",
            source,
            "--mlx-path",
            source.parent / "out",
            "--calibration",
            text,
            "--calibration-tokens",
            64,
        )
    )
    assert re.search(message, sentence), sentence
    assert names(source.parent) == ["hf"]


def test_weights_are_checked_without_calibration_too(source, here):
    SOURCES["NaN in attention"][0](source)
    sentence = refusal(
        here("convert", "--hf-path", source, "--mlx-path", source.parent / "out", "--calibration", "none")
    )
    assert "q_proj.weight should be finite" in sentence and names(source.parent) == ["hf"]


# ---- where the result should go


def test_a_revision_of_a_directory_is_refused(source, tmp_path, here):
    asked = here("convert", "--hf-path", source, "--mlx-path", tmp_path / "new", "--revision", "v2")
    assert f"{source} is on this disk; leave --revision out" in refusal(asked)
    assert not (tmp_path / "new").exists()


def test_overwrite_replaces_ours_and_nothing_else(checkpoint, model, here):
    root, manifest = model.parent, (model / MANIFEST).read_bytes()
    command = ("convert", "--hf-path", checkpoint, "--mlx-path", model, "--calibration", "none")
    refusal(here(*command))
    assert (model / MANIFEST).read_bytes() == manifest
    (model / "notes.txt").write_text("mine")
    assert "holds notes.txt, which no conversion wrote" in refusal(here(*command, "--overwrite"))
    assert (model / "notes.txt").read_text() == "mine" and (model / MANIFEST).read_bytes() == manifest
    (model / "notes.txt").unlink()
    assert here(*command, "--overwrite").status == 0
    assert (
        (model / MANIFEST).read_bytes() != manifest
        and names(root) == ["model"]
        and here("verify", "--model", model).status == 0
    )


def test_a_failed_overwrite_leaves_the_old_model(source, model, here):
    SOURCES["NaN in an expert"][0](source)
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    refusal(here("convert", "--hf-path", source, "--mlx-path", model, "--calibration", "none", "--overwrite"))
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before and names(model.parent) == ["hf", "model"]


def test_a_directory_that_may_not_be_written(checkpoint, tmp_path, here):
    parent = tmp_path / "locked"
    parent.mkdir()
    parent.chmod(0o555)
    if os.access(parent, os.W_OK):  # root ignores permissions; nobody may make files there:
        parent = Path("/proc/self")
        if not parent.is_dir():
            pytest.skip("no directory that root may not write to")
    sentence = refusal(here("convert", "--hf-path", checkpoint, "--mlx-path", parent / "out", "--calibration", "none"))
    assert "out" in sentence


@contextlib.contextmanager
def small_disk(path: Path, size: int):
    """A file system of `size` bytes."""
    path.mkdir()
    made = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True)
        if shutil.which("mount")
        else None
    )
    if made is None or made.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {made.stderr.strip() if made else 'no mount here'}")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


# in steps of 4 KB the disk fills up in every file once
SIZES = [4096, 69632, 81920, 131072, 204800]
SIZES += [pytest.param(n, marks=pytest.mark.slow) for n in range(73728, 229376, 4096) if n not in SIZES]


@linux
@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk(checkpoint, text, tmp_path, here, size):
    with small_disk(tmp_path / "disk", size) as disk:
        sentence = refusal(
            here(
                "convert",
                "--hf-path",
                checkpoint,
                "--mlx-path",
                disk / "out",
                "--calibration",
                text,
                "--bits",
                3,
                "--calibration-tokens",
                64,
            )
        )
        assert re.search(f"{disk}.*(the disk is full|bytes on its disk, .* are free|could not be written)", sentence), (
            sentence
        )
        assert names(disk) in ([], ["out.partial"])
        if names(disk):  # what was finished is whole, nothing else is there
            assert not [n for n in names(disk / "out.partial") if "partial" in n]


@linux
def test_a_full_disk_under_generate_stats(converted, tmp_path, here):
    with small_disk(tmp_path / "disk", 4096) as disk:
        (disk / "filler").write_bytes(b"x" * 4096)
        done = here(
            "generate", "--model", converted, "--prompt", "x", "--max-tokens", 3, "--stats", disk / "stats.json"
        )
        assert "the disk is full" in refusal(done, done.out) and names(disk) == ["filler"]


def test_files_that_may_not_grow(checkpoint, tmp_path):
    """A limit on file sizes stands for the disks that cannot be mounted here: MLX's own writer fails as well."""
    words = ("convert", "--hf-path", checkpoint, "--mlx-path", tmp_path / "out", "--calibration", "none")
    command = shlex.join([sys.executable, "-m", f"tiny_qmoe_mlx.{words[0]}", *map(str, words[1:])])
    env = environment(PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(f"ulimit -f 60; exec {command}", shell=True, env=env, capture_output=True, text=True)
    refusal(Result(done.returncode, done.stdout, done.stderr))  # 60 blocks of 512 bytes
    assert names(tmp_path) in ([], ["out.partial"])


# ---- signals


def quiet_end(result: Result, sent: signal.Signals) -> None:
    """At most one sentence, the status that shells expect."""
    assert "Traceback" not in result.err, result
    assert result.err in (("error: interrupted\n", "") if sent == signal.SIGINT else ("",)), result
    assert result.status in (INTERRUPTED if sent == signal.SIGINT else (143, -signal.SIGTERM)), result


SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPS = [(0, signal.SIGINT), (1, signal.SIGTERM), (2, signal.SIGINT)]
STOPS += [pytest.param(n, sent, marks=pytest.mark.slow) for n in range(3, 25) for sent in SIGNALS]


def wait_for_libraries(child: subprocess.Popen) -> None:
    """Python itself has started then, and the command has the signals in hand."""
    while (
        not any(re.search("_multiarray_umath|/mlx/core", line) for line in mapped(child.pid)) and child.poll() is None
    ):
        time.sleep(0.01)


@linux
@pytest.mark.parametrize(("moment", "sent"), STOPS)
def test_a_conversion_that_is_stopped(checkpoint, text, tmp_path, interruptible, moment, sent):
    """A third of the moments from the time that libraries load, the others at work, which a long trellis makes slow."""
    line = ("--hf-path", checkpoint, "--mlx-path", tmp_path / "out", "--calibration", text, "--calibration-tokens", 64)
    child = start("convert", *line, "--trellis-length", 16)
    wait_for_libraries(child)
    while moment % 3 and not names(tmp_path) and child.poll() is None:
        time.sleep(0.01)
    time.sleep(random.Random(moment).uniform(0, 0.5))
    child.send_signal(sent)
    quiet_end(finish(child), sent)
    assert names(tmp_path) in ([], ["out.partial"])  # the latter goes on (test_resume.py)
    if names(tmp_path):
        assert not [n for n in names(tmp_path / "out.partial") if "partial" in n]


@linux
@pytest.mark.parametrize(("moment", "sent"), STOPS)
def test_generation_that_is_stopped(converted, tmp_path, interruptible, moment, sent):
    line = ("--prompt", "hello", "--max-tokens", 1000, "--temp", 1, "--stats", tmp_path / "stats.json")
    child = start("generate", "--model", converted, *line)
    wait_for_libraries(child)
    if moment % 3:
        assert child.stdout.read(1)  # it streams
    time.sleep(random.Random(moment).uniform(0, 0.3))
    child.send_signal(sent)
    quiet_end(finish(child), sent)
    assert names(tmp_path) == []
