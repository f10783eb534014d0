"""What a layer of experts computes, straight from compressed records: a fused product for a few tokens (decode), and a
product of many tokens with one decoded expert (prefill). Affine records, which MLX itself can multiply, go through
affine_product, qmoe records through qmoe_product.

The rule of dispatch: the Metal kernels where MLX computes on a GPU (as CUDA on NVIDIA's); elsewhere the C++ library
where it was built, and numpy where it was not; each call is counted by the path it took. On the CPU inputs and outputs
are float32 numpy arrays, on the GPU lazy MLX arrays. Records are bytes that `check_record` has passed.
"""

from collections import Counter
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from tiny_qmoe_mlx import affine_product, cuda, metal, native, qmoe_product
from tiny_qmoe_mlx.codecs import rotation, trellis
from tiny_qmoe_mlx.expert_kind import ExpertKind

DECODE_TOKENS = 8  # up to so many tokens are multiplied straight from the records on every path
DENSE_BYTES = 16 << 20  # of decoded weights held at once in prefill on the CPU
GPU_DENSE_BYTES = 64 << 20  # and on a GPU, which needs several experts to be busy


@dataclass
class Picks:
    """Which record serves which token: pick p multiplies token `rows[p]` with the record at byte `offsets[p]` of the
    pool.
    """

    offsets: np.ndarray
    rows: np.ndarray


@dataclass
class Dispatch:
    """Counts of the paths taken, per layer and step: Metal, native (fused or not) or numpy; decode or prefill."""

    counts: Counter = field(default_factory=Counter)


def from_records(tokens: int, kind: ExpertKind) -> bool:
    """Whether tokens are multiplied straight from the records rather than with each expert decoded first.

    A few always are. Many are too where the whole expert is one call of the C++ library: 512 tokens through the demo
    took a fifth to an eighth of the time, since nothing is written out and the threads share whole experts.
    """
    if not kind.trellis:
        return False
    return tokens <= DECODE_TOKENS or (native.available() and kind.fused is not None)


def expert_inputs(x: np.ndarray, kind: ExpertKind) -> np.ndarray:
    """The inputs of `expert_product`: x float32 (tokens, d), rotated where the codec rotates."""
    return rotation.rotate(x, kind.sign_in) if kind.trellis else x


def decode_product(
    pool: np.ndarray, picks: Picks, x: np.ndarray, kind: ExpertKind, record_bytes: int, dispatch: Dispatch
) -> np.ndarray:
    """Whole experts straight from their records.

    Args:
        pool: u8 (n,), the records' memory.
        picks: one entry per (token, chosen expert).
        x: float32 (tokens, d).

    Returns:
        float32 (picks, d): each pick's expert output, biases included, router weights not.
    """
    phase = "decode" if len(x) <= DECODE_TOKENS else "prefill"
    if not native.available():
        dispatch.counts[f"{phase} numpy"] += 1
        return _decode_numpy(pool, picks, x, kind, record_bytes)
    if kind.fused:
        dispatch.counts[f"{phase} native fused"] += 1
        name, alpha, limit = kind.fused
        return native.gather_moe(
            pool, picks.offsets, x, picks.rows, kind.sign_in, kind.sign_mid, name, alpha=alpha, limit=limit
        )
    dispatch.counts[f"{phase} native"] += 1
    last = len(kind.matrices) - 1
    parts = [native.gather_qmv(pool, picks.offsets, m, x, picks.rows, kind.sign_in) for m in range(last)]
    each = np.arange(len(picks.rows), dtype=np.int32)
    return native.gather_qmv(pool, picks.offsets, last, kind.activate(parts), each, kind.sign_mid)


def _decode_numpy(pool: np.ndarray, picks: Picks, x: np.ndarray, kind: ExpertKind, record_bytes: int) -> np.ndarray:
    z = rotation.rotate(x, kind.sign_in)
    out = np.empty((len(picks.rows), kind.matrices[-1][1]), np.float32)
    for offset in np.unique(picks.offsets):
        mine = np.flatnonzero(picks.offsets == offset)
        record = pool[offset : offset + record_bytes]
        out[mine] = _expert(record, z[picks.rows[mine]], kind)
    return out


def expert_product(record: np.ndarray, z: np.ndarray, kind: ExpertKind, dispatch: Dispatch) -> np.ndarray:
    """One expert for its tokens: matrices are decoded a slice of rows at a time and multiplied by BLAS (affine and qmoe
    records with few tokens are multiplied as they are).

    Args:
        record: u8 (record_bytes,).
        z: float32 (tokens, padded d), as `expert_inputs` gives them.

    Returns:
        float32 (tokens, d).
    """
    if kind.packing:
        dispatch.counts["affine"] += 1
        return affine_product.expert(record, z, kind, DENSE_BYTES)
    if kind.coding is not None:
        dispatch.counts[f"qmoe {'native' if native.available() else 'numpy'}"] += 1
        return qmoe_product.expert(record, z, kind, DENSE_BYTES)
    dispatch.counts["prefill native" if native.available() else "prefill numpy"] += 1
    return _expert(record, z, kind)


def _expert(record: np.ndarray, z: np.ndarray, kind: ExpertKind) -> np.ndarray:
    last = len(kind.matrices) - 1
    parts = [_matrix_product(record, m, z, kind) for m in range(last)]
    hidden = rotation.rotate(kind.activate(parts), kind.sign_mid)
    return _matrix_product(record, last, hidden, kind)


def _matrix_product(record: np.ndarray, matrix: int, z: np.ndarray, kind: ExpertKind) -> np.ndarray:
    _, rows, _ = kind.matrices[matrix]
    out = np.empty((len(z), rows), np.float32)
    parsed = trellis.parse(record, kind.shapes, kind.bias, "record")
    if native.available():
        step = max(32, DENSE_BYTES // (4 * z.shape[1]) // 32 * 32)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            np.matmul(z, native.dequantize(record, matrix, start, stop).T, out=out[:, start:stop])
    else:
        np.matmul(z, trellis.decode_matrix(parsed.matrices[matrix], parsed.length)[:rows].T, out=out)
    bias = parsed.matrices[matrix].bias
    return out if bias is None else out + bias[:rows].astype(np.float32)


# ---- on a GPU


def on_gpu() -> bool:
    """Whether MLX computes on a GPU: then experts are computed by the kernels of kernels/*.metal."""
    return metal.available()


def gpu_name() -> str:
    """What the paths of kernels on this GPU are counted under."""
    return "cuda" if cuda.available() else "metal"


def gpu_records(pool: mx.array, base: int, record_bytes: int, slots: np.ndarray) -> metal.Records:
    """Where a layer's records lie in a pool.

    Args:
        pool: u8, whose slot 0 begins `base` bytes from its start.
        slots: int (experts,), the slot of each expert; those that are not resident may hold any slot.
    """
    units = slots.astype(np.int64) * (record_bytes // trellis.UNIT)
    return metal.Records(pool, mx.array(units.astype(np.uint32)), base)


def gpu_from_records(tokens: int, k: int, experts: int, kind: ExpertKind) -> bool:
    """Whether a GPU multiplies tokens straight from the records; else each expert is decoded first."""
    if kind.packing:
        return True
    return tokens <= DECODE_TOKENS or (tokens <= metal.MAX_TOKENS and metal.takes_records(tokens * k, experts))


def gpu_few(x: mx.array, indices: mx.array, records: metal.Records, kind: ExpertKind, dispatch: Dispatch) -> mx.array:
    """Straight from records: x (..., d) of 64 tokens at most (affine, qmoe: of any), indices (..., k) -> (..., k, d)
    in x's dtype, lazily.
    """
    if kind.packing:
        dispatch.counts[f"affine {gpu_name()}"] += 1
        return affine_product.gather(x, indices, records, kind)
    if kind.coding is not None:
        dispatch.counts[f"qmoe {gpu_name()}"] += 1
        return qmoe_product.gather(x, indices, records, kind)
    phase = "decode" if x.size // x.shape[-1] <= DECODE_TOKENS else "prefill"
    dispatch.counts[f"{phase} {gpu_name()}"] += 1
    return metal.experts(x, indices, records, kind.for_metal)


def gpu_many(
    z: mx.array,
    experts: np.ndarray,
    of: np.ndarray,
    rows: np.ndarray,
    records: metal.Records,
    kind: ExpertKind,
    dispatch: Dispatch,
    dtype: mx.Dtype | None = None,
) -> mx.array:
    """Prefill: picks of a group of experts, each decoded once.

    Args:
        z: (tokens, padded d), as `gpu_rotate` gives them.
        experts: int (n,), ascending.
        of, rows: int (picks,), the expert and the token of each pick, sorted by expert.
        dtype: the model's; z's where it is not given.

    Returns:
        (picks, d) of `dtype`, lazily.
    """
    if kind.packing:
        chosen = mx.array(of.astype(np.int32))[:, None]
        return gpu_few(z[mx.array(rows.astype(np.int32))], chosen, records, kind, dispatch)[:, 0]
    dispatch.counts[f"{'qmoe ' if kind.coding else ''}prefill {gpu_name()}"] += 1
    place = mx.array(np.searchsorted(experts, of).astype(np.uint32))
    ids, tokens = mx.array(experts.astype(np.uint32)), mx.array(rows.astype(np.int32))
    if kind.coding is not None:
        return qmoe_product.group(z, tokens, place, ids, records, kind)
    return metal.expert_group(z, tokens, place, ids, records, kind.for_metal, dtype)


def gpu_group_size(kind: ExpertKind) -> int:
    """How many experts are computed at once in prefill: one decoded matrix of each within GPU_DENSE_BYTES at 16 bits;
    those of affine are not decoded.
    """
    if kind.packing:
        return 1 << 30
    largest = max(rows * columns for rows, columns in kind.shapes)
    return max(1, GPU_DENSE_BYTES // (2 * largest))


def gpu_rotate(x: mx.array, kind: ExpertKind) -> mx.array:
    """The inputs of `gpu_many`: x (tokens, d) rotated where the codec rotates, then in float32 for float16."""
    if not kind.trellis:
        return x
    return metal.rotate(x, kind.for_metal.bits_in, metal.rotated_dtype(x.dtype))
