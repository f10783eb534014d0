"""What a conversion will write: record sizes and the container's words, before a weight is quantized."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tiny_qmoe_mlx.conversion.affine import affine_layer_specs
from tiny_qmoe_mlx.conversion.qmoe import qmoe_layer_specs
from tiny_qmoe_mlx.conversion.rates import layer_bits, record_bytes_for
from tiny_qmoe_mlx.conversion.sensitivity import sensitivities
from tiny_qmoe_mlx.conversion.settings import MAX_BITS, Settings
from tiny_qmoe_mlx.errors import BudgetError
from tiny_qmoe_mlx.expert_kind import expert_kind
from tiny_qmoe_mlx.hub.client import Located, original_name
from tiny_qmoe_mlx.original import checkpoint
from tiny_qmoe_mlx.spec import AFFINE, CODEC, FORMAT_VERSION, QMOE, LayerSpec, ModelSpec, bits_per_weight

LEAST_BITS = 0.75  # of a layer that gets fewer bits than others: below, most blocks of an expert would be absent
SHARE = 0.6  # of the asked bits that every layer gets at least
ROUNDS = 4  # of correcting the mean of what whole records really take

Progress = Callable[[str, int, int], None]


def plan_layers(
    layers: list[checkpoint.ExpertLayer],
    settings: Settings,
    located: Located,
    name: str,
    tokens: np.ndarray | None,
    progress: Progress,
) -> ModelSpec:
    """Record sizes and the container's words.

    Raises:
        BudgetError: too few bits for these shapes.
    """
    if settings.codec == AFFINE:
        specs, alignment = affine_layer_specs(layers, int(settings.bits))
        return _model_spec(specs, alignment, settings, located, name, None)
    if settings.codec == QMOE:
        specs, alignment = qmoe_layer_specs(layers, settings)
        return _model_spec(specs, alignment, settings, located, name, tokens)
    equal = _spec(layers, [settings.bits] * len(layers), settings, located, name, tokens)
    if not settings.layer_rates or tokens is None or len(layers) < 2:
        return equal
    kinds = {s.layer: expert_kind(s, equal, f.module.activation) for f, s in zip(layers, equal.layers, strict=True)}
    measured = sensitivities(located.directory, kinds, tokens, progress)
    least = max(SHARE * settings.bits, min(LEAST_BITS, settings.bits))
    asked, best = settings.bits, equal
    for _ in range(ROUNDS):
        shares = layer_bits(measured, np.array([s.weights for s in equal.layers]), asked, least, MAX_BITS)
        try:
            best = _spec(layers, shares.tolist(), settings, located, name, tokens)
        except BudgetError:  # a layer's share does not hold its gains
            return equal
        asked += settings.bits - best.bits
        if abs(best.bits - settings.bits) < 0.002 * settings.bits or not least < asked < MAX_BITS:
            break
    return best


def _spec(
    layers: list[checkpoint.ExpertLayer],
    bits: list[float],
    settings: Settings,
    located: Located,
    name: str,
    tokens: np.ndarray | None,
) -> ModelSpec:
    sized = [_record(found, share) for found, share in zip(layers, bits, strict=True)]
    alignment = min(a for _, a in sized)
    specs = [
        checkpoint.layer_spec(found, size // alignment * alignment)
        for found, (size, _) in zip(layers, sized, strict=True)
    ]
    return _model_spec(specs, alignment, settings, located, name, tokens)


def _model_spec(
    specs: list[LayerSpec],
    alignment: int,
    settings: Settings,
    located: Located,
    name: str,
    tokens: np.ndarray | None,
) -> ModelSpec:
    trellis = settings.codec == CODEC
    return ModelSpec(
        format_version=FORMAT_VERSION,
        codec=settings.codec,
        bits=round(bits_per_weight(specs, alignment), 4),
        alignment=alignment,
        length=settings.length if trellis else 0,
        seed=settings.seed if trellis else 0,
        layers=tuple(specs),
        source={"model": original_name(name), "revision": located.revision},
        calibration={
            "source": Path(settings.calibration).name if settings.codec != AFFINE else "none",
            "tokens": 0 if tokens is None else int(tokens.size),
        },
    )


def _record(found: checkpoint.ExpertLayer, bits: float) -> tuple[int, int]:
    """(bytes, alignment) of a layer's records."""
    shapes = [(rows, columns) for _, rows, columns in checkpoint.matrix_shapes(found)]
    return record_bytes_for(bits, shapes, checkpoint.expert_count(found), checkpoint.has_bias(found))
