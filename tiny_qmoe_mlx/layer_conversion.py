"""One decoder layer's turn in a conversion: the reference stream through it as it is, its weights and experts written,
then the compressed stream through what was written.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tiny_qmoe_mlx import checkpoint, layerwise, rest, unfinished
from tiny_qmoe_mlx.calibrate import LayerTokens
from tiny_qmoe_mlx.container import write_experts_file
from tiny_qmoe_mlx.expert_kind import expert_kind
from tiny_qmoe_mlx.expert_pass import Sums, compressed_records, original_outputs, summed
from tiny_qmoe_mlx.hub_shards import SourceShards
from tiny_qmoe_mlx.hub_upload import Uploader
from tiny_qmoe_mlx.layers import use_cpu_kernels
from tiny_qmoe_mlx.settings import Settings
from tiny_qmoe_mlx.spec import LayerSpec, ModelSpec
from tiny_qmoe_mlx.staging import check_space

Progress = Callable[[str, int, int], None]  # what, done, total
BEFORE_LAYERS = -1


@dataclass
class Job:
    """A conversion on its way.

    found, specs: expert layers by the index of their decoder layer. streams: float32 (sequences, length, d) by name,
    "reference" and "compressed", after the layer `finished`; none without calibration. facts: a plain object per
    finished layer. shards: where the weights come from while they are needed. uploader: where finished files go.
    """

    model: nn.Module
    settings: Settings
    spec: ModelSpec
    directory: Path
    progress: Progress
    found: dict[int, checkpoint.ExpertLayer]
    kept: set[str]
    shards: SourceShards | None = None
    uploader: Uploader | None = None
    experts: dict[int, layerwise.Experts] = field(default_factory=dict)
    finished: int = BEFORE_LAYERS - 1
    streams: dict[str, np.ndarray] = field(default_factory=dict)
    facts: list[dict] = field(default_factory=list)

    def fetch(self, layer: int | None) -> None:
        """Have a layer's weights on the disk (None: those of no layer)."""
        if self.shards:
            self.shards.ensure(self.shards.names(layer), self.progress)

    def save(self, layer: int, *files: Path) -> None:
        """Write down that everything up to a layer is finished, and send its files on."""
        unfinished.save_state(self.directory, layer, self.facts, self.streams)
        self.finished = layer
        self.send(*files)

    def send(self, *files: Path) -> None:
        """Upload finished files in the background; nothing where no upload was asked for."""
        if self.uploader:
            for file in files:
                self.uploader.push(file)

    @property
    def experts_done(self) -> int:
        return sum(s.experts for s in self.spec.layers if s.layer <= self.finished)


def convert_layer(job: Job, index: int, path: str, layer: nn.Module, call: layerwise.Call | None) -> None:
    """Finish one decoder layer.

    Args:
        index: its place among the decoder layers; path: its module's in the model.
        call: the layer's; None without calibration.

    Raises:
        ValueError: weights that are not finite.
        OSError: the disk is full, or the hub refuses.
    """
    job.fetch(index)
    found, spec = job.found.pop(index, None), next((s for s in job.spec.layers if s.layer == index), None)
    original = layer.parameters()
    for name, array in rest.weights(layer).items():
        checkpoint.require_finite(f"{path}.{name}", array)
    reference = _reference(job, layer, call, found, spec) if call else None
    layer.update(original)
    rest.quantize(job.model, path, layer, job.settings.rest_bits, job.kept)
    written = rest.weights(layer)
    if found is None or spec is None:
        compressed = _forward(layer, call, job.streams["compressed"]) if call else None
    else:
        check_space(job.directory, spec.data_bytes)
        compressed = _compress(job, layer, call, found, spec, reference)
    shard = job.directory / rest.shard_name(index)
    rest.write_shard(shard, {f"{path}.{name}": array for name, array in written.items()})
    if reference is not None and compressed is not None:
        job.facts.append({"layer": index, "experts": spec is not None, **_drift(reference.output, compressed)})
        job.streams = {"reference": reference.output, "compressed": compressed}
    rest.forget(layer)
    job.save(index, shard, *([job.directory / spec.file] if spec else []))


@dataclass
class _Reference:
    """The reference stream after a layer, float32 (sequences, length, d), and without the layer's experts."""

    output: np.ndarray
    base: np.ndarray | None


def _as_float32(layer: nn.Module) -> None:
    if mx.default_device() == mx.cpu:
        layer.set_dtype(mx.float32)  # MLX's CPU backend is slow or incomplete in half precision
    use_cpu_kernels(layer)


def _forward(layer: nn.Module, call: layerwise.Call, stream: np.ndarray) -> np.ndarray:
    _as_float32(layer)
    return layerwise.run(call, stream)


def _reference(
    job: Job,
    layer: nn.Module,
    call: layerwise.Call,
    found: checkpoint.ExpertLayer | None,
    spec: LayerSpec | None,
) -> _Reference:
    stream = job.streams["reference"]
    if found is None or spec is None:
        return _Reference(_forward(layer, call, stream), None)
    _as_float32(layer)
    kind = expert_kind(spec, job.spec, found.module.activation)
    routed = layerwise.route(call, job.experts[found.layer], stream, kind.matrices[-1][1])
    outputs = original_outputs(found, kind, routed)
    return _Reference(layerwise.finish(call, job.experts[found.layer], stream, routed, outputs), routed.base)


def _compress(
    job: Job,
    layer: nn.Module,
    call: layerwise.Call | None,
    found: checkpoint.ExpertLayer,
    spec: LayerSpec,
    reference: _Reference | None,
) -> np.ndarray | None:
    """Write a layer's experts, and carry the compressed stream through them."""
    kind = expert_kind(spec, job.spec, found.module.activation)
    if call is None or reference is None:
        records = compressed_records(found, spec, kind, None)
        write_experts_file(job.directory, spec, job.spec.alignment, _counted(job, records))
        return None
    stream = job.streams["compressed"]
    _as_float32(layer)
    routed = layerwise.route(call, job.experts[found.layer], stream, kind.matrices[-1][1])
    tokens = LayerTokens.of(routed, reference.base if job.settings.drift else None)
    sums = Sums(routed, kind.matrices[-1][1])
    records = summed(compressed_records(found, spec, kind, tokens), kind, sums)
    write_experts_file(job.directory, spec, job.spec.alignment, _counted(job, records))
    return layerwise.finish(call, job.experts[found.layer], stream, routed, sums.values)


def _counted(job: Job, records: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    total, done = sum(s.experts for s in job.spec.layers), job.experts_done
    for number, record in enumerate(records, 1):
        yield record
        job.progress("quantizing experts", done + number, total)


def _drift(reference: np.ndarray, compressed: np.ndarray) -> dict[str, float]:
    """How far the compressed stream has drifted: the median token's relative squared error."""
    error = np.square(compressed - reference).sum(-1)
    return {"relative_error": float(np.median(error / np.maximum(np.square(reference).sum(-1), 1e-30)))}
