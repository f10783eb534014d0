"""Model directories made to do harm, opened by every command: code to run, paths that leave, sizes without bounds.

    PYTHONPATH=tests python -m abuse.hostile_models

Each case (hostile_cases.py) changes a sound directory, and the manifest of a converted one agrees. A command has to
refuse it with one sentence, or, where the case is harmless, to do its work; nothing of a model's may ever run, no
command may hang, and none may take more memory than a model of that size is worth.
"""

import argparse
import contextlib
import importlib
import io
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

from abuse import models, record
from abuse.hostile_cases import CONVERTED, ORIGINAL, Case, cases, forge, mark
from tiny_qmoe_mlx import runtime, server, terminal

PROMISE = "No model directory runs code, reads or writes outside of itself, hangs a command or takes its memory."
GROWTH = 400 << 20  # bytes beyond what the process had: a config of 64 MB takes some of it while it is parsed
TIME_LIMIT_S = 120
# ---- commands


def command_lines(base: str, directory: Path, scratch: Path) -> dict[str, tuple[str, list[object]]]:
    """Every command that opens a directory of this kind, by its name: the module, and its arguments."""
    text = scratch / "text.txt"
    text.write_text("the river stone light " * 50)
    quiet = ["--quiet"]
    if base == ORIGINAL:
        out, sound = scratch / "out", scratch.parent / CONVERTED
        plain = ["--codec", "trellis", "--bits", "3", "--calibration", "none", "--report", "none", *quiet]
        return {
            "convert": ("convert", ["--hf-path", directory, "--mlx-path", out, *plain]),
            "evaluate": (
                "evaluate",
                ["--model", directory, "--text", text, "--window", "16", "--tokens", "32", *quiet],
            ),
            "draft": ("generate", ["--model", sound, "--prompt", "x", "--max-tokens", "2", "--draft-model", directory]),
        }
    return {
        "generate": ("generate", ["--model", directory, "--prompt", "hello", "--max-tokens", "2", *quiet]),
        "chat": ("chat", ["--model", directory, "--max-tokens", "2", *quiet]),
        "evaluate": ("evaluate", ["--model", directory, "--text", text, "--window", "16", "--tokens", "32", *quiet]),
        "plan": ("plan", ["--model", directory, "--no-probe"]),
        "verify": ("verify", ["--model", directory, *quiet]),
        "server": ("server", ["--model", directory, "--port", "0", *quiet]),
    }


@dataclass(frozen=True)
class Result:
    """Exit status, what was printed, seconds, and bytes by which the process's peak of memory grew."""

    status: int
    out: str
    err: str
    seconds: float
    growth: int


class TookTooLong(BaseException):
    """A command that hangs."""


def run(command: str, argv: list[object]) -> Result:
    """A command in this process, whose standard input says yes to everything; what libraries write to the descriptor
    of stderr is part of what it says."""
    out, err, given = io.StringIO(), io.StringIO(), io.StringIO("y\n" * 4)
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT)]
    before, begun = start_peak(), time.monotonic()
    stdin, sys.stdin = sys.stdin, given
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(TIME_LIMIT_S)
    try:
        printed = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), descriptor(err)
        with printed[0], printed[1], printed[2], mock.patch.object(server, "serve", over):
            module = importlib.import_module(f"tiny_qmoe_mlx.{command}")
            status = terminal.run(module.main, [str(a) for a in argv])
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        signal.alarm(0)
        sys.stdin = stdin
        for number, handler in handlers:
            signal.signal(number, handler)
    return Result(status, out.getvalue(), err.getvalue(), time.monotonic() - begun, peak() - before)


@contextlib.contextmanager
def descriptor(to: io.StringIO) -> Iterator[None]:
    """What is written to file descriptor 2, past Python, is added in the end."""
    with tempfile.TemporaryFile() as held:
        before = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            held.seek(0)
            to.write(held.read().decode(errors="replace"))


def over(listening: Any, generation: Any, args: Any) -> None:
    """A server that has come as far as to listen."""
    listening.server_close()


def _alarm(number: int, frame: FrameType | None) -> None:
    raise TookTooLong


def start_peak() -> int:
    """Bytes that the process holds; its peak counts from now on, where the system allows."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most bytes that the process has held."""
    return runtime.peak_memory()


def problem(case: Case, command: str, result: Result) -> str:
    """What is wrong with how a command took a case, or nothing."""
    lines = [line for line in result.err.split("\n") if line]
    if not all(line.isprintable() for line in lines):
        return f"said what is not printable: {result.err[-400:]!r}"
    if result.growth > GROWTH:
        return f"took {result.growth >> 20} MB"
    if case.harmless or (case.harmless is None and result.status == 0):
        if result.status == 0 and len(lines) > 1:  # beside the figures of a run
            return f"said {result.err[-400:]!r}"
        return "" if result.status == 0 else f"was refused: {lines[-1:]}"
    if result.status == 0 and command in case.blind:
        return ""
    if result.status not in (terminal.FAILED, terminal.USAGE):
        return f"ended with {result.status}: {result.out[-200:]!r} {result.err[-200:]!r}"
    errors = list(dict.fromkeys(lines))  # chat says it to each message
    if len(errors) != 1 or not errors[0].startswith("error: ") or len(errors[0]) > 900:
        return f"said {result.err[-400:]!r}"
    return ""


# ---- the run


class Bench:
    """Sound directories, and a place for each case."""

    def __init__(self, root: Path):
        self.root = root
        self.sound = {CONVERTED: models.make(root / "made", "qmoe"), ORIGINAL: root / "made" / "qmoe-0" / "qwen3_moe-0"}
        shutil.copytree(self.sound[CONVERTED], root / CONVERTED)

    def attempt(self, case: Case, only: tuple[str, ...] = ()) -> list[tuple[str, Result, str]]:
        """A case by each command: (command, result, what is wrong)."""
        place = self.root / "case"
        directory = Path(shutil.copytree(self.sound[case.base], place / "model"))
        if case.harmless and case.base == ORIGINAL:
            only = only or ("convert", "evaluate", "draft")
        found = []
        try:
            case.change(directory)
            if case.base == CONVERTED:
                forge(directory)
            for late in directory.glob(".late-*"):
                late.rename(directory / late.name.removeprefix(".late-"))
            before = listing(place)
            for command, (module, argv) in command_lines(case.base, directory, place).items():
                if only and command not in only:
                    continue
                result = run(module, argv)
                wrong = problem(case, command, result) or self._outside(directory, before)
                found.append((command, result, wrong))
        finally:
            shutil.rmtree(place)
        return found

    def _outside(self, directory: Path, before: set[str]) -> str:
        if mark(directory).exists():
            mark(directory).unlink()
            return "ran the model's code"
        new = listing(directory.parent) - before - {"text.txt", "out", "out.partial"}
        return f"left {sorted(new)[0]}" if new else ""


def listing(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    args = parser.parse_args(argv)
    begun, broken, tried, slowest, most = time.monotonic(), [], 0, 0.0, 0
    chosen = {name: case for name, case in cases().items() if args.only in name}
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root))
        for name, case in chosen.items():
            for command, result, wrong in bench.attempt(case):
                tried, most = tried + 1, max(most, result.growth)
                slowest = max(slowest, result.seconds)
                if wrong:
                    broken.append(f"{name}: {command} {wrong}")
                    print(broken[-1], file=sys.stderr)
    shown = {
        "directories": len(chosen),
        "commands run on them": tried,
        "times that code of a model's ran": sum("ran the model's code" in line for line in broken),
        "largest growth of memory, MB": most >> 20,
        "longest command, s": round(slowest, 1),
    }
    record.keep(1, "hostile_models", PROMISE, "abuse.hostile_models", time.monotonic() - begun, shown, len(broken))
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
