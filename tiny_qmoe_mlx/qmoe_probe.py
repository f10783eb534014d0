"""Layers of noise in qmoe records: what their products cost on this machine, and whether its GPU's are right."""

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import SwiGLU

from tiny_qmoe_mlx import metal, ops, qmoe_product
from tiny_qmoe_mlx.codecs import qmoe
from tiny_qmoe_mlx.expert_kind import ExpertKind

ZEROS = 0.885
CODINGS = (  # every size of codeword, both grids, both codes
    qmoe.Coding(qmoe.TERNARY, qmoe.DICTIONARY, 16),
    qmoe.Coding(qmoe.TERNARY, qmoe.TUNSTALL, 8),
    qmoe.Coding(qmoe.TWO_BIT, qmoe.TUNSTALL, 12),
)
DISTINCT = 3  # experts; coding takes longer than a probe may
SEED = 0


@dataclass(frozen=True)
class Layer:
    """Experts with random symbols: records u8 (experts, record_bytes), and what they have in common."""

    kind: ExpertKind
    records: np.ndarray

    @cached_property
    def on_gpu(self) -> metal.Records:
        """The same as a GPU's kernels take them."""
        table = np.arange(len(self.records)) * (self.records.shape[1] // qmoe.UNIT)
        return metal.Records(mx.array(self.records), mx.array(table.astype(np.uint32)))


def noise_layer(coding: qmoe.Coding, hidden: int, width: int, experts: int) -> Layer:
    """Experts of SwiGLU whose weights are zeros as often as QMoE found them to be; a few, again and again."""
    rng = np.random.default_rng(SEED)
    matrices = (("gate_proj", width, hidden), ("up_proj", width, hidden), ("down_proj", hidden, width))
    kind = ExpertKind(matrices, False, 0, 0, 0, SwiGLU(), coding=coding)
    records = [
        qmoe.pack([_noise(rng, coding, *shape) for shape in kind.shapes], coding) for _ in range(min(experts, DISTINCT))
    ]
    size = max(map(len, records))
    padded = np.stack([np.pad(record, (0, size - len(record))) for record in records])
    return Layer(kind, padded[np.arange(experts) % len(padded)])


def _noise(rng: np.random.Generator, coding: qmoe.Coding, rows: int, columns: int) -> qmoe.Matrix:
    other = rng.integers(1, coding.levels, (rows, columns))
    symbols = np.where(rng.random((rows, columns)) < ZEROS, 0, other).astype(np.uint8)
    values = rng.normal(size=(rows, coding.levels - 1)).astype(np.float32) * np.float32(columns**-0.5)
    return qmoe.encode(symbols, (values.view(np.uint32) >> 16).astype(np.uint16), coding)


def output(layer: Layer, x: mx.array, chosen: np.ndarray) -> mx.array:
    """Every chosen expert for its token, as the engine computes it: x (tokens, d), chosen (tokens, k) -> (tokens, k,
    d), on a GPU lazily.
    """
    if not ops.on_gpu():
        tokens, out = np.array(x.astype(mx.float32)), np.empty((*chosen.shape, x.shape[-1]), np.float32)
        for expert in np.unique(chosen):
            token, place = np.nonzero(chosen == expert)
            out[token, place] = qmoe_product.expert(layer.records[expert], tokens[token], layer.kind, ops.DENSE_BYTES)
        return mx.array(out)
    return qmoe_product.gather(x, mx.array(chosen.astype(np.uint32)), layer.on_gpu, layer.kind)


def error(coding: qmoe.Coding, dtype: mx.Dtype) -> float:
    """Largest error of a small layer's outputs, of the largest output, against the numpy specification in float64."""
    rng, layer = np.random.default_rng(SEED), noise_layer(coding, 80, 48, 3)
    x = mx.array(rng.normal(size=(2, 80)).astype(np.float32)).astype(dtype)
    chosen = np.array([[0, 2], [2, 1]])
    got = np.array(output(layer, x, chosen).astype(mx.float32)).astype(np.float64)
    want = np.empty_like(got)
    for (t, k), e in np.ndenumerate(chosen):
        gate, up, down = (qmoe.decode_matrix(m, coding).astype(np.float64) for m in _parsed(layer, int(e)))
        z = np.array(x[t].astype(mx.float32)).astype(np.float64)
        hidden = gate @ z
        want[t, k] = down @ (hidden / (1 + np.exp(-hidden)) * (up @ z))
    return float(np.abs(got - want).max() / np.abs(want).max())


def _parsed(layer: Layer, expert: int) -> list[qmoe.Matrix]:
    assert layer.kind.coding is not None
    return qmoe.parse(layer.records[expert], layer.kind.shapes, False, layer.kind.coding, f"noise {expert}")
