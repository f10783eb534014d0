"""Bytes of experts from disk into given buffers, checked on the first touch.

Owns the open files and counts what was read. Knows nothing of caching. Safe to call from several threads.
"""

import errno
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import xxhash

from tiny_qmoe_mlx.codecs import affine, tuples
from tiny_qmoe_mlx.container import CHECKSUM_BYTES, Container
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.expert_kind import ExpertKind, check_record, expand

CHECKS = ("first", "always", "never")
SECTOR = 4096  # what O_DIRECT asks of offsets, sizes and addresses
PAUSES = (0.05, 0.5)  # seconds before a failed read is tried again
MAX_BUFFERS = 1024  # of one preadv (IOV_MAX)


class ExpertStore:
    """Reads records of an open container.

    Past the page cache where the system lets us: memory that it would take is memory that the budget does not know.

    Attributes:
        table: of 4-tuples, of codec tiny-qmoe; else None.
        records_read, bytes_read: since opening.
        retries: reads that failed and were tried again.
    """

    def __init__(self, container: Container, kinds: list[ExpertKind], checks: str = "first"):
        """kinds: of the layers; none of a store that reads records as they lie. checks: which reads have their checksum
        verified: of a record's "first" touch, "always" or "never".

        Raises:
            ValueError: another word.
            OSError: a file cannot be opened.
        """
        if checks not in CHECKS:
            raise ValueError(f"[store] checks should be one of {', '.join(CHECKS)}, received {checks!r}.")
        self.container = container
        self.kinds = kinds
        self.checks = checks
        self.table = tuples.read_table(container.directory) if tuples.FILE in container.files else None
        self.records_read = 0
        self.bytes_read = 0
        self.retries = 0
        self._checked: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        # Whole decoder layers are expanded for their check: one at a time, and by one thread, since the system's
        # allocator keeps for each what it has freed (80 MB of eight readers of SmolLM2-135M's layers)
        self._checker = ThreadPoolExecutor(1)
        layers = range(len(container.spec.layers))
        self._checksums = [container.checksums(i) for i in layers]
        self._files = [_open(str(container.expert_file(i))) for i in layers]
        self._direct = [self._open_direct(i) for i in layers]
        self._states = [_state(file) for file in self._files]

    def _open_direct(self, layer: int) -> int | None:
        """The file once more for O_DIRECT, where its records and the file system fit that."""
        flag = getattr(os, "O_DIRECT", 0)
        size, start = self.container.spec.layers[layer].record_bytes, self.container.record_offset(layer, 0)
        if not flag or size % SECTOR or start % SECTOR:
            return None
        try:
            return os.open(self.container.expert_file(layer), os.O_RDONLY | os.O_CLOEXEC | flag)
        except OSError:  # tmpfs and some network file systems have no direct reads
            return None

    @property
    def direct(self) -> bool:
        """Whether all layers are read past the page cache by O_DIRECT."""
        return all(file is not None for file in self._direct)

    def read(self, layer: int, experts: list[int], into: list[np.ndarray]) -> None:
        """Fill `into`, u8 (slot,) each, with the records of adjacent experts of the layer-th MoE layer.

        A read that fails is tried again twice. Coded records of experts are decoded into affine ones.

        Raises:
            FormatError: the file ends early or has changed, a checksum or the record itself is wrong.
            OSError: the disk could not be read; names file, layer and expert.
        """
        spec = self.container.spec.layers[layer]
        expands = spec.expands and bool(self.kinds)
        records = [np.empty(spec.record_bytes, np.uint8) if expands else p[: spec.record_bytes] for p in into]
        for pause in (*PAUSES, None):
            try:
                self._fill(layer, experts[0], records)
                break
            except OSError as error:
                if pause is None:
                    raise self._unreadable(layer, experts, error) from error
                with self._lock:
                    self.retries += 1
                time.sleep(pause)
        with self._lock:
            self.records_read += len(experts)
            self.bytes_read += sum(part.nbytes for part in records)
        for expert, record in zip(experts, records, strict=True):
            if self.checks == "always" or (self.checks == "first" and (layer, expert) not in self._checked):
                self._check(layer, expert, record)
        self._check_unchanged(layer)
        if expands:
            for expert, record, part in zip(experts, records, into, strict=True):
                self._expand(layer, expert, record, part)

    def _expand(self, layer: int, expert: int, record: np.ndarray, into: np.ndarray) -> None:
        """A coded record as one of codec affine, in its slot."""
        kind, where = self.kinds[layer], f"{self.container.expert_file(layer).name}, expert {expert}"
        arrays = [matrix.arrays for matrix in expand(record, kind, where, self.table)]
        into[:] = affine.pack(arrays, kind.shapes, kind.packing, len(into))

    def _unreadable(self, layer: int, experts: list[int], error: OSError) -> OSError:
        path = self.container.spec.layers[layer].path
        text = (
            f"expert {experts[0]} of {path} should be read, {1 + len(PAUSES)} tries failed: {error.strerror or error}; "
            "check the disk, or copy the model to another"
        )
        return OSError(error.errno, text, str(self.container.expert_file(layer)))

    def _fill(self, layer: int, first: int, into: list[np.ndarray]) -> None:
        """preadv until all buffers are full, directly where they lie at sectors."""
        start, views = self.container.record_offset(layer, first), [memoryview(part) for part in into]
        size, done = sum(map(len, views)), 0
        direct = self._direct[layer] if all(part.ctypes.data % SECTOR == 0 for part in into) else None
        while done < size:
            file = self._files[layer] if direct is None else direct
            try:
                got = os.preadv(file, views[:MAX_BUFFERS], start + done)
            except OSError as error:
                if direct is None or error.errno != errno.EINVAL:
                    raise
                direct = self._direct[layer] = None  # opened, and then refused: buffered from now on
                continue
            if got == 0:
                raise self._short(layer, start + size, start + done, first + done // len(into[0]))
            done, views = done + got, _rest(views, got)
            direct = direct if got % SECTOR == 0 else None
        if direct is None and sys.platform == "linux":
            os.posix_fadvise(self._files[layer], start, size, os.POSIX_FADV_DONTNEED)

    def _short(self, layer: int, end: int, found: int, expert: int) -> FormatError:
        name = self.container.expert_file(layer)
        return FormatError(f"[{name}] expert {expert} should end at byte {end}, the file ends at {found}.")

    def _check(self, layer: int, expert: int, record: np.ndarray) -> None:
        where = f"{self.container.expert_file(layer).name}, expert {expert}"
        for i, expected in enumerate(self._checksums[layer][expert]):
            part = record[i * CHECKSUM_BYTES : (i + 1) * CHECKSUM_BYTES]
            if xxhash.xxh3_64_intdigest(part) != int(expected):
                raise FormatError(
                    f"[{where}] the record's checksum does not match its bytes: the file is damaged; "
                    "copy it again, or convert the model again."
                )
        if self.container.spec.layers[layer].whole:
            self._checker.submit(check_record, record, self.kinds[layer], where, self.table).result()
        else:
            check_record(record, self.kinds[layer], where, self.table)
        with self._lock:
            self._checked.add((layer, expert))

    def _check_unchanged(self, layer: int) -> None:
        """A file that somebody writes into while it is in use may hold anything, checked before or not."""
        if _state(self._files[layer]) != self._states[layer]:
            raise FormatError(
                f"[{self.container.expert_file(layer)}] should stay as it was opened, it has been written to since; "
                "load the model again."
            )

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        self._checker.shutdown()
        for files in (self._files, self._direct):
            while files:
                file = files.pop()
                if file is not None:
                    os.close(file)


def _open(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
    else:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor


def _state(file: int) -> tuple[int, int]:
    found = os.fstat(file)
    return found.st_size, found.st_mtime_ns


def _rest(views: list[memoryview], done: int) -> list[memoryview]:
    """What of the buffers is left to fill after `done` bytes."""
    while views and done >= len(views[0]):
        done -= len(views[0])
        views = views[1:]
    return [views[0][done:], *views[1:]] if done else views
