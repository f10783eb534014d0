"""One run of bench_side_by_side in a process of its own: `side_cases.py JSON`, the result is the last line.

Every engine gets the same token ids: a prompt, then one token at a time whatever it would have chosen (on weights of
noise greedy decoding soon repeats itself, and a repeated token has all its experts in memory).
"""

import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 256
EMBEDDING = 100.0  # times as large as the model of noise has them: as in gguf_random, tokens then choose at random


def token_ids(words: dict[str, Any]) -> list[int]:
    """The prompt, the tokens that warm the engine up, and those that are measured."""
    count = words["prompt"] + words["warm"] + words["tokens"]
    return np.random.default_rng(0).integers(3, words["vocabulary"], count).tolist()


def read_bytes() -> int:
    """Bytes that this process had the disk read, what the kernel read ahead for it included."""
    return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])


def memory(key: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def feed(step: Callable[[list[int]], object], words: dict[str, Any], begin: Callable[[], object]) -> dict[str, Any]:
    """Run the tokens; begin is called where measuring does."""
    ids, warm = token_ids(words), words["prompt"] + words["warm"]
    start = time.perf_counter()
    step(ids[: words["prompt"]])
    first = time.perf_counter() - start
    for token in ids[words["prompt"] : warm]:
        step([token])
    before, times = read_bytes(), []
    begin()
    for token in ids[warm:]:
        start = time.perf_counter()
        step([token])
        times.append(time.perf_counter() - start)
    found = {"first_s": first, "token_s": statistics.mean(times), "token_median_s": statistics.median(times)}
    return found | {"bytes_per_token": (read_bytes() - before) / len(times)}


# ---- engines


def llama(words: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp on a file mapped into memory; weights stay where they are mapped, not packed anew."""
    import llama_cpp as lib

    silent = lib.llama_log_callback(lambda level, text, data: None)  # must live as long as the library calls it
    lib.llama_log_set(silent, ctypes.c_void_p())
    lib.llama_backend_init()
    start, options = time.perf_counter(), lib.llama_model_default_params()
    options.use_mmap, options.use_mlock, options.n_gpu_layers, options.use_extra_bufts = True, False, 0, False
    model = lib.llama_model_load_from_file(words["model"].encode(), options)
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = CONTEXT, os.cpu_count(), os.cpu_count()
    context = lib.llama_init_from_model(model, settings)
    if not model or not context:
        raise SystemExit(f"[side] llama.cpp should load {words['model']}, it does not")
    loaded = time.perf_counter() - start

    def step(ids: list[int]) -> None:
        tokens = (lib.llama_token * len(ids))(*ids)  # the batch points at it
        if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("[side] llama_decode should succeed, it failed")
        lib.llama_get_logits(context)

    return {**feed(step, words, lambda: None), "load_s": loaded, "anonymous_bytes": memory("RssAnon")}


def ours(words: dict[str, Any]) -> dict[str, Any]:
    """Ours, experts streamed or resident as the budget says; seconds within the expert layers, reads included."""
    from tiny_qmoe_mlx import blas, layers, models

    blas.install()
    inside, call = [0.0], layers.RecordExperts.__call__

    def timed(self: Any, x: Any, indices: Any) -> Any:
        import mlx.core as mx

        mx.eval(x, indices)  # what came before is not the experts'
        start = time.perf_counter()
        y = call(self, x, indices)
        mx.eval(y)
        inside[0] += time.perf_counter() - start
        return y

    layers.RecordExperts.__call__ = timed  # type: ignore[method-assign]
    with blas.shared_machine():
        start = time.perf_counter()
        model, _ = models.load(words["model"], words["memory"], CONTEXT)
        loaded, before = time.perf_counter() - start, {}
        scale_embeddings(model)

        def begin() -> None:
            inside[0] = 0.0
            before.update(model.tiny_qmoe.stats())

        found = feed(mlx_step(model), words, begin)
    stats = model.tiny_qmoe.stats()
    asked = {key: stats[key] - before[key] for key in ("expert_hits", "expert_misses", "bytes_read", "io_wait_s")}
    found |= {
        "load_s": loaded,
        "experts_s": inside[0] / words["tokens"],
        "wait_s": asked["io_wait_s"] / words["tokens"],
    }
    found |= {"mode": stats["mode"], "pool_bytes": stats["pool_bytes"], "budget_bytes": stats["budget_bytes"]}
    found["record_bytes_per_token"] = asked["bytes_read"] / words["tokens"]
    found["hit_rate"] = asked["expert_hits"] / (asked["expert_hits"] + asked["expert_misses"])
    model.close()
    return found


def scale_embeddings(model: Any) -> None:
    import mlx.core as mx

    table = model.model.embed_tokens
    table.scales, table.biases = EMBEDDING * table.scales, EMBEDDING * table.biases
    mx.eval(table.scales, table.biases)


def mlx_step(model: Any) -> Callable[[list[int]], object]:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    return lambda ids: mx.eval(model(mx.array([ids]), cache=cache)[:, -1])


def mlx_lm(words: dict[str, Any]) -> dict[str, Any]:
    """mlx-lm's own model at 4 bits, all in memory: codes of noise in the same shape."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.utils import _get_classes

    from tiny_qmoe_mlx import blas

    blas.install()
    config = json.loads((Path(words["model"]) / "config.json").read_text())
    base, arguments = _get_classes(config)
    model = base(arguments.from_dict(config))
    model.set_dtype(mx.float32)
    nn.quantize(model, 64, 4)
    for module in model.modules():
        if "scales" in module:
            module.weight = mx.random.randint(0, 1 << 31, module.weight.shape).astype(mx.uint32)
            module.scales, module.biases = mx.full(module.scales.shape, 0.003), mx.full(module.scales.shape, -0.0225)
            mx.eval(module.weight, module.scales, module.biases)
    mx.eval(model.parameters())
    scale_embeddings(model)
    with blas.shared_machine():
        return feed(mlx_step(model), words, lambda: None)


def main() -> None:
    words = json.loads(sys.argv[1])
    found = {"llama": llama, "ours": ours, "mlx": mlx_lm}[words["engine"]](words)
    print(json.dumps({**found, "peak_bytes": memory("VmHWM")}))


if __name__ == "__main__":
    main()
