"""First inputs of the fuzz targets in cpp/: sound records of every codec, as the package's own encoders make them.

Each target's file says what its first bytes mean.
"""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from qmoe_records import CODINGS, random_symbols, random_values
from records import pool_of, random_record

from tiny_qmoe_mlx import native
from tiny_qmoe_mlx.codecs import qmoe, qmoe_tables, trellis

SHAPES: list[list[tuple[int, int]]] = [
    [(32, 64)],
    [(1, 1)],
    [(33, 130)],
    [(32, 64), (64, 32)],
    [(5, 70), (5, 70), (64, 5)],
    [(96, 40), (96, 40), (20, 96)],  # the second rotation has groups of 128
]
ZEROS = (64, 102, 192, 227, 251)  # of 256: the tables that qmoe.cpp makes
Seeds = Iterator[bytes]


def _record(rng: np.random.Generator, shapes, bias: bool, length: int, row_gain: bool, rate: int | None) -> bytes:
    record = random_record(rng, shapes, bias, length, row_gain=row_gain)
    for m in record.matrices:
        if rate is not None:
            m.rates[:] = rate
        m.block_gain[:] = m.block_gain / np.float16(8)
        words = 32 * int(trellis.PLANES[m.rates].sum())
        m.payload = rng.integers(0, 2**32, (len(m.payload), words), np.uint32)
    return pool_of([record])[0].tobytes()


def _records(rng: np.random.Generator) -> Iterator[tuple[list[tuple[int, int]], bytes]]:
    for i, shapes in enumerate(SHAPES):
        for length in trellis.LENGTHS:
            for rate in (None, 6, 7, 1, 0) if shapes[0][0] < 96 else (1, 2):
                yield shapes, _record(rng, shapes, bool(i % 2), length, bool((i + length // 2) % 2), rate)
    wide = random_record(rng, [(32, 64 * 257)], rates=[0] * 257)
    yield [(32, 64 * 257)], pool_of([wide])[0].tobytes()


def encoded_record(rng: np.random.Generator, rate: int, length: int) -> bytes:
    """A record whose codes the package's encoder made, of Gaussian weights."""
    record = random_record(rng, [(32, 64)], length=length, rates=[rate])
    tiles = rng.standard_normal((4, 32, 16)).astype(np.float32)
    codes, _ = native.encode_tiles(tiles, rate, length)
    segments = np.ascontiguousarray(codes.transpose(1, 0, 2)).reshape(32, -1)  # of each row the parts of four tiles
    record.matrices[0].payload = np.ascontiguousarray(segments.view("<u4").T).reshape(1, -1)
    return pool_of([record])[0].tobytes()


def trellis_seeds(rng: np.random.Generator) -> Seeds:
    for i, (shapes, data) in enumerate(_records(rng)):
        yield struct.pack("<BBBHB", i % 16, 0, i % len(shapes), 0, 31) + data
    if native.available():
        for rate in range(1, 8):
            yield struct.pack("<BBBHB", 0, 0, 0, 0, 31) + encoded_record(rng, rate, trellis.LENGTHS[rate % 3])


def products_seeds(rng: np.random.Generator) -> Seeds:
    """One record, or two of the same shapes; single matrices, and whole experts with each activation."""
    for i, (shapes, data) in enumerate(_records(rng)):
        if shapes[0][1] > 1000:
            continue
        pick, second = bytes([0, 1, 130, 2, 135, 0]), len(data) // 128 if len(data) < 4000 else 0
        two = data + data if second else data
        head = struct.pack("<BBBBH", 2, i % len(shapes), 4 * (i % 5), len(pick) - 1, 0)
        yield head + bytes([second, i]) + pick + two
        if len(shapes) > 1:
            activation = 3 if len(shapes) == 2 else i % 3
            head = struct.pack("<BBBBH", 3, 0, activation + 4 * (i % 5), len(pick) - 1, 0)
            yield head + bytes([second, i]) + pick + two


def qmoe_seeds(rng: np.random.Generator) -> Seeds:
    """Every size of codewords with each of the tables that qmoe.cpp makes: of 16 bits the dictionary and one more."""
    for coding in CODINGS:
        paired = coding.code == qmoe.DICTIONARY
        for name, zeros in enumerate(ZEROS):
            if coding.bits == 16 and name != (0 if paired else 1):
                continue
            index = 0 if paired else qmoe.PROBABILITIES.index(zeros / 256)
            symbols = random_symbols(rng, 7, 60 + 2 * name, coding.levels, zeros / 256)
            symbols[0] = 0
            codewords, offsets = qmoe_tables.encode(symbols, coding.table(index), paired)
            values, payload = random_values(rng, 7, coding.levels), qmoe.pack_codewords(codewords, coding.bits)
            m = qmoe.Matrix(*symbols.shape, index, offsets.astype("<u4"), values, None, payload)
            yield qmoe_input(m, coding, name)


def qmoe_input(m: qmoe.Matrix, coding: qmoe.Coding, name: int) -> bytes:
    """An input of qmoe.cpp that is this matrix."""
    flags = (8, 12, 16).index(coding.bits) | 4 * (coding.levels == 4) | 8 | 32 * (coding.code == qmoe.DICTIONARY)
    head = struct.pack("<BBBHBBBH", flags, name, m.rows - 1, m.columns - 1, 2, 0, 2, m.codewords)
    return head + m.offsets.astype("<u4").tobytes() + m.values.astype("<u2").tobytes() + m.payload.tobytes()


def rans_seeds(rng: np.random.Generator) -> Seeds:
    for i, sigma in enumerate((0.0, 0.5, 3.0, 30.0)):
        symbols = np.clip(np.rint(rng.normal(128, sigma, 500)), 0, 255).astype(np.uint8)
        yield struct.pack("<BHB", 1, 499, i) + bytes(10) + symbols.tobytes()
    yield struct.pack("<BHB", 1 | 4, 0, 77) + bytes(10) + symbols.tobytes()  # one more than a tile holds


def affine_seeds(rng: np.random.Generator) -> Seeds:
    """Codes of 4 and 8 bits with every number of tokens; scales and biases as floats, some none of the kind."""
    for i in range(32):
        rows, groups = int(rng.integers(1, 9)), 1 + i // 8 % 2
        scales = rng.standard_normal((2, rows, groups)).astype("<f4")
        if i % 4 == 3:
            scales[0, 0, 0] = (np.inf, np.nan, 1e-42, -0.0)[i // 4 % 4]
        codes = rng.integers(0, 256, 200, np.uint8)
        yield bytes([i % 2 | 4 | 2 * (i % 4 == 3), rows - 1, i % 16, i]) + scales.tobytes() + codes.tobytes()


def encoder_seeds(rng: np.random.Generator) -> Seeds:
    strange = np.array([np.inf, -np.inf, np.nan, 1e-42, 3e38, -3e38], "<f4")
    for rate in range(1, 8):
        yield bytes([rate % 3, rate - 1, rate])
        yield bytes([16, rate - 1, rate])
        yield bytes([0, rate - 1, 0]) + np.resize(strange, 512).tobytes()
        yield bytes([0, rate - 1, 0]) + rng.standard_normal(512).astype("<f4").tobytes()


MAKERS: dict[str, Callable[[np.random.Generator], Seeds]] = {
    "trellis": trellis_seeds,
    "products": products_seeds,
    "qmoe": qmoe_seeds,
    "rans": rans_seeds,
    "affine": affine_seeds,
    "encoder": encoder_seeds,
}


def write(source: str, folder: Path) -> int:
    """Write the first inputs of a target's source into a folder; how many."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for count, data in enumerate(MAKERS[source](np.random.default_rng(0)), 1):
        (folder / f"seed_{count}").write_bytes(data)
    return count
