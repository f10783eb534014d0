"""The qmoe codec: ternary (or 4-level) matrices in the sub-1-bit code of QMoE (arXiv 2310.16795), layout of a record
and the plain numpy decoder that is its specification (docs/FORMAT.md, section 7).

A row's weights are 0 or one of its two (three) bfloat16 values; codewords of one size stand for runs of them, and every
row begins with its own. Codewords of variable reach are followed nowhere before they have been checked: `parse` decodes
all.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from tiny_qmoe_mlx.codecs import qmoe_tables
from tiny_qmoe_mlx.codecs.affine import floats
from tiny_qmoe_mlx.codecs.qmoe_tables import PROBABILITIES, Table
from tiny_qmoe_mlx.codecs.trellis import FLAG_BIAS, HEADER_BYTES, MAGIC, RECORD_VERSION, UNIT
from tiny_qmoe_mlx.errors import FormatError

CODEC_ID = 3
TERNARY, TWO_BIT = "ternary", "2-bit"
LEVELS = {TERNARY: 3, TWO_BIT: 4}
DICTIONARY, TUNSTALL = "dictionary", "tunstall"
CODES = {DICTIONARY: (16,), TUNSTALL: (8, 12, 16)}  # bits of a codeword
HEAD_BYTES = 16  # of a section: codewords, table, two zeros
SYMBOLS_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Coding:
    """How all matrices of a layer are coded: the grid of their weights, the code, and the bits of a codeword."""

    grid: str
    code: str
    bits: int

    def problem(self) -> str:
        """What the format does not have, or nothing; for values of any type."""
        if self.grid not in tuple(LEVELS):
            return f"grid should be one of {tuple(LEVELS)}, received {str(self.grid)[:40]!r}"
        if self.code not in tuple(CODES):
            return f"code should be one of {tuple(CODES)}, received {str(self.code)[:40]!r}"
        if type(self.bits) is not int or self.bits not in CODES[self.code]:
            return f"bits of code {self.code} should be one of {CODES[self.code]}, received {str(self.bits)[:40]!r}"
        if self.code == DICTIONARY and self.grid != TERNARY:
            return f"code {DICTIONARY} should be of grid {TERNARY}, received {self.grid}"
        return ""

    @property
    def levels(self) -> int:
        return LEVELS[self.grid]

    @property
    def tables(self) -> int:
        """How many tables there are, of which a matrix names one."""
        return 1 if self.code == DICTIONARY else len(PROBABILITIES)

    def table(self, index: int) -> Table:
        """What codewords stand for."""
        if self.code == DICTIONARY:
            return qmoe_tables.dictionary()
        return qmoe_tables.tunstall(self.levels, self.bits, index)

    def reach(self, columns: int) -> int:
        """How many symbols a row's codewords may stand for at most."""
        return columns + columns % 2 if self.code == DICTIONARY else 1 << 62


@dataclass
class Matrix:
    """One matrix as it stands in a record.

    table: which of the coding's. offsets: u32 (rows + 1,), codewords before each row. values: u16 (rows, levels - 1),
    the bfloat16 weights of symbols 1, 2 (and 3). bias: float32 (rows,) or None. payload: u8, the codewords.
    """

    rows: int
    columns: int
    table: int
    offsets: np.ndarray
    values: np.ndarray
    bias: np.ndarray | None
    payload: np.ndarray

    @property
    def codewords(self) -> int:
        return int(self.offsets[-1])


def padded(size: int) -> int:
    """Bytes rounded up to a multiple of 128."""
    return -(-size // UNIT) * UNIT


def side_bytes(rows: int, coding: Coding, bias: bool) -> int:
    """Bytes of a section before its codewords."""
    return padded(HEAD_BYTES + 4 * (rows + 1) + 4 * rows * bias + 2 * rows * (coding.levels - 1))


def payload_bytes(codewords: int, coding: Coding) -> int:
    """Bytes of so many codewords, without padding."""
    return -(-codewords * coding.bits // 8)


def least_bytes(shapes: list[tuple[int, int]], coding: Coding, bias: bool) -> int:
    """Bytes that every record with these matrices has: a codeword a row."""
    sections = (side_bytes(rows, coding, bias) + padded(payload_bytes(rows, coding)) for rows, _ in shapes)
    return UNIT + sum(sections)


# ---- write


def encode(symbols: np.ndarray, values: np.ndarray, coding: Coding, bias: np.ndarray | None = None) -> Matrix:
    """Code a matrix.

    Args:
        symbols: u8 (rows, columns), 0 to levels - 1; 0 is a zero weight whatever the row's values are.
        values: u16 (rows, levels - 1), bfloat16 weights of the other symbols.
        coding: how; of Tunstall's tables the one whose probability of a zero suits the matrix best.
        bias: float32 (rows,), or None.
    """
    rows, columns = symbols.shape
    paired = coding.code == DICTIONARY
    index = 0 if paired else best_table(float((symbols == 0).mean()), coding.levels)
    even = np.pad(symbols, ((0, 0), (0, columns % 2))) if paired else symbols
    codewords, offsets = qmoe_tables.encode(even, coding.table(index), paired)
    payload = pack_codewords(codewords, coding.bits)
    return Matrix(rows, columns, index, offsets.astype("<u4"), values.astype("<u2"), bias, payload)


def best_table(zeros: float, levels: int) -> int:
    """The table for a share of zeros: the least cross entropy."""
    p = np.array(PROBABILITIES)
    return int(np.argmin(-zeros * np.log(p) - (1 - zeros) * np.log((1 - p) / (levels - 1))))


def pack_codewords(codewords: np.ndarray, bits: int) -> np.ndarray:
    """Codewords as one string of bits, the lowest first, u8."""
    if bits == 16:
        return codewords.astype("<u2").view(np.uint8)
    if bits == 8:
        return codewords.astype(np.uint8)
    pairs = np.append(codewords, np.zeros(len(codewords) % 2, np.uint16)).astype(np.uint32).reshape(-1, 2)
    words = (pairs[:, 0] | pairs[:, 1] << 12).astype("<u4").view(np.uint8).reshape(-1, 4)
    return np.ascontiguousarray(words[:, :3]).reshape(-1)[: -(-len(codewords) * 12 // 8)]


def unpack_codewords(payload: np.ndarray, count: int, bits: int) -> np.ndarray:
    """The inverse: int64 (count,)."""
    if bits == 16:
        return payload.view("<u2")[:count].astype(np.int64)
    if bits == 8:
        return payload[:count].astype(np.int64)
    at = 12 * np.arange(count)
    both = payload[at // 8] | payload[at // 8 + 1].astype(np.int64) << 8
    return both >> at % 8 & 4095


def pack(matrices: list[Matrix], coding: Coding, record_bytes: int | None = None) -> np.ndarray:
    """The bytes of one expert, u8; as many as it needs where record_bytes is None.

    Raises:
        ValueError: the expert needs more than record_bytes.
    """
    header = np.zeros(UNIT, np.uint8)
    words, sections, offset = header[:HEADER_BYTES].view("<u4"), [], UNIT
    for i, m in enumerate(matrices):
        words[4 + 3 * i : 7 + 3 * i] = m.rows, m.columns, offset // UNIT
        sections.append(_section(m))
        offset += len(sections[-1])
    words[0], words[2], words[3] = MAGIC, offset, FLAG_BIAS * (matrices[0].bias is not None)
    header[4:8] = RECORD_VERSION, CODEC_ID, 0, len(matrices)
    header[56:64].view("<u8")[0] = xxhash.xxh3_64_intdigest(header[:56].tobytes())
    if record_bytes is not None and offset > record_bytes:
        raise ValueError(f"[qmoe.pack] a record needs {offset} bytes but was given {record_bytes}.")
    body = header.tobytes() + b"".join(sections)
    return np.frombuffer(body.ljust(record_bytes or offset, b"\0"), np.uint8)


def _section(m: Matrix) -> bytes:
    head = np.array([m.codewords, m.table, 0, 0], "<u4").tobytes()
    bias = b"" if m.bias is None else m.bias.astype("<f4").tobytes()
    side = head + m.offsets.astype("<u4").tobytes() + bias + m.values.astype("<u2").tobytes()
    side += bytes(-len(side) % UNIT)
    return side + m.payload.tobytes() + bytes(-len(m.payload) % UNIT)


# ---- read


def parse(data: np.ndarray, shapes: list[tuple[int, int]], bias: bool, coding: Coding, where: str) -> list[Matrix]:
    """A record's matrices as views of its bytes, every codeword checked.

    Args:
        data: u8 (record_bytes,).
        shapes: the (rows, columns) that the config asks for.
        bias: whether the expert layer has biases.
        coding: as the config says, itself checked (spec.LayerSpec).
        where: file and expert, for the error's text.

    Raises:
        FormatError: what is wrong, with both numbers.
    """
    matrices = views(data, shapes, bias, coding, where)
    for i, m in enumerate(matrices):
        for _ in _symbols(m, coding, f"{where}, matrix {i}"):
            pass
    return matrices


def views(data: np.ndarray, shapes: list[tuple[int, int]], bias: bool, coding: Coding, where: str) -> list[Matrix]:
    """The same with all but row offsets and codewords checked.

    Raises:
        FormatError: what is wrong, with both numbers.
    """
    if len(data) < UNIT:
        raise FormatError(f"[{where}] a record should have at least {UNIT} bytes, received {len(data)}.")
    _check_header(data, shapes, bias, where)
    used, at, matrices = int(data[8:12].view("<u4")[0]), UNIT, []
    for i, shape in enumerate(shapes):
        if at + side_bytes(shape[0], coding, bias) > used:
            raise FormatError(f"[{where}] matrix {i} begins at {at}, the record uses {used} bytes; convert it again.")
        matrices.append(_view(data[:used], at, shape, bias, coding, f"{where}, matrix {i}"))
        if int(data[24 + 12 * i : 28 + 12 * i].view("<u4")[0]) * UNIT != at:
            raise FormatError(
                f"[{where}] matrix {i} should begin at {at}, the header says otherwise; convert it again."
            )
        at += side_bytes(shape[0], coding, bias) + padded(len(matrices[-1].payload))
    if at != used:
        raise FormatError(f"[{where}] the matrices should end at {at}, the record uses {used} bytes; convert it again.")
    return matrices


def _check_header(data: np.ndarray, shapes: list[tuple[int, int]], bias: bool, where: str) -> None:
    words = data[:HEADER_BYTES].view("<u4")
    if words[0] != MAGIC or xxhash.xxh3_64_intdigest(data[:56].tobytes()) != int(data[56:64].view("<u8")[0]):
        raise FormatError(f"[{where}] the record's header is damaged; run verify, then copy or convert the file again.")
    if data[4] != RECORD_VERSION or data[5] != CODEC_ID:
        raise FormatError(
            f"[{where}] record version {RECORD_VERSION} of codec {CODEC_ID} is asked for, received version {data[4]} "
            f"of codec {data[5]}; the files do not belong together, convert the model again."
        )
    asked = [len(shapes), FLAG_BIAS * bias, *(n for shape in shapes for n in shape)]
    found = [int(data[7]), int(words[3])]
    found += [int(w) for i in range(len(shapes)) for w in words[4 + 3 * i : 6 + 3 * i]]
    if found != asked:
        raise FormatError(
            f"[{where}] the config asks for matrices, flags, rows and columns {asked}, the record has {found}; the "
            "files do not belong together, convert the model again."
        )
    if not UNIT <= words[2] <= len(data) or words[2] % UNIT:
        raise FormatError(
            f"[{where}] the used bytes should be a multiple of {UNIT} up to {len(data)}, received {words[2]}."
        )


def _view(data: np.ndarray, at: int, shape: tuple[int, int], bias: bool, coding: Coding, where: str) -> Matrix:
    rows, columns = shape
    start = at + side_bytes(rows, coding, bias)
    codewords, table = (int(w) for w in data[at : at + 8].view("<u4"))
    at += HEAD_BYTES

    def take(count: int, dtype: str) -> np.ndarray:
        nonlocal at
        part = data[at : at + count * np.dtype(dtype).itemsize]
        at += len(part)
        return part.view(dtype)

    offsets, biases = take(rows + 1, "<u4"), take(rows, "<f4") if bias else None
    values = take(rows * (coding.levels - 1), "<u2").reshape(rows, -1)
    size = payload_bytes(codewords, coding)
    if table >= coding.tables:
        raise FormatError(f"[{where}] the table should be 0 to {coding.tables - 1}, received {table}.")
    if start + size > len(data) or codewords != offsets[-1]:
        raise FormatError(
            f"[{where}] {codewords} codewords end at {start + size}, the record uses {len(data)} bytes and the rows "
            f"{offsets[-1]} codewords; these should fit one another, convert it again."
        )
    if not np.isfinite(floats(values, "bfloat16")).all() or not (biases is None or np.isfinite(biases).all()):
        raise FormatError(f"[{where}] the rows' values and biases should be finite, received Inf or NaN.")
    return Matrix(rows, columns, table, offsets, values, biases, data[start : start + size])


def _check_offsets(m: Matrix, where: str) -> None:
    if m.offsets[0] != 0:
        raise FormatError(f"[{where}] the first row should begin at codeword 0, begins at {m.offsets[0]}.")
    back = np.flatnonzero(m.offsets[1:] <= m.offsets[:-1])
    if len(back):
        row = int(back[0])
        raise FormatError(
            f"[{where}] row {row} should have a codeword at least, it begins at {m.offsets[row]} and ends at "
            f"{m.offsets[row + 1]}."
        )


# ---- values


def decode_matrix(m: Matrix, coding: Coding) -> np.ndarray:
    """A matrix's weights, float32 (rows, columns).

    Raises:
        FormatError: codewords that the format does not allow; of a parsed matrix there are none.
    """
    value = np.zeros((m.rows, coding.levels), np.float32)
    value[:, 1:] = floats(m.values, "bfloat16")
    out, row = np.empty((m.rows, m.columns), np.float32), 0
    for part in _symbols(m, coding, "record"):
        stop = row + len(part)
        out[row:stop] = np.take_along_axis(value[row:stop], part.astype(np.int64), axis=1)
        row = stop
    return out


def _symbols(m: Matrix, coding: Coding, where: str) -> Iterator[np.ndarray]:
    """Symbols of all rows, some after the other, u8 (some rows, columns).

    Raises:
        FormatError: places of rows that run backwards, a codeword that is none, codewords that do not fill a row or go
            beyond it.
    """
    _check_offsets(m, where)
    table = coding.table(m.table)
    codewords = unpack_codewords(m.payload, m.codewords, coding.bits)
    if codewords.max(initial=0) >= len(table.lengths):
        raise FormatError(f"[{where}] codewords should be 0 to {len(table.lengths) - 1}, received {codewords.max()}.")
    lengths, step = table.lengths[codewords], max(1, SYMBOLS_AT_ONCE // m.columns)
    for first in range(0, m.rows, step):
        bounds = m.offsets[first : first + step + 1].astype(np.int64)
        _check_rows(lengths[bounds[0] : bounds[-1]], bounds, first, m.columns, coding, where)
        yield _rows(codewords[bounds[0] : bounds[-1]], bounds, m.columns, table, first, where)


def _check_rows(lengths: np.ndarray, bounds: np.ndarray, first: int, columns: int, coding: Coding, where: str) -> None:
    places = bounds - bounds[0]
    total = np.add.reduceat(lengths, places[:-1])
    before_last = total - lengths[places[1:] - 1]
    wrong = np.flatnonzero((total < columns) | (before_last >= columns) | (total > coding.reach(columns)))
    if len(wrong):
        raise FormatError(
            f"[{where}] the codewords of row {first + wrong[0]} should stand for {columns} weights, they stand for "
            f"{total[wrong[0]]}, {before_last[wrong[0]]} without the last."
        )


def _rows(codewords: np.ndarray, bounds: np.ndarray, columns: int, table: Table, first: int, where: str) -> np.ndarray:
    """Symbols u8 (rows, columns) of rows whose codewords have been measured."""
    row_of = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    lengths = table.lengths[codewords]
    before = np.concatenate([[0], np.cumsum(lengths)])  # symbols before each codeword
    begins = before[bounds - bounds[0]]  # and before each row
    place = np.arange(before[-1]) - np.repeat(before[:-1], lengths)
    symbol = table.symbols[np.repeat(table.start[codewords], lengths) + place]
    row = np.repeat(row_of, lengths)
    column = np.arange(before[-1]) - begins[row]
    beyond = symbol[column >= columns]
    if beyond.any():
        where_row = first + int(row[(column >= columns) & (symbol > 0)][0])
        raise FormatError(f"[{where}] weights beyond the end of row {where_row} should be zeros and are not.")
    return symbol[column < columns].reshape(-1, columns)
