"""Tokens at one expert layer -> what the quantizer needs of every expert: the second moments of its inputs, and weights
that make up for what earlier layers lost.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tiny_qmoe_mlx.conversion.drift import corrected_down, share_of_missing
from tiny_qmoe_mlx.conversion.quantize import ExpertInputs, blend, token_weights
from tiny_qmoe_mlx.expert_kind import ExpertKind

STARVED = 4  # an expert with fewer tokens than this many times its width also sees tokens that were not routed to it
PRIOR_TOKENS = 512


@dataclass
class LayerTokens:
    """What reaches one expert layer: x float32 (tokens, d), chosen int (tokens, k), router weights float32 (tokens, k),
    and what the layer's output would lack beside the original model's if its experts were the original ones, missing
    float32 (tokens, d), or None where that is not known. corrected: whether down makes up for it, and for the rounding
    of gate and up. counted: bool (tokens,), those to learn from where they are chosen expert by expert (codec qmoe);
    None for all.
    """

    x: np.ndarray
    chosen: np.ndarray
    weight: np.ndarray
    missing: np.ndarray | None = None
    corrected: bool = False
    counted: np.ndarray | None = None

    def of_expert(self, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of an expert's tokens, and the router weights that it has there."""
        token, place = np.nonzero(self.chosen == expert)
        return token, self.weight[token, place]


def expert_inputs(
    weights: list[np.ndarray],
    biases: list[np.ndarray] | None,
    first: int,
    tokens: LayerTokens | None,
    moment: np.ndarray | None,
    kind: ExpertKind,
) -> Iterator[ExpertInputs]:
    """Some of a layer's experts as the quantizer takes them.

    The Hessian of an expert's inputs is the mean of x x^T over its tokens, each weighted by its squared router weight
    (an error counts as much as it reaches the layer's output), with the layer's Hessian blended in where the expert has
    few tokens (`quantize.blend`); that of down's inputs likewise, over the activations that the expert's own weights
    give.

    Args:
        weights: float32 (experts, rows, columns) per matrix.
        biases: float32 (experts, rows) per matrix, or None.
        first: number of the first of these experts.
        tokens: None for no calibration: identity Hessians.
        moment: float32 (d, d), sum of x x^T over all tokens of the layer, or None for no calibration.
    """
    for e in range(len(weights[0])):
        mine = [w[e] for w in weights]
        bias = [b[e] for b in biases] if biases else None
        if tokens is None:
            yield ExpertInputs(mine, _identity(mine[0].shape[1]), _identity(mine[-1].shape[1]), bias)
        else:
            yield _calibrated(mine, bias, first + e, tokens, moment, kind)


def _calibrated(
    weights: list[np.ndarray],
    bias: list[np.ndarray] | None,
    expert: int,
    tokens: LayerTokens,
    moment: np.ndarray | None,
    kind: ExpertKind,
) -> ExpertInputs:
    token, router = tokens.of_expert(expert)
    x = tokens.x[token]
    share = np.square(router) / max(np.square(router).mean(), 1e-30) if len(x) else router
    hidden = hidden_values(weights, bias, x, kind) if len(x) else np.zeros((0, weights[-1].shape[1]), np.float32)
    h_in = blend(_weighted_moment(x, hidden, share, weights[-1]), len(x), moment, len(tokens.x))
    h_mid = _hidden_moment(weights, bias, hidden.T @ (hidden * share[:, None]), len(x), tokens, kind)
    if not tokens.corrected or not len(x):
        return ExpertInputs(weights, h_in, h_mid, bias)
    missing = None
    if tokens.missing is not None:
        missing = share_of_missing(tokens.missing, tokens.chosen, tokens.weight, expert)

    def down_inputs(rounded: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Down as it makes up for the rounding of gate and up, and for what earlier layers lost."""
        now = [*rounded, weights[-1]]
        down, own = corrected_down(weights[-1], hidden, hidden_values(now, bias, x, kind), missing, router)
        own /= np.float32(max(np.square(router).mean(), 1e-30))
        return down, _hidden_moment(now, bias, own, len(x), tokens, kind)

    return ExpertInputs(weights, h_in, h_mid, bias, down_inputs)


def _weighted_moment(x: np.ndarray, hidden: np.ndarray, share: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Sum of x x^T, tokens weighted by what their hidden values do to the output (mean weight 1)."""
    if not len(x):
        return x.T @ x
    weight = share * token_weights(hidden, down)
    return x.T @ (x * (weight / weight.mean())[:, None].astype(np.float32))


def _identity(size: int) -> np.ndarray:
    return np.eye(size, dtype=np.float32)


def hidden_values(
    weights: list[np.ndarray], bias: list[np.ndarray] | None, x: np.ndarray, kind: ExpertKind
) -> np.ndarray:
    """The input of the last matrix for inputs x, float32 (tokens, width)."""
    parts = [x @ w.T for w in weights[:-1]]
    if bias:
        parts = [p + b for p, b in zip(parts, bias[:-1], strict=True)]
    return kind.activate(parts)


def _hidden_moment(
    weights: list[np.ndarray],
    bias: list[np.ndarray] | None,
    own: np.ndarray,
    count: int,
    tokens: LayerTokens,
    kind: ExpertKind,
) -> np.ndarray:
    """Second moment of down's inputs, float32 (w, w), from the sum over the expert's own `count` tokens."""
    if count >= STARVED * len(own):
        return blend(own, count)
    # what the expert would compute for tokens that went elsewhere is the best guess at what it has not seen
    others = tokens.x[:: max(1, len(tokens.x) // PRIOR_TOKENS)]
    prior = hidden_values(weights, bias, others, kind)
    return blend(own, count, prior.T @ prior, len(others))
