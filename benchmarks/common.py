"""What benchmarks share: turns, medians, and the machine in words."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path


def interleaved(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Time the cases in turn, so that a slow moment of the machine hits all of them alike.

    Returns:
        By case: median and best wall time in seconds, and cores, the process's CPU time over wall time in the median round.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for name in cases:
        cases[name]()
    for _ in range(rounds):
        for name, call in cases.items():
            cpu, start = time.process_time(), time.perf_counter()
            call()
            wall = time.perf_counter() - start
            times[name].append((wall, (time.process_time() - cpu) / wall))
    out = {}
    for name, seen in times.items():
        wall = statistics.median(w for w, _ in seen)
        out[name] = {"median_s": wall, "best_s": min(seen)[0], "cores": statistics.median(c for _, c in seen)}
    return out


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    """The machine and versions that a figure belongs to."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "load": round(os.getloadavg()[0], 1),
    }


def print_table(header: list[str], rows: list[list[object]]) -> None:
    """Columns as wide as they need to be; numbers to the right."""
    cells = [[f"{c:.2f}" if isinstance(c, float) else str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))


def print_json(result: dict[str, object]) -> None:
    """The last line of a benchmark's output."""
    print(json.dumps(result), flush=True)
