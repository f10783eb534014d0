"""MLX's compiler on a Linux CPU: where what it writes is not safe with this user, MLX computes without it.

MLX joins elementwise operations into C++, has g++ compile it, and keeps and loads the libraries in the directory
TMPDIR/mlx/VERSION/cpu, below /tmp for most. Whoever made that first decides what runs in the processes of all users of
the machine; and if it is not ours, or TMPDIR is not there, the first step of any model fails. Without the compiler each
operation is computed by itself, as on a machine that has no g++; the demo decodes as fast.
"""

import contextlib
import os
import stat
import struct
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

VARIABLES = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")  # in which C++ looks, in this order
OTHERS = stat.S_IWGRP | stat.S_IWOTH
TORN_S = 60  # a library that is not whole after so long will not become so


@cache
def settle() -> None:
    """Once, before anything is computed."""
    if not sys.platform.startswith("linux") or mx.default_device() != mx.cpu:
        return
    found = folder()
    if found is None:
        mx.disable_compile()
        return
    for library in found.glob("*.so"):
        with contextlib.suppress(OSError):  # another process may do the same
            if _is_torn(library):
                library.unlink()


def folder() -> Path | None:
    """Where MLX keeps its libraries, made if need be; None where others could write there, or we could not."""
    base = Path(next((os.environ[name] for name in VARIABLES if name in os.environ), "/tmp") or "/dev/null")
    own = base / "mlx" / version("mlx")
    parts = [own.parent, own, own / "cpu"]
    try:
        if not _keeps_names(base):
            return None
        for part in parts:
            with contextlib.suppress(FileExistsError):
                part.mkdir(mode=0o700)
        fine = all(map(_is_ours, parts)) and os.access(parts[-1], os.W_OK | os.X_OK)
    except OSError:
        return None
    return parts[-1] if fine else None


def _keeps_names(base: Path) -> bool:
    """Whether nobody else can give what is ours in a directory another name."""
    found = base.stat()
    shared = found.st_mode & OTHERS and not found.st_mode & stat.S_ISVTX
    return stat.S_ISDIR(found.st_mode) and found.st_uid in (0, os.geteuid()) and not shared


def _is_ours(part: Path) -> bool:
    found = part.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & OTHERS


def _is_torn(library: Path) -> bool:
    """Whether a library was cut short, by a power cut say: loading it would end the process (SIGBUS).

    An ELF file of 64 bits ends, as linkers write it, with the table of its sections: its offset is the u64 at byte 40,
    size and number of its entries are the u16 at 58 and 60.
    """
    with open(library, "rb") as file:
        head, found = file.read(64), os.fstat(file.fileno())
    if time.time() - found.st_mtime < TORN_S:
        return False
    if len(head) < 64 or not head.startswith(b"\x7fELF"):
        return True
    size, count = struct.unpack_from("<HH", head, 58)
    return found.st_size < struct.unpack_from("<Q", head, 40)[0] + size * count
