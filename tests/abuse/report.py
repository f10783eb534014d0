"""docs/RELIABILITY.md from the records in results/.

PYTHONPATH=tests python -m abuse.report
"""

from pathlib import Path

from abuse.record import Record, read_all

PAGE = Path(__file__).resolve().parents[2] / "docs" / "RELIABILITY.md"
SECTIONS = {
    1: "Hostile models",
    2: "Faults in reading",
    3: "Faults in writing",
    4: "Silent corruption",
    5: "Memory",
    6: "Server under load",
    7: "Concurrency",
    8: "Numbers",
}
HEAD = """# Reliability

What tries to break each promise, the command, and what came out. Made by `make reliability` (hours); `make test` runs a
short version of each. The threat model is in [SECURITY](SECURITY.md). Commands run in the repository, with
`PYTHONPATH=tests`.
"""

NOTES = {  # of runs that broke something: what it was, and what came of it
    "faults_writing": "An fsync of a directory that failed named no file; mended since.",
    "interrupts": "Three second Ctrl-C, that came within a millisecond of the first one's sentence, printed Python's "
    "traceback below or in place of it; still to be mended. An earlier run found a server that two Ctrl-C at once left "
    "waiting for ever; mended since.",
    "server_load": "Resident memory went up by 4.3 % where 2 % are allowed; answers, order and stop are as promised. "
    "The run before it found a server that SIGTERM did not stop: the system may give a signal to another thread than "
    "the one that Python's handlers run in; mended since, and tested.",
    "soak_demo": "Looked at in whatever state it was, the pool's pages that had been given back and not been filled "
    "again among them, the process held 3.5 % more at the end. It never held more than .97 of its budget.",
}


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def shown(figure: int | float | str) -> str:
    return f"{figure:,}" if isinstance(figure, int) else f"{figure:.4g}" if isinstance(figure, float) else figure


def section(record: Record) -> str:
    lines = [f"**{record.promise}** " + ("Held." if not record.broken else f"Broken {record.broken} times."), ""]
    lines += [f"    {record.command}", ""]
    lines += [f"{duration(record.seconds)} on {record.machine}, {record.day}.", "", "| | |", "| --- | --- |"]
    lines += [f"| {words} | {shown(figure)} |" for words, figure in record.figures.items()]
    if record.broken and record.name in NOTES:
        lines += ["", NOTES[record.name]]
    return "\n".join(lines) + "\n"


def page(records: list[Record]) -> str:
    """The whole text; items without a record are named as not run."""
    parts = [HEAD]
    for item, title in SECTIONS.items():
        parts.append(f"## {item}. {title}\n")
        parts += [section(record) for record in records if record.item == item] or ["Not run.\n"]
    return "\n".join(parts)


def write() -> None:
    """Write the page."""
    PAGE.write_text(page(read_all()))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    write()
