"""From a request to the text of its prompt and on to tokens, in memory that a request cannot make large.

A tokenizer takes hundreds of bytes for each character, and a template may write one part of a request many times: a
text is measured before it is made where that can be foretold, and before it becomes tokens always.
"""

import json
from array import array
from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from tiny_qmoe_mlx.serving.refusal import Refused
from tiny_qmoe_mlx.tokenizer import longest_token, too_many


def packed(tokenized: tuple[Any, ...]) -> tuple[Any, ...]:
    """What mlx-lm's `_tokenize` gives, for a request that waits: a list takes ten times as much for each token."""
    prompt, segments, *rest = tokenized
    return array("I", prompt), [array("I", segment) for segment in segments], *rest


def unpacked(tokenized: tuple[Any, ...]) -> tuple[Any, ...]:
    """As it was, all of it new: mlx-lm takes its lists apart."""
    prompt, segments, kinds, *rest = tokenized
    return list(prompt), [list(segment) for segment in segments], list(kinds), *rest


def too_long(prompt: str, limit: int) -> Refused:
    """That a prompt, described, has no room within the limit of tokens."""
    should = f"together with the answer they should be at most the server's context of {limit} tokens"
    return Refused(400, f"the prompt has {prompt}; {should}.", "context_length_exceeded")


class Measured:
    """A tokenizer that refuses texts of more tokens than there is room for; all else is the tokenizer's own."""

    def __init__(self, tokenizer: TokenizerWrapper, limit: int):
        """limit: tokens."""
        self._own, self._limit = tokenizer, limit
        self._longest = longest_token(tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def encode(self, text: str, **options: Any) -> list[int]:
        """The tokenizer's.

        Raises:
            Refused: the text is too long.
        """
        self._check(text)
        return self._own.encode(text, **options)

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], tools: Any = None, sanitize_control_tokens: bool = False, **how: Any
    ) -> list[int]:
        """The tokenizer's.

        Raises:
            Refused: the text is too long, or would be.
        """
        if indented([tools, *(m.get("tool_calls") for m in messages)], self._limit * self._longest):
            raise too_long(f"tools and tool calls of more than {self._limit * self._longest} characters", self._limit)
        self._check(self._own.apply_chat_template(messages, tools=tools, **{**how, "tokenize": False}))
        if sanitize_control_tokens:  # which goes with tokens alone
            how["sanitize_control_tokens"] = True
        return self._own.apply_chat_template(messages, tools=tools, **how)

    def check_roles(self, messages: Sequence[dict[str, Any]], texts: dict[str, str]) -> None:
        """Refuse messages that become too long where each gets the text of its role, and that of `stop`.

        Raises:
            Refused: they do.
        """
        letters = sum(len(m["content"]) + len(texts.get(m["role"], "")) + len(texts.get("stop", "")) for m in messages)
        self._check_letters(letters)

    def _check(self, text: str) -> None:
        if found := too_many(self._own, self._longest, text, self._limit):
            raise too_long(found, self._limit)

    def _check_letters(self, letters: int) -> None:
        if letters > self._limit * self._longest:
            raise too_long(f"{letters} characters, at least {letters // self._longest} tokens", self._limit)


def indented(value: Any, most: int) -> bool:
    """Whether a value has more characters than that as JSON with a line for each item, as many templates write it."""
    for part in json.JSONEncoder(indent=4, ensure_ascii=False).iterencode(value):
        most -= len(part)
        if most < 0:
            return True
    return False
