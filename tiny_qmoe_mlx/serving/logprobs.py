"""Logarithms of probabilities in OpenAI's shape: of each token that was written, and of the likeliest in its place.

mlx-lm has one of the likeliest in the place of the one that was written, and none in a stream.
"""

import math
from collections.abc import Iterable
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

NO_CHANCE = -9999.0  # as OpenAI writes the logarithm of 0: JSON has no infinity


def content(written: Iterable[Any], tokenizer: TokenizerWrapper) -> list[dict[str, Any]]:
    """Of mlx-lm's responses, the likeliest token first."""
    found = []
    for one in written:
        tops = [_one(top["id"], top["logprob"], tokenizer) for top in one.top_tokens]
        tops.sort(key=lambda top: -top["logprob"])
        found.append({**_one(one.token, one.logprob, tokenizer), "top_logprobs": tops})
    return found


def _one(token: int, logprob: float, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    text = tokenizer.decode([token])
    known = logprob if math.isfinite(logprob) else NO_CHANCE
    return {"id": token, "token": text, "logprob": known, "bytes": list(text.encode("utf-8", "replace"))}
