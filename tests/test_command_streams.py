"""Commands whose readers leave, whose streams are closed, and conversion as a command."""

import json
import shlex
import subprocess
import sys

import pytest
from commands import ROOT, SMALL, environment, finish, generate, linux, process, refusal, start

from tiny_qmoe_mlx import native

pytest_plugins = ["command_fixtures"]
pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")


# ---- readers that leave, and other streams


@pytest.mark.parametrize(
    "line",
    [
        "generate --prompt x --max-tokens 900",
        "verify --json",
        pytest.param("generate --prompt x --max-tokens 3 --json", marks=pytest.mark.slow),
        pytest.param("plan", marks=pytest.mark.slow),
    ],
)
def test_a_reader_that_leaves_early(converted, line):
    """`| head -c 10` with a pipe of its own: the reader takes ten bytes and goes."""
    command, *options = line.split()
    child = start(command, "--model", converted, *options)
    assert len(child.stdout.read(10)) == 10
    child.stdout.close()
    child.stdout = None
    done = finish(child)
    # a short answer was written whole before the reader left
    assert "Traceback" not in done.err and "Exception" not in done.err and "error" not in done.err, done
    assert done.err.count("\n") <= 1


@linux
def test_an_output_that_cannot_be_written(converted):
    for line in (
        ("plan", "--model", converted),
        ("generate", "--model", converted, "--prompt", "x", "--max-tokens", 3),
        ("plan", "--help"),
    ):
        with open("/dev/full", "wb") as full:  # with a buffer, as outside of tests
            said = refusal(finish(start(*line, stdout=full, env=environment(PYTHONUNBUFFERED=""))))
            assert said.startswith("error: [standard output] "), said


def test_closed_streams(converted):
    for rest, closed, status, message in (
        ("plan", ">&-", 0, ""),
        ("generate --prompt -", "<&-", 1, "error: [prompt] should be some text"),
        ("evaluate --text pyproject.toml --tokens 20", "<&-", 0, ""),  # MLX opens files where stdin was
    ):
        command = (
            f"{shlex.quote(sys.executable)} -m tiny_qmoe_mlx.{rest} --model {shlex.quote(str(converted))} {closed}"
        )
        done = subprocess.run(command, shell=True, env=environment(), capture_output=True, text=True)
        assert (
            done.returncode == status and done.stderr.startswith(message) and done.stderr.count("\n") == bool(message)
        ), done


def test_a_terminal_that_lacks_letters(converted):
    """A question mark in their place; JSON says all, in ASCII."""
    line = ("generate", "--model", converted, "--prompt", "hello there", "--max-tokens", 20, "--quiet")
    whole, plain, escaped = (
        process(*line, *json_, env=environment(PYTHONIOENCODING=encoding, PYTHONUTF8="0"))
        for encoding, json_ in (("utf-8", ()), ("ascii", ()), ("ascii", ("--json",)))
    )
    assert not whole.out.isascii() and whole.status == plain.status == escaped.status == 0
    assert plain.out == whole.out.encode("ascii", "replace").decode()
    assert escaped.out.isascii() and json.loads(escaped.out)["text"] + "\n" == whole.out


def test_a_current_directory_that_is_gone(converted, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    words = shlex.join([sys.executable, "-m", "tiny_qmoe_mlx.plan", "--no-probe", "--model", str(converted)])
    done = subprocess.run(
        f"rmdir {gone}; {words}",
        shell=True,
        cwd=gone,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == "", done
    assert done.stderr == "error: [current directory] should be there, it has been removed; go to another one\n"


# ---- convert


def test_the_same_conversion_gives_the_same_bytes(converted, checkpoint, text, tmp_path):
    out = tmp_path / converted.name  # which the card names
    done = process("convert", "--hf-path", checkpoint, "--mlx-path", out, "--calibration", text, *SMALL)
    assert done.status == 0
    ours, theirs = ({p.name: p.read_bytes() for p in d.iterdir()} for d in (out, converted))
    assert set(ours) == set(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.mark.parametrize("rest_bits", [4, 6, 16])
def test_rest_bits(checkpoint, text, tmp_path, here, rest_bits):
    out = tmp_path / "out"
    line = (
        "convert",
        "--hf-path",
        checkpoint,
        "--mlx-path",
        out,
        "--calibration",
        text,
        "--rest-bits",
        rest_bits,
        *SMALL,
    )
    assert here(*line).status == 0
    config = json.loads((out / "config.json").read_text())
    assert config.get("quantization", {"bits": 16})["bits"] == rest_bits
    assert generate(here, out)["generation_tokens"] > 0
    assert here("verify", "--model", out).status == 0
