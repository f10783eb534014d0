"""The trellis codec: layout of a record and the plain numpy decoder that is its specification (docs/FORMAT.md, section
4).

A trellis code slides a window of L bits over a bitstring; each window is a state that a hash turns into weights
(QTIP, arXiv 2406.11235; constants of 3INST as published with EXL3). Nothing here is fast: the C++ library and the Metal
kernels are, and are compared with this file. The encoder lives in the C++ library.
"""

from dataclasses import dataclass, field

import numpy as np
import xxhash

from tiny_qmoe_mlx.codecs.rotation import COLUMN_BLOCK, padded_columns
from tiny_qmoe_mlx.errors import FormatError

MAGIC, RECORD_VERSION, CODEC_ID = 0x31525154, 1, 1
HEADER_BYTES, UNIT = 64, 128
ROW_TILE, TILE_COLUMNS = 32, 16
LENGTHS = (12, 14, 16)
PLANES = np.array([0, 1, 2, 3, 4, 5, 6, 8])  # u32 words per row and 64 columns, by rate
BITS = PLANES / 2  # bits per weight, by rate
INST3_RATES = (6, 7)
MAX_DIMENSION = 1 << 20
FLAG_BIAS, FLAG_ROW_GAIN = 1, 256


@dataclass
class Matrix:
    """One matrix of an expert as it stands in a record, padded to R rows and B blocks of 64 columns.

    rates u8 (B,); order int (B,); block_gain f16 (4 B,); row_gain f16 (R,) or None; bias f16 (R,) or None;
    payload u32 (R / 32, sum of 32 PLANES[rates]).
    """

    rows: int
    columns: int
    rates: np.ndarray
    order: np.ndarray
    block_gain: np.ndarray
    row_gain: np.ndarray | None
    bias: np.ndarray | None
    payload: np.ndarray


@dataclass
class Record:
    """One expert: its matrices in order (gate, up, down, or fc1, fc2) and the trellis length L."""

    length: int
    matrices: list[Matrix] = field(default_factory=list)


def padded_rows(rows: int) -> int:
    """Rows rounded up to whole 32-row tiles."""
    return -(-rows // ROW_TILE) * ROW_TILE


def side_bytes(rows: int, columns: int, row_gain: bool, bias: bool) -> int:
    """Bytes of a matrix's section before its payload: gains, biases, order and rates, padded to 128."""
    blocks = padded_columns(columns) // COLUMN_BLOCK
    per_row = 2 * (int(row_gain) + int(bias)) * padded_rows(rows)
    size = per_row + 8 * blocks + blocks * (2 if blocks > 256 else 1) + (blocks + 1) // 2
    return -(-size // UNIT) * UNIT


def block_bytes(rows: int, rate: int) -> int:
    """Payload bytes of one 64-column block over all rows at a rate."""
    return padded_rows(rows) * 4 * int(PLANES[rate])


def code_values(state: np.ndarray, inst3: bool) -> np.ndarray:
    """Weights of trellis states, float32: (..., 2) for T2, (..., 1) for 3INST."""
    s = state.astype(np.uint64)
    product = s * np.uint64(89226354) + np.uint64(64248484) if inst3 else s * np.uint64(0xCBAC1FED)
    v = (product.astype(np.uint32) & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)
    halves = np.ascontiguousarray(v)[..., None].view(np.uint16).view(np.float16)
    values = halves.astype(np.float32)
    return values.sum(-1, keepdims=True) if inst3 else values


def code_table(length: int, inst3: bool) -> np.ndarray:
    """All 2^length states' weights, float32 (2^length, 2 or 1): what an encoder searches."""
    return code_values(np.arange(1 << length), inst3)


def decode_block(planes: np.ndarray, rate: int, length: int) -> np.ndarray:
    """Values of superblocks at one rate, without gains.

    Args:
        planes: u32 (n, PLANES[rate], 32): n superblocks; plane w, row l.
        rate: 1 to 7.
        length: L, bits of a state.

    Returns:
        float32 (n, 32, 64).
    """
    n, count, rows = planes.shape
    inst3 = rate in INST3_RATES
    step = rate - 3 if inst3 else rate
    segments = np.ascontiguousarray(planes.transpose(0, 2, 1)).astype("<u4").view(np.uint8)
    tiles = segments.reshape(n, rows, 4, count).transpose(0, 2, 1, 3).reshape(n, 4, rows * count)
    bits = np.unpackbits(tiles, axis=-1, bitorder="little")
    windows = bits.shape[-1] // step
    position = (step * np.arange(windows)[:, None] + np.arange(length)) % bits.shape[-1]
    state = bits[..., position].astype(np.uint32) @ (1 << np.arange(length, dtype=np.uint32))
    values = code_values(state, inst3).reshape(n, 4, rows, TILE_COLUMNS)
    return values.transpose(0, 2, 1, 3).reshape(n, rows, COLUMN_BLOCK)


def decode_matrix(matrix: Matrix, length: int) -> np.ndarray:
    """The stored matrix Q in the rotated space, columns in the model's order: float32 (R, C), padding included."""
    tiles, blocks = len(matrix.payload), len(matrix.rates)
    stored = np.zeros((tiles, ROW_TILE, blocks, COLUMN_BLOCK), np.float32)
    start = 32 * np.concatenate([[0], np.cumsum(PLANES[matrix.rates])])
    for b, rate in enumerate(matrix.rates):
        if rate:
            planes = matrix.payload[:, start[b] : start[b + 1]].reshape(tiles, -1, 32)
            stored[:, :, b] = decode_block(planes, int(rate), length)
    q = stored.reshape(tiles * ROW_TILE, blocks * COLUMN_BLOCK)
    q *= np.repeat(matrix.block_gain.astype(np.float32), TILE_COLUMNS)
    if matrix.row_gain is not None:
        q *= matrix.row_gain.astype(np.float32)[:, None]
    out = np.empty_like(q.reshape(len(q), blocks, COLUMN_BLOCK))
    out[:, matrix.order] = q.reshape(len(q), blocks, COLUMN_BLOCK)
    return out.reshape(q.shape)


# ---- bytes


def _nibbles(rates: np.ndarray) -> bytes:
    even = np.append(rates, 0).astype(np.uint8)[: 2 * ((len(rates) + 1) // 2)].reshape(-1, 2)
    return (even[:, 0] | even[:, 1] << 4).tobytes()


def _section(m: Matrix) -> bytes:
    order = m.order.astype("<u2" if len(m.order) > 256 else np.uint8)
    per_row = [a.astype("<f2").tobytes() for a in (m.row_gain, m.bias) if a is not None]
    side = b"".join([*per_row, m.block_gain.astype("<f2").tobytes(), order.tobytes(), _nibbles(m.rates)])
    return side + bytes(-len(side) % UNIT) + m.payload.astype("<u4").tobytes()


def pack(record: Record, record_bytes: int) -> np.ndarray:
    """The bytes of one expert, u8 (record_bytes,).

    Raises:
        ValueError: the expert needs more than record_bytes.
    """
    sections = [_section(m) for m in record.matrices]
    used = HEADER_BYTES + -HEADER_BYTES % UNIT + sum(map(len, sections))
    if used > record_bytes:
        raise ValueError(f"[trellis.pack] a record needs {used} bytes but was given {record_bytes}.")
    header = np.zeros(HEADER_BYTES, np.uint8)
    words = header.view("<u4")
    flags = FLAG_BIAS * (record.matrices[0].bias is not None)
    offset = UNIT
    for i, (m, section) in enumerate(zip(record.matrices, sections, strict=True)):
        flags |= (FLAG_ROW_GAIN << i) * (m.row_gain is not None)
        words[4 + 3 * i : 7 + 3 * i] = m.rows, m.columns, offset // UNIT
        offset += len(section)
    words[0], words[2], words[3] = MAGIC, used, flags
    header[4:8] = RECORD_VERSION, CODEC_ID, record.length, len(record.matrices)
    header[56:].view("<u8")[0] = xxhash.xxh3_64_intdigest(header[:56].tobytes())
    out = np.zeros(record_bytes, np.uint8)
    body = b"".join([header.tobytes(), bytes(UNIT - HEADER_BYTES), *sections])
    out[: len(body)] = np.frombuffer(body, np.uint8)
    return out


def parse(data: np.ndarray, shapes: list[tuple[int, int]], bias: bool, where: str, length: int | None = None) -> Record:
    """A record's parts as views of its bytes, every size and offset checked before use.

    Args:
        data: u8 (record_bytes,).
        shapes: the (rows, columns) that the model's config asks for.
        bias: whether the expert layer has biases.
        where: file and expert, for the error's text.
        length: L that the config asks for; None accepts any that the format has.

    Raises:
        FormatError: what is wrong, with both numbers.
    """
    if len(data) < UNIT:
        raise FormatError(f"[{where}] a record has at least {UNIT} bytes, received {len(data)}.")
    words = data[:HEADER_BYTES].view("<u4")
    _check_header(data, words, where)
    flags = int(words[3])
    if bool(flags & FLAG_BIAS) != bias or data[7] != len(shapes):
        raise FormatError(
            f"[{where}] the config asks for {len(shapes)} matrices and bias {bias}, the record has {data[7]} and "
            f"{bool(flags & FLAG_BIAS)}; the files do not belong together, convert the model again."
        )
    if length not in (None, int(data[6])):
        raise FormatError(f"[{where}] the config asks for L {length}, the record has {data[6]}; convert it again.")
    record = Record(int(data[6]))
    for i, shape in enumerate(shapes):
        rows, columns, unit = (int(v) for v in words[4 + 3 * i : 7 + 3 * i])
        if (rows, columns) != tuple(shape):
            raise FormatError(
                f"[{where}] matrix {i} should be {shape[0]} x {shape[1]}, the record says {rows} x {columns}."
            )
        has_gain = bool(flags & FLAG_ROW_GAIN << i)
        record.matrices.append(_parse_section(data[: int(words[2])], rows, columns, unit * UNIT, has_gain, bias, where))
    return record


def _check_header(data: np.ndarray, words: np.ndarray, where: str) -> None:
    found = xxhash.xxh3_64_intdigest(data[:56].tobytes())
    if words[0] != MAGIC or found != int(data[56:64].view("<u8")[0]):
        raise FormatError(f"[{where}] the record's header is damaged; run verify, then copy or convert the file again.")
    if data[4] != RECORD_VERSION or data[5] != CODEC_ID:
        raise FormatError(
            f"[{where}] record version {RECORD_VERSION} of codec {CODEC_ID} is read here, received version {data[4]} "
            f"of codec {data[5]}; a newer tiny-qmoe-mlx may read it."
        )
    if data[6] not in LENGTHS or not UNIT <= words[2] <= len(data) or words[2] % UNIT:
        raise FormatError(
            f"[{where}] L should be one of {LENGTHS} and the used bytes a multiple of {UNIT} up to {len(data)}, "
            f"received {data[6]} and {words[2]}."
        )


def _parse_section(
    data: np.ndarray, rows: int, columns: int, offset: int, has_gain: bool, has_bias: bool, where: str
) -> Matrix:
    if not (0 < rows <= MAX_DIMENSION and 0 < columns <= MAX_DIMENSION):
        raise FormatError(
            f"[{where}] rows and columns should lie in 1 to {MAX_DIMENSION}, received {rows} x {columns}."
        )
    side = side_bytes(rows, columns, has_gain, has_bias)
    if offset < UNIT or offset + side > len(data):
        raise FormatError(f"[{where}] a section needs {side} bytes at {offset}, the record uses {len(data)}.")
    padded, blocks = padded_rows(rows), padded_columns(columns) // COLUMN_BLOCK
    cursor = offset

    def take(count: int, dtype: str) -> np.ndarray:
        nonlocal cursor
        part = data[cursor : cursor + count * np.dtype(dtype).itemsize]
        cursor += len(part)
        return part.view(dtype)

    row_gain = take(padded, "<f2") if has_gain else None
    bias = take(padded, "<f2") if has_bias else None
    block_gain = take(4 * blocks, "<f2")
    order = take(blocks, "<u2" if blocks > 256 else "u1").astype(np.int64)
    packed = take((blocks + 1) // 2, "u1")
    rates = np.stack([packed & 15, packed >> 4], 1).reshape(-1)[:blocks]
    _check_side(row_gain, bias, block_gain, order, rates, where)
    stride = 32 * int(PLANES[rates].sum())
    size = 4 * (padded // ROW_TILE) * stride
    start = offset + side
    if start + size > len(data):
        raise FormatError(f"[{where}] the payload needs {size} bytes at {start}, the record uses {len(data)}.")
    payload = data[start : start + size].view("<u4").reshape(padded // ROW_TILE, stride)
    return Matrix(rows, columns, rates, order, block_gain, row_gain, bias, payload)


def _check_side(
    row_gain: np.ndarray | None,
    bias: np.ndarray | None,
    block_gain: np.ndarray,
    order: np.ndarray,
    rates: np.ndarray,
    where: str,
) -> None:
    for name, values in (("row gains", row_gain), ("biases", bias), ("block gains", block_gain)):
        if values is not None and not np.isfinite(values).all():
            raise FormatError(f"[{where}] {name} should be finite, received Inf or NaN.")
    if rates.max(initial=0) >= len(PLANES):
        raise FormatError(f"[{where}] rates should be 0 to {len(PLANES) - 1}, received {rates.max()}.")
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise FormatError(f"[{where}] the order of {len(order)} blocks should be a permutation and is not.")
