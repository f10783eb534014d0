"""A converted model that can be differentiated: experts as fixed decoded codes under gains that are parameters.

With U the decoded values of a matrix without its gains, y = row_gain * (U (block_gain * P x)), P the rotation. A
gradient for the gains then costs two products of the size of x and y, and none of the size of U.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tiny_qmoe_mlx import native
from tiny_qmoe_mlx.codecs import rotation, trellis
from tiny_qmoe_mlx.codecs.trellis import TILE_COLUMNS
from tiny_qmoe_mlx.expert_kind import ExpertKind

GROUPS = rotation.COLUMN_BLOCK // TILE_COLUMNS


@dataclass
class Decoded:
    """A matrix of one expert: values without gains float32 (rows, C), columns in the model's order; row_gain float32
    (rows,) or None; block_gain float32 (C / 16,) in the model's order; bias float32 (rows,) or None.
    """

    values: np.ndarray
    row_gain: np.ndarray | None
    block_gain: np.ndarray
    bias: np.ndarray | None


def decoded(data: np.ndarray, shapes: list[tuple[int, int]], bias: bool, where: str) -> list[Decoded]:
    """The matrices of an expert, out of its record's bytes, checked (read only; a copy is worked on).

    Raises:
        FormatError: the record is not what the shapes ask for.
    """
    data = data.copy()
    record = trellis.parse(data, shapes, bias, where)
    out = []
    for i, m in enumerate(record.matrices):
        row, biases = (None if a is None else a[: m.rows].astype(np.float32) for a in (m.row_gain, m.bias))
        block = in_model_order(m.block_gain, m.order).astype(np.float32)
        m.block_gain[:] = 1
        if m.row_gain is not None:
            m.row_gain[:] = 1
        native_rows = native.dequantize(data, i, 0, m.rows) if native.available() else None
        values = trellis.decode_matrix(m, record.length)[: m.rows] if native_rows is None else native_rows
        out.append(Decoded(values, row, block, biases))
    return out


def in_model_order(block_gain: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Gains (C / 16,) as stored, put in the order of the model's columns."""
    out = np.empty_like(block_gain).reshape(-1, GROUPS)
    out[order] = block_gain.reshape(-1, GROUPS)
    return out.reshape(-1)


def in_stored_order(block_gain: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The inverse of `in_model_order`."""
    return block_gain.reshape(-1, GROUPS)[order].reshape(-1)


def rotate(x: mx.array, sign: mx.array) -> mx.array:
    """rotation.rotate with a gradient: x (..., columns) -> (..., padded columns)."""
    padded = sign.shape[0]
    if x.shape[-1] < padded:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded - x.shape[-1])])
    size = rotation.hadamard_size(padded)
    return mx.hadamard_transform((x * sign).reshape(-1, size)).reshape(x.shape)


class GainedMatrix(nn.Module):
    """One matrix of all experts of a layer. Parameters: row_gain (E, rows) and block_gain (E, C / 16), float32."""

    def __init__(self, experts: list[Decoded]):
        super().__init__()
        rows = len(experts[0].values)
        ones = np.ones(rows, np.float32)
        self._values = [mx.array(e.values) for e in experts]
        self._bias = [None if e.bias is None else mx.array(e.bias) for e in experts]
        self._stored = mx.array([[float(e.row_gain is not None)] for e in experts])  # the rest has no gain to change
        self.row_gain = mx.array(np.stack([ones if e.row_gain is None else e.row_gain for e in experts]))
        self.block_gain = mx.array(np.stack([e.block_gain for e in experts]))

    def gains(self) -> list[tuple[mx.array, mx.array]]:
        """Per expert its row gains (rows,) and its columns' gains (C,)."""
        row = 1 + (self.row_gain - 1) * self._stored
        column = mx.repeat(self.block_gain, TILE_COLUMNS, axis=1)
        count = len(self._values)
        return [(r[0], c[0]) for r, c in zip(mx.split(row, count), mx.split(column, count), strict=True)]

    def product(self, expert: int, gain: tuple[mx.array, mx.array], z: mx.array) -> mx.array:
        """z float32 (n, C), rotated -> (n, rows)."""
        y = ((z * gain[1]) @ self._values[expert].T) * gain[0]
        bias = self._bias[expert]
        return y if bias is None else y + bias


class GainedExperts(nn.Module):
    """What stands for SwitchGLU or SwitchMLP while gains are trained: x (..., d), indices (..., k) -> (..., k, d).

    The choice of experts is evaluated on the way (it has no gradient), so that each expert multiplies its own tokens.
    """

    def __init__(self, kind: ExpertKind, experts: list[list[Decoded]]):
        """experts: per expert its matrices in the record's order."""
        super().__init__()
        self.matrices = [GainedMatrix(list(column)) for column in zip(*experts, strict=True)]
        self._activation = kind.activation
        self._sign_in, self._sign_mid = mx.array(kind.sign_in), mx.array(kind.sign_mid)

    def held(self) -> list[mx.array]:
        """All arrays of the layer, to be computed before what they come from is dropped."""
        return [a for m in self.matrices for a in [*m._values, *(b for b in m._bias if b is not None)]]

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        chosen = np.array(indices).reshape(-1)
        order = np.argsort(chosen, kind="stable")
        used, counts = np.unique(chosen, return_counts=True)
        z = rotate(x.reshape(-1, x.shape[-1]).astype(mx.float32), self._sign_in)
        z = z[mx.array(order // indices.shape[-1])]
        pieces = mx.split(z, np.cumsum(counts)[:-1].tolist())
        gains = [m.gains() for m in self.matrices]
        parts = [self._expert(int(e), [g[e] for g in gains], piece) for e, piece in zip(used, pieces, strict=True)]
        y = mx.concatenate(parts)[mx.array(np.argsort(order))]
        return y.reshape(*indices.shape, -1).astype(x.dtype)

    def _expert(self, expert: int, gains: list[tuple[mx.array, mx.array]], z: mx.array) -> mx.array:
        *first, down = self.matrices
        parts = [m.product(expert, gain, z) for m, gain in zip(first, gains[:-1], strict=True)]
        hidden = self._activation(*reversed(parts))
        return down.product(expert, gains[-1], rotate(hidden, self._sign_mid))
