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

FOUND = {  # by runs before the one on record, or by hand on the same ground; all mended, each with a test
    "fuzz_decoders": "Before: a packed record that was too short tripped numpy where it should have been refused.",
    "fuzz_readers": "Before: two dozen files that ended a reader without a sentence (tests/abuse/crashes_readers).",
    "hostile_models": "Before: code of a model's own that transformers asked on standard input to run, directories of "
    "other users from which MLX would have loaded compiled code, a prompt cache that ended the process.",
    "faults_writing": "Before: an fsync of a directory that failed named no file.",
    "soak_tiny": "Before: draws of weights that loading replaces, kept for ever (90 KB a load); 200 MB that glibc kept "
    "after a batch.",
    "server_load": "Before: a server that SIGTERM did not stop (the system may give a signal to another thread than "
    "the one that Python's handlers run in); 10 MB of holes in the heaps of threads in ten minutes; 900 MB for sixty "
    "clients with bodies of 4 MB.",
    "interrupts": "Before: two Ctrl-C at once left a server waiting for ever; a second one within a millisecond of "
    "the first one's sentence printed a traceback, in three of two hundred runs.",
    "races": "Before: a worker of the C++ pool that was late for the pool's end ran an item once more, whose memory "
    "had gone, and slept for ever.",
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
    if record.name in FOUND:
        lines += ["", FOUND[record.name]]
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
