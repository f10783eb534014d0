"""The input rotation of docs/FORMAT.md, section 5: random signs, then a block Hadamard transform, in numpy.

It makes the weights' columns Gaussian and of like importance, without which a fixed-rate trellis loses 7 dB on
outlier-heavy matrices (QuIP#, arXiv 2402.04396, uses it on both sides; the input side alone does as well here).
"""

from functools import lru_cache

import numpy as np

COLUMN_BLOCK = 64  # columns that share a rate
MAX_HADAMARD = 2048


def padded_columns(columns: int) -> int:
    """Columns rounded up to whole 64-column blocks."""
    return -(-columns // COLUMN_BLOCK) * COLUMN_BLOCK


def hadamard_size(columns: int) -> int:
    """Largest power of two that divides the padded number of columns, at most 2048."""
    padded = padded_columns(columns)
    return min(padded & -padded, MAX_HADAMARD)


def _mix64(z: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014), modulo 2^64."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=512)
def signs(seed: int, layer: int, side: int, columns: int) -> np.ndarray:
    """Signs of one rotation, float32 (padded columns,); side 0: the expert layer's input, 1: the input of down."""
    base = (seed << 32) + (layer << 21) + (side << 20)
    index = np.arange(padded_columns(columns), dtype=np.uint64)
    top = _mix64(index + np.uint64(base)) >> np.uint64(63)
    out = np.where(top == 1, np.float32(-1), np.float32(1))
    out.flags.writeable = False
    return out


SMALL = 64  # columns of a matrix that products are still cheap with


@lru_cache(maxsize=16)
def _sylvester(size: int) -> np.ndarray:
    h = np.ones((1, 1), np.float32)
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h


def _transform(groups: np.ndarray) -> np.ndarray:
    """Rows (n, size) times the Sylvester matrix; a large one as the Kronecker product of two, one after the other."""
    size = groups.shape[1]
    if size <= SMALL:
        return groups @ _sylvester(size).astype(groups.dtype)
    parts = groups.reshape(-1, SMALL) @ _sylvester(SMALL).astype(groups.dtype)
    outer = _sylvester(size // SMALL).astype(groups.dtype)
    return np.matmul(outer, parts.reshape(-1, size // SMALL, SMALL)).reshape(groups.shape)


def rotate(x: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """Rotate the last axis.

    Args:
        x: float array (..., columns); fewer columns than signs are padded with zeros.
        sign: float32 (padded columns,), from `signs`.

    Returns:
        float array (..., padded columns) of x's dtype.
    """
    padded, size = len(sign), hadamard_size(len(sign))
    if x.shape[-1] < padded:
        x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded - x.shape[-1])])
    groups = (x * sign.astype(x.dtype)).reshape(-1, size)
    return (_transform(groups) / x.dtype.type(size**0.5)).reshape(x.shape)


def unrotate(x: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """The inverse of `rotate` on (..., padded columns); padding columns are kept."""
    size = hadamard_size(len(sign))
    groups = _transform(x.reshape(-1, size))
    return (groups / x.dtype.type(size**0.5)).reshape(x.shape) * sign.astype(x.dtype)
