"""A checkpoint's experts as affine records: shipped codes bit for bit, other weights quantized by MLX."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from tiny_qmoe_mlx.codecs import affine
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.original import checkpoint
from tiny_qmoe_mlx.original.source import computed
from tiny_qmoe_mlx.spec import ALIGNMENTS, LayerSpec

GROUP = 64  # of weights that are quantized here
MOST_PADDING = 0.005  # of a record, for the sake of a larger alignment


def affine_packing(found: checkpoint.ExpertLayer, bits: int) -> tuple[affine.Packing, ...]:
    """How each matrix of a layer is or will be quantized; bits count only where the checkpoint is not.

    Raises:
        FormatError: a kind of quantization that the format does not have.
    """
    arrays = checkpoint.expert_arrays(found, range(1))
    packing = []
    for name, _, columns in checkpoint.matrix_shapes(found):
        linear, bias = found.module[name], arrays.get(f"{name}.bias")
        kind = None if bias is None else _name(bias)
        own = affine.Packing("affine", bits, GROUP, _name(arrays[f"{name}.weight"]), kind)
        if f"{name}.scales" in arrays:
            scales = _name(arrays[f"{name}.scales"])
            own = affine.Packing(linear.mode, linear.bits, linear.group_size, scales, kind)
        problem = own.problem(columns)
        if f"{name}.global_scale" in arrays:
            problem = "scales of a whole matrix (NVFP4) are not kept"
        if problem:
            raise FormatError(f"[{found.path}] {name} cannot be kept by codec affine: {problem}; use --codec trellis.")
        packing.append(own)
    return tuple(packing)


def _name(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def affine_layer_specs(layers: list[checkpoint.ExpertLayer], bits: int) -> tuple[list[LayerSpec], int]:
    """What the experts files of all layers hold, and the alignment of their records.

    Args:
        layers: of the model.
        bits: 2 to 6 or 8, where the checkpoint is not quantized.

    Raises:
        FormatError: a kind of quantization that the format does not have.
    """
    packing = [affine_packing(found, bits) for found in layers]
    used = [affine.layout(_shapes(found), own)[1] for found, own in zip(layers, packing, strict=True)]
    alignment = min(map(affine_alignment, used))
    sized = [-(-size // alignment) * alignment for size in used]
    return [checkpoint.layer_spec(*parts) for parts in zip(layers, sized, packing, strict=True)], alignment


def affine_layer_spec(found: checkpoint.ExpertLayer, bits: int, alignment: int) -> LayerSpec:
    """The same of one layer, with records that are a multiple of an alignment."""
    packing = affine_packing(found, bits)
    used = affine.layout(_shapes(found), packing)[1]
    return checkpoint.layer_spec(found, -(-used // alignment) * alignment, packing)


def _shapes(found: checkpoint.ExpertLayer) -> tuple[tuple[int, int], ...]:
    return tuple((rows, columns) for _, rows, columns in checkpoint.matrix_shapes(found))


def affine_alignment(used: int) -> int:
    """The largest alignment that pads a record of so many bytes by at most 0.5 %."""
    return next(a for a in ALIGNMENTS if -used % a <= MOST_PADDING * used or a == ALIGNMENTS[-1])


def affine_records(found: checkpoint.ExpertLayer, experts: range, layer: LayerSpec) -> Iterator[np.ndarray]:
    """Records of a few experts, u8 (record_bytes,) each; no other expert's weights are read.

    Raises:
        FormatError, ValueError: values that are not finite, with layer and expert.
    """
    arrays = checkpoint.expert_arrays(found, experts)
    matrices = [_stored(found, m[0], p, arrays, experts) for m, p in zip(layer.matrices, layer.packing, strict=True)]
    for i, expert in enumerate(experts):
        own = [{name: array[i] for name, array in matrix.items()} for matrix in matrices]
        record = affine.pack(own, layer.shapes, layer.packing, layer.record_bytes)
        affine.parse(record, layer.shapes, layer.packing, f"{found.path}, expert {expert}")
        yield record


def _stored(
    found: checkpoint.ExpertLayer, name: str, packing: affine.Packing, arrays: dict[str, mx.array], experts: range
) -> dict[str, np.ndarray]:
    """One matrix's arrays of all these experts as records hold them, taken out of `arrays`."""
    own = {
        key: arrays.pop(f"{name}.{key}") for key in ("weight", "scales", "biases", "bias") if f"{name}.{key}" in arrays
    }
    if "scales" not in own:
        checkpoint.require_finite_experts(found, name, own["weight"], experts)
        own |= zip(
            ("weight", "scales", "biases"), mx.quantize(own["weight"], packing.group_size, packing.bits), strict=True
        )
    out = {}
    for key in list(own):
        array = own.pop(key)
        out[key] = computed(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    mx.clear_cache()
    return out
