"""The original model: from a directory or the Hugging Face hub to a lazy mlx-lm model, and which of its modules are
experts.

mlx-lm builds the model and renames, splits and stacks the tensors of every family; its arrays are lazy, so a layer's
weights are read from disk when they are first evaluated, and freed with the last reference.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tiny_qmoe_mlx.errors import FormatError

ROUTED = re.compile(
    r"\.(experts|switch_mlp|switch_glu)\."
)  # names of routed experts' tensors, in checkpoints and in mlx-lm
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DOWNLOADED = ["*.json", "model*.safetensors", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.jsonl"]
MATRIX_NAMES = {SwitchGLU: ("gate_proj", "up_proj", "down_proj"), SwitchMLP: ("fc1", "fc2")}


@dataclass(frozen=True)
class ExpertLayer:
    """One layer of routed experts: its module's path, the index of its decoder layer, and the module."""

    path: str
    layer: int
    module: nn.Module

    @property
    def names(self) -> tuple[str, ...]:
        return next(names for kind, names in MATRIX_NAMES.items() if isinstance(self.module, kind))


def find_directory(model: str, revision: str | None = None, quiet: bool = False) -> Path:
    """The directory of a model: itself, or the hub's snapshot of a repository id (only the files that are used).

    The hub's progress bars show on a terminal only, and not with `quiet`.

    Raises:
        FormatError: neither a directory nor a repository that can be had.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FormatError(
            f"[model] {model} should be a directory, it is a file; name the directory that holds config.json."
        )
    if not HUB_ID.fullmatch(model):
        raise FormatError(
            f"[model] {model} should be a directory with config.json, or a hub id such as org/name; no such directory."
        )
    return _download(model, revision, quiet or not sys.stderr or not sys.stderr.isatty())


def _download(model: str, revision: str | None, quiet: bool) -> Path:
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silenced = quiet and not are_progress_bars_disabled()
    try:
        if silenced:
            disable_progress_bars()
        return Path(snapshot_download(model, revision=revision, allow_patterns=DOWNLOADED))
    except errors.GatedRepoError as error:
        raise FormatError(
            f"[model] {model} needs a login and accepted terms on the hub; log in with `hf auth login`."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FormatError(
            f"[model] {model} (revision {revision or 'main'}) is no directory here and not on the hub."
        ) from error
    except Exception as error:  # the hub's own, the disk's, and those of the HTTP library, of which it has had several
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"[model] {model} is no directory here, and the hub could not be asked: {reason}") from error
    finally:
        if silenced:
            enable_progress_bars()


def read_config(directory: Path) -> dict:
    """config.json of a model directory.

    Raises:
        FormatError: no config.json, or not a JSON object with a model_type.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise FormatError(f"[model] {directory} should hold config.json and does not; it is not a model directory.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"[model] {file} should be JSON: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise FormatError(f"[model] {file} should be an object with a model_type.")
    return config


def load_lazy(directory: Path) -> tuple[nn.Module, dict]:
    """The unconverted model with lazy weights, and its config.

    Raises:
        FormatError: mlx-lm does not know the type, or tensors are missing or misshapen.
    """
    from mlx_lm.utils import load_model

    config = read_config(directory)
    if "tiny_qmoe" in config:
        raise FormatError(f"[model] {directory} is converted already; give the original checkpoint.")
    try:
        model, config = load_model(directory, lazy=True)
    except FileNotFoundError as error:
        raise FormatError(f"[model] {directory} should hold model*.safetensors and does not.") from error
    except MemoryError:
        raise
    except Exception as error:  # a config that contradicts itself or the tensors trips mlx-lm in many ways
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise FormatError(
            f"[model] mlx-lm cannot load {directory} (model_type {config['model_type']}): {reason}"
        ) from error
    return model, config


def open_tokenizer(directory: Path, config: dict) -> TokenizerWrapper:
    """The tokenizer in a model directory.

    Raises:
        FormatError: there is none, or it is damaged.
    """
    from mlx_lm.utils import load_tokenizer

    try:
        tokenizer = load_tokenizer(directory, eos_token_ids=config.get("eos_token_id"))
        works = bool(
            tokenizer.encode("a", add_special_tokens=False)
        )  # transformers makes an empty one where there are no files
    except Exception as error:  # whatever the libraries trip over in a damaged file
        reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise FormatError(
            f"[tokenizer] {directory} should hold a tokenizer that transformers can load, it cannot: {reason}"
        ) from error
    if not works:
        raise FormatError(
            f"[tokenizer] {directory} should hold a tokenizer (tokenizer.json, or tokenizer.model) and holds none."
        )
    return tokenizer


def check_finite(directory: Path) -> None:
    """Look for NaN and Inf in the tensors that are no routed experts' (those are checked when they are quantized).

    Raises:
        ValueError: with the tensor's name; MLX's quantization would hide a NaN.
    """
    for file in sorted(directory.glob("model*.safetensors")):
        tensors = cast(dict[str, mx.array], mx.load(str(file)))
        for name in list(tensors):
            array = tensors.pop(name)  # popped, so that it is freed once it has been looked at
            if ROUTED.search(name) or not mx.issubdtype(array.dtype, mx.floating):
                continue
            if not mx.isfinite(array).all().item():
                raise ValueError(
                    f"[{file.name}] {name} should be finite, received NaN or Inf; download the checkpoint again."
                )


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """nn.Module.named_modules with its types."""
    for path, module in model.named_modules():
        yield str(path), cast(nn.Module, module)


def expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """Every layer of routed experts, in the order in which tokens pass them.

    Raises:
        FormatError: the model has none.
    """
    found: list[ExpertLayer] = []
    for path, module in named_modules(model):
        if isinstance(module, tuple(MATRIX_NAMES)):
            index = re.search(r"\.(\d+)\.", path)
            found.append(ExpertLayer(path, int(index.group(1)) if index else len(found), module))
    if not found:
        raise FormatError(
            "[model] the model should have routed experts (mlx-lm's SwitchGLU or SwitchMLP), none were found; "
            "a dense model cannot be converted with this codec yet."
        )
    return sorted(found, key=lambda e: e.layer)


def matrix_shapes(layer: ExpertLayer) -> list[tuple[str, int, int]]:
    """(name, rows, columns) of an expert's matrices, from the arrays' shapes alone: nothing is read."""
    return [(n, layer.module[n].output_dims, layer.module[n].input_dims) for n in layer.names]


def expert_count(layer: ExpertLayer) -> int:
    """Number of routed experts of a layer."""
    return layer.module[layer.names[0]].num_experts


def has_bias(layer: ExpertLayer) -> bool:
    """Whether the experts' matrices have biases."""
    return "bias" in layer.module[layer.names[0]]


def dense_weights(layer: ExpertLayer) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """A layer's weights and biases, read now: per matrix float32 (experts, rows, columns), and (experts, rows) or None.

    Quantized checkpoints are dequantized.

    Raises:
        ValueError: NaN or Inf, with layer and expert.
    """
    weights = [_dense(layer.module[n]) for n in layer.names]
    biases = [_float32(layer.module[n]["bias"]) for n in layer.names] if has_bias(layer) else None
    for name, values in zip(2 * layer.names, weights + (biases or [])):  # noqa: B905 (biases may be absent)
        for expert, part in enumerate(values):
            if not np.isfinite(part).all():
                raise ValueError(
                    f"[{layer.path}] {name} of expert {expert} should be finite, received NaN or Inf; "
                    "download the checkpoint again."
                )
    return weights, biases


def _float32(array: mx.array) -> np.ndarray:
    # copied, so that MLX's own array can be freed
    return np.array(array.astype(mx.float32))


def _dense(linear: nn.Module) -> np.ndarray:
    if "scales" not in linear:
        return _float32(linear["weight"])
    scale = {} if linear.get("global_scale") is None else {"global_scale": linear["global_scale"]}
    return _float32(
        mx.dequantize(
            linear["weight"],
            linear["scales"],
            linear.get("biases"),
            linear.group_size,
            linear.bits,
            linear.mode,
            **scale,
        )
    )
