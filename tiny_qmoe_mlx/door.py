"""A door that calls pass until it is shut: a model is closed between two calls, never under one."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from tiny_qmoe_mlx import interrupts, process


class Door:
    """Around each call of a model; any number of threads may be inside at once.

    around: a context that each call has besides; a model may let its calls take turns there.
    """

    def __init__(self) -> None:
        self.around: Callable[[], AbstractContextManager[None]] = nullcontext
        self._changed = threading.Condition()
        self._open = True
        self._inside: list[int] = []  # thread of each call under way

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call, whole: Ctrl-C comes where `interrupts.now` lets it, or after the call.

        Raises:
            ValueError: the door is shut, or this is a fork of the process that the model was loaded in.
        """
        process.enter("model")
        with interrupts.later():
            self._come_in()
            try:
                with self.around():
                    yield
            finally:
                self._leave()

    def _come_in(self) -> None:
        with self._changed:
            if not self._open:
                raise ValueError("[model] should be open, it has been closed; load it again.")
            self._inside.append(threading.get_ident())

    def _leave(self) -> None:
        with self._changed:
            self._inside.remove(threading.get_ident())
            self._changed.notify_all()

    def shut(self, timeout: float | None = None) -> None:
        """Let nobody in any more, and wait until calls of other threads have ended, for so many seconds at most; a
        second time does nothing."""
        if not process.at_home():  # a fork: it has no other threads, and one of them may have held the lock
            return
        me = threading.get_ident()  # whose own calls, if any, are over once it gets to anything else
        with self._changed:
            self._open = False
            self._changed.wait_for(lambda: all(thread == me for thread in self._inside), timeout)
