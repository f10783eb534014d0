"""Dense models whose decoder layers are coded records: a layer is expanded when it is called, and dropped after it.

As Tiny-QMoE (arXiv 2509.22951) runs its models: one layer at a time is in memory as it is computed with. The coded
records lie in the pool that experts lie in, all of them or as many as the budget allows.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from tiny_qmoe_mlx import coded_gpu, interrupts, ops
from tiny_qmoe_mlx.codecs import packed
from tiny_qmoe_mlx.codecs.affine import Packing
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.expert_kind import ExpertKind, expand
from tiny_qmoe_mlx.layers import Memory
from tiny_qmoe_mlx.spec import LayerSpec

ARRAYS = ("weight", "scales", "biases")  # that a module holds while its layer is expanded
ALWAYS = np.zeros((1, 1), np.int64)  # the one record of a layer, chosen


class Whole:
    """Mixed into a decoder layer, whose matrices have no arrays between its calls."""

    def prepare(self, index: int, kind: ExpertKind, modules: list[nn.Module]) -> None:
        """Say which layer of the container this is, and which modules its matrices belong to."""
        self._index, self._kind = index, kind
        self._parts = lambda: modules  # a list would be taken for the layer's own children

    def attach(self, memory: Memory) -> None:
        """Connect the layer with the memory that its record lies in."""
        self._memory = memory

    def __call__(self, x: mx.array, *more: Any, **options: Any) -> Any:
        interrupts.now()
        with self._memory.lock:  # one layer is expanded at a time, whoever generates
            try:
                self._fill(x.dtype)
                y = super().__call__(x, *more, **options)  # type: ignore[misc]
                mx.eval(y)
            finally:
                for module in self._parts():
                    empty(module)
        return y

    def _fill(self, dtype: mx.Dtype) -> None:
        memory, pool = self._memory, self._memory.cache.pool_of_layer[self._index]
        store, gpu = memory.cache.store, ops.on_gpu()
        spec = store.container.spec.layers[self._index]
        with memory.demand(self._index, ALWAYS, False) as demand:
            for _, (offset,) in demand:
                record = pool.data[offset : offset + spec.record_bytes]
                place = (pool.array, pool.base, int(offset)) if gpu else None
                expand_into(self._parts(), record, self._kind, spec.file, store.table, dtype, place)
        memory.dispatch.counts["layers expanded" + f" {ops.gpu_name()}" * gpu] += 1
        if not pool.resident and self._index + 1 < len(memory.cache.pool_of_layer):
            memory.cache.expect(self._index + 1, [0])


def expand_into(
    modules: list[nn.Module],
    record: np.ndarray,
    kind: ExpertKind,
    where: str,
    table: np.ndarray | None,
    dtype: mx.Dtype,
    place: tuple[mx.array, int, int] | None = None,
) -> None:
    """Give modules the arrays of a layer's record, copied: its slot may be read into again.

    Args:
        record: u8 (record_bytes,); where: the file that it is of; table: of 4-tuples, if the model has one.
        dtype: that the layer computes in.
        place: where a GPU finds the record: the pool, bytes before its first record, and those from there; None to
            expand on the CPU.

    Raises:
        FormatError: the record is damaged.
    """
    if place is not None:
        _expand_on_gpu(modules, record, kind, where, table, dtype, place)
        return
    for module, matrix in zip(modules, expand(record, kind, where, table), strict=True):
        if matrix.packing.mode == "levels":
            fill(module, {"weight": mx.array(packed.values(matrix)).astype(dtype)}, dtype)
            continue
        fill(module, {name: _typed(array, name, matrix.packing) for name, array in matrix.arrays.items()}, dtype)
        mx.eval([module[name] for name in matrix.arrays])


def _expand_on_gpu(
    modules: list[nn.Module],
    record: np.ndarray,
    kind: ExpertKind,
    where: str,
    table: np.ndarray | None,
    dtype: mx.Dtype,
    place: tuple[mx.array, int, int],
) -> None:
    found, faults = coded_gpu.expand(*place, record, kind, where, table)
    for module, arrays, own in zip(modules, found, kind.packing, strict=True):
        if own.mode == "levels":
            arrays = {"weight": coded_gpu.values(arrays, own.group_size).astype(dtype)}
        fill(module, arrays, dtype)
    mx.eval([module[name] for module in modules for name in ARRAYS if name in module], faults)
    coded_gpu.require_sound(faults, where)


def _typed(array: np.ndarray, name: str, packing: Packing) -> mx.array:
    """An array of a record with MLX's type."""
    kind = packing.scales if packing.mode == "plain" or name != "weight" else ""
    found = mx.array(array)
    return found.view(mx.bfloat16) if kind == "bfloat16" else found


def fill(module: nn.Module, arrays: dict[str, mx.array], dtype: mx.Dtype) -> None:
    """Give a matrix's module its arrays, lazily: what it computes in float32 is float32."""
    for name, array in arrays.items():
        floats = dtype == mx.float32 and mx.issubdtype(array.dtype, mx.floating)
        setattr(module, name, array.astype(mx.float32) if floats else array)


def empty(module: nn.Module) -> None:
    """Take a matrix's arrays out of its module; its bias stays."""
    for name in ARRAYS:
        module.pop(name, None)


def swap(model: nn.Module, index: int, layer: LayerSpec, kind: ExpertKind) -> None:
    """Make a decoder layer one that is expanded from its record, in place.

    Raises:
        FormatError: the config's matrices are not the layer's.
    """
    modules = dict(model.named_modules())
    decoder = modules.get(layer.path)
    parts = [
        emptied(modules.get(f"{layer.path}.{m[0]}"), m, p) for m, p in zip(layer.matrices, layer.packing, strict=True)
    ]
    if decoder is None or any(part is None for part in parts):
        raise FormatError(
            f"[config.json] {layer.path} should be a decoder layer with the matrices that tiny_qmoe names, linear "
            "layers of their shapes, and is not; convert the model again with this version."
        )
    decoder.update_modules(tree_unflatten([(m[0], part) for m, part in zip(layer.matrices, parts, strict=True)]))
    own = type(decoder)
    decoder.__class__ = type(own.__name__, (Whole, own), {})
    decoder.prepare(index, kind, parts)


def emptied(linear: Any, matrix: tuple[str, int, int], packing: Packing) -> nn.Module | None:
    """A linear layer without its arrays, of the kind that its packing computes with; None where it is none."""
    if type(linear) is not nn.Linear or linear.weight.shape != matrix[1:]:
        return None
    bias = linear.get("bias")
    if packing.mode not in ("levels", "plain"):
        linear = nn.QuantizedLinear(packing.group_size * 2, 1, False, packing.group_size, packing.bits, packing.mode)
        if bias is not None:
            linear.bias = bias
    empty(linear)
    return linear
