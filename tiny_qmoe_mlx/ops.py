"""What a layer of experts computes, straight from compressed records: a fused product for a few tokens (decode), and a
product of many tokens with one decoded expert (prefill).

The rule of dispatch: the C++ library where it was built, numpy where it was not; each call is counted by the path it
took. Inputs and outputs are float32 numpy arrays; records are bytes that `check_record` has passed.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tiny_qmoe_mlx import native
from tiny_qmoe_mlx.codecs import rotation, trellis
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.spec import LayerSpec, ModelSpec

DECODE_TOKENS = 8  # up to so many tokens are multiplied straight from the records
DENSE_BYTES = 16 << 20  # of decoded weights held at once in prefill


@dataclass(frozen=True)
class ExpertKind:
    """What all experts of a layer have in common.

    matrices: (name, rows, columns) of gate, up, down, or fc1, fc2; length: L of the trellis; seed and layer: of the rotation's signs;
    activation: the module's own; called (up, gate), or (hidden) where there are two matrices.
    """

    matrices: tuple[tuple[str, int, int], ...]
    bias: bool
    length: int
    seed: int
    layer: int
    activation: nn.Module

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(rows, columns) for _, rows, columns in self.matrices]

    @cached_property
    def sign_in(self) -> np.ndarray:
        return rotation.signs(self.seed, self.layer, 0, self.matrices[0][2])

    @cached_property
    def sign_mid(self) -> np.ndarray:
        return rotation.signs(self.seed, self.layer, 1, self.matrices[-1][2])

    @cached_property
    def fused(self) -> tuple[str, float, float] | None:
        """The activation's name in the C++ library with its alpha and limit, or None: then the module's own is
        called.
        """
        return fused_activation(self.activation, len(self.matrices))

    def activate(self, parts: list[np.ndarray]) -> np.ndarray:
        """The module's own activation of [gate, up] or [fc1's output]."""
        arrays = [mx.array(p) for p in reversed(parts)]
        return np.array(self.activation(*arrays))


def expert_kind(layer: LayerSpec, spec: ModelSpec, activation: nn.Module) -> ExpertKind:
    """What a layer's experts have in common, from the container's words and the module's activation."""
    return ExpertKind(layer.matrices, layer.bias, spec.length, spec.seed, layer.layer, activation)


@dataclass
class Picks:
    """Which record serves which token: pick p multiplies token `rows[p]` with the record at byte `offsets[p]` of the
    pool.
    """

    offsets: np.ndarray
    rows: np.ndarray


@dataclass
class Dispatch:
    """Counts of the paths taken: fused, unfused and numpy decode, native and numpy prefill."""

    counts: Counter = field(default_factory=Counter)


def fused_activation(activation: nn.Module, matrices: int) -> tuple[str, float, float] | None:
    """(name, alpha, limit) of an activation that the C++ library fuses; matched by mlx-lm's classes, not by name."""
    from mlx_lm.models.switch_layers import SwiGLU

    try:
        from mlx_lm.models.activations import SwigluOAI
    except ImportError:  # before mlx-lm 0.32
        from mlx_lm.models.gpt_oss import SwiGLU as SwigluOAI

    if matrices == 3 and type(activation) is SwiGLU:
        return native.SILU, 0.0, 0.0
    if matrices == 3 and type(activation) is SwigluOAI:
        return native.SWIGLU_OAI, getattr(activation, "_alpha", 1.702), getattr(activation, "_limit", 7.0)
    return None


def check_record(data: np.ndarray, kind: ExpertKind, where: str) -> None:
    """Refuse a record that a kernel must not see.

    Raises:
        FormatError: naming `where` and what is wrong.
    """
    if native.available() and native.check_record(data, kind.shapes, kind.bias) and data[6] == kind.length:
        return
    trellis.parse(data, kind.shapes, kind.bias, where, kind.length)
    if native.available():
        raise FormatError(
            f"[{where}] the record is refused by the C++ library; run verify, then convert the model again."
        )


def decode_product(
    pool: np.ndarray, picks: Picks, x: np.ndarray, kind: ExpertKind, record_bytes: int, dispatch: Dispatch
) -> np.ndarray:
    """Whole experts for up to DECODE_TOKENS tokens.

    Args:
        pool: u8 (n,), the records' memory.
        picks: one entry per (token, chosen expert).
        x: float32 (tokens, d).

    Returns:
        float32 (picks, d): each pick's expert output, biases included, router weights not.
    """
    if not native.available():
        dispatch.counts["decode numpy"] += 1
        return _decode_numpy(pool, picks, x, kind, record_bytes)
    if kind.fused:
        dispatch.counts["decode native fused"] += 1
        name, alpha, limit = kind.fused
        return native.gather_moe(
            pool, picks.offsets, x, picks.rows, kind.sign_in, kind.sign_mid, name, alpha=alpha, limit=limit
        )
    dispatch.counts["decode native"] += 1
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
    """One expert for many tokens: its matrices are decoded a slice of rows at a time and multiplied by BLAS.

    Args:
        record: u8 (record_bytes,).
        z: float32 (tokens, padded d), rotated inputs.

    Returns:
        float32 (tokens, d).
    """
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
