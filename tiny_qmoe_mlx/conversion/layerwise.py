"""Calibration tokens through a model one decoder layer at a time, with each layer's call in the caller's hands.

A conversion needs of every expert layer what mlx-lm's blocks keep to themselves: what reaches the experts, whom the
router picks with which weight, and what the layer puts out without them. One call with derivatives tells it all: the
layer's output is linear in what its experts give, so its derivative by the k-th pick is that pick's router weight.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.layers import use_cpu_kernels
from tiny_qmoe_mlx.library_errors import computing
from tiny_qmoe_mlx.original.checkpoint import named_modules
from tiny_qmoe_mlx.original.source import computed

TOKENS_AT_ONCE = 1024  # of a layer's call: what bounds its activations
Call = Callable[[np.ndarray], mx.array]  # a decoder layer on a stream (sequences, length, d) float32
Visit = Callable[[int, nn.Module, Call, mx.array], mx.array]
UNFIT = "this model type is not supported yet, only --calibration none can convert it."


class Withheld:
    """Stands for what a decoder layer returns beside its output, for later layers. They run on other streams at other
    times, so none may use it."""


class _Passed(Exception):
    """The last layer has been visited; what the model would compute after it is not wanted."""


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of the model's decoder layers, in the order in which tokens pass them.

    Raises:
        FormatError: the model does not say.
    """
    layers = getattr(model, "layers", None)
    if not layers:
        raise FormatError(
            "[convert] the model should list its decoder layers (mlx-lm's `layers`), it does not; only --calibration "
            "none can convert it."
        )
    paths = {id(module): path for path, module in named_modules(model)}
    return [(paths[id(layer)], layer) for layer in layers]


def run_layers(model: nn.Module, tokens: np.ndarray, visit: Visit, to_logits: bool = False) -> mx.array | None:
    """Embed tokens, then hand every decoder layer's call to `visit`; nothing after the last layer is computed unless
    asked for.

    Args:
        tokens: int32 (sequences, length).
        visit: called with (index, layer, call, x); x is what the layer would receive, and what it returns is what the
            next layer receives. `call` runs the layer itself on any stream of that length.
        to_logits: go on to the model's output.

    Returns:
        Logits (sequences, length, vocabulary) if asked for, lazily.

    Raises:
        FormatError: the tokens do not pass every layer.
    """
    layers = [layer for _, layer in decoder_layers(model)]
    visited: list[int] = []
    logits = None
    last = -1 if to_logits else len(layers) - 1
    kinds = [type(layer) for layer in layers]
    for index, layer in enumerate(layers):
        layer.__class__ = _watched(index, kinds[index], visit, visited, last)
    try:
        with computing("the original"):
            logits = model(mx.array(tokens))
    except _Passed:
        pass
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind
    if visited != list(range(len(layers))):
        raise FormatError(
            f"[convert] the tokens should pass layers 0 to {len(layers) - 1} in order, they passed {visited}; {UNFIT}"
        )
    return logits


def _watched(index: int, kind: type, visit: Visit, visited: list[int], last: int) -> type:
    """The layer's class with a call that goes through `visit`; attributes that the model asks for stay."""

    def call(self: nn.Module, x: mx.array, *args: object, **kwargs: object) -> mx.array | tuple:
        if any(isinstance(given, Withheld) for given in (*args, *kwargs.values())):
            raise FormatError(f"[convert] layer {index} should need nothing of earlier ones but their output; {UNFIT}")

        def own(stream: np.ndarray) -> mx.array:
            y = kind.__call__(self, mx.array(stream).astype(x.dtype), *args, **kwargs)
            return y[0] if isinstance(y, tuple) else y

        if not hasattr(self, "withheld"):  # its weights may be forgotten after the first visit
            self.withheld = _more(kind, self, x, *args, **kwargs)
        y = visit(index, self, own, x)
        visited.append(index)
        if index == last:
            raise _Passed
        return (y, *(Withheld() for _ in range(self.withheld))) if self.withheld else y

    return type(kind.__name__, (kind,), {"__call__": call})


def _more(kind: type, layer: nn.Module, x: mx.array, *args: object, **kwargs: object) -> int:
    """How many things a layer returns beside its output, by a call of which nothing is computed."""
    stands = [module for module in layer.modules() if isinstance(module, Experts)]
    for module in stands:
        module._answer = lambda x, indices: mx.zeros((*indices.shape, x.shape[-1]), x.dtype)
    try:
        y = kind.__call__(layer, x, *args, **kwargs)
    finally:
        for module in stands:
            module._answer = None
    return len(y) - 1 if isinstance(y, tuple) else 0


def as_float32(module: nn.Module) -> None:
    """Make a layer fit for MLX's CPU backend, which is slow or incomplete in half precision; in place."""
    if mx.default_device() == mx.cpu:
        module.set_dtype(mx.float32)
    use_cpu_kernels(module)


class Experts(nn.Module):
    """Stands for a layer's routed experts: notes what reaches them and gives what it was told to."""

    def __init__(self) -> None:
        super().__init__()
        self._answer: Callable[[mx.array, mx.array], mx.array] | None = None

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        if self._answer is None:
            raise FormatError("[convert] the experts should be called once per layer, they were called outside of it.")
        return self._answer(x, indices)


@dataclass
class Routed:
    """One expert layer's tokens, in the order of the stream.

    x: float32 (tokens, d), what the experts receive. chosen: int32 (tokens, k). weight: float32 (tokens, k), what each
    pick counts in the layer's output. base: float32 (tokens, d), the layer's output without its experts.
    linear: whether base + sum of weight x expert is the layer's output; if not, the weights are 1 / k and say nothing.
    """

    x: np.ndarray
    chosen: np.ndarray
    weight: np.ndarray
    base: np.ndarray
    linear: bool

    @property
    def counts(self) -> np.ndarray:
        """Picks that reach the layer's output, bool (tokens, k): a weight of zero is that of a token that the router
        turned away, or that is not the layer's own."""
        return self.weight > 0


def pieces(stream: np.ndarray) -> list[slice]:
    """Slices of whole sequences, of about 1024 tokens each."""
    step = max(1, TOKENS_AT_ONCE // stream.shape[1])
    return [slice(i, i + step) for i in range(0, len(stream), step)]


def run(call: Call, stream: np.ndarray) -> np.ndarray:
    """A layer without routed experts on a stream, float32 (sequences, length, d)."""
    return np.concatenate([_float32(call(stream[part])) for part in pieces(stream)])


def route(call: Call, experts: Experts, stream: np.ndarray, width: int) -> Routed:
    """What a stream's tokens do in a layer up to its experts and after them.

    Args:
        call: the decoder layer's.
        experts: its stand-in.
        stream: float32 (sequences, length, d).
        width: of the experts' output.

    Raises:
        FormatError: the layer does not call its experts once.
    """
    parts = [_route_piece(call, experts, stream[part], width) for part in pieces(stream)]
    linear = all(part.linear for part in parts) and _is_sum(call, experts, stream[pieces(stream)[0]], parts[0], width)
    fields = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("x", "chosen", "weight", "base")}
    if not linear:
        fields["weight"] = np.full_like(fields["weight"], 1 / fields["weight"].shape[1])
    return Routed(**fields, linear=linear)


def _route_piece(call: Call, experts: Experts, stream: np.ndarray, width: int) -> Routed:
    seen: list[tuple[mx.array, mx.array]] = []

    def layer(tangent_of: mx.array) -> mx.array:
        def answer(x: mx.array, indices: mx.array) -> mx.array:
            mx.eval(x, indices)
            seen.append((x, indices))
            k = indices.shape[-1]
            return mx.broadcast_to(tangent_of[: k * width].reshape(k, width), (*indices.shape, width)).astype(x.dtype)

        experts._answer = answer
        return call(stream)

    # zeros from the experts, and derivatives along pick i -> unit vector i: at most `width` picks can be told apart
    unit = mx.eye(MOST_PICKS, width).reshape(-1)
    try:
        (base,), (slope,) = mx.jvp(layer, [mx.zeros(MOST_PICKS * width)], [unit])
        mx.eval(base, slope)
    finally:
        experts._answer = None
    if len(seen) != 1:
        raise FormatError(f"[convert] a layer should call its experts once, this one called them {len(seen)} times.")
    x, indices = seen[0]
    k = indices.shape[-1]
    slopes = _float32(slope).reshape(-1, slope.shape[-1])
    linear = bool(np.all(np.isfinite(slopes)) and not slopes[:, k:].any() and slopes[:, :k].min() >= 0)
    tokens = _float32(x).reshape(-1, x.shape[-1])
    chosen = computed(indices).astype(np.int32).reshape(len(tokens), k)
    weight = slopes[:, :k] if linear else np.ones((len(tokens), k), np.float32)
    return Routed(tokens, chosen, np.ascontiguousarray(weight), _float32(base).reshape(-1, base.shape[-1]), linear)


def _is_sum(call: Call, experts: Experts, stream: np.ndarray, routed: Routed, width: int) -> bool:
    """Whether base + sum of weight x expert is what a layer puts out, for an answer that is not near zero: a norm
    after the experts, as Gemma's, has derivatives at zero that look like weights.
    """
    answer = np.random.default_rng(0).normal(size=(routed.weight.shape[1], width)).astype(np.float32)
    experts._answer = lambda x, indices: mx.broadcast_to(mx.array(answer), (*indices.shape, width)).astype(x.dtype)
    try:
        found = _float32(call(stream)).reshape(routed.base.shape)
    finally:
        experts._answer = None
    change = routed.weight @ answer
    error = np.abs(found - routed.base - change).max()
    return bool(error <= 1e-3 * np.abs(change).max() + 1e-5 * np.abs(routed.base).max())


def finish(call: Call, experts: Experts, stream: np.ndarray, routed: Routed, outputs: np.ndarray) -> np.ndarray:
    """The layer's output stream from what its experts gave.

    Args:
        outputs: float32 (tokens, d), weighted sums over the picks; where the layer is not linear in them (tokens, k, d)
            unweighted.
    """
    if routed.linear:
        return (routed.base + outputs).reshape(*stream.shape[:-1], -1)
    length, done = stream.shape[1], []
    for part in pieces(stream):
        rows = outputs[part.start * length : part.stop * length]
        experts._answer = lambda x, indices, rows=rows: mx.array(rows).reshape(*indices.shape, -1).astype(x.dtype)
        try:
            done.append(_float32(call(stream[part])))
        finally:
            experts._answer = None
    return np.concatenate(done)


MOST_PICKS = 64


def _float32(array: mx.array) -> np.ndarray:
    return computed(array.astype(mx.float32))
