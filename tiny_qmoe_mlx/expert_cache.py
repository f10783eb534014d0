"""Which experts are in memory: one pool of slots per record size, least recently used leaves first, pins stay.

A slot in use is pinned from `acquire` to `release`, so it is never refilled while a product may read it.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import mlx.core as mx
import numpy as np

from tiny_qmoe_mlx import metal
from tiny_qmoe_mlx.errors import BudgetError
from tiny_qmoe_mlx.expert_store import ExpertStore

READERS = 8
PAGE = 4096


class Pool:
    """Slots for records of one size in one MLX array, so that a GPU kernel may read what `preadv` wrote.

    Attributes:
        data: u8 (slots * record_bytes,), a writable view of `array` from byte `base` on; slot 0 begins at a page.
        slot_of: slot of each (layer, expert) in memory, least recently used first.
        resident: every expert of this size has its slot for good.
    """

    def __init__(self, record_bytes: int, slots: int):
        self.record_bytes = record_bytes
        self.slots = slots
        spare = -(-PAGE // record_bytes)  # rows to reach the next page with
        self.array = _zeros(slots + spare, record_bytes)
        whole = np.asarray(self.array).reshape(-1)
        self.base = -whole.ctypes.data % PAGE
        self.data = whole[self.base : self.base + record_bytes * slots]
        self.resident = False
        self.slot_of: OrderedDict[tuple[int, int], int] = OrderedDict()
        self.pins: dict[tuple[int, int], int] = {}
        self.free = list(range(slots - 1, -1, -1))

    def slot(self, index: int) -> np.ndarray:
        """The bytes of one slot, u8 (record_bytes,)."""
        return self.data[index * self.record_bytes : (index + 1) * self.record_bytes]

    def take(self) -> int:
        """A slot to fill: a free one, or that of the least recently used expert without a pin."""
        if self.free:
            return self.free.pop()
        victim = next(key for key in self.slot_of if not self.pins.get(key))
        return self.slot_of.pop(victim)


def _zeros(rows: int, columns: int) -> mx.array:
    """u8 memory of a pool; two-dimensional, as no dimension of an MLX array may exceed 2^31 - 1.

    Raises:
        BudgetError: more than the GPU takes in one buffer.
    """
    limit = mx.device_info().get("max_buffer_length", rows * columns) if metal.available() else rows * columns
    if rows * columns > int(limit):
        raise BudgetError(
            f"[memory] a pool of {rows * columns} bytes is more than the {limit} that this GPU takes in one buffer; "
            "give a smaller --memory."
        )
    array = mx.zeros((rows, columns), dtype=mx.uint8)
    mx.eval(array)
    return array


class ExpertCache:
    """Experts of all layers under one budget.

    Attributes:
        hits, misses: demands served from memory and from disk; the load of a resident model counts as neither.
        io_wait_s: seconds that products waited for misses.
    """

    def __init__(self, store: ExpertStore, slots: dict[int, int]):
        """slots: number of slots per record size in bytes."""
        self.store = store
        self.pools = {size: Pool(size, count) for size, count in slots.items()}
        self.pool_of_layer = [self.pools[layer.record_bytes] for layer in store.container.spec.layers]
        self.hits = 0
        self.misses = 0
        self.io_wait_s = 0.0
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="expert-reader")

    @property
    def pool_bytes(self) -> int:
        return sum(pool.array.nbytes for pool in self.pools.values())

    def load_all(self, progress: Callable[[int], None] = lambda n: None) -> None:
        """Read every expert of every layer into its slot; needs a slot for each."""
        for layer, spec in enumerate(self.store.container.spec.layers):
            self._fill(layer, list(range(spec.experts)))
            self.release(layer, range(spec.experts))
            progress(spec.experts)
        for pool in self.pools.values():
            pool.resident = True

    def experts_of(self, layer: int) -> int:
        """Number of a layer's experts."""
        return self.store.container.spec.layers[layer].experts

    def slots(self, layer: int) -> np.ndarray:
        """Slot of each expert of a layer, int64 (experts,); 0 for those that are not in memory."""
        held = self.pool_of_layer[layer].slot_of
        return np.array([held.get((layer, e), 0) for e in range(self.store.container.spec.layers[layer].experts)])

    def acquire(self, layer: int, experts: list[int]) -> np.ndarray:
        """Bring experts into memory and pin them.

        Args:
            layer: index among the MoE layers.
            experts: distinct, at most as many as the pool has slots.

        Returns:
            int64 (experts,): offset of each record in the pool's `data`.

        Raises:
            FormatError, OSError: from reading; nothing stays pinned then.
        """
        pool = self.pool_of_layer[layer]
        absent = [e for e in experts if (layer, e) not in pool.slot_of]
        self.hits += len(experts) - len(absent)
        self.misses += len(absent)
        for e in experts:
            if (layer, e) in pool.slot_of:
                pool.slot_of.move_to_end((layer, e))
                pool.pins[layer, e] = pool.pins.get((layer, e), 0) + 1
        start = time.perf_counter()
        try:
            self._fill(layer, absent)
        except BaseException:
            self.release(layer, [e for e in experts if e not in absent])
            raise
        self.io_wait_s += time.perf_counter() - start if absent else 0.0
        return np.array([pool.slot_of[layer, e] for e in experts], np.int64) * pool.record_bytes

    def _fill(self, layer: int, experts: list[int]) -> None:
        """Read experts into slots, in parallel, and pin them once; all or none."""
        pool = self.pool_of_layer[layer]
        slots = [pool.take() for _ in experts]
        tasks = [
            self._readers.submit(self.store.read, layer, e, pool.slot(s)) for e, s in zip(experts, slots, strict=True)
        ]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            for task in tasks:
                task.cancel()
            wait(tasks)  # a reader may still write into its slot
            pool.free += slots
            raise
        for e, s in zip(experts, slots, strict=True):
            pool.slot_of[layer, e] = s
            pool.pins[layer, e] = 1

    def release(self, layer: int, experts: list[int] | range) -> None:
        """Give back pins of `acquire`."""
        pool = self.pool_of_layer[layer]
        for e in experts:
            pool.pins[layer, e] -= 1
            if not pool.pins[layer, e]:
                del pool.pins[layer, e]

    def close(self) -> None:
        """Stop the readers and drop the pools."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        self.pools.clear()
        self.pool_of_layer.clear()
        self.store.close()
