"""An optional step after conversion: train the gains of the records and the model's norms towards the original, codes
frozen.

Rounding shrinks and tilts what a layer puts out, and later layers add up what earlier ones got wrong; scales and norms
are too few to overfit and enough to undo part of it (QuIP#, arXiv 2402.04396, section 5, trains its sign vectors and
norms; AQLM, arXiv 2401.06118, its scales). Rates, orders and payloads stay bit for bit, so sizes do not change.
"""

import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_model

from tiny_qmoe_mlx import budget, container, container_writer, footprint, models
from tiny_qmoe_mlx.codecs import rotation, trellis
from tiny_qmoe_mlx.container import Container
from tiny_qmoe_mlx.conversion.rest import write_shard
from tiny_qmoe_mlx.errors import BudgetError, FormatError
from tiny_qmoe_mlx.finetune.distill import Progress, Schedule, Teacher, distill, held_out_loss, teach
from tiny_qmoe_mlx.finetune.model import Decoded, GainedExperts, decoded, in_stored_order
from tiny_qmoe_mlx.layers import use_cpu_kernels
from tiny_qmoe_mlx.model_file import NOT_RUN
from tiny_qmoe_mlx.original import checkpoint
from tiny_qmoe_mlx.streaming.store import ExpertStore

PROGRAM_BYTES = 400 << 20  # the interpreter, its libraries, the tokenizer
SMALLEST_GAIN, LARGEST_GAIN = 2.0**-14, 65504.0  # float16's normal range
GAINS = ("row_gain", "block_gain")


@dataclass(frozen=True)
class Settings:
    """How to train.

    steps of `batch` sequences; rate: Adam's, a share of a parameter's value per step; held_out: sequences that are
    never trained on and choose the best step, asked every `every` steps; top: tokens of the original's predictions
    that are kept per position; memory: what the process may hold, as `--memory`.
    """

    steps: int = 100
    batch: int = 4
    rate: float = 5e-3
    held_out: int = 8
    every: int = 10
    top: int = 128
    memory: str | int = "auto"
    seed: int = 0

    def check(self) -> None:
        """Refuse what is out of range.

        Raises:
            ValueError: names the setting.
        """
        for name in ("steps", "batch", "held_out", "every", "top"):
            if getattr(self, name) < 1:
                raise ValueError(f"[finetune] {name} should be at least 1, received {getattr(self, name)}.")
        if not 0 < self.rate <= 0.1:
            raise ValueError(f"[finetune] rate should lie in 0 to 0.1, received {self.rate}.")


def finetune_gains(
    converted: Path,
    source: Path,
    tokens: np.ndarray,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Train a converted model's gains and norms against its original, and write them if they help on held-out tokens.

    Args:
        converted: directory of the converted model; replaced by the better one as a whole, or left as it is.
        source: directory of the original checkpoint.
        tokens: int32 (n, T); the last `settings.held_out` sequences are the held-out ones.
        settings: how.
        progress: called with (what, done, total).

    Returns:
        kl_before and kl_after (nats, held-out tokens; after with gains and norms rounded as stored), changed
        (whether anything was written), steps, best_step, seconds, history.

    Raises:
        ValueError: settings or tokens that do not serve.
        BudgetError: the decoded experts do not fit the memory given.
        FormatError: one of the two models is damaged, or they do not belong together.
        OSError: the disk is full; the model is as it was.
    """
    start = time.monotonic()
    settings.check()
    opened = container.open_model(converted, hash_files=True)
    _check_tokens(tokens, settings, opened.config)
    _check_source(opened, source)
    check_memory(opened, source, tokens.shape[1], settings)
    teacher = _teacher(source, tokens, settings, progress)
    store, model = differentiable(opened, progress)
    try:
        names = trainable(model, opened)
        schedule = Schedule(settings.steps, settings.batch, settings.rate, settings.every, seed=settings.seed)
        found = distill(model, list(names), tokens, teacher, settings.held_out, schedule, progress)
        _round(model, names, opened, found.factors)
        after = held_out_loss(model, tokens, teacher, settings.held_out)
        changed = found.best_step > 0 and after < found.before
        if changed:
            write_back(opened, store, found.factors, names)
    finally:
        store.close()
    return {
        "kl_before": found.before,
        "kl_after": after if changed else found.before,
        "changed": changed,
        "steps": found.steps,
        "best_step": found.best_step if changed else 0,
        "seconds": time.monotonic() - start,
        "history": found.history,
    }


# ---- what is refused


def _check_tokens(tokens: np.ndarray, settings: Settings, config: dict) -> None:
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.shape[1] < 2:
        raise ValueError(
            f"[finetune] tokens should be integers (sequences, length), received {tokens.dtype} of {tokens.shape}."
        )
    if len(tokens) <= settings.held_out:
        raise ValueError(
            f"[finetune] more than the {settings.held_out} sequences that are held out should be there, received "
            f"{len(tokens)}; give a longer calibration text."
        )
    size = config.get("vocab_size")
    if isinstance(size, int) and not (tokens.min() >= 0 and tokens.max() < size):
        raise ValueError(f"[finetune] tokens should lie in 0 to {size - 1}, received {tokens.min()} to {tokens.max()}.")


def _check_source(opened: Container, source: Path) -> None:
    theirs = checkpoint.read_config(Path(source))
    for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        if theirs.get(key) != opened.config.get(key):
            raise FormatError(
                f"[finetune] {key} of the original at {source} should be {opened.config.get(key)}, as in the converted "
                f"model, received {theirs.get(key)}; give the checkpoint that it was converted from."
            )


def check_memory(opened: Container, source: Path, length: int, settings: Settings) -> None:
    """Refuse a model whose decoded experts, or whose original, exceed the memory given.

    Raises:
        BudgetError: with both numbers.
    """
    need, given = needed_bytes(opened, source, length), budget.parse_memory(settings.memory)
    if need > given:
        raise BudgetError(
            f"[finetune] training gains holds all experts decoded and should have about {budget.show(need)} of memory, "
            f"received {budget.show(given)}; give more with --memory, or leave --finetune-gains out."
        )


def needed_bytes(opened: Container, source: Path, length: int) -> int:
    """What `finetune_gains` holds at its peak: float32 weights of one of the two models, and activations.

    A sequence's activations are kept for the way back: per layer and token about 16 vectors of the model's width, per
    pick 4 of those and 8 of an expert's, the attention's scores twice; of the logits about 6 copies.
    """
    text = {**opened.config, **(opened.config.get("text_config") or {})}
    experts, kept = 0, 0
    for layer in opened.spec.layers:
        experts += layer.experts * sum(rows * rotation.padded_columns(columns) for rows, columns in layer.shapes)
        rows, width = layer.shapes[0]
        kept += 16 * width + min(_picks(text), layer.experts) * (8 * rows + 4 * width)
    student = 4 * (experts + _rest_weights(opened))
    kept += 2 * length * int(text.get("num_attention_heads", 0)) * int(text.get("num_hidden_layers", 0))
    logits = 6 * int(text.get("vocab_size", 0))
    return max(student, _original_bytes(source)) + 4 * length * (kept + logits) + PROGRAM_BYTES


def _picks(config: dict) -> int:
    """Experts that a token uses, by whatever key a family's config says it."""
    keys = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "top_k_experts")
    return max([1, *(config[k] for k in keys if isinstance(config.get(k), int))])


def _rest_weights(opened: Container) -> int:
    """Weights that are no expert's, once they are dequantized."""
    bits = int((opened.config.get("quantization") or {}).get("bits", 32))
    sizes = footprint.tensor_sizes(opened).values()
    return sum(math.prod(shape) * (32 // bits if dtype == "U32" else 1) for dtype, shape in sizes)


def _original_bytes(source: Path) -> int:
    """The original in memory: twice its files where the CPU backend wants float32."""
    files = sum(f.stat().st_size for f in Path(source).glob("model*.safetensors"))
    return files * (2 if mx.default_device() == mx.cpu else 1)


# ---- the two models


def _teacher(source: Path, tokens: np.ndarray, settings: Settings, progress: Progress) -> Teacher:
    model, _ = checkpoint.load_lazy(source)
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)  # MLX's CPU backend is slow or incomplete in half precision
    use_cpu_kernels(model)
    model.source = None
    teacher = teach(model, tokens, settings.top, progress)
    del model
    mx.clear_cache()
    return teacher


def differentiable(opened: Container, progress: Progress) -> tuple[ExpertStore, nn.Module]:
    """The converted model in float32 with its experts decoded, their gains parameters; and the store of its records."""
    classes = models.model_classes(opened.spec)
    model, _ = load_model(opened.directory, True, model_config=NOT_RUN, get_model_classes=classes)
    model.update_modules(tree_unflatten([(path, _dense(m)) for path, m in _quantized(model)]))
    model.set_dtype(mx.float32)
    layers = models.record_layers(model)
    store = ExpertStore(opened, [layer._kind for layer in layers])
    total, swapped = sum(spec.experts for spec in opened.spec.layers), []
    for index, layer in enumerate(layers):
        experts = [_decoded(opened, store, index, e) for e in range(opened.spec.layers[index].experts)]
        swapped.append((opened.spec.layers[index].path, GainedExperts(layer._kind, experts)))
        mx.eval(swapped[-1][1].held())
        progress("decoding experts", sum(s.experts for s in opened.spec.layers[: index + 1]), total)
    model.update_modules(tree_unflatten(swapped))
    mx.eval(model.parameters())
    return store, model


def _quantized(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in checkpoint.named_modules(model):
        if type(module) in (nn.QuantizedLinear, nn.QuantizedEmbedding):
            yield path, module


def _dense(module: nn.Module) -> nn.Module:
    """The layer that a quantized one stands for: its product has a fast gradient on every backend."""
    parts = (module["weight"], module["scales"], module.get("biases"), module.group_size, module.bits, module.mode)
    weight = mx.dequantize(*parts).astype(mx.float32)
    out: nn.Module
    if type(module) is nn.QuantizedEmbedding:
        out = nn.Embedding(1, 1)
    else:
        out = nn.Linear(1, 1, bias="bias" in module)
        if "bias" in module:
            out.bias = module["bias"]
    out.weight = weight
    return out


def _record(opened: Container, store: ExpertStore, layer: int, expert: int) -> tuple[np.ndarray, trellis.Record]:
    """A record's bytes, checked, and its parts as views of them."""
    spec = opened.spec.layers[layer]
    data = np.empty(spec.record_bytes, np.uint8)
    store.read(layer, [expert], [data])
    return data, trellis.parse(data, spec.shapes, spec.bias, f"{spec.file}, expert {expert}")


def _decoded(opened: Container, store: ExpertStore, layer: int, expert: int) -> list[Decoded]:
    spec = opened.spec.layers[layer]
    data, _ = _record(opened, store, layer, expert)
    return decoded(data, spec.shapes, spec.bias, f"{spec.file}, expert {expert}")


def trainable(model: nn.Module, opened: Container) -> dict[str, str | None]:
    """Paths of what is trained: gains (None), and norms with the name of the file that holds them."""
    files = {name: file for file, tensors in _rest_tensors(opened).items() for name in tensors}
    held = dict(tree_flatten(model.parameters()))
    experts = tuple(f"{layer.path}." for layer in opened.spec.layers)
    out: dict[str, str | None] = {n: None for n in held if n.startswith(experts) and n.split(".")[-1] in GAINS}
    norms = [path for path, m in checkpoint.named_modules(model) if "norm" in type(m).__name__.lower()]
    for path in norms:
        for name in (f"{path}.weight", f"{path}.bias"):
            if name in files and name in held and held[name].ndim == 1:
                out[name] = files[name]
    return out


def _rest_tensors(opened: Container) -> dict[str, dict[str, mx.array]]:
    """Lazy tensors of every file that holds no experts, by file and name."""
    experts = {layer.file for layer in opened.spec.layers}
    files = [n for n in opened.files if n.endswith(".safetensors") and n not in experts]
    return {n: cast(dict[str, mx.array], mx.load(str(opened.directory / n))) for n in files}


# ---- back into files


def as_stored(gain: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """A gain times its factor as float16, within its normal range; what is 0 or smaller than normal is not raised."""
    start = gain.astype(np.float32)
    least = np.minimum(start, SMALLEST_GAIN)
    return np.clip(start * factor, least, LARGEST_GAIN).astype(np.float16)


def put_gains(record: trellis.Record, factors: list[dict[str, np.ndarray]]) -> None:
    """Multiply a record's gains where they stand, so that no other byte of it changes.

    Args:
        record: parsed from a writable record.
        factors: per matrix "row_gain" (rows,) and "block_gain" (C / 16,), the latter in the model's column order.
    """
    for matrix, factor in zip(record.matrices, factors, strict=True):
        matrix.block_gain[:] = as_stored(matrix.block_gain, in_stored_order(factor["block_gain"], matrix.order))
        if matrix.row_gain is not None:
            matrix.row_gain[: matrix.rows] = as_stored(matrix.row_gain[: matrix.rows], factor["row_gain"])


def norm_as_stored(start: mx.array, factor: mx.array) -> mx.array:
    """A norm's weight times its factor, in the type that it is stored in."""
    return (start.astype(mx.float32) * factor).astype(start.dtype)


def _round(model: nn.Module, names: dict[str, str | None], opened: Container, factors: dict[str, mx.array]) -> None:
    """Give the model gains and norms as files will hold them."""
    tensors = _rest_tensors(opened)
    held = dict(tree_flatten(model.parameters()))
    rounded = []
    for name, file in names.items():
        if file is None:  # the model holds start values times factors: only their rounding is missing
            rounded.append((name, held[name].astype(mx.float16).astype(mx.float32)))
        else:
            rounded.append((name, norm_as_stored(tensors[file][name], factors[name]).astype(mx.float32)))
    model.update(tree_unflatten(rounded))
    mx.eval(model.parameters())


def write_back(
    opened: Container, store: ExpertStore, factors: dict[str, mx.array], names: dict[str, str | None]
) -> None:
    """Write the converted model anew with its gains and norms multiplied; the new one takes the old one's place whole.

    Raises:
        OSError: no room, or as the system says. The old model stands as it was.
    """
    changed = {file for file in names.values() if file}
    written = {layer.file for layer in opened.spec.layers} | changed
    container.check_space(opened.directory, sum(opened.files[name]["bytes"] for name in written))
    with container.staged_directory(opened.directory, overwrite=True) as staged:
        for name in opened.files:
            if name not in written:
                _link(opened.directory / name, staged / name)
        for name, tensors in _rest_tensors(opened).items():
            if name in changed:
                new = {n: norm_as_stored(a, factors[n]) if names.get(n) == name else a for n, a in tensors.items()}
                write_shard(staged / name, new)
        for index, layer in enumerate(opened.spec.layers):
            records = _new_records(opened, store, index, factors)
            container_writer.write_experts_file(staged, layer, opened.spec.alignment, records)
        container_writer.write_manifest(staged)


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # a file system without hard links
        shutil.copyfile(old, new)


def _new_records(
    opened: Container, store: ExpertStore, layer: int, factors: dict[str, mx.array]
) -> Iterator[np.ndarray]:
    spec = opened.spec.layers[layer]
    arrays = [{g: np.array(factors[f"{spec.path}.matrices.{m}.{g}"]) for g in GAINS} for m in range(len(spec.matrices))]
    for expert in range(spec.experts):
        data, record = _record(opened, store, layer, expert)
        put_gains(record, [{g: a[g][expert] for g in GAINS} for a in arrays])
        yield data
