"""How a checkpoint stores its weights: said in a sentence; 8-bit floats and quantized layers made plain, lazily."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.original.adapted import MATRIX_NAMES

KEEPS = "--codec affine keeps the experts' codes bit for bit, --codec trellis codes their values anew"
FORMATS = {
    "mxfp4": f"MXFP4 experts (4-bit floats, a power of two per 32 weights); {KEEPS}",
    "mxfp8": f"MXFP8 weights (8-bit floats, a power of two per 32 weights); {KEEPS}",
    "modelopt": f"NVFP4 weights (4-bit floats, an 8-bit scale per 16 weights); {KEEPS}",
    "awq": "AWQ weights (4-bit integers); they are dequantized as mlx-lm does",
    "gptq": "GPTQ weights (4-bit integers); they are dequantized as mlx-lm does",
}
PACKED = {
    "pack-quantized": f"packed 4-bit integers (compressed-tensors), a scale per group; {KEEPS}",
    "mxfp4-pack-quantized": FORMATS["mxfp4"],
    "nvfp4-pack-quantized": FORMATS["modelopt"],
}
SCALE = "_scale_inv"  # suffix of the tensor with the scales of an 8-bit float weight's blocks
BLOCK = (128, 128)


def describe_source(config: dict[str, Any]) -> str:
    """What a checkpoint's config says of its weights, and what becomes of them, in one sentence."""
    inner = config.get("text_config")
    text: dict[str, Any] = inner if isinstance(inner, dict) else {}
    own = config.get("quantization")
    theirs = config.get("quantization_config", text.get("quantization_config"))
    if isinstance(own, dict):
        mode, mixed = own.get("mode", "affine"), any(isinstance(value, dict) for value in own.values())
        found = f"MLX {mode} weights of {own.get('bits')} bits in groups of {own.get('group_size')}"
        return f"{found}{', some layers otherwise' if mixed else ''}; {KEEPS}"
    if isinstance(theirs, dict):
        return _describe_quantized(theirs)
    dtype = config.get("dtype", config.get("torch_dtype", text.get("dtype", text.get("torch_dtype"))))
    return f"{dtype if isinstance(dtype, str) else 'plain'} weights, not quantized"


def _describe_quantized(config: dict[str, Any]) -> str:
    method = str(config.get("quant_method", "unnamed"))
    if block_scaled(config):
        return "8-bit floats with a scale per block; they are dequantized to bfloat16, as mlx-lm does"
    if method == "fp8":
        return FORMATS["mxfp8"]
    if method == "compressed-tensors":
        kind = str(config.get("format"))
        return PACKED.get(kind, f"compressed-tensors of the kind {kind}, which mlx-lm does not read")
    return FORMATS.get(method, f"weights quantized by {method}")


def block_scaled(config: Any) -> bool:
    """Whether a quantization_config means 8-bit floats with a float scale per block (DeepSeek-V3, Qwen3-FP8).

    Blocks of 32 x 32 with powers of two are MXFP8, which mlx-lm keeps as it is.
    """
    if not isinstance(config, dict) or config.get("quant_method") != "fp8":
        return False
    return not (config.get("scale_fmt") == "ue8m0" and list(config.get("weight_block_size") or ()) == [32, 32])


def dequantize_fp8(weights: dict[str, mx.array], block: tuple[int, int]) -> dict[str, mx.array]:
    """Replace every 8-bit float weight that comes with `weight_scale_inv` by bfloat16, lazily.

    Only some families of mlx-lm do this themselves; where it is done here, nothing is left for them to do.

    Args:
        weights: u8 (..., rows, columns) under "X.weight" and scales (..., rows / block, columns / block), rounded up,
            under "X.weight_scale_inv"; the rest stays.

    Raises:
        ValueError: scales that do not fit their weight, naming it.
    """
    out = {name: array for name, array in weights.items() if not name.endswith(SCALE)}
    for name, scale in weights.items():
        key = name.removesuffix(SCALE)
        if name.endswith(SCALE) and key in out:
            out[key] = _blocks_times(out[key], scale, block, key)
    return out


def _blocks_times(weight: mx.array, scale: mx.array, block: tuple[int, int], name: str) -> mx.array:
    *batch, rows, columns = weight.shape
    counts = [-(-rows // block[0]), -(-columns // block[1])]
    if weight.dtype != mx.uint8 or list(scale.shape) != [*batch, *counts]:
        raise ValueError(
            f"{name} should be 8-bit floats with scales of {[*batch, *counts]}, received {weight.dtype} with "
            f"{list(scale.shape)}"
        )
    spare = [(0, counts[0] * block[0] - rows), (0, counts[1] * block[1] - columns)]
    padded = mx.pad(mx.from_fp8(weight, dtype=mx.bfloat16), [(0, 0)] * len(batch) + spare)
    blocks = padded.reshape(*batch, counts[0], block[0], counts[1], block[1])
    product = (blocks * scale[..., :, None, :, None]).astype(mx.bfloat16)
    return product.reshape(*batch, counts[0] * block[0], counts[1] * block[1])[..., :rows, :columns]


def dequantize_rest(model: nn.Module) -> int:
    """Replace the model's quantized layers by plain ones of the same values, in place and lazily; not its experts.

    Returns:
        How many.

    Raises:
        FormatError: a layer holds packed weights of a kind that only its own class can read.
    """
    named = [(str(path), module) for path, module in model.named_modules()]
    experts = tuple(f"{path}." for path, module in named if isinstance(module, tuple(MATRIX_NAMES)))
    rest = [(path, module) for path, module in named if not path.startswith(experts)]
    for path, module in rest:
        _require_known(path, module)
    plain = [(path, _plain(module)) for path, module in rest if type(module) in PLAIN]
    model.update_modules(tree_unflatten(plain))
    return len(plain)


def _require_known(path: str, module: nn.Module) -> None:
    weight = module.get("weight")
    if type(module) in PLAIN or not isinstance(weight, mx.array) or mx.issubdtype(weight.dtype, mx.floating):
        return
    raise FormatError(
        f"[model] weights should be plain or quantized by MLX, {path} is a {type(module).__name__} of packed "
        f"{_word(weight)}, which is not supported; give a bfloat16 checkpoint of the model."
    )


def _word(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


PLAIN: dict[type, Callable[[], nn.Module]] = {
    nn.QuantizedLinear: lambda: nn.Linear(1, 1, bias=False),
    nn.QuantizedEmbedding: lambda: nn.Embedding(1, 1),
    QuantizedMultiLinear: lambda: MultiLinear(1, 1, 1),
    QuantizedSwitchLinear: lambda: SwitchLinear(1, 1, 1, bias=False),
}


def _plain(module: nn.Module) -> nn.Module:
    plain = PLAIN[type(module)]()
    plain.weight = dequantized(module, dict(module))
    if "bias" in module:
        plain.bias = module["bias"]
    return plain


def dequantized(settings: nn.Module, arrays: dict[str, Any], dtype: mx.Dtype | None = None) -> mx.array:
    """Values of a quantized layer's arrays (weight, scales, biases or none, global_scale or none), lazily.

    Args:
        settings: the module, for its group_size, bits and mode.
        arrays: its own, or a part of their first dimension.
        dtype: of the result; None for the one that the layer computes in.
    """
    scales: Any = arrays["scales"]
    biases: Any = arrays.get("biases")
    if dtype and settings.mode == "affine":  # MLX rounds to the type of the scales
        scales, biases = scales.astype(dtype), biases.astype(dtype)
    parts = (arrays["weight"], scales, biases, settings.group_size, settings.bits, settings.mode)
    return mx.dequantize(*parts, arrays.get("global_scale"), dtype)
