"""What a conversion will write: record sizes and the container's words, before a weight is quantized."""

from collections.abc import Callable
from pathlib import Path

import mlx.nn as nn
import numpy as np

from tiny_qmoe_mlx import checkpoint
from tiny_qmoe_mlx.rates import record_bytes_for
from tiny_qmoe_mlx.settings import Settings
from tiny_qmoe_mlx.spec import FORMAT_VERSION, LayerSpec, ModelSpec, bits_per_weight, expert_file_name


def plan_layers(
    model: nn.Module,
    layers: list[checkpoint.ExpertLayer],
    settings: Settings,
    source: tuple[str, str | None],
    tokens: np.ndarray | None,
    progress: Callable[[str, int, int], None],
) -> ModelSpec:
    """Record sizes and the container's words."""
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
    return ModelSpec(
        format_version=FORMAT_VERSION,
        codec=settings.codec,
        bits=round(bits_per_weight(specs, alignment), 4),
        alignment=alignment,
        length=settings.length,
        seed=settings.seed,
        layers=tuple(specs),
        source={"model": source[0], "revision": source[1]},
        calibration={"source": Path(settings.calibration).name, "tokens": 0 if tokens is None else int(tokens.size)},
    )
