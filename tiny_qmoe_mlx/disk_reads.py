"""Reads that fail as they should: an error names the file, and nothing is mapped into memory.

A mapped file whose disk fails, or that is cut short while it is in use, ends the process (SIGBUS); and numpy's fromfile
gives fewer numbers without a word.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiny_qmoe_mlx import safetensors_header
from tiny_qmoe_mlx.disk_errors import named
from tiny_qmoe_mlx.errors import FormatError

NUMPY = {"U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4"}


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
    header, data = safetensors_header.read(path, str(path))
    base = path.stat().st_size - data
    safetensors_header.check_tensors(header, data, str(path))
    words = header.pop("__metadata__", None) or {}
    tensors = {n: Tensor(e["dtype"], tuple(e["shape"]), base + e["data_offsets"][0]) for n, e in header.items()}
    return tensors, words


def read_tensor(path: Path, tensor: Tensor) -> np.ndarray:
    """A tensor of one of numpy's types.

    Raises:
        FormatError: of another type, or the file ends before.
        OSError: it cannot be read; with its name.
    """
    if tensor.dtype not in NUMPY:
        raise FormatError(f"[{path}] a tensor should be of {', '.join(NUMPY)}, received {tensor.dtype}.")
    return read_array(path, NUMPY[tensor.dtype], math.prod(tensor.shape), tensor.offset).reshape(tensor.shape)
