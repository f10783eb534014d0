"""A checkpoint's experts compressed, the rest quantized by MLX, one directory written.

Calibration tokens flow decoder layer by decoder layer, in two streams: what the original computes, and what the layers
compressed so far make of it. Each layer is finished (its experts' file, its other weights, both streams after it)
before the next one is read, so that one layer is in memory at a time and a stopped conversion goes on where it was.
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import xxhash
from mlx.utils import tree_unflatten
from threadpoolctl import threadpool_limits

from tiny_qmoe_mlx import masked_spans, native, paths, process
from tiny_qmoe_mlx.container import MANIFEST, open_model
from tiny_qmoe_mlx.container_writer import write_manifest
from tiny_qmoe_mlx.conversion import coded, layerwise, rest, unfinished
from tiny_qmoe_mlx.conversion.layer import BEFORE_LAYERS, Job, Progress, convert_layer
from tiny_qmoe_mlx.conversion.planning import plan_layers
from tiny_qmoe_mlx.conversion.qmoe import settle_finished
from tiny_qmoe_mlx.conversion.settings import Settings
from tiny_qmoe_mlx.conversion.text import calibration_tokens, can_write
from tiny_qmoe_mlx.disk_errors import weights_of
from tiny_qmoe_mlx.errors import BudgetError, FormatError
from tiny_qmoe_mlx.hub import client as hub
from tiny_qmoe_mlx.hub.shards import SourceShards
from tiny_qmoe_mlx.hub.upload import Uploader
from tiny_qmoe_mlx.masked_spans import is_encoder_decoder
from tiny_qmoe_mlx.original import checkpoint, dense
from tiny_qmoe_mlx.original.shipped import dequantize_rest
from tiny_qmoe_mlx.original.source import computed
from tiny_qmoe_mlx.report import write as report
from tiny_qmoe_mlx.spec import AFFINE, CODEC, CODED, QMOE, ModelSpec
from tiny_qmoe_mlx.staging import check_space, check_target, clear_leftovers, disk_full
from tiny_qmoe_mlx.vocabulary import check_ids


def convert(
    hf_path: str | Path,
    mlx_path: str | Path,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
    revision: str | None = None,
    stream_shards: bool = False,
    upload_repo: str | None = None,
    finetune: bool = False,
    extent: report.Extent | None = None,
) -> Path:
    """Convert a checkpoint, or go on where an earlier run with the same settings stopped.

    Args:
        hf_path: its directory or hub id.
        mlx_path: the directory to write; it appears when it is whole, until then `mlx_path`.partial grows.
        settings: how.
        overwrite: replace a converted model that stands there.
        progress: called with (what, done, total).
        revision: branch, tag or commit of a hub id.
        stream_shards: fetch a hub id's weights shard by shard, and keep a shard only while it is needed.
        upload_repo: hub id that each file is sent to as soon as it is finished.
        finetune: train gains and norms against the original at the end (finetune.py); also of a model that is whole.
        extent: how much of the converted model's quality is measured for its card; None for nothing.

    Returns:
        The directory written.

    Raises:
        FormatError: no such checkpoint, no experts in it, a calibration text that does not serve, or a conversion under
            way that was begun with other settings or from another source.
        ValueError: settings out of range, weights that are not finite; the process is a fork of one that has computed.
        OSError: the disk is full, or the output directory exists and is not ours; the hub refuses the upload.
    """
    process.enter("convert")
    settings.check()
    require_compiler()
    _check_together(settings, stream_shards, finetune)
    output = paths.real(mlx_path)  # whatever becomes of the current directory
    clear_leftovers(output)
    uploader = Uploader(upload_repo, overwrite=overwrite) if upload_repo else None
    whole = bool(uploader or finetune) and not overwrite and is_whole(output, str(hf_path))
    if not whole:
        check_target(output, overwrite)
    if uploader:
        uploader.check(output if whole else None)
    located, tokens = None, None
    if not whole:
        wanted = Wanted(str(hf_path), revision, stream_shards, output, overwrite, finetune)
        located, tokens = _write(wanted, settings, progress, uploader)
    elif finetune:
        located = hub.locate(str(hf_path), revision)
        config = checkpoint.read_config(located.directory)
        _check_kind(settings, config, finetune)
        tokens = _tokens(located, config, _decided(settings, located), progress)
    if finetune and located and tokens is not None:
        _improve(output, located, tokens, progress)
    if extent is not None and located and not stream_shards:
        _measure(output, located, extent, progress)
    if uploader:
        uploader.finish(output, progress)
    return output


def _check_together(settings: Settings, stream_shards: bool, finetune: bool) -> None:
    """Refuse options that exclude one another.

    Raises:
        ValueError: what to leave out.
    """
    if finetune and (stream_shards or settings.codec != CODEC or settings.calibration == "none"):
        raise ValueError(
            "[convert] finetuning needs the original on the disk, trellis records and calibration tokens; leave out "
            "--stream-shards, --codec and --calibration none."
        )
    if stream_shards and settings.codec in CODED:
        raise ValueError(f"[convert] codec {settings.codec} needs the original on the disk; leave out --stream-shards.")
    if stream_shards and (settings.layer_rates or settings.calibration in ("self", "auto")):
        raise ValueError(
            "[convert] with stream_shards every shard should be read once; leave out layer_rates (--layer-rates) "
            "and take calibration builtin, none or a file."
        )


@dataclass(frozen=True)
class Wanted:
    """From where to where: directory or hub id of the original and its revision, whether its weights come shard by
    shard; the directory to write, and whether it replaces a converted model; whether it is finetuned afterwards.
    """

    source: str
    revision: str | None
    stream_shards: bool
    output: Path
    overwrite: bool
    finetune: bool


def _write(
    wanted: Wanted, settings: Settings, progress: Progress, uploader: Uploader | None
) -> tuple[hub.Located, np.ndarray | None]:
    """Write the whole directory; where the original lies, and the calibration tokens."""
    output = wanted.output
    with unfinished.unfinished_directory(output, wanted.overwrite) as directory, _computing(wanted.source):
        try:
            located, shards = _open(wanted)
            config = checkpoint.read_config(located.directory)
            _check_kind(settings, config, wanted.finetune, wanted.stream_shards)
            settings = _decided(settings, located)
            if settings.codec in CODED:
                methods = coded.convert(located, settings, directory, wanted.source, progress)
                made = coded.made(settings)
                report.write_report(directory, located.directory, {"coding": methods}, made, output.name)
                write_manifest(directory)
                return located, None
            job, tokens, config = _job(located, settings, directory, progress, wanted.source)
            job.shards, job.uploader = shards, uploader
            job.send(*sorted(directory.glob("model*.safetensors")))
            check_space(output, sum(s.data_bytes for s in job.spec.layers if s.layer > job.finished))
            _run(job, tokens)
            rest.write_words(located.directory, config, job.spec, settings.rest_bits, directory)
            sizes = len({layer.record_bytes for layer in job.spec.layers})  # 1 where layers could not differ
            made = {k: v for k, v in asdict(settings).items() if k not in coded.ONLY} | {"record_sizes": sizes}
            made["calibration"] = Path(settings.calibration).name  # what is published names no directories
            report.write_report(directory, located.directory, {"layers": job.facts}, made, output.name)
            write_manifest(directory)
            if uploader:
                with contextlib.suppress(hub.HubError):  # `finish` sends what is missing, or says why it cannot
                    uploader.wait()
            if shards:
                shutil.rmtree(located.directory, ignore_errors=True)
        except OSError as error:
            raise disk_full(error, output) from error
    return located, tokens


def _check_kind(settings: Settings, config: dict, finetune: bool, stream_shards: bool = False) -> None:
    """Refuse what is not there for an encoder-decoder.

    Raises:
        ValueError: what to leave out.
    """
    if not is_encoder_decoder(config):
        return
    refused = {
        "--finetune-gains": finetune,
        "--stream-shards": stream_shards,
        "--layer-rates": settings.layer_rates,
        f"--calibration {settings.calibration}": settings.calibration == "self",
    }
    asked = [option for option, given in refused.items() if given]
    if asked:
        raise ValueError(f"[convert] {asked[0]} is not there for encoder-decoders as this one; leave it out.")


@contextlib.contextmanager
def _computing(source: str) -> Iterator[None]:
    """One thread of BLAS: the same bytes on every machine, and its threads spin where others need the cores. What MLX
    cannot read of the original is said in a sentence.
    """
    with threadpool_limits(1, "blas"), weights_of(source):
        yield


def require_compiler() -> None:
    """Refuse to convert without the C++ library.

    Raises:
        FormatError: what to install.
    """
    if not native.available():
        raise FormatError(
            "[convert] conversion needs the C++ library, which was not built because no C++ compiler was found; "
            "install one (on Debian: apt install g++, on macOS: xcode-select --install) and install tiny-qmoe-mlx "
            "again."
        )


def is_whole(directory: Path, name: str) -> bool:
    """Whether a directory is a converted model of this original already."""
    if not (directory / MANIFEST).is_file():
        return False
    return open_model(directory).spec.source["model"] == hub.original_name(name)


def _open(wanted: Wanted) -> tuple[hub.Located, SourceShards | None]:
    """Where the original lies, and its shards if they come one by one."""
    if not wanted.stream_shards:
        return hub.locate(wanted.source, wanted.revision), None
    if paths.expanded(wanted.source).exists():
        raise ValueError(
            f"[convert] --stream-shards fetches a hub id's weights, {wanted.source} is on this disk already."
        )
    directory = wanted.output.with_name(wanted.output.name + ".source")
    shards = SourceShards(wanted.source, directory, wanted.revision)
    return shards.located, shards


def _job(
    located: hub.Located,
    settings: Settings,
    directory: Path,
    progress: Progress,
    name: str,
) -> tuple[Job, np.ndarray | None, dict]:
    """The model with stand-ins for its experts, the tokens, and what an earlier run left.

    Returns:
        (job, tokens int32 (sequences, length) or None, the original's config).
    """
    model, config = checkpoint.load_lazy(located.directory)
    dequantize_rest(model)
    if not dense.is_mixture(model):
        dense.as_mixture(model)
    layers = checkpoint.expert_layers(model)
    tokens = _tokens(located, config, settings, progress, directory)
    spec = _plan(layers, settings, name, located, tokens, directory, progress)
    kept = rest.routers(model, layers)
    job = Job(model, settings, spec, directory, progress, {f.layer: f for f in layers}, kept)
    if tokens is not None and is_encoder_decoder(config):
        tokenizer = checkpoint.open_tokenizer(located.directory, config)
        job.counted = masked_spans.counted(tokens, masked_spans.sentinels(tokenizer), masked_spans.start_token(config))
    job.experts = {f.layer: layerwise.Experts() for f in layers}
    model.update_modules(tree_unflatten([(f.path, job.experts[f.layer]) for f in layers]))
    state = unfinished.load_state(directory)
    if state:
        job.finished, job.facts, job.streams = state
        if spec.codec == QMOE:
            job.spec = settle_finished(spec, directory, job.finished)
    return job, tokens, config


def _tokens(
    located: hub.Located, config: dict, settings: Settings, progress: Progress, directory: Path | None = None
) -> np.ndarray | None:
    """Calibration tokens; those of a text the model writes itself are kept in the unfinished directory.

    Raises:
        ValueError: one that the model does not have.
    """
    source = settings.calibration if settings.codec != AFFINE else "none"
    tokenizer = checkpoint.open_tokenizer(located.directory, config)
    sizes = (settings.sequences, settings.sequence_tokens, settings.seed)

    def make() -> np.ndarray | None:
        tokens = calibration_tokens(source, tokenizer, located.directory, *sizes, progress)
        if tokens is None or not is_encoder_decoder(config):
            return tokens
        return masked_spans.joined(masked_spans.mask_all(tokens.tolist(), tokenizer, config, settings.seed))

    tokens = unfinished.kept_tokens(directory, make) if directory and source == "self" else make()
    if tokens is not None:
        check_ids(config, tokens, f"calibration {source}")
    return tokens


def _decided(settings: Settings, located: hub.Located) -> Settings:
    """Calibration "auto" made up: text that the original writes where it fits this machine's memory, else ours."""
    if settings.calibration != "auto":
        return settings
    if is_encoder_decoder(checkpoint.read_config(located.directory)):
        return replace(settings, calibration="builtin")
    fits = settings.codec != AFFINE and can_write(located.directory, settings.sequences, settings.sequence_tokens)
    return replace(settings, calibration="self" if fits else "builtin")


def _improve(directory: Path, located: hub.Located, tokens: np.ndarray, progress: Progress) -> None:
    """Finetune a whole model, and note in its report what that gave."""
    from tiny_qmoe_mlx.finetune.gains import finetune_gains  # needed by few

    with weights_of(located.directory):
        found = finetune_gains(directory, located.directory, tokens, progress=progress)
    report.write_report(directory, located.directory, {"finetune": found})


def _measure(directory: Path, located: hub.Located, extent: report.Extent, progress: Progress) -> None:
    """Measure a whole model for its report; where its original cannot be beside it in memory, the report says so."""
    try:
        with weights_of(located.directory):
            quality = report.measure(directory, located.directory, None, extent, progress)
    except BudgetError as error:
        quality = {"not_measured": str(error)}
    report.write_report(directory, located.directory, quality)


def _plan(
    layers: list[checkpoint.ExpertLayer],
    settings: Settings,
    name: str,
    located: hub.Located,
    tokens: np.ndarray | None,
    directory: Path,
    progress: Progress,
) -> ModelSpec:
    """The container's words, made once and the same in every run that goes on."""
    text = {} if tokens is None else {"text": xxhash.xxh3_64_hexdigest(np.ascontiguousarray(tokens))}
    asked = {"settings": asdict(settings), "source": hub.fingerprint(located), "calibration": text}

    def make() -> dict:
        return plan_layers(layers, settings, located, name, tokens, progress).to_dict()

    return ModelSpec.from_dict(unfinished.agree(directory, asked, make))


def _run(job: Job, tokens: np.ndarray | None) -> None:
    """All layers that are not finished, after the embeddings and what else belongs to no layer."""
    total = sum(s.experts for s in job.spec.layers)
    job.progress("quantizing experts", job.experts_done, total)
    layers = layerwise.decoder_layers(job.model)
    if job.finished < BEFORE_LAYERS:
        _write_top(job, layers, tokens)
    if tokens is None:
        for index, (path, layer) in enumerate(layers):
            if index > job.finished:
                convert_layer(job, index, path, layer, None)
        return

    def visit(index: int, layer: nn.Module, call: layerwise.Call, x: mx.array) -> mx.array:
        if index > job.finished:
            convert_layer(job, index, layers[index][0], layer, call)
        return x

    job.fetch(None)
    layerwise.run_layers(job.model, tokens, visit)


def _write_top(job: Job, layers: list[tuple[str, nn.Module]], tokens: np.ndarray | None) -> None:
    """Everything outside of the decoder layers: quantized, written; the streams begin with its embeddings, original and
    quantized.
    """
    job.fetch(None)
    inside = tuple(f"{path}." for path, _ in layers)
    rest.require_finite(rest.outside(job.model, inside))
    if tokens is not None:
        job.streams["reference"] = _embedded(job.model, tokens)
    within = {path for path, _ in checkpoint.named_modules(job.model) if path.startswith(inside)}
    rest.quantize(job.model, "", job.model, job.settings.rest_bits, job.kept | within)
    rest.write_shard(job.directory / rest.TOP, rest.outside(job.model, inside))
    if tokens is not None:
        job.streams["compressed"] = _embedded(job.model, tokens)
    job.save(BEFORE_LAYERS, job.directory / rest.TOP)


def _embedded(model: nn.Module, tokens: np.ndarray) -> np.ndarray:
    """What the first decoder layer receives, float32 (sequences, length, d)."""
    got: list[np.ndarray] = []

    def visit(index: int, layer: nn.Module, call: layerwise.Call, x: mx.array) -> mx.array:
        if index == 0:
            got.append(computed(x.astype(mx.float32)))
        return x

    layerwise.run_layers(model, tokens, visit)
    return got[0]
