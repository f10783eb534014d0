"""8-bit levels between a tensor's (or a group's) least and largest weight, as Tiny-QMoE (arXiv 2509.22951) rounds.

value = (code - zero) * scale, with scale = (max - min) / 255 and zero = round(-min / scale) of the whole matrix, or of
each group of columns of a row (the last group of a row may be shorter).
"""

import numpy as np

TOP = 255
GROUPS = (0, 128)  # 0: one for the whole matrix


def grid_shape(rows: int, columns: int, group: int) -> tuple[int, int]:
    """Shape of a matrix's scales and zeros."""
    return (rows, -(-columns // group)) if group else (1, 1)


def quantize(weight: np.ndarray, group: int) -> dict[str, np.ndarray]:
    """Codes of a matrix, float32 (rows, columns).

    Returns:
        weight u8 (rows, columns); scales float16, or float32 with group 0; zeros u8.

    Raises:
        ValueError: the weights are not finite, or too far apart for 16-bit scales.
    """
    if not np.isfinite(weight).all():
        raise ValueError("[levels] weights should be finite, received NaN or Inf; download the checkpoint again.")
    parts = [weight] if not group else np.split(weight, range(group, weight.shape[1], group), axis=1)
    rows, columns = weight.shape
    axis, shape = (1 if group else None), grid_shape(rows, columns, group)
    low = np.stack([np.minimum(p.min(axis), 0) for p in parts], -1).reshape(shape)
    high = np.stack([np.maximum(p.max(axis), 0) for p in parts], -1).reshape(shape)
    low, high = np.where(low == high, np.float32(-1), low), np.where(low == high, np.float32(1), high)
    scales = _scales((high.astype(np.float64) - low) / TOP, group)
    wide = scales.astype(np.float32)
    zeros = np.clip(np.rint(-low / wide), 0, TOP).astype(np.uint8)
    codes = np.rint(weight / spread(wide, columns, group)) + spread(zeros, columns, group)
    return {"weight": np.clip(codes, 0, TOP).astype(np.uint8), "scales": scales, "zeros": zeros}


def _scales(step: np.ndarray, group: int) -> np.ndarray:
    """Steps as they are stored, rounded up so that the range is covered."""
    if not group:
        return np.maximum(step, np.finfo(np.float32).tiny).astype(np.float32)
    with np.errstate(over="ignore"):
        found = step.astype(np.float16)
    found = np.where(found.astype(np.float64) < step, np.nextafter(found, np.float16(np.inf)), found)
    if not np.isfinite(found).all():
        raise ValueError(f"[levels] weights should lie within 65504 * {TOP}, received a range of {step.max() * TOP:g}.")
    return found.astype(np.float16)


def spread(grid: np.ndarray, columns: int, group: int) -> np.ndarray:
    """A grid of scales or zeros, one for each column."""
    return np.repeat(grid, group, axis=1)[:, :columns] if group else grid


def dequantize(arrays: dict[str, np.ndarray], group: int) -> np.ndarray:
    """Weights of a matrix, float32 (rows, columns), from what `quantize` gave."""
    out, scales = arrays["weight"].astype(np.float32), arrays["scales"].astype(np.float32)
    width = group or out.shape[1]
    for i, start in enumerate(range(0, out.shape[1], width)):  # in place: a decoder layer is done for every token
        part = out[:, start : start + width]
        part -= arrays["zeros"][:, i : i + 1]
        part *= scales[:, i : i + 1]
    return out
