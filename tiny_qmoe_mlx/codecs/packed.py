"""Records whose arrays are coded without loss (docs/FORMAT.md, section 8): codecs `tiny-qmoe` and `lossless`.

A record holds the arrays of some matrices as `affine.Packing` describes them: codes of MLX's quantization, 8-bit
levels, or weights that are not quantized. Each array is cut into planes of bytes, each plane coded by itself: by rANS
(rans.py), by Tiny-QMoE's table of 4-tuples (tuples.py), or not at all where that would make it larger; which, the
record says. A plane of 4-bit codes has two of them in a byte. A float gives its exponent, the sign moved to the end, as
a plane of its own (as DFloat11, arXiv 2504.11651, does for bfloat16).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from tiny_qmoe_mlx.codecs import affine, levels, rans, tuples
from tiny_qmoe_mlx.codecs.affine import Matrix, Packing, Part
from tiny_qmoe_mlx.codecs.trellis import MAGIC, RECORD_VERSION, UNIT
from tiny_qmoe_mlx.errors import FormatError

CODEC_ID = 4
RAW, TUPLES, RANS = range(3)  # how a plane is coded
LEAST_SAVED = 1 / 64  # of a plane: what saves less is not worth its decoding (mantissas: .03 %)
CODERS = ("tuples", "rans")
HEADER, ENTRY, STEP = 32, 8, 16  # bytes of the header, of a plane's entry; payloads begin at multiples of 16
WHOLE_BYTES = (2, 4, 8)  # bits of codes that do not straddle bytes
Shapes = list[tuple[int, int]]


@dataclass(frozen=True)
class Plane:
    """A plane of bytes as a record holds it: how it is coded, its payload u8 (n,) and where in the record that begins,
    how many bytes it decodes to, and the payload's parts where it is rANS.
    """

    method: int
    payload: np.ndarray
    at: int
    count: int
    coded: rans.Coded | None = None


Decode = Callable[[rans.Coded, int, str], np.ndarray]


# ---- arrays and their planes


def plane_sizes(part: Part, packing: Packing) -> list[int]:
    """Bytes of each plane of an array."""
    count = int(np.prod(part.shape))
    if part.dtype == "uint32" and packing.bits not in WHOLE_BYTES:
        return [count * 32 // packing.bits]
    width = affine.storage(part.dtype).itemsize
    return [count * width] if part.dtype in ("uint8", "uint32") else [count] * width


def split(array: np.ndarray, packing: Packing) -> list[np.ndarray]:
    """Planes of an array, u8 each; floats as numpy holds them, or as their bits."""
    width = array.dtype.itemsize
    if array.dtype == np.uint32 and packing.bits not in WHOLE_BYTES:
        return [affine.codes(array, packing.bits).reshape(-1)]
    data = np.ascontiguousarray(array).reshape(-1)
    if array.dtype in (np.uint8, np.uint32):
        return [data.view(np.uint8)]
    bits = data.view(f"<u{width}")
    turned = (bits << 1 | bits >> (8 * width - 1)).view(np.uint8).reshape(-1, width)
    return [np.ascontiguousarray(turned[:, i]) for i in reversed(range(width))]


def join(planes: list[np.ndarray], part: Part, packing: Packing) -> np.ndarray:
    """The array of planes that `split` gave, to the bit."""
    kind = affine.storage(part.dtype)
    if part.dtype == "uint32" and packing.bits not in WHOLE_BYTES:
        bits = np.unpackbits(planes[0].reshape(-1, 1), axis=1, count=packing.bits, bitorder="little")
        return np.packbits(bits.reshape(-1), bitorder="little").view(kind).reshape(part.shape)
    if len(planes) == 1:
        return planes[0].view(kind).reshape(part.shape)
    width = len(planes)
    turned = np.stack(planes[::-1], 1).reshape(-1).view(f"<u{width}")
    return (turned >> 1 | turned << (8 * width - 1)).view(kind).reshape(part.shape)


# ---- records


def pack(
    matrices: list[dict[str, np.ndarray]],
    shapes: Shapes,
    packing: tuple[Packing, ...],
    coder: str,
    table: np.ndarray | None = None,
) -> np.ndarray:
    """The bytes of a record, u8 (a multiple of 128,).

    Args:
        matrices: per matrix its arrays by name, bfloat16 as u16.
        shapes, packing: of each.
        coder: "tuples" (of 8-bit codes, all else as it is) or "rans".
        table: of the tuples, u8 (entries, 4).

    Raises:
        ValueError: an array of another shape or type.
    """
    coded: list[tuple[int, np.ndarray]] = []
    for arrays, parts, own in zip(matrices, affine.layout(tuple(shapes), packing)[0], packing, strict=True):
        for part in parts:
            array = arrays[part.name]
            if array.shape != part.shape or array.dtype != affine.storage(part.dtype):
                raise ValueError(
                    f"[packed.pack] {part.name} should be {part.dtype} of {part.shape}, received {array.dtype} of "
                    f"{array.shape}."
                )
            wanted = coder == "rans" or (part.name == "weight" and part.dtype == "uint8")
            coded += [_coded(p, coder if wanted else "", table) for p in split(array, own)]
    return _assemble(coded)


def _coded(plane: np.ndarray, coder: str, table: np.ndarray | None) -> tuple[int, np.ndarray]:
    """A plane's method and payload, the plane itself where coding would make it larger, or hardly smaller."""
    method, payload = RAW, plane
    if coder == "rans":
        method, payload = RANS, rans.encode(plane).pack()
    elif coder == "tuples" and table is not None:
        method, payload = TUPLES, tuples.encode(plane, table).astype("<u2").view(np.uint8)
    return (method, payload) if len(payload) < (1 - LEAST_SAVED) * len(plane) else (RAW, plane)


def _assemble(coded: list[tuple[int, np.ndarray]]) -> np.ndarray:
    at = _start(len(coded))
    used = at + sum(_rounded(len(payload), STEP) for _, payload in coded)
    out = np.zeros(_rounded(used, UNIT), np.uint8)
    words = out[:at].view("<u4")
    words[0], words[2], words[3] = MAGIC, len(out), len(coded)
    out[4:6] = RECORD_VERSION, CODEC_ID
    for i, (method, payload) in enumerate(coded):
        words[8 + 2 * i : 10 + 2 * i] = method, len(payload)
        out[at : at + len(payload)] = payload
        at += _rounded(len(payload), STEP)
    out[16:24].view("<u8")[0] = _hash(out, len(coded))
    return out


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _start(planes: int) -> int:
    """Where the first payload begins."""
    return _rounded(HEADER + ENTRY * planes, STEP)


def _hash(data: np.ndarray, planes: int) -> int:
    """xxh3-64 of header and entries without the hash itself."""
    return xxhash.xxh3_64_intdigest(data[:16].tobytes() + data[24 : HEADER + ENTRY * planes].tobytes())


def parse(
    data: np.ndarray, shapes: Shapes, packing: tuple[Packing, ...], where: str, table: np.ndarray | None = None
) -> list[Plane]:
    """A record's planes as views of its bytes, checked against what the config asks for.

    Args:
        data: u8 (record_bytes,).
        shapes, packing: as the config says, themselves checked (spec.LayerSpec).
        where: file and layer, for the error's text.
        table: of the tuples; None where the model has none.

    Raises:
        FormatError: what is wrong.
    """
    parts = _parts(shapes, packing)
    sizes = [size for part, own in parts for size in plane_sizes(part, own)]
    _check_header(data, len(sizes), where)
    entries = data[HEADER : HEADER + ENTRY * len(sizes)].view("<u4").reshape(-1, 2).astype(np.int64)
    at, planes = _start(len(sizes)), []
    for number, ((method, length), count) in enumerate(zip(entries.tolist(), sizes, strict=True)):
        if at + length > len(data):
            raise FormatError(f"[{where}] plane {number} should end within {len(data)} bytes, at {at + length}.")
        planes.append(_plane(method, data[at : at + length], at, count, f"{where}, plane {number}", table))
        at += _rounded(length, STEP)
    if _rounded(at, UNIT) != int(data[8:12].view("<u4")[0]):
        raise FormatError(f"[{where}] planes should fill the used bytes, they end at {at}; {rans.AGAIN}.")
    return planes


def _parts(shapes: Shapes, packing: tuple[Packing, ...]) -> list[tuple[Part, Packing]]:
    places, _ = affine.layout(tuple(shapes), packing)
    return [(part, own) for parts, own in zip(places, packing, strict=True) for part in parts]


def _check_header(data: np.ndarray, planes: int, where: str) -> None:
    if len(data) < HEADER + ENTRY * planes or (words := data[:HEADER].view("<u4"))[0] != MAGIC:
        raise FormatError(f"[{where}] the record's header is damaged; {rans.AGAIN}.")
    if data[4] != RECORD_VERSION or data[5] != CODEC_ID or int(words[3]) != planes:
        raise FormatError(
            f"[{where}] record version {RECORD_VERSION} of codec {CODEC_ID} with {planes} planes is asked for, "
            f"received version {data[4]} of codec {data[5]} with {int(words[3])}; the files do not belong together, "
            "convert the model again."
        )
    used = int(words[2])
    if _hash(data, planes) != int(data[16:24].view("<u8")[0]) or used % UNIT or used > len(data):
        raise FormatError(f"[{where}] the record's header is damaged; {rans.AGAIN}.")


def _plane(method: int, payload: np.ndarray, at: int, count: int, where: str, table: np.ndarray | None) -> Plane:
    """A plane, with what can be said of it before it is decoded."""
    length = len(payload)
    if method == RANS:
        return Plane(method, payload, at, count, rans.parse(payload, count, where))
    if method not in (RAW, TUPLES):
        raise FormatError(f"[{where}] should be coded by method 0 to 2, received {method}; {rans.AGAIN}.")
    if method == RAW and length != count:
        raise FormatError(f"[{where}] should have {count} bytes, has {length}; {rans.AGAIN}.")
    if method == TUPLES and (table is None or length % 2):
        raise FormatError(f"[{where}] should be whole codewords of the model's table, {length} bytes; {rans.AGAIN}.")
    return Plane(method, payload, at, count)


def expand(
    data: np.ndarray,
    shapes: Shapes,
    packing: tuple[Packing, ...],
    where: str,
    table: np.ndarray | None = None,
    decode: Decode = rans.decode,
) -> list[Matrix]:
    """A record's arrays.

    Args:
        data, shapes, packing, where, table: as `parse` takes them.
        decode: of rANS planes; rans.decode is the specification.

    Raises:
        FormatError: what is wrong.
    """
    return list(each(data, shapes, packing, where, table, decode))


def each(
    data: np.ndarray,
    shapes: Shapes,
    packing: tuple[Packing, ...],
    where: str,
    table: np.ndarray | None = None,
    decode: Decode = rans.decode,
) -> Iterator[Matrix]:
    """The same one matrix after the other: a record of a whole decoder layer is large."""
    planes = iter(parse(data, shapes, packing, where, table))
    for own, parts in zip(packing, affine.layout(tuple(shapes), packing)[0], strict=True):
        matrix = Matrix(own)
        for part in parts:
            found = [_decoded(next(planes), where, table, decode) for _ in plane_sizes(part, own)]
            matrix.arrays[part.name] = join(found, part, own)
        yield matrix


def _decoded(plane: Plane, where: str, table: np.ndarray | None, decode: Decode) -> np.ndarray:
    if plane.coded is not None:
        return decode(plane.coded, plane.count, where)
    if plane.method == TUPLES and table is not None:
        return tuples.decode(plane.payload.view("<u2"), plane.count, table, where)
    return plane.payload


# ---- values


def check_values(matrix: Matrix, where: str) -> None:
    """Refuse arrays that would make a weight Inf or NaN.

    Raises:
        FormatError: they would.
    """
    own, arrays = matrix.packing, matrix.arrays
    if own.mode not in affine.OTHERS:
        affine.check_values(matrix, where)
        return
    with np.errstate(over="ignore", invalid="ignore"):  # a signalling NaN is invalid before it is found
        found = affine.floats(arrays["weight" if own.mode == "plain" else "scales"], own.scales) * np.float32(1)
        fine = np.isfinite(found * levels.TOP if own.mode == "levels" else found).all()
    if not fine:
        raise FormatError(f"[{where}] weights should be finite, received Inf or NaN; {rans.AGAIN}.")


def values(matrix: Matrix) -> np.ndarray:
    """A matrix's weights, float32 (rows, columns)."""
    if matrix.packing.mode == "plain":
        return affine.floats(matrix.arrays["weight"], matrix.packing.scales)
    if matrix.packing.mode == "levels":
        return levels.dequantize(matrix.arrays, matrix.packing.group_size)
    return affine.decode_matrix(matrix)


def methods(data: np.ndarray) -> list[tuple[int, int]]:
    """(method, bytes) of each plane of a sound record."""
    count = int(data[12:16].view("<u4")[0])
    return [(int(m), int(n)) for m, n in data[HEADER : HEADER + ENTRY * count].view("<u4").reshape(-1, 2)]
