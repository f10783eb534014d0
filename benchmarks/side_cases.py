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
from collections import OrderedDict
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


Choices = list[tuple[int, list[int]]]  # of one token each: layer, its experts


def lru_hits(choices: Choices, words: dict[str, Any]) -> float:
    """Hits of the measured tokens, with half of all experts in memory, the least recently used leaving: how alike one
    token's experts are to those before it, whatever the engine keeps."""
    asked = [(layer, expert) for layer, experts in choices for expert in experts]
    total = words["prompt"] + words["warm"] + words["tokens"]
    first = len(asked) * (total - words["tokens"]) // total
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = 0
    for at, key in enumerate(asked):
        hits += at >= first and key in held
        held[key] = None
        held.move_to_end(key)
        if len(held) > words["slots"]:
            held.popitem(last=False)
    return hits / max(1, len(asked) - first)


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
    found = {"prompt_s": first, "token_s": statistics.mean(times), "token_median_s": statistics.median(times)}
    return found | {"bytes_per_token": (read_bytes() - before) / len(times)}


# ---- engines


def llama(words: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp on a file mapped into memory; weights stay where they are mapped, not packed anew. With `routing` its
    choices of experts are counted, which takes time."""
    import llama_cpp as lib

    silent = lib.llama_log_callback(lambda level, text, data: None)  # must live as long as the library calls it
    lib.llama_log_set(silent, ctypes.c_void_p())
    lib.llama_backend_init()
    start, options = time.perf_counter(), lib.llama_model_default_params()
    options.load_mode, options.n_gpu_layers, options.use_extra_bufts = lib.LLAMA_LOAD_MODE_MMAP, 0, False
    model = lib.llama_model_load_from_file(words["model"].encode(), options)
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = CONTEXT, os.cpu_count(), os.cpu_count()
    settings.type_k = settings.type_v = 0  # GGML_TYPE_F32, as MLX has them on a CPU
    choices: Choices = []
    watch = routing_callback(lib, choices)  # must live as long as the context
    if words.get("routing"):
        settings.cb_eval = watch
    context = lib.llama_init_from_model(model, settings) if model else None
    if not context:
        raise SystemExit(f"[side] llama.cpp should load {words['model']}, it does not")
    loaded = time.perf_counter() - start

    def step(ids: list[int]) -> None:
        tokens = (lib.llama_token * len(ids))(*ids)  # the batch points at it
        if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("[side] llama_decode should succeed, it failed")
        lib.llama_get_logits(context)

    if words.get("routing"):  # token by token: the rows of a prompt's choices do not lie side by side
        for token in token_ids(words):
            step([token])
        return {"lru_hits": lru_hits(choices, words)}
    return {**feed(step, words, lambda: None), "load_s": loaded, "anonymous_bytes": memory("RssAnon")}


def routing_callback(lib: Any, choices: Choices) -> Any:
    """A callback of ggml's scheduler that writes down the experts that each layer chooses for one token."""
    base = ctypes.CDLL(str(next((Path(lib.__file__).parent / "lib").glob("*ggml-base.*"))))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    base.ggml_get_name.argtypes, base.ggml_get_name.restype = [pointer], ctypes.c_char_p
    base.ggml_nbytes.argtypes, base.ggml_nbytes.restype = [pointer], size
    base.ggml_backend_tensor_get.argtypes = [pointer, pointer, size, size]

    def call(tensor: int, ask: bool, data: object) -> bool:
        name = base.ggml_get_name(tensor)
        if not name.startswith(b"ffn_moe_topk-"):
            return not ask
        if not ask:
            chosen = np.empty(base.ggml_nbytes(tensor) // 4, np.int32)
            base.ggml_backend_tensor_get(tensor, chosen.ctypes.data, 0, chosen.nbytes)
            choices.append((int(name.split(b"-")[1]), chosen.tolist()))
        return True

    return lib.ggml_backend_sched_eval_callback(call)


def ours(words: dict[str, Any]) -> dict[str, Any]:
    """Ours, experts streamed or resident as the budget says; seconds within the expert layers, reads included."""
    from tiny_qmoe_mlx import blas, layers, lookahead, models

    blas.install()
    inside, call = [0.0], layers.RecordExperts.__call__
    choices: Choices = []

    def timed(self: Any, x: Any, indices: Any) -> Any:
        import mlx.core as mx

        if lookahead.probing():  # within the call of the layer before, whose time it is
            return call(self, x, indices)
        mx.eval(x, indices)  # what came before is not the experts'
        choices.extend((self._index, row) for row in np.array(indices).reshape(-1, indices.shape[-1]).tolist())
        start = time.perf_counter()
        y = call(self, x, indices)
        mx.eval(y)
        inside[0] += time.perf_counter() - start
        return y

    layers.RecordExperts.__call__ = timed  # type: ignore[method-assign]
    with blas.shared_machine():
        start = time.perf_counter()
        streaming = models.Streaming(lookahead=words.get("lookahead", "auto"))
        model, _ = models.load(words["model"], words["memory"], CONTEXT, streaming=streaming)
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
    found["given_back_bytes"] = (
        model.tiny_qmoe._pressure.given_back
    )  # of the pool, while the system was short of memory
    found["record_bytes_per_token"] = asked["bytes_read"] / words["tokens"]
    found["hit_rate"] = asked["expert_hits"] / (asked["expert_hits"] + asked["expert_misses"])
    found["lru_hits"], found["direct_reads"] = lru_hits(choices, words), stats["direct_reads"]
    model.close()
    return found


def scale_embeddings(model: Any) -> None:
    import mlx.core as mx

    table = model.model.embed_tokens
    table.scales, table.biases = EMBEDDING * table.scales, EMBEDDING * table.biases
    mx.eval(table.scales, table.biases)


def mlx_step(model: Any) -> Callable[[list[int]], object]:
    """Tokens into the model as mlx-lm's generate has them: of a prompt, only the last one's logits are computed."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)

    def step(ids: list[int]) -> None:
        if len(ids) > 1:
            model(mx.array([ids[:-1]]), cache=cache)
            mx.eval([c.state for c in cache])
        mx.eval(model(mx.array([ids[-1:]]), cache=cache))

    return step


def mlx_lm(words: dict[str, Any]) -> dict[str, Any]:
    """mlx-lm's own model at 4 bits, all in memory: codes of noise in the same shape."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.utils import _get_classes

    from tiny_qmoe_mlx import blas

    blas.install()
    start = time.perf_counter()
    config = json.loads((Path(words["model"]) / "config.json").read_text())
    base, arguments = _get_classes(config)
    model = base(arguments.from_dict(config))
    model.set_dtype(mx.float32)  # of scales too: on a CPU MLX takes 5 times as long in bfloat16
    nn.quantize(model, 64, 4, class_predicate=lambda path, m: hasattr(m, "to_quantized") and _bits(model, path, m))
    for module in model.modules():
        if "scales" in module:
            fill(module)
    mx.eval(model.parameters())
    scale_embeddings(model)
    loaded = time.perf_counter() - start
    with blas.shared_machine():
        return {**feed(mlx_step(model), words, lambda: None), "load_s": loaded}


def _bits(model: Any, path: str, module: Any) -> bool | dict[str, int]:
    """What mlx-lm's own conversion does with a layer: of some models the routers stay at 8 bits."""
    return model.quant_predicate(path, module) if hasattr(model, "quant_predicate") else True


def fill(module: Any) -> None:
    """Codes of noise, weights of deviation 0.014 around 0."""
    import mlx.core as mx

    codes = np.random.default_rng(0).integers(0, 1 << 32, module.weight.shape, np.uint32)
    scale = 0.014 * 12**0.5 / (1 << module.bits)
    module.weight, shape = mx.array(codes), module.scales.shape
    module.scales, module.biases = mx.full(shape, scale), mx.full(shape, -scale * ((1 << module.bits) - 1) / 2)
    mx.eval(module.weight, module.scales, module.biases)


def main() -> None:
    words = json.loads(sys.argv[1])
    found = {"llama": llama, "ours": ours, "mlx": mlx_lm}[words["engine"]](words)
    if "prompt_s" in found:
        found["first_s"] = found["load_s"] + found["prompt_s"]  # a mapped file is read by the first tokens
    print(json.dumps({**found, "peak_bytes": memory("VmHWM")}))


if __name__ == "__main__":
    main()
