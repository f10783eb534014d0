"""Data races: the C++ library under ThreadSanitizer, and the pool of experts with delays where threads meet.

    PYTHONPATH=tests python -m abuse.races --seconds 600

The first half of the time goes to tests/native_races.cpp, the second to random demands, lookahead, pressure and faults
on streaming/cache.py and demand.py: no slot in two places, every record's bytes right while it is held, every demand
comes to an end.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import records
from mlx.nn import Module

from abuse import record
from tiny_qmoe_mlx import container
from tiny_qmoe_mlx.codecs import rotation, trellis
from tiny_qmoe_mlx.expert_kind import expert_kind
from tiny_qmoe_mlx.streaming.cache import ExpertCache
from tiny_qmoe_mlx.streaming.demand import Demand
from tiny_qmoe_mlx.streaming.pool import Pool
from tiny_qmoe_mlx.streaming.readers import Readers
from tiny_qmoe_mlx.streaming.store import ExpertStore

PROMISE = "No data race in the C++ library; slots and records stay whole whatever order threads run in."
HERE = Path(__file__).resolve().parents[1]
SOURCES = HERE.parent / "kernels" / "cpu"
COMPILER = shutil.which("clang++-19")
SANITIZE = ("-std=c++17", "-O1", "-g", "-fsanitize=thread", "-fno-math-errno", "-ffp-contract=fast", f"-I{SOURCES}")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
FLAGS = {"isa_avx2.cpp": AVX2, "isa_avx512.cpp": (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")}
EXPERTS, HIDDEN, MIDDLE, HANG_S = 10, 128, 192, 120


# ---- C++


def build(folder: Path) -> Path:
    """The program with the whole library in it, compiled for ThreadSanitizer."""
    assert COMPILER is not None

    def compile_one(source: Path) -> Path:
        out = folder / f"{source.stem}.o"
        subprocess.run([COMPILER, *SANITIZE, *FLAGS.get(source.name, ()), "-c", source, "-o", out], check=True)
        return out

    files = [f for f in sorted(SOURCES.glob("*.cpp")) if f.name != "blas_shim.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*files, HERE / "native_races.cpp"]))
    subprocess.run([COMPILER, "-fsanitize=thread", *objects, "-o", folder / "native_races"], check=True)
    return folder / "native_races"


def write_records(path: Path) -> None:
    """Input of the program: experts of noise, with gains of a trained model's size."""
    rng, shapes = np.random.default_rng(0), [(MIDDLE, HIDDEN), (MIDDLE, HIDDEN), (HIDDEN, MIDDLE)]
    own = [records.random_record(rng, shapes) for _ in range(EXPERTS)]
    for one in own:
        for m in one.matrices:
            m.block_gain[:] = m.block_gain / np.float16(m.columns**0.5)
    size = max(map(records.record_size, own))
    signs = [rotation.signs(0, 0, side, columns) for side, columns in ((0, HIDDEN), (1, MIDDLE))]
    with open(path, "wb") as file:
        file.write(np.array([EXPERTS, size, HIDDEN, MIDDLE], np.int64).tobytes())
        for sign in signs:
            file.write(sign.astype(np.float32).tobytes())
        for one in own:
            file.write(trellis.pack(one, size).tobytes())


def native(folder: Path, seconds: float) -> tuple[dict[str, int], str]:
    """What the program counted, and what ThreadSanitizer said."""
    program = build(folder)
    write_records(folder / "records")
    command = [program, folder / "records", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, env={"TSAN_OPTIONS": "halt_on_error=0"})
    found = json.loads(done.stdout) if done.stdout else {"wrong": 1}
    return found, done.stderr if done.returncode or done.stderr else ""


# ---- Python


def open_cache(folder: Path, slots: int, readers: int = 4) -> ExpertCache:
    """A cache of noise: two layers of twelve experts."""
    if not (folder / "config.json").exists():
        records.write_model(folder, hidden=64, width=64, experts=12, layers=2, alignment=128, rates=[2])
    opened = container.open_model(folder)
    kinds = [expert_kind(layer, opened.spec, Module()) for layer in opened.spec.layers]
    return ExpertCache(ExpertStore(opened, kinds), {opened.spec.layers[0].record_bytes: slots}, readers)


def files_of(cache: ExpertCache) -> dict[tuple[int, int], bytes]:
    """The right bytes of each expert, read another way."""
    opened, found = cache.store.container, {}
    for index, layer in enumerate(opened.spec.layers):
        data = Path(opened.expert_file(index)).read_bytes()
        for e in range(layer.experts):
            start = opened.record_offset(index, e)
            found[index, e] = data[start : start + layer.record_bytes]
    return found


def late(function: Callable, draw: random.Random) -> Callable:
    """The function, after and before a pause now and then, in which other threads run."""

    def call(*inputs, **options):
        if draw.random() < 0.2:
            time.sleep(draw.choice([0, 0, 1e-5, 1e-3]))
        try:
            return function(*inputs, **options)
        finally:
            if draw.random() < 0.1:
                time.sleep(draw.choice([0, 0, 1e-5, 1e-3]))

    return call


PLACES = [(Pool, name) for name in ("take", "put", "pin", "unpin", "withdraw", "restore")]
PLACES += [(Readers, name) for name in ("submit", "promote", "drop", "_next")]
PLACES += [(ExpertStore, "read"), (ExpertCache, "_request"), (ExpertCache, "_finished")]


@contextmanager
def delays(seed: int) -> Iterator[None]:
    """Pauses at the places where threads meet, and a switch of threads every microsecond."""
    draw, interval = random.Random(seed), sys.getswitchinterval()
    before = [getattr(owner, name) for owner, name in PLACES]
    for (owner, name), function in zip(PLACES, before, strict=True):
        setattr(owner, name, late(function, draw))
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        for (owner, name), function in zip(PLACES, before, strict=True):
            setattr(owner, name, function)


def check_slots(cache: ExpertCache) -> None:
    """Under the lock: each slot is free, holds one expert, is being filled, or has been withdrawn."""
    with cache._changed:
        for pool in cache.pools.values():
            loading = [slot for _, slot in cache._loading.values()]
            places = sorted([*pool.free, *pool.slot_of.values(), *pool.withdrawn, *loading])
            assert places == sorted(set(places)), f"slots in two places: {places}"
            assert set(places) <= set(range(pool.slots)), f"slots {places} of {pool.slots}"
            known = [*pool.order.first, *((layer, e) for layer, held in pool.order.used.items() for e in held)]
            assert sorted(known) == sorted(pool.slot_of), "the order of leaving knows other experts than the slots"


class Stress:
    """Threads on one cache until `stop`; `wrong` has what they found."""

    def __init__(self, cache: ExpertCache, seed: int):
        self.cache, self.right, self.found = cache, files_of(cache), Counter()
        self.wrong: list[BaseException] = []
        self.stop = threading.Event()
        works = (
            self.decode,
            self.decode,
            self.decode,
            self.prefill,
            self.prefill,
            self.expect,
            self.squeeze,
            self.look,
        )
        self.threads = [
            threading.Thread(target=self._until_stop, args=(work, random.Random(100 * seed + i)), daemon=True)
            for i, work in enumerate(works)
        ]

    def _until_stop(self, work: Callable[[random.Random], None], draw: random.Random) -> None:
        try:
            while not self.stop.is_set() and not self.wrong:
                work(draw)
        except BaseException as error:
            self.wrong.append(error)

    def _use(self, draw: random.Random, cold: bool, most: int) -> None:
        layer, experts = draw.randrange(2), sorted(draw.sample(range(12), draw.randint(1, most)))
        pool, given = self.cache.pool_of_layer[layer], []
        with Demand(self.cache, layer, experts, cold) as demand:
            for group, offsets in demand:
                if draw.random() < 0.3:
                    time.sleep(draw.choice([0, 1e-5, 1e-3]))
                for expert, o in zip(group, offsets, strict=True):
                    size = len(self.right[layer, expert])
                    assert pool.data[o : o + size].tobytes() == self.right[layer, expert], "another record's bytes"
                given += group
                demand.release(group)
        assert sorted(given) == experts, f"asked for {experts}, got {given}"
        self.found["records used"] += len(given)

    def decode(self, draw: random.Random) -> None:
        self._use(draw, False, 4)

    def prefill(self, draw: random.Random) -> None:
        self._use(draw, True, 12)

    def expect(self, draw: random.Random) -> None:
        self.cache.expect(draw.randrange(2), sorted(draw.sample(range(12), 3)))
        self.found["guesses"] += 1

    def squeeze(self, draw: random.Random) -> None:
        size = next(iter(self.cache.pools))
        pool = self.cache.pools[size]
        if len(pool.withdrawn) < pool.slots - 6:
            self.cache.shrink(size)
        if draw.random() < 0.6:
            self.cache.grow(draw.randint(0, 3) * size)
        self.found["resizes"] += 1
        time.sleep(1e-4)

    def look(self, draw: random.Random) -> None:
        check_slots(self.cache)
        self.cache.snapshot()
        self.cache.slots(draw.randrange(2))
        self.found["looks at all slots"] += 1
        time.sleep(1e-4)

    def run(self, seconds: float) -> None:
        """Raises what a thread found; a thread that does not end has missed a wakeup."""
        for thread in self.threads:
            thread.start()
        self.stop.wait(seconds)
        self.stop.set()
        until = time.monotonic() + HANG_S
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))
            assert not thread.is_alive() or self.wrong, "a thread waits for ever"
        if self.wrong:
            raise self.wrong[0]


def stress(folder: Path, seed: int, seconds: float) -> Counter:
    """One run on a cache of 8 to 23 slots; what was counted."""
    draw = random.Random(seed)
    cache = open_cache(folder, draw.choice([8, 10, 16, 23]), draw.choice([1, 2, 8]))
    run = Stress(cache, seed)
    with delays(seed):
        run.run(seconds)
    until = time.monotonic() + HANG_S
    while cache._loading and time.monotonic() < until:
        time.sleep(0.01)
    check_slots(cache)
    assert not any(pool.pins for pool in cache.pools.values()), "pins are left"
    cache.close()
    return run.found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start, broken, found, seed = time.monotonic(), 0, Counter(), args.seed
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts, said = native(folder, args.seconds / 2)
        broken += bool(said) + bool(counts["wrong"])
        print(said, end="")
        found.update({f"{what} under ThreadSanitizer": count for what, count in counts.items() if what != "wrong"})
        while time.monotonic() - start < args.seconds:
            try:
                found += stress(folder / "model", seed, 10)
            except Exception as error:
                broken += 1
                print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
                if broken > 20:
                    break
            found["runs with delays"] += 1
            seed += 1
    record.keep(7, "races", PROMISE, "abuse.races", time.monotonic() - start, found, broken)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
