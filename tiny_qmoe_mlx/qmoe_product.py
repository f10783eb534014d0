"""What a layer of experts computes from qmoe records: one expert at a time on the CPU, straight from the codewords for
a few tokens; on a GPU by kernels/qmoe_gather_qmv.metal, and for many tokens from matrices that
kernels/qmoe_dequantize.metal writes out.

Products of codewords visit no weight that is zero; a row with NaN or infinity gives NaN all the same, as in mlx-lm,
where zero times that is NaN.

Records are bytes that `check_record` has passed.
"""

import mlx.core as mx
import numpy as np

from tiny_qmoe_mlx import metal, metal_qmoe, native_qmoe
from tiny_qmoe_mlx.codecs import qmoe
from tiny_qmoe_mlx.expert_kind import ExpertKind

# up to so many tokens a product of codewords takes less time on the CPU than to write the weights out
NATIVE_TOKENS = 32


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
    coding = _coding(kind)
    matrices = qmoe.views(record, kind.shapes, kind.bias, coding, "record")
    parts = [_product(m, coding, x, dense_bytes) for m in matrices[:-1]]
    return _product(matrices[-1], coding, kind.activate(parts), dense_bytes)


def _coding(kind: ExpertKind) -> qmoe.Coding:
    assert kind.coding is not None
    return kind.coding


def _product(m: qmoe.Matrix, coding: qmoe.Coding, x: np.ndarray, dense_bytes: int) -> np.ndarray:
    """x (tokens, columns) float32 times a matrix, with its bias, (tokens, rows)."""
    if not native_qmoe.available():
        y = x @ qmoe.decode_matrix(m, coding).T
    elif len(x) <= NATIVE_TOKENS:
        step = native_qmoe.AT_ONCE
        y = np.concatenate([native_qmoe.qmv(m, coding, x[i : i + step]) for i in range(0, len(x), step)])
        y[~np.isfinite(x).all(axis=1)] = np.nan
    else:
        y = np.empty((len(x), m.rows), np.float32)
        step = max(1, dense_bytes // (4 * m.columns))
        for start in range(0, m.rows, step):
            stop = min(start + step, m.rows)
            np.matmul(x, native_qmoe.dequantize(m, coding, start, stop).T, out=y[:, start:stop])
    return y if m.bias is None else y + m.bias


# ---- on a GPU


def gather(x: mx.array, indices: mx.array, records: metal.Records, kind: ExpertKind) -> mx.array:
    """Chosen experts of every token: x (..., d), indices (..., k) -> (..., k, d) in x's dtype, lazily."""
    tokens, chosen = x.reshape(-1, x.shape[-1]), indices.reshape(-1, indices.shape[-1])
    parts = []
    for start in range(0, len(tokens), metal.MAX_TOKENS):
        part = slice(start, start + metal.MAX_TOKENS)
        parts.append(_few(tokens[part], chosen[part], records, kind))
    y = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    return y.reshape(*indices.shape, -1)


def _few(x: mx.array, indices: mx.array, records: metal.Records, kind: ExpertKind) -> mx.array:
    """The same for at most 64 tokens: x (tokens, d), indices (tokens, k) -> (picks, d)."""
    ids, count, coding = indices.reshape(-1), len(x), _coding(kind)

    def product(z: mx.array, matrix: int) -> mx.array:
        return metal_qmoe.gather_qmv(
            z, ids, records, metal_qmoe.Shapes(coding, kind.shapes[matrix], kind.bias), matrix, count
        )

    last = len(kind.matrices) - 1
    hidden = kind.activation(*(product(x, m) for m in reversed(range(last))))
    nothing = mx.repeat(mx.sum(x * 0, axis=-1, keepdims=True), indices.shape[-1], axis=0)  # 0, or NaN
    return product(hidden, last) + nothing


def group(
    z: mx.array, rows: mx.array, place: mx.array, ids: mx.array, records: metal.Records, kind: ExpertKind
) -> mx.array:
    """Prefill: the picks of a group of experts, each decoded once; arguments and result as of `metal.expert_group`."""
    last, coding = len(kind.matrices) - 1, _coding(kind)

    def product(x: mx.array, matrix: int) -> mx.array:
        layer = metal_qmoe.Shapes(coding, kind.shapes[matrix], kind.bias)
        weights, bias = metal_qmoe.dequantize(ids, records, layer, matrix, x.dtype)
        return metal.gathered(x, weights, bias if kind.bias else None, place)

    x = z[rows]
    hidden = kind.activation(*(product(x, m) for m in reversed(range(last))))
    return product(hidden, last)
