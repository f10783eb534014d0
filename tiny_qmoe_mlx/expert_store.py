"""Bytes of one expert from disk into a given buffer, checked on the first touch.

Owns the open files and counts what was read. Knows nothing of caching. Safe to call from several threads.
"""

import os
import sys
import threading

import numpy as np
import xxhash

from tiny_qmoe_mlx.container import CHECKSUM_BYTES, Container
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.expert_kind import ExpertKind, check_record


class ExpertStore:
    """Reads records of an open container.

    Attributes:
        records_read, bytes_read: since opening.
    """

    def __init__(self, container: Container, kinds: list[ExpertKind]):
        self.container = container
        self.kinds = kinds
        self.records_read = 0
        self.bytes_read = 0
        self._checked: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        self._checksums = [container.checksums(i) for i in range(len(container.spec.layers))]
        self._files = [self._open(i) for i in range(len(container.spec.layers))]

    def _open(self, layer: int) -> int:
        descriptor = os.open(self.container.expert_file(layer), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        else:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return descriptor

    def read(self, layer: int, expert: int, into: np.ndarray) -> None:
        """Fill `into`, u8 (record_bytes,), with the record of an expert of the layer-th MoE layer.

        Raises:
            FormatError: the file ends early, a checksum or the record itself is wrong.
            OSError: the disk could not be read.
        """
        start = self.container.record_offset(layer, expert)
        done = 0
        while done < len(into):
            got = os.preadv(self._files[layer], [memoryview(into)[done:]], start + done)
            if got == 0:
                name = self.container.expert_file(layer)
                raise FormatError(
                    f"[{name}] expert {expert} should end at byte {start + len(into)}, the file ends at {start + done}."
                )
            done += got
        with self._lock:
            self.records_read += 1
            self.bytes_read += len(into)
            first = (layer, expert) not in self._checked
        if first:
            self._check(layer, expert, into)

    def _check(self, layer: int, expert: int, record: np.ndarray) -> None:
        where = f"{self.container.expert_file(layer).name}, expert {expert}"
        for i, expected in enumerate(self._checksums[layer][expert]):
            part = record[i * CHECKSUM_BYTES : (i + 1) * CHECKSUM_BYTES]
            if xxhash.xxh3_64_intdigest(part) != int(expected):
                raise FormatError(
                    f"[{where}] the record's checksum does not match its bytes: the file is damaged; "
                    "copy it again, or convert the model again."
                )
        check_record(record, self.kinds[layer], where)
        with self._lock:
            self._checked.add((layer, expert))

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        while self._files:
            os.close(self._files.pop())
