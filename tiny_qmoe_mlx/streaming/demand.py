"""Demands of a product for a layer's experts, which hold them in their slots until the product is done."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from tiny_qmoe_mlx.streaming.cache import ExpertCache
from tiny_qmoe_mlx.streaming.readers import Read

SWEEP = 16  # slots that a prefill reads through, a quarter of the pool at most
GROUP = 4  # experts that a prefill computes at once: its threads share whole experts
STALL_S = 5.0  # seconds without a record before it is reported
log = logging.getLogger("tiny_qmoe_mlx")


def load_all(cache: ExpertCache, progress: Callable[[int], None] = lambda n: None) -> None:
    """Read every expert of those sizes that have a slot for each of theirs; they stay."""
    layers = cache.store.container.spec.layers
    for size, pool in cache.pools.items():
        mine = [i for i, layer in enumerate(layers) if layer.slot == size]
        if pool.active < sum(layers[i].experts for i in mine):
            continue
        for i in mine:
            load(cache, i, range(layers[i].experts))
            progress(layers[i].experts)
        pool.resident = True


def load(cache: ExpertCache, layer: int, experts: Iterable[int]) -> None:
    """Bring experts into memory ahead of any demand, without counting them."""
    with Demand(cache, layer, list(experts), count=False) as demand:
        for group, _ in demand:
            demand.release(group)


class Demand:
    """A layer's experts on their way to a product. Iterating gives (experts, offsets int64 in the pool's `data`) of
    those in memory first, then of the others as they arrive; each group is pinned until `release`. A context manager:
    leaving it releases what is left.

    Iterating raises what reading raised: FormatError, OSError.
    """

    def __init__(self, cache: ExpertCache, layer: int, experts: list[int], cold: bool = False, count: bool = True):
        """
        Args:
            cache: where the experts are kept.
            layer: index among the MoE layers.
            experts: distinct, ascending.
            cold: read through few slots, in file order, and leave those that are in use often alone (prefill).
            count: as use, and as hits and misses.
        """
        self._cache, self._layer, self._cold = cache, layer, cold
        self._pool = cache.pool_of_layer[layer]
        self._pinned: set[int] = set()
        self._reading: dict[int, Read | None] = {}  # None: in memory by now, read for another demand
        self._missing: deque[int] = deque()
        self._present: list[int] = []
        self._shared: set[int] = set()  # in memory for others as well: a prefill leaves them where they are
        with cache._changed:
            cache._settle_expected(layer, set(experts))
            self._pool.order.begin(layer, counts=not cold)
            for expert in experts:
                self._look(expert)
            self._shared.update(self._present)
            if count:
                cache.use[layer][experts] += 1
                cache.hits += len(self._present)
                cache.misses += len(experts) - len(self._present)
            self._ask()

    @property
    def waits(self) -> bool:
        """Whether some experts are not in memory yet."""
        return bool(self._reading or self._missing)

    def _look(self, expert: int) -> None:
        key = (self._layer, expert)
        if key in self._pool.slot_of:
            self._present.append(expert)
            self._pin(expert)
            if not self._cold:
                self._pool.order.use(key)
        elif key in self._cache._loading:
            self._reading[expert] = self._cache._loading[key][0]
            self._pin(expert)
        else:
            self._missing.append(expert)

    def _pin(self, expert: int) -> None:
        self._pinned.add(expert)
        self._pool.pin((self._layer, expert))

    def _look_again(self) -> None:
        """What was missing may have been asked for since by a demand in another thread: nothing is read twice."""
        for expert in list(self._missing):
            key = (self._layer, expert)
            if key in self._pool.slot_of or key in self._cache._loading:
                self._cache._claim(key)
                self._missing.remove(expert)
                self._reading[expert] = None if key in self._pool.slot_of else self._cache._loading[key][0]
                self._shared.add(expert)
                self._pin(expert)

    def _ask(self) -> None:
        """Read as many of the missing as there are slots, in a prefill as its window has room."""
        self._look_again()
        most = len(self._missing)
        if self._cold:
            window = max(1, min(SWEEP, self._pool.active // 4))
            most = min(most, window - len(self._pinned - self._shared))
        if most <= 0:
            return
        before = list(self._missing)[:most]
        for expert in before[: self._cache._request(self._layer, self._missing, most)]:
            self._reading[expert] = self._cache._loading[self._layer, expert][0]
            self._pin(expert)

    def __iter__(self) -> Iterator[tuple[list[int], np.ndarray]]:
        if self._present:
            yield self._group(self._present)
        while self.waits:
            yield self._group(self._arrived())

    def _group(self, experts: list[int]) -> tuple[list[int], np.ndarray]:
        slots = [self._pool.slot_of[self._layer, expert] for expert in experts]
        return experts, np.array(slots, np.int64) * self._pool.record_bytes

    def _arrived(self) -> list[int]:
        """Wait until some of what is read is in memory, in a prefill for a few of them."""
        start, cache = time.perf_counter(), self._cache
        with cache._changed:
            self._ask()
            stalled = False
            while not (found := self._done()):
                if not cache._wait(STALL_S) and time.perf_counter() - start > STALL_S:
                    cache.stalls += not stalled
                    stalled = True
                    self._report(time.perf_counter() - start)
                self._ask()
            cache.io_wait_s += time.perf_counter() - start
        return found

    def _done(self) -> list[int]:
        """Experts that have been read and not been given out yet; none where a prefill may wait for more."""
        layer, found = self._layer, []
        for expert, read in self._reading.items():
            if read is not None and read.error is not None:
                raise read.error
            if (layer, expert) in self._pool.slot_of:
                found.append(expert)
        if self._cold and len(found) < min(GROUP, len(self._reading)):
            return []
        for expert in found:
            del self._reading[expert]
        return found

    def _report(self, seconds: float) -> None:
        name = self._cache.store.container.expert_file(self._layer)
        log.warning("[%s] experts have not come for %.0f s: the disk stalls; waiting", name, seconds)

    def release(self, experts: Iterable[int]) -> None:
        """Products of these experts are done; those that a prefill read are the first to leave."""
        with self._cache._changed:
            for expert in experts:
                key = (self._layer, expert)
                self._pinned.discard(expert)
                self._pool.unpin(key)
                if self._cold and expert not in self._shared:
                    self._pool.order.dismiss(key)
            self._cache._changed.notify_all()

    def keep(self) -> list[int]:
        """Hand the pins over to the caller, who gives them back by `ExpertCache.unpin`."""
        kept = sorted(self._pinned)
        self._pinned.clear()
        return kept

    def __enter__(self) -> "Demand":
        return self

    def __exit__(self, *error: object) -> None:
        with self._cache._changed:
            for expert in self._pinned:
                self._pool.unpin((self._layer, expert))
            self._pinned.clear()
            self._cache._changed.notify_all()
