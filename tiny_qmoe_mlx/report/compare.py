"""A converted model beside its original: perplexity, KL divergence and agreement on windows of tokens."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from tiny_qmoe_mlx import budget, masked_spans, models
from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.conversion import writer
from tiny_qmoe_mlx.conversion.text import beginning, text_tokens
from tiny_qmoe_mlx.library_errors import computing
from tiny_qmoe_mlx.masked_spans import Masked, is_encoder_decoder
from tiny_qmoe_mlx.original import dense
from tiny_qmoe_mlx.original.shipped import dequantize_rest
from tiny_qmoe_mlx.vocabulary import check_ids

Progress = Callable[[str, int, int], None]
MOST_NATS = 709.0  # whose exponential a float holds


def evaluate(
    model: Any, windows: list[list[int]], against: Any = None, progress: Progress = lambda what, done, total: None
) -> dict[str, float]:
    """Score a model on token windows; the first token of each is context only.

    Args:
        model: maps int (1, tokens) to logits (1, tokens, vocabulary).
        windows: token ids; `Masked` of an encoder-decoder.
        against: another model over the same vocabulary, whose predictions are the truth for KL and top-1.

    Returns:
        tokens, nll (mean, nats), perplexity; with `against` also kl_mean, kl_median, kl_p99 (nats), top1 (share of
        positions where both like the same token best) and against_perplexity.

    Raises:
        ValueError: the two vocabularies differ, or a model predicts what is no probability.
    """
    rows = []
    for i, window in enumerate(windows):
        rows.append(_score(model, against, window))
        progress("evaluating", i + 1, len(windows))
    columns = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
    nll = float(columns[0].mean(dtype=np.float64))
    out = {"tokens": len(columns[0]), "nll": nll, "perplexity": _perplexity(nll)}
    if against is not None:
        kl = columns[2]
        out |= {
            "kl_mean": float(kl.mean()),
            "kl_median": float(np.median(kl)),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "top1": float(columns[3].mean()),
            "against_perplexity": _perplexity(float(columns[1].mean(dtype=np.float64))),
        }
    return out


def _perplexity(nll: float) -> float:
    """Of a mean in nats; infinite where no number is so large."""
    if math.isnan(nll):
        raise ValueError(
            "[evaluate] a model should predict probabilities, it gives NaN; its weights are too large to compute with."
        )
    return math.exp(nll) if nll < MOST_NATS else math.inf


def _score(model: Any, against: Any, window: list[int]) -> list[Any]:
    """Per predicted token: nll, and with another model its nll, the KL divergence from it, and whether the best
    agree.
    """
    targets = mx.array(window[1:])[:, None]
    q = _log_probabilities(model, window)
    parts = [-mx.take_along_axis(q, targets, -1)[:, 0]]
    if against is not None:
        p = _log_probabilities(against, window)
        if p.shape != q.shape:
            raise ValueError(
                f"[evaluate] both models should have one vocabulary, received {q.shape[-1]} and {p.shape[-1]} tokens."
            )
        kl = _divergence(p, q)
        parts += [-mx.take_along_axis(p, targets, -1)[:, 0], kl, (p.argmax(-1) == q.argmax(-1)).astype(mx.float32)]
    mx.eval(parts)
    return [np.array(part) for part in parts]


def _log_probabilities(model: Any, window: list[int]) -> Any:
    """float32 (tokens - 1, vocabulary); of masked spans what the decoder predicts."""
    with computing("the model"):
        caches = {"cache": model.make_cache(mx.array(window.inputs)[None])} if isinstance(window, Masked) else {}
        logits = model(mx.array(window[:-1])[None], **caches)[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _divergence(p: Any, q: Any) -> Any:
    """KL of q from the truth p, both log probabilities, float32 (tokens,)."""
    return (mx.exp(p) * (p - q)).sum(-1)


def cut(ids: list[int], length: int, tokens: int, begin: list[int]) -> list[list[int]]:
    """Windows of `length` predictions each (one token more), one after the other, of at most `tokens` predictions.

    Args:
        begin: the token that a text begins with, which then stands before each window; or nothing.

    Raises:
        ValueError: fewer than two tokens.
    """
    if begin and ids:
        return [begin + ids[start : min(start + length, tokens)] for start in range(0, min(len(ids), tokens), length)]
    ids = ids[: tokens + 1]
    if len(ids) < 2:
        raise ValueError("[evaluate] the text should have at least two tokens; give a longer one.")
    return [ids[start : start + length + 1] for start in range(0, len(ids) - 1, length)]


def windows_of(text: str, length: int, tokens: int, tokenizer: Any, config: dict[str, Any]) -> list[list[int]]:
    """Windows of a text as `evaluate` takes them, by `cut`; for an encoder-decoder of `length` tokens with spans
    masked, one at least, else of at most `tokens` predictions.

    Raises:
        ValueError: fewer than two tokens, one that the model does not have, or a window with more spans than the
            tokenizer has sentinels.
    """
    most = (
        8 * tokens + length if is_encoder_decoder(config) else tokens + 1
    )  # of the tokens a fifth at least is predicted
    ids = text_tokens(tokenizer, text, most).tolist()
    if ids:
        check_ids(config, ids, "text")
    if not is_encoder_decoder(config):
        return cut(ids, length, tokens, beginning(tokenizer))
    pieces = [ids[start : start + length] for start in range(0, len(ids) - 1, length)]
    if not pieces:
        raise ValueError("[evaluate] the text should have at least two tokens; give a longer one.")
    each = sum(masked_spans.counts(len(pieces[0]))) + 1
    return [*masked_spans.mask_all(pieces[: max(1, tokens // each)], tokenizer, config)]


def open_original(directory: Path, reserved: int, context: int) -> tuple[Any, dict[str, Any], bool]:
    """(model, config, whether it is held in memory): read anew for every call where memory does not suffice.

    Args:
        directory: of the checkpoint.
        reserved: bytes of memory that something else needs.
        context: tokens of one call.
    """
    model, config = writer.open_original(directory)
    if writer.memory_bytes(model, config, context) + reserved <= writer.available_bytes():
        return model, config, True
    return Reread(directory), config, False


class Reread:
    """An original larger than memory: each call reads it once, and holds one decoder layer at a time."""

    def __init__(self, directory: Path):
        self._directory = directory

    def __call__(self, inputs: Any, **caches: Any) -> Any:
        """int (1, tokens) -> logits (1, tokens, vocabulary); `caches`: of an encoder-decoder."""
        model, _ = writer.open_original(self._directory)
        for layer in model.layers:
            layer.__class__ = _used_once(type(layer))
        return model(inputs, **caches)

    def make_cache(self, inputs: Any) -> Any:
        """Of an encoder-decoder, as it makes them itself."""
        return writer.open_original(self._directory)[0].make_cache(inputs)


def _used_once(kind: type) -> type:
    """A decoder layer's class whose weights are gone after its first call."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = kind.__call__(self, *args, **kwargs)
        mx.eval(y)
        self.clear()
        mx.clear_cache()
        return y

    return type(kind.__name__, (kind,), {"__call__": call})


@dataclass
class Pair:
    """A converted model beside its original; `whole`: the original is held in memory."""

    converted: Any
    original: Any
    tokenizer: Any
    whole: bool


def open_pair(directory: Path, source: Path, context: int) -> Pair:
    """Both models, in as much memory as this machine can give.

    Raises:
        FormatError: one of them is not what it should be.
        BudgetError: the converted model does not fit.
    """
    tokenizer = models.open_tokenizer(directory)
    limit = budget.split(open_model(directory), sys.maxsize, context, mx.default_device() == mx.cpu)
    original, config, whole = open_original(source, limit.min_budget_bytes, context)
    room = writer.available_bytes() - (writer.memory_bytes(original, config, context) if whole else 0)
    converted, _ = models.load(directory, min(room, limit.resident_budget_bytes), context, tokenizer=tokenizer)
    return Pair(converted, original, tokenizer, whole)


def layer_kl(
    pair: Pair, window: list[int], progress: Progress = lambda what, done, total: None
) -> list[dict[str, float]]:
    """KL to the original when the experts of one layer alone are the compressed ones.

    Args:
        pair: with the original in memory; it computes what it did afterwards.
        window: token ids.

    Returns:
        [{"layer": decoder layer, "kl": mean in nats}] of every MoE layer.
    """
    layers = pair.converted.tiny_qmoe.container.spec.layers
    if not layers[0].whole and not dense.is_mixture(pair.original):
        dequantize_rest(pair.original)
        dense.as_mixture(pair.original)
    own = dict(pair.original.named_modules())
    p, found = _log_probabilities(pair.original, window), []
    mx.eval(p)
    for i, (layer, experts) in enumerate(zip(layers, models.record_layers(pair.converted), strict=True)):
        pair.original.update_modules(tree_unflatten([(layer.path, experts)]))
        kl = _divergence(p, _log_probabilities(pair.original, window)).mean().item()
        pair.original.update_modules(tree_unflatten([(layer.path, own[layer.path])]))
        found.append({"layer": layer.layer, "kl": kl})
        progress("measuring layers", i + 1, len(layers))
    return found
