"""What a loaded model holds beside its weights: files, a pool of experts, readers, a budget, and counters."""

import resource
import sys
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tiny_qmoe_mlx import budget as budgets
from tiny_qmoe_mlx import lookahead as ahead
from tiny_qmoe_mlx import ops, process
from tiny_qmoe_mlx.container import Container
from tiny_qmoe_mlx.door import Door
from tiny_qmoe_mlx.layers import Memory, RecordExperts
from tiny_qmoe_mlx.streaming import profile as profiles
from tiny_qmoe_mlx.streaming import trace as traces
from tiny_qmoe_mlx.streaming.cache import READERS, ExpertCache
from tiny_qmoe_mlx.streaming.demand import load, load_all
from tiny_qmoe_mlx.streaming.pressure import Pressure
from tiny_qmoe_mlx.streaming.store import ExpertStore


@dataclass(frozen=True)
class Streaming:
    """How experts that are not in memory are read.

    readers: threads; checks: which reads have their checksum verified ("first", "always", "never"); lookahead: "auto",
    "on" or "off"; profile: a file of how often each expert was used, read if it is there and written on closing; trace:
    a file to write every routing decision into.
    """

    readers: int = READERS
    checks: str = "first"
    lookahead: str = "auto"
    profile: str | Path | None = None
    trace: str | Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.readers <= 64:
            raise ValueError(f"[streaming] readers should lie in 1 to 64, received {self.readers}.")


class Runtime:
    """What a loaded model holds beside its weights: files, pool, budget, counters. `model.tiny_qmoe` is one."""

    def __init__(
        self,
        container: Container,
        budget: budgets.Budget,
        layers: list[RecordExperts],
        streaming: Streaming = Streaming(),  # noqa: B008 (frozen)
        door: Door | None = None,
    ):
        self.container = container
        self.budget, self._loaded_bytes = budget, budget.budget_bytes
        # of the directory that the process is in now: a program may leave it before the profile is written
        profile = Path(streaming.profile).absolute() if streaming.profile else None
        self.streaming = streaming = replace(streaming, profile=profile)
        warm = _warmest(container, budget, streaming)
        judge = ahead.Judge(streaming.lookahead)
        self._door = door or Door()
        self.store = ExpertStore(container, [layer._kind for layer in layers], streaming.checks)
        try:
            self.cache = ExpertCache(self.store, budget.slots, streaming.readers, budget.least_slots)
        except BaseException:  # no memory for it
            self.store.close()
            raise
        self._pressure = Pressure(self.cache, budget.pool_bytes, budget.least_pool_bytes)
        # the threads know the cache alone: a model that is forgotten without `close` ends them, and frees the pool
        self._end = weakref.finalize(self, _end, door, self._pressure, self.cache)
        self.memory = Memory(self.cache, judge=judge)
        self.dispatch = self.memory.dispatch
        for layer in layers:
            layer.attach(self.memory)
        if streaming.trace:
            self.memory.trace = traces.TraceWriter(streaming.trace, _trace_header(container))
        for index, experts in warm.items():
            load(self.cache, index, experts)

    def stream(self, model: nn.Module, layers: list[RecordExperts]) -> None:
        """Get ready to overlap reads with what lies around the expert layers, and to yield memory under pressure."""
        hidden = self.container.spec.layers[0].shapes[0][1]
        self.memory.around = ahead.surroundings(model, layers, hidden)
        self._pressure.start()

    def set_memory(self, memory: str | int) -> None:
        """Change the budget between two tokens: the pool of experts gives memory back, or takes it again. Tokens stay
        the same. What `load` gave the pool is the most that it can have.

        Args:
            memory: as `load` takes it.

        Raises:
            BudgetError: too small, with the smallest that works; or more than the pool was made for. It is as it was.
            ValueError: the model has been closed; this is a fork of the process that it was loaded in.
        """
        with self._door.call():
            self._set_memory(memory)

    def _set_memory(self, memory: str | int) -> None:
        cpu = mx.default_device() == mx.cpu
        asked = budgets.split(self.container, budgets.parse_memory(memory), self.budget.context, cpu)
        pools = self.cache.pools.items()
        if any(asked.slots[size] > pool.slots for size, pool in pools):
            most = f"{budgets.show(self._loaded_bytes)}, with which the model was loaded"
            raise budgets.BudgetError(
                f"[memory] the budget should be at most {most}, received {memory}; load it again."
            )
        if ops.on_gpu() and any(pool.resident and asked.slots[size] < pool.active for size, pool in pools):
            raise budgets.BudgetError(
                f"[memory] the budget should keep experts that are in memory for good, as a GPU's work may still read "
                f"them, received {memory}; load the model again."
            )
        with self.memory.lock:
            self.memory.settle()
            self._pressure.resize(asked.pool_bytes, lambda: self.cache.resize(asked.slots))
        self.budget = asked
        load_all(self.cache)
        if asked.mode == "streamed":
            self._pressure.start()

    def stats(self) -> dict[str, Any]:
        """Counters since loading; sizes in bytes.

        Raises:
            ValueError: this is a fork of the process that the model was loaded in.
        """
        process.refuse_fork("model")
        cache, around = self.cache, self.memory.around
        return {
            "budget_bytes": self.budget.budget_bytes,
            "resident_bytes": self.budget.weight_bytes + cache.pool_bytes,
            "pool_bytes": self.budget.pool_bytes,
            "peak_memory_bytes": peak_memory(),
            "expert_hits": cache.hits,
            "expert_misses": cache.misses,
            "records_read": self.store.records_read,
            "bytes_read": self.store.bytes_read,
            "read_retries": self.store.retries,
            "direct_reads": self.store.direct,
            "io_wait_s": cache.io_wait_s,
            "disk_busy_s": cache.disk_busy_s,
            "stalls": cache.stalls,
            "lookahead_layers": sum(a.next_block is not None for a in around),
            "shared_layers": sum(a.shared is not None for a in around),
            "lookahead_reads": cache.lookahead_reads,
            "lookahead_used": cache.lookahead_used,
            "mode": self.budget.mode,
            "dispatch": dict(self.dispatch.counts),
        }

    def close(self) -> None:
        """Close the files, free the pool, write the profile; the model cannot run afterwards. In a fork of the process
        that the model was loaded in it does nothing: all of that is the parent's."""
        if not process.at_home():
            return
        self._end()
        calls, self.memory.calls = self.memory.calls, 0
        trace, self.memory.trace = self.memory.trace, None
        if self.streaming.profile and calls:
            profiles.save_profile(self.streaming.profile, self.container, self.cache.use, calls)
        if trace is not None:
            trace.close()


def _end(door: Door | None, pressure: Pressure, cache: ExpertCache) -> None:
    """Also at the end of the process, while other threads may still generate."""
    if not process.at_home():
        return
    if door is not None:
        door.shut(process.END_S)
    pressure.stop()
    cache.close()


def _trace_header(container: Container) -> dict[str, Any]:
    layers = container.spec.layers
    sizes = [layer.experts for layer in layers], [layer.slot for layer in layers]
    return traces.header(profiles.identity(container), *sizes)


def _warmest(container: Container, budget: budgets.Budget, streaming: Streaming) -> dict[int, list[int]]:
    """Experts to begin with, of each layer, by the profile; none without one."""
    if not streaming.profile or not Path(streaming.profile).exists():
        return {}
    use = profiles.load_profile(streaming.profile, container)
    warm: dict[int, list[int]] = {}
    if budget.mode == "streamed":
        for layer, expert in profiles.warmest(use, container, budget.slots):
            warm.setdefault(layer, []).append(expert)
    return warm


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    if sys.platform == "linux":  # the resource usage would count what the parent held when it started this process
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
