"""One number of bytes for everything the process holds, split into its parts.

`plan` prints the split, `models.load` keeps to it. Sizes are bytes.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tiny_qmoe_mlx.container import Container
from tiny_qmoe_mlx.errors import BudgetError, shown
from tiny_qmoe_mlx.footprint import kv_bytes, loading_bytes, picks, program_bytes, scratch_bytes, weight_bytes

UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)},
}
AUTO_SHARE = 0.65
MB = 1_000_000
DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class Budget:
    """How a budget is spent.

    context: tokens that kv_bytes is for; loading_bytes: the most that is held before there is a pool; slots: per record
    size, the number of pool slots; least_slots: the fewest that work; mode: "resident" where every expert has one, else
    "streamed".
    """

    budget_bytes: int
    context: int
    runtime_bytes: int
    weight_bytes: int
    kv_bytes: int
    scratch_bytes: int
    loading_bytes: int
    slots: dict[int, int]
    mode: str
    min_budget_bytes: int
    resident_budget_bytes: int
    least_slots: dict[int, int]

    @property
    def pool_bytes(self) -> int:
        return sum(size * count for size, count in self.slots.items())

    @property
    def least_pool_bytes(self) -> int:
        return sum(size * count for size, count in self.least_slots.items())


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the control group that the process runs in, whichever is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def parse_memory(text: str | int, machine: int | None = None) -> int:
    """Bytes of a budget given as 6GB, 512MiB, 60%, auto, or a plain number of bytes.

    Raises:
        BudgetError: it cannot be read, is not positive, or is more than the machine has.
    """
    machine = machine or machine_memory()
    word = str(text).strip().upper()
    if word == "AUTO":
        return int(machine * AUTO_SHARE)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[A-Z]*)", word)
    if not match or match[2] not in (*UNITS, "%"):
        raise BudgetError(
            f"[memory] a budget should look like 6GB, 512MiB, 60%, auto or a number of bytes, received {shown(text)!r}."
        )
    scale = machine / 100 if match[2] == "%" else UNITS[match[2]]
    size = int(min(float(match[1]) * scale, 2.0 * machine))
    if not 0 < size <= machine:
        raise BudgetError(
            f"[memory] a budget should be more than 0 and at most this machine's {show(machine)}, received "
            f"{shown(text)!r}."
        )
    return size


def show(size: float) -> str:
    """Bytes for people, rounded up so that a shown minimum suffices when it is typed in."""
    for unit, scale in (("GB", 1000**3), ("MB", 1000**2), ("KB", 1000)):
        if size >= scale:
            return f"{math.ceil(size / scale * 100) / 100:g}{unit}"
    return f"{int(size)}B"


def split(container: Container, budget: int, context: int = DEFAULT_CONTEXT, cpu: bool = True) -> Budget:
    """Split a budget for a converted model.

    Args:
        container: the open model.
        budget: bytes for everything.
        context: tokens of KV cache to provide for.
        cpu: whether MLX computes on the CPU (in float32).

    Raises:
        BudgetError: too small, with the smallest budget that works.
    """
    runtime, weights = program_bytes(container), weight_bytes(container, cpu)
    kv, scratch = kv_bytes(container.config, context, cpu), scratch_bytes(container, context, cpu)
    fixed, loading = runtime + weights + kv + scratch, loading_bytes(container, cpu)
    counts = _records(container)
    least = {size: min(count, picks(container)) for size, count in counts.items()}
    smallest, resident = (max(loading, fixed + sum(s * n for s, n in slots.items())) for slots in (least, counts))
    if budget < smallest:
        raise BudgetError(
            f"[memory] {show(budget)} is too small for this model with a context of {context} tokens; the smallest "
            f"that works is "
            f"{show(smallest)}, and {show(resident)} keeps every expert in memory."
        )
    slots = counts if budget >= resident else _share(counts, least, budget - fixed)
    mode = "resident" if budget >= resident else "streamed"
    return Budget(budget, context, runtime, weights, kv, scratch, loading, slots, mode, smallest, resident, least)


def _records(container: Container) -> dict[int, int]:
    """Number of records of each size."""
    counts: dict[int, int] = {}
    for layer in container.spec.layers:
        counts[layer.slot] = counts.get(layer.slot, 0) + layer.experts
    return counts


def _share(counts: dict[int, int], least: dict[int, int], pool: int) -> dict[int, int]:
    """Slots per record size: each size gets the same share of its records above the least that works."""
    spare = pool - sum(size * n for size, n in least.items())
    wanted = sum(size * (counts[size] - least[size]) for size in counts)
    return {
        size: least[size] + int((counts[size] - least[size]) * spare / wanted) if wanted else least[size]
        for size in counts
    }
