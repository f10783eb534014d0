"""The Metal kernel that decodes rANS; else as in `metal`.

A payload must have passed `codecs.rans.parse`, which has its table; whatever lies behind that, the kernel reads and
writes nothing outside, and says which tiles are damaged.
"""

from functools import cache

import mlx.core as mx
import numpy as np

from tiny_qmoe_mlx import metal
from tiny_qmoe_mlx.codecs import rans

SIMDGROUPS = 4  # of a threadgroup, a tile each; they share the table of slots
UNIT = 16  # bytes: payloads begin at multiples of it
MOST = 1 << 31  # bytes of a plane: an MLX array's dimension is below it


@cache
def _kernel() -> metal.Kernel:
    return metal.build(
        name="rans_decode",
        input_names=["pool", "table", "params"],
        output_names=["out", "faults"],
        header=metal.source("rans_decode"),
        source="threadgroup uchar symbol[TQ_RANS_SLOTS]; "
        f"rans_decode<SG>(pool, table, params, out, faults, symbol, {metal._POSITION}, {metal._LANE});",
    )


def table(frequencies: np.ndarray) -> mx.array:
    """Frequency and first slot of each symbol in one word, u32 (256,)."""
    first = np.cumsum(frequencies, dtype=np.uint32) - frequencies
    return mx.array(frequencies << np.uint32(16) | first)


def decode(pool: mx.array, base: int, at: int, size: int, coded: rans.Coded, count: int) -> tuple[mx.array, mx.array]:
    """The bytes of a payload in a pool.

    Args:
        pool: u8, of any shape, contiguous; base: bytes before its first record, such that its address is a multiple of
            128.
        at: where after base the payload begins, a multiple of 16; size: its bytes.
        coded: its parts, from `codecs.rans.parse`.
        count: symbols that it holds.

    Returns:
        u8 (count,), and u8 (tiles,) that is not 0 where a tile is damaged; lazily.

    Raises:
        ValueError: more symbols than an array may have.
    """
    tiles, words = len(coded.ends), len(coded.words)
    if count >= MOST or at % UNIT:
        raise ValueError(
            f"[metal.rans] a plane should have less than {MOST} bytes and begin at a multiple of {UNIT}, received "
            f"{count} bytes at {at}."
        )
    skip = size - (4 + 4 * rans.LANES) * tiles - 2 * words  # of the packed table of frequencies
    groups = -(-tiles // SIMDGROUPS)
    out, faults = _kernel()(
        inputs=[
            pool,
            table(coded.frequencies),
            metal.numbers(mx.uint32, base, at // UNIT, skip, tiles, count, words),
        ],
        template=[("SG", SIMDGROUPS)],
        grid=(groups * SIMDGROUPS * metal.THREADS, 1, 1),
        threadgroup=(SIMDGROUPS * metal.THREADS, 1, 1),
        output_shapes=[(count,), (tiles,)],
        output_dtypes=[mx.uint8, mx.uint8],
    )
    return out, faults
