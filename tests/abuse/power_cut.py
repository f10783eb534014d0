"""A power cut at many moments of runs that write: what may be on the disk afterwards is whole, and goes on.

    PYTHONPATH=tests python -m abuse.power_cut --count 500 --seed 0

The shim's journal (cpp/fault_journal.h) has every change that one run made. A cut lies between two of them; the replay
(replayed_disk.py) then builds a directory as a disk may show it afterwards. Where the model has its final name it has
to verify whole; then the same command has to bring it to the bytes of a run without a cut. `count` cuts of a
conversion, half as many of one that replaces a model, a tenth of what changes a whole model.
"""

import copy
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from abuse import disk, record
from abuse.fault_tasks import Task, tasks
from abuse.replayed_disk import FATES, ORDERS, Change, ReplayedDisk, read_journal

PROMISE = "After a power cut what has its final name is whole, and the same command goes on to the same bytes."
SHARES = {
    "convert": 1.0,
    "convert --overwrite": 0.5,
    "report": 0.1,
    "finetune gains": 0.1,
    "profile": 0.1,
    "/save": 0.1,
}
LAST = 12  # changes at the end, among which the model gets its name: a quarter of the cuts lies there


@dataclass(frozen=True)
class Journal:
    """One run of a task: the disk before it, and its changes."""

    task: Task
    before: ReplayedDisk
    changes: list[Change]


@dataclass(frozen=True)
class Cut:
    """After how many changes, which names are kept and what becomes of bytes; what was wrong afterwards, or ""."""

    task: str
    at: int
    order: str
    fate: str
    found: str
    wrong: str


def journal(shim: Path, work: Path, task: Task, plan: str = "") -> Journal:
    """Run a task with a journal, which has to lead from the files before it to those after it; plan: of faults."""
    top, notes = disk.fresh(task.template, work / "run"), work / "journal"
    notes.unlink(missing_ok=True)
    start = ReplayedDisk(top)
    done = disk.run(shim, top, *task.argv, journal=notes, data=task.data, plan=plan)
    assert done.status == 0, done
    changes = read_journal(notes)
    replay = copy.deepcopy(start)
    for change in changes:
        replay.apply(change)
    replay.build(replay.names("all", random.Random(0)), "kept", random.Random(0), gone(work / "replayed"))
    assert tree(work / "replayed") == tree(top), "the journal does not have all that was done"
    return Journal(task, start, changes)


def gone(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


def tree(top: Path) -> dict[str, bytes | None]:
    """Every file below a directory, and every directory."""
    return {str(p.relative_to(top)): None if p.is_dir() else p.read_bytes() for p in sorted(top.rglob("*"))}


def digest(found: dict[str, bytes | None]) -> str:
    parts = (f"{name} {data is None} {len(data or b'')} ".encode() + (data or b"") for name, data in found.items())
    return xxhash.xxh3_128_hexdigest(b"\n".join(parts))


def judge(task: Task, top: Path) -> tuple[str, str]:
    """(what the cut left of the model, what is wrong with it or with going on)."""
    names = {path.name.partition("-")[0] for path in top.iterdir()}
    there = {"out": "whole", "out.partial": "unfinished", "out.replaced": "set aside"}
    found = next((words for name, words in there.items() if name in names), "nothing")
    return found, task.left(top) or task.again(top)


def campaign(found: Journal, work: Path, count: int, seed: int) -> Iterator[Cut]:
    """`count` cuts that the seed decides; equal directories are judged once."""
    rng, known = random.Random(seed), dict[str, tuple[str, str]]()
    last = len(found.changes)
    moments = sorted(rng.randint(max(0, last - LAST) if rng.random() < 0.25 else 0, last) for _ in range(count))
    replay, made = copy.deepcopy(found.before), 0
    for at in moments:
        for change in found.changes[made:at]:
            replay.apply(change)
        made, order, fate = at, rng.choice(ORDERS), rng.choice((*FATES, "mixed", "mixed"))
        top = gone(work / "cut")
        replay.build(replay.names(order, rng), fate, rng, top)
        key = digest(tree(top))
        if key not in known:
            shutil.rmtree(top / "hf")
            shutil.copytree(found.task.template / "hf", top / "hf")  # with its times, by which a conversion knows it
            known[key] = judge(found.task, top)
        yield Cut(found.task.name, at, order, fate, *known[key])


def figures(cuts: list[Cut]) -> dict[str, int | float | str]:
    """Counts by run, by what was left, and by what the disk lost."""
    out: dict[str, int | float | str] = {"cuts": len(cuts)}
    for name in dict.fromkeys(cut.task for cut in cuts):
        found = Counter(cut.found for cut in cuts if cut.task == name)
        out[f"the model after the cut, {name}"] = ", ".join(f"{n} {what}" for what, n in sorted(found.items()))
    out |= {f"names kept: {order}": n for order, n in sorted(Counter(cut.order for cut in cuts).items())}
    out |= {f"bytes that were not synced: {fate}": n for fate, n in sorted(Counter(cut.fate for cut in cuts).items())}
    return out


def main() -> int:
    args = disk.options(__doc__ or "", 500)
    start, cuts = time.monotonic(), list[Cut]()
    with tempfile.TemporaryDirectory() as folder, tasks(Path(folder), SHARES) as (shim, found):
        for task in found:
            count = max(1, int(SHARES[task.name] * args.count))
            cuts += campaign(journal(shim, Path(folder), task), Path(folder), count, args.seed)
    wrong = [cut for cut in cuts if cut.wrong]
    for cut in wrong:
        print(f"{cut.task}, cut after {cut.at}, names {cut.order}, bytes {cut.fate}: {cut.wrong}")
    record.keep(3, "power_cut", PROMISE, "abuse.power_cut", time.monotonic() - start, figures(cuts), len(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
