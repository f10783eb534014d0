"""Ctrl-C and other signals at random moments of every command: it ends soon, with the status that shells expect.

    PYTHONPATH=tests python -m abuse.interrupts --count 200

The moments lie between the first at which Python knows our package and the end of the work: imports, loading, prefill,
decode, every phase of convert, verify, evaluate, plan, a server that starts, idles or answers, a chat that waits or
answers. Ctrl-C once or twice, a polite kill, a terminal that closes, a reader that leaves (`| head -1`).
"""

import argparse
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import commands

from abuse import record

PROMISE = "A signal at any moment ends any command soon, in one line, with the status that shells expect."
SOON_S = 90  # a machine that is busy; a hang is for ever
HOW = ("SIGINT", "SIGINT twice", "SIGTERM", "SIGHUP", "reader leaves")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<a>' if add_generation_prompt }}"
SMALL = ("--calibration-sequences", 8, "--calibration-tokens", 64, "--report")


@dataclass
class Bench:
    """A checkpoint, what it converts to, a text, and how long each command takes when nobody stops it."""

    root: Path
    report: str = "quick"
    long: dict[str, float] = field(default_factory=dict)
    found: Counter = field(default_factory=Counter)
    slowest: float = 0.0

    def __post_init__(self) -> None:
        import tiny_models

        self.source = tiny_models.make_checkpoint(self.root / "hf", "qwen3_moe")
        (self.source / "chat_template.jinja").write_text(TEMPLATE)
        self.text = self.root / "text.txt"
        words = "the river stone light walks under old quick bright over slow small green house tree".split()
        self.text.write_text(" ".join(random.Random(0).choices(words, k=2000)))
        self.whole = self.root / "whole"
        done = commands.process(*self.line("convert", self.whole))
        assert done.status == 0, done

    def line(self, command: str, out: Path | None = None) -> tuple[object, ...]:
        model, text = ("--model", self.root / "whole"), ("--text", self.text)
        small = ("--calibration", self.text, *SMALL, self.report)
        return {
            "convert": ("convert", "--hf-path", self.source, "--mlx-path", out, *small),
            "generate": ("generate", *model, "--prompt", "the river " * 40, "--max-tokens", 200, "--temp", 1),
            "verify": ("verify", *model),
            "evaluate": ("evaluate", *model, *text, "--tokens", 2000, "--window", 64),
            "plan": ("plan", *model, "--memory", "1GB"),
            "chat": ("chat", *model, "--max-tokens", 200, "--temp", 1),
            "chat at a terminal": ("chat", *model, "--max-tokens", 200, "--temp", 1),
            "server": ("server", *model, "--port", 0, "--context", 512, "--grace", 5),
            "server under load": ("server", *model, "--port", 0, "--context", 512, "--grace", 5),
        }[command]


COMMANDS = ("convert", "generate", "verify", "evaluate", "plan", "chat", "chat at a terminal", "server")
COMMANDS += ("server under load", "convert", "generate")  # twice: they have most phases


@dataclass
class Run:
    """One process and what it has printed."""

    child: subprocess.Popen
    terminal: int | None = None
    out: bytes = b""
    err: bytes = b""
    threads: list[threading.Thread] = field(default_factory=list)

    def read(self, out: bool) -> None:
        """Take what it prints, in threads of its own; its standard output too, or not."""

        def take(name: str, pipe: int) -> None:
            while True:
                try:
                    data = os.read(pipe, 4096)
                except OSError:  # a terminal whose other end has gone
                    return
                if not data:
                    return
                setattr(self, name, getattr(self, name) + data)

        ends = {"err": self.child.stderr.fileno() if self.child.stderr else None}
        ends["out"] = self.child.stdout.fileno() if self.child.stdout else self.terminal
        if not out:
            del ends["out"]
        pairs = [(name, end) for name, end in ends.items() if end is not None]
        self.threads = [threading.Thread(target=take, args=pair, daemon=True) for pair in pairs]
        for thread in self.threads:
            thread.start()

    def begun(self) -> bool:
        """Whether Python has come as far as our package; what happens before is its own."""
        return any("libtiny_qmoe_blas" in line for line in commands.mapped(self.child.pid))

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        for thread in self.threads:
            thread.join(10)
        for pipe in (self.child.stdin, self.child.stdout, self.child.stderr):
            if pipe:
                pipe.close()
        if self.terminal is not None:
            os.close(self.terminal)


def start(bench: Bench, command: str, out: Path) -> Run:
    line, env = bench.line(command, out), commands.environment(PYTHONFAULTHANDLER="1")
    if command == "chat at a terminal":
        ours, theirs = pty.openpty()
        run = Run(commands.start(*line, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=env), ours)
        os.close(theirs)
        os.write(ours, b"the river\n")
        return run
    stdin = subprocess.PIPE if command == "chat" else subprocess.DEVNULL
    run = Run(commands.start(*line, stdin=stdin, env=env))
    if command == "chat":
        run.child.stdin.write(b"the river\nthe stone\n")
        run.child.stdin.flush()
    return run


def load_server(run: Run, draw: random.Random) -> None:
    """Requests to a server as soon as it listens; whatever becomes of them."""
    until = time.monotonic() + SOON_S
    while b"(a page there" not in run.out and run.child.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    try:
        port = run.out.split(b" (a page")[0].rsplit(b":", 1)[1].decode()
    except IndexError:
        return
    body = json.dumps({"prompt": "the river", "max_tokens": 300, "stream": draw.random() < 0.5}).encode()

    def ask() -> None:
        url, head = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, head), timeout=SOON_S) as answer:
                answer.read()
        except OSError:
            pass

    for _ in range(4):
        threading.Thread(target=ask, daemon=True).start()


def stop(run: Run, how: str, draw: random.Random) -> None:
    """Do it; a terminal and a pipe are closed at our end."""
    if how == "reader leaves":
        if run.child.stdout:
            run.child.stdout.close()
        return
    number = {"SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP}.get(how, signal.SIGINT)
    run.child.send_signal(number)
    if how == "SIGINT twice":
        time.sleep(draw.choice([0, 0.001, 0.02, 0.2]))
        if run.child.poll() is None:
            run.child.send_signal(number)


def allowed(command: str, how: str) -> set[int]:
    """Exit statuses, negative for a signal that the system took."""
    if how == "reader leaves":  # which a server and a chat do not notice at once: they are ended
        return {0, 1, 130}
    if how == "SIGHUP":
        return {0, -signal.SIGHUP}
    ended = {143, -signal.SIGTERM} if how == "SIGTERM" else {130, -signal.SIGINT}
    return ended | {0}  # it may have come to its end; a server and a chat end so by Ctrl-C


def check_output(run: Run, how: str) -> None:
    """At most one sentence beside what belongs to a run that ends well."""
    err = run.err.decode(errors="replace")
    assert "Traceback" not in err and b"Traceback" not in run.out, err[-1500:]
    assert "terminate called" not in err and "Fatal" not in err, err[-1500:]
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert errors in ([], ["error: interrupted"]), errors
    if run.child.returncode == 130:
        assert errors or not err, err[-500:]


def check_files(bench: Bench, out: Path, draw: random.Random) -> None:
    """A conversion's output is whole or not there, and goes on to the same bytes."""
    assert set(os.listdir(out.parent)) <= {"out", "out.partial"}, os.listdir(out.parent)
    if not out.exists() and draw.random() < 0.3:
        done = commands.process(*bench.line("convert", out))
        assert done.status == 0, done
        bench.found["conversions that went on"] += 1
    if out.exists():
        ours = {f.name: f.read_bytes() for f in out.glob("*.safetensors") if "state" not in f.name}
        theirs = {f.name: f.read_bytes() for f in bench.whole.glob("*.safetensors")}
        assert ours == theirs, "other bytes"


def play(bench: Bench, seed: int) -> str:
    """One command, stopped once; what it was."""
    draw = random.Random(seed)
    command, how = COMMANDS[seed % len(COMMANDS)], draw.choice(HOW)
    if command == "chat at a terminal" and how == "reader leaves":
        how = "SIGHUP"
    words = f"{command}, {how}"
    with tempfile.TemporaryDirectory(dir=bench.root) as folder:
        run = start(bench, command, Path(folder) / "out")
        try:
            _play(bench, run, command, how, draw)
            if command == "convert":
                check_files(bench, Path(folder) / "out", draw)
        except AssertionError as error:
            raise AssertionError(f"{words}: {error}") from error
        finally:
            run.close()
    bench.found[how] += 1
    return words


def _play(bench: Bench, run: Run, command: str, how: str, draw: random.Random) -> None:
    run.read(how != "reader leaves")
    began = time.monotonic()
    while not run.begun() and run.child.poll() is None:
        time.sleep(0.002)
    if command == "server under load" and how != "reader leaves":
        load_server(run, draw)
    time.sleep(draw.choice([0, draw.uniform(0, 0.3), draw.uniform(0, bench.long.get(command, 3.0))]))
    alive = run.child.poll() is None
    stop(run, how, draw)
    asked = time.monotonic()
    if command.startswith(("chat", "server")) and how in ("SIGINT", "SIGINT twice", "reader leaves"):
        finish(run, command, how)
    try:
        run.child.wait(SOON_S)
    except subprocess.TimeoutExpired:
        run.child.send_signal(signal.SIGABRT)  # all stacks, on stderr
        run.child.wait(SOON_S)
        raise AssertionError(f"it has not ended after {SOON_S} s: {run.err.decode()}") from None
    for thread in run.threads:
        thread.join(10)
    if how != "reader leaves" and not alive:
        bench.long[command] = min(bench.long.get(command, 60.0), asked - began)
    bench.slowest = max(bench.slowest, time.monotonic() - asked)
    assert run.child.returncode in allowed(command, how), f"status {run.child.returncode}: {run.err[-800:]!r}"
    check_output(run, how)


def finish(run: Run, command: str, how: str) -> None:
    """A chat at a terminal goes on after one Ctrl-C, and a server whose reader has left; now they are to end."""
    time.sleep(0.5)
    if command == "chat":
        run.child.stdin.close()
        run.child.stdin = None
    for _ in range(20):
        if run.child.poll() is not None:
            return
        if command == "chat at a terminal":
            os.write(run.terminal, b"\x04")
        elif command.startswith("server") and how == "reader leaves":
            run.child.send_signal(signal.SIGINT)
        time.sleep(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell has started this in the background
    begun, broken, folder = time.monotonic(), 0, Path(tempfile.mkdtemp())
    bench = Bench(folder)
    for seed in range(args.seed, args.seed + args.count):
        try:
            play(bench, seed)
        except AssertionError as error:
            broken += 1
            print(f"seed {seed}, {error}", flush=True)
    shutil.rmtree(folder)
    figures = {**bench.found, "seconds from the signal to the end, at most": round(bench.slowest, 1)}
    record.keep(7, "interrupts", PROMISE, "abuse.interrupts", time.monotonic() - begun, figures, broken)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
