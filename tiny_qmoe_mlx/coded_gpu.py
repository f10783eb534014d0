"""Coded records expanded on a GPU: rANS by kernels/rans_decode.metal, straight from the pool, and planes joined to
arrays by MLX's own operations, lazily. codecs/packed.py is the specification.

Planes that are not rANS (raw, or of the table of 4-tuples) are copied from the host.
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from tiny_qmoe_mlx import metal_rans
from tiny_qmoe_mlx.codecs import affine, packed, rans, tuples
from tiny_qmoe_mlx.codecs.affine import Packing, Part
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.expert_kind import ExpertKind

Arrays = dict[str, mx.array]
Faults = list[mx.array]


def expand(
    pool: mx.array, base: int, offset: int, record: np.ndarray, kind: ExpertKind, where: str, table: np.ndarray | None
) -> tuple[list[Arrays], Faults]:
    """A record's arrays, of each matrix by name, with MLX's types; lazily, so the record has to stay where it is.

    Args:
        pool: u8, with the records' memory from byte `base` on.
        offset: where the record begins, from there.
        record: its bytes on the host, u8 (record_bytes,).
        kind, where, table: as `expert_kind.expand` takes them.

    Returns:
        The arrays, and what `require_sound` wants to see once they have been evaluated.

    Raises:
        FormatError: what can be said of the record before it is decoded.
    """
    planes = iter(packed.parse(record, kind.shapes, kind.packing, where, table))
    faults: Faults = []

    def decoded(plane: packed.Plane) -> mx.array:
        if plane.coded is None:
            return mx.array(_on_host(plane, where, table))
        at, size = offset + plane.at, len(plane.payload)
        out, wrong = metal_rans.decode(pool, base, at, size, plane.coded, plane.count)
        faults.append(wrong)
        return out

    matrices = []
    for own, parts in zip(kind.packing, affine.layout(tuple(kind.shapes), kind.packing)[0], strict=True):
        found = {part.name: [next(planes) for _ in packed.plane_sizes(part, own)] for part in parts}
        matrices.append({part.name: join([decoded(p) for p in found[part.name]], part, own) for part in parts})
    return matrices, faults


def _on_host(plane: packed.Plane, where: str, table: np.ndarray | None) -> np.ndarray:
    if plane.method == packed.TUPLES and table is not None:
        return tuples.decode(plane.payload.view("<u2"), plane.count, table, where)
    return plane.payload


def require_sound(faults: Faults, where: str) -> None:
    """Refuse a record whose tiles were damaged.

    Raises:
        FormatError: they were.
    """
    if any(np.array(wrong).any() for wrong in faults):
        raise FormatError(f"[{where}] tiles of coded bytes are damaged; {rans.AGAIN}.")


# ---- arrays of planes


def join(planes: list[mx.array], part: Part, packing: Packing) -> mx.array:
    """`packed.join` on the device; bfloat16 as such."""
    if part.dtype == "uint32" and packing.bits not in packed.WHOLE_BYTES:
        return _packed_words(planes[0], packing.bits).reshape(part.shape)
    kind = getattr(mx, part.dtype)
    if len(planes) == 1:
        return planes[0].view(kind).reshape(part.shape)
    bits = mx.uint16 if len(planes) == 2 else mx.uint32
    turned = planes[0].astype(bits)
    for plane in planes[1:]:
        turned = turned << 8 | plane
    return (turned >> 1 | turned << (8 * len(planes) - 1)).view(kind).reshape(part.shape)


def _packed_words(codes: mx.array, bits: int) -> mx.array:
    """Codes of so many bits, u8 (a multiple of 32,), one after the other in words, u32."""
    codes = codes.reshape(-1, 32).astype(mx.uint32)
    return mx.stack(list(_words(codes, bits)), axis=1)


def _words(codes: mx.array, bits: int) -> Iterator[mx.array]:
    """The words that 32 codes of a row take, of all rows: u32 (rows,) each."""
    for word in range(bits):
        first, last = 32 * word // bits, (32 * word + 31) // bits
        found = mx.zeros(codes.shape[0], mx.uint32)
        for code in range(first, last + 1):
            at = bits * code - 32 * word  # where the code begins, before the word for one that began in the last
            found = found | (codes[:, code] << at if at >= 0 else codes[:, code] >> -at)
        yield found


# ---- modules


def values(arrays: Arrays, group: int) -> mx.array:
    """Weights of 8-bit levels, float32: `levels.dequantize` on the device, with its roundings."""
    weight = arrays["weight"].astype(mx.float32)
    columns = weight.shape[1]
    scales, zeros = (_spread(arrays[n].astype(mx.float32), columns, group) for n in ("scales", "zeros"))
    return (weight - zeros) * scales


def _spread(grid: mx.array, columns: int, group: int) -> mx.array:
    return mx.repeat(grid, group, axis=1)[:, :columns] if group else grid
