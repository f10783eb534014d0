"""The layers that stand in a model for mlx-lm's own: experts computed from records, and dense layers fit for a CPU.

`TrellisExperts` replaces SwitchGLU or SwitchMLP and returns what they return: one row per (token, chosen expert). The
router, its weights and the sum over experts stay with the model's own block.
"""

import threading
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tiny_qmoe_mlx import native, ops
from tiny_qmoe_mlx.expert_cache import ExpertCache
from tiny_qmoe_mlx.expert_kind import ExpertKind
from tiny_qmoe_mlx.metal import Records


@dataclass
class Memory:
    """What all expert layers of a model compute from; the lock lets several threads use one model."""

    cache: ExpertCache
    dispatch: ops.Dispatch = field(default_factory=ops.Dispatch)
    lock: threading.Lock = field(default_factory=threading.Lock)
    in_flight: list[tuple[mx.array, int, list[int]]] = field(default_factory=list)

    def hold(self, y: mx.array, layer: int, experts: list[int]) -> None:
        """Keep experts pinned while a GPU may still read them for y."""
        self.in_flight.append((y, layer, experts))

    def settle(self) -> None:
        """Wait for what was held (by the time that a later layer asks, it is done) and give its pins back."""
        while self.in_flight:
            y, layer, experts = self.in_flight.pop()
            mx.eval(y)
            self.cache.release(layer, experts)


class TrellisExperts(nn.Module):
    """A layer of routed experts that lives in an ExpertCache; it has no parameters of its own."""

    def __init__(self, index: int, kind: ExpertKind):
        super().__init__()
        self._index = index
        self._kind = kind
        self._resident_records: Records | None = None

    def attach(self, memory: Memory) -> None:
        """Connect the layer with the memory it computes from."""
        self._memory = memory

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """x (..., d), indices int (..., k) -> (..., k, d) in x's dtype."""
        if ops.on_gpu():
            return self._on_gpu(x, indices)
        mx.eval(x, indices)  # the one host round trip of a layer: the CPU computes, and the disk needs the indices
        tokens = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        chosen = np.array(indices).astype(np.int64).reshape(len(tokens), -1)
        with self._memory.lock:
            self._memory.settle()
            straight = ops.from_records(len(tokens), self._kind)
            y = self._from_records(tokens, chosen) if straight else self._by_expert(tokens, chosen)
        return mx.array(y).reshape(*indices.shape, -1).astype(x.dtype)

    def _groups(self, chosen: np.ndarray, most: int = 1 << 30) -> list[np.ndarray]:
        """Distinct experts in file order, in groups that fit the pool at once, of at most `most`."""
        distinct = np.unique(chosen)
        size = min(most, self._memory.cache.pool_of_layer[self._index].slots)
        return [distinct[i : i + size] for i in range(0, len(distinct), size)]

    def _from_records(self, tokens: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """All picks of a group of experts in one product, straight from the records."""
        cache, pool = self._memory.cache, self._memory.cache.pool_of_layer[self._index]
        flat = chosen.reshape(-1)
        rows = np.repeat(np.arange(len(tokens), dtype=np.int32), chosen.shape[1])
        out = np.empty((len(flat), self._kind.matrices[-1][1]), np.float32)
        for group in self._groups(chosen):
            experts = group.tolist()
            offsets = cache.acquire(self._index, experts)
            mine = np.flatnonzero(np.isin(flat, group))
            picks = ops.Picks(offsets[np.searchsorted(group, flat[mine])], rows[mine])
            out[mine] = ops.decode_product(
                pool.data, picks, tokens, self._kind, pool.record_bytes, self._memory.dispatch
            )
            cache.release(self._index, experts)
        return out

    def _by_expert(self, tokens: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Expert by expert in file order, each decoded once and multiplied with all its tokens."""
        cache, pool = self._memory.cache, self._memory.cache.pool_of_layer[self._index]
        z = ops.expert_inputs(tokens, self._kind)
        out = np.empty((*chosen.shape, self._kind.matrices[-1][1]), np.float32)
        for group in self._groups(chosen):
            experts = group.tolist()
            offsets = cache.acquire(self._index, experts)
            for expert, offset in zip(experts, offsets, strict=True):
                token, place = np.nonzero(chosen == expert)
                record = pool.data[offset : offset + pool.record_bytes]
                out[token, place] = ops.expert_product(record, z[token], self._kind, self._memory.dispatch)
            cache.release(self._index, experts)
        return out

    def _on_gpu(self, x: mx.array, indices: mx.array) -> mx.array:
        memory, pool = self._memory, self._memory.cache.pool_of_layer[self._index]
        experts, tokens = memory.cache.experts_of(self._index), x.size // x.shape[-1]
        few = ops.gpu_from_records(tokens, indices.shape[-1], experts, self._kind)
        with memory.lock:
            if few and pool.resident:
                return ops.gpu_few(x, indices, self._records(), self._kind, memory.dispatch)
            mx.eval(indices)  # the one host round trip of a layer that is not resident
            memory.settle()
            distinct = np.unique(np.array(indices))
            if few and len(distinct) <= pool.slots:
                chosen = distinct.tolist()
                memory.cache.acquire(self._index, chosen)
                y = ops.gpu_few(x, indices, self._records(), self._kind, memory.dispatch)
                memory.hold(y, self._index, chosen)
                return y
            return self._grouped_on_gpu(x, np.array(indices))

    def _records(self) -> Records:
        cache, pool = self._memory.cache, self._memory.cache.pool_of_layer[self._index]
        if self._resident_records is None or not pool.resident:
            slots = cache.slots(self._index)
            self._resident_records = ops.gpu_records(pool.array, pool.base, pool.record_bytes, slots)
        return self._resident_records

    def _grouped_on_gpu(self, x: mx.array, indices: np.ndarray) -> mx.array:
        """Prefill, or more experts than slots: group by group in file order, each expert read and decoded once."""
        memory = self._memory
        chosen = indices.reshape(-1, indices.shape[-1]).astype(np.int64)
        flat = chosen.reshape(-1)
        order = np.argsort(flat, kind="stable")
        z = ops.gpu_rotate(x.reshape(len(chosen), -1), self._kind)
        parts = []
        for group in self._groups(chosen, ops.gpu_group_size(self._kind)):
            experts, picks = group.tolist(), order[np.isin(flat[order], group)]
            memory.cache.acquire(self._index, experts)
            records, rows = self._records(), picks // chosen.shape[1]
            y = ops.gpu_many(z, group, flat[picks], rows, records, self._kind, memory.dispatch)
            mx.eval(y)
            memory.cache.release(self._index, experts)
            parts.append(y)
        y = mx.concatenate(parts)[mx.array(np.argsort(order).astype(np.int32))]
        return y.reshape(*indices.shape, -1)


class CpuQuantizedLinear(nn.QuantizedLinear):
    """MLX's quantized layer on its CPU backend, where its own product runs at 3 GFLOP/s. A few tokens are multiplied by
    our C++
    kernel, now; for many the weight is dequantized and multiplied by BLAS, lazily. The values are the same."""

    def __call__(self, x: mx.array) -> mx.array:
        y = _product(self, x)
        if y is None:
            return super().__call__(x)
        return y + self["bias"] if "bias" in self else y


class CpuQuantizedEmbedding(nn.QuantizedEmbedding):
    """The same for an embedding that serves as the output layer."""

    def as_linear(self, x: mx.array) -> mx.array:
        y = _product(self, x)
        return super().as_linear(x) if y is None else y


def _product(module: nn.Module, x: mx.array) -> mx.array | None:
    """x (..., columns) times the module's matrix, (..., rows), or None where neither way serves."""
    if x.dtype != mx.float32 or module.mode != "affine":
        return None
    if x.size // x.shape[-1] > ops.DECODE_TOKENS:
        parts = (module["weight"], module["scales"], module["biases"], module.group_size, module.bits)
        return x @ mx.dequantize(*parts).T
    if (
        not native.available()
        or module.bits not in (4, 8)
        or module.group_size != 64
        or module["scales"].dtype != mx.float32
    ):
        return None
    mx.eval(x)
    weight, scales, biases = (np.asarray(module[name]) for name in ("weight", "scales", "biases"))
    y = native.affine_qmv(weight, scales, biases, module.bits, np.asarray(x).reshape(-1, x.shape[-1]))
    return mx.array(y).reshape(*x.shape[:-1], -1)


def use_cpu_kernels(model: nn.Module) -> None:
    """On the CPU backend, give the model's quantized layers the products above; in place, the weights stay."""
    if mx.default_device() != mx.cpu:
        return
    for module in model.modules():
        if type(module) is nn.QuantizedLinear:
            module.__class__ = CpuQuantizedLinear
        elif type(module) is nn.QuantizedEmbedding:
            module.__class__ = CpuQuantizedEmbedding
