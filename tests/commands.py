"""Commands as a person runs them, in this process (quick) or in their own, and the models that their tests share.

A test module takes the fixtures in with `pytest_plugins = ["commands"]`.
"""

import importlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_models

from tiny_qmoe_mlx import native, terminal

ROOT = Path(__file__).parents[1]
FILES = (
    "config.json", "model-experts-00001.safetensors", "model-experts-00002.safetensors", "model.safetensors",
    "model.safetensors.index.json", "tiny_qmoe_manifest.json", "tokenizer.json", "tokenizer_config.json",
)
SMALL = ("--bits", "3", "--calibration-sequences", "8", "--calibration-tokens", "64")
WORDS = "the river stone light walks under old quick bright over slow small green house tree wind rain of and to in".split()
INTERRUPTED = (terminal.INTERRUPTED, -signal.SIGINT)  # the shell's word for both is 130


@dataclass(frozen=True)
class Result:
    """What a command left: its exit status, and what it printed."""

    status: int
    out: str
    err: str


def environment(**changes: str) -> dict[str, str]:
    """Of a child process that imports this checkout."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **changes}


def start(*argv: object, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
    """Start `python -m tiny_qmoe_mlx.<argv>`."""
    command = [sys.executable, "-m", f"tiny_qmoe_mlx.{argv[0]}", *map(str, argv[1:])]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=env or environment(), **{**pipes, **options})


def finish(child: subprocess.Popen, data: bytes | None = None) -> Result:
    """Wait for a child, which may be given its standard input."""
    try:
        out, err = child.communicate(data, timeout=300)
    finally:
        child.kill()
    return Result(child.returncode, (out or b"").decode(), (err or b"").decode())


def process(*argv: object, **options) -> Result:
    """Run a command in a process of its own."""
    return finish(start(*argv, **options))


class Here:
    """Runs commands in this process; what they print is taken from the file descriptors."""

    def __init__(self, capfd: pytest.CaptureFixture):
        self._capfd = capfd

    def __call__(self, *argv: object) -> Result:
        module = importlib.import_module(f"tiny_qmoe_mlx.{argv[0]}")
        self._capfd.readouterr()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            status = terminal.run(module.main, [str(a) for a in argv[1:]])
        except SystemExit as end:  # argparse
            status = end.code
        finally:
            signal.signal(signal.SIGTERM, handler)
        return Result(status, *self._capfd.readouterr())


def refusal(result: Result, out: str = "") -> str:
    """The sentence of a command that refused; fails where there is anything else."""
    assert result.status in (terminal.FAILED, terminal.USAGE), result
    assert result.out == out, result
    lines = result.err.splitlines()
    assert len(lines) == 1 and result.err.endswith("\n"), result
    assert lines[0].startswith("error: ") and "Traceback" not in lines[0] and len(lines[0]) < 700, result
    return lines[0]


@pytest.fixture
def here(capfd: pytest.CaptureFixture) -> Here:
    return Here(capfd)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A calibration text of 2000 words from a short list."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=2000)))
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """An unconverted Qwen3-MoE of 3 layers, 2 of them with 8 experts."""
    return tiny_models.make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "hf", "qwen3_moe")


@pytest.fixture(scope="session")
def converted(tmp_path_factory, checkpoint, text) -> Path:
    """The same, converted by the command."""
    if not native.available():
        pytest.skip("conversion needs the C++ library")
    out = tmp_path_factory.mktemp("converted") / "model"
    done = process("convert", "--hf-path", checkpoint, "--mlx-path", out, "--calibration", text, *SMALL)
    assert done.status == 0 and done.err == "", done
    assert tuple(sorted(p.name for p in out.iterdir())) == FILES
    return out


def names(directory: Path) -> list[str]:
    """What a directory holds."""
    return sorted(p.name for p in directory.iterdir())


def mapped(pid: int) -> Iterator[str]:
    """Files that a process on Linux has mapped; none once it has gone."""
    try:
        yield from Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return
