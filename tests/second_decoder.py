"""A second decoder of codec `trellis`, from docs/FORMAT.md alone (sections 1 to 5): numpy, nothing of the package.

`xxh3_64` everywhere is a function from bytes to an int; without one, hashes and checksums are not checked.
"""

import json
from pathlib import Path

import numpy as np

PLANES = (0, 1, 2, 3, 4, 5, 6, 8)  # u32 words per row and 64 columns, by rate


class Refused(ValueError):
    """What the format does not allow."""


def check(fine, rule):
    if not fine:
        raise Refused(rule)


def read_layers(directory):
    """The `tiny_qmoe` object of config.json; its `layers` is what the functions below call a layer."""
    spec = json.loads((Path(directory) / "config.json").read_text())["tiny_qmoe"]
    check(
        spec["format_version"] == 1 and spec["codec"] == "trellis", "format version 1 and codec trellis are read here"
    )
    return spec


def read_record(directory, layer, expert, xxh3_64=None):
    """Bytes of one expert's record."""
    size, experts = layer["record_bytes"], layer["experts"]
    sums = -(-size // 65536)
    with (Path(directory) / layer["file"]).open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        check(start <= 8 + (1 << 20), "a header should have at most 2^20 bytes")
        header = json.loads(file.read(start - 8))
        check(len(header) == 2, "a file should have two tensors")
        tensors = {"records": ("U8", size, 0), "checksums": ("U64", sums, experts * size)}
        for name, (kind, width, offset) in tensors.items():
            end = offset + experts * width * (8 if kind == "U64" else 1)
            expected = {"dtype": kind, "shape": [experts, width], "data_offsets": [offset, end]}
            check(header.get(f"{layer['path']}.{name}") == expected, f"{name} should be {expected}")
        file.seek(start + expert * size)
        data = file.read(size)
        file.seek(start + experts * size + 8 * sums * expert)
        stored = np.frombuffer(file.read(8 * sums), "<u8").tolist()
    check(len(data) == size and len(stored) == sums, "the file is cut short")
    parts = (data[i : i + 65536] for i in range(0, size, 65536))
    check(not xxh3_64 or [xxh3_64(p) for p in parts] == stored, f"checksum of expert {expert}")
    return data


def parse_section(data, at, rows, columns, has_gains, has_bias):
    """Row gains, biases, block gains, order, rates and payload of the section at a byte, and where it ends."""
    check(0 < rows <= 1 << 20 and 0 < columns <= 1 << 20, "rows and columns should lie in 1 to 2^20")
    padded, blocks = -(-rows // 32) * 32, -(-columns // 64)

    def take(kind, count):
        nonlocal at
        start, at = at, at + count * np.dtype(kind).itemsize
        check(at <= len(data), "a section should end within the used bytes")
        return np.frombuffer(data, kind, count, start)

    row_gain = take("<f2", padded) if has_gains else np.ones(padded, np.float16)
    bias = take("<f2", padded) if has_bias else None
    block_gain = take("<f2", 4 * blocks)
    order = take("u1" if blocks <= 256 else "<u2", blocks)
    packed = take("u1", (blocks + 1) // 2)
    rates = np.stack([packed & 15, packed >> 4], 1).ravel()[:blocks]
    check(not take("u1", -at % 128).any(), "padding should be zero")
    check(all(np.isfinite(a).all() for a in (row_gain, bias, block_gain) if a is not None), "gains should be finite")
    check((np.sort(order) == np.arange(blocks)).all(), "the order should be a permutation")
    check(rates.max() <= 7, "rates should be 0 to 7")
    words = 32 * sum(PLANES[r] for r in rates)
    payload = take("<u4", padded // 32 * words).reshape(padded // 32, words)
    return (row_gain, bias, block_gain, order, rates, payload), at


def block_values(words, rate, length):
    """Values, f32 [R, 64], of one stored block's words, u32 [row tiles, 32 planes]."""
    tiles, planes = len(words), PLANES[rate]
    if rate == 0:
        return np.zeros((32 * tiles, 64), np.float32)
    segments = np.ascontiguousarray(words.reshape(tiles, planes, 32).swapaxes(1, 2)).view(np.uint8)
    bits = np.unpackbits(segments, axis=-1, bitorder="little").reshape(tiles, 32, 4, 8 * planes)
    bits = bits.swapaxes(1, 2).reshape(tiles, 4, 256 * planes)
    t2 = rate <= 5
    state = np.zeros((tiles, 4, 256 if t2 else 512), np.uint32)
    for j in range(length):
        state |= np.roll(bits, -j, axis=-1)[..., :: rate if t2 else rate - 3].astype(np.uint32) << np.uint32(j)
    product = state * np.uint32(0xCBAC1FED) if t2 else state * np.uint32(89226354) + np.uint32(64248484)
    v = (product & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)
    halves = v.astype("<u4").view("<f2").astype(np.float32)  # of each state the low half, then the high half
    values = halves if t2 else halves[..., 0::2] + halves[..., 1::2]
    return values.reshape(tiles, 4, 32, 16).swapaxes(1, 2).reshape(32 * tiles, 64)


def decode_matrix(section, length):
    """Q, f32 [R, C], columns as the rotated input has them."""
    row_gain, _, block_gain, order, rates, payload = section
    q = np.empty((len(row_gain), 64 * len(order)), np.float32)
    ends = np.cumsum([32 * PLANES[r] for r in rates])
    for b, (column, rate, end) in enumerate(zip(64 * order.astype(int), rates, ends, strict=True)):
        values = block_values(payload[:, end - 32 * PLANES[rate] : end], rate, length)
        values = values * np.repeat(block_gain[4 * b : 4 * b + 4].astype(np.float32), 16)
        q[:, column : column + 64] = values * row_gain.astype(np.float32)[:, None]
    return q


def decode_record(data, shapes, bias, length, xxh3_64=None):
    """(Q f32 [R, C], biases f16 [rows] or None) of each matrix; shapes, bias and L are what config.json says."""
    check(len(data) >= 128, "a record should have at least 128 bytes")
    words, numbers = np.frombuffer(data, "<u4", 14).tolist(), list(data[4:8])
    check(not xxh3_64 or xxh3_64(data[:56]) == int.from_bytes(data[56:64], "little"), "hash of the header")
    check(words[0] == 0x31525154 and numbers[:2] == [1, 1], "magic, version or codec")
    check(length in (12, 14, 16) and numbers[2:] == [length, len(shapes)], "L or number of matrices")
    used, flags, count, end, found = words[2], words[3], len(shapes), 128, []
    check(flags & ~((256 << count) - 256) == bias, "flags")
    check(not any(words[4 + 3 * count :]) and not any(data[64:128]), "unused fields should be zero")
    check(used <= len(data) and not any(data[used:]), "used bytes, or what follows them")
    for m, shape in enumerate(shapes):
        rows, columns, unit = words[4 + 3 * m : 7 + 3 * m]
        check([rows, columns, 128 * unit] == [*shape, end], "rows, columns or offset of a section")
        section, end = parse_section(data[:used], end, rows, columns, flags >> 8 + m & 1, bias)
        found.append((decode_matrix(section, length), section[1][:rows] if bias else None))
    check(end == used, f"used bytes should be {end}")
    return found


def signs(seed, layer, side, count):
    """+1 or -1, f64 [count]; `layer` is the decoder layer's index, side 1 is the last matrix's, side 0 the others'."""
    z = np.arange(count, dtype=np.uint64) + np.uint64((seed << 32) + (layer << 21) + (side << 20))
    z += np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.where((z ^ (z >> np.uint64(31))) >> np.uint64(63), -1.0, 1.0)


def unrotate(q, rows, columns, sign):
    """The model's weights, f64 [rows, columns], of Q [R, C] and the signs [C] of its side."""
    size, h = min(2048, len(sign) & -len(sign)), np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    w = (q[:rows].astype(np.float64).reshape(-1, size) @ h / np.sqrt(size)).reshape(rows, -1)
    return (w * sign)[:, :columns]
