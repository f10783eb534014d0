"""mlx-lm's continuous batching within the tokens of KV cache that the budget provides for.

Sequences of a batch are padded to its longest, and each may be a step ahead of what it holds: N of them take
N * (longest + KV_STEP) tokens.
"""

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache

from tiny_qmoe_mlx.footprint import KV_STEP


def padded(lengths: Iterable[int]) -> int:
    """Tokens of KV cache that sequences take together when each has grown to its length."""
    each = list(lengths)
    return len(each) * (max(each) + KV_STEP) if each else 0


class Batch(BatchGenerator):
    """mlx-lm's, which knows how long its sequences may become, and reads prompts in chunks as long as the budget has
    counted on, all of them together."""

    def __init__(self, *inputs: Any, **options: Any):
        super().__init__(*inputs, **options)
        self.close()  # gives back the wired limit that mlx-lm has just raised: ours is left alone
        self._most: dict[int, int] = {}

    @property
    def prefill_step_size(self) -> int:
        """Tokens of each prompt that are read at a time."""
        return max(1, self._chunk // max(1, len(self._currently_processing)))

    @prefill_step_size.setter
    def prefill_step_size(self, tokens: int) -> None:
        self._chunk = tokens

    def insert_segments(  # type: ignore[override]
        self, segments: Any, max_tokens: Any, all_tokens: Any, **options: Any
    ) -> list[int]:
        """As mlx-lm's, for prompts of which all_tokens are in their caches already."""
        lengths = [
            len(before) + sum(map(len, parts)) + most
            for parts, most, before in zip(segments, max_tokens, all_tokens, strict=True)
        ]
        uids = super().insert_segments(segments=segments, max_tokens=max_tokens, all_tokens=all_tokens, **options)
        self._most.update(zip(uids, lengths, strict=True))
        return uids

    @property
    def lengths(self) -> list[int]:
        """Tokens that each sequence in it may grow to, prompt and answer."""
        waiting = (sequence[0] for sequence in self._unprocessed_sequences)
        here = {*waiting, *self._prompt_batch.uids, *self._generation_batch.uids}
        self._most = {uid: length for uid, length in self._most.items() if uid in here}
        return list(self._most.values())


def even(caches: list[Any]) -> int:
    """Trim a model's caches, and its draft model's, to the same tokens; how many, 0 where that cannot be told."""
    lengths = [entry.offset for entry in caches if isinstance(getattr(entry, "offset", None), int)]
    held = min(lengths, default=0)
    if held == max(lengths, default=0):
        return held
    if len(lengths) < len(caches) or not can_trim_prompt_cache(caches):
        return 0
    for entry in caches:
        entry.trim(entry.offset - held)
    return held


class PromptCache(LRUPromptCache):
    """mlx-lm's KV caches of earlier prompts, which give way to what is being computed.

    room: bytes that they may take now.
    """

    def __init__(self, size: int, room: Callable[[], int]):
        super().__init__(size)
        self._room = room

    def insert_cache(self, model: Any, tokens: list[int], prompt_cache: list[Any], **options: Any) -> None:
        """As mlx-lm's, under the tokens that the caches hold: of a request served alone, the last ones are not in them.

        What is inserted are slices not computed yet, which would keep the whole batch's caches in memory.
        """
        held = even(prompt_cache)
        self.make_room()
        if not 0 < held <= len(tokens) or sum(entry.nbytes for entry in prompt_cache) > self.max_bytes:
            return
        mx.eval([entry.state for entry in prompt_cache])
        super().insert_cache(model, tokens[:held], prompt_cache, **options)

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """As mlx-lm's, with a token left to compute where all of the prompt is in a cache."""
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if rest:
            return cache, rest
        return (cache, tokens[-1:]) if trim_prompt_cache(cache, 1) else (None, tokens)

    def make_room(self) -> None:
        """Drop what has no room any more."""
        self.max_bytes = max(0, self._room())
        self.trim_to(n_bytes=self.max_bytes)
