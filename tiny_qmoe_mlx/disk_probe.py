"""How fast records come from this disk: random reads of a model's own expert files, at the true record size.

Eight threads, past the page cache where the system allows it. Sizes are bytes.
"""

import contextlib
import mmap
import os
import random
import sys
import threading
import time
from dataclasses import dataclass

from tiny_qmoe_mlx.container import Container

THREADS = 8
SECONDS = 0.5
BLOCK = 4096  # what direct reads are aligned to
F_NOCACHE = 48  # of fcntl on macOS


@dataclass(frozen=True)
class Probe:
    """What was measured.

    direct: whether the page cache was passed by; where not, the figure may be memory's rather than the disk's.
    """

    records: int
    bytes: int
    seconds: float
    direct: bool

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds


def probe(container: Container, seconds: float = SECONDS, threads: int = THREADS, seed: int = 0) -> Probe:
    """Read random records for a while.

    Args:
        container: the open model.
        seconds: after which no thread starts another read.
        threads: that read at once.
        seed: of the order.

    Raises:
        OSError: a file cannot be read.
    """
    files = [_open(container, index) for index in range(len(container.spec.layers))]
    try:
        return _measure(container, files, seconds, threads, seed)
    finally:
        for descriptor, _ in files:
            os.close(descriptor)


def _measure(container: Container, files: list[tuple[int, bool]], seconds: float, threads: int, seed: int) -> Probe:
    counts, failures = [[0, 0] for _ in range(threads)], []
    stop = time.perf_counter() + seconds

    def work(index: int) -> None:
        try:
            counts[index] = _read(container, files, random.Random(seed * threads + index), stop)
        except OSError as error:
            failures.append(error)

    start = time.perf_counter()
    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    records, total = (sum(column) for column in zip(*counts, strict=True))
    return Probe(records, total, time.perf_counter() - start, all(direct for _, direct in files))


def _read(container: Container, files: list[tuple[int, bool]], rng: random.Random, stop: float) -> list[int]:
    """One thread's reads: [records, bytes]; at least one record."""
    layers, records, total = container.spec.layers, 0, 0
    with mmap.mmap(-1, max(layer.record_bytes for layer in layers) + 2 * BLOCK) as memory, memoryview(memory) as buffer:
        while not records or time.perf_counter() < stop:
            index = rng.randrange(len(layers))
            layer = layers[index]
            descriptor, direct = files[index]
            at = container.record_offset(index, rng.randrange(layer.experts))
            low, high = (
                (at // BLOCK * BLOCK, -(-(at + layer.record_bytes) // BLOCK) * BLOCK)
                if direct
                else (
                    at,
                    at + layer.record_bytes,
                )
            )
            if os.preadv(descriptor, [buffer[: high - low]], low) < at + layer.record_bytes - low:
                raise OSError(f"[{layer.file}] ends before its last record; copy or convert the model again.")
            if not direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, low, high - low, os.POSIX_FADV_DONTNEED)
            records, total = records + 1, total + layer.record_bytes
    return [records, total]


def _open(container: Container, index: int) -> tuple[int, bool]:
    """A layer's file, open past the page cache where that can be: (descriptor, whether it is)."""
    path = container.directory / container.spec.layers[index].file
    with contextlib.suppress(OSError):
        if hasattr(os, "O_DIRECT"):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT), True
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if sys.platform == "darwin":
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, F_NOCACHE, 1)
    return descriptor, False
