"""The affine codec: MLX's own quantized codes kept bit for bit in records, and the plain numpy decoder that is their
specification (docs/FORMAT.md, section 6).

For checkpoints that were shipped in few bits (gpt-oss' MXFP4, INT4 from quantization-aware training, MLX's affine) and
whose codes should stay what they are. Where the parts lie follows from shapes and packing alone.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash

from tiny_qmoe_mlx.codecs import levels
from tiny_qmoe_mlx.codecs.trellis import FLAG_BIAS, HEADER_BYTES, MAGIC, RECORD_VERSION, UNIT
from tiny_qmoe_mlx.errors import FormatError

CODEC_ID = 2
FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4}  # bytes
# mode -> (bits, group sizes, types of scales); MLX knows one kind of each of the modes below affine
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128), tuple(FLOATS)),
    "mxfp4": ((4,), (32,), ("uint8",)),
    "mxfp8": ((8,), (32,), ("uint8",)),
    "nvfp4": ((4,), (16,), ("uint8",)),
    # of codecs tiny-qmoe and lossless (codecs/packed.py): 8-bit levels (codecs/levels.py), and weights not quantized
    "levels": ((8,), (0, 128), ("float16", "float32")),
    "plain": ((16, 32), (0,), tuple(FLOATS)),
}
OTHERS = ("levels", "plain")
LARGEST = {"mxfp4": 6, "nvfp4": 6, "mxfp8": 448}  # size of a code's value, before the scale
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # e2m1, without the sign in bit 3


@dataclass(frozen=True)
class Packing:
    """How one matrix of every expert of a layer is quantized, in MLX's words.

    scales: numpy's name of the scales' type (of an affine matrix's biases too). bias: the type of the expert's own
    biases, one per row, or None.
    """

    mode: str
    bits: int
    group_size: int
    scales: str
    bias: str | None = None

    def problem(self, columns: int) -> str:
        """What no matrix with so many columns can have, or nothing; for values of any type."""
        if self.mode not in tuple(MODES):
            return f"mode should be one of {tuple(MODES)}, received {str(self.mode)[:40]!r}"
        for name, allowed in zip(("bits", "group_size", "scales"), MODES[self.mode], strict=True):
            value = getattr(self, name)
            if type(value) is not type(allowed[0]) or value not in allowed:
                return f"{name} of mode {self.mode} should be one of {allowed}, received {str(value)[:40]!r}"
        if self.bias is not None and (type(self.bias) is not str or self.bias not in FLOATS):
            return f"bias should be one of {tuple(FLOATS)} or null, received {str(self.bias)[:40]!r}"
        if self.mode in OTHERS:
            return ""
        unit = max(self.group_size, 32)
        return f"columns should be a multiple of {unit}, received {columns}" if columns % unit else ""

    def parts(self, rows: int, columns: int) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, type, shape) of a matrix's arrays in the record's order."""
        if self.mode == "plain":
            return [("weight", self.scales, (rows, columns))]
        if self.mode == "levels":
            grid = levels.grid_shape(rows, columns, self.group_size)
            return [("weight", "uint8", (rows, columns)), ("scales", self.scales, grid), ("zeros", "uint8", grid)]
        groups = (rows, columns // self.group_size)
        found: list[tuple[str, str, tuple[int, ...]]] = [("weight", "uint32", (rows, columns * self.bits // 32))]
        found.append(("scales", self.scales, groups))
        if self.mode == "affine":
            found.append(("biases", self.scales, groups))
        if self.bias:
            found.append(("bias", self.bias, (rows,)))
        return found


@dataclass(frozen=True)
class Part:
    """Where one array of a matrix lies in every record of a layer; offset and size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return int(np.prod(self.shape)) * storage(self.dtype).itemsize


@dataclass
class Matrix:
    """One matrix of an expert: views of its record, bfloat16 as its bits in u16."""

    packing: Packing
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def storage(dtype: str) -> np.dtype:
    """The numpy type that holds an array in a record; bfloat16, which numpy lacks, is held as u16."""
    return np.dtype("<u2" if dtype == "bfloat16" else dtype).newbyteorder("<")


@lru_cache(maxsize=256)
def layout(shapes: tuple[tuple[int, int], ...], packing: tuple[Packing, ...]) -> tuple[list[list[Part]], int]:
    """Every matrix's parts, each at a multiple of 128 bytes, and the bytes that a record uses."""
    offset, matrices = UNIT, []
    for (rows, columns), own in zip(shapes, packing, strict=True):
        parts = []
        for name, dtype, shape in own.parts(rows, columns):
            parts.append(Part(name, dtype, shape, offset))
            offset += -(-parts[-1].size // UNIT) * UNIT
        matrices.append(parts)
    return matrices, offset


def pack(
    matrices: list[dict[str, np.ndarray]],
    shapes: list[tuple[int, int]],
    packing: tuple[Packing, ...],
    record_bytes: int,
) -> np.ndarray:
    """The bytes of one expert, u8 (record_bytes,).

    Args:
        matrices: per matrix its arrays by name, bfloat16 as u16.
        shapes: (rows, columns) of each.
        packing: of each.
        record_bytes: at least what `layout` says.

    Raises:
        ValueError: an array of another shape or type, or a record too small.
    """
    places, used = layout(tuple(shapes), packing)
    if used > record_bytes:
        raise ValueError(f"[affine.pack] a record needs {used} bytes but was given {record_bytes}.")
    out = np.zeros(record_bytes, np.uint8)
    words = out[:HEADER_BYTES].view("<u4")
    words[0], words[2], words[3] = MAGIC, used, FLAG_BIAS * (packing[0].bias is not None)
    out[4:8] = RECORD_VERSION, CODEC_ID, 0, len(shapes)
    for i, (arrays, parts, (rows, columns)) in enumerate(zip(matrices, places, shapes, strict=True)):
        words[4 + 3 * i : 7 + 3 * i] = rows, columns, parts[0].offset // UNIT
        for part in parts:
            array = arrays[part.name]
            if array.shape != part.shape or array.dtype != storage(part.dtype):
                raise ValueError(
                    f"[affine.pack] {part.name} of matrix {i} should be {part.dtype} of {part.shape}, received "
                    f"{array.dtype} of {array.shape}."
                )
            out[part.offset : part.offset + part.size] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    out[56:64].view("<u8")[0] = xxhash.xxh3_64_intdigest(out[:56].tobytes())
    return out


def parse(data: np.ndarray, shapes: list[tuple[int, int]], packing: tuple[Packing, ...], where: str) -> list[Matrix]:
    """A record's matrices as views of its bytes, checked against what the config asks for.

    Args:
        data: u8 (record_bytes,).
        shapes: the (rows, columns) that the config asks for.
        packing: as the config says, itself checked (spec.LayerSpec).
        where: file and expert, for the error's text.

    Raises:
        FormatError: what is wrong, with both numbers.
    """
    places, used = layout(tuple(shapes), packing)
    if len(data) < used:
        raise FormatError(f"[{where}] a record should have at least {used} bytes, received {len(data)}.")
    _check_header(data, shapes, packing, places, used, where)
    matrices = []
    for own, parts in zip(packing, places, strict=True):
        matrices.append(Matrix(own, views(data, parts)))
        check_values(matrices[-1], where)
    return matrices


def views(data: np.ndarray, parts: list[Part]) -> dict[str, np.ndarray]:
    """A matrix's arrays by name, as views of a record's bytes; bfloat16 as its bits in u16."""
    return {p.name: data[p.offset : p.offset + p.size].view(storage(p.dtype)).reshape(p.shape) for p in parts}


def _check_header(
    data: np.ndarray, shapes: list[tuple[int, int]], packing: tuple[Packing, ...], places: Any, used: int, where: str
) -> None:
    words = data[:HEADER_BYTES].view("<u4")
    if words[0] != MAGIC or xxhash.xxh3_64_intdigest(data[:56].tobytes()) != int(data[56:64].view("<u8")[0]):
        raise FormatError(f"[{where}] the record's header is damaged; run verify, then copy or convert the file again.")
    if data[4] != RECORD_VERSION or data[5] != CODEC_ID:
        raise FormatError(
            f"[{where}] record version {RECORD_VERSION} of codec {CODEC_ID} is asked for, received version {data[4]} "
            f"of codec {data[5]}; the files do not belong together, convert the model again."
        )
    asked = [len(shapes), used, FLAG_BIAS * (packing[0].bias is not None)]
    asked += [
        v for (rows, columns), p in zip(shapes, places, strict=True) for v in (rows, columns, p[0].offset // UNIT)
    ]
    found = [int(data[7]), int(words[2]), int(words[3]), *(int(w) for w in words[4 : 4 + 3 * len(shapes)])]
    if found != asked:
        raise FormatError(
            f"[{where}] the config asks for matrices, used bytes, flags, rows, columns and offsets {asked}, the record "
            f"has {found}; the files do not belong together, convert the model again."
        )


def check_values(matrix: Matrix, where: str) -> None:
    """Refuse scales and biases that would make a weight Inf or NaN, and 8-bit floats that are NaN."""
    own, arrays = matrix.packing, matrix.arrays
    with np.errstate(all="ignore"):
        reach = np.abs(scales(arrays["scales"], own)) * np.float32(LARGEST.get(own.mode, 2**own.bits - 1))
        if own.mode == "affine":
            reach += np.abs(floats(arrays["biases"], own.scales))
    fine = bool(np.isfinite(reach).all())
    if own.mode == "nvfp4":
        fine = fine and not ((arrays["scales"] & 0x7F) == 0x7F).any()
    if own.mode == "mxfp8":
        fine = fine and not ((arrays["weight"].view(np.uint8) & 0x7F) == 0x7F).any()
    if own.bias:
        fine = fine and bool(np.isfinite(floats(arrays["bias"], own.bias)).all())
    if not fine:
        raise FormatError(f"[{where}] scales, biases and codes should make finite weights, received Inf or NaN.")


# ---- values


def floats(array: np.ndarray, dtype: str) -> np.ndarray:
    """float32 of an array as it lies in a record."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def codes(weight: np.ndarray, bits: int) -> np.ndarray:
    """Codes of a matrix, u8 (rows, columns): a row's u32 words are one string of bits, the lowest first."""
    words = np.ascontiguousarray(weight).astype("<u4").view(np.uint8)
    each = np.unpackbits(words, axis=-1, bitorder="little").reshape(len(weight), -1, bits)
    return (each << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


def decode_matrix(matrix: Matrix) -> np.ndarray:
    """A matrix's weights, float32 (rows, columns)."""
    own, arrays = matrix.packing, matrix.arrays
    value = numbers(codes(arrays["weight"], own.bits), own.mode)
    value = value * np.repeat(scales(arrays["scales"], own), own.group_size, 1)
    if own.mode == "affine":
        value += np.repeat(floats(arrays["biases"], own.scales), own.group_size, 1)
    return value


def numbers(code: np.ndarray, mode: str) -> np.ndarray:
    """What codes stand for before their scale, float32."""
    if mode == "affine":
        return code.astype(np.float32)
    return _e4m3(code) if mode == "mxfp8" else np.where(code & 8, -FP4[code & 7], FP4[code & 7])


def scales(array: np.ndarray, packing: Packing) -> np.ndarray:
    """float32 of a matrix's scales; nvfp4 has 8-bit floats, mxfp4 and mxfp8 have e8m0: 2^(e - 127)."""
    if packing.mode == "affine":
        return floats(array, packing.scales)
    return _e4m3(array) if packing.mode == "nvfp4" else np.ldexp(np.float32(1), array.astype(np.int32) - 127)


def _e4m3(code: np.ndarray) -> np.ndarray:
    """8-bit floats: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no Inf."""
    exponent, mantissa = (code >> 3 & 15).astype(np.int32), (code & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    size = np.where(exponent > 0, normal, mantissa * np.float32(2.0**-9)).astype(np.float32)
    return np.where(code & 128, -size, size)
