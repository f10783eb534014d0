"""One decoder layer's turn in a conversion: the reference stream through it as it is, its weights and experts written,
then the compressed stream through what was written.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tiny_qmoe_mlx.container_writer import write_experts_file
from tiny_qmoe_mlx.conversion import layerwise, rest, unfinished
from tiny_qmoe_mlx.conversion.affine import affine_records
from tiny_qmoe_mlx.conversion.calibrate import LayerTokens
from tiny_qmoe_mlx.conversion.expert_pass import Sums, compressed_records, groups, original_outputs, summed
from tiny_qmoe_mlx.conversion.qmoe import qmoe_records, settled, spooled
from tiny_qmoe_mlx.conversion.settings import Settings
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.expert_kind import ExpertKind, expert_kind
from tiny_qmoe_mlx.hub.client import HubError
from tiny_qmoe_mlx.hub.shards import SourceShards
from tiny_qmoe_mlx.hub.upload import Uploader
from tiny_qmoe_mlx.original import checkpoint
from tiny_qmoe_mlx.spec import AFFINE, QMOE, LayerSpec, ModelSpec
from tiny_qmoe_mlx.staging import check_space

Progress = Callable[[str, int, int], None]  # what, done, total
BEFORE_LAYERS = -1


@dataclass
class Job:
    """A conversion on its way.

    spec: the container's words. found, experts: expert layers, and their stand-ins in the model, by the index of their
    decoder layer. kept: paths of what is not quantized. streams: float32 (sequences, length, d) by name,
    "reference" and "compressed", after the layer `finished`; none without calibration. facts: a plain object per
    finished layer. counted: bool (sequences, length), the tokens that a quantizer learns from; None for all. shards:
    where the weights come from while they are needed. uploader: where finished files go.
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
    counted: np.ndarray | None = None

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
        """Upload finished files in the background; nothing where no upload was asked for. What cannot be sent now is
        sent, or refused, when the model is whole.
        """
        if self.uploader is None:
            return
        for file in files:
            with contextlib.suppress(HubError):
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
    rest.require_finite(rest.weights(layer), f"{path}.")
    if found is None or spec is None:
        written, streams = _without_experts(job, path, layer, call)
    else:
        check_space(job.directory, spec.data_bytes)
        turn = _Turn(job, layer, path, call, found, spec, expert_kind(spec, job.spec, found.module.activation))
        written, streams = _uncalibrated(turn) if call is None else _calibrated(turn)
    shard = job.directory / rest.shard_name(index)
    rest.write_shard(shard, {f"{path}.{name}": array for name, array in written.items()})
    if streams:
        own = (streams["reference"] != job.streams["reference"]).any(-1)  # an encoder's layer passes others unchanged
        own |= not own.any()
        drift = _drift(streams["reference"][own], streams["compressed"][own])
        job.facts.append({"layer": index, "experts": spec is not None, "relative_error": drift})
    rest.forget(layer)
    job.streams = streams
    job.save(index, shard, *([job.directory / spec.file] if spec else []))


Finished = tuple[dict[str, mx.array], dict[str, np.ndarray]]  # a layer's weights as they are written, and the streams


def _without_experts(job: Job, path: str, layer: nn.Module, call: layerwise.Call | None) -> Finished:
    original, streams = layer.parameters(), {}
    if call:
        layerwise.as_float32(layer)
        streams["reference"] = layerwise.run(call, job.streams["reference"])
        layer.update(original)
    rest.quantize(job.model, path, layer, job.settings.rest_bits, job.kept)
    written = rest.weights(layer)
    if call:
        layerwise.as_float32(layer)
        streams["compressed"] = layerwise.run(call, job.streams["compressed"])
    return written, streams


@dataclass
class _Turn:
    """A decoder layer with experts, and all that its turn needs."""

    job: Job
    layer: nn.Module
    path: str
    call: layerwise.Call | None
    found: checkpoint.ExpertLayer
    spec: LayerSpec
    kind: ExpertKind

    def write(self, records: Iterable[np.ndarray]) -> None:
        job, counted = self.job, _counted(self.job, records)
        if job.spec.codec != QMOE:
            write_experts_file(job.directory, self.spec, job.spec.alignment, counted)
            return
        with spooled(counted, job.directory, job.spec.alignment) as (size, padded):
            job.spec = settled(job.spec, {self.spec.layer: size})
            self.spec = replace(self.spec, record_bytes=size)
            write_experts_file(job.directory, self.spec, job.spec.alignment, padded)

    def records(self, tokens: LayerTokens | None) -> Iterable[np.ndarray]:
        """The layer's experts, compressed."""
        if self.job.spec.codec == QMOE:
            return qmoe_records(self.found, self.kind, tokens)
        return compressed_records(self.found, self.spec, self.kind, tokens)

    def quantize_rest(self) -> dict[str, mx.array]:
        rest.quantize(self.job.model, self.path, self.layer, self.job.settings.rest_bits, self.job.kept)
        return rest.weights(self.layer)


def _uncalibrated(turn: _Turn) -> Finished:
    if turn.job.spec.codec == AFFINE:
        turn.write(record for group in groups(turn.found) for record in affine_records(turn.found, group, turn.spec))
    else:
        turn.write(turn.records(None))
    return turn.quantize_rest(), {}


def _calibrated(turn: _Turn) -> Finished:
    """Both streams up to the experts, the original experts over both, the records, both streams on."""
    job, experts, width = turn.job, turn.job.experts[turn.found.layer], turn.kind.matrices[-1][1]
    assert turn.call is not None
    streams, original = job.streams, turn.layer.parameters()
    layerwise.as_float32(turn.layer)
    reference = layerwise.route(turn.call, experts, streams["reference"], width)
    if not np.isfinite(reference.x).all():
        raise FormatError(
            f"[model] what reaches the experts of {turn.found.path} should be finite numbers on the calibration text, "
            "it is not; the original's weights are damaged, or the text is no text of this model."
        )
    turn.layer.update(original)
    written = turn.quantize_rest()
    layerwise.as_float32(turn.layer)
    compressed = layerwise.route(turn.call, experts, streams["compressed"], width)

    outputs, if_original = original_outputs(turn.found, turn.kind, [reference, compressed])
    after = layerwise.finish(turn.call, experts, streams["reference"], reference, outputs)
    missing = None
    if job.settings.drift and reference.linear and compressed.linear:
        missing = after.reshape(len(compressed.x), -1) - compressed.base - if_original
    tokens = _learned_from(compressed, missing, job.counted, job.spec.codec == QMOE)
    tokens.corrected = job.settings.drift
    del if_original, outputs, missing
    sums = Sums(compressed, width)
    turn.write(summed(turn.records(tokens), turn.kind, sums))
    carried = layerwise.finish(turn.call, experts, streams["compressed"], compressed, sums.values)
    return written, {"reference": after, "compressed": carried}


def _learned_from(
    routed: layerwise.Routed, missing: np.ndarray | None, counted: np.ndarray | None, by_expert: bool
) -> LayerTokens:
    """The tokens that a layer's experts are quantized for: those that reach one, and of these the counted ones.

    Args:
        by_expert: keep the others, and say which are counted: they take room among an expert's first tokens.
    """
    kept, later = routed.counts.any(1), None
    if counted is not None and by_expert:
        later = counted.reshape(-1)[kept]
    elif counted is not None:
        kept &= counted.reshape(-1)
    if kept.all():
        return LayerTokens(routed.x, routed.chosen, routed.weight, missing, counted=later)
    missing = None if missing is None else missing[kept]
    return LayerTokens(routed.x[kept], routed.chosen[kept], routed.weight[kept], missing, counted=later)


def _counted(job: Job, records: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    total, done = sum(s.experts for s in job.spec.layers), job.experts_done
    for number, record in enumerate(records, 1):
        yield record
        job.progress("quantizing experts", done + number, total)


def _drift(reference: np.ndarray, compressed: np.ndarray) -> float:
    """How far the compressed stream has drifted: the median token's relative squared error."""
    with np.errstate(over="ignore", invalid="ignore"):  # of weights that are hardly finite: the report says so
        error = np.square(compressed - reference).sum(-1)
        return float(np.median(error / np.maximum(np.square(reference).sum(-1), 1e-30)))
