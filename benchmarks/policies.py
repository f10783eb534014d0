"""Which expert leaves a full pool: the engine's policy, four others and the optimum, for replays of a routing trace.

A policy of `slots` slots has `key in policy`, `touch(key)` for a hit, and `insert(key, keep)` for a miss, which makes
room without throwing out what `keep` holds: the pins of the call under way. `serve` runs one call through any of them.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

from tiny_qmoe_mlx.streaming.demand import GROUP, SWEEP

FAR = 1 << 62
ENGINE, BELADY = "by step", "belady"  # the policy that the engine has, and the optimum
STRIDE = 1 << 20  # between the keys of two layers


class Lru:
    """Least recently used."""

    def __init__(self, slots: int):
        self.slots = slots
        self.order: OrderedDict[int, None] = OrderedDict()  # next to leave first

    def __contains__(self, key: int) -> bool:
        return key in self.order

    def touch(self, key: int) -> None:
        self.order.move_to_end(key)

    def insert(self, key: int, keep: Collection[int]) -> None:
        if len(self.order) >= self.slots:
            del self.order[next(k for k in self.order if k not in keep)]
        self.order[key] = None


class LruSwept(Lru):
    """LRU with the engine's way of a prefill: see `sweep`."""

    def call(self, keys: Sequence[int], cold: bool) -> int:
        """Serve one call of distinct keys; returns its misses."""
        present, missing = [key for key in keys if key in self], [key for key in keys if key not in self]
        if cold:
            sweep(self, present, missing)
            return len(missing)
        for key in present:
            self.touch(key)
        for key in missing:
            self.insert(key, ())  # of the call itself only where nothing else is left: it has been used by then
        return len(missing)

    def __len__(self) -> int:
        return len(self.order)

    def drop(self, keep: Collection[int]) -> bool:
        """Throw out the next to leave that is not kept; whether there was one."""
        victim = next((key for key in self.order if key not in keep), None)
        if victim is not None:
            del self.order[victim]
        return victim is not None

    def put_first(self, key: int) -> None:
        """Take a key in, as the next to leave."""
        self.order[key] = None
        self.order.move_to_end(key, last=False)


def sweep(policy: Any, present: Sequence[int], missing: Sequence[int]) -> None:
    """A prefill's call as `streaming.demand` serves it: the hits do not move and are pinned at its start; the misses go
    through a window of at most a quarter of the slots, and are the next to leave, so that they cost decode no more
    than that many. Exact where the prefill's products wait for the disk.
    """
    window, waiting = max(1, min(SWEEP, policy.slots // 4)), deque(missing)
    reading: deque[int] = deque()
    keep: Collection[int] = present
    while reading or waiting:
        while waiting and len(reading) < window:
            if len(policy) + len(reading) >= policy.slots and not policy.drop(keep):
                break
            reading.append(waiting.popleft())
        if not keep:
            for _ in range(min(GROUP, len(reading))):
                policy.put_first(reading.popleft())
        keep = ()  # the hits have been used


class ByStep:
    """The engine's policy. Least recently used, counted in steps: calls of decode of a key's own layer since it was
    used. Of equally old ones the layer that was called last leaves, since its turn comes again after all others. (By
    time, those used longest ago are those of the layers whose turn is next: a pool smaller than what a step uses then
    never hits.) A prefill's misses are the first to leave.
    """

    def __init__(self, slots: int):
        self.slots = slots
        self.first: dict[int, None] = {}  # to leave before all others, the last one at once
        self.held: dict[int, OrderedDict[int, int]] = {}  # layer: key and the layer's call that used it, oldest first
        self.calls: dict[int, int] = {}
        self.layer = 0

    def __len__(self) -> int:
        return len(self.first) + sum(map(len, self.held.values()))

    def keys(self) -> list[int]:
        """All that is in the pool."""
        return [*self.first, *(key for kept in self.held.values() for key in kept)]

    def call(self, keys: Sequence[int], cold: bool) -> int:
        """Serve one call of distinct keys of a layer; returns its misses."""
        self.layer = keys[0] // STRIDE
        mine = self.held.setdefault(self.layer, OrderedDict())
        present = [key for key in keys if key in mine or key in self.first]
        missing = [key for key in keys if key not in present]
        if cold:
            sweep(self, present, missing)
            return len(missing)
        self.calls[self.layer] = self.calls.get(self.layer, 0) + 1
        for key in present:
            self.first.pop(key, None)
            mine[key] = self.calls[self.layer]
            mine.move_to_end(key)
        for key in missing:
            if len(self) >= self.slots:
                self.drop(())
            mine[key] = self.calls[self.layer]
        return len(missing)

    def put_first(self, key: int) -> None:
        """Take a key in, as the next to leave."""
        self.first[key] = None

    def drop(self, keep: Collection[int]) -> bool:
        """Throw out the next to leave that is not kept; whether there was one."""
        loose = next((key for key in reversed(self.first) if key not in keep), None)
        if loose is not None:
            del self.first[loose]
            return True
        oldest = {m: next((key for key in kept if key not in keep), None) for m, kept in self.held.items()}
        layers = [m for m, key in oldest.items() if key is not None]
        if layers:
            layer = max(layers, key=lambda m: self._age(m, oldest[m]))
            del self.held[layer][oldest[layer]]
        return bool(layers)

    def _age(self, layer: int, key: int) -> tuple[int, bool, int]:
        """How long a key is unused, then how long until its layer is called again; the one called now was just used."""
        turn = (layer - self.layer - 1) % STRIDE
        return self.calls.get(layer, 0) - self.held[layer][key], layer != self.layer, turn


class LfuDa:
    """Least frequently used with dynamic ageing (Arlitt and others, 2000): a key's priority is its number of uses since
    it came in, plus the priority of the last one that left; ties leave in order of use.
    """

    def __init__(self, slots: int):
        self.slots = slots
        self.age = 0
        self.clock = 0
        self.entry: dict[int, tuple[int, int, int]] = {}  # key: (priority, time of use, uses)
        self.heap: list[tuple[int, int, int]] = []  # (priority, time of use, key), stale ones among them

    def __contains__(self, key: int) -> bool:
        return key in self.entry

    def touch(self, key: int) -> None:
        self._set(key, self.entry[key][2] + 1)

    def _set(self, key: int, uses: int) -> None:
        self.clock += 1
        self.entry[key] = (self.age + uses, self.clock, uses)
        heapq.heappush(self.heap, (self.age + uses, self.clock, key))

    def insert(self, key: int, keep: Collection[int]) -> None:
        if len(self.entry) >= self.slots:
            pinned = []
            while True:
                item = heapq.heappop(self.heap)
                if self.entry.get(item[2], (None, None))[:2] != item[:2]:
                    continue
                if item[2] not in keep:
                    break
                pinned.append(item)
            self.age = item[0]
            del self.entry[item[2]]
            for other in pinned:
                heapq.heappush(self.heap, other)
        self._set(key, 1)


class Clock:
    """Second chance: a hand goes round the slots, spares those used since it last came by, and takes the next."""

    def __init__(self, slots: int):
        self.slots = slots
        self.keys: list[int] = []
        self.used: list[bool] = []
        self.place: dict[int, int] = {}
        self.hand = 0

    def __contains__(self, key: int) -> bool:
        return key in self.place

    def touch(self, key: int) -> None:
        self.used[self.place[key]] = True

    def insert(self, key: int, keep: Collection[int]) -> None:
        if len(self.keys) < self.slots:
            self.place[key] = len(self.keys)
            self.keys.append(key)
            self.used.append(True)
            return
        while self.used[self.hand] or self.keys[self.hand] in keep:
            self.used[self.hand] = self.used[self.hand] and self.keys[self.hand] in keep
            self.hand = (self.hand + 1) % self.slots
        del self.place[self.keys[self.hand]]
        self.keys[self.hand], self.used[self.hand], self.place[key] = key, True, self.hand
        self.hand = (self.hand + 1) % self.slots


POLICIES: dict[str, Callable[[int], Any]] = {
    ENGINE: ByStep,
    "lru": LruSwept,
    "lru, prefill alike": Lru,
    "lfu-da": LfuDa,
    "clock": Clock,
}


def groups(keys: Sequence[int], cold: bool, slots: int) -> list[Sequence[int]]:
    """A call's keys in the parts that must be in the pool at once: decode all of them, as far as the pool goes; prefill
    one after the other.
    """
    size = 1 if cold else slots
    return [keys[i : i + size] for i in range(0, len(keys), size)]


def serve(policy: Any, keys: Sequence[int], cold: bool) -> int:
    """One call of distinct keys through a policy; returns its misses."""
    if hasattr(policy, "call"):
        return policy.call(keys, cold)
    misses = 0
    for group in groups(keys, cold, policy.slots):
        keep = set(group)
        absent = [key for key in group if key not in policy]
        for key in group:
            if key in policy:
                policy.touch(key)
        for key in absent:
            policy.insert(key, keep)
        misses += len(absent)
    return misses


def belady(calls: Sequence[tuple[Sequence[int], bool]], slots: int) -> list[int]:
    """Misses of each call (its keys, whether it is a prefill) where the key that leaves is always the one whose next
    use is farthest (Belady 1966): nobody who has to hold a call's keys at once can do better.
    """
    parts = [(index, group) for index, (keys, cold) in enumerate(calls) for group in groups(keys, cold, slots)]
    following = _next_uses([group for _, group in parts])
    held: dict[int, int] = {}  # key: its next use
    heap: list[tuple[int, int]] = []  # (-next use, key), stale ones among them
    misses = [0] * len(calls)
    for (index, group), nexts in zip(parts, following, strict=True):
        keep = set(group)
        absent = [key for key in group if key not in held]
        misses[index] += len(absent)
        for _ in range(len(held) + len(absent) - slots):
            _drop_farthest(held, heap, keep)
        for key, use in zip(group, nexts, strict=True):
            held[key] = use
            heapq.heappush(heap, (-use, key))
    return misses


def _next_uses(parts: list[Sequence[int]]) -> list[list[int]]:
    """For each key of each part, the part that uses it next."""
    seen: dict[int, int] = {}
    found: list[list[int]] = [[] for _ in parts]
    for at in range(len(parts) - 1, -1, -1):
        found[at] = [seen.get(key, FAR) for key in parts[at]]
        seen.update(dict.fromkeys(parts[at], at))
    return found


def _drop_farthest(held: dict[int, int], heap: list[tuple[int, int]], keep: set[int]) -> None:
    pinned = []
    while True:
        use, key = item = heapq.heappop(heap)
        if held.get(key) != -use:
            continue
        if key not in keep:
            break
        pinned.append(item)
    del held[key]
    for other in pinned:
        heapq.heappush(heap, other)
