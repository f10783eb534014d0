"""Layers of random experts for tests of the Metal kernels, with a float64 reference that shares no code with them.

The reference multiplies matrices that `codecs.trellis.decode_matrix` has decoded; rotations and activations are float64
numpy too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from records import random_record, record_size

from tiny_qmoe_mlx import metal
from tiny_qmoe_mlx.codecs import rotation, trellis

# Of max |y|: rounding of the result (half 2^-11, bfloat16 2^-8 of a value), and of inputs where they are converted.
TOLERANCE = {mx.float16: 1e-3, mx.bfloat16: 8e-3, mx.float32: 1e-5}
ALPHA, LIMIT = 1.702, 7.0


def logistic(v: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-v))


def activation64(name: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """The fused activations in float64, from their published forms."""
    if name == "silu":
        return gate * logistic(gate) * up
    if name == "gelu_tanh":
        return gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    if name == "swiglu_oai":
        gate = np.minimum(gate, LIMIT)
        return gate * logistic(ALPHA * gate) * (np.clip(up, -LIMIT, LIMIT) + 1)
    assert name == "relu2", name
    return np.maximum(gate, 0) ** 2


def module_of(name: str) -> Callable[..., mx.array]:
    """The same activation as MLX operations, called like mlx-lm's modules: (up, gate) or (hidden)."""
    return {
        "silu": lambda up, gate: nn.silu(gate) * up,
        "gelu_tanh": lambda up, gate: nn.gelu_approx(gate) * up,
        "swiglu_oai": lambda up, gate: (
            (g := mx.minimum(gate, LIMIT)) * mx.sigmoid(ALPHA * g) * (mx.clip(up, -LIMIT, LIMIT) + 1)
        ),
        "relu2": lambda hidden: mx.square(nn.relu(hidden)),
    }[name]


@dataclass
class Case:
    """A layer: `records[e]` is what expert e decodes to; the pool holds them shuffled, `base` bytes from its start."""

    layer: metal.ExpertShapes
    records: list[trellis.Record]
    pool: np.ndarray
    table: np.ndarray
    base: int
    name: str
    dense: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def run(self, emulate: Callable, fn: Callable[[metal.Records], Callable], *arrays, **options):
        """Emulate fn(records)(*arrays) with pool and table as arguments of the trace; the result and the report."""

        def traced(pool, table, *rest):
            return fn(metal.Records(pool, table, self.base))(*rest)

        return emulate(traced, self.pool, mx.array(self.table), *arrays, **options)

    def matrix(self, expert: int, m: int) -> np.ndarray:
        """Q of an expert's matrix, float64 (rows, C)."""
        if (expert, m) not in self.dense:
            matrix = self.records[expert].matrices[m]
            q = trellis.decode_matrix(matrix, self.records[expert].length)[: matrix.rows]
            self.dense[expert, m] = q.astype(np.float64)
        return self.dense[expert, m]

    def product(self, expert: int, m: int, z: np.ndarray) -> np.ndarray:
        """float64 (rows,), bias included."""
        bias = self.records[expert].matrices[m].bias
        y = self.matrix(expert, m) @ z.astype(np.float64)
        return y if bias is None else y + bias[: len(y)].astype(np.float64)

    def hidden(self, expert: int, z: np.ndarray) -> np.ndarray:
        """Gate, up and activation of one rotated row."""
        gate = self.product(expert, 0, z)
        return activation64(self.name, gate, gate if self.name == "relu2" else self.product(expert, 1, z))

    def expert(self, expert: int, x: np.ndarray) -> np.ndarray:
        """A whole expert on one row."""
        h = self.hidden(expert, rotation.rotate(x.astype(np.float64), self.layer.sign_in))
        return self.product(expert, len(self.layer.shapes) - 1, rotation.rotate(h, self.layer.sign_mid))


def make_case(
    rng: np.random.Generator,
    d: int,
    middle: int,
    experts: int = 5,
    name: str = "silu",
    bias: bool = False,
    length: int = 16,
    rates: Sequence[int] | None = None,
    fused: bool = True,
    distinct: int | None = None,
    base: int = 0,
    row_gain: Sequence[bool] = (True, True, True),
) -> Case:
    """A layer of `experts` experts, `distinct` of them with own records; rates: one for each block, repeated."""
    shapes = ((middle, d),) * (1 if name == "relu2" else 2) + ((d, middle),)
    own = [record(rng, shapes, bias, length, rates, row_gain) for _ in range(distinct or experts)]
    size = max(map(record_size, own))
    slots = rng.permutation(len(own))
    pool = np.zeros(base + size * len(own), np.uint8)
    for r, slot in zip(own, slots, strict=True):
        pool[base + slot * size : base + (slot + 1) * size] = trellis.pack(r, size)
    of = np.arange(experts) % len(own)
    layer = metal.ExpertShapes(
        shapes=shapes,
        bias=bias,
        length=length,
        sign_in=rotation.signs(7, 3, 0, d),
        sign_mid=rotation.signs(7, 3, 1, middle),
        activation=module_of(name),
        fused=(name, ALPHA, LIMIT) if fused else None,
    )
    table = (slots[of] * (size // trellis.UNIT)).astype(np.uint32)
    return Case(layer, [own[i] for i in of], pool, table, base, name)


def record(rng, shapes, bias, length, rates, row_gain) -> trellis.Record:
    """A record of noise; gains are scaled so that activations neither vanish nor explode."""
    out = random_record(rng, shapes, bias, length)
    for m, has_gain in zip(out.matrices, row_gain, strict=False):
        m.row_gain = m.row_gain if has_gain else None
        if rates is not None:
            m.rates[:] = np.resize(rates, len(m.rates))
            words = 32 * int(trellis.PLANES[m.rates].sum())
            m.payload = rng.integers(0, 2**32, (len(m.payload), words), np.uint32)
        m.block_gain[:] = m.block_gain / np.float16(m.columns**0.5)
    return out


def tokens(rng: np.random.Generator, count: int, columns: int, dtype: mx.Dtype) -> mx.array:
    """Random rows (count, columns)."""
    return mx.array(rng.normal(size=(count, columns)).astype(np.float32)).astype(dtype)


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def assert_close(got: mx.array, want: np.ndarray, tolerance: float) -> None:
    """The largest error is at most tolerance * max |want|; else says where and how much."""
    found = float64(got)
    assert found.shape == want.shape, (found.shape, want.shape)
    error = np.abs(found - want)
    at = np.unravel_index(np.nanargmax(error) if not np.isnan(error).all() else 0, error.shape)
    scale = np.abs(want).max()
    assert np.isfinite(found).all() and error.max() <= tolerance * scale, (
        f"error {error[at]:.3g} at {at}: {found[at]} for {want[at]}; allowed {tolerance} of max |y| = {scale:.3g}"
    )
