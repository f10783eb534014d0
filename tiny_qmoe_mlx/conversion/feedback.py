"""Rounding with error feedback: the linear algebra between a Hessian and the trellis encoder.

LDLQ (QuIP, arXiv 2307.13304) in blocks of 16 columns: with H = A A^T, A upper triangular, the output error of a matrix
is |E A|^2, and adding to the next 16 columns what the errors so far imply for them leaves only their own rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tiny_qmoe_mlx.codecs.rotation import COLUMN_BLOCK, rotate
from tiny_qmoe_mlx.codecs.trellis import ROW_TILE, TILE_COLUMNS
from tiny_qmoe_mlx.codecs.trellis_scale import GAUSSIAN

DAMPING = 0.05  # of the mean second moment; 0.01 fits the calibration text better and other text worse
CLIP = 20.0  # times the median of diag(H): one massive activation may not decide the damping of all others
GROUPS = COLUMN_BLOCK // TILE_COLUMNS
SMALLEST_GAIN, LARGEST_GAIN = 2.0**-24, 65504.0  # of float16

Encoder = Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]


def clipped(diagonal: np.ndarray) -> np.ndarray:
    """Second moments with the largest limited to 20 times the median; ones where all are zero."""
    positive = diagonal[diagonal > 0]
    if not len(positive):
        return np.ones_like(diagonal)
    return np.clip(diagonal, 0, CLIP * np.median(positive))


def rotated_hessian(h: np.ndarray, sign: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """P (H + damping) P^T, float64 (padded columns, padded columns), of a second moment H (columns, columns)."""
    h = h.astype(np.float64)
    padded = np.zeros((len(sign), len(sign)))
    padded[: len(h), : len(h)] = (h + h.T) / 2
    padded[np.diag_indices_from(padded)] += damping * clipped(np.diag(h)).mean()
    return rotate(np.ascontiguousarray(rotate(padded, sign).T), sign)


def block_order(h: np.ndarray) -> np.ndarray:
    """64-column blocks by descending mean diagonal: what matters most is rounded first, the rest makes up for it."""
    return np.argsort(-np.diag(h).reshape(-1, COLUMN_BLOCK).mean(1), kind="stable")


def columns_of(order: np.ndarray) -> np.ndarray:
    """Rotated columns in stored order, int (columns,)."""
    return (order[:, None] * COLUMN_BLOCK + np.arange(COLUMN_BLOCK)).reshape(-1)


def factor(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Feedback matrix and column weights of a Hessian in stored order.

    Args:
        h: float64 (C, C), positive definite.

    Returns:
        (feedback float32 (C, C), zero on and below the diagonal blocks of 16: the target of columns s is W_s plus
        the errors of all earlier columns times feedback[:, s];
        weight float64 (C,): what one unit of squared rounding error in a column adds to the output error).
    """
    upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    size = len(h)
    groups = upper.reshape(size // TILE_COLUMNS, TILE_COLUMNS, size // TILE_COLUMNS, TILE_COLUMNS)
    diagonal = np.ascontiguousarray(groups[np.arange(len(groups)), :, np.arange(len(groups))])
    weight = (diagonal**2).sum(2).reshape(-1)
    # A_js A_ss^-1 for all s at once: columns s of A times the inverse of its own 16 x 16 block
    columns = upper.reshape(size, -1, TILE_COLUMNS).transpose(1, 0, 2)
    feedback = np.matmul(columns, np.linalg.inv(diagonal)).transpose(1, 0, 2).astype(np.float32)
    for s in range(size // TILE_COLUMNS):
        feedback[s * TILE_COLUMNS :, s] = 0
    return np.ascontiguousarray(feedback.reshape(size, size)), weight


@dataclass
class Encoded:
    """Matrices of one shape after rounding.

    codes[i][g]: u8 (R / 32, 32, planes) of matrix i and 16-column group g, None where absent.
    gains: float16 (n, C / 16). rounded: float32 (n, R, C), all gains applied.
    """

    codes: list[list[np.ndarray | None]]
    gains: np.ndarray
    rounded: np.ndarray


def encode_stack(
    w: np.ndarray,
    feedback: list[np.ndarray],
    rates: np.ndarray,
    row_gain: np.ndarray,
    rows: int,
    length: int,
    encode: Encoder,
) -> Encoded:
    """Round matrices of one shape together, 16 columns at a time, so that the encoder's threads have tiles to share.

    Args:
        w: float32 (n, R, C) rotated, stored order.
        feedback: n float32 (C, C) from `factor`.
        rates: u8 (n, B) in stored order.
        row_gain: float32 (n, R), positive.
        rows: rows before padding; the others do not count for the block gains.
        length: L.
        encode: native.encode_tiles or its like.
    """
    n, _, columns = w.shape
    groups = columns // TILE_COLUMNS
    out = Encoded([[None] * groups for _ in range(n)], np.zeros((n, groups), np.float16), np.zeros_like(w))
    error = np.zeros_like(w)
    for g in range(groups):
        block, s = g // GROUPS * COLUMN_BLOCK, slice(g * TILE_COLUMNS, (g + 1) * TILE_COLUMNS)
        if s.start == block:  # what whole blocks before imply for this one, as one product of 64 columns
            wide = slice(block, block + COLUMN_BLOCK)
            target = _implied(w[:, :, wide], error[:, :, :block], [f[:block, wide] for f in feedback])
        part = slice(s.start - block, s.stop - block)
        near = [f[block : s.start, s] for f in feedback]
        goal = _implied(target[:, :, part], error[:, :, block : s.start], near)
        _round_group(out, g, goal, rates[:, g // GROUPS], row_gain, rows, length, encode)
        error[:, :, s] = w[:, :, s] - out.rounded[:, :, s]
    return out


def _implied(w: np.ndarray, error: np.ndarray, feedback: list[np.ndarray]) -> np.ndarray:
    if not error.shape[2]:
        return w.copy()
    return np.stack([a + e @ f for a, e, f in zip(w, error, feedback, strict=True)])


def _round_group(
    out: Encoded,
    g: int,
    goal: np.ndarray,
    rates: np.ndarray,
    row_gain: np.ndarray,
    rows: int,
    length: int,
    encode: Encoder,
) -> None:
    """Encode 16 columns, goal (n, R, 16), of all matrices: a call of the encoder for each rate among them."""
    for rate in np.unique(rates[rates > 0]):
        chosen = np.flatnonzero(rates == rate)
        scaled = goal[chosen] / row_gain[chosen, :, None]
        gains = _block_gain(scaled[:, :rows], GAUSSIAN[length, int(rate)][0])
        gain = gains.astype(np.float32)[:, None, None]
        codes, values = encode((scaled / gain).reshape(-1, ROW_TILE, TILE_COLUMNS), int(rate), length)
        values = values.reshape(scaled.shape) * gain * row_gain[chosen, :, None]
        codes = codes.reshape(len(chosen), -1, ROW_TILE, codes.shape[-1])
        for i, code, value in zip(chosen, codes, values, strict=True):
            out.codes[i][g] = code
            out.rounded[i, :, g * TILE_COLUMNS : (g + 1) * TILE_COLUMNS] = value
        out.gains[chosen, g] = gains


def _block_gain(scaled: np.ndarray, scale: float) -> np.ndarray:
    """Gains (n,) float16 that bring each matrix's 16 columns to the scale that the code was made for."""
    rms = np.sqrt(np.mean(scaled.astype(np.float64) ** 2, axis=(1, 2)))
    return np.clip(scale * rms, SMALLEST_GAIN, LARGEST_GAIN).astype(np.float16)
