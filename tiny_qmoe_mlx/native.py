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
SILU, GELU_TANH, SWIGLU_OAI, RELU2 = "silu", "gelu_tanh", "swiglu_oai", "relu2"
ACTIVATIONS = (SILU, GELU_TANH, SWIGLU_OAI, RELU2)
_MEMORY, _RECORD, _RANGE = 1, 2, 4


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
        "tq_rans_decode": ([pointer, pointer, pointer, i64, pointer, i64, i64, pointer], i32),
        "tq_affine_qmv": ([pointer, pointer, pointer, i32, i64, i64, pointer, i32, pointer], i32),
        "tq_gather_qmv": (
            [pointer, u64, pointer, i64, i32, pointer, i64, i64, pointer, pointer, i64, pointer],
            i32,
        ),
        "tq_gather_moe": (
            [pointer, u64, pointer, i64, pointer, *[i64] * 4, pointer, pointer, pointer, i32, f32, f32, pointer],
            i32,
        ),
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
        raise RuntimeError("[native] the C++ library is missing; install the package again, with a C++ compiler there.")
    return library


def _pointer(array: np.ndarray) -> int:
    return array.ctypes.data


def _array(where: str, name: str, value: object, dtype: type, shape: tuple[int | None, ...]) -> np.ndarray:
    """A C-contiguous, aligned array of exactly this dtype and shape; None stands for any length."""
    if not isinstance(value, np.ndarray) or value.dtype != dtype:
        got = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"[native.{where}] {name} should be a numpy array of {np.dtype(dtype)}, received {got}.")
    if value.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"[native.{where}] {name} should have shape ({wanted}), received {value.shape}.")
    return np.require(value, requirements=["C", "A"])


def _output(where: str, out: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    if out is None:
        return np.empty(shape, np.float32)
    _array(where, "out", out, np.float32, shape)
    if not out.flags.carray:
        raise ValueError(
            f"[native.{where}] out should be contiguous, aligned and writable, received an array that is not."
        )
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
    library = _need()
    names: list[str] = []
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
        codes u8 (n, 32, PLANES[rate]): row l's part of the tile's bitstring.
        values float32 (n, 32, 16): what the codes decode to.

    Raises:
        ValueError: an argument is out of range, or x is not finite.
    """
    library = _need()
    x = _array("encode_tiles", "x", x, np.float32, (None, ROW_TILE, TILE_COLUMNS))
    if rate not in range(1, len(PLANES)) or length not in LENGTHS:
        raise ValueError(
            f"[native.encode_tiles] rate should be 1 to 7 and length one of {LENGTHS}, received {rate} and {length}."
        )
    if not np.isfinite(x).all():
        raise ValueError("[native.encode_tiles] x should be finite, received Inf or NaN.")
    codes = np.empty((len(x), ROW_TILE, int(PLANES[rate])), np.uint8)
    values = np.empty_like(x)
    status = library.tq_encode_tiles(_pointer(x), len(x), rate, length, _pointer(codes), _pointer(values))
    _check("encode_tiles", status)
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
    """Rows of a record's matrix in the rotated space: those of `codecs.trellis.decode_matrix`, to the bit.

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


# ---- products


def _picks(
    where: str, pool: np.ndarray, offsets: np.ndarray, x: np.ndarray, rows_of: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    pool = _array(where, "pool", pool, np.uint8, (None,))
    offsets = _array(where, "offsets", offsets, np.int64, (None,))
    x = _array(where, "x", x, np.float32, (None, None))
    rows_of = _array(where, "rows_of", rows_of, np.int32, offsets.shape)
    return pool, offsets, x, rows_of


def _check_picks(
    where: str, status: int, pool: np.ndarray, offsets: np.ndarray, x: np.ndarray, rows_of: np.ndarray
) -> None:
    """Say which pick lies outside: the library has looked at all of them, faster than numpy."""
    if status == _RANGE:
        for name, values, end in (("offsets", offsets, pool.size), ("rows_of", rows_of, len(x))):
            low, high = int(values.min()), int(values.max())
            if not 0 <= low <= high < end:
                raise ValueError(f"[native.{where}] {name} should lie in 0 to {end - 1}, received {low} to {high}.")
    _check(where, status)


def gather_qmv(
    pool: np.ndarray,
    offsets: np.ndarray,
    matrix: int,
    x: np.ndarray,
    rows_of: np.ndarray,
    sign: np.ndarray,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """One matrix of the picked experts times their tokens, straight from the records.

    y[p] = Q(record at pool + offsets[p]) @ rotate(x[rows_of[p]], sign) + bias. Picks of the same record decode once.

    Args:
        pool: u8 (bytes,), records that passed `check_record`.
        offsets: i64 (picks,), where each pick's record begins.
        matrix: index of the matrix in the records.
        x: float32 (tokens, columns), columns as in the model.
        rows_of: i32 (picks,), the token of each pick.
        sign: float32 (padded columns,), from `codecs.rotation.signs`.
        out: float32 (picks, rows) to fill; None makes one.

    Returns:
        float32 (picks, rows).

    Raises:
        ValueError: an argument does not fit the records.
    """
    library = _need()
    pool, offsets, x, rows_of = _picks("gather_qmv", pool, offsets, x, rows_of)
    sign = _array("gather_qmv", "sign", sign, np.float32, (padded_columns(x.shape[1]),))
    if not offsets.size:
        return np.empty((0, 0), np.float32) if out is None else out
    rows, _ = _shape("gather_qmv", pool, int(offsets[0]), matrix)
    out = _output("gather_qmv", out, (offsets.size, rows))
    status = library.tq_gather_qmv(
        *(_pointer(pool), pool.size, _pointer(offsets), offsets.size, matrix),
        *(_pointer(x), *x.shape, _pointer(rows_of), _pointer(sign), rows, _pointer(out)),
    )
    _check_picks("gather_qmv", status, pool, offsets, x, rows_of)
    return out


def gather_moe(
    pool: np.ndarray,
    offsets: np.ndarray,
    x: np.ndarray,
    rows_of: np.ndarray,
    sign_in: np.ndarray,
    sign_mid: np.ndarray,
    activation: str,
    alpha: float = 1.702,
    limit: float = 7.0,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The whole expert of each pick: gate, up, activation, rotation, down (or fc1, activation, rotation, fc2).

    Args:
        pool, offsets, x, rows_of: as in `gather_qmv`.
        sign_in: float32 (padded columns of x,), signs of side 0.
        sign_mid: float32 (padded rows of gate,), signs of side 1.
        activation: SILU and GELU_TANH: act(gate) * up; SWIGLU_OAI: gpt-oss's, with alpha and limit; RELU2: relu(fc1)^2
            of experts with two matrices.
        alpha, limit: of SWIGLU_OAI.
        out: float32 (picks, rows of down) to fill; None makes one.

    Returns:
        float32 (picks, rows of down).

    Raises:
        ValueError: an argument does not fit the records.
    """
    library = _need()
    pool, offsets, x, rows_of = _picks("gather_moe", pool, offsets, x, rows_of)
    if activation not in ACTIVATIONS:
        raise ValueError(f"[native.gather_moe] activation should be one of {ACTIVATIONS}, received {activation!r}.")
    sign_in = _array("gather_moe", "sign_in", sign_in, np.float32, (padded_columns(x.shape[1]),))
    if not offsets.size:
        return np.empty((0, 0), np.float32) if out is None else out
    rows, middle = _shape("gather_moe", pool, int(offsets[0]), 1 if activation == RELU2 else 2)
    sign_mid = _array("gather_moe", "sign_mid", sign_mid, np.float32, (padded_columns(middle),))
    out = _output("gather_moe", out, (offsets.size, rows))
    status = library.tq_gather_moe(
        *(_pointer(pool), pool.size, _pointer(offsets), offsets.size, _pointer(x), *x.shape, middle, rows),
        *(_pointer(rows_of), _pointer(sign_in), _pointer(sign_mid)),
        *(ACTIVATIONS.index(activation), alpha, limit, _pointer(out)),
    )
    _check_picks("gather_moe", status, pool, offsets, x, rows_of)
    return out


def affine_qmv(weights: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, x: np.ndarray) -> np.ndarray:
    """Up to 8 tokens times an MLX affine matrix, groups of 64 columns: `mx.quantized_matmul(x, ..., transpose=True)`.

    Args:
        weights: u32 (rows, columns * bits / 32), as mx.quantize packs them.
        scales, biases: float32 (rows, columns / 64).
        bits: 4 or 8.
        x: float32 (1 to 8 tokens, columns).

    Returns:
        float32 (tokens, rows).

    Raises:
        ValueError: shapes or types that do not fit together.
    """
    library = _need()
    x = _array("affine_qmv", "x", x, np.float32, (None, None))
    rows, (tokens, columns) = len(weights), x.shape
    if bits not in (4, 8) or columns % 64 or not 1 <= tokens <= 8:
        raise ValueError(
            "[native.affine_qmv] takes 4 or 8 bits, columns in whole groups of 64 and 1 to 8 tokens, "
            f"received {bits}, {columns}, {tokens}."
        )
    weights = _array("affine_qmv", "weights", weights, np.uint32, (rows, columns * bits // 32))
    scales = _array("affine_qmv", "scales", scales, np.float32, (rows, columns // 64))
    biases = _array("affine_qmv", "biases", biases, np.float32, (rows, columns // 64))
    y = np.empty((tokens, rows), np.float32)
    parts = map(_pointer, (weights, scales, biases))
    status = library.tq_affine_qmv(*parts, bits, rows, columns, _pointer(x), tokens, _pointer(y))
    _check("affine_qmv", status)
    return y
