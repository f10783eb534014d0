"""Memory pressure: another process in the same control group takes memory, holds it, and goes.

    PYTHONPATH=tests python -m abuse.hog [--seconds N]

Needs root on Linux, for a memory cgroup. The group's limit is set to a little more than what a run holds once its pool
is full; then the hog takes memory until half of the pool has to go.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commands import ROOT, environment

from abuse import record
from tiny_qmoe_mlx import budget
from tiny_qmoe_mlx.container import open_model

sys.path.insert(0, str(ROOT / "benchmarks"))

import limits  # noqa: E402
import random_model  # noqa: E402

PROMISE = "Under memory pressure the pool shrinks, the run lives on with the same tokens, and takes the memory again."
SHAPE = {  # 200 MB of experts at 4 bits in four layers, and little else
    **random_model.SHAPE,
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "num_experts": 64,
    "num_attention_heads": 8,
    "vocab_size": 4096,
}
SLACK = 1.06  # of the group's limit over what the run holds
FULL = 0.8  # of the experts, in the run's budget
STEP, PAUSE_S = 2 << 20, 0.2  # how the hog takes memory: 3 % of the group a second
HOLD_S = 20.0  # and how long it keeps it
TAKE = f"""
import sys, time
held = []
for _ in range(int(sys.argv[1]) // {STEP}):
    held.append(bytearray(b"x") * {STEP})
    time.sleep({PAUSE_S})
print("full", flush=True)
time.sleep(100000)
"""


def victim(words: dict[str, Any], **options: Any) -> subprocess.Popen:
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), env["PYTHONPATH"]])
    command = [sys.executable, "-m", "abuse.hog_victim", json.dumps(words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, **options)


class Watched:
    """Rounds of a victim as it prints them."""

    def __init__(self, child: subprocess.Popen):
        self.child, self.rounds = child, []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for line in self.child.stdout:
            self.rounds.append(json.loads(line))

    def wait(self, true: Callable[[dict[str, Any]], bool], seconds: float) -> bool:
        """Whether a later round is as it should be in time."""
        end, seen = time.monotonic() + seconds, len(self.rounds)
        while time.monotonic() < end and self.child.poll() is None:
            if any(map(true, self.rounds[seen:])):
                return True
            seen = len(self.rounds)
            time.sleep(0.2)
        return False

    def stop(self) -> int | None:
        """End it; the status with which it had ended by itself, None where it had not."""
        status = self.child.poll()
        self.child.kill()
        self.child.wait()
        self._thread.join()
        self.child.stdout.close()
        return status


def expected(model: Path, tokens: int) -> list[int]:
    """A round's tokens with every expert in memory, in a process of its own."""
    child = victim({"model": str(model), "memory": "90%", "tokens": tokens, "rest_s": 0, "rounds": 1})
    found = json.loads(child.communicate(timeout=600)[0])
    assert found["mode"] == "resident", found
    return found["tokens"]


def attack(
    model: Path, seconds: float, constants: dict[str, float], tokens: int, rest_s: float
) -> tuple[dict[str, Any], list[str]]:
    """The whole of it; what was seen, and what was broken.

    Args:
        model: whose experts are most of what a run holds.
        seconds: for each of the waits.
        constants: of `streaming.pressure`, set in the run.
        tokens, rest_s: of a round, and between rounds.
    """
    found = budget.split(open_model(model), sys.maxsize, 256, True)
    low, high = found.min_budget_bytes, found.resident_budget_bytes
    memory = low + int(FULL * (high - low))
    words = {"model": str(model), "memory": memory, "tokens": tokens, "rest_s": rest_s, "pressure": constants}
    right = expected(model, tokens)
    with limits.group(1 << 40) as group:
        run = Watched(victim(words, preexec_fn=limits.joining(group)))
        try:
            figures, faults = under_pressure(run, group, memory - low, seconds)
        finally:
            status = run.stop()
    if status is not None:
        faults.append(f"the run was ended, with {status}")
    faults += [f"round {i} wrote other tokens" for i, line in enumerate(run.rounds) if line["tokens"] != right]
    return figures, faults


def under_pressure(run: Watched, group: Path, spare: int, seconds: float) -> tuple[dict[str, Any], list[str]]:
    """Let the hog in and out; `spare` are bytes of the pool that may go. What was seen, and what was broken."""
    faults = []
    before = settled(run, seconds)
    size = limits.used(group)
    limits.set_limit(group, int(size * SLACK))
    hog, start = Hog(group, int(size * (SLACK - 1)) + spare // 2), time.monotonic()
    if not run.wait(lambda line: line["pool_bytes"] <= before - spare // 4, seconds):
        faults.append("the pool did not shrink")
    shrunk_s = time.monotonic() - start
    run.wait(lambda line: hog.full.is_set(), seconds)
    run.wait(lambda line: False, min(HOLD_S, seconds / 4))
    if hog.child.poll() is not None or not hog.full.is_set():
        faults.append("the hog did not get its memory")
    hog.stop()
    least, start = min(line["pool_bytes"] for line in run.rounds), time.monotonic()
    if not run.wait(lambda line: line["pool_bytes"] == before, seconds):
        faults.append(f"the pool did not grow again, it has {run.rounds[-1]['pool_bytes']} bytes of {before}")
    return {
        "pool of experts, MB": round(before / 1e6, 1),
        "least of it under pressure, MB": round(least / 1e6, 1),
        "seconds until a quarter of what can go had gone": round(shrunk_s, 1),
        "seconds until all was back after the hog had left": round(time.monotonic() - start, 1),
        "rounds of the run, all with the same tokens": len(run.rounds),
    }, faults


def settled(run: Watched, seconds: float) -> int:
    """Wait until the run holds no more than two rounds before; bytes of its pool."""

    def calm(line: dict[str, Any]) -> bool:
        sizes = [found["resident_bytes"] for found in run.rounds[-6:]]
        return len(sizes) == 6 and max(sizes) < 1.002 * sizes[0]

    if not run.wait(calm, seconds):
        raise RuntimeError(f"[hog] the run should settle, it has ended with {run.child.poll()} or grows")
    return run.rounds[-1]["pool_bytes"]


class Hog:
    """A process of a group that takes so many bytes; `full` is set once it has them."""

    def __init__(self, group: Path, size: int):
        command = [sys.executable, "-c", TAKE, str(size)]
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=limits.joining(group))
        self.full = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        if self.child.stdout.readline():
            self.full.set()

    def stop(self) -> None:
        self.child.kill()
        self.child.wait()
        self._thread.join()
        self.child.stdout.close()


def main(argv: list[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=PROMISE)
    parser.add_argument("--seconds", type=float, default=1200, help="for each wait")
    args, start = parser.parse_args(argv), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = random_model.make(Path(folder) / "m", 4.0, 4, SHAPE, "noise for the hog")
        figures, faults = attack(model, args.seconds, {}, tokens=16, rest_s=1)
    for fault in faults:
        print(fault)
    record.keep(5, "hog", PROMISE, "abuse.hog", time.monotonic() - start, figures, len(faults))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
