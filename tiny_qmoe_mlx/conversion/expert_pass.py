"""One expert layer's work in a conversion: its original experts over the reference stream, its records out of the
original weights, and the compressed experts over the compressed stream. Weights are read in groups of experts.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np

from tiny_qmoe_mlx import ops
from tiny_qmoe_mlx.codecs import trellis
from tiny_qmoe_mlx.conversion.calibrate import LayerTokens, expert_inputs, hidden_values
from tiny_qmoe_mlx.conversion.layerwise import Routed
from tiny_qmoe_mlx.conversion.quantize import ExpertInputs, quantize_layer
from tiny_qmoe_mlx.expert_kind import ExpertKind
from tiny_qmoe_mlx.original import checkpoint
from tiny_qmoe_mlx.spec import LayerSpec

GROUP_BYTES = 1 << 28  # of weights in float32 that are in memory at once, at least one expert's


class Sums:
    """What a layer's experts give, gathered expert by expert: weighted sums (tokens, d), or every pick (tokens, k, d)
    where the layer does more with it than to add.
    """

    def __init__(self, routed: Routed, width: int):
        self.routed = routed
        shape = (len(routed.x), width) if routed.linear else (*routed.chosen.shape, width)
        self.values = np.zeros(shape, np.float32)

    def add(self, expert: int, compute: Callable[[np.ndarray], np.ndarray]) -> None:
        """Add an expert's outputs; `compute` maps inputs float32 (n, d) of its tokens to float32 (n, width)."""
        token, place = np.nonzero(self.routed.counts & (self.routed.chosen == expert))
        if not len(token):
            return
        y = compute(self.routed.x[token])
        if self.routed.linear:
            self.values[token] += self.routed.weight[token, place, None] * y
        else:
            self.values[token, place] = y


def groups(found: checkpoint.ExpertLayer) -> list[range]:
    """A layer's experts in groups whose float32 weights take 256 MiB at most."""
    size = 4 * sum(rows * columns for _, rows, columns in checkpoint.matrix_shapes(found))
    step, count = max(1, GROUP_BYTES // size), checkpoint.expert_count(found)
    return [range(i, min(i + step, count)) for i in range(0, count, step)]


def original_outputs(found: checkpoint.ExpertLayer, kind: ExpertKind, streams: list[Routed]) -> list[np.ndarray]:
    """What the original experts give for the tokens of some streams (`Sums.values`); weights are read once for all."""
    sums = [Sums(routed, kind.matrices[-1][1]) for routed in streams]
    for group in groups(found):
        weights, biases = checkpoint.expert_weights(found, group)
        for e in group:
            mine = [w[e - group.start] for w in weights]
            bias = [b[e - group.start] for b in biases] if biases else None
            for stream in sums:
                stream.add(e, partial(_original, mine, bias, kind))
    return [stream.values for stream in sums]


def _original(weights: list[np.ndarray], bias: list[np.ndarray] | None, kind: ExpertKind, x: np.ndarray) -> np.ndarray:
    y = hidden_values(weights, bias, x, kind) @ weights[-1].T
    return y + bias[-1] if bias else y


def compressed_records(
    found: checkpoint.ExpertLayer, layer: LayerSpec, kind: ExpertKind, tokens: LayerTokens | None
) -> Iterator[np.ndarray]:
    """A layer's records, u8 (record_bytes,) each, expert 0 first.

    Raises:
        ValueError: weights that are not finite, with layer and expert.
    """
    try:
        for record in quantize_layer(
            _inputs(found, kind, tokens), kind.sign_in, kind.sign_mid, layer.record_bytes, kind.length
        ):
            yield trellis.pack(record, layer.record_bytes)
    except ValueError as error:
        raise ValueError(f"{found.path}: {error}") from error


def _inputs(found: checkpoint.ExpertLayer, kind: ExpertKind, tokens: LayerTokens | None) -> Iterator[ExpertInputs]:
    moment = tokens.x.T @ tokens.x if tokens else None
    for group in groups(found):
        weights, biases = checkpoint.expert_weights(found, group)
        yield from expert_inputs(weights, biases, group.start, tokens, moment, kind)


def summed(records: Iterable[np.ndarray], kind: ExpertKind, sums: Sums) -> Iterator[np.ndarray]:
    """Pass records on, and add what they compute for the sums' tokens."""

    def product(record: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: ops.expert_product(record, ops.expert_inputs(x, kind), kind, ops.Dispatch())

    for expert, record in enumerate(records):
        sums.add(expert, product(record))
        yield record
