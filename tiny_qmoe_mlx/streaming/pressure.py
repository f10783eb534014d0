"""Give expert slots back while the system is short of memory, and take them again when it no longer is.

Linux tells by PSI (share of the last 10 s in which tasks waited for memory), a control group by its use and limit, a
kernel without either by MemAvailable. macOS tells by a sysctl; that path has not been run on a Mac.
"""

import ctypes
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

NORMAL, WARN, CRITICAL = "normal", "warn", "critical"
SHARES = {WARN: 0.10, CRITICAL: 0.25}  # of the pool, given back at a time
WAITS = {WARN: 1.0, CRITICAL: 0.2}  # seconds from one time to the next
GROWTH = 0.05  # of the pool, taken back at a time
CALM_S = 30.0  # seconds of normal before each step of growth
PERIOD_S = 0.2  # a look takes a tenth of a millisecond; a process that starts takes gigabytes in a second
PSI_SOME, PSI_FULL = 10.0, 10.0  # per cent: some task waits (warn), every task waits (critical)
GROUP_WARN, GROUP_CRITICAL = 0.95, 0.985  # of a control group's limit
AVAILABLE_WARN, AVAILABLE_CRITICAL = 0.03, 0.015  # of the machine
NO_LIMIT = 1 << 60  # control groups of version 1 write a number near 2^63 for none
PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")

Level = str
Source = Callable[[], Level | None]


class Shrinking(Protocol):
    """What a cache offers: bytes given back (0 where nothing more can go), and bytes used again."""

    def shrink(self, size: int) -> int: ...

    def grow(self, size: int) -> int: ...


class Pressure:
    """Watches memory pressure in a thread of its own and resizes a cache.

    Attributes:
        given_back: bytes that the cache is below its first size.
        shrinks, grows: how often it was asked.
    """

    def __init__(
        self,
        cache: Shrinking,
        pool_bytes: int,
        least_bytes: int,
        read: Callable[[], Level] | None = None,
        clock: Callable[[], float] = time.monotonic,
        room: Callable[[], float] | None = None,
    ):
        """
        Args:
            cache: what shrinks and grows.
            pool_bytes: its size now, to which it grows back.
            least_bytes: the smallest pool that works.
            read: the pressure now; `level` where it is not given.
            clock: seconds.
            room: bytes that may be taken before there is pressure; `room_now` where it is not given.
        """
        self.cache, self.pool_bytes, self.least_bytes = cache, pool_bytes, least_bytes
        self.given_back, self.shrinks, self.grows = 0, 0, 0
        self._read, self._clock, self._room = read or level, clock, room or room_now
        self._calm_since = clock()
        self._last_shrink = float("-inf")
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="memory-pressure", daemon=True)

    def start(self) -> "Pressure":
        """Begin to watch; a second call does nothing."""
        if self._thread.ident is None:
            self._thread.start()
        return self

    def resize(self, pool_bytes: int, change: Callable[[], None]) -> None:
        """The cache gets another size by `change`, to which it grows back from now on."""
        with self._lock:
            change()
            self.pool_bytes, self.given_back = pool_bytes, 0

    def stop(self) -> None:
        """End the thread; returns when it has ended, and may be called twice."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def step(self) -> None:
        """One look at the pressure, and what follows from it."""
        found = self._read()
        with self._lock:
            self._follow(found, self._clock())

    def _follow(self, found: Level, now: float) -> None:
        if found in SHARES:
            self._calm_since = now
            if now - self._last_shrink >= WAITS[found]:
                self._last_shrink = now
                self._shrink(SHARES[found])
        elif now - self._calm_since >= CALM_S:
            self._calm_since = now
            self._grow()

    def _shrink(self, share: float) -> None:
        size = min(int(self.pool_bytes * share), self.pool_bytes - self.given_back - self.least_bytes)
        if size > 0:
            self.given_back += self.cache.shrink(size)
            self.shrinks += 1

    def _grow(self) -> None:
        size = int(min(self.pool_bytes * GROWTH, self.given_back, self._room()))
        if size > 0:
            self.given_back -= self.cache.grow(size)
            self.grows += 1

    def _watch(self) -> None:
        while not self._stop.wait(PERIOD_S):
            try:
                self.step()
            except Exception:  # a watcher must not end the run that it watches
                logging.getLogger(__name__).exception("the watch for memory pressure ends")
                return


def level() -> Level:
    """The memory pressure of this process's surroundings: "normal", "warn" or "critical"."""
    return worst([from_macos()] if sys.platform == "darwin" else linux_levels())


def room_now(proc: Path = PROC, groups: Path = GROUPS) -> float:
    """Bytes that may be taken before this process's surroundings are short of memory; endless where none tells."""
    facts = _table(proc / "meminfo")
    free = [1024 * (facts["MemAvailable:"] - AVAILABLE_WARN * facts["MemTotal:"])] if "MemAvailable:" in facts else []
    for directory in own_groups(proc, groups):
        size, most = _use_of(directory)
        if most:
            free.append(GROUP_WARN * most - size)
    return min(free, default=math.inf)


def worst(levels: Iterable[Level | None]) -> Level:
    """The highest of several levels; None is a source that is not there."""
    order = (NORMAL, WARN, CRITICAL)
    return max((found for found in levels if found), key=order.index, default=NORMAL)


def linux_levels(proc: Path = PROC, groups: Path = GROUPS) -> list[Level | None]:
    """Machine and own control group: PSI where it is, else what is used of what there is."""
    machine = from_psi(proc / "pressure/memory") or from_available(proc / "meminfo")
    return [machine, *(from_psi(d / "memory.pressure") or from_group(d) for d in own_groups(proc, groups))]


def own_groups(proc: Path = PROC, groups: Path = GROUPS) -> list[Path]:
    """Directories of the control groups of this process that count memory; a container may see its own at the root."""
    found = []
    for line in _text(proc / "self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "" or "memory" in controllers.split(","):
            root = groups / "memory" if controllers else groups
            own = root / path.lstrip("/")
            found.append(own if path.strip("/") and own.is_dir() else root)
    return found


def from_psi(file: Path) -> Level | None:
    """From a file of pressure stall information: avg10 of `some` and `full`; None where there is none."""
    shares = {}
    for line in filter(str.strip, _text(file).splitlines()):
        kind, *fields = line.split()
        for field in fields:
            if field.startswith("avg10="):
                shares[kind] = _number(field.removeprefix("avg10="))
    if shares.get("some") is None:
        return None
    if (shares.get("full") or 0.0) >= PSI_FULL:
        return CRITICAL
    return WARN if (shares["some"] or 0.0) >= PSI_SOME else NORMAL


def from_group(directory: Path) -> Level | None:
    """From a control group's use and its limit; None without a limit."""
    size, most = _use_of(directory)
    return _by_share(size / most, GROUP_WARN, GROUP_CRITICAL) if most else None


def _use_of(directory: Path) -> tuple[float, float]:
    """What a control group uses, without page cache that would leave first, and its limit; 0 for none."""
    for used, limit in (("memory.current", "memory.max"), ("memory.usage_in_bytes", "memory.limit_in_bytes")):
        size, most = _number(_text(directory / used)), _number(_text(directory / limit))
        if size is not None and most is not None and 0 < most < NO_LIMIT:
            return size - _cache_of(directory), most
    return 0.0, 0.0


def _cache_of(directory: Path) -> float:
    """Bytes of page cache that the kernel drops first."""
    facts = _table(directory / "memory.stat")
    return facts.get("total_inactive_file", facts.get("inactive_file", 0.0))


def from_available(file: Path) -> Level | None:
    """From /proc/meminfo: MemAvailable as a share of the machine."""
    facts = _table(file)
    total, available = facts.get("MemTotal:"), facts.get("MemAvailable:")
    if not total or available is None:
        return None
    return _by_share(1 - available / total, 1 - AVAILABLE_WARN, 1 - AVAILABLE_CRITICAL)


def from_macos() -> Level | None:
    """From the sysctl kern.memorystatus_vm_pressure_level (1 normal, 2 warn, 4 critical). Not run on a Mac yet."""
    try:
        ask = ctypes.CDLL(None).sysctlbyname
    except (AttributeError, OSError, TypeError):
        return None
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    if ask(b"kern.memorystatus_vm_pressure_level", ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)):
        return None
    return {1: NORMAL, 2: WARN, 4: CRITICAL}.get(value.value)


def _by_share(share: float, warn: float, critical: float) -> Level:
    return CRITICAL if share >= critical else WARN if share >= warn else NORMAL


def _table(file: Path) -> dict[str, float]:
    """The first two words of every line as name and number."""
    rows = (line.split() for line in _text(file).splitlines())
    found = {row[0]: _number(row[1]) for row in rows if len(row) > 1}
    return {name: value for name, value in found.items() if value is not None}


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:  # not there, or a kernel that has PSI turned off
        return ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
