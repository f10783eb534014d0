"""A converted directory as a model of mlx-lm: its own class for the type, with the experts swapped for records.

`load` is the one way in: it checks the files, splits the budget, and connects the layers with the pool.
"""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model

from tiny_qmoe_mlx import allocator, footprint, ops, plain_files, probes, process, qmoe_probe, rans_probe, whole
from tiny_qmoe_mlx import budget as budgets
from tiny_qmoe_mlx.codecs import qmoe, tuples
from tiny_qmoe_mlx.container import LOOSE, Container, check_hash, open_model
from tiny_qmoe_mlx.disk_errors import is_disk, weights_of
from tiny_qmoe_mlx.door import Door
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.expert_kind import expert_kind
from tiny_qmoe_mlx.layers import RecordExperts, use_cpu_kernels
from tiny_qmoe_mlx.library_errors import computing, is_compiler
from tiny_qmoe_mlx.model_file import NOT_RUN
from tiny_qmoe_mlx.original import adapted, checkpoint, dense
from tiny_qmoe_mlx.runtime import Runtime, Streaming
from tiny_qmoe_mlx.spec import CODEC, QMOE, ModelSpec
from tiny_qmoe_mlx.streaming.demand import load_all

Progress = Callable[[str, int, int], None]  # what, done, total


def model_classes(spec: ModelSpec) -> Callable[[dict], tuple[type, type]]:
    """mlx-lm's classes for a config, the model's own extended: experts swapped by class, record tensors left on
    disk.
    """

    def classes(config: dict) -> tuple[type, type]:
        base, args = adapted.model_classes(config)

        class Model(base):  # type: ignore[valid-type, misc]
            def __init__(self, args: Any):
                super().__init__(args)
                self.door = Door()
                swap_experts(self, spec)
                # what is no parameter (a rope's frequencies) is lazy, and could be computed in this thread alone
                own = [a for m in self.modules() for k, a in m.items() if k[0] == "_" and isinstance(a, mx.array)]
                mx.eval(own)
                self.works = False

            @wraps(base.__call__)  # mlx-lm reads its signature
            def __call__(self, *inputs: Any, **options: Any) -> mx.array:
                with self.door.call(), nullcontext() if self.works else computing(self.model_type):
                    found = super().__call__(*inputs, **options)
                self.works = True  # whatever is raised later is not the config's
                return found

            def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
                # names and values are the module's own already: mlx-lm's sanitize would change some again
                records = {f"{layer.path}.{part}" for layer in spec.layers for part in ("records", "checksums")}
                kept = {name: w for name, w in weights.items() if name not in (*records, tuples.TENSOR)}
                if "lm_head" in self and not any(name.startswith("lm_head.") for name in kept):
                    super().sanitize({})  # where Gemma 3 learns that its head is the embedding
                return kept

            def __reduce_ex__(self, protocol: object) -> Any:
                raise TypeError(
                    "[model] should stay where it was loaded, it can be neither copied nor pickled: its pool, files "
                    "and threads are its own; load the directory again."
                )

            def __enter__(self) -> "Model":
                return self

            def __exit__(self, *error: object) -> None:
                self.close()

            def close(self) -> None:
                """Free pool and files, once calls under way in other threads have ended; no call works afterwards."""
                self.door.shut()
                self.tiny_qmoe.close()

        return Model, args

    return classes


def swap_experts(model: nn.Module, spec: ModelSpec) -> None:
    """Replace every expert layer by a RecordExperts, or every decoder layer of a dense model by one that is expanded
    from its record; in place.

    Raises:
        FormatError: the config's layers are not the model's.
    """
    if spec.layers[0].whole:
        for index, layer in enumerate(spec.layers):
            whole.swap(model, index, layer, expert_kind(layer, spec, nn.Identity()))
        return
    if not dense.is_mixture(model):
        dense.as_mixture(model)
    own = {found.path: found for found in checkpoint.expert_layers(model)}
    if sorted(own) != sorted(layer.path for layer in spec.layers):
        raise FormatError(
            "[config.json] the expert layers named in tiny_qmoe should be those of the model and are not; "
            "convert the model again with this version."
        )
    swapped = []
    for index, layer in enumerate(spec.layers):
        found = own[layer.path]
        received = (checkpoint.expert_count(found), tuple(checkpoint.matrix_shapes(found)), checkpoint.has_bias(found))
        if received != (layer.experts, layer.matrices, layer.bias):
            raise FormatError(
                f"[config.json] {layer.path} should have {received} (experts, matrices, bias) by the model's config, "
                f"tiny_qmoe says {(layer.experts, layer.matrices, layer.bias)}; convert the model again."
            )
        swapped.append((layer.path, RecordExperts(index, expert_kind(layer, spec, found.module.activation))))
    model.update_modules(tree_unflatten(swapped))


def record_layers(model: nn.Module) -> list[RecordExperts]:
    """The model's expert layers in order."""
    found = [m for m in model.modules() if isinstance(m, RecordExperts | whole.Whole)]
    return sorted(found, key=lambda m: m._index)  # type: ignore[arg-type]


def load(
    path: str | Path,
    memory: str | int = "auto",
    context: int = budgets.DEFAULT_CONTEXT,
    progress: Progress = lambda what, done, total: None,
    tokenizer: TokenizerWrapper | None = None,
    streaming: Streaming = Streaming(),  # noqa: B008 (frozen)
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a converted model under one memory budget.

    Args:
        path: a converted directory, or a hub id of one.
        memory: "6GB", "60%", "auto" or bytes, for everything that the process holds.
        context: tokens of KV cache that the budget provides for.
        progress: called with (what, done, total).
        tokenizer: where it has been opened already.
        streaming: how experts that are not in memory are read.

    Returns:
        (model, tokenizer) as mlx_lm.load does; `model.tiny_qmoe` has budget and counters, `model.close()` frees.

    Raises:
        FormatError: the files are not a whole converted model.
        BudgetError: the budget is too small; the text names the smallest that works.
        ValueError: the context is no number of tokens; this machine's GPU computes experts wrongly; the process is a
            fork of one that has loaded a model.
    """
    directory = checkpoint.find_directory(str(path))
    cpu = mx.default_device() == mx.cpu
    container, budget = prepare(directory, memory, context, cpu)
    tokenizer = tokenizer or open_tokenizer(
        directory
    )  # before the weights: making one takes three to six times its memory
    with weights_of(directory):
        model = _build(directory, container, cpu)
    attach(model, container, budget, streaming, progress)
    return model, tokenizer


def prepare(directory: Path, memory: str | int, context: int, cpu: bool) -> tuple[Container, budgets.Budget]:
    """What comes before the weights: files, budget and GPU are checked, and what is freed goes back to the system;
    raises as `load`."""
    process.enter("load")
    if type(context) is not int or context < 1:  # fewer tokens would give the pool memory that others need
        raise ValueError(f"[load] context should be a whole number of tokens, at least 1, received {context!r}.")
    container = open_model(directory, hash_files=True)
    budget = budgets.split(container, budgets.parse_memory(memory), context, cpu)
    mx.set_cache_limit(footprint.MLX_CACHE_BYTES)
    allocator.keep_little()
    if ops.on_gpu() and container.spec.codec in (CODEC, QMOE):  # MLX's own kernels compute the others
        for coding in {layer.coding for layer in container.spec.layers}:
            check_gpu(container.spec.length, coding)
    if ops.on_gpu() and container.spec.layers[0].whole:
        check_gpu_rans()
    return container, budget


def attach(
    model: nn.Module,
    container: Container,
    budget: budgets.Budget,
    streaming: Streaming = Streaming(),  # noqa: B008 (frozen)
    progress: Progress = lambda what, done, total: None,
) -> None:
    """What comes after the weights: the layers get their pool, as full as the budget allows."""
    # the weights have come from files that were checked before
    plain_files.require_unchanged(container.directory, container.states)
    layers = record_layers(model)
    model.tiny_qmoe = Runtime(container, budget, layers, streaming, model.door)
    model.door.around = model.tiny_qmoe.memory.turn
    _load_resident(model.tiny_qmoe, progress)
    if budget.mode == "streamed":
        model.tiny_qmoe.stream(model, layers)


def check_gpu(length: int, coding: qmoe.Coding | None = None) -> None:
    """Refuse a GPU whose kernels differ from the numpy specification on a small layer of noise: with every rate of the
    trellis, or in the coding of codec qmoe where one is given.

    Raises:
        ValueError: with the error; a wrong answer is worse than none.
    """
    allowed = probes.TOLERANCE[mx.float16]
    if coding is None:
        error = probes.kernel_error(None, length, 1, mx.float16, bias=True)
    else:
        error = qmoe_probe.error(coding, mx.float16)
    if not error <= allowed:
        raise ValueError(
            f"[gpu] experts should come within {allowed:g} of the specification on this GPU, they are {error:.2g} off; "
            "run python -m tiny_qmoe_mlx.doctor --record FILE and report it; mx.set_default_device(mx.cpu) works."
        )


def check_gpu_rans() -> None:
    """Refuse a GPU that decodes rANS wrongly.

    Raises:
        ValueError: with the share of wrong bytes.
    """
    error = rans_probe.error()
    if error:
        raise ValueError(
            f"[gpu] coded bytes should be decoded without an error on this GPU, {error:.2g} of them are wrong; run "
            "python -m tiny_qmoe_mlx.doctor --record FILE and report it; mx.set_default_device(mx.cpu) works."
        )


def open_tokenizer(directory: Path) -> TokenizerWrapper:
    """The tokenizer of a converted model; the model's files are checked before one of them is read."""
    container = open_model(directory)
    for name, entry in container.files.items():
        if not name.endswith((".safetensors", *LOOSE)):  # those of weights are left to `load`
            check_hash(directory, name, entry)
    tokenizer = checkpoint.open_tokenizer(directory, container.config)
    plain_files.require_unchanged(directory, container.states)
    return tokenizer


def _build(directory: Path, container: Container, cpu: bool) -> nn.Module:
    try:
        model, _ = load_model(directory, True, model_config=NOT_RUN, get_model_classes=model_classes(container.spec))
    except Exception as error:  # a config that contradicts itself trips mlx-lm in many ways
        if isinstance(error, FormatError | MemoryError) or is_disk(error) or is_compiler(error):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise FormatError(
            f"[model] the weights of {directory} do not fit its config: {reason}; convert the model again."
        ) from error
    finish(model, cpu)
    return model


def finish(model: nn.Module, cpu: bool) -> None:
    """Bring a model's own weights into memory, in the form that this device computes with."""
    if cpu:
        _widen(model)
    use_cpu_kernels(model)
    mx.eval(model.parameters())
    allocator.forget_draws()
    gc.collect()
    mx.clear_cache()
    allocator.give_back()


def _widen(model: nn.Module) -> None:
    """float32 for all that is narrower: MLX's CPU backend is slow or incomplete in half precision. The largest first,
    while little else is in memory beside its original."""
    model.set_dtype(mx.float32)
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for array in sorted(arrays.values(), key=lambda a: -a.nbytes):
        mx.eval(array)


def _load_resident(runtime: Runtime, progress: Progress) -> None:
    layers, slots = runtime.container.spec.layers, runtime.budget.slots
    counts = {size: sum(x.experts for x in layers if x.slot == size) for size in slots}
    total = sum(count for size, count in counts.items() if slots[size] >= count)
    done = 0

    def step(experts: int) -> None:
        nonlocal done
        done += experts
        progress("loading experts", done, total)

    load_all(runtime.cache, step)
