"""T5's attention (arXiv 1910.10683): scores are not scaled, and get a bias for each relative position instead."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache


def buckets(distance: np.ndarray, bidirectional: bool, count: int, farthest: int) -> np.ndarray:
    """T5's bucket of each distance (arXiv 1910.10683): single ones up to a quarter of `count` (half where one looks
    back only), then by logarithm up to `farthest`; int64 in 0 to count - 1.

    Args:
        distance: int, of the attended position less the attending one.
        bidirectional: whether what comes later has buckets of its own.
    """
    first = np.zeros_like(distance)
    if bidirectional:
        count //= 2
        first, distance = count * (distance > 0), np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = count // 2
    far = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = exact + (far / np.float32(math.log(farthest / exact)) * np.float32(count - exact)).astype(np.int64)
    return first + np.where(distance < exact, distance, np.minimum(far, count - 1))


class DecoderCache(KVCache):
    """One decoder block's keys and values: of the tokens so far, and in `memory` of the encoder's output. inputs: int
    (rows, tokens), what the encoder reads; None where nobody said."""

    def __init__(self, inputs: mx.array | None = None):
        super().__init__()
        self.inputs = inputs
        self.memory: tuple[mx.array, mx.array] | None = None


class Attention(nn.Module):
    """To a block's own tokens, or to the encoder's output: whose keys and values they are is the caller's business."""

    def __init__(self, width: int, heads: int, head_size: int):
        super().__init__()
        self._heads = heads
        self.q_proj = nn.Linear(width, heads * head_size, bias=False)
        self.k_proj = nn.Linear(width, heads * head_size, bias=False)
        self.v_proj = nn.Linear(width, heads * head_size, bias=False)
        self.o_proj = nn.Linear(heads * head_size, width, bias=False)

    def keys_values(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Each (rows, heads, length, head size) of x (rows, length, d)."""
        return self._split(self.k_proj(x)), self._split(self.v_proj(x))

    def __call__(self, x: mx.array, keys: mx.array, values: mx.array, bias: mx.array | None = None) -> mx.array:
        """x (rows, length, d), bias (1, heads, length, keys) -> (rows, length, d)."""
        mask = None if bias is None else bias.astype(x.dtype)
        y = mx.fast.scaled_dot_product_attention(self._split(self.q_proj(x)), keys, values, scale=1.0, mask=mask)
        return self.o_proj(y.swapaxes(1, 2).flatten(2))

    def _split(self, x: mx.array) -> mx.array:
        return mx.unflatten(x, -1, (self._heads, -1)).swapaxes(1, 2)
