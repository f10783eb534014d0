"""Answers that keep to a JSON schema: OpenAI's `response_format`, by the library llguidance (the extra `server`)."""

import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tiny_qmoe_mlx.errors import shown
from tiny_qmoe_mlx.serving.refusal import Refused, reason

COMPACT: Any = {"whitespace_flexible": False}  # a small model may write white space for ever
SCHEMA_LENGTH = 1 << 16
MISSING = (
    "response_format needs the package llguidance, which is not installed where the server runs; "
    "install tiny-qmoe-mlx[server]."
)


class Grammars:
    """Makes logits processors from schemas, for one tokenizer; any thread may ask."""

    def __init__(self, tokenizer: TokenizerWrapper, vocabulary: int):
        """vocabulary: number of the model's logits, which may be more than the tokenizer has tokens."""
        self._tokenizer, self.vocabulary = tokenizer, vocabulary
        # one thread: the system's allocator keeps for each what it has freed
        self._maker = ThreadPoolExecutor(1, "grammars")

    @cached_property
    def _tokens(self) -> Any:
        """llguidance's form of the tokenizer; it takes about a second to make."""
        from llguidance import LLTokenizer

        own = getattr(self._tokenizer._tokenizer, "backend_tokenizer", None)
        if own is None:
            raise ValueError("the model's tokenizer has no tokenizer.json")
        ends = sorted(self._tokenizer.eos_token_ids)
        return LLTokenizer(own.to_str(), n_vocab=self.vocabulary, eos_token=ends)  # llguidance.hf would copy it twice

    def processor(self, format: Any, thinks: bool) -> Callable | None:
        """A logits processor for a request's response_format; None where any text will do.

        Args:
            format: the request's.
            thinks: whether the answer begins with thoughts, which are left free.

        Raises:
            Refused: it is no format that we know, or no schema that llguidance can follow.
        """
        schema = schema_of(format)
        if schema is None:
            return None
        if find_spec("llguidance") is None:
            raise Refused(501, MISSING, "response_format_unavailable")
        make = self._maker.submit(self._compiled, schema).result()
        return Follow(make, self._tokenizer.think_end_tokens if thinks else None)

    def _compiled(self, schema: dict[str, Any]) -> Callable[[], Any]:
        """What makes a schema's matcher, which works; raises as `processor`."""
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=COMPACT)
            make = functools.partial(LLMatcher, self._tokens, grammar, log_level=0)
        except ValueError as error:
            raise Refused(400, f"response_format cannot be followed: {reason(error)}") from error
        _require_sound(make())  # and forgotten: it takes hundreds of times as much as its schema, and many may wait
        return make


def schema_of(format: Any) -> dict[str, Any] | None:
    """The JSON schema of a response_format; None for text.

    Raises:
        Refused: it is neither.
    """
    kind = format.get("type") if isinstance(format, dict) else None
    if format is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    inner = format.get("json_schema") if kind == "json_schema" else None
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise Refused(
            400,
            'response_format should be {"type": "text"}, {"type": "json_object"} or {"type": "json_schema", '
            f'"json_schema": {{"name": ..., "schema": {{...}}}}}}, received {shown(format, 200)}.',
        )
    if len(json.dumps(schema)) > SCHEMA_LENGTH:
        raise Refused(400, f"response_format should have a schema of at most {SCHEMA_LENGTH} characters as JSON.")
    return schema


def _require_sound(matcher: Any) -> None:
    if matcher.is_error():
        text = " ".join(matcher.get_error().partition("<state>")[0].split())[:300]
        raise Refused(400, f"response_format cannot be followed: {text}")


class Follow:
    """A logits processor: leaves those tokens that can go on. It belongs to one answer."""

    def __init__(self, make: Callable[[], Any], after: tuple[int, ...] | None):
        """make: gives a matcher, once the answer begins; after: tokens after which the schema begins; it begins at once
        without any."""
        self._make, self._after = make, after
        self._read: int | None = None  # tokens of the context that have been looked at
        self._over = False  # all is written but the end of the text

    def __call__(self, context: mx.array, logits: mx.array) -> mx.array:
        """context int (n,), logits (1, vocabulary) -> logits.

        Raises:
            Refused: the schema is more than llguidance follows, as it finds on the way; it would end the answer.
        """
        if self._over:
            return logits
        if self._read is not None:
            self._take(np.array(context).tolist())
        self._read = context.size
        if self._after is not None:
            return logits
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        words = allocate_token_bitmask(1, logits.shape[-1])
        fill_next_token_bitmask(self._matcher, words)
        _require_sound(self._matcher)
        self._over = self._matcher.is_stopped()
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: logits.shape[-1]].astype(bool)
        return mx.where(mx.array(bits), logits, mx.array(-float("inf"), logits.dtype))

    @cached_property
    def _matcher(self) -> Any:
        return self._make()

    def _take(self, tokens: list[int]) -> None:
        """The context; what has been written since it was looked at goes to the matcher."""
        if self._after is None:
            self._matcher.consume_tokens(tokens[self._read :])
        elif tuple(tokens[-len(self._after) :]) == self._after:
            self._after = None
