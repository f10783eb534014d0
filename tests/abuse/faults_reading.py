"""Faults in reading: a disk that fails, stalls, gives less than asked for, or is cut short, under every command.

    PYTHONPATH=tests python -m abuse.faults_reading --count 200 --seed 0

Each schedule is a command and a fault at a random call of it. The run has to give the exact answer of a run without
faults, or end with exit status 1 and one sentence, and take at most 30 s more than without, delays not counted.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from abuse import disk, fault_models, record
from abuse.fault_models import Command

PROMISE = (
    "A disk that fails under a run leaves the exact answer or one sentence: no wrong token, no traceback, no hang."
)
# kind -> operations it is put into; "many": at random calls all the way, with this probability
KINDS = {
    "eio": ("read", "vread", "open", "map"),
    "eio for good": ("read", "vread", "open"),
    "short": ("read", "vread"),
    "short, many": ("read", "vread"),
    "delay": ("read", "vread", "open"),
    "eintr, many": ("read", "vread", "open"),
    "eagain": ("vread",),
    "truncate": ("read", "vread", "map"),
    "enospc": ("write", "sync", "name"),
    "eio, writing": ("write", "sync", "name"),
}
MANY = 0.3


@dataclass(frozen=True)
class Outcome:
    """How a schedule ended: "right", "sentence", "not reached" (right, as the call never came), or what was wrong."""

    command: str
    kind: str
    plan: str
    end: str
    wrong: str
    seconds: float


def draw(commands: list[Command], rng: random.Random) -> tuple[Command, str, str]:
    """A command, a kind of fault, and its plan."""
    while True:
        command, kind = rng.choice(commands), rng.choice(list(KINDS))
        operations = [op for op in KINDS[kind] if (command.calls or {}).get(op)]
        if operations:
            op = rng.choice(operations)
            return command, kind, _plan(kind, op, rng.randrange((command.calls or {})[op]), rng)


def _plan(kind: str, op: str, number: int, rng: random.Random) -> str:
    word = kind.partition(",")[0].partition(" ")[0]
    if "many" in kind:
        return f"{word} {op} p={MANY} {rng.randrange(1 << 32)} *"
    return f"{word} {op} {number} {-1 if 'for good' in kind else rng.choice((1, 1, 2, 5))} *"


def attempt(shim: Path, work: Path, command: Command, kind: str, plan: str) -> Outcome:
    """Run one schedule in a fresh copy of its files, and judge it."""
    top = disk.fresh(command.template, work / "run")
    limit = 3 * command.seconds + 20 * disk.DELAY_S + disk.SILENT_S
    done = disk.run(shim, top, *command.argv, plan=plan, data=command.data, limit_s=limit)
    wrong = disk.why_not_right(done, lambda found: command.right(found, top)) if command.name != "verify" else ""
    wrong = wrong or _verify(command, done, top)
    if done.seconds > command.seconds + done.delays * disk.DELAY_S + disk.SILENT_S:
        wrong = wrong or f"it took {done.seconds:.0f} s"
    wrong = wrong or (_goes_on(shim, top, command) if command.name == "convert" and kind != "truncate" else "")
    end = "wrong" if wrong else "sentence" if done.status else "right" if done.injected else "not reached"
    return Outcome(command.name, kind, plan, end, wrong, done.seconds)


def _verify(command: Command, done: disk.Done, top: Path) -> str:
    """What is wrong with a run of `verify`: it may tell of damage only where there is some."""
    if command.name != "verify":
        return ""
    harmless = all(line.split()[0] in ("short", "delay", "eintr", "see") for line in done.injected)
    if done.status and harmless:
        return f"damage where there is none: {done.out[:300]} {done.err[:300]}"
    if done.status == 1 and '"ok": false' in done.out and not done.err:
        return ""
    return disk.why_not_right(done, lambda found: command.right(found, top))


def _goes_on(shim: Path, top: Path, command: Command) -> str:
    """A conversion that failed leaves nothing but its own, and the same command brings it to the same bytes."""
    left = {p.name for p in top.iterdir()} - {"hf", "text.txt", "out", "out.partial"}
    if left:
        return f"left behind: {sorted(left)}"
    if (top / "out").exists():
        return "" if command.right(disk.Done(0, "", "", 0, []), top) else "what has its name is not whole"
    again = disk.run(shim, top, *command.argv)
    return "" if again.status == 0 and command.right(again, top) else f"it did not go on: {again.err[-600:]}"


def campaign(work: Path, count: int, seed: int, only: tuple[str, ...] = ()) -> list[Outcome]:
    """`count` schedules that the seed decides."""
    shim, rng = disk.build(work), random.Random(seed)
    commands = fault_models.commands(shim, work, only)
    return [attempt(shim, work, *draw(commands, rng)) for _ in range(count)]


def figures(outcomes: list[Outcome]) -> dict[str, int | float | str]:
    """Counts by command and by kind."""
    out: dict[str, int | float | str] = {"schedules": len(outcomes)}
    out |= {end: n for end, n in sorted(Counter(o.end for o in outcomes).items())}
    for title, key in (("command", lambda o: o.command), ("fault", lambda o: o.kind)):
        for name in sorted({key(o) for o in outcomes}):
            ends = Counter(o.end for o in outcomes if key(o) == name)
            out[f"{title} {name}"] = ", ".join(f"{n} {end}" for end, n in sorted(ends.items()))
    out["longest run in s"] = max(o.seconds for o in outcomes)
    return out


def main() -> int:
    args = disk.options(__doc__ or "", 200)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        outcomes = campaign(Path(work), args.count, args.seed)
    wrong = [o for o in outcomes if o.wrong]
    for outcome in wrong:
        print(f"{outcome.command}: {outcome.plan}: {outcome.wrong}")
    found = figures(outcomes)
    record.keep(2, "faults_reading", PROMISE, "abuse.faults_reading", time.monotonic() - start, found, len(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
