"""The C++ library of kernels/cpu through ctypes: encoder, record check, decoder and matrix products on the CPU.

Every function checks its arguments before the library sees a pointer. Without the library `available()` is False and
the other functions raise RuntimeError; callers then use the numpy specification in codecs/. Arrays are C-contiguous or
are copied. The library has one pool of threads; calls from several Python threads take turns.
"""

import ctypes
import sys
from functools import cache
from pathlib import Path

import numpy as np

from tiny_qmoe_mlx.codecs.rotation import padded_columns
from tiny_qmoe_mlx.codecs.trellis import LENGTHS, PLANES, ROW_TILE, TILE_COLUMNS, padded_rows

INTERFACE_VERSION = 1
SILU, GELU_TANH, SWIGLU_OAI, RELU2 = "silu", "gelu_tanh", "swigluoai", "relu2"
ACTIVATIONS = (SILU, GELU_TANH, SWIGLU_OAI, RELU2)
_MEMORY, _RECORD = 1, 2


def _candidates() -> list[Path]:
    name = "libtiny_qmoe_cpu" + (".dylib" if sys.platform == "darwin" else ".so")
    package = Path(__file__).resolve().parent
    return [package / "lib" / name, package.parent / "build" / name]


@cache
def _library() -> ctypes.CDLL | None:
    for path in _candidates():
        if not path.is_file():
            continue
        try:
            library = ctypes.CDLL(str(path))
            if library.tq_interface_version() == INTERFACE_VERSION:
                return _declare(library)
        except (OSError, AttributeError):  # built for another machine, or an older interface
            continue
    return None


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, i32, i64, u64, f32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float
    signatures = {
        "tq_isa_name": ([i32], ctypes.c_char_p),
        "tq_isa": ([], ctypes.c_char_p),
        "tq_use_isa": ([ctypes.c_char_p], i32),
        "tq_set_threads": ([i32], None),
        "tq_threads": ([], i32),
        "tq_encode_tiles": ([pointer, i64, i32, i32, pointer, pointer], i32),
        "tq_check_record": ([pointer, u64, pointer, i32, i32], i32),
        "tq_record_shape": ([pointer, u64, i32, pointer], i32),
        "tq_dequantize": ([pointer, u64, i32, i64, i64, pointer], i32),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def available() -> bool:
    """Whether the C++ library was found and fits this machine."""
    return _library() is not None


def _need() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError("[native] the C++ library is not there; install the package again where a C++ compiler exists.")
    return library


def _pointer(array: np.ndarray) -> int:
    return array.ctypes.data


def _array(where: str, name: str, value, dtype, shape: tuple[int | None, ...]) -> np.ndarray:
    """A C-contiguous array of exactly this dtype and shape; None stands for any length."""
    if not isinstance(value, np.ndarray) or value.dtype != dtype:
        got = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"[native.{where}] {name} should be a numpy array of {np.dtype(dtype)}, received {got}.")
    if value.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"[native.{where}] {name} should have shape ({wanted}), received {value.shape}.")
    return np.ascontiguousarray(value)


def _output(where: str, out: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    if out is None:
        return np.empty(shape, np.float32)
    _array(where, "out", out, np.float32, shape)
    if not (out.flags.c_contiguous and out.flags.writeable):
        raise ValueError(f"[native.{where}] out should be contiguous and writable, received an array that is not.")
    return out


def _check(where: str, status: int) -> None:
    if status == _MEMORY:
        raise MemoryError(f"[native.{where}] memory or threads should suffice, and were refused by the system.")
    if status == _RECORD:
        raise ValueError(f"[native.{where}] the record should be sound, received one that is damaged; run verify.")
    if status:
        raise ValueError(f"[native.{where}] the record's matrices should fit the arguments, received other shapes.")


# ---- the machine


def isa() -> str:
    """Name of the instruction set in use."""
    return _need().tq_isa().decode()


def supported_isas() -> list[str]:
    """Names of the instruction sets that this machine runs, best first; "portable" is always there."""
    library, names = _need(), []
    while name := library.tq_isa_name(len(names)):
        names.append(name.decode())
    return names


def use_isa(name: str) -> None:
    """Use one instruction set for all later calls; for tests and benchmarks.

    Raises:
        ValueError: the machine lacks it.
    """
    if _need().tq_use_isa(str(name).encode()):
        raise ValueError(f"[native.use_isa] name should be one of {supported_isas()}, received {name!r}.")


def threads() -> int:
    """Threads that share a call, the caller's included; at first as many as the process may use cores."""
    return _need().tq_threads()


def set_threads(count: int) -> None:
    """Set the number of threads, 1 to 256.

    Raises:
        ValueError: count is out of range.
    """
    if not isinstance(count, int) or not 1 <= count <= 256:
        raise ValueError(f"[native.set_threads] count should be 1 to 256, received {count!r}.")
    _need().tq_set_threads(count)


# ---- codec


def encode_tiles(x: np.ndarray, rate: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Trellis codes of 32 x 16 tiles: a Viterbi search over the circular bitstring of each.

    Codes depend on x, rate and length alone: not on the machine, its instruction set or the number of threads.

    Args:
        x: float32 (n, 32, 16) in the code's own units: weights divided by gains (codecs.trellis_scale has good ones).
        rate: 1 to 7.
        length: L, bits of a state: 12, 14 or 16.

    Returns:
        codes u8 (n, 32, PLANES[rate]): row l's part of the tile's bitstring; values float32 (n, 32, 16): what they decode to.

    Raises:
        ValueError: an argument is out of range, or x is not finite.
    """
    library = _need()
    x = _array("encode_tiles", "x", x, np.float32, (None, ROW_TILE, TILE_COLUMNS))
    if rate not in range(1, len(PLANES)) or length not in LENGTHS:
        raise ValueError(f"[native.encode_tiles] rate should be 1 to 7 and length one of {LENGTHS}, received {rate}, {length}.")
    if not np.isfinite(x).all():
        raise ValueError("[native.encode_tiles] x should be finite, received Inf or NaN.")
    codes = np.empty((len(x), ROW_TILE, int(PLANES[rate])), np.uint8)
    values = np.empty_like(x)
    _check("encode_tiles", library.tq_encode_tiles(_pointer(x), len(x), rate, length, _pointer(codes), _pointer(values)))
    return codes, values


def check_record(data: np.ndarray, shapes: list[tuple[int, int]], bias: bool) -> bool:
    """Whether a record is sound: the verdict of `codecs.trellis.parse`, which then has the sentence.

    Args:
        data: u8 (record_bytes,).
        shapes: the (rows, columns) that the config asks for, 1 to 3 matrices.
        bias: whether the expert layer has biases.
    """
    library = _need()
    data = _array("check_record", "data", data, np.uint8, (None,))
    if not 1 <= len(shapes) <= 3 or any(not 0 < n < 1 << 32 for shape in shapes for n in shape):
        raise ValueError(f"[native.check_record] shapes should be 1 to 3 pairs of positive numbers, received {shapes}.")
    wanted = np.array(shapes, np.uint32).reshape(len(shapes), 2)
    return bool(library.tq_check_record(_pointer(data), data.size, _pointer(wanted), len(shapes), int(bias)))


def _shape(where: str, data: np.ndarray, offset: int, matrix: int) -> tuple[int, int]:
    """Rows and columns of a matrix of the record at an offset of data."""
    if not 0 <= offset < data.size:
        raise ValueError(f"[native.{where}] offsets should lie in 0 to {data.size - 1}, received {offset}.")
    found = np.zeros(3, np.int64)
    status = _need().tq_record_shape(_pointer(data) + offset, data.size - offset, matrix, _pointer(found))
    _check(where, status)
    return int(found[0]), int(found[1])


def dequantize(
    data: np.ndarray, matrix: int, row_start: int, row_stop: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Rows of a record's matrix in the rotated space: `codecs.trellis.decode_matrix(...)[row_start:row_stop]`, to the bit.

    Args:
        data: u8 (record_bytes,), a record that passed `check_record`.
        matrix: index of the matrix in the record.
        row_start, row_stop: rows of the padded matrix.
        out: float32 (row_stop - row_start, C) to fill, C the padded columns; None makes one.

    Raises:
        ValueError: an argument does not fit the record.
    """
    library = _need()
    data = _array("dequantize", "data", data, np.uint8, (None,))
    rows, columns = _shape("dequantize", data, 0, matrix)
    if not 0 <= row_start < row_stop <= padded_rows(rows):
        raise ValueError(
            f"[native.dequantize] rows should lie in 0 to {padded_rows(rows)}, received {row_start} to {row_stop}."
        )
    out = _output("dequantize", out, (row_stop - row_start, padded_columns(columns)))
    status = library.tq_dequantize(_pointer(data), data.size, matrix, row_start, row_stop, _pointer(out))
    _check("dequantize", status)
    return out
