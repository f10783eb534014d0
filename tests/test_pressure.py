"""Memory pressure: each source from files as kernels write them, and the resizing with a clock of the test's own."""

import sys
import time

import pytest

from tiny_qmoe_mlx.streaming import pressure

POOL, LEAST = 1000, 300


class Cache:
    def __init__(self):
        self.size = POOL
        self.asked = []

    def shrink(self, size):
        self.asked.append(-size)
        self.size -= size
        return size

    def grow(self, size):
        self.asked.append(size)
        self.size += size
        return size


class World:
    """A level and a time that the test sets."""

    def __init__(self):
        self.level, self.now, self.room, self.cache = "normal", 0.0, 1e9, Cache()
        read, clock, room = lambda: self.level, lambda: self.now, lambda: self.room
        self.watch = pressure.Pressure(self.cache, POOL, LEAST, read, clock, room)

    def after(self, seconds, level):
        self.now, self.level = self.now + seconds, level
        self.watch.step()
        return self.cache.size


def test_shrinks_by_level_a_warning_once_a_second():
    world = World()
    assert world.after(1, "normal") == 1000
    assert world.after(1, "warn") == 900
    assert world.after(0.5, "warn") == 900
    assert world.after(0.1, "critical") == 650
    assert world.after(0.1, "critical") == 650
    assert world.after(0.15, "critical") == 400
    assert world.watch.given_back == 600 and world.watch.shrinks == 3


def test_what_a_cache_takes_back_is_believed():
    """Slots are whole: it takes less, or more, than it is offered, until all is back."""
    world = World()
    world.after(1, "critical")
    world.cache.grow = lambda size: 30
    for left in (220, 190, 160):
        world.after(31, "normal")
        assert world.watch.given_back == left


def test_never_below_the_smallest_pool():
    world = World()
    assert [world.after(1, "critical") for _ in range(4)] == [750, 500, 300, 300]
    assert world.cache.asked == [-250, -250, -200]


def test_grows_back_slowly_after_calm_and_no_further():
    world = World()
    world.after(1, "warn")
    assert world.after(29, "normal") == 900
    assert world.after(1, "normal") == 950
    assert world.after(15, "normal") == 950
    assert world.after(14, "warn") == 850  # the calm begins anew
    assert world.after(29, "normal") == 850
    assert [world.after(30, "normal") for _ in range(5)] == [900, 950, 1000, 1000, 1000]
    assert world.watch.given_back == 0


def test_grows_no_further_than_there_is_room():
    """What grows into the limit is killed there."""
    world = World()
    world.after(1, "critical")
    for room, size in ((-5, 750), (0.5, 750), (20, 770), (1000, 820)):
        world.room = room
        assert world.after(31, "normal") == size


def test_a_cache_that_gives_less_is_believed():
    world = World()
    world.cache.shrink = lambda size: 0
    world.after(1, "critical")
    assert world.watch.given_back == 0
    assert world.after(31, "normal") == POOL and world.cache.asked == []


def test_thread_stops_promptly_and_survives_a_broken_source(monkeypatch):
    monkeypatch.setattr(pressure, "PERIOD_S", 0.01)
    seen = []
    watch = pressure.Pressure(Cache(), POOL, LEAST, lambda: seen.append(1) or "normal").start()
    deadline = time.monotonic() + 10
    while not seen and time.monotonic() < deadline:
        time.sleep(0.005)
    watch.stop()
    watch.stop()
    assert seen and not watch._thread.is_alive()
    broken = pressure.Pressure(Cache(), POOL, LEAST, lambda: 1 // 0).start()
    broken._thread.join(10)
    assert not broken._thread.is_alive()
    broken.stop()


def test_stop_before_start():
    pressure.Pressure(Cache(), POOL, LEAST).stop()


PSI = "some avg10={} avg60=0.00 avg300=0.01 total=15448981\nfull avg10={} avg60=0.00 avg300=0.00 total=6373987\n"


@pytest.mark.parametrize(
    "text, expected",
    [
        (PSI.format("0.00", "0.00"), "normal"),
        (PSI.format("12.50", "3.00"), "warn"),
        (PSI.format("40.00", "22.00"), "critical"),
        ("some avg10=80.00 total=1\n", "warn"),
        ("", None),
        ("some avg10=x\n", None),
        ("\n\n", None),
    ],
)
def test_psi(tmp_path, text, expected):
    (tmp_path / "memory").write_text(text)
    assert pressure.from_psi(tmp_path / "memory") == expected


def test_psi_that_is_not_there(tmp_path):
    assert pressure.from_psi(tmp_path / "memory") is None


@pytest.mark.parametrize(
    "used, limit, cached, expected",
    [
        ("900", "1000", "0", "normal"),
        ("960", "1000", "0", "warn"),
        ("990", "1000", "0", "critical"),
        ("990", "1000", "500", "normal"),
        ("990", "max", "0", None),
        ("990", str((1 << 63) - 4096), "0", None),
        ("990", "0", "0", None),
    ],
)
@pytest.mark.parametrize(
    "names", [("memory.current", "memory.max"), ("memory.usage_in_bytes", "memory.limit_in_bytes")]
)
def test_control_group(tmp_path, names, used, limit, cached, expected):
    for name, text in zip(names, (used, limit), strict=True):
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    assert pressure.from_group(tmp_path) == expected


@pytest.mark.parametrize("available, expected", [(50_000, "normal"), (2_500, "warn"), (1_000, "critical")])
def test_available(tmp_path, available, expected):
    (tmp_path / "meminfo").write_text(f"MemTotal: 100000 kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n")
    assert pressure.from_available(tmp_path / "meminfo") == expected


def test_own_groups_of_both_versions(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "groups/memory/box").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("9:name=systemd:/\n4:cpu,memory:/box\n3:cpu:/x\n0::/gone\n")
    groups = tmp_path / "groups"
    assert pressure.own_groups(tmp_path / "proc", groups) == [groups / "memory/box", groups]


def test_room_is_what_the_tightest_leaves(tmp_path):
    (tmp_path / "self").mkdir()
    assert pressure.room_now(tmp_path, tmp_path) == float("inf")
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 100 kB\n")
    assert pressure.room_now(tmp_path, tmp_path) == pytest.approx((100 - 30) * 1024)
    (tmp_path / "self/cgroup").write_text("4:memory:/box\n0::/\n")
    box = tmp_path / "memory/box"
    box.mkdir(parents=True)
    for name, text in (("usage_in_bytes", "9000"), ("limit_in_bytes", "10000"), ("stat", "total_inactive_file 500\n")):
        (box / f"memory.{name}").write_text(text)
    assert pressure.room_now(tmp_path, tmp_path) == pytest.approx(9500 - 8500)


def test_worst_of_machine_and_group(tmp_path):
    assert pressure.worst([]) == pressure.worst([None, "normal"]) == "normal"
    assert pressure.worst(["warn", None, "critical", "normal"]) == "critical"
    assert pressure.linux_levels(tmp_path, tmp_path) == [None]


def test_this_machine_answers():
    assert pressure.level() in ("normal", "warn", "critical")
    if sys.platform != "darwin":
        assert pressure.from_macos() is None
