"""How much each expert layer matters: what a small error of its output does to the model's predictions.

One pass of the original: every sequence goes through twice, the second time with noise in the expert output of one
layer, which is another one from group to group. The KL divergence of the two predictions, per squared relative error,
is that layer's sensitivity; `rates.layer_bits` makes bits of it.
"""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from tiny_qmoe_mlx.conversion import layerwise, rest
from tiny_qmoe_mlx.conversion.expert_pass import original_outputs
from tiny_qmoe_mlx.expert_kind import ExpertKind
from tiny_qmoe_mlx.original import checkpoint, dense
from tiny_qmoe_mlx.original.shipped import dequantize_rest
from tiny_qmoe_mlx.original.source import computed

NOISE = 0.1  # relative to a token's expert output: small enough for its square to count, large against rounding
PER_LAYER, LENGTH = 2, 64  # sequences for each layer, and their tokens
Progress = Callable[[str, int, int], None]


def sensitivities(source: Path, kinds: dict[int, ExpertKind], tokens: np.ndarray, progress: Progress) -> np.ndarray:
    """Sensitivity of every expert layer, float64 (layers,), in the order of `kinds`.

    Args:
        source: directory of the original; its layers are read one at a time.
        kinds: by the index of the decoder layer.
        tokens: int32 (sequences, length) to take stretches from.
        progress: called with (what, done, total).

    Raises:
        FormatError: the model cannot be taken apart.
    """
    model, _ = checkpoint.load_lazy(source)  # its own: what a layer's weights take is given back after it
    dequantize_rest(model)
    if not dense.is_mixture(model):
        dense.as_mixture(model)
    found = {f.layer: f for f in checkpoint.expert_layers(model)}
    batch, group = _batch(tokens, list(kinds))
    paths = [path for path, _ in layerwise.decoder_layers(model)]
    experts = {layer: layerwise.Experts() for layer in kinds}
    model.update_modules(tree_unflatten([(found[layer].path, experts[layer]) for layer in kinds]))
    rest.require_finite(rest.outside(model, tuple(f"{path}." for path in paths)))
    streams: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(0)

    def visit(index: int, layer: nn.Module, call: layerwise.Call, x: mx.array) -> mx.array:
        if not streams:
            streams["clean"] = computed(x.astype(mx.float32))
            streams["noisy"] = streams["clean"][:0]
        rest.require_finite(rest.weights(layer), f"{paths[index]}.")
        layerwise.as_float32(layer)
        if index in kinds:
            _with_experts(streams, group, index, call, experts[index], found[index], kinds[index], rng)
            progress("measuring layers", list(kinds).index(index) + 1, len(kinds))
        else:
            for name in [n for n in streams if len(streams[n])]:
                streams[name] = layerwise.run(call, streams[name])
        rest.forget(layer)
        return x

    layerwise.run_layers(model, batch, visit)
    divergence = _divergence(model, batch, streams["clean"], streams["noisy"])
    return np.array([divergence[group == layer].mean() for layer in kinds]) / NOISE**2


def _batch(tokens: np.ndarray, layers: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sequences (layers * 2, 64), those of the first layer first, and the layer that each belongs to."""
    length = min(LENGTH, tokens.shape[1])
    pieces = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
    chosen = np.linspace(0, len(pieces) - 1, PER_LAYER * len(layers)).astype(int)
    chosen = np.random.default_rng(0).permutation(chosen)
    return np.ascontiguousarray(pieces[chosen]), np.repeat(layers, PER_LAYER)


def _with_experts(
    streams: dict[str, np.ndarray],
    group: np.ndarray,
    index: int,
    call: layerwise.Call,
    experts: layerwise.Experts,
    found: checkpoint.ExpertLayer,
    kind: ExpertKind,
    rng: np.random.Generator,
) -> None:
    """Both streams through a layer. A sequence joins the noisy stream at its own layer: up to there it is clean."""
    joining = streams["clean"][group == index]
    noisy = np.concatenate([streams["noisy"], joining])
    width = kind.matrices[-1][1]
    routed = [layerwise.route(call, experts, stream, width) for stream in (streams["clean"], noisy)]
    clean, other = original_outputs(found, kind, routed)
    at = other[len(other) - joining.shape[0] * joining.shape[1] :]
    at += _noise(at, rng)
    streams["clean"] = layerwise.finish(call, experts, streams["clean"], routed[0], clean)
    streams["noisy"] = layerwise.finish(call, experts, noisy, routed[1], other)


def _noise(outputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of a tenth of each token's output; of tokens with massive outputs, of a tenth of the median's."""
    size = np.linalg.norm(outputs, axis=-1, keepdims=True)
    scale = np.minimum(size, np.median(size)) * NOISE / np.sqrt(outputs.shape[-1])
    return rng.standard_normal(outputs.shape, np.float32) * scale.astype(np.float32)


def _divergence(model: nn.Module, batch: np.ndarray, clean: np.ndarray, noisy: np.ndarray) -> np.ndarray:
    """Mean KL divergence in nats of each sequence's predictions, float64 (sequences,)."""
    layerwise.as_float32(model)
    out = []
    for i in range(len(batch)):
        p, q = (_log_probabilities(model, batch[i : i + 1], stream[i : i + 1]) for stream in (clean, noisy))
        out.append((mx.exp(p) * (p - q)).sum(-1).mean().item())
    return np.maximum(np.array(out, np.float64), 0)


def _log_probabilities(model: nn.Module, tokens: np.ndarray, stream: np.ndarray) -> mx.array:
    """What the model predicts when its last layer gives `stream`."""
    logits = layerwise.run_layers(
        model, tokens, lambda index, layer, call, x: mx.array(stream).astype(x.dtype), to_logits=True
    )
    assert logits is not None
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
