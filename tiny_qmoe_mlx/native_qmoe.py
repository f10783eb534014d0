"""Matrices of the qmoe codec through the C++ library (kernels/cpu/qmoe.cpp): check, decoder and products.

As in `native`: every argument is checked before the library sees a pointer. The library bounds every codeword itself.
"""

import ctypes
from functools import cache

import numpy as np

from tiny_qmoe_mlx import native
from tiny_qmoe_mlx.codecs.qmoe import Coding, Matrix

AT_ONCE = 8  # tokens of a product


class _Matrix(ctypes.Structure):
    """tq_qmoe_matrix of kernels/cpu/tiny_qmoe_cpu.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("offsets", "values", "codes", "starts", "symbols")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "codewords", "reach")),
        ("entries", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("bits", "levels")),
    ]


@cache
def _library() -> ctypes.CDLL | None:
    library = native._library()
    if library is None or not hasattr(library, "tq_qmoe_qmv"):  # built before this codec
        return None
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    signatures = {
        "tq_qmoe_check": [pointer],
        "tq_qmoe_dequantize": [pointer, i64, i64, pointer],
        "tq_qmoe_qmv": [pointer, pointer, ctypes.c_int, pointer],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return library


def available() -> bool:
    """Whether the C++ library was found and has this codec."""
    return native.available() and _library() is not None


def _call(name: str, m: Matrix, coding: Coding, *arguments: int) -> int:
    """A function of the library on a matrix; its status."""
    library = _library()
    if library is None:
        raise RuntimeError("[native_qmoe] the C++ library lacks this codec; install the package again.")
    table = coding.table(m.table)
    arrays = [m.offsets, m.values, m.payload, table.starts32, table.words]
    _check(m, coding)
    pointers = [np.ascontiguousarray(array) for array in arrays]  # held until the call is over
    sizes = (m.rows, m.columns, m.codewords, coding.reach(m.columns), len(table.lengths), coding.bits, coding.levels)
    struct = _Matrix(*(array.ctypes.data for array in pointers), *sizes)
    return int(getattr(library, name)(ctypes.addressof(struct), *arguments))


def _check(m: Matrix, coding: Coding) -> None:
    """What the library cannot see: how long the arrays are."""
    shapes = m.offsets.shape, m.values.shape
    wanted = (m.rows + 1,), (m.rows, coding.levels - 1)
    if shapes != wanted or m.offsets.dtype != np.uint32 or m.values.dtype != np.uint16 or m.payload.dtype != np.uint8:
        raise ValueError(
            f"[native_qmoe] offsets and values should be u32 and u16 of {wanted}, and codewords u8, received {shapes}."
        )
    if m.payload.size * 8 < m.codewords * coding.bits or min(m.rows, m.columns) < 1:
        raise ValueError(
            f"[native_qmoe] {m.codewords} codewords of {coding.bits} bits should lie in the payload, it has "
            f"{m.payload.size} bytes."
        )


def is_sound(m: Matrix, coding: Coding) -> bool:
    """Whether every row of a matrix is as the format says: what `codecs.qmoe.parse` says, which has the sentence."""
    status = _call("tq_qmoe_check", m, coding)
    if status != native._RECORD:
        native._check("qmoe_check", status)
    return status == 0


def dequantize(m: Matrix, coding: Coding, row_start: int, row_stop: int) -> np.ndarray:
    """Rows of a matrix: those of `codecs.qmoe.decode_matrix`, to the bit.

    Returns:
        float32 (row_stop - row_start, columns).

    Raises:
        ValueError: rows that the matrix does not have, or a matrix that is not sound.
    """
    if not 0 <= row_start < row_stop <= m.rows:
        raise ValueError(
            f"[native_qmoe.dequantize] rows should lie in 0 to {m.rows}, received {row_start} to {row_stop}."
        )
    out = np.empty((row_stop - row_start, m.columns), np.float32)
    native._check("qmoe_dequantize", _call("tq_qmoe_dequantize", m, coding, row_start, row_stop, out.ctypes.data))
    return out


def qmv(m: Matrix, coding: Coding, x: np.ndarray) -> np.ndarray:
    """A matrix times up to 8 tokens, without its bias.

    Args:
        x: float32 (1 to 8 tokens, columns).

    Returns:
        float32 (tokens, rows).

    Raises:
        ValueError: another shape or type, or a matrix that is not sound.
    """
    x = native._array("qmoe_qmv", "x", x, np.float32, (None, m.columns))
    if not 1 <= len(x) <= AT_ONCE:
        raise ValueError(f"[native_qmoe.qmv] takes 1 to {AT_ONCE} tokens, received {len(x)}.")
    y = np.empty((len(x), m.rows), np.float32)
    native._check("qmoe_qmv", _call("tq_qmoe_qmv", m, coding, x.ctypes.data, len(x), y.ctypes.data))
    return y
