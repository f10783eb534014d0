"""Child processes under a memory limit of the operating system (a memory cgroup: root on Linux), and cold files."""

import json
import os
import subprocess
import sys
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
    group = _group(limit) if limit else None
    try:
        joined = (lambda: (group / "cgroup.procs").write_text(str(os.getpid()))) if group else None
        child = subprocess.run(command, preexec_fn=joined, capture_output=True, text=True)
        return child, _peak(group) if group else 0
    finally:
        if group:
            group.rmdir()


def _group(limit: int) -> Path:
    parent = _parent()
    if parent is None:
        raise RuntimeError("[limits] memory cgroups cannot be made; run as root on a Linux with the memory controller")
    group = parent / f"tiny-qmoe-{os.getpid()}"
    group.mkdir()
    names = ("memory.limit_in_bytes",) if parent == CGROUP else ("memory.max",)
    for name in names:
        (group / name).write_text(str(limit))
    return group


def _peak(group: Path) -> int:
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if (group / name).exists():
            return int((group / name).read_text())
    return 0
