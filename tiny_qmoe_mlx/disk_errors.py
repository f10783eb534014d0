"""Errors of a disk, as a person should get them: with the name of the file, and told from those of what lies on it."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Errors of the system get the name of the file that they come from, where they have none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None and str(error.strerror)[:1] != "[":
            error.filename = str(path)
        raise


def is_disk(error: BaseException) -> bool:
    """Whether a disk failed, and not what lies on it."""
    by_mlx = isinstance(error, RuntimeError) and "[read]" in str(error)
    return by_mlx or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError))


@contextlib.contextmanager
def weights_of(directory: str | Path) -> Iterator[None]:
    """MLX reads weights when it computes with them: where that fails, an OSError names the directory.

    Raises:
        OSError: EIO.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_disk(error):
            raise
        sentence = f"[{directory}] its weights could not be read; check the disk, or copy the model to another"
        raise OSError(errno.EIO, sentence) from error
