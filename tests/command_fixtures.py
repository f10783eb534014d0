"""What the tests of commands share: a way to run one in this process, a text, a tiny model before and after conversion.

A test module takes these in with `pytest_plugins = ["command_fixtures"]`.
"""

import importlib
import random
import shutil
import signal
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from commands import FILES, SMALL, Result, names, process
from safetensors.numpy import save_file

from tiny_qmoe_mlx import terminal

WORDS = "the river stone light walks under old quick bright over slow small green house tree wind rain of and".split()


class Here:
    """Runs commands in this process; what they print is taken from the file descriptors."""

    def __init__(self, capfd: pytest.CaptureFixture):
        self._capfd = capfd

    def __call__(self, *argv: object) -> Result:
        module = importlib.import_module(f"tiny_qmoe_mlx.{argv[0]}")
        self._capfd.readouterr()
        handlers = [(s, signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT)]
        try:
            status = terminal.run(module.main, [str(a) for a in argv[1:]])
        except SystemExit as end:  # argparse
            status = end.code
        finally:
            for number, handler in handlers:
                signal.signal(number, handler)
        return Result(status, *self._capfd.readouterr())


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
    """An unconverted Qwen3-MoE of 3 layers, 2 of them with 8 experts; it never ends a reply by itself."""
    directory = tiny_models.make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "hf", "qwen3_moe")
    weights = {name: np.array(w) for name, w in mx.load(str(directory / "model.safetensors")).items()}
    weights["lm_head.weight"][tiny_models.BASE["eos_token_id"]] = 0  # of other tokens, the likeliest has a logit of 10
    save_file(weights, directory / "model.safetensors", {"format": "mlx"})
    return directory


@pytest.fixture(scope="session")
def converted(tmp_path_factory, checkpoint, text) -> Path:
    """The same, converted by the command."""
    out = tmp_path_factory.mktemp("converted") / "model"
    done = process("convert", "--hf-path", checkpoint, "--mlx-path", out, "--calibration", text, *SMALL)
    assert done.status == 0 and done.err == "", done
    assert tuple(n for n in names(out) if not n.endswith((".png", ".md"))) == FILES
    return out


@pytest.fixture
def model(converted, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(converted, tmp_path / "model"))
