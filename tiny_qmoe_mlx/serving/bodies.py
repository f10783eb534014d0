"""How much of what clients send is in memory at once: bodies while they come, and as objects until they are tokens.

A body as objects takes up to twenty times its bytes, and hundreds of clients may send one: without turns they would
take more than the budget of the whole process.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tiny_qmoe_mlx.serving.refusal import Refused

SMALL_BYTES = 16 << 10  # those of all connections together are 8 MB: they need no turn to come
TURNS = {256 << 10: 16, 4 << 20: 2}  # most bytes of a larger body: how many of them are in memory at once
OBJECTS = 4  # bodies that are objects at once
WAIT_S = 30.0  # until a turn


class Bodies:
    """Turns of bodies; any thread may ask."""

    def __init__(self) -> None:
        self._reading = {size: threading.BoundedSemaphore(turns) for size, turns in TURNS.items()}
        self._objects = threading.BoundedSemaphore(OBJECTS)

    @contextmanager
    def reading(self, size: int) -> Iterator[None]:
        """The turn of a body of so many bytes, from before it comes until nothing is left of it.

        Raises:
            Refused: it has not come in time.
        """
        if size <= SMALL_BYTES:
            yield
            return
        with _turn(next(turns for most, turns in self._reading.items() if size <= most)):
            yield

    @contextmanager
    def objects(self) -> Iterator[None]:
        """The turn of a body that has come, until it is tokens; raises what `reading` does."""
        with _turn(self._objects):
            yield


@contextmanager
def _turn(turns: threading.BoundedSemaphore) -> Iterator[None]:
    if not turns.acquire(timeout=WAIT_S):
        raise Refused(503, "other large requests are being read; try again.", "server_busy", {"Retry-After": "10"})
    try:
        yield
    finally:
        turns.release()
