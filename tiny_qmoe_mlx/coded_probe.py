"""What expanding coded records costs on this machine: noise of a model's own shapes and packings, from headers alone.

Weights are Gaussian, so that their codes are spread as a model's are; of a layer at most MOST_WEIGHTS are timed, and
the time is scaled.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tiny_qmoe_mlx import ops, probes, whole
from tiny_qmoe_mlx.codecs import affine, levels, packed, tuples
from tiny_qmoe_mlx.codecs.affine import Packing
from tiny_qmoe_mlx.container import Container
from tiny_qmoe_mlx.expert_kind import ExpertKind, expand
from tiny_qmoe_mlx.layers import use_cpu_kernels
from tiny_qmoe_mlx.spec import LayerSpec

MOST_WEIGHTS = 1 << 22
SMALL_OPS = 24  # of a decoder layer beside its products, as in speed.py
SEED = 0


def layer_seconds(container: Container) -> float:
    """Seconds of one token through all of a dense model's coded decoder layers, every record in memory: each layer
    expanded, and its matrices times a vector.
    """
    layer = container.spec.layers[len(container.spec.layers) // 2]
    kind = _cut(layer)
    record = _record(kind, container)
    modules = [_module(*shape, own) for shape, own in zip(kind.shapes, kind.packing, strict=True)]
    dtype = mx.float16 if ops.on_gpu() else mx.float32
    place = (mx.array(record), 0, 0) if ops.on_gpu() else None
    inputs = {columns: mx.random.normal((1, 1, columns)).astype(dtype) for _, columns in kind.shapes}

    def one() -> None:
        whole.expand_into(modules, record, kind, "noise", None, dtype, place)
        outputs = [m(inputs[columns]) for m, (_, columns) in zip(modules, kind.shapes, strict=True)]
        small = next(iter(inputs.values()))
        for _ in range(SMALL_OPS):
            small = mx.fast.rms_norm(small, None, 1e-5)
        mx.eval(outputs, small)

    return probes.seconds(one, runs=7, warmup=2) * _weights(container) / sum(r * c for r, c in kind.shapes)


def record_seconds(container: Container) -> float:
    """Seconds of a weight's share of decoding an expert's coded record into the affine one that is computed with."""
    kind = _cut(container.spec.layers[len(container.spec.layers) // 2])
    record = _record(kind, container)
    size = affine.layout(tuple(kind.shapes), kind.packing)[1]

    def one() -> None:
        arrays = [matrix.arrays for matrix in expand(record, kind, "noise", None)]
        affine.pack(arrays, kind.shapes, kind.packing, size)

    return probes.seconds(one, runs=7, warmup=2) / sum(r * c for r, c in kind.shapes)


def _weights(container: Container) -> int:
    return sum(layer.weights for layer in container.spec.layers)


def _cut(layer: LayerSpec) -> ExpertKind:
    """A layer with as many rows of each matrix as keep it within MOST_WEIGHTS."""
    share = min(1.0, MOST_WEIGHTS / sum(rows * columns for rows, columns in layer.shapes))
    matrices = tuple((name, max(1, int(rows * share)), columns) for name, rows, columns in layer.matrices)
    return ExpertKind(matrices, layer.bias, 0, 0, 0, nn.Identity(), layer.packing, None, True)


def _record(kind: ExpertKind, container: Container) -> np.ndarray:
    """A record of noise, coded as the model's are. Tiny-QMoE's table makes hardly any model's codes smaller: with one,
    they lie as they are.
    """
    rng = np.random.default_rng(SEED)
    found = [_arrays(rng, *shape, own) for shape, own in zip(kind.shapes, kind.packing, strict=True)]
    return packed.pack(found, kind.shapes, kind.packing, "tuples" if tuples.FILE in container.files else "rans")


def _arrays(rng: np.random.Generator, rows: int, columns: int, own: Packing) -> dict[str, np.ndarray]:
    """The arrays of a matrix of Gaussian weights."""
    weight = rng.standard_normal((rows, columns), np.float32) * np.float32(columns**-0.5)
    if own.mode == "levels":
        return levels.quantize(weight, own.group_size)
    if own.mode == "plain":
        return {"weight": _bits(mx.array(weight), own.scales)}
    scaled = mx.array(weight).astype(getattr(mx, own.scales) if own.mode == "affine" else mx.bfloat16)
    parts = mx.quantize(scaled, own.group_size, own.bits, mode=own.mode)
    found = {name: _bits(a, str(a.dtype)[9:]) for name, a in zip(("weight", "scales", "biases"), parts, strict=False)}
    return found if own.bias is None else found | {"bias": np.zeros(rows, affine.storage(own.bias))}


def _bits(array: mx.array, dtype: str) -> np.ndarray:
    """An array as records hold it, bfloat16 as u16."""
    array = array.astype(getattr(mx, dtype))
    return np.array(array.view(mx.uint16) if dtype == "bfloat16" else array)


def _module(rows: int, columns: int, own: Packing) -> nn.Module:
    """The layer that multiplies with a matrix of these arrays."""
    module = whole.emptied(nn.Linear(columns, rows, bias=False), ("", rows, columns), own)
    assert module is not None
    use_cpu_kernels(nn.Sequential(module))
    return module
