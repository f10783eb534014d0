"""Slots for records of one size, and which expert lies in which: `order` says who leaves, pins stay.

Nothing here locks or reads; `cache.ExpertCache` does.
"""

import ctypes
import sys

import mlx.core as mx
import numpy as np

from tiny_qmoe_mlx import metal
from tiny_qmoe_mlx.errors import BudgetError
from tiny_qmoe_mlx.streaming.order import Key, Order

PAGE = 4096
MADV_DONTNEED, MADV_FREE_REUSABLE = 4, 7  # Linux: pages go at once; macOS: the system may take them


class Pool:
    """Slots for records of one size in one MLX array, so that a GPU kernel may read what `preadv` wrote.

    Attributes:
        data: u8 (slots * record_bytes,), a writable view of `array` from byte `base` on; slot 0 begins at a page.
        slot_of: slot of each (layer, expert) in memory.
        order: in which order they leave.
        pins: how many products use an expert, or wait for it.
        resident: every expert of this size has its slot for good.
        most, least: bounds of `active`, which pressure moves between.
        reserved: slots that `withdraw` leaves: some demand holds so many at once.
    """

    def __init__(self, record_bytes: int, slots: int, least: int = 1):
        self.record_bytes = record_bytes
        self.slots = self.most = slots
        self.least = min(least, slots)
        spare = -(-PAGE // record_bytes)  # rows to reach the next page with
        self.array = _zeros(slots + spare, record_bytes)
        whole = np.asarray(self.array).reshape(-1)
        self.base = -whole.ctypes.data % PAGE
        self.data = whole[self.base : self.base + record_bytes * slots]
        self.resident = False
        self.reserved = 0
        self.slot_of: dict[Key, int] = {}
        self.order = Order()
        self.pins: dict[Key, int] = {}
        self.free = list(range(slots - 1, -1, -1))
        self.withdrawn: list[int] = []

    @property
    def active(self) -> int:
        """Slots that have memory now."""
        return self.slots - len(self.withdrawn)

    def slot(self, index: int) -> np.ndarray:
        """The bytes of one slot, u8 (record_bytes,)."""
        return self.data[index * self.record_bytes : (index + 1) * self.record_bytes]

    def take(self) -> int | None:
        """A slot to fill: a free one, or that of the next expert to leave without a pin; None where all are in use."""
        if self.free:
            return self.free.pop()
        leaves = self.order.leave(self.pins)
        return None if leaves is None else self.slot_of.pop(leaves)

    def put(self, key: Key, slot: int) -> None:
        """The expert is in memory from now on."""
        self.slot_of[key] = slot
        self.order.use(key)

    def pin(self, key: Key) -> None:
        self.pins[key] = self.pins.get(key, 0) + 1

    def unpin(self, key: Key) -> None:
        self.pins[key] -= 1
        if not self.pins[key]:
            del self.pins[key]

    def withdraw(self, count: int) -> int:
        """Give the memory of up to `count` slots back to the system, those of the first to leave; how many it was."""
        done, count = 0, min(count, self.active - max(self.least, self.reserved))
        while done < count and (slot := self.take()) is not None:
            self.withdrawn.append(slot)
            _give_back(self.slot(slot))
            done += 1
        return done

    def restore(self, count: int) -> int:
        """Use up to `count` withdrawn slots again; how many it was."""
        stay = len(self.withdrawn) - max(0, min(count, self.most - self.active))
        back = self.withdrawn[stay:]
        del self.withdrawn[stay:]
        self.free += back
        return len(back)


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


def _give_back(memory: np.ndarray) -> None:
    """Tell the system that whole pages of this memory hold nothing; what macOS takes of a GPU buffer is unmeasured."""
    start = -(-memory.ctypes.data // PAGE) * PAGE
    size = (memory.ctypes.data + memory.nbytes) // PAGE * PAGE - start
    if size > 0:
        advice = MADV_FREE_REUSABLE if sys.platform == "darwin" else MADV_DONTNEED
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)
