"""The layers that stand in a model for mlx-lm's own: experts computed from records, and dense layers fit for a CPU.

`RecordExperts` replaces SwitchGLU or SwitchMLP and returns what they return: one row per (token, chosen expert). The
router, its weights and the sum over experts stay with the model's own block.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tiny_qmoe_mlx import interrupts, lookahead, metal, native, ops
from tiny_qmoe_mlx.expert_kind import ExpertKind
from tiny_qmoe_mlx.metal import Records
from tiny_qmoe_mlx.streaming.cache import ExpertCache
from tiny_qmoe_mlx.streaming.demand import Demand
from tiny_qmoe_mlx.streaming.trace import TraceWriter


@dataclass
class Memory:
    """What all expert layers of a model compute from.

    lock: of the GPU's side, where a product holds its experts until it has been evaluated; the CPU's needs none.
    noting: of trace and calls, which several threads may write.
    around: of each layer, what it may start while records load; empty where that was not looked for.
    """

    cache: ExpertCache
    dispatch: ops.Dispatch = field(default_factory=ops.Dispatch)
    lock: threading.RLock = field(default_factory=threading.RLock)
    in_flight: list[tuple[mx.array, int, list[int]]] = field(default_factory=list)
    around: list[lookahead.Around] = field(default_factory=list)
    judge: lookahead.Judge = field(default_factory=lookahead.Judge)
    noting: threading.Lock = field(default_factory=threading.Lock)
    trace: TraceWriter | None = None
    calls: int = 0

    def hold(self, y: mx.array, layer: int, experts: list[int]) -> None:
        """Keep experts pinned while a GPU may still read them for y."""
        self.in_flight.append((y, layer, experts))

    def settle(self) -> None:
        """Wait for what was held (by the time that a later layer asks, it is done) and give its pins back."""
        while self.in_flight:
            y, layer, experts = self.in_flight.pop()
            try:
                mx.eval(y)
            finally:
                self.cache.unpin(layer, experts)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Around a call of the model. A GPU that streams serves one thread at a time, and a call waits at its end for
        what it holds: in another thread MLX could not."""
        if not ops.on_gpu() or all(pool.resident for pool in self.cache.pools.values()):
            yield
            return
        with self.lock:
            try:
                yield
            finally:
                self.settle()

    def demand(self, layer: int, chosen: np.ndarray, cold: bool) -> Demand:
        """Ask for the experts that a call of a layer chose, int (tokens, k), and write them down."""
        with self.noting:
            self.calls += 1
            if self.trace is not None:
                self.trace.write(layer, chosen, cold)
        return Demand(self.cache, layer, np.unique(chosen).tolist(), cold)

    def guess(self, layer: int, x: mx.array) -> mx.array | None:
        """Experts that the next layer may choose, lazily, where looking ahead is worth it."""
        block = self.around[layer].next_block if self.around else None
        tokens = x.size // x.shape[-1]
        if block is None or tokens > ops.DECODE_TOKENS or self.cache.pool_of_layer[layer + 1].resident:
            return None
        cache = self.cache
        counted = cache.lookahead_reads, cache.lookahead_used, cache.disk_busy_s, cache.io_wait_s
        if not self.judge.wants(*counted, time.perf_counter()):
            return None
        return lookahead.guess(block, x)

    def expect(self, layer: int, guessed: mx.array | None) -> None:
        """Read the guessed experts of a layer when the disk has time."""
        if guessed is None:
            return
        self.cache.expect(layer, np.unique(np.array(guessed)).tolist())

    def start_shared(self, layer: int, x: mx.array, demand: Demand) -> None:
        """Compute the block's shared expert while records load."""
        shared = self.around[layer].shared if self.around else None
        if shared is not None and demand.waits:
            lookahead.start(shared, x)


class RecordExperts(nn.Module):
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
        interrupts.now()
        if lookahead.probing():
            return lookahead.record(x, indices)
        return self._on_gpu(x, indices) if ops.on_gpu() else self._on_cpu(x, indices)

    def _on_cpu(self, x: mx.array, indices: mx.array) -> mx.array:
        memory = self._memory
        resident = memory.cache.pool_of_layer[self._index].resident
        guessed = None if resident else memory.guess(self._index, x)
        mx.eval(x, indices, [] if guessed is None else guessed)  # the layer's one host round trip
        tokens = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        chosen = np.array(indices).astype(np.int64).reshape(len(tokens), -1)
        memory.settle()  # of a GPU that computed before
        with memory.demand(self._index, chosen, len(tokens) > ops.DECODE_TOKENS) as demand:
            memory.expect(self._index + 1, guessed)
            memory.start_shared(self._index, x, demand)
            straight = ops.from_records(len(tokens), self._kind)
            y = (self._from_records if straight else self._by_expert)(tokens, chosen, demand)
        return mx.array(y).reshape(*indices.shape, -1).astype(x.dtype)

    def _from_records(self, tokens: np.ndarray, chosen: np.ndarray, demand: Demand) -> np.ndarray:
        """Picks straight from the records, those of a group of experts in one product, as they come into memory."""
        pool, dispatch = self._memory.cache.pool_of_layer[self._index], self._memory.dispatch
        flat = chosen.reshape(-1)
        rows = np.repeat(np.arange(len(tokens), dtype=np.int32), chosen.shape[1])
        out = np.empty((len(flat), self._kind.matrices[-1][1]), np.float32)
        for experts, offsets in demand:
            order = np.argsort(experts)
            group = np.array(experts)[order]
            mine = np.flatnonzero(np.isin(flat, group))
            picks = ops.Picks(offsets[order][np.searchsorted(group, flat[mine])], rows[mine])
            out[mine] = ops.decode_product(pool.data, picks, tokens, self._kind, pool.record_bytes, dispatch)
            demand.release(experts)
        return out

    def _by_expert(self, tokens: np.ndarray, chosen: np.ndarray, demand: Demand) -> np.ndarray:
        """Expert by expert, each decoded once and multiplied with all its tokens."""
        pool = self._memory.cache.pool_of_layer[self._index]
        z = ops.expert_inputs(tokens, self._kind)
        out = np.empty((*chosen.shape, self._kind.matrices[-1][1]), np.float32)
        for experts, offsets in demand:
            for expert, offset in zip(experts, offsets, strict=True):
                token, place = np.nonzero(chosen == expert)
                record = pool.data[offset : offset + pool.record_bytes]
                out[token, place] = ops.expert_product(record, z[token], self._kind, self._memory.dispatch)
            demand.release(experts)
        return out

    def _on_gpu(self, x: mx.array, indices: mx.array) -> mx.array:
        memory, pool = self._memory, self._memory.cache.pool_of_layer[self._index]
        experts, tokens = memory.cache.experts_of(self._index), x.size // x.shape[-1]
        few = ops.gpu_from_records(tokens, indices.shape[-1], experts, self._kind)
        with memory.lock:
            if few and pool.resident:
                return ops.gpu_few(x, indices, self._records(), self._kind, memory.dispatch)
            guessed = None if pool.resident else memory.guess(self._index, x)
            mx.eval(indices, [] if guessed is None else guessed)  # the one host round trip of a streamed layer
            memory.settle()
            chosen = np.array(indices).astype(np.int64).reshape(tokens, -1)
            few = few and memory.cache.reserve(self._index, len(np.unique(chosen)))
            with memory.demand(self._index, chosen, not few) as demand:
                memory.expect(self._index + 1, guessed)
                memory.start_shared(self._index, x, demand)
                if not few:
                    return self._grouped_on_gpu(x, chosen, demand).reshape(*indices.shape, -1)
                y = self._few_on_gpu(x, indices, chosen, demand)
                memory.hold(y, self._index, demand.keep())
                return y

    def _few_on_gpu(self, x: mx.array, indices: mx.array, chosen: np.ndarray, demand: Demand) -> mx.array:
        """Experts in memory first, where some are not; the others when all have come."""
        groups = (experts for experts, _ in demand)
        first = next(groups)
        if not demand.waits or chosen.size > metal.MAX_TOKENS:
            for _ in groups:
                pass
            return ops.gpu_few(x, indices, self._records(), self._kind, self._memory.dispatch)
        flat, z = chosen.reshape(-1), x.reshape(len(chosen), -1)
        mine = np.flatnonzero(np.isin(flat, first))
        now = self._picks_on_gpu(z, flat, mine, chosen.shape[1])
        mx.async_eval(now)
        for _ in groups:
            pass
        others = np.flatnonzero(~np.isin(flat, first))
        y = mx.concatenate([now, self._picks_on_gpu(z, flat, others, chosen.shape[1])])
        back = np.argsort(np.concatenate([mine, others])).astype(np.int32)
        return y[mx.array(back)].reshape(*indices.shape, -1)

    def _picks_on_gpu(self, z: mx.array, flat: np.ndarray, mine: np.ndarray, k: int) -> mx.array:
        rows, experts = mx.array((mine // k).astype(np.int32)), mx.array(flat[mine].astype(np.int32))
        return ops.gpu_few(z[rows], experts[:, None], self._records(), self._kind, self._memory.dispatch)[:, 0]

    def _records(self) -> Records:
        cache, pool = self._memory.cache, self._memory.cache.pool_of_layer[self._index]
        if self._resident_records is None or not pool.resident:
            slots = cache.slots(self._index)
            self._resident_records = ops.gpu_records(pool.array, pool.base, pool.record_bytes, slots)
        return self._resident_records

    def _grouped_on_gpu(self, x: mx.array, chosen: np.ndarray, demand: Demand) -> mx.array:
        """Prefill, or more experts than slots: group by group as they come, each expert read and decoded once."""
        flat = chosen.reshape(-1)
        z, most = ops.gpu_rotate(x.reshape(len(chosen), -1), self._kind), ops.gpu_group_size(self._kind)
        parts, places = [], []
        for experts, _ in demand:
            for i in range(0, len(experts), most):
                group = np.sort(experts[i : i + most])
                picks = np.flatnonzero(np.isin(flat, group))
                picks = picks[np.argsort(flat[picks], kind="stable")]
                rows, records = picks // chosen.shape[1], self._records()
                y = ops.gpu_many(z, group, flat[picks], rows, records, self._kind, self._memory.dispatch, x.dtype)
                mx.eval(y)
                parts.append(y)
                places.append(picks)
            demand.release(experts)
        return mx.concatenate(parts)[mx.array(np.argsort(np.concatenate(places)).astype(np.int32))]


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
    if x.dtype != mx.float32 or module.mode != "affine" or lookahead.probing():  # a probe computes nothing but indices
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
