"""What is not a routed expert: quantized by MLX, a shard per decoder layer, and the files around the weights."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from tiny_qmoe_mlx import model_file
from tiny_qmoe_mlx.conversion import layerwise
from tiny_qmoe_mlx.disk_errors import is_disk
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.original import checkpoint
from tiny_qmoe_mlx.spec import ModelSpec
from tiny_qmoe_mlx.staging import replaced_file, write_json

GROUP = 64
TOP = "model-rest.safetensors"  # embeddings, the last norm, the output layer
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


def shard_name(layer: int) -> str:
    """File of a decoder layer's weights without its experts."""
    return f"model-rest-{layer:05d}.safetensors"


def routers(model: nn.Module, layers: Iterable[checkpoint.ExpertLayer]) -> set[str]:
    """Paths of the layers that score experts: within the same decoder layer, with one output per expert. They stay
    in 16 bits.
    """
    places = [path for path, _ in layerwise.decoder_layers(model)]
    experts = {f"{places[f.layer]}.": checkpoint.expert_count(f) for f in layers}
    return {
        path
        for path, module in checkpoint.named_modules(model)
        if "weight" in module and any(path.startswith(p) and module["weight"].shape[0] == n for p, n in experts.items())
    }


def quantize(model: nn.Module, prefix: str, module: nn.Module, bits: int, kept: set[str]) -> None:
    """Quantize the linear layers and embeddings below a module, in place; lazily, nothing is computed.

    Args:
        model: the whole, which may have its own say in what is quantized.
        prefix: the module's path in it, "" for the model itself.
        bits: 4, 6, 8, or 16 for none.
        kept: paths that stay as they are.
    """
    if bits == 16:
        return
    own = getattr(model, "quant_predicate", None)

    def wanted(path: str, part: nn.Module) -> bool:
        full = f"{prefix}.{path}" if prefix else path
        if not hasattr(part, "to_quantized") or full in kept or part.weight.shape[-1] % GROUP:
            return False
        return bool(own(full, part)) if own else True

    nn.quantize(module, GROUP, bits, class_predicate=wanted)


def weights(module: nn.Module) -> dict[str, mx.array]:
    """A module's arrays by name."""
    return dict(tree_flatten(module.parameters()))


def outside(module: nn.Module, prefixes: tuple[str, ...]) -> dict[str, mx.array]:
    """Arrays whose names begin with none of the prefixes."""
    return {name: array for name, array in weights(module).items() if not name.startswith(prefixes)}


def require_finite(arrays: dict[str, mx.array], prefix: str = "") -> None:
    """Refuse NaN and Inf, which quantization would hide.

    Raises:
        ValueError: with the tensor's name.
    """
    for name, array in arrays.items():
        checkpoint.require_finite(f"{prefix}{name}", array)


def write_shard(path: Path, arrays: dict[str, mx.array]) -> None:
    """Write arrays under their names in the model, whole or not at all.

    Raises:
        OSError: the disk is full.
    """
    with replaced_file(path, path.with_name(f".partial-{path.name}")) as temporary:
        try:
            mx.save_safetensors(str(temporary), arrays, {"format": "mlx"})
        except RuntimeError as error:  # MLX's word for a disk that is full
            if is_disk(error):  # the other one: what is written is read just now
                raise
            raise OSError(f"[{path}] could not be written, is the disk full? MLX says: {error}") from error


def forget(module: nn.Module) -> None:
    """Drop a module's weights from memory; it cannot run any more."""
    module.update(tree_map(lambda array: mx.zeros((1,)), module.parameters()))


def write_words(
    source: Path,
    config: dict[str, Any],
    spec: ModelSpec,
    bits: int,
    directory: Path,
    quantization: dict[str, Any] | None = None,
) -> None:
    """config.json with the container's words, the file for mlx-lm's tools, the tokenizer's files and the licence.

    Args:
        bits: that `quantize` was given; quantization: what the config says instead, of weights kept as they were.

    Raises:
        FormatError: the source lacks something that a model needs.
    """
    kept = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config", "vision_config")}
    if bits < 16:
        kept["quantization"] = {"group_size": GROUP, "bits": bits, "mode": "affine"}
    if quantization:
        kept["quantization"] = quantization
    write_json(directory / "config.json", {**kept, **model_file.write(directory), "tiny_qmoe": spec.to_dict()})
    for pattern in COPIED:
        for file in source.glob(pattern):
            if not file.is_file():
                raise FormatError(f"[{file}] should be a file of the checkpoint, it is none.")
            shutil.copyfile(file, directory / file.name)
