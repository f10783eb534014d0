"""Calibration text -> tokens, and tokens at one layer -> the second moments of every expert's inputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.expert_kind import ExpertKind
from tiny_qmoe_mlx.quantize import ExpertInputs, blend, token_weights

STARVED = 4  # an expert with fewer tokens than this many times its width also sees tokens that were not routed to it
PRIOR_TOKENS = 512


@dataclass
class LayerTokens:
    """What reaches one expert layer: x float32 (tokens, d), chosen int (tokens, k)."""

    x: np.ndarray
    chosen: np.ndarray


def read_text(path: Path, where: str = "calibration") -> str:
    """The text of a calibration file, or of another one that `where` names in errors.

    Raises:
        FormatError: missing, empty, or not UTF-8 text.
    """
    if not path.is_file():
        raise FormatError(f"[{where}] {path} should be a text file; there is no such file.")
    raw = path.read_bytes()
    if not raw.strip():
        raise FormatError(f"[{where}] {path} should hold text, it is empty.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"[{where}] {path} should be UTF-8 text, byte {error.start} is not; is it a binary file?"
        ) from error
    if "\0" in text:
        raise FormatError(f"[{where}] {path} should be text, byte {text.index(chr(0))} is NUL; is it a binary file?")
    return text


def token_batch(ids: list[int], sequences: int, length: int, where: str) -> np.ndarray:
    """Equal stretches of a text, spread evenly over it: int32 (at most `sequences`, length).

    Raises:
        FormatError: the text is shorter than one sequence.
    """
    count = min(sequences, len(ids) // length)
    if count < 1:
        raise FormatError(
            f"[calibration] {where} should have at least {length} tokens, it has {len(ids)}; give a longer text."
        )
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return np.stack([np.asarray(ids[s : s + length], np.int32) for s in starts])


def expert_inputs(
    weights: list[np.ndarray], biases: list[np.ndarray] | None, tokens: LayerTokens | None, kind: ExpertKind
) -> Iterator[ExpertInputs]:
    """One layer's experts as the quantizer takes them.

    The Hessian of an expert's inputs is the mean of x x^T over its tokens, with the layer's blended in where they are
    few (`quantize.blend`); that of down's inputs likewise, over the activations that the expert's own weights give.

    Args:
        weights: float32 (experts, rows, columns) per matrix.
        biases: float32 (experts, rows) per matrix, or None.
        tokens: None for no calibration: identity Hessians.
    """
    layer_sum = tokens.x.T @ tokens.x if tokens else None
    for e in range(len(weights[0])):
        mine = [w[e] for w in weights]
        bias = [b[e] for b in biases] if biases else None
        if tokens is None:
            yield ExpertInputs(mine, _identity(mine[0].shape[1]), _identity(mine[-1].shape[1]), bias)
            continue
        x = tokens.x[(tokens.chosen == e).any(1)]
        hidden = _hidden(mine, bias, x, kind) if len(x) else np.zeros((0, mine[-1].shape[1]), np.float32)
        h_in = blend(_weighted_moment(x, hidden, mine[-1]), len(x), layer_sum, len(tokens.x))
        yield ExpertInputs(mine, h_in, _hidden_moment(mine, bias, hidden, tokens, kind), bias)


def _weighted_moment(x: np.ndarray, hidden: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Sum of x x^T, tokens weighted by what their hidden values do to the output (mean weight 1)."""
    if not len(x):
        return x.T @ x
    weight = token_weights(hidden, down)
    return x.T @ (x * (weight / weight.mean())[:, None].astype(np.float32))


def _identity(size: int) -> np.ndarray:
    return np.eye(size, dtype=np.float32)


def _hidden(weights: list[np.ndarray], bias: list[np.ndarray] | None, x: np.ndarray, kind: ExpertKind) -> np.ndarray:
    """The input of the last matrix for inputs x, float32 (tokens, width)."""
    parts = [x @ w.T for w in weights[:-1]]
    if bias:
        parts = [p + b for p, b in zip(parts, bias[:-1], strict=True)]
    return kind.activate(parts)


def _hidden_moment(
    weights: list[np.ndarray], bias: list[np.ndarray] | None, hidden: np.ndarray, tokens: LayerTokens, kind: ExpertKind
) -> np.ndarray:
    if len(hidden) >= STARVED * hidden.shape[1]:
        return blend(hidden.T @ hidden, len(hidden))
    # what the expert would compute for tokens that went elsewhere is the best guess at what it has not seen
    others = tokens.x[:: max(1, len(tokens.x) // PRIOR_TOKENS)]
    prior = _hidden(weights, bias, others, kind)
    return blend(hidden.T @ hidden, len(hidden), prior.T @ prior, len(others))
