"""A power cut at many moments of one run: what may be on the disk afterwards verifies, and goes on to the same bytes.

    PYTHONPATH=tests python -m abuse.power_cut --count 500 --seed 0

The shim's journal (cpp/fault_journal.h) has every change that one run made. A cut lies between two of them; the replay
(replayed_disk.py) then builds a directory as a disk may show it afterwards. Where the model has its final name it has
to verify whole; then the same command has to bring it to the bytes of a run without a cut.
"""

import argparse
import copy
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from abuse import disk, fault_models, record
from abuse.fault_models import convert, whole, within
from abuse.replayed_disk import FATES, ORDERS, Change, ReplayedDisk, read_journal

PROMISE = "After a power cut what has its final name is whole, and the same command goes on to the same bytes."


@dataclass(frozen=True)
class Journal:
    """One run: the disk before it, its changes, the files of the model that it made, and where its original lies.

    again: the same command, in this process and the current directory.
    """

    name: str
    before: ReplayedDisk
    source: Path
    changes: list[Change]
    files: dict[str, bytes]
    again: Callable[[], object]


@dataclass(frozen=True)
class Cut:
    """After how many changes, which names are kept and what becomes of bytes; what was wrong afterwards, or ""."""

    journal: str
    at: int
    order: str
    fate: str
    found: str
    wrong: str


def journals(shim: Path, work: Path, count: int = 2) -> Iterator[Journal]:
    """A conversion, and one that replaces a model; the first `count` of them."""
    top = fault_models.make_original(work / "original")
    plain = (*fault_models.PLAIN, "--quiet")
    yield _journal(shim, work, "convert", top, plain, lambda: convert(fault_models.BITS))
    if count < 2:
        return
    other = disk.fresh(work / "run", work / "other")
    line = [*plain, "--overwrite"]
    line[line.index("--bits") + 1] = "2"
    yield _journal(shim, work, "convert --overwrite", other, line, lambda: convert("2", overwrite=True))


def _journal(shim: Path, work: Path, name: str, before: Path, argv: object, again: Callable[[], object]) -> Journal:
    """Run a command with a journal, which has to lead from the files before it to those after it."""
    top, notes = disk.fresh(before, work / "run"), work / "journal"
    notes.unlink(missing_ok=True)
    start = ReplayedDisk(top)
    done = disk.run(shim, top, *argv, journal=notes)  # type: ignore[misc]
    assert (done.status, done.err) == (0, ""), done
    changes = read_journal(notes)
    replay = copy.deepcopy(start)
    for change in changes:
        replay.apply(change)
    replay.build(replay.names("all", random.Random(0)), "kept", random.Random(0), fresh_name(work / "replayed"))
    assert tree(work / "replayed") == tree(top), "the journal does not have all that was done"
    return Journal(name, start, before / "hf", changes, disk.contents(top / "out"), again)


def fresh_name(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


def tree(top: Path) -> dict[str, bytes | None]:
    """Every file below a directory, and every directory."""
    return {str(p.relative_to(top)): None if p.is_dir() else p.read_bytes() for p in sorted(top.rglob("*"))}


def digest(found: dict[str, bytes | None]) -> str:
    parts = (f"{name} {data is None} {len(data or b'')} ".encode() + (data or b"") for name, data in found.items())
    return xxhash.xxh3_128_hexdigest(b"\n".join(parts))


def judge(journal: Journal, top: Path) -> tuple[str, str]:
    """(what the cut left, what is wrong with it or with going on)."""
    there, partial = (top / "out").exists(), (top / "out.partial").exists()
    found = "whole" if there else "unfinished" if partial else "nothing"
    wrong = whole(top / "out") if there else ""
    if wrong:
        return found, wrong
    with within(top):
        try:
            journal.again()
        except FileExistsError as error:
            if not there or "is a converted model already" not in str(error):
                return found, f"it does not go on: {error}"
        except Exception as error:  # whatever it is, it is wrong
            return found, f"it does not go on: {type(error).__name__} {error}"
    return found, _same(journal, top)


def _same(journal: Journal, top: Path) -> str:
    files = disk.contents(top / "out")
    differ = [name for name, data in journal.files.items() if files.get(name) != data]
    if differ:
        return f"it went on to other bytes of {', '.join(differ)}"
    left = {p.name for p in top.iterdir()} - {"hf", "text.txt", "out"}
    return f"it left {', '.join(sorted(left))}" if left else ""


def campaign(journal: Journal, work: Path, count: int, seed: int) -> Iterator[Cut]:
    """`count` cuts that the seed decides; equal directories are judged once."""
    rng, known = random.Random(seed), dict[str, tuple[str, str]]()
    moments = sorted(rng.randrange(len(journal.changes) + 1) for _ in range(count))
    replay, made = copy.deepcopy(journal.before), 0
    for at in moments:
        while made < at:
            replay.apply(journal.changes[made])
            made += 1
        order, fate = rng.choice(ORDERS), rng.choice((*FATES, "mixed", "mixed"))
        top = fresh_name(work / "cut")
        replay.build(replay.names(order, rng), fate, rng, top)
        shutil.rmtree(top / "hf")
        shutil.copytree(journal.source, top / "hf")  # with its times, by which a conversion knows it
        key = digest(tree(top))
        if key not in known:
            known[key] = judge(journal, top)
        yield Cut(journal.name, at, order, fate, *known[key])


def figures(cuts: list[Cut]) -> dict[str, int | float | str]:
    """Counts by run, by what was left, and by what the disk lost."""
    out: dict[str, int | float | str] = {"cuts": len(cuts)}
    for name in sorted({cut.journal for cut in cuts}):
        found = Counter(cut.found for cut in cuts if cut.journal == name)
        out[f"model after the cut, {name}"] = ", ".join(f"{n} {what}" for what, n in sorted(found.items()))
    out |= {f"names kept: {order}": n for order, n in sorted(Counter(cut.order for cut in cuts).items())}
    out |= {f"bytes that were not synced: {fate}": n for fate, n in sorted(Counter(cut.fate for cut in cuts).items())}
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if disk.missing():
        print(disk.missing())
        return 1
    start, cuts = time.monotonic(), list[Cut]()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for number, journal in enumerate(journals(disk.build(work), work)):
            cuts += campaign(journal, work, args.count, args.seed + number)
    wrong = [cut for cut in cuts if cut.wrong]
    for cut in wrong:
        print(f"{cut.journal}, cut after {cut.at}, names {cut.order}, bytes {cut.fate}: {cut.wrong}")
    record.keep(3, "power_cut", PROMISE, "abuse.power_cut", time.monotonic() - start, figures(cuts), len(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
