"""Reads that fail as they should: an error names the file, and nothing is mapped into memory.

A mapped file whose disk fails, or that is cut short while it is in use, ends the process (SIGBUS); and numpy's fromfile
gives fewer numbers without a word.
"""

import contextlib
import errno
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiny_qmoe_mlx.errors import FormatError

MAX_HEADER = 100_000_000  # bytes, safetensors' own bound
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16}
BITS |= {"BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}
NUMPY = {"U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4"}


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


def read_bytes(path: Path) -> bytes:
    """A small file, whole.

    Raises:
        OSError: it cannot be read; with its name.
    """
    with named(path):
        return path.read_bytes()


def read_array(path: Path, dtype: str, count: int, offset: int) -> np.ndarray:
    """`count` numbers of a file from byte `offset` on, all of them.

    Raises:
        FormatError: the file ends before.
        OSError: it cannot be read; with its name.
    """
    out = np.empty(count, dtype)
    with named(path), open(path, "rb", buffering=0) as file:
        file.seek(offset)
        if (got := read_into(file, out)) < out.nbytes:
            raise FormatError(f"[{path}] should have {offset + out.nbytes} bytes, it ends at {offset + got}.")
    return out


def read_into(file: Any, array: np.ndarray) -> int:
    """Fill an array from an unbuffered file, which may give less at a time; the bytes that came before its end."""
    view, done = memoryview(array).cast("B") if array.nbytes else memoryview(b""), 0
    while done < len(view) and (got := file.readinto(view[done:])):
        done += got
    return done


@dataclass(frozen=True)
class Tensor:
    """Where a safetensors file has a tensor: its type as the header names it, and its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        FormatError: the header is damaged, or does not fit the file.
        OSError: it cannot be read; with its name.
    """
    with named(path), open(path, "rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise FormatError(f"[{path}] its header is damaged: it should have 2 to {size - 8} bytes, says {length}.")
        raw = file.read(length)
    try:
        found = json.loads(raw)
        words = dict(found.pop("__metadata__", {}))
        tensors = {name: _tensor(entry, 8 + length) for name, entry in found.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"[{path}] its header is damaged: {type(error).__name__} {error}.") from error
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, _bytes(t))):
        if tensor.offset != end:
            raise FormatError(f"[{path}] its header is damaged: a tensor should begin at {end}, not {tensor.offset}.")
        end += _bytes(tensor)
    if end != size:
        raise FormatError(f"[{path}] its header is damaged: its tensors end at {end}, the file at {size}.")
    return tensors, words


def _tensor(entry: dict[str, Any], base: int) -> Tensor:
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    found = Tensor(entry["dtype"], shape, base + start)
    if not all(type(n) is int and n >= 0 for n in (*shape, start)) or _bytes(found) != stop - start:
        raise ValueError(f"{entry} contradicts itself")
    return found


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * BITS[tensor.dtype] // 8


def read_tensor(path: Path, tensor: Tensor) -> np.ndarray:
    """A tensor of one of numpy's types.

    Raises:
        FormatError: of another type, or the file ends before.
        OSError: it cannot be read; with its name.
    """
    if tensor.dtype not in NUMPY:
        raise FormatError(f"[{path}] a tensor should be of {', '.join(NUMPY)}, received {tensor.dtype}.")
    return read_array(path, NUMPY[tensor.dtype], math.prod(tensor.shape), tensor.offset).reshape(tensor.shape)
