"""What `down` can do about errors made before it: of its own gate and up, and of all layers before this one.

The calibration tokens run through the model twice, as the original computes them and as the compressed layers do. After
a layer the two streams differ by what the layers before lost, and by what gate and up lost by rounding. The part of it
that down's input predicts is added to down before down itself is rounded: a ridge regression, whose ridge stands for so
many tokens per column that an expert with few tokens keeps its weights. GPTAQ (arXiv 2504.02692) and Qronos (arXiv
2505.11695) correct for inputs alone, without the residual stream.
"""

import numpy as np

from tiny_qmoe_mlx.conversion.feedback import clipped

RIDGE = 6.0  # tokens per column of down that count as saying "no change"; best on held-out tokens
CARRIED = 0.5  # share of what earlier layers lost that is corrected; all of it fits noise


def corrected_down(
    down: np.ndarray,
    hidden: np.ndarray,
    rounded: np.ndarray,
    missing: np.ndarray | None,
    router: np.ndarray | None = None,
    ridge: float = RIDGE,
    carried: float = CARRIED,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of down that bring an expert's output nearer to what the original model has after this layer.

    Args:
        down: float32 (d, w).
        hidden: float32 (tokens, w), down's input for the expert's tokens of the compressed stream, by the original gate
            and up.
        rounded: the same by the rounded gate and up.
        missing: float32 (tokens, d), the expert's share of what the layer's output would lack beside the original model
            if its experts were the original ones (`share_of_missing`); None where no reference is known: then only the
            rounding of gate and up is made up for.
        router: float32 (tokens,), what the expert's output is multiplied with in the layer's output; None for ones.
        ridge: tokens per column.
        carried: share of `missing` that is corrected.

    Returns:
        (float32 (d, w), float32 (w, w): sum over tokens of router^2 x rounded x rounded^T).
    """
    factor = np.ones(len(rounded), np.float32) if router is None else np.asarray(router, np.float32)
    inputs = rounded * factor[:, None]
    moment = inputs.T @ inputs
    if not len(rounded):
        return down, moment
    wanted = ((hidden - rounded) @ down.T) * factor[:, None]
    if missing is not None:
        wanted += np.float32(carried) * missing
    return down + _ridge_regression(inputs, wanted, moment, ridge), moment


def _ridge_regression(inputs: np.ndarray, wanted: np.ndarray, moment: np.ndarray, ridge: float) -> np.ndarray:
    """Weights (d, w) that map inputs (tokens, w) to wanted (tokens, d), drawn to zero by ridge x w mean tokens."""
    tokens, columns = inputs.shape
    penalty = ridge * columns * clipped(np.diag(moment).astype(np.float64)).mean() / tokens
    if tokens < columns:  # the same solution by the smaller system
        gram = (inputs @ inputs.T).astype(np.float64)
        gram[np.diag_indices_from(gram)] += penalty
        return (np.linalg.solve(gram, wanted).T @ inputs).astype(np.float32)
    gram = moment.astype(np.float64)
    gram[np.diag_indices_from(gram)] += penalty
    return np.linalg.solve(gram, (inputs.T @ wanted).astype(np.float64)).T.astype(np.float32)


def share_of_missing(missing: np.ndarray, chosen: np.ndarray, weight: np.ndarray, expert: int) -> np.ndarray:
    """One expert's part of what a layer's output lacks, float32 (its tokens, d), its tokens in their order.

    A token's lack is split by squared router weight: the change of all experts together that makes it up is the
    smallest when each gives in proportion to how much it counts.

    Args:
        missing: float32 (tokens, d). chosen: int (tokens, k). weight: float32 (tokens, k).
    """
    token, place = np.nonzero(chosen == expert)
    squared = np.square(weight[token], dtype=np.float64)
    part = squared[np.arange(len(token)), place] / np.maximum(squared.sum(1), 1e-30)
    return missing[token] * part[:, None].astype(np.float32)
