"""One file a run: what was promised, which command tried to break it, how long and where, and what came out."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Record:
    """The outcome of one run.

    `item`: the section of docs/RELIABILITY.md, 1 to 8. `name`: also the file's name. `promise`: one sentence.
    `figures`: what was counted, by its words, in the order in which it is shown. `broken`: how often the promise was.
    """

    item: int
    name: str
    promise: str
    command: str
    seconds: float
    figures: dict[str, int | float | str]
    broken: int
    machine: str
    day: str


def command_line(module: str) -> str:
    """The command that started this process, as a reader would type it."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def machine() -> str:
    """System, processor and number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.system()} {platform.machine()}, {cores} cores, Python {platform.python_version()}"


def keep(
    item: int,
    name: str,
    promise: str,
    module: str,
    seconds: float,
    figures: Mapping[str, int | float | str],
    broken: int,
) -> Record:
    """Write results/NAME.json, and print it in a few lines."""
    record = Record(
        item,
        name,
        promise,
        command_line(module),
        round(seconds, 1),
        dict(figures),
        broken,
        machine(),
        f"{date.today()}",
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(asdict(record), indent=2) + "\n")
    print(f"{name}: {promise}")
    for words, figure in record.figures.items():
        print(f"  {words}: {figure}")
    print(f"  broken: {broken}; {record.seconds:.0f} s")
    return record


def read_all() -> list[Record]:
    """All records, by item and name."""
    records = [Record(**json.loads(path.read_text())) for path in RESULTS.glob("*.json")]
    return sorted(records, key=lambda record: (record.item, record.name))
