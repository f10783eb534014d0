"""One measurement of bench_stream in a process of its own: `stream_cases.py JSON`, the result is the last line.

case "experts": the layers of experts alone, inputs of noise, routing from a trace; then the same number of threads read
as many records with bare `preadv`. case "whole": the model as generate runs it. `memory` is the budget in bytes.
"""

import dataclasses
import json
import mmap
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import tiny_qmoe_mlx  # noqa: F401 (before mlx, whose dense products on the CPU it makes fast)

# isort: split
import mlx.core as mx
import numpy as np
from policies import BELADY, ENGINE
from replay import STRIDE, Demand, misses

from tiny_qmoe_mlx import blas, footprint, lookahead, models, ops
from tiny_qmoe_mlx import budget as budgets
from tiny_qmoe_mlx.container import Container, open_model
from tiny_qmoe_mlx.expert_kind import expert_kind
from tiny_qmoe_mlx.layers import RecordExperts
from tiny_qmoe_mlx.runtime import Runtime, peak_memory
from tiny_qmoe_mlx.streaming.trace import Trace, read_trace

READERS = 8
CHUNK = footprint.PREFILL_CHUNK
DIRECT = getattr(os, "O_DIRECT", 0)
Calls = list[tuple[int, np.ndarray, bool]]  # layer, experts (tokens, k), whether it is measured


# ---- what is asked


def token_matrix(trace: Trace) -> np.ndarray:
    """All tokens of a trace, int (layers, tokens, k)."""
    layers = range(len(trace.experts))
    return np.stack([np.concatenate([c.chosen for c in trace.calls if c.layer == layer]) for layer in layers])


def calls_of(tokens: np.ndarray, words: dict[str, Any]) -> Calls:
    """The calls of a run: `warm` tokens fill the pool, `tokens` are measured, `batch` streams begin at
    different places of the trace; or a prompt of `prompt` tokens in chunks.
    """
    layers, total, _ = tokens.shape
    if words.get("prompt"):
        starts = range(0, words["prompt"], CHUNK)
        parts = [(np.arange(s, min(s + CHUNK, words["prompt"])) % total, True) for s in starts]
    else:
        begin = np.arange(words["batch"]) * (total // words["batch"])
        steps = range(words["warm"] + words["tokens"])
        parts = [((begin + step) % total, step >= words["warm"]) for step in steps]
    return [(layer, tokens[layer, rows], measured) for rows, measured in parts for layer in range(layers)]


def asked(calls: Calls, container: Container) -> list[Demand]:
    """What each call demands, for a replay."""
    sizes = [layer.record_bytes for layer in container.spec.layers]
    return [
        Demand((layer * STRIDE + np.unique(chosen)).tolist(), len(chosen) > ops.DECODE_TOKENS, sizes[layer])
        for layer, chosen, _ in calls
    ]


# ---- the engine


def beside_experts(container: Container) -> tuple[int, int]:
    """(the program, scratch) in bytes, where there are no dense weights, no attention, no KV cache."""
    hidden, k = container.config["hidden_size"], footprint.top_k(container.config)
    return budgets.split(container, 1 << 50).runtime_bytes, 2 * ops.DENSE_BYTES + 3 * CHUNK * k * hidden * 4


def expert_budget(container: Container, memory: int) -> budgets.Budget:
    """A budget for the experts alone."""
    whole, k = budgets.split(container, 1 << 50), footprint.top_k(container.config)
    runtime, scratch = beside_experts(container)
    counts = budgets._records(container)
    least = {size: min(count, k) for size, count in counts.items()}
    shared = budgets._share(counts, least, memory - runtime - scratch)
    slots = {size: min(counts[size], n) for size, n in shared.items()}
    mode = "resident" if slots == counts else "streamed"
    changes = {"budget_bytes": memory, "slots": slots, "mode": mode, "weight_bytes": 0, "kv_bytes": 0}
    return dataclasses.replace(whole, **changes, scratch_bytes=scratch)  # type: ignore[arg-type]


def open_experts(container: Container, memory: int) -> tuple[Runtime, list[RecordExperts]]:
    """The layers of experts without the model around them."""
    from mlx_lm.models.switch_layers import SwiGLU

    spec = container.spec
    layers = [RecordExperts(i, expert_kind(layer, spec, SwiGLU())) for i, layer in enumerate(spec.layers)]
    runtime = Runtime(container, expert_budget(container, memory), layers)  # no blocks around: no lookahead
    if runtime.budget.mode == "resident":
        models._load_resident(runtime, lambda what, done, total: None)
    return runtime, layers


def run_calls(layers: list[RecordExperts], calls: Calls, inputs: dict[int, mx.array]) -> None:
    for layer, chosen, _ in calls:
        mx.eval(layers[layer](inputs[len(chosen)], mx.array(chosen.astype(np.uint32))))


def measure(runtime: Runtime, layers: list[RecordExperts], calls: Calls, hidden: int) -> dict[str, Any]:
    """Seconds, bytes and hits of the measured calls, after those that only fill the pool."""
    rng = np.random.default_rng(0)
    widths = {len(chosen) for _, chosen, _ in calls}
    inputs = {n: mx.array(rng.standard_normal((n, hidden), np.float32)) for n in widths}
    run_calls(layers, [c for c in calls if not c[2]], inputs)
    before, start = runtime.stats(), time.perf_counter()
    run_calls(layers, [c for c in calls if c[2]], inputs)
    seconds, after = time.perf_counter() - start, runtime.stats()
    keys = ("bytes_read", "records_read", "expert_hits", "expert_misses", "io_wait_s")
    return {"seconds": seconds, **{key: after[key] - before[key] for key in keys}}


# ---- the disk alone


class Bare:
    """Threads that read records with preadv and nothing else, past the page cache where the file allows it."""

    def __init__(self, container: Container, records: list[tuple[int, int]], readers: int):
        self.container, self.records, self.next = container, records, 0
        self.lock = threading.Lock()
        layers = container.spec.layers
        self.files = [os.open(container.expert_file(i), os.O_RDONLY | self._flag(i)) for i in range(len(layers))]
        self.buffers = [mmap.mmap(-1, max(layer.record_bytes for layer in layers)) for _ in range(readers)]

    def _flag(self, layer: int) -> int:
        offset, size = self.container.record_offset(layer, 0), self.container.spec.layers[layer].record_bytes
        return DIRECT if offset % 4096 == size % 4096 == 0 else 0

    def work(self, buffer: mmap.mmap) -> None:
        view = memoryview(buffer)
        while True:
            with self.lock:
                at, self.next = self.next, self.next + 1
            if at >= len(self.records):
                return
            layer, expert = self.records[at]
            size = self.container.spec.layers[layer].record_bytes
            os.preadv(self.files[layer], [view[:size]], self.container.record_offset(layer, expert))

    def seconds(self) -> float:
        threads = [threading.Thread(target=self.work, args=(buffer,)) for buffer in self.buffers]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken = time.perf_counter() - start
        for file in self.files:
            os.close(file)
        return taken


def bare(container: Container, demand: list[Demand], missed: np.ndarray, readers: int) -> dict[str, Any]:
    """Read as many records of the same layers as were missed, in the same order."""
    records = [divmod(key, STRIDE) for d, n in zip(demand, missed, strict=True) for key in d.keys[: int(n)]]
    total = sum(container.spec.layers[layer].record_bytes for layer, _ in records)
    return {"bare_bytes": total, "bare_s": Bare(container, records, readers).seconds() if records else 0.0}


# ---- cases


def experts(words: dict[str, Any]) -> dict[str, Any]:
    container, trace = open_model(words["model"]), read_trace(words["trace"])
    if trace.experts != [layer.experts for layer in container.spec.layers]:
        raise SystemExit(f"[{words['trace']}] has layers of {trace.experts[:3]}... experts, the model has others")
    calls = calls_of(token_matrix(trace), words)
    runtime, layers = open_experts(container, words["memory"])
    slots, mode = dict(runtime.budget.slots), runtime.budget.mode
    rounds = range(words.get("rounds", 1))
    found = [measure(runtime, layers, calls, container.config["hidden_size"]) for _ in rounds]
    result = {**found[-1], "rounds_s": [f["seconds"] for f in found], "mode": mode, "budget_bytes": words["memory"]}
    result["pool_bytes"], result["peak_bytes"] = sum(s * n for s, n in slots.items()), peak_memory()
    runtime.close()
    if mode == "resident":
        return result
    demand, kept = asked(calls, container), np.array([c[2] for c in calls])
    sizes = np.array([d.size for d in demand])
    by = {name: misses(demand, slots, name) for name in (ENGINE, "lru", BELADY)}
    result |= {f"{name}_bytes": int((by[name] * sizes)[kept].sum()) for name in by}
    result["union_records"] = sum(len(d.keys) for d, k in zip(demand, kept, strict=True) if k)
    return result | bare(container, demand, by[ENGINE] * kept, words["readers"])


def time_experts() -> list[float]:
    """Seconds spent in expert layers from now on, waits for the disk among them: a list of one number that grows."""
    inside, call = [0.0], RecordExperts.__call__

    def timed(self: RecordExperts, x: mx.array, indices: mx.array) -> mx.array:
        if lookahead.probing():  # within the call of the layer before, whose time it is
            return call(self, x, indices)
        mx.eval(x, indices)  # what came before is not the experts'
        start = time.perf_counter()
        y = call(self, x, indices)
        mx.eval(y)
        inside[0] += time.perf_counter() - start
        return y

    RecordExperts.__call__ = timed  # type: ignore[method-assign]
    return inside


def whole(words: dict[str, Any]) -> dict[str, Any]:
    from mlx_lm import stream_generate

    inside = time_experts()
    model, tokenizer = models.load(words["model"], words["memory"], words.get("context", 512))
    tokenizer.eos_token_ids = set()  # as many tokens as asked, whatever the model wants to say
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, 1000, words.get("prompt") or 8).tolist()
    start, times = time.perf_counter(), []
    first: dict[str, float] = {}
    for _ in stream_generate(model, tokenizer, prompt, max_tokens=words["tokens"]):
        times.append(time.perf_counter() - start)
        first = first or {"first_experts_s": inside[0], "first_wait_s": model.tiny_qmoe.stats()["io_wait_s"]}
    stats = model.tiny_qmoe.stats()
    keys = ("bytes_read", "expert_hits", "expert_misses", "io_wait_s", "pool_bytes", "mode", "budget_bytes")
    result = {**{key: stats[key] for key in keys}, "peak_bytes": peak_memory(), "ttft_s": times[0], **first}
    model.close()
    return {**result, "generated": len(times), "seconds": times[-1] - times[0]}


def main() -> None:
    words = json.loads(sys.argv[1])
    blas.install()
    words["model"] = Path(words["model"])
    print(json.dumps({"experts": experts, "whole": whole}[words["case"]](words)))


if __name__ == "__main__":
    main()
