"""Commands in processes of their own, as a person runs them, and what every refusal has to look like."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tiny_qmoe_mlx import terminal

ROOT = Path(__file__).parents[1]
FILES = (  # and the model card, which may be edited, with its pictures
    "config.json",
    "model-experts-00001.safetensors",
    "model-experts-00002.safetensors",
    "model-rest-00000.safetensors",
    "model-rest-00001.safetensors",
    "model-rest-00002.safetensors",
    "model-rest.safetensors",
    "quality.json",
    "tiny_qmoe_manifest.json",
    "tiny_qmoe_model.py",
    "tokenizer.json",
    "tokenizer_config.json",
)
SMALL = ("--bits", "3", "--calibration-sequences", "8", "--calibration-tokens", "64", "--report", "none")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
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


def finish(child: subprocess.Popen, data: bytes | None = None, timeout: float = 300) -> Result:
    """Wait for a child, which may be given its standard input; seconds."""
    try:
        out, err = child.communicate(data, timeout=timeout)
    finally:
        child.kill()
    return Result(child.returncode, (out or b"").decode(), (err or b"").decode())


def process(*argv: object, **options) -> Result:
    """Run a command in a process of its own."""
    return finish(start(*argv, **options))


def refusal(result: Result, out: str = "") -> str:
    """The sentence of a command that refused; fails where there is anything else."""
    assert result.status in (terminal.FAILED, terminal.USAGE), result
    assert result.out == out, result
    lines = result.err.splitlines()
    assert len(lines) == 1 and result.err.endswith("\n"), result
    assert lines[0].startswith("error: ") and "Traceback" not in lines[0] and len(lines[0]) < 700, result
    return lines[0]


def names(directory: Path) -> list[str]:
    """What a directory holds."""
    return sorted(p.name for p in directory.iterdir())


def mapped(pid: int) -> Iterator[str]:
    """Files that a process on Linux has mapped; none once it has gone."""
    try:
        yield from Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return


def generate(here, model: Path, *options: object, prompt: str = "hello there") -> dict:
    done = here("generate", "--model", model, "--prompt", prompt, "--max-tokens", 40, "--json", *options)
    assert done.status == 0 and done.err == "", done
    return json.loads(done.out)
