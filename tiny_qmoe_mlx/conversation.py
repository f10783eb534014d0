"""A chat's messages, and the KV cache of what the model has read of them: of each turn only what is new is computed.

Knows nothing of terminals or windows; `chat` and examples/chat_app are built on it. One thread at a time.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tiny_qmoe_mlx.budget import DEFAULT_CONTEXT
from tiny_qmoe_mlx.chat_template import TRIAL, Message, render
from tiny_qmoe_mlx.generate import stream_generate
from tiny_qmoe_mlx.tokenizer import longest_token, too_many

ROLES = ("system", "user", "assistant")


class ContextFull(ValueError):
    """A conversation that has no room for another answer."""


class _Stopped(Exception):
    """Somebody asked to stop while the prompt was being read."""


class Conversation:
    """A conversation with a model.

    Attributes:
        messages: role ("system", "user" or "assistant") and content of each.
        context: tokens that it may grow to.
        tokens: ids that the KV cache holds.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: TokenizerWrapper,
        context: int = DEFAULT_CONTEXT,
        system: str | None = None,
        template: dict[str, Any] | None = None,
        draft: nn.Module | None = None,
        max_kv_size: int | None = None,
    ):
        """As `load` gave model and tokenizer, with no more than its context; template: more for the chat template;
        draft: of speculative decoding; max_kv_size: of a cache that forgets the oldest tokens.

        Raises:
            ValueError: the model has no chat template, or it refuses the system message, or that fills the context.
        """
        if not tokenizer.has_chat_template:
            raise ValueError(
                "[chat] the model should have a chat template, it has none; "
                "`generate --prompt TEXT` goes on from a text with it."
            )
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.context = context
        self.tokens: list[int] = []
        self._model, self._tokenizer, self._draft = model, tokenizer, draft
        self._template, self._longest = template or {}, longest_token(tokenizer)
        self._max_kv_size = max_kv_size
        self._cache: list[Any] | None = None
        self._ids([*self.messages, TRIAL])

    @property
    def system(self) -> str | None:
        """The system message, if there is one."""
        first = self.messages[0] if self.messages else {"role": ""}
        return first["content"] if first["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages[1:] if self.system is not None else self.messages
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def reset(self) -> None:
        """Forget all messages but the system's, and free the KV cache."""
        self.messages = self.messages[:1] if self.system is not None else []
        self._forget()

    def load(self, messages: Sequence[Message]) -> None:
        """Go on from other messages; they are read with the next question.

        Raises:
            ValueError: the chat template refuses them, or they fill the context; nothing has changed then.
        """
        self._ids([*messages, TRIAL])
        self.messages = [{"role": m["role"], "content": m["content"]} for m in messages]

    def ask(
        self, text: str, max_tokens: int = 256, stopped: Callable[[], bool] = lambda: False, **options: Any
    ) -> Generator[GenerationResponse, None, None]:
        """Put a question; what was answered, also when it was stopped, is part of the conversation afterwards.

        Args:
            text: the user's message.
            max_tokens: of the answer; fewer where the context ends before.
            stopped: asked between tokens, and between chunks of the prompt; closing the iterator stops too.
            options: as `stream_generate` takes them (sampler, logits_processors, ...).

        Yields:
            mlx_lm's GenerationResponse; its prompt_tokens are those that had to be read.

        Raises:
            ContextFull: the question leaves no room for an answer; nothing has changed then.
            ValueError: the chat template refuses it.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._ids(messages)
        held = self._reuse(ids)
        known, pieces, ended = ids[:held], list[str](), False
        if self._draft is not None:
            options["draft_model"] = self._draft

        def chunk(done: int, total: int) -> None:
            if done < total and stopped():
                known.extend(ids[held : held + done])
                raise _Stopped

        stream = stream_generate(
            self._model,
            self._tokenizer,
            ids[held:],
            max_tokens=min(max_tokens, self.context - len(ids)),
            prompt_cache=self._cache,
            prompt_progress_callback=chunk,
            **options,
        )
        try:
            for response in stream:
                if not pieces:
                    known = list(ids)
                known.append(response.token)
                pieces.append(response.text)
                yield response
                if stopped():
                    break
            ended = True
        except (_Stopped, GeneratorExit):
            ended = True
        finally:
            stream.close()  # which takes back what a draft model guessed
            if not ended:  # in the middle of a step: who knows what the cache holds
                self._forget()
        self._settle(known)
        if pieces:
            self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of messages, and of the beginning of an answer."""
        how = {**self._template, "tokenize": False, "add_generation_prompt": True}
        text = render(self._tokenizer, messages, **how)
        if len(text) > self.context and (found := too_many(self._tokenizer, self._longest, text, self.context)):
            raise ContextFull(_full(self.context, found))
        ids = list(self._tokenizer.encode(text, add_special_tokens=False))
        if not ids:
            raise ValueError("[prompt] should have at least one token, the model's chat template makes none of it.")
        if len(ids) >= self.context:
            raise ContextFull(_full(self.context, str(len(ids))))
        return ids

    def _reuse(self, ids: list[int]) -> int:
        """Leave in the cache what it shares with `ids`, all but the last of them at most; how many tokens that is."""
        shared = min(len(self.tokens), len(ids) - 1)
        shared = next((i for i in range(shared) if self.tokens[i] != ids[i]), shared)
        extra = len(self.tokens) - shared
        if self._cache is not None and extra:
            if can_trim_prompt_cache(self._cache):
                for entry in self._cache:
                    entry.trim(extra)
            else:
                self._forget()
        if self._cache is None:
            self._cache, shared = self._fresh(), 0
        self.tokens = ids[:shared]
        return shared

    def _fresh(self) -> list[Any]:
        draft = [] if self._draft is None else make_prompt_cache(self._draft)
        return [*make_prompt_cache(self._model, self._max_kv_size), *draft]

    def _forget(self) -> None:
        self._cache, self.tokens = None, []
        mx.clear_cache()

    def _settle(self, known: list[int]) -> None:
        """Take note of what the cache holds: all that was known but, with a draft model, the last few tokens."""
        self.tokens = known
        if self._draft is None or self._cache is None:
            return
        ends = [entry.offset for entry in self._cache]
        held = min(len(known), *ends)
        for entry, end in zip(self._cache, ends, strict=True):
            entry.trim(end - held)
        self.tokens = known[:held]


def _full(context: int, found: str) -> str:
    return (
        f"[chat] the context of {context} tokens is full: with this message the conversation has {found}; begin anew, "
        "or give a larger --context."
    )
