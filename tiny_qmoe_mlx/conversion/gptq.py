"""GPTQ for many experts at once on the grids of QMoE (arXiv 2310.16795, sections 3.1 and 4.1; rules as in its published
code): symbols of the qmoe codec out of weights and inputs.

All in float32, as published. GPTQ itself: arXiv 2210.17323.
"""

from dataclasses import dataclass

import numpy as np

from tiny_qmoe_mlx.codecs.qmoe import TERNARY

DAMPING = 0.1  # of the mean of diag(H): ten times GPTQ's
LEAST_DAMPING = 1e-6
BLOCK = 128  # columns whose errors are put off together
TOKENS = 4  # times the tokens that an expert gets on average: the most that its Hessian sees


@dataclass
class Grid:
    """The weights that rows may have: one grid per row, found once, on the original weights.

    kind: of codecs.qmoe.LEVELS. value: float32 (..., rows, levels), of symbols 0 (a zero), 1, 2 (and 3), as bfloat16
    holds them. scale, zero: float32 (..., rows), of the 2-bit grid: code = round(w / scale) + zero.
    """

    kind: str
    value: np.ndarray
    scale: np.ndarray
    zero: np.ndarray

    def symbols(self, w: np.ndarray) -> np.ndarray:
        """The symbols of a column of weights, float32 (..., rows) -> u8; what is rounded to zero is 0, always."""
        if self.kind == TERNARY:
            low, high = self.value[..., 1], self.value[..., 2]
            up, down = (w > high / 2) & (high > 0), (w < low / 2) & (low < 0)  # an end at 0: feedback passes it
            return np.where(up, 2, np.where(down, 1, 0)).astype(np.uint8)
        code = np.clip(np.rint(w / self.scale) + self.zero, 0, 3)
        return ((code - self.zero) % 4).astype(np.uint8)

    def bits16(self) -> np.ndarray:
        """Values of symbols 1 and on, as the codec stores them: u16 (..., rows, levels - 1)."""
        return (np.ascontiguousarray(self.value[..., 1:]).view(np.uint32) >> 16).astype(np.uint16)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 values (ties to even), float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def grid_of(w: np.ndarray, kind: str) -> Grid:
    """The grid of each row: from its smallest weight to its largest, zero between them.

    Ternary: {smallest, 0, largest}, a half of either being the border. 2-bit: four steps of a third of the range, one
    of them zero. A row of zeros has -1 and 1 as its ends. A row without negative weights has none on its grid either:
    its smallest value is 0, and so for positive ones. Values are the published ones there too, symbols are not: QMoE's
    encoder finds symbols by equality with the row's ends, so that all zeros of such a row become symbol 1 or 2, which
    the dictionary makes long. Here a zero is symbol 0, also where GPTQ's feedback has pushed the weight past it.

    Args:
        w: float32 (..., rows, columns).
        kind: of codecs.qmoe.LEVELS.
    """
    low, high = np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)
    empty = (low == 0) & (high == 0)
    low, high = np.where(empty, -1, low).astype(np.float32), np.where(empty, 1, high).astype(np.float32)
    nothing = np.zeros_like(low)
    if kind == TERNARY:
        return Grid(kind, bfloat16(np.stack([nothing, low, high], -1)), nothing, nothing)
    scale = (high - low) / np.float32(3)
    zero = np.rint(-low / scale)
    codes = (np.arange(4) + zero[..., None]) % 4
    return Grid(kind, bfloat16(scale[..., None] * (codes - zero[..., None])), scale, zero)


def hessians(inputs: list[np.ndarray]) -> np.ndarray:
    """H of each expert, float32 (experts, columns, columns): X^T X; of an expert without tokens the identity.

    Args:
        inputs: float32 (tokens, columns) of each expert.
    """
    return np.stack([x.T @ x if len(x) else np.eye(x.shape[1], dtype=np.float32) for x in inputs])


def most_tokens(tokens: int, picks: int, experts: int) -> int:
    """Tokens of one expert that its Hessian sees at most: four times the average."""
    return int(TOKENS * tokens * picks / experts)


def upper_factors(h: np.ndarray) -> np.ndarray:
    """Upper Cholesky factors of the inverses of damped Hessians, float32 (experts, columns, columns).

    An expert whose Hessian has none gets the identity instead, which is rounding to nearest.
    """
    h = h.astype(np.float32)
    eye = np.eye(h.shape[1], dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows has no factor
        damping = np.maximum(DAMPING * np.diagonal(h, axis1=1, axis2=2).mean(1), LEAST_DAMPING)
        h = h + damping[:, None, None] * eye
    try:
        return _factors(h)
    except np.linalg.LinAlgError:
        return np.concatenate([_factor_or_identity(one[None], eye) for one in h])


def _factors(h: np.ndarray) -> np.ndarray:
    inverse_lower = np.linalg.inv(np.linalg.cholesky(h))
    inverse = inverse_lower.swapaxes(1, 2) @ inverse_lower
    upper = np.linalg.cholesky(inverse).swapaxes(1, 2)
    if not np.isfinite(upper).all():
        raise np.linalg.LinAlgError("not finite")
    return upper


def _factor_or_identity(h: np.ndarray, eye: np.ndarray) -> np.ndarray:
    try:
        return _factors(h)
    except np.linalg.LinAlgError:
        return eye[None]


def gptq(w: np.ndarray, h: np.ndarray, grid: Grid) -> np.ndarray:
    """Round matrices column by column; the columns to come make up for each error.

    Args:
        w: float32 (experts, rows, columns).
        h: float32 (experts, columns, columns), from `hessians`.
        grid: of w.

    Returns:
        symbols u8 (experts, rows, columns).
    """
    upper = upper_factors(h)
    rest = np.ascontiguousarray(w.swapaxes(1, 2), dtype=np.float32)  # a column at a time is contiguous
    out = np.empty(rest.shape, np.uint8)
    for start in range(0, rest.shape[1], BLOCK):
        stop = min(start + BLOCK, rest.shape[1])
        errors = np.empty((len(rest), stop - start, rest.shape[2]), np.float32)
        for i in range(start, stop):
            out[:, i] = grid.symbols(rest[:, i])
            rounded = np.take_along_axis(grid.value, out[:, i, :, None].astype(np.int64), -1)[..., 0]
            errors[:, i - start] = (rest[:, i] - rounded) / upper[:, i, i, None]
            rest[:, i + 1 : stop] -= upper[:, i, i + 1 : stop, None] * errors[:, None, i - start]
        rest[:, stop:] -= upper[:, start:stop, stop:].swapaxes(1, 2) @ errors
    return np.ascontiguousarray(out.swapaxes(1, 2))
