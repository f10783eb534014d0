"""Signals at random moments: a short run of abuse/interrupts.py; slow, the commands and signals that it leaves out."""

import signal
import sys
import time

import commands
import pytest
from abuse import interrupts as abuse

from tiny_qmoe_mlx import native

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc"),
]
QUICK = {1: "generate", 3: "evaluate", 4: "plan"}
SEEDS = [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in range(2 * len(abuse.COMMANDS))]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return abuse.Bench(tmp_path_factory.mktemp("bench"), "none")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_signal_ends_a_command(bench, interruptible, seed):
    words = abuse.play(bench, seed)
    assert words.startswith(QUICK.get(seed, ""))


@pytest.mark.parametrize("command", ["generate", "chat", "server", "plan", "verify", "convert", "evaluate", "doctor"])
def test_ctrl_c_while_a_command_is_imported_is_quiet(interruptible, command):
    """Python's traceback came of it."""
    child = commands.start(command, *(["--help"] if command == "doctor" else ["--model", "x"]))
    while child.poll() is None and not any("libtiny_qmoe_blas" in line for line in commands.mapped(child.pid)):
        time.sleep(0.0005)
    child.send_signal(signal.SIGINT)
    done = commands.finish(child)
    assert "Traceback" not in done.err and (done.status in commands.INTERRUPTED or done.status == 0), done


def test_what_is_not_allowed_is_seen(bench, interruptible, monkeypatch):
    """A command that takes no notice, and one that ends with another status."""
    monkeypatch.setattr(abuse, "allowed", lambda command, how: {7})
    with pytest.raises(AssertionError, match="status"):
        abuse.play(bench, 4)
    monkeypatch.undo()
    monkeypatch.setattr(abuse, "stop", lambda run, how, draw: None)
    monkeypatch.setattr(abuse, "SOON_S", 1)
    monkeypatch.setattr(abuse, "finish", lambda run, command, how: None)
    with pytest.raises(AssertionError, match="has not ended"):
        abuse.play(bench, 7)  # a server
