"""A checkpoint as coded records: of a dense model's decoder layers, or of the experts of a quantized mixture.

Codec tiny-qmoe rounds a dense model's matrices to 8-bit levels first; lossless keeps every array as it was shipped,
also outside of the records. How long a record is shows only when it has been coded: the container's words come last.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors.numpy import save

from tiny_qmoe_mlx.codecs import affine, levels, packed, tuples
from tiny_qmoe_mlx.codecs.affine import Packing
from tiny_qmoe_mlx.container_writer import write_experts_file
from tiny_qmoe_mlx.conversion import layerwise, rest, unfinished
from tiny_qmoe_mlx.conversion.affine import MOST_PADDING, affine_packing, affine_records
from tiny_qmoe_mlx.conversion.expert_pass import groups
from tiny_qmoe_mlx.conversion.settings import Settings
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.hub import client as hub
from tiny_qmoe_mlx.original import checkpoint
from tiny_qmoe_mlx.original.shipped import dequantize_rest
from tiny_qmoe_mlx.original.source import computed
from tiny_qmoe_mlx.spec import (
    ALIGNMENTS,
    FORMAT_VERSION,
    LOSSLESS,
    MATRIX_NAMES,
    TINY,
    LayerSpec,
    ModelSpec,
    bits_per_weight,
    expert_file_name,
)
from tiny_qmoe_mlx.staging import atomic_file

Progress = Callable[[str, int, int], None]
Arrays = dict[str, np.ndarray]
BEFORE_LAYERS = -1
ONLY = ("group", "coder")  # settings of codec tiny-qmoe alone


@dataclass(frozen=True)
class Part:
    """What of a decoder layer is coded: the module that its records stand for, (name, rows, columns) and packing of its
    matrices, how many records, and a function that gives each record's arrays.
    """

    path: str
    matrices: tuple[tuple[str, int, int], ...]
    packing: tuple[Packing, ...]
    experts: int
    records: Callable[[], Iterator[list[Arrays]]]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(rows, columns) for _, rows, columns in self.matrices]

    @property
    def whole(self) -> bool:
        return tuple(name for name, _, _ in self.matrices) not in MATRIX_NAMES

    @property
    def expanded(self) -> int:
        """Bytes of a record's arrays as they are."""
        return affine.layout(tuple(self.shapes), self.packing)[1]


@dataclass
class Job:
    """A conversion on its way. facts: of each finished layer what `LayerSpec` cannot know before, plain values."""

    model: nn.Module
    settings: Settings
    directory: Path
    progress: Progress
    layers: list[tuple[str, nn.Module]]
    parts: list[Part | None]
    alignment: int = 0
    table: np.ndarray | None = None
    facts: list[dict[str, Any]] = field(default_factory=list)


def convert(located: hub.Located, settings: Settings, directory: Path, name: str, progress: Progress) -> dict[str, Any]:
    """Write everything but report and manifest into an unfinished directory, or what an earlier run left to do.

    Args:
        located: where the original lies; name: what it is called in config.json.
        settings: of codec tiny-qmoe or lossless.

    Returns:
        How many planes of the records, and bytes of them, are coded by which method.

    Raises:
        FormatError: a checkpoint that the codec does not take.
        ValueError: weights that are not finite.
        OSError: the disk is full.
    """
    unfinished.agree(directory, {"settings": asdict(settings), "source": hub.fingerprint(located)}, dict)
    model, config = checkpoint.load_lazy(located.directory)
    job = _job(model, settings, directory, progress)
    state = unfinished.load_state(directory)
    finished, job.facts = state[:2] if state else (BEFORE_LAYERS - 1, job.facts)
    if settings.coder == "tuples" and settings.codec == TINY:
        job.table = _table(located, settings, directory)
    if finished < BEFORE_LAYERS:
        _write_top(job)
        unfinished.save_state(directory, BEFORE_LAYERS, job.facts, {})
    for index in range(len(job.layers)):
        if index > finished:
            job.progress("coding layers", index, len(job.layers))
            _write_layer(job, index)
            unfinished.save_state(directory, index, job.facts, {})
    job.progress("coding layers", len(job.layers), len(job.layers))
    spec = _spec(job, name, located)
    bits, quantization = (16, _shipped(config, job)) if settings.codec == LOSSLESS else (settings.rest_bits, None)
    rest.write_words(located.directory, config, spec, bits, directory, quantization)
    return _methods(job.facts)


def _job(model: nn.Module, settings: Settings, directory: Path, progress: Progress) -> Job:
    if settings.codec == TINY:
        dequantize_rest(model)
    layers = layerwise.decoder_layers(model)
    parts = find_parts(model, layers, settings)
    job = Job(model, settings, directory, progress, layers, parts)
    least = min(part.expanded for part in parts if part) // 2  # they shrink, but hardly to less
    job.alignment = next((a for a in ALIGNMENTS if a <= MOST_PADDING * least), ALIGNMENTS[-1])
    return job


def made(settings: Settings) -> dict[str, Any]:
    """The settings that mean something to the codec."""
    if settings.codec == LOSSLESS:
        return {}
    return {"rest_bits": settings.rest_bits, "group": settings.group, "coder": settings.coder}


# ---- what is coded


def find_parts(model: nn.Module, layers: list[tuple[str, nn.Module]], settings: Settings) -> list[Part | None]:
    """The part of each decoder layer: a dense layer's matrices, or, of a mixture, its experts alone.

    Raises:
        FormatError: a mixture with codec tiny-qmoe, or one whose experts are not quantized; no matrices at all.
    """
    experts = any(isinstance(m, tuple(checkpoint.MATRIX_NAMES)) for _, m in checkpoint.named_modules(model))
    if experts and settings.codec == TINY:
        raise FormatError(
            "[convert] codec tiny-qmoe takes dense models, this is a mixture of experts; take --codec trellis."
        )
    if not experts:
        found = [_dense_part(path, layer, settings) for path, layer in layers]
    else:
        own = {e.layer: _expert_part(e) for e in checkpoint.expert_layers(model)}
        found = [own.get(index) for index in range(len(layers))]
    if not any(found):
        raise FormatError("[convert] the model's decoder layers should have linear layers, they have none.")
    return found


def _dense_part(path: str, layer: nn.Module, settings: Settings) -> Part | None:
    named = [(name, m) for name, m in checkpoint.named_modules(layer) if type(m) in (nn.Linear, nn.QuantizedLinear)]
    packing = tuple(_packing(f"{path}.{name}", module, settings) for name, module in named)
    matrices = tuple((name, *_shape(module)) for name, module in named)

    def records() -> Iterator[list[Arrays]]:
        yield [_arrays(f"{path}.{n}", m, p) for (n, m), p in zip(named, packing, strict=True)]

    return Part(path, matrices, packing, 1, records) if named else None


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = module["weight"].shape
    return rows, columns * 32 // module.bits if "scales" in module else columns


def _packing(path: str, module: nn.Module, settings: Settings) -> Packing:
    if settings.codec == TINY:
        return Packing("levels", 8, settings.group, "float16" if settings.group else "float32")
    weight = module["weight"]
    own = Packing("plain", 8 * weight.itemsize, 0, _name(weight))
    if "scales" in module:
        own = Packing(module.mode, module.bits, module.group_size, _name(module["scales"]))
    problem = own.problem(_shape(module)[1])
    if problem or "global_scale" in module:
        raise FormatError(f"[{path}] cannot be kept by codec lossless: {problem or 'a scale of the whole matrix'}.")
    return own


def _name(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def _arrays(path: str, module: nn.Module, packing: Packing) -> Arrays:
    """A matrix's arrays as records hold them, read now."""
    names = [name for name in ("weight", "scales", "biases") if name in module]
    for name in names:
        checkpoint.require_finite(f"{path}.{name}", module[name])
    if packing.mode == "levels":
        return levels.quantize(computed(module["weight"].astype(mx.float32)), packing.group_size)
    return {name: _stored(module[name]) for name in names}


def _stored(array: mx.array) -> np.ndarray:
    return computed(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def _expert_part(found: checkpoint.ExpertLayer) -> Part:
    if not hasattr(found.module[found.names[0]], "group_size"):
        raise FormatError(
            f"[{found.path}] codec lossless keeps the codes of quantized experts, these are not quantized; take "
            "--codec trellis, or affine."
        )
    packing, shapes = affine_packing(found, 0), checkpoint.matrix_shapes(found)
    used = affine.layout(tuple((rows, columns) for _, rows, columns in shapes), packing)[1]
    spec = checkpoint.layer_spec(found, used, packing)

    def records() -> Iterator[list[Arrays]]:
        for group in groups(found):
            for record in affine_records(found, group, spec):
                yield [m.arrays for m in affine.parse(record, spec.shapes, packing, found.path)]

    return Part(found.path, tuple(shapes), packing, checkpoint.expert_count(found), records)


# ---- the table of 4-tuples


def _table(located: hub.Located, settings: Settings, directory: Path) -> np.ndarray:
    """The model's table, made in a pass of its own the first time: it counts the codes of all layers."""
    path = directory / tuples.FILE
    if not path.exists():
        table = tuples.make_table(_sequences(located, settings))
        with atomic_file(path) as file:
            file.write(save({tuples.TENSOR: table}))
    return tuples.read_table(directory)


def _sequences(located: hub.Located, settings: Settings) -> Iterator[np.ndarray]:
    model, _ = checkpoint.load_lazy(located.directory)
    dequantize_rest(model)
    layers = layerwise.decoder_layers(model)
    for part, (_, layer) in zip(find_parts(model, layers, settings), layers, strict=True):
        for record in part.records() if part else ():
            yield from (arrays["weight"].reshape(-1) for arrays in record)
        rest.forget(layer)


# ---- files


def _write_top(job: Job) -> None:
    """All that is in no decoder layer: quantized by MLX with tiny-qmoe, as it was shipped with lossless."""
    inside = tuple(f"{path}." for path, _ in job.layers)
    rest.require_finite(rest.outside(job.model, inside))
    if job.settings.codec == TINY:
        within = {path for path, _ in checkpoint.named_modules(job.model) if path.startswith(inside)}
        rest.quantize(job.model, "", job.model, job.settings.rest_bits, within)
    rest.write_shard(job.directory / rest.TOP, rest.outside(job.model, inside))


def _write_layer(job: Job, index: int) -> None:
    """One decoder layer: its records, and the rest of its arrays."""
    path, layer = job.layers[index]
    part, coded = job.parts[index], set[str]()
    if part is not None:
        coded = {f"{part.path}.{name}.{key}" for name, _, _ in part.matrices for key in ("weight", "scales", "biases")}
        coded |= {f"{part.path}.{n}.bias" for n, _, _ in part.matrices if part.packing[0].bias}
        job.facts.append({"layer": index, **_write_records(job, index, part)})
    kept = {f"{path}.{n}": a for n, a in rest.weights(layer).items() if f"{path}.{n}" not in coded}
    rest.require_finite(kept)
    rest.write_shard(job.directory / rest.shard_name(index), kept)
    rest.forget(layer)


def _write_records(job: Job, index: int, part: Part) -> dict[str, Any]:
    """Code a layer's records and write their file; what there is to remember of it."""
    coder = job.settings.coder if job.settings.codec == TINY else "rans"
    records = [packed.pack(m, part.shapes, part.packing, coder, job.table) for m in part.records()]
    size = -(-max(map(len, records)) // job.alignment) * job.alignment
    padded = (np.concatenate([r, np.zeros(size - len(r), np.uint8)]) for r in records)
    write_experts_file(job.directory, _layer_spec(part, index, size, _slot(job, part, size)), job.alignment, padded)
    counted = np.zeros((3, 2), np.int64)
    for method, length in (entry for record in records for entry in packed.methods(record)):
        counted[method] += 1, length
    return {"record_bytes": size, "methods": counted.tolist()}


def _slot(job: Job, part: Part, largest: int) -> int:
    """Bytes that a record takes in memory: of whole layers, as much as the largest of all; of experts, expanded."""
    return largest if part.whole else -(-part.expanded // job.alignment) * job.alignment


def _layer_spec(part: Part, index: int, size: int, slot: int) -> LayerSpec:
    return LayerSpec(
        path=part.path,
        layer=index,
        file=expert_file_name(index),
        experts=part.experts,
        record_bytes=size,
        matrices=part.matrices,
        bias=part.packing[0].bias is not None,
        packing=part.packing,
        slot_bytes=slot,
    )


def _spec(job: Job, name: str, located: hub.Located) -> ModelSpec:
    """The container's words, from the records that were written."""
    largest = max(fact["record_bytes"] for fact in job.facts)
    layers = []
    for fact in job.facts:
        part = job.parts[fact["layer"]]
        assert part is not None
        slot = _slot(job, part, largest)
        layers.append(_layer_spec(part, fact["layer"], fact["record_bytes"], slot))
    return ModelSpec(
        format_version=FORMAT_VERSION,
        codec=job.settings.codec,
        bits=round(bits_per_weight(layers, job.alignment), 4),
        alignment=job.alignment,
        length=0,
        seed=0,
        layers=tuple(layers),
        source={"model": hub.original_name(name), "revision": located.revision},
        calibration={"source": "none", "tokens": 0},
    )


def _shipped(config: dict[str, Any], job: Job) -> dict[str, Any] | None:
    """The checkpoint's own quantization, for what is in no record."""
    own = config.get("quantization")
    inside = tuple(f"{path}." for path, _ in job.layers) if any(p and p.whole for p in job.parts) else ()
    return {k: v for k, v in own.items() if not k.startswith(inside or "\0")} if isinstance(own, dict) else None


def _methods(facts: list[dict[str, Any]]) -> dict[str, Any]:
    total = np.sum([fact["methods"] for fact in facts], axis=0).tolist()
    return {
        word: {"planes": planes, "bytes": size}
        for word, (planes, size) in zip(("no coder", "tuples", "rans"), total, strict=True)
    }
