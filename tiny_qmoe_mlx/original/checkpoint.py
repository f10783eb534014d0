"""The original model: from a directory or the Hugging Face hub to a lazy mlx-lm model, and which of its modules are
experts.

mlx-lm builds the model and renames, splits and stacks the tensors of every family. Its arrays are lazy: nothing is read
here but the experts that are asked for, a few at a time (source.py).
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tiny_qmoe_mlx import allocator, compiled, config_file, model_file, plain_files, safetensors_header
from tiny_qmoe_mlx.codecs.affine import Packing
from tiny_qmoe_mlx.errors import FormatError, shown
from tiny_qmoe_mlx.hub import client as hub
from tiny_qmoe_mlx.library_errors import quiet_panics, quiet_transformers, refused
from tiny_qmoe_mlx.original import dense, shipped
from tiny_qmoe_mlx.original.adapted import MATRIX_NAMES, model_classes
from tiny_qmoe_mlx.original.source import Source, computed
from tiny_qmoe_mlx.spec import LayerSpec, expert_file_name
from tiny_qmoe_mlx.tokenizer import Tokenizer


@dataclass(frozen=True)
class ExpertLayer:
    """One layer of routed experts: its module's path, the index of its decoder layer, the module, and the files that
    its experts are read from (None: the module's own arrays).
    """

    path: str
    layer: int
    module: nn.Module
    source: Source | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return next(names for kind, names in MATRIX_NAMES.items() if isinstance(self.module, kind))


def find_directory(model: str, revision: str | None = None, quiet: bool = False) -> Path:
    """The directory of a model: itself, or the hub's snapshot of a repository id (only the files that are used).

    Raises:
        FormatError: neither a directory nor a repository that can be had.
    """
    return hub.locate(model, revision, quiet).directory


def read_config(directory: Path) -> dict:
    """config.json of a model directory.

    Raises:
        FormatError: no config.json, or not a JSON object with a model_type.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise FormatError(f"[model] {directory} should hold config.json and does not; it is not a model directory.")
    config = config_file.read(file, str(file))
    if not isinstance(config.get("model_type"), str):
        raise FormatError(f"[model] {file} should be an object with a model_type.")
    return config


def read_original(directory: Path) -> dict:
    """config.json of a checkpoint that mlx-lm is about to load, after all that it would trip over was looked at.

    Raises:
        FormatError: as `read_config`; or code of its own, a link that leaves the directory, a damaged header, a tensor
            that stands in two of the files.
    """
    compiled.settle()
    plain_files.check_directory(directory)
    config = read_config(directory)
    if "tiny_qmoe" not in config:
        model_file.refuse(config)
    together = safetensors_header.Together()
    for file in sorted(directory.glob("model*.safetensors")):  # all of which mlx-lm loads, whatever an index says
        together.add(file, str(file))
    return config


def load_lazy(directory: Path) -> tuple[nn.Module, dict]:
    """The unconverted model with lazy weights, and its config.

    Raises:
        FormatError: mlx-lm does not know the type, or tensors are missing or misshapen; the checkpoint would run code
            of its own, or has a file that is none.
    """
    from mlx_lm.utils import load_model

    config = read_original(directory)
    if "tiny_qmoe" in config:
        raise FormatError(f"[model] {directory} is converted already; give the original checkpoint.")
    known: dict[str, Any] = {}

    def classes(config: dict) -> tuple[type, type]:
        known.update(copy.deepcopy(config))  # as it was before mlx-lm turns quantization_config into its own
        return _classes(config)

    def build() -> nn.Module:
        kind, arguments = _classes(known)
        return kind(arguments.from_dict(known))  # type: ignore[attr-defined]

    try:
        model, config = load_model(directory, lazy=True, get_model_classes=classes)
    except FileNotFoundError as error:
        raise FormatError(
            f"[model] {directory} should hold model*.safetensors and does not; if the checkpoint has "
            "pytorch_model*.bin, load it with transformers and save_pretrained it."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a config that contradicts itself or the tensors trips mlx-lm in many ways
        raise FormatError(f"[model] mlx-lm cannot load {directory} {_why(config, error)}") from error
    model.source = Source(directory, build)
    allocator.forget_draws()
    return model, config


def _why(config: dict, error: Exception) -> str:
    reason, kind = shown(" ".join(str(error).split()), 300) or type(error).__name__, shown(config["model_type"])
    if "quantization_config" not in config and "quantization" not in config:
        return f"(model_type {kind}): {reason}"
    return (
        f"(model_type {kind}; {shown(shipped.describe_source(config), 200)}): {reason}; "
        "give a bfloat16 checkpoint of the model, or one converted with mlx_lm.convert -q."
    )


def _classes(config: dict) -> tuple[type, type]:
    """mlx-lm's classes for a config; 8-bit floats with block scales are made plain for every family."""
    base, arguments = model_classes(config)
    quantization: Any = config.get("quantization_config")
    if not shipped.block_scaled(quantization):
        return base, arguments
    rows, columns = quantization.get("weight_block_size") or shipped.BLOCK

    class Model(base):  # type: ignore[valid-type, misc]
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            weights = shipped.dequantize_fp8(weights, (int(rows), int(columns)))
            return super().sanitize(weights) if hasattr(base, "sanitize") else weights

    return Model, arguments


def open_tokenizer(directory: Path, config: dict) -> TokenizerWrapper:
    """The tokenizer in a model directory.

    Raises:
        FormatError: there is none, or it is damaged.
    """
    from mlx_lm.utils import load_tokenizer

    what = f"{directory} should hold a tokenizer that transformers can load, it cannot"
    # whatever the libraries trip over in a damaged file
    with refused("tokenizer", what), quiet_panics(), quiet_transformers():
        # left open, transformers would ask on the terminal, or whatever stands on stdin, whether to run their code
        tokenizer = load_tokenizer(directory, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id"))
        ids = tokenizer.encode("a", add_special_tokens=False)
        tokenizer.decode(tokenizer.encode("a"))
    if not ids:  # transformers makes an empty one where there are no files
        raise FormatError(
            f"[tokenizer] {directory} should hold a tokenizer (tokenizer.json, or tokenizer.model) and holds none."
        )
    tokenizer.__class__ = Tokenizer
    allocator.give_back()
    return tokenizer


def require_finite(name: str, array: mx.array) -> None:
    """Refuse NaN and Inf in a tensor of the checkpoint that is no expert's; MLX's quantization would hide a NaN.

    Raises:
        ValueError: with the tensor's name.
    """
    if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
        raise ValueError(f"[checkpoint] {name} should be finite, received NaN or Inf; download the checkpoint again.")


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """nn.Module.named_modules with its types."""
    for path, module in model.named_modules():
        yield str(path), cast(nn.Module, module)


def expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """Every layer of routed experts, in the order in which tokens pass them.

    Raises:
        FormatError: the model has none, or some that this program would compute wrongly.
    """
    source, places = getattr(model, "source", None), _decoder_layers(model)
    found: dict[int, ExpertLayer] = {}
    for path, module in named_modules(model):
        if not isinstance(module, tuple(MATRIX_NAMES)):
            continue
        _require_plain(path, module)
        layer = next((index for place, index in places.items() if path.startswith(f"{place}.")), None)
        if layer is None:
            raise FormatError(
                f"[model] routed experts should lie in one of the model's decoder layers, {path} does not; this model "
                "type is not supported."
            )
        if layer in found:
            raise FormatError(
                f"[model] a decoder layer should have one layer of routed experts, received {found[layer].path} and "
                f"{path} in layer {layer}; this model type is not supported."
            )
        files = None if isinstance(module, dense.Only) else source
        found[layer] = ExpertLayer(path, layer, module, files)
    if not found:
        raise FormatError(_none_found(model))
    return [found[layer] for layer in sorted(found)]


def _decoder_layers(model: nn.Module) -> dict[str, int]:
    """Path of every decoder layer -> its place in the order in which tokens pass them."""
    paths = {id(module): path for path, module in named_modules(model)}
    return {paths[id(layer)]: index for index, layer in enumerate(getattr(model, "layers", None) or [])}


def _require_plain(path: str, module: nn.Module) -> None:
    """Refuse experts that compute, or hold, something that mlx-lm's own do not.

    Raises:
        FormatError: with the reason.
    """
    kind = next(k for k in MATRIX_NAMES if isinstance(module, k))
    names, own = MATRIX_NAMES[kind], type(module)
    more = [name for name in dict(tree_flatten(module.parameters())) if name.split(".")[0] not in names]
    reason = None
    if own.__call__ is not kind.__call__:
        reason = f"a {own.__name__} that computes in its own way"
    elif any(type(module[name]) not in (SwitchLinear, QuantizedSwitchLinear) for name in names):
        reason = "matrices of a class of their own"
    elif more:
        reason = f"{more[0]} beside the matrices"
    if reason:
        raise FormatError(
            f"[model] routed experts should be mlx-lm's {kind.__name__}, {path} has {reason}; this model type is not "
            "supported."
        )


def _none_found(model: nn.Module) -> str:
    if other := dense.other_experts(model):
        return (
            f"[model] routed experts should be mlx-lm's SwitchGLU or SwitchMLP, {other} is of another kind; this model "
            "type is not supported."
        )
    return "[model] the model should have routed experts (mlx-lm's SwitchGLU or SwitchMLP), none were found."


def matrix_shapes(layer: ExpertLayer) -> list[tuple[str, int, int]]:
    """(name, rows, columns) of an expert's matrices, from the arrays' shapes alone: nothing is read."""
    return [(n, layer.module[n].output_dims, layer.module[n].input_dims) for n in layer.names]


def expert_count(layer: ExpertLayer) -> int:
    """Number of routed experts of a layer."""
    return layer.module[layer.names[0]].num_experts


def has_bias(layer: ExpertLayer) -> bool:
    """Whether the experts' matrices have biases."""
    return "bias" in layer.module[layer.names[0]]


def expert_weights(layer: ExpertLayer, experts: range) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Weights and biases of a few experts, read now and held by nobody else.

    No other expert's bytes are read where the checkpoint has a tensor per expert, or one for a whole layer with the
    experts along its first dimension (source.py). Quantized checkpoints are dequantized.

    Args:
        layer: of which.
        experts: neighbours, in the layer's order.

    Returns:
        Per matrix float32 (len(experts), rows, columns), and per matrix (len(experts), rows) or None.

    Raises:
        ValueError: NaN or Inf, with layer and expert; or experts that the layer does not have.
    """
    arrays = expert_arrays(layer, experts)
    weights = [_dense(layer.module[n], _pop(arrays, n)) for n in layer.names]
    biases = [_float32(arrays.pop(f"{n}.bias")) for n in layer.names] if has_bias(layer) else None
    for name, values in zip(2 * layer.names, weights + (biases or [])):  # noqa: B905 (biases may be absent)
        require_finite_experts(layer, name, values, experts)
    return weights, biases


def layer_spec(layer: ExpertLayer, record_bytes: int, packing: tuple[Packing, ...] = ()) -> LayerSpec:
    """A layer as the container describes it, its records of `record_bytes` bytes."""
    return LayerSpec(
        path=layer.path,
        layer=layer.layer,
        file=expert_file_name(layer.layer),
        experts=expert_count(layer),
        record_bytes=record_bytes,
        matrices=tuple(matrix_shapes(layer)),
        bias=has_bias(layer),
        packing=packing,
    )


def expert_arrays(layer: ExpertLayer, experts: range) -> dict[str, mx.array]:
    """Lazy arrays (len(experts), ...) by name below the layer's path ("up_proj.weight"), as the checkpoint has them.

    Pop what is used, so that it is freed.

    Raises:
        ValueError: experts that the layer does not have.
    """
    count = expert_count(layer)
    if experts.step != 1 or not 0 <= experts.start < experts.stop <= count:
        raise ValueError(f"[{layer.path}] experts should be neighbours among 0 to {count - 1}, received {experts}.")
    if layer.source:
        return layer.source.arrays(layer.path, layer.layer, experts, count)
    own = ((f"{n}.{key}", layer.module[n][key]) for n in layer.names for key in layer.module[n])
    return {name: a[experts.start : experts.stop] for name, a in own if isinstance(a, mx.array)}


def _pop(arrays: dict[str, mx.array], name: str) -> dict[str, mx.array]:
    """A matrix's arrays, taken out so that they can be freed once they were used."""
    keys = ("weight", "scales", "biases", "global_scale")
    return {key: arrays.pop(f"{name}.{key}") for key in keys if f"{name}.{key}" in arrays}


def require_finite_experts(layer: ExpertLayer, name: str, values: mx.array | np.ndarray, experts: range) -> None:
    """Refuse NaN and Inf in a matrix or bias of experts, (len(experts), ...).

    Raises:
        ValueError: with layer and expert.
    """
    for expert, part in zip(experts, values, strict=True):
        fine = np.isfinite(part) if isinstance(part, np.ndarray) else mx.isfinite(part)
        if not fine.all().item():
            raise ValueError(
                f"[{layer.path}] {name} of expert {expert} should be finite, received NaN or Inf; "
                "download the checkpoint again."
            )


def _float32(array: mx.array) -> np.ndarray:
    values = computed(array.astype(mx.float32))  # copied, so that MLX's own array is freed
    del array
    mx.clear_cache()
    return values


def _dense(linear: nn.Module, arrays: dict[str, mx.array]) -> np.ndarray:
    """float32 weights of a SwitchLinear, or of a QuantizedSwitchLinear with the precision of float32."""
    return _float32(shipped.dequantized(linear, arrays, mx.float32) if "scales" in arrays else arrays["weight"])
