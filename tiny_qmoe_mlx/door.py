"""A door that calls pass until it is shut: a model is closed between two calls, never under one."""

import threading


class Door:
    """A context manager around each call; any number of threads may be inside at once."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = True
        self._inside: list[int] = []  # thread of each call under way

    def __enter__(self) -> None:
        with self._changed:
            if not self._open:
                raise ValueError("[model] should be open, it has been closed; load it again.")
            self._inside.append(threading.get_ident())

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._inside.remove(threading.get_ident())
            self._changed.notify_all()

    def shut(self) -> None:
        """Let nobody in any more, and wait until calls of other threads have ended; a second time does nothing."""
        me = threading.get_ident()  # whose own calls, if any, are over once it gets to anything else
        with self._changed:
            self._open = False
            self._changed.wait_for(lambda: all(thread == me for thread in self._inside))
