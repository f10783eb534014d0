"""A disk that fails on command: cpp/fault_shim.cpp under commands in processes of their own.

Faults are text, as cpp/fault_plan.h reads it: "eio read 3 1 model-experts" is EIO once, at the fourth read of a file
whose path holds "model-experts".
"""

import argparse
import atexit
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from commands import environment

SHIM = Path(__file__).resolve().parent / "cpp" / "fault_shim.cpp"
DELAY_S = 5  # of the shim's "delay"
SENTENCE = re.compile(r"error: \[[^\]]+\] .{5,600}")
SILENT_S = 30  # that a command may take more than without faults, its delays not counted


def compiler() -> str | None:
    return next((found for name in ("c++", "g++", "clang++", "clang++-19") if (found := shutil.which(name))), None)


def missing() -> str:
    """Why no shim can be had here; "" where one can."""
    if not sys.platform.startswith("linux"):
        return "the disk that fails on command stands between a program and Linux's libc"
    return "" if compiler() else "no C++ compiler to build the disk that fails on command with"


def options(text: str, count: int) -> argparse.Namespace:
    """--count and --seed of a command line; without a shim the process ends with a sentence."""
    parser = argparse.ArgumentParser(description=text.split("\n")[0])
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if missing():
        raise SystemExit(missing())
    return args


def build(directory: Path) -> Path:
    """Compile the shim; the library."""
    out = directory / "fault_shim.so"
    flags = ["-O1", "-std=c++17", "-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run([str(compiler()), *flags, str(SHIM), "-o", str(out), "-ldl"], check=True)
    return out


@dataclass(frozen=True)
class Done:
    """What a command left.

    injected: the faults that came to pass, "kind operation number path". calls: of each operation below the directory;
    none of a process that was killed.
    """

    status: int
    out: str
    err: str
    seconds: float
    injected: list[str]
    calls: dict[str, int] = field(default_factory=dict)
    late: bool = False

    @property
    def delays(self) -> int:
        return sum(line.startswith("delay") for line in self.injected)


def run(
    shim: Path,
    top: Path,
    *argv: object,
    plan: str = "",
    data: bytes = b"",
    journal: Path | None = None,
    limit_s: float = 300,
    kill_s: float | None = None,
    env: dict[str, str] | None = None,
) -> Done:
    """Run `python -m tiny_qmoe_mlx.<argv>`, or `python -c TEXT`, on a disk whose files below `top` fail as planned.

    Args:
        data: standard input.
        journal: file that every change below `top` is written to.
        limit_s: after which it is killed, and the result is `late`.
        kill_s: after which it is killed, by intent.
        env: its environment; without one the process is forked from one that has most imports behind it.
    """
    log, *paths = (top.with_name(f"{top.name}.{word}") for word in ("log", "stdin", "stdout", "stderr"))
    log.unlink(missing_ok=True)
    paths[0].write_bytes(data)
    fault = [str(top.resolve()), plan, str(log), str(journal or "")]
    words = list(map(str, argv))
    start, late = time.monotonic(), False
    wait, kill = (
        _forked(shim, words, top, paths, fault) if env is None else _started(shim, words, top, paths, fault, env)
    )
    if (status := wait(kill_s or limit_s)) is None:
        late = kill_s is None
        kill()
        status = wait(None)
    assert status is not None
    seconds = time.monotonic() - start
    lines = log.read_text().splitlines() if log.exists() else []
    injected = [line for line in lines if not line.startswith("calls ")]
    counts = [word.split("=") for line in lines if line.startswith("calls ") for word in line.split()[1:]]
    calls = {operation: int(count) for operation, count in counts}
    return Done(status, paths[1].read_text(), paths[2].read_text(), seconds, injected, calls, late)


Wait = Callable[[float | None], int | None]  # seconds -> exit status, None where it has not ended by then
Kill = Callable[[], object]


def _started(
    shim: Path, words: list[str], top: Path, paths: list[Path], fault: list[str], env: dict[str, str]
) -> tuple[Wait, Kill]:
    """A process of its own."""
    names = ("FAULT_DIRECTORY", "FAULT_PLAN", "FAULT_LOG", "FAULT_JOURNAL")
    env = {**env, "LD_PRELOAD": str(shim), **dict(zip(names, fault, strict=True))}
    command = [sys.executable, *(words if words[0] == "-c" else ["-m", f"tiny_qmoe_mlx.{words[0]}", *words[1:]])]
    with open(paths[0], "rb") as stdin, open(paths[1], "wb") as out, open(paths[2], "wb") as err:
        child = subprocess.Popen(command, env=env, cwd=top, stdin=stdin, stdout=out, stderr=err)

    def wait(seconds: float | None) -> int | None:
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    return wait, child.kill


def _forked(shim: Path, words: list[str], top: Path, paths: list[Path], fault: list[str]) -> tuple[Wait, Kill]:
    """A child of the process that forks."""
    parent = _parent(shim)
    assert parent.stdin and parent.stdout
    asked = {"argv": words, "cwd": str(top), "paths": list(map(str, paths)), "fault": fault}
    parent.stdin.write(json.dumps(asked).encode() + b"\n")
    child, lines = int(parent.stdout.readline()), parent.stdout

    def wait(seconds: float | None) -> int | None:
        ready = select.select([lines], [], [], seconds)[0]
        return int(lines.readline()) if ready else None

    return wait, lambda: os.kill(child, signal.SIGKILL)


@cache
def _parent(shim: Path) -> subprocess.Popen[bytes]:
    """The process that forks (forked.py), until this one ends."""
    tests = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join([tests, environment()["PYTHONPATH"]])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    env = environment(PYTHONPATH=paths, LD_PRELOAD=str(shim))
    parent = subprocess.Popen([sys.executable, "-m", "abuse.forked"], env=env, **pipes)  # type: ignore[call-overload]

    def end() -> None:
        parent.stdin.close()
        parent.wait()
        parent.stdout.close()

    atexit.register(end)
    return parent


def why_no_sentence(done: Done) -> str:
    """What is wrong with the end of a command that failed; "" where it is one sentence, notes before it perhaps."""
    lines = done.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if done.late:
        return "it hung"
    if done.status != 1:
        return f"exit status {done.status}: {done.err[-300:]}"
    if "Traceback" in done.err or len(errors) != 1 or lines[-1] != errors[0] or not SENTENCE.fullmatch(errors[0]):
        return f"no sentence: {done.err[-600:]}"
    return ""


def why_not_right(done: Done, right: Callable[[Done], bool]) -> str:
    """What is wrong with a run; "" where it gave the right answer or one sentence."""
    if done.status == 0 and not done.late:
        return "" if right(done) else f"a wrong answer: {done.out[:300]}"
    return why_no_sentence(done)


def contents(directory: Path) -> dict[str, bytes]:
    """Files of a directory by name; {} where there is none."""
    if not directory.is_dir():
        return {}
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.is_file()}


def fresh(template: Path, top: Path) -> Path:
    """`top`, as `template` is."""
    shutil.rmtree(top, ignore_errors=True)
    shutil.copytree(template, top)
    return top
