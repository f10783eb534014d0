"""Which experts are in memory, and the way of those that are not: reads, lookahead, pressure.

One lock guards all that is known of slots; nobody holds it while a disk or a product works. A slot in use is pinned
from the demand to its release, so it is never refilled while a product may read it.
"""

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import numpy as np

from tiny_qmoe_mlx import interrupts
from tiny_qmoe_mlx.streaming.order import Key
from tiny_qmoe_mlx.streaming.pool import Pool
from tiny_qmoe_mlx.streaming.readers import Read, Readers
from tiny_qmoe_mlx.streaming.store import ExpertStore

READERS = 8
RUN_BYTES = 1 << 20  # adjacent records are read in one go up to so many bytes
POLL_S = 0.1  # seconds between two looks for a Ctrl-C


class ExpertCache:
    """Experts of all layers under one budget.

    Attributes:
        hits, misses: demands served from memory and from disk; the load of a resident model counts as neither.
        io_wait_s: seconds that products waited for misses; stalls: waits of more than five seconds.
        lookahead_reads, lookahead_used: records read because they were expected, and how many of them were demanded.
        use: int64 (experts,) for each layer, how often an expert was demanded.
    """

    def __init__(
        self,
        store: ExpertStore,
        slots: dict[int, int],
        readers: int = READERS,
        least: Mapping[int, int] = MappingProxyType({}),
    ):
        """slots: number of slots per record size in bytes; readers: threads; least: of the slots, the fewest that work,
        1 where it is not given."""
        layers = store.container.spec.layers
        self.store = store
        self.pools = {size: Pool(size, count, least.get(size, 1)) for size, count in slots.items()}
        self.pool_of_layer = [self.pools[layer.slot] for layer in layers]
        self.hits = self.misses = self.stalls = self.lookahead_reads = self.lookahead_used = 0
        self.io_wait_s = 0.0
        self.use = [np.zeros(layer.experts, np.int64) for layer in layers]
        self._changed = threading.Condition()
        self._loading: dict[Key, tuple[Read, int]] = {}  # with the slot
        self._expected: list[dict[int, Read]] = [{} for _ in layers]  # lookahead of each layer: expert, read
        self._readers = Readers(store, readers, self._finished)

    @property
    def pool_bytes(self) -> int:
        with self._changed:  # a server may tell its figures while it is closed
            return sum(pool.array.nbytes - len(pool.withdrawn) * pool.record_bytes for pool in self.pools.values())

    @property
    def disk_busy_s(self) -> float:
        return self._readers.busy_s

    def experts_of(self, layer: int) -> int:
        """Number of a layer's experts."""
        return self.store.container.spec.layers[layer].experts

    def slots(self, layer: int) -> np.ndarray:
        """Slot of each expert of a layer, int64 (experts,); 0 for those that are not in memory."""
        with self._changed:
            held = self.pool_of_layer[layer].slot_of
            return np.array([held.get((layer, e), 0) for e in range(self.experts_of(layer))])

    def snapshot(self) -> list[str]:
        """For each layer a character per expert: "r" in memory, "l" being read, "." neither."""
        states = [["."] * self.experts_of(layer) for layer in range(len(self.use))]
        with self._changed:
            for layer, expert in self._loading:
                states[layer][expert] = "l"
            for pool in self.pools.values():
                for layer, expert in pool.slot_of:
                    states[layer][expert] = "r"
        return ["".join(state) for state in states]

    def expect(self, layer: int, experts: list[int]) -> None:
        """Read experts that a later demand of the layer may name, when the disk has nothing else to do.

        They take at most a quarter of the slots; those that the demand does not name leave first.
        """
        pool = self.pool_of_layer[layer]
        reads: list[Read] = []
        with self._changed:
            self._settle_expected(layer, set())  # of a demand that never came
            for expert in experts:
                key = (layer, expert)
                if key in pool.slot_of or key in self._loading or len(reads) >= pool.active // 4:
                    continue
                if (slot := pool.take()) is None:
                    break
                read = Read(layer, [expert], [pool.slot(slot)])
                self._loading[key] = read, slot
                self._expected[layer][expert] = read
                reads.append(read)
        self._readers.submit(reads, demanded=False)

    def _settle_expected(self, layer: int, demanded: set[int]) -> None:
        """What was expected of a layer is demanded, dropped before it is read, or the first to leave."""
        pool = self.pool_of_layer[layer]
        for expert, read in list(self._expected[layer].items()):
            key = (layer, expert)
            if expert in demanded:
                self._claim(key)
            elif key in self._loading and self._readers.drop(read):
                pool.free.append(self._loading.pop(key)[1])
            else:
                self.lookahead_reads += 1
                read.unwanted = True  # where it is still under way
                if key in pool.slot_of:
                    pool.order.dismiss(key)
        self._expected[layer].clear()

    def _claim(self, key: Key) -> None:
        """What was expected is demanded: nobody may drop it any more."""
        if (read := self._expected[key[0]].pop(key[1], None)) is not None:
            self._readers.promote(read)
            self.lookahead_reads += 1
            # else it has left again already
            self.lookahead_used += key in self.pool_of_layer[key[0]].slot_of or key in self._loading

    def _request(self, layer: int, missing: deque[int], most: int) -> int:
        """Start to read up to `most` of the missing experts into what slots there are; how many."""
        pool, size = self.pool_of_layer[layer], self.pool_of_layer[layer].record_bytes
        reads: list[Read] = []
        slots: list[list[int]] = []
        for _ in range(min(most, len(missing))):
            if (slot := pool.take()) is None:
                break
            expert = missing.popleft()
            joins = reads and reads[-1].experts[-1] == expert - 1 and (len(reads[-1].experts) + 1) * size <= RUN_BYTES
            if not joins:
                reads.append(Read(layer, [], []))
                slots.append([])
            reads[-1].experts.append(expert)
            reads[-1].into.append(pool.slot(slot))
            slots[-1].append(slot)
        for read, places in zip(reads, slots, strict=True):
            for expert, slot in zip(read.experts, places, strict=True):
                self._loading[layer, expert] = read, slot
        self._readers.submit(reads)
        return sum(len(read.experts) for read in reads)

    def _finished(self, read: Read) -> None:
        """In a reader's thread: what was read is in memory, or its slots are free again."""
        with self._changed:
            pool = self.pool_of_layer[read.layer] if self.pool_of_layer else None
            for expert in read.experts:
                key = (read.layer, expert)
                _, slot = self._loading.pop(key, (None, 0))
                if pool is None:  # closed meanwhile
                    continue
                if read.error is None:
                    pool.put(key, slot)
                    if read.unwanted:
                        pool.order.dismiss(key)
                else:
                    pool.free.append(slot)
            self._changed.notify_all()

    def _wait(self, seconds: float) -> bool:
        """Wait for a change, under the lock; False after so many seconds without. A Ctrl-C is let through."""
        until = time.perf_counter() + seconds
        while not self._changed.wait(POLL_S if interrupts.waits() else seconds):
            interrupts.now()
            if time.perf_counter() >= until:
                return False
        return True

    def unpin(self, layer: int, experts: Iterable[int]) -> None:
        """Give back the pins that `Demand.keep` handed out."""
        with self._changed:
            for expert in experts:
                self.pool_of_layer[layer].unpin((layer, expert))
            self._changed.notify_all()

    def reserve(self, layer: int, experts: int) -> bool:
        """Whether a demand may hold so many of a layer's experts at once; `shrink` leaves it the slots, until the next
        such question about their pool."""
        pool = self.pool_of_layer[layer]
        with self._changed:
            fits = experts <= pool.active
            pool.reserved = experts if fits else 0
            return fits

    def shrink(self, size: int) -> int:
        """Give memory back to the system, of the experts that are first to leave; bytes that it was.

        Pools whose experts are all in memory for good stay as they are.
        """
        return self._resize(size, Pool.withdraw)

    def grow(self, size: int) -> int:
        """Use memory again that `shrink` gave back; bytes that it was."""
        return self._resize(size, Pool.restore)

    def resize(self, slots: dict[int, int]) -> None:
        """Let each pool use so many of its slots, at most those that it was made with; the first to leave go.

        It waits for products that use them. Experts that were in memory for good may leave from now on.
        """
        with self._changed:
            for size, pool in self.pools.items():
                pool.reserved = 0  # of a demand that is over: none begins while the size changes
                pool.resident, pool.most = pool.resident and pool.active == slots[size], slots[size]
                while (extra := pool.active - slots[size]) > 0:
                    if not pool.withdraw(extra):
                        self._changed.wait()
                pool.restore(pool.slots)
            self._changed.notify_all()

    def _resize(self, size: int, change: Callable[[Pool, int], int]) -> int:
        pools = [pool for pool in self.pools.values() if not pool.resident]
        total, done = sum(p.slots * p.record_bytes for p in pools), 0
        with self._changed:
            for pool in pools:
                share = -(-size * pool.slots // max(1, total))  # at least one: records may be larger than a step
                done += change(pool, share) * pool.record_bytes
            self._changed.notify_all()
        return done

    def close(self) -> None:
        """Stop the readers and drop the pools; a second call does nothing."""
        if self._readers.close():
            self.store.close()
        else:  # a reader may still write: its slot must stay where it is, and its file open
            for pool in self.pools.values():
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool.array))
        with self._changed:
            self.pools.clear()
            self.pool_of_layer.clear()
