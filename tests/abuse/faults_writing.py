"""Faults in writing: kill -9, a full disk and failing writes at random moments of whatever writes files.

    PYTHONPATH=tests python -m abuse.faults_writing --count 200 --seed 0

`count` kills, and half as many failing writes, fsyncs and renames. Afterwards what has its final name has to be whole
or absent, a failed run has to end with one sentence, and the same command, run again, has to leave the same files.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from abuse import disk, record
from abuse.fault_tasks import Task, tasks

PROMISE = "Killed, or out of disk, at any moment: what has its final name is whole, and the same command goes on."
KILLS = ("kill", "killafter", "torn", "kill by the clock")
ERRORS = ("enospc", "enospc for good", "eio", "eio for good", "short")
OPERATIONS = ("write", "write", "sync", "name", "open", "read", "vread")  # of kills; of errors the writing ones
AT_ONCE = 3  # most kills in a row before a run may finish


@dataclass(frozen=True)
class Outcome:
    """How one task ended: the faults that came to pass, and what was wrong afterwards, or ""."""

    task: str
    kind: str
    plans: tuple[str, ...]
    injected: int
    wrong: str


def draw(task: Task, kind: str, rng: random.Random) -> tuple[str, float | None]:
    """A plan, and after how many seconds the process is killed (None: by the plan, if at all)."""
    if kind == "kill by the clock":
        return "", rng.uniform(0.3, 1.1) * task.seconds
    wanted = ("write",) if kind in ("torn", "short") else OPERATIONS if kind in KILLS else OPERATIONS[:4]
    there = [op for op in wanted if task.calls.get(op)]
    if not there:  # an upload writes nothing here
        return draw(task, "kill" if kind in KILLS else "kill by the clock", rng)
    op, count = rng.choice(there), -1 if "for good" in kind else 1
    return f"{kind.partition(' ')[0]} {op} {rng.randrange(task.calls[op])} {count} *", None


def attempt(shim: Path, work: Path, task: Task, kind: str, rng: random.Random) -> Outcome:
    """Faults in a fresh copy of the task's files, one after the other, then a run without."""
    task.begin()
    top, plans, injected = disk.fresh(task.template, work / "run"), list[str](), 0
    for _ in range(rng.randint(1, AT_ONCE) if kind in KILLS else 1):
        plan, kill_s = draw(task, kind, rng)
        plans.append(plan or f"after {kill_s:.2f} s")
        done = disk.run(shim, top, *task.argv, plan=plan, data=task.data, kill_s=kill_s, env=task.env)
        injected += done.status == -9 if kind in KILLS else bool(done.injected)
        wrong = _ended(done, kind, top, task) or task.left(top)
        if wrong or done.status == 0:
            return Outcome(task.name, kind, tuple(plans), injected, wrong)
    return Outcome(task.name, kind, tuple(plans), injected, task.again(top))


def _ended(done: disk.Done, kind: str, top: Path, task: Task) -> str:
    """What is wrong with the end of one run."""
    if kind in KILLS and done.status == -9:
        return "" if "Traceback" not in done.err else done.err[-500:]
    return task.finished(top) if done.status == 0 else disk.why_no_sentence(done)


def campaign(shim: Path, work: Path, found: list[Task], count: int, seed: int) -> Iterator[Outcome]:
    """`count` kills, then half as many errors, each of a task that the seed picks by its weight."""
    rng = random.Random(seed)
    for kinds, wanted, able in ((KILLS, count, found), (ERRORS, count // 2, [t for t in found if t.writes])):
        done = 0
        while done < wanted:
            task = rng.choices(able, [task.weight for task in able])[0]
            outcome = attempt(shim, work, task, rng.choice(kinds), rng)
            done += outcome.injected
            yield outcome


def figures(outcomes: list[Outcome]) -> dict[str, int | float | str]:
    """Counts by task and by kind."""
    out: dict[str, int | float | str] = {"runs gone on with": len(outcomes)}
    out["kills"] = sum(o.injected for o in outcomes if o.kind in KILLS)
    out["runs with failing writes"] = sum(o.injected > 0 for o in outcomes if o.kind in ERRORS)
    out |= {f"runs of {name}": n for name, n in sorted(Counter(o.task for o in outcomes).items())}
    out |= {f"runs with {kind}": n for kind, n in sorted(Counter(o.kind for o in outcomes).items())}
    return out


def main() -> int:
    args = disk.options(__doc__ or "", 200)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tasks(Path(folder)) as (shim, found):
        outcomes = list(campaign(shim, Path(folder), found, args.count, args.seed))
    wrong = [o for o in outcomes if o.wrong]
    for outcome in wrong:
        print(f"{outcome.task}, {outcome.kind}, {'; '.join(outcome.plans)}: {outcome.wrong}")
    counts, seconds = figures(outcomes), time.monotonic() - start
    record.keep(3, "faults_writing", PROMISE, "abuse.faults_writing", seconds, counts, len(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
