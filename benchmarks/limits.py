"""Child processes under a memory limit of the operating system (a memory cgroup: root on Linux), and cold files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CGROUP = Path("/sys/fs/cgroup/memory")  # version 1
CGROUP2 = Path("/sys/fs/cgroup")
DROP = Path("/proc/sys/vm/drop_caches")


def available() -> bool:
    """Whether this process may make memory cgroups."""
    return _parent() is not None


def _parent() -> Path | None:
    if (CGROUP / "memory.limit_in_bytes").exists() and os.access(CGROUP, os.W_OK):
        return CGROUP
    control = CGROUP2 / "cgroup.subtree_control"
    if control.exists() and os.access(control, os.W_OK) and "memory" in control.read_text().split():
        return CGROUP2
    return None


def drop_page_cache() -> bool:
    """Forget the page cache, so that reads are reads; False where that is not allowed."""
    try:
        os.sync()
        DROP.write_text("1")
    except OSError:
        return False
    return True


def run(script: Path, words: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """Run `script JSON` in a process of its own, under `limit` bytes of memory where one is given.

    Returns:
        The JSON object of its last line, and `killed`: whether the limit ended it; group_peak_bytes: the most that the
        group held, page cache included.

    Raises:
        RuntimeError: it failed for another reason, with its last words.
    """
    child, peak = run_command([sys.executable, str(script), json.dumps(words)], limit)
    if child.returncode == -9:
        return {"killed": True, "group_peak_bytes": peak}
    if child.returncode:
        raise RuntimeError(f"[{script.name}] ended with {child.returncode}: {child.stderr.strip()[-600:]}")
    return {**json.loads(child.stdout.splitlines()[-1]), "killed": False, "group_peak_bytes": peak}


def run_command(command: list[str], limit: int | None) -> tuple[subprocess.CompletedProcess[str], int]:
    """Run a command, under `limit` bytes of memory where one is given.

    Returns:
        What it left, its output as text; and the most bytes that its group held, page cache included, 0 without one.

    Raises:
        RuntimeError: there is a limit, and groups cannot be made.
    """
    if not limit:
        return subprocess.run(command, capture_output=True, text=True), 0
    with group(limit) as own:
        child = subprocess.run(command, preexec_fn=joining(own), capture_output=True, text=True)
        return child, _peak(own)


@contextmanager
def group(limit: int) -> Iterator[Path]:
    """The directory of a memory cgroup with a limit in bytes; what joined it has to have ended when the block is left.

    Raises:
        RuntimeError: groups cannot be made.
    """
    parent = _parent()
    if parent is None:
        raise RuntimeError("[limits] memory cgroups cannot be made; run as root on a Linux with the memory controller")
    own = parent / f"tiny-qmoe-{os.getpid()}"
    own.mkdir()
    try:
        set_limit(own, limit)
        yield own
    finally:
        own.rmdir()


def set_limit(own: Path, limit: int) -> None:
    """Give a group another limit."""
    (own / ("memory.limit_in_bytes" if own.parent == CGROUP else "memory.max")).write_text(str(limit))


def used(own: Path) -> int:
    """Bytes that a group holds now, page cache included."""
    return int((own / ("memory.usage_in_bytes" if own.parent == CGROUP else "memory.current")).read_text())


def joining(own: Path) -> Callable[[], object]:
    """For `preexec_fn`: the child joins the group."""
    return lambda: (own / "cgroup.procs").write_text(str(os.getpid()))


def _peak(group: Path) -> int:
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if (group / name).exists():
            return int((group / name).read_text())
    return 0
