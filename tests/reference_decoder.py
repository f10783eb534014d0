"""A second decoder of docs/FORMAT.md, sections 4 and 5, in plain Python: one bit, one weight, one integer at a time.

Written from the text alone, shares nothing with the package, and is slow on purpose. Rows are lists of floats that are
exact float32 values.
"""

import struct

PLANES = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 8}


def f16(data: bytes, offset: int) -> float:
    return struct.unpack_from("<e", data, offset)[0]


def f32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def half(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def t2(state: int) -> tuple[float, float]:
    v = ((state * 0xCBAC1FED) % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60
    return half(v & 0xFFFF), half(v >> 16)


def inst3(state: int) -> float:
    v = ((state * 89226354 + 64248484) % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60
    return f32(half(v & 0xFFFF) + half(v >> 16))


def window(bits: list[int], position: int, length: int) -> int:
    return sum(bits[(position + i) % len(bits)] << i for i in range(length))


def tile_weights(bits: list[int], rate: int, length: int) -> list[float]:
    """The 512 weights of a tile, row-major, without gains."""
    if rate >= 6:
        k = rate - 3
        return [inst3(window(bits, k * p, length)) for p in range(512)]
    weights: list[float] = []
    for p in range(256):
        weights += t2(window(bits, rate * p, length))
    return weights


def superblock(data: bytes, start: int, planes: int, rate: int, length: int) -> list[list[float]]:
    """32 rows of 64 weights of the superblock whose planes begin at `start`."""
    segments = []
    for row in range(32):
        words = [struct.unpack_from("<I", data, start + 4 * (32 * w + row))[0] for w in range(planes)]
        segments.append([words[i // 32] >> i % 32 & 1 for i in range(32 * planes)])
    out: list[list[float]] = [[] for _ in range(32)]
    for tile in range(4):
        part = 8 * planes
        bits = [b for segment in segments for b in segment[tile * part : (tile + 1) * part]]
        weights = tile_weights(bits, rate, length)
        for row in range(32):
            out[row] += weights[16 * row : 16 * row + 16]
    return out


def decode_record(data: bytes) -> list[dict]:
    """Each matrix of a record: rows, columns, `weights` (padded, columns in the model's order) and `bias` or None."""
    length, count = data[6], data[7]
    flags = struct.unpack_from("<I", data, 12)[0]
    out = []
    for m in range(count):
        rows, columns, unit = struct.unpack_from("<3I", data, 16 + 12 * m)
        padded_rows, padded_columns = (rows + 31) // 32 * 32, (columns + 63) // 64 * 64
        blocks, cursor = padded_columns // 64, 128 * unit
        row_gain = [1.0] * padded_rows
        if flags >> (8 + m) & 1:
            row_gain = [f16(data, cursor + 2 * r) for r in range(padded_rows)]
            cursor += 2 * padded_rows
        bias = None
        if flags & 1:
            bias = [f16(data, cursor + 2 * r) for r in range(padded_rows)]
            cursor += 2 * padded_rows
        block_gain = [f16(data, cursor + 2 * g) for g in range(4 * blocks)]
        cursor += 8 * blocks
        wide = blocks > 256
        order = [struct.unpack_from("<H" if wide else "B", data, cursor + (1 + wide) * b)[0] for b in range(blocks)]
        cursor += (1 + wide) * blocks
        rates = [data[cursor + b // 2] >> 4 * (b % 2) & 15 for b in range(blocks)]
        payload = (cursor + (blocks + 1) // 2 + 127) // 128 * 128
        words_per_tile = sum(32 * PLANES[r] for r in rates)
        weights = [[0.0] * padded_columns for _ in range(padded_rows)]
        for tile in range(padded_rows // 32):
            word = tile * words_per_tile
            for b, rate in enumerate(rates):
                if rate == 0:
                    continue
                values = superblock(data, payload + 4 * word, PLANES[rate], rate, length)
                word += 32 * PLANES[rate]
                for row in range(32):
                    r = 32 * tile + row
                    for c in range(64):
                        scaled = f32(values[row][c] * block_gain[4 * b + c // 16])
                        weights[r][64 * order[b] + c] = f32(scaled * row_gain[r])
        out.append({"rows": rows, "columns": columns, "weights": weights, "bias": bias})
    return out


def mix64(z: int) -> int:
    mask = 2**64 - 1
    z = (z + 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def sign(seed: int, layer: int, side: int, i: int) -> int:
    return -1 if mix64(seed * 2**32 + layer * 2**21 + side * 2**20 + i) >> 63 else 1


def rotation_matrix(seed: int, layer: int, side: int, columns: int) -> list[list[float]]:
    """P of section 5, padded columns x padded columns: z = P x."""
    padded = (columns + 63) // 64 * 64
    h = 1
    while padded % (2 * h) == 0 and h < 2048:
        h *= 2
    out = [[0.0] * padded for _ in range(padded)]
    for i in range(padded):
        for j in range(i // h * h, i // h * h + h):
            parity = bin((i % h) & (j % h)).count("1") % 2
            out[i][j] = (-1) ** parity * sign(seed, layer, side, j) / h**0.5
    return out
