"""The encoder on the GPU: a drop-in for `native.encode_tiles` with the same codes, bit for bit."""

from functools import cache

import mlx.core as mx
import numpy as np

from tiny_qmoe_mlx import metal
from tiny_qmoe_mlx.codecs import trellis

# Cost units of 1.0 and the largest target, for T2 and 3INST: those of kernels/cpu/encoder.cpp, which gives the reasons.
UNITS = {False: (4700.0, 32767.0 - 2 * 4700.0), True: (6000.0, 32767.0)}
SCRATCH_BYTES = 256 << 20  # of decisions in one launch
CHIP_COSTS = 4096  # up to so many costs, two of each, lie in threadgroup memory
THREADS = 256
TILE = trellis.ROW_TILE * trellis.TILE_COLUMNS


@cache
def _viterbi_kernel(on_chip: bool) -> metal.Kernel:
    best = "chip" if on_chip else "best + ulong(threadgroup_position_in_grid.x) * (2 << (L - KV))"
    return metal.build(
        name="trellis_viterbi_chip" if on_chip else "trellis_viterbi",
        input_names=["x", "units"],
        output_names=["codes", "values", "marks"] + ["best"] * (not on_chip),
        header=metal.source("trellis_decode", "trellis_viterbi"),
        source="threadgroup Shared<THREADS> shared[1]; "
        + "threadgroup short chip[2 << (L - KV)]; " * on_chip
        + f"trellis_viterbi<KV, WEIGHTS, L, THREADS>(x, units, codes, values, marks, {best}, shared, "
        "threadgroup_position_in_grid.x, thread_index_in_threadgroup, thread_index_in_simdgroup);",
    )


def search(x: mx.array, rate: int, length: int) -> tuple[mx.array, mx.array]:
    """Codes and values of tiles, lazily.

    Args:
        x: float32 (n, 32, 16), finite, in the code's own units.
        rate: 1 to 7.
        length: L.

    Returns:
        codes u8 (n, 32, PLANES[rate]), values float32 (n, 32, 16).
    """
    inst3, n = rate in trellis.INST3_RATES, x.shape[0]
    step, weights = (rate - 3, 1) if inst3 else (rate, 2)
    costs = 1 << (length - step)
    threads, on_chip = min(THREADS, costs // (2 if step == 1 else 4)), costs <= CHIP_COSTS
    unit, clip = UNITS[inst3]
    above = float(np.nextafter(np.float32(unit), np.float32(np.inf)))
    shapes = [(n, trellis.ROW_TILE, int(trellis.PLANES[rate])), x.shape, (n, TILE // weights * costs // 32 * step)]
    dtypes = [mx.uint8, mx.float32, mx.uint32]
    if not on_chip:
        shapes, dtypes = [*shapes, (n, 2 * costs)], [*dtypes, mx.int16]
    codes, values, *_ = _viterbi_kernel(on_chip)(
        inputs=[x, metal.numbers(mx.float32, unit, clip, above)],
        template=[("KV", step), ("WEIGHTS", weights), ("L", length), ("THREADS", threads)],
        grid=(n * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )
    return codes, values


def encode_tiles(x: np.ndarray, rate: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """As `native.encode_tiles`: arguments, results and errors."""
    shape = (trellis.ROW_TILE, trellis.TILE_COLUMNS)
    if not isinstance(x, np.ndarray) or x.dtype != np.float32 or x.shape[1:] != shape:
        raise ValueError("[metal_encode.encode_tiles] x should be a numpy array of float32 (n, 32, 16).")
    if rate not in range(1, len(trellis.PLANES)) or length not in trellis.LENGTHS:
        raise ValueError(
            f"[metal_encode.encode_tiles] rate should be 1 to 7 and length one of {trellis.LENGTHS}, "
            f"received {rate} and {length}."
        )
    if not np.isfinite(x).all():
        raise ValueError("[metal_encode.encode_tiles] x should be finite, received Inf or NaN.")
    codes = np.empty((len(x), trellis.ROW_TILE, int(trellis.PLANES[rate])), np.uint8)
    values = np.empty_like(x)
    batch = tiles_in_a_launch(rate, length)
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        codes[part], values[part] = (np.asarray(a) for a in search(mx.array(x[part]), rate, length))
    return codes, values


def tiles_in_a_launch(rate: int, length: int) -> int:
    """How many tiles' decisions fit the scratch memory."""
    inst3 = rate in trellis.INST3_RATES
    step, steps = (rate - 3, TILE) if inst3 else (rate, TILE // 2)
    return SCRATCH_BYTES // (steps * step << (length - step) >> 3)
