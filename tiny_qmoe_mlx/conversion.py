"""A checkpoint's experts compressed, the rest quantized by MLX, one directory written.

Conversion is one forward pass of the calibration tokens: each expert layer, when the tokens reach it, quantizes itself,
writes its file, and passes on what its compressed experts compute, so later layers are calibrated on what they will
receive.
"""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.utils import save_model
from threadpoolctl import threadpool_limits

from tiny_qmoe_mlx import calibrate, checkpoint, native, ops
from tiny_qmoe_mlx.codecs import rotation, trellis
from tiny_qmoe_mlx.container import bits_per_weight, write_experts_file, write_manifest
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.expert_kind import ExpertKind, expert_kind
from tiny_qmoe_mlx.layers import use_cpu_kernels
from tiny_qmoe_mlx.quantize import quantize_layer, record_bytes_for
from tiny_qmoe_mlx.spec import CODEC, FORMAT_VERSION, LayerSpec, ModelSpec, expert_file_name
from tiny_qmoe_mlx.staging import check_space, check_target, disk_full, staged_directory, write_json

MIN_BITS, MAX_BITS = 0.5, 4.0
REST_GROUP = 64
BUILTIN_TEXT = Path(__file__).parent / "data" / "calibration.txt"
COPIED = (
    "tokenizer*",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*.model",
    "LICENSE*",
)
Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True)
class Settings:
    """How to convert.

    bits: per expert weight, everything counted; rest_bits: 4, 6, 8 or 16 for what is not an expert; length: L of the
    trellis; calibration: path of a text, "builtin" or "none"; sequences x tokens of it are used; seed: of the
    rotation's signs.
    """

    bits: float = 2.0
    rest_bits: int = 8
    length: int = 12
    calibration: str = "builtin"
    sequences: int = 64
    sequence_tokens: int = 256
    seed: int = 0


class QuantizingExperts(nn.Module):
    """Stands for an expert layer while the calibration tokens pass: quantizes, writes, and computes from the
    records.
    """

    def __init__(self, source: checkpoint.ExpertLayer, spec: LayerSpec, finish: Callable):
        super().__init__()
        self._source, self._spec, self._finish = [source], spec, finish

    def take_source(self) -> checkpoint.ExpertLayer:
        """The original layer, forgotten here so that its weights can be freed."""
        return self._source.pop()

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        mx.eval(x, indices)
        tokens = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        chosen = np.array(indices).reshape(len(tokens), -1)
        y = self._finish(self, calibrate.LayerTokens(tokens, chosen))
        return mx.array(y).reshape(*indices.shape, -1).astype(x.dtype)


def convert(
    hf_path: str | Path,
    mlx_path: str | Path,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Path:
    """Convert a checkpoint.

    Args:
        hf_path: its directory or hub id.
        mlx_path: the directory to write; it appears when it is whole.
        settings: how.
        overwrite: replace a converted model that stands there.
        progress: called with (what, done, total).

    Returns:
        The directory written.

    Raises:
        FormatError: no such checkpoint, no experts in it, or a calibration text that does not serve.
        ValueError: settings out of range, weights that are not finite.
        OSError: the disk is full, or the output directory exists and is not ours.
    """
    _check_settings(settings)
    check_target(mlx_path, overwrite)
    source = checkpoint.find_directory(str(hf_path))
    model, config = checkpoint.load_lazy(source)
    layers = checkpoint.expert_layers(model)
    spec = _plan_layers(layers, settings, str(hf_path))
    batch = _calibration_tokens(source, config, settings)
    checkpoint.check_finite(source)
    spec.calibration["tokens"] = 0 if batch is None else int(batch.size)
    check_space(mlx_path, sum(layer.data_bytes for layer in spec.layers))
    # one thread of BLAS: the same bytes on every machine, and its threads spin where others need the cores
    with staged_directory(mlx_path, overwrite) as directory, threadpool_limits(1, "blas"):
        try:
            _write_rest(model, config, layers, spec, settings, source, directory)
            _write_experts(model, layers, spec, settings, batch, directory, progress)
            write_manifest(directory)
        except OSError as error:
            raise disk_full(error, Path(mlx_path)) from error
    return Path(mlx_path)


def _check_settings(settings: Settings) -> None:
    if not native.available():
        raise FormatError(
            "[convert] conversion needs the C++ library, which was not built because no C++ compiler was found; "
            "install one (on Debian: apt install g++, on macOS: xcode-select --install) and install tiny-qmoe-mlx "
            "again."
        )
    if not MIN_BITS <= settings.bits <= MAX_BITS:
        raise ValueError(f"[convert] bits should lie in {MIN_BITS} to {MAX_BITS}, received {settings.bits}.")
    if settings.rest_bits not in (4, 6, 8, 16):
        raise ValueError(f"[convert] rest bits should be 4, 6, 8 or 16, received {settings.rest_bits}.")
    if settings.length not in trellis.LENGTHS:
        raise ValueError(
            f"[convert] the trellis length should be one of {trellis.LENGTHS}, received {settings.length}."
        )
    if not 0 <= settings.seed < 2**32:
        raise ValueError(f"[convert] the seed should lie in 0 to {2**32 - 1}, received {settings.seed}.")
    if min(settings.sequences, settings.sequence_tokens) < 1:
        raise ValueError("[convert] calibration should have at least one sequence of one token.")


def _plan_layers(layers: list[checkpoint.ExpertLayer], settings: Settings, name: str) -> ModelSpec:
    """Record sizes and the container's words, from shapes alone."""
    sized = []
    for found in layers:
        shapes = [(rows, columns) for _, rows, columns in checkpoint.matrix_shapes(found)]
        sized.append(
            record_bytes_for(settings.bits, shapes, checkpoint.expert_count(found), checkpoint.has_bias(found))
        )
    alignment = min(a for _, a in sized)
    specs = [
        LayerSpec(
            path=found.path,
            layer=found.layer,
            file=expert_file_name(found.layer),
            experts=checkpoint.expert_count(found),
            record_bytes=size // alignment * alignment,
            matrices=tuple(checkpoint.matrix_shapes(found)),
            bias=checkpoint.has_bias(found),
        )
        for found, (size, _) in zip(layers, sized, strict=True)
    ]
    text = BUILTIN_TEXT.name if settings.calibration == "builtin" else Path(settings.calibration).name
    return ModelSpec(
        format_version=FORMAT_VERSION,
        codec=CODEC,
        bits=round(bits_per_weight(specs, alignment), 4),
        alignment=alignment,
        length=settings.length,
        seed=settings.seed,
        layers=tuple(specs),
        source={"model": name, "revision": None},
        calibration={"source": text, "tokens": 0},
    )


def _calibration_tokens(source: Path, config: dict, settings: Settings) -> np.ndarray | None:
    if settings.calibration == "none":
        return None
    file = BUILTIN_TEXT if settings.calibration == "builtin" else Path(settings.calibration)
    text = calibrate.read_text(file)
    tokenizer = checkpoint.open_tokenizer(source, config)
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)  # longer than the context, on purpose
    return calibrate.token_batch(ids, settings.sequences, settings.sequence_tokens, str(file))


def _write_rest(
    model: nn.Module,
    config: dict,
    layers: list[checkpoint.ExpertLayer],
    spec: ModelSpec,
    settings: Settings,
    source: Path,
    directory: Path,
) -> None:
    """Everything but the experts: weights quantized and saved, config, tokenizer; leaves stand-ins for the experts."""
    model.update_modules(tree_unflatten([(found.path, nn.Module()) for found in layers]))
    if settings.rest_bits < 16:
        routers = _routers(model, layers)
        nn.quantize(
            model,
            REST_GROUP,
            settings.rest_bits,
            class_predicate=lambda path, module: _may_quantize(model, path, module, routers),
        )
    try:
        save_model(directory, model)
    except RuntimeError as error:  # MLX's word for a disk that is full
        raise OSError(
            f"[{directory.parent}] the weights could not be written, is the disk full? MLX says: {error}"
        ) from error
    config = {
        key: value
        for key, value in config.items()
        if key not in ("quantization", "quantization_config", "vision_config")
    }
    if settings.rest_bits < 16:
        config["quantization"] = {"group_size": REST_GROUP, "bits": settings.rest_bits, "mode": "affine"}
    write_json(directory / "config.json", {**config, "tiny_qmoe": spec.to_dict()})
    for pattern in COPIED:
        for file in source.glob(pattern):
            shutil.copyfile(file, directory / file.name)


def _routers(model: nn.Module, layers: list[checkpoint.ExpertLayer]) -> set[str]:
    """Paths of the layers that score experts: within the same decoder layer, with one output per expert. They stay
    in 16 bits.
    """
    experts = {re.sub(rf"(?<=\.{f.layer}\.).*", "", f.path): checkpoint.expert_count(f) for f in layers}
    return {
        path
        for path, module in model.named_modules()
        if "weight" in module and any(path.startswith(p) and module["weight"].shape[0] == n for p, n in experts.items())
    }


def _may_quantize(model: nn.Module, path: str, module: nn.Module, routers: set[str]) -> bool:
    if not hasattr(module, "to_quantized") or path in routers or module.weight.shape[-1] % REST_GROUP:
        return False
    own = getattr(model, "quant_predicate", None)
    return bool(own(path, module)) if own else True


def _write_experts(
    model: nn.Module,
    layers: list[checkpoint.ExpertLayer],
    spec: ModelSpec,
    settings: Settings,
    batch: np.ndarray | None,
    directory: Path,
    progress: Progress,
) -> None:
    total, done = sum(layer.experts for layer in spec.layers), 0

    def counted(records: Iterable[np.ndarray], kept: list[np.ndarray]) -> Iterator[np.ndarray]:
        nonlocal done
        for record in records:
            kept.append(record)
            done += 1
            progress("quantizing experts", done, total)
            yield record

    def finish(
        found: checkpoint.ExpertLayer, layer: LayerSpec, tokens: calibrate.LayerTokens | None
    ) -> list[np.ndarray]:
        kind = expert_kind(layer, spec, found.module.activation)
        records: list[np.ndarray] = []
        made = quantize_records(found, layer, kind, tokens, settings)
        write_experts_file(directory, layer, spec.alignment, counted(made, records))
        return records

    progress("quantizing experts", 0, total)
    if batch is None:
        for layer in spec.layers:
            finish(layers.pop(0), layer, None)  # popped, so that its weights are freed
        return
    _run_tokens(model, layers, spec, finish, batch)


def _run_tokens(
    model: nn.Module, layers: list[checkpoint.ExpertLayer], spec: ModelSpec, finish: Callable, batch: np.ndarray
) -> None:
    """The forward pass of the calibration tokens, with each expert layer's work done as they reach it."""
    passed = []

    def reached(module: QuantizingExperts, tokens: calibrate.LayerTokens) -> np.ndarray:
        found, layer = module.take_source(), module._spec
        passed.append(found.path)
        kind = expert_kind(layer, spec, found.module.activation)
        return layer_output(finish(found, layer, tokens), tokens, kind)

    stand_ins = [(f.path, QuantizingExperts(f, s, reached)) for f, s in zip(layers, spec.layers, strict=True)]
    layers.clear()
    model.update_modules(tree_unflatten(stand_ins))
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
    use_cpu_kernels(model)
    model(mx.array(batch))
    missing = [layer.path for layer in spec.layers if layer.path not in passed]
    if missing:
        raise FormatError(
            f"[convert] the tokens should pass every expert layer, they did not pass {missing[0]}; this model type "
            f"is not supported yet."
        )


def quantize_records(
    found: checkpoint.ExpertLayer,
    layer: LayerSpec,
    kind: ExpertKind,
    tokens: calibrate.LayerTokens | None,
    settings: Settings,
) -> Iterable[np.ndarray]:
    """One layer's records, u8 (record_bytes,) each, expert 0 first.

    Raises:
        ValueError: weights that are not finite, with layer and expert.
    """
    weights, biases = checkpoint.dense_weights(found)
    sign_in, sign_mid = (rotation.signs(settings.seed, layer.layer, side, kind.matrices[-side][2]) for side in (0, 1))
    inputs = calibrate.expert_inputs(weights, biases, tokens, kind)
    try:
        for record in quantize_layer(inputs, sign_in, sign_mid, layer.record_bytes, settings.length):
            yield trellis.pack(record, layer.record_bytes)
    except ValueError as error:
        raise ValueError(f"{found.path}: {error}") from error


def layer_output(records: list[np.ndarray], tokens: calibrate.LayerTokens, kind: ExpertKind) -> np.ndarray:
    """What the compressed experts give for the tokens, float32 (tokens, k, d)."""
    z = rotation.rotate(tokens.x, kind.sign_in)
    out = np.empty((*tokens.chosen.shape, kind.matrices[-1][1]), np.float32)
    for e, record in enumerate(records):
        token, place = np.nonzero(tokens.chosen == e)
        if len(token):
            out[token, place] = ops.expert_product(record, z[token], kind, ops.Dispatch())
    return out
