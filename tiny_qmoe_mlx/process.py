"""The edges of a process: a fork, which has none of the threads that MLX and models need, and its end, which must not
come while a thread that has computed is still on its way out.

MLX frees what a thread has compiled when that thread ends for the system, which is after Python has joined it. Where
Python itself ends meanwhile, a Python before 3.14 ends the thread inside that code, and the C++ library aborts.
"""

import atexit
import os
import threading
import time
from pathlib import Path

from tiny_qmoe_mlx import compiled

END_S = 5.0  # the longest wait at the end
RECENT_S = 0.5  # a thread that has computed so lately may be about to do it again
TASKS = Path("/proc/self/task")  # Linux: a directory for each thread that the system has; elsewhere nothing aborts

_home: int | None = None  # the process in which MLX computes
_used: dict[int, float] = {}  # the system's number of each thread that computes: when it last began


def enter(where: str) -> None:
    """This thread is about to compute with MLX.

    Raises:
        ValueError: the process is a fork of one that has done so: MLX would wait for threads that are not there.
    """
    global _home
    _home = _home or os.getpid()
    refuse_fork(where)
    compiled.settle()
    thread = threading.get_native_id()
    if thread not in _used:
        for other in list(_used):  # a copy: other threads come in meanwhile
            if not (TASKS / str(other)).exists():
                _used.pop(other, None)
    _used[thread] = time.monotonic()


def refuse_fork(where: str) -> None:
    """Raises what `enter` does."""
    if not at_home():
        raise ValueError(
            f"[{where}] models should be used in the process that loaded them, this one was forked from it later and "
            "has none of its threads; load the model in a process that is started anew (multiprocessing's `spawn`)."
        )


def at_home() -> bool:
    """Whether this is no fork of a process that has computed with MLX."""
    return _home in (None, os.getpid())


@atexit.register
def _wait_for_threads() -> None:
    """Let threads that have computed get out: those that Python has joined, and those that have only just stopped."""
    until = time.monotonic() + END_S
    while at_home() and _leaving() and time.monotonic() < until:
        time.sleep(0.002)


def _leaving() -> bool:
    now, own = time.monotonic(), threading.get_native_id()
    alive = {thread.native_id for thread in threading.enumerate()}
    return any(
        thread != own and (thread not in alive or now - since < RECENT_S) and (TASKS / str(thread)).exists()
        for thread, since in list(_used.items())
    )
