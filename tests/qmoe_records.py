"""Random records of the qmoe codec for tests, and a decoder that shares no code with the package's."""

import heapq
import struct
from functools import cache

import numpy as np

from tiny_qmoe_mlx.codecs import qmoe

CODINGS = [
    qmoe.Coding("ternary", "dictionary", 16),
    *(qmoe.Coding("ternary", "tunstall", bits) for bits in (8, 12, 16)),
    *(qmoe.Coding("2-bit", "tunstall", bits) for bits in (8, 12, 16)),
]
SHAPES = [(33, 70), (33, 70), (70, 33)]


def name_of(coding: qmoe.Coding) -> str:
    return f"{coding.grid}-{coding.code}-{coding.bits}"


def random_symbols(rng: np.random.Generator, rows: int, columns: int, levels: int, zeros: float = 0.885) -> np.ndarray:
    """u8 (rows, columns)."""
    other = rng.integers(1, levels, (rows, columns))
    return np.where(rng.random((rows, columns)) < zeros, 0, other).astype(np.uint8)


def random_values(rng: np.random.Generator, rows: int, levels: int) -> np.ndarray:
    """u16 (rows, levels - 1), bfloat16."""
    return (rng.normal(size=(rows, levels - 1)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def random_record(rng, coding, shapes=SHAPES, bias=False, zeros=0.885, more=128) -> np.ndarray:
    """The bytes of an expert, `more` of them after what it uses."""
    matrices = []
    for rows, columns in shapes:
        own = rng.normal(size=rows).astype(np.float32) if bias else None
        symbols = random_symbols(rng, rows, columns, coding.levels, zeros)
        matrices.append(qmoe.encode(symbols, random_values(rng, rows, coding.levels), coding, own))
    record = qmoe.pack(matrices, coding)
    return np.concatenate([record, np.zeros(more, np.uint8)])


# ---- a second reading of docs/FORMAT.md, section 7


@cache
def published_dictionary() -> list[tuple[int, ...]]:
    """The sequences of pairs in the order in which QMoE's heap gives them."""
    single = [0.885, (1 - 0.885) / 2, (1 - 0.885) / 2]
    pairs = [single[i // 3] * single[i % 3] for i in range(9)]
    heap: list[tuple[float, list[int]]] = [(-1.0, [])]
    found: list[tuple[int, ...]] = []
    while len(found) < 65536:
        negative, sequence = heapq.heappop(heap)
        if sequence:
            found.append(tuple(sequence))
        if len(sequence) < 14:
            for i in range(9):
                heapq.heappush(heap, (negative * pairs[i], [*sequence, i]))
    return found


@cache
def leaves(levels: int, bits: int, numerator: int) -> list[tuple[int, ...]]:
    """Tunstall's leaves in the order in which they were made."""
    p = numerator / 256
    single = [p] + [(1 - p) / (levels - 1)] * (levels - 1)
    made: list[tuple[int, ...]] = [()]
    heap, split = [(-1.0, 0)], set()
    while len(made) - len(split) + levels - 1 <= 2**bits:
        negative, node = heapq.heappop(heap)
        split.add(node)
        for symbol in range(levels):
            heapq.heappush(heap, (negative * single[symbol], len(made)))
            made.append((*made[node], symbol))
    return [sequence for node, sequence in enumerate(made) if node not in split]


NUMERATORS = (64, 85, 102, 128, 154, 171, 192, 205, 215, 221, 227, 233, 238, 243, 247, 251)


def decode(record: np.ndarray, matrix: int, coding: qmoe.Coding, bias: bool) -> np.ndarray:
    """A matrix's weights, float64 (rows, columns), by FORMAT.md's words, a codeword at a time."""
    data = record.tobytes()
    rows, columns, unit = struct.unpack_from("<3I", data, 16 + 12 * matrix)
    at, levels = 128 * unit, {"ternary": 3, "2-bit": 4}[coding.grid]
    _, table = struct.unpack_from("<2I", data, at)
    offsets = struct.unpack_from(f"<{rows + 1}I", data, at + 16)
    end = at + 16 + 4 * (rows + 1) + (4 * rows if bias else 0)
    values = struct.unpack_from(f"<{rows * (levels - 1)}H", data, end)
    end += 2 * rows * (levels - 1)
    payload = int.from_bytes(data[(end + 127) // 128 * 128 :], "little")
    out = np.zeros((rows, columns))
    for row in range(rows):
        symbols: list[int] = []
        for c in range(offsets[row], offsets[row + 1]):
            codeword = payload >> coding.bits * c & (1 << coding.bits) - 1
            if coding.code == "dictionary":
                for pair in published_dictionary()[codeword]:
                    symbols += [pair % 3, pair // 3]
            else:
                symbols += leaves(levels, coding.bits, NUMERATORS[table])[codeword]
        for column, symbol in enumerate(symbols[:columns]):
            if symbol:
                half = values[row * (levels - 1) + symbol - 1]
                out[row, column] = struct.unpack("<f", struct.pack("<I", half << 16))[0]
    return out
