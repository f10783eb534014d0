"""Which token ids a model has: MLX looks any others up beyond its embeddings' memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def vocabulary(config: dict[str, Any], otherwise: int) -> int:
    """Number of a model's tokens, or the other number where its config does not say."""
    size = (config.get("text_config") or config).get("vocab_size")
    return size if isinstance(size, int) else otherwise


def check_ids(config: dict[str, Any], ids: Sequence[int] | np.ndarray, where: str = "prompt") -> None:
    """Refuse tokens that a model does not have.

    Args:
        config: the model's.
        ids: token ids, of any shape.
        where: what they are, for the error.

    Raises:
        ValueError: there are none, or one is out of range.
    """
    found = np.asarray(ids)
    if not found.size:
        raise ValueError(f"[{where}] it should have at least one token, it has none.")
    low, high, size = int(found.min()), int(found.max()), vocabulary(config, 0)
    if size and not 0 <= low <= high < size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"[{where}] tokens should lie in 0 to {size - 1}, received {wrong}; is the tokenizer another's?"
        )
