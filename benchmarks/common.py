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
        By case: median_s and best_s, wall time in seconds; cpu_s, the median of the process's CPU time; cores, the
        median of CPU time over wall time.
    """
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for call in cases.values():
        call()
    for _ in range(rounds):
        for name, call in cases.items():
            cpu, start = time.process_time(), time.perf_counter()
            call()
            seen[name].append((time.perf_counter() - start, time.process_time() - cpu))
    median = statistics.median
    return {
        name: {
            "median_s": median(wall for wall, _ in times),
            "best_s": min(wall for wall, _ in times),
            "cpu_s": median(cpu for _, cpu in times),
            "cores": median(cpu / wall for wall, cpu in times),
        }
        for name, times in seen.items()
    }


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


def plot_rates(rows: list[dict], path: Path) -> None:
    """KL divergence (logarithmic) against bits per weight, a line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows if row["kl"] > 0):
        points = sorted((row["bits"], row["kl"]) for row in rows if row["method"] == method)
        axes.plot(
            *zip(*points, strict=True), marker="o", linewidth=2.5 if method.startswith("trellis") else 1, label=method
        )
    axes.set(yscale="log", xlabel="bits per weight, all bytes counted", ylabel="KL divergence to the original (nats)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
