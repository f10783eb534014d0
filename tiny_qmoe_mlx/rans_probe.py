"""Noise in rANS payloads: whether this machine decodes it, and how fast."""

import mlx.core as mx
import numpy as np

from tiny_qmoe_mlx import metal_rans, native_rans, ops
from tiny_qmoe_mlx.codecs import rans

SEED = 0
COUNT = rans.TILE + 1000  # a whole tile, and one that ends within a step


def noise(count: int, spread: float = 20.0) -> np.ndarray:
    """Symbols as 8-bit codes of weights are spread, u8 (count,)."""
    rng = np.random.default_rng(SEED)
    return np.clip(np.rint(rng.normal(128, spread, count)), 0, 255).astype(np.uint8)


def error() -> float:
    """Share of bytes that the machine's decoder, the GPU's or the CPU's, gives wrongly; 1 where it finds damage."""
    symbols = noise(COUNT)
    payload = rans.encode(symbols).pack()
    coded = rans.parse(payload, COUNT, "noise")
    if not ops.on_gpu():
        return float((native_rans.decode(coded, COUNT, "noise") != symbols).mean())
    out, faults = metal_rans.decode(mx.array(payload), 0, 0, len(payload), coded, COUNT)
    return 1.0 if np.array(faults).any() else float((np.array(out) != symbols).mean())
