"""What a layer of experts computes from affine records: one expert at a time on the CPU; on a GPU by MLX's own
`gather_qmm`, whose weights are views of the pool, so that nothing is copied.

Records are bytes that `check_record` has passed.
"""

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from tiny_qmoe_mlx import native
from tiny_qmoe_mlx.codecs import affine
from tiny_qmoe_mlx.expert_kind import ExpertKind
from tiny_qmoe_mlx.metal import Records

# up to so many tokens a product of codes takes less time on the CPU than to write the weights out (2048 x 768, 4 bits)
NATIVE_TOKENS, MLX_TOKENS = 128, 8
NATIVE_AT_ONCE, NATIVE_BITS, NATIVE_GROUP = 8, (4, 8), 64  # what the C++ library takes
SORTED_PICKS = 64  # from so many on, picks of one expert are brought together, as mlx-lm does


# ---- on the CPU


def expert(record: np.ndarray, x: np.ndarray, kind: ExpertKind, dense_bytes: int) -> np.ndarray:
    """One expert for its tokens.

    Args:
        record: u8 (record_bytes,).
        x: float32 (tokens, d).
        kind: of the layer.
        dense_bytes: of float32 weights that are written out at once, where there are many tokens.

    Returns:
        float32 (tokens, d).
    """
    places, _ = affine.layout(tuple(kind.shapes), kind.packing)
    matrices = [affine.views(record, parts) for parts in places]
    parts = [_product(a, p, x, dense_bytes) for a, p in zip(matrices[:-1], kind.packing, strict=False)]
    return _product(matrices[-1], kind.packing[-1], kind.activate(parts), dense_bytes)


def _product(arrays: dict[str, np.ndarray], packing: affine.Packing, x: np.ndarray, dense_bytes: int) -> np.ndarray:
    """x (tokens, columns) float32 times a matrix, with its bias, (tokens, rows)."""
    fits = packing.mode == "affine" and packing.bits in NATIVE_BITS and packing.group_size == NATIVE_GROUP
    if fits and len(x) <= NATIVE_TOKENS and native.available():
        y = _native(arrays, packing, x)
    elif len(x) <= MLX_TOKENS:
        y = np.array(mx.quantized_matmul(mx.array(x), *_mlx(arrays, packing, slice(None)), True, *_words(packing)))
    else:
        y = np.empty((len(x), len(arrays["weight"])), np.float32)
        step = max(1, dense_bytes // (4 * x.shape[1]))
        for start in range(0, y.shape[1], step):
            rows = slice(start, start + step)
            np.matmul(x, _dense(arrays, packing, rows).T, out=y[:, rows])
    return y + affine.floats(arrays["bias"], packing.bias) if packing.bias else y


def _native(arrays: dict[str, np.ndarray], packing: affine.Packing, x: np.ndarray) -> np.ndarray:
    scales, biases = (affine.floats(arrays[n], packing.scales) for n in ("scales", "biases"))
    parts = (x[i : i + NATIVE_AT_ONCE] for i in range(0, len(x), NATIVE_AT_ONCE))
    return np.concatenate([native.affine_qmv(arrays["weight"], scales, biases, packing.bits, part) for part in parts])


def _dense(arrays: dict[str, np.ndarray], packing: affine.Packing, rows: slice) -> np.ndarray:
    """Rows of a matrix, float32. Of 4-bit codes a byte is looked up at once, which takes half to a third of MLX's time
    on the CPU and gives the same values.
    """
    if packing.bits != 4:
        return np.asarray(mx.dequantize(*_mlx(arrays, packing, rows), *_words(packing), dtype=mx.float32))
    codes = arrays["weight"][rows].view(np.uint8)
    groups = np.take(_pairs(packing.mode), codes, axis=0).reshape(len(codes), -1, packing.group_size)
    groups *= affine.scales(arrays["scales"][rows], packing)[..., None]
    if packing.mode == "affine":
        groups += affine.floats(arrays["biases"][rows], packing.scales)[..., None]
    return groups.reshape(len(codes), -1)


@cache
def _pairs(mode: str) -> np.ndarray:
    """The two numbers in each byte of 4-bit codes, float32 (256, 2)."""
    code = np.arange(256, dtype=np.uint8)
    return affine.numbers(np.stack([code & 15, code >> 4], 1), mode).astype(np.float32)


def _mlx(arrays: dict[str, np.ndarray], packing: affine.Packing, rows: slice) -> tuple[mx.array, mx.array, Any]:
    """Rows of a matrix as MLX's functions take them: weight, scales, biases; float32 where they are floats."""
    weight = mx.array(arrays["weight"][rows])
    if packing.mode != "affine":
        return weight, mx.array(arrays["scales"][rows]), None
    scales, biases = (mx.array(affine.floats(arrays[n][rows], packing.scales)) for n in ("scales", "biases"))
    return weight, scales, biases


def _words(packing: affine.Packing) -> tuple[int, int, str]:
    return packing.group_size, packing.bits, packing.mode


# ---- on a GPU


def gather(x: mx.array, indices: mx.array, records: Records, kind: ExpertKind) -> mx.array:
    """Chosen experts of every token: x (..., d), indices (..., k) -> (..., k, d) in x's dtype, lazily."""
    record_bytes = records.pool.shape[-1]
    slots = (records.table // (record_bytes // affine.UNIT))[indices].reshape(-1)
    rows = mx.arange(slots.size, dtype=mx.uint32) // indices.shape[-1]
    order = mx.argsort(slots) if slots.size >= SORTED_PICKS else None
    if order is not None:
        slots, rows = slots[order], rows[order]
    z = x.reshape(-1, 1, x.shape[-1])[rows]
    matrices = [_pool_views(records, parts) for parts in affine.layout(tuple(kind.shapes), kind.packing)[0]]

    def product(z: mx.array, m: int) -> mx.array:
        arrays, own = matrices[m], kind.packing[m]
        if own.mode == "affine" and z.dtype != mx.float32:
            z = z.astype(arrays["scales"].dtype)  # MLX would otherwise convert the scales, of the whole pool
        parts = (arrays["weight"], arrays["scales"], arrays.get("biases"), None, slots, True, *_words(own))
        y = mx.gather_qmm(z, *parts, sorted_indices=order is not None)
        return y + arrays["bias"][slots][:, None] if own.bias else y

    last = len(kind.matrices) - 1
    hidden = kind.activation(*(product(z, m) for m in reversed(range(last))))
    y = product(hidden, last)[:, 0]
    if order is not None:
        y = y[mx.argsort(order)]
    return y.reshape(*indices.shape, -1).astype(x.dtype)


def _pool_views(records: Records, parts: list[affine.Part]) -> dict[str, mx.array]:
    """One matrix's arrays of all slots, (slots, ...), sharing the pool's memory."""
    pool, record_bytes = records.pool, records.pool.shape[-1]
    slots = (pool.size - records.base) // record_bytes
    out = {}
    for part in parts:
        kind = getattr(mx, part.dtype)
        strides = [record_bytes // kind.size, *(int(np.prod(part.shape[i:])) for i in range(1, len(part.shape) + 1))]
        offset = (records.base + part.offset) // kind.size
        out[part.name] = mx.as_strided(pool.view(kind), (slots, *part.shape), strides, offset)
    return out
