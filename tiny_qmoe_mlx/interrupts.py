"""Ctrl-C between changes, not in the middle of one.

Python raises KeyboardInterrupt in the main thread wherever it is just then, also where a slot has left one list and is
not yet in another, or a lock is held. A notebook goes on with the same model afterwards.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_depth = 0  # of the main thread's blocks
_before: Callable[[int, FrameType | None], Any] | None = None
_pressed = False


@contextmanager
def later() -> Iterator[None]:
    """Whatever Ctrl-C does, it does when the block is left (or at `now`); other threads than the main one get none."""
    global _depth, _before, _pressed
    if threading.get_ident() != threading.main_thread().ident:
        yield
        return
    if not _depth:
        found = signal.getsignal(signal.SIGINT)
        if not callable(found):  # ignored, or the system's own
            yield
            return
        _before, _pressed = found, False
        signal.signal(signal.SIGINT, _note)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth and _before is not None:
            signal.signal(signal.SIGINT, _before)
            _raise()


def now() -> None:
    """Let a Ctrl-C that came in the block do what it does: nothing is half changed here."""
    if _pressed and threading.get_ident() == threading.main_thread().ident:
        _raise()


def waits() -> bool:
    """Whether this thread is in a block, so that it has to look now and then whether a Ctrl-C came."""
    return _depth > 0 and threading.get_ident() == threading.main_thread().ident


def _note(number: int, frame: FrameType | None) -> None:
    global _pressed
    _pressed = True


def _raise() -> None:
    global _pressed
    pressed, _pressed = _pressed, False
    if pressed and _before is not None:
        _before(signal.SIGINT, None)
