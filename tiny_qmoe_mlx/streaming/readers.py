"""Threads that read records: what a product waits for before what is only expected.

A read is a run of adjacent experts of one layer, one preadv into their slots.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tiny_qmoe_mlx.streaming.store import ExpertStore

CLOSE_S = 0.5  # seconds that `close` waits for reads under way; a disk may stall


@dataclass(eq=False)
class Read:
    """Records on their way: adjacent experts of a layer into `into`, u8 (record_bytes,) each.

    error: why it failed, once it has; unwanted: it was expected, and the demand did not name it.
    """

    layer: int
    experts: list[int]
    into: list[np.ndarray]
    error: BaseException | None = None
    unwanted: bool = False


class Readers:
    """Reader threads over two queues.

    Attributes:
        busy_s: seconds in which at least one read was under way.
    """

    def __init__(self, store: ExpertStore, threads: int, finished: Callable[[Read], None]):
        """finished: called in a reader's thread after each read, failed or not."""
        self._store, self._finished = store, finished
        self._changed = threading.Condition()
        self._demanded: deque[Read] = deque()
        self._expected: deque[Read] = deque()
        self._open, self._running, self._since, self._busy = True, 0, 0.0, 0.0
        self._threads = [
            threading.Thread(target=self._work, name=f"expert-reader-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def busy_s(self) -> float:
        with self._changed:
            return self._busy + (time.perf_counter() - self._since if self._running else 0.0)

    def submit(self, reads: list[Read], demanded: bool = True) -> None:
        """Queue reads; those that are only expected wait until no demanded one is left."""
        with self._changed:
            (self._demanded if demanded else self._expected).extend(reads)
            self._changed.notify(len(reads))

    def promote(self, read: Read) -> None:
        """An expected read is demanded now."""
        with self._changed:
            if read in self._expected:
                self._expected.remove(read)
                self._demanded.append(read)

    def drop(self, read: Read) -> bool:
        """Forget an expected read that has not begun; False where it has."""
        with self._changed:
            if read in self._expected:
                self._expected.remove(read)
                return True
            return False

    def _work(self) -> None:
        while (read := self._next()) is not None:
            try:
                self._store.read(read.layer, read.experts, read.into)
            except BaseException as error:
                read.error = error
            with self._changed:
                self._running -= 1
                if not self._running:
                    self._busy += time.perf_counter() - self._since
            self._finished(read)
            read = None  # its error's traceback knows the model: this thread must not keep it while it waits

    def _next(self) -> Read | None:
        with self._changed:
            while self._open and not self._demanded and not self._expected:
                self._changed.wait()
            if not self._open:
                return None
            if not self._running:
                self._since = time.perf_counter()
            self._running += 1
            return (self._demanded or self._expected).popleft()

    def close(self) -> bool:
        """Stop; queued reads are forgotten. False where a read was still under way after half a second."""
        with self._changed:
            self._open = False
            self._demanded.clear()
            self._expected.clear()
            self._changed.notify_all()
        until = time.perf_counter() + CLOSE_S
        others = [thread for thread in self._threads if thread is not threading.current_thread()]  # gc may run in one
        for thread in others:
            thread.join(max(0.0, until - time.perf_counter()))
        return not any(thread.is_alive() for thread in others)
