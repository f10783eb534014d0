"""mlx_lm.server's generation thread with our loader: requests wait in a queue until they fit the budget, one that fails
or whose client has gone gives its place to the next.
"""

import functools
import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from types import FunctionType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import server as mlx_server
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import greedy_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tiny_qmoe_mlx import footprint
from tiny_qmoe_mlx.generate_options import is_greedy
from tiny_qmoe_mlx.library_errors import panics
from tiny_qmoe_mlx.serving import calls, figures
from tiny_qmoe_mlx.serving.batch import Batch, PromptCache, padded
from tiny_qmoe_mlx.serving.bodies import Bodies
from tiny_qmoe_mlx.serving.prompt import Measured, unpacked
from tiny_qmoe_mlx.serving.refusal import Refused, reason
from tiny_qmoe_mlx.vocabulary import check_ids

POLL_S = 0.25  # how often a waiting request looks whether its client is still there
ONE = mlx_server.ModelDescription("default_model", "default_model", "")  # this server has one model
log = logging.getLogger("tiny_qmoe_mlx.server")


@dataclass
class Asked(mlx_server.CompletionRequest):
    """A request with what has been found out about it before its turn.

    tokenized: as `packed` gives it, the prompt's tokens first; most: tokens of KV cache that it may take;
    gone: whether its client has left; grammar: a logits processor that keeps the answer to a JSON schema, or None;
    written: tokens of which the client has not been told; over: nobody waits for more of it. mlx-lm's thread takes it
    for the queue that it puts its words into.
    """

    tokenized: tuple[Any, ...] = ()
    most: int = 0
    gone: Callable[[], bool] = bool
    grammar: Callable | None = None
    args: Any = None
    context: Any = None
    written: list[Any] = field(default_factory=list)
    over: bool = False
    words: SimpleQueue = field(default_factory=SimpleQueue)

    def put(self, word: Any) -> None:
        """The context of its generation comes first; then progress and tokens, None at the end, or an error."""
        if isinstance(word, mlx_server.GenerationContext):
            self.context = word
            word.tool_parser = calls.parser(word.tool_parser)  # type: ignore[assignment]
            if self.over:
                word.stop()
        if isinstance(word, ConnectionError | TimeoutError):  # of a disk: it would read as the client's leaving
            word = RuntimeError(reason(word))
        self.words.put(word)

    def fail(self, error: Exception) -> None:
        """Nothing more comes for it but this."""
        self.put(error)
        self.end()

    def end(self) -> None:
        """Compute nothing more for it, also where its context has not come yet."""
        self.over = True
        if self.context is not None:
            self.context.stop()


class Provider(mlx_server.ModelProvider):
    """mlx-lm's holder of models, with the one that has been loaded; no request makes it load another."""

    model: Any
    tokenizer: Any
    draft_model: Any
    model_key: Any

    def __init__(self, args: Any, model: nn.Module, tokenizer: TokenizerWrapper, draft: nn.Module | None):
        super().__init__(args)
        self.model, self.tokenizer, self.draft_model = model, tokenizer, draft
        self.model_key = (args.model, None, args.draft_model)
        self.is_batchable = draft is None and all(hasattr(c, "merge") for c in make_prompt_cache(model))

    def load(self, *names: Any) -> tuple[nn.Module, TokenizerWrapper]:
        return self.model, self.tokenizer

    def load_default(self) -> None:
        pass

    def reset(self) -> None:
        self.model = self.draft_model = None


def bound(function: Any, **names: Any) -> FunctionType:
    """A function of another module which finds ours under some of the names that its module gives it."""
    return FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__)


def guarded(step: Callable, otherwise: Callable, fail: Callable[[Exception], None]) -> Callable:
    """A step of one request's sampling: where it raises, that request has failed, and the rest of its batch goes on."""

    def take(*inputs: Any) -> Any:
        try:
            return step(*inputs)
        except Exception as error:
            fail(error)
            return otherwise(*inputs)

    return take


def sampler(args: Any, tokenizer: TokenizerWrapper) -> Callable:
    """mlx-lm's for a request, which fails alone."""
    if is_greedy(args.sampling.temperature, args.sampling.top_p):
        return greedy_sampler  # as mlx-lm does, which calls a sampler of all requests once
    made = functools.cache(lambda: mlx_server._make_sampler(args, tokenizer))
    return guarded(lambda logprobs: made()(logprobs), greedy_sampler, args.fail)


def logits_processors(args: Any) -> list[Callable]:
    """mlx-lm's for a request, and its grammar's; they fail alone."""
    made = [*mlx_server._make_logits_processors(args), *([args.grammar] if args.grammar else [])]
    return [guarded(step, lambda context, logits: logits, args.fail) for step in made]


class Generation(mlx_server.ResponseGenerator):
    """mlx-lm's thread that answers requests, one model for all.

    Attributes:
        directory, config, cache: the model's; the cache is of its experts.
        counters: of all requests.
        limit: most tokens of a request, prompt and answer.
        bodies: turns of what clients send.
        stopping: no new request is taken.
    """

    model_provider: Provider
    prompt_cache: PromptCache

    def __init__(self, provider: Provider, directory: str, config: dict[str, Any], beside: int, cpu: bool):
        """
        Args:
            provider: with the model loaded.
            directory, config: the model's.
            beside: bytes of the budget that are not in the model's own: it was loaded with so much less.
            cpu: whether MLX computes on the CPU.
        """
        args = provider.cli_args
        self.counters = figures.Counters()
        self.limit = min(args.context, footprint.longest_context(config))
        self._measured: Any = Measured(provider.tokenizer, self.limit)
        self.bodies = Bodies()
        self.stopping = False
        self.batch: Batch | None = None
        self.directory, self.config = directory, config
        self._runtime, self._beside = provider.model.tiny_qmoe, beside
        self.cache = self._runtime.cache
        self._loaded = self._runtime.stats()["bytes_read"]
        self._changed = threading.Condition()
        self._tokenizing = threading.Lock()
        self._waiting: deque[Asked] = deque()
        self._entered = self._alone = self._kv_tokens = self._prompt_bytes = 0
        self._active: list[Asked] = []
        self._capacity = args.context + footprint.KV_STEP
        kv = functools.partial(footprint.kv_bytes, config, cpu=cpu)
        self._token_bytes = kv(1) - kv(0)
        self._kv_bytes = kv(args.context) + args.prompt_cache_bytes
        super().__init__(provider, PromptCache(args.prompt_cache_size, self._room))

    # ---- in the clients' threads

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A request's time in here, from its first look to its last word.

        Raises:
            Refused: too many wait already, or the server stops.
        """
        with self._changed:
            if self.stopping or self._entered - len(self._active) >= self.cli_args.queue:
                what = "the server is stopping" if self.stopping else f"{self.cli_args.queue} requests are waiting"
                retry = min(60, math.ceil(self.counters.request_s))
                message = f"{what}; try again in {retry} s."
                raise Refused(503, message, "server_busy", {"Retry-After": str(retry)})
            self._entered += 1
        start = time.monotonic()
        try:
            yield
            self.counters.took(time.monotonic() - start)
        finally:
            with self._changed:
                self._entered -= 1
                self._changed.notify_all()

    def tokens_of(self, request: Any, template: dict[str, Any] | None) -> tuple[Any, ...]:
        """What mlx-lm's `_tokenize` gives for a request, in the client's thread.

        Raises:
            Refused: it has more tokens than there is room for; the chat template or the tokenizer does not take it.
        """
        how: Any = SimpleNamespace(chat_template_kwargs=template)  # all that mlx-lm looks at here
        if request.role_mapping and not self._measured.has_chat_template:
            self._measured.check_roles(request.messages, request.role_mapping)
        try:
            with self._tokenizing:
                found = super()._tokenize(self._measured, request, how)
        except Refused:
            raise
        except Exception as error:  # templates are programs, and raise what they like
            raise Refused(400, f"the model's tokenizer or chat template refuses the prompt: {reason(error)}") from error
        if not found[0]:
            raise Refused(400, "the prompt should have at least one token, it has none.")
        try:
            check_ids(self.config, found[0])
        except ValueError as error:
            raise Refused(400, str(error)) from error
        return found

    def generate(  # type: ignore[override]
        self, request: Asked, generation_args: Any, progress_callback: Any = None
    ) -> tuple[Any, Iterator]:
        """As mlx-lm's, for a request that has been asked under `entered`."""
        generation_args.model, generation_args.grammar, generation_args.fail = ONE, request.grammar, request.fail
        request.args = generation_args
        with self._changed:
            self._waiting.append(request)
            self._changed.notify_all()
        context = self._take(request)
        self.counters.prompt(len(request.tokenized[0]))
        return context, self._answers(request, progress_callback)

    def _answers(self, request: Asked, progress: Callable[[int, int], None] | None) -> Iterator[Any]:
        while (found := self._take(request)) is not None:
            if not isinstance(found, tuple):
                self.counters.token()
                request.written.append(found)
                yield found
            elif progress is not None:
                progress(*found)

    def _take(self, request: Asked) -> Any:
        """The next word from the generation thread.

        Raises:
            ConnectionAbortedError: the client has gone.
            Exception: what went wrong there.
        """
        while True:
            try:
                found = request.words.get(timeout=POLL_S)
            except Empty:
                found = None if self.generation_available() else RuntimeError("the server has stopped")
                if found is None and not request.gone():
                    continue
                found = found or ConnectionAbortedError("the client has gone")
            if isinstance(found, Exception):
                raise found
            if request.gone():
                raise ConnectionAbortedError("the client has gone")
            return found

    def withdraw(self, request: Asked) -> None:
        """A request is over, whether its answer is whole or not: nothing is computed for it any more."""
        request.end()
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
            if request in self._active:
                self._active.remove(request)
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Take nothing new, wait for the answers of those who have entered, end what is left; whether all are whole."""
        with self._changed:
            self.stopping = True
            done = self._changed.wait_for(lambda: not self._entered, timeout=seconds)
            for request in self._active:
                request.end()
        return done

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and what is under way; None where unknown."""
        held = figures.resident_bytes()  # before the most that was held, which is then no less
        own, counters = self._runtime.stats(), self.counters
        asked, read = own["expert_hits"] + own["expert_misses"], own["bytes_read"] - self._loaded
        with self._changed:
            active = len(self._active)
            waiting = self._entered - active
        return {
            **own,
            "budget_bytes": own["budget_bytes"] + self._beside,
            "pool_bytes": self.cache.pool_bytes,
            "held_bytes": held,
            "hit_rate": own["expert_hits"] / asked if asked else None,
            "bytes_per_token": read / counters.tokens if counters.tokens else None,
            "tokens_per_second": counters.tokens_per_second(),
            "tokens": counters.tokens,
            "active": active,
            "waiting": waiting,
            "context": self.limit,
            "kv_tokens": self._kv_tokens,
            "prompt_cache_bytes": self._prompt_bytes,
        }

    # ---- in the generation thread

    def _run_generate(self) -> None:
        """mlx-lm's loop, begun anew where it fails: those who were being answered are told."""
        while not self._stop:
            try:
                with panics("generation", "a library should compute this, it failed", "ask again"):
                    self._generate()
            except Exception as error:  # a disk, a damaged record, memory: the next request may do better
                log.exception("generation failed; %d requests were under way", len(self._active))
                self.batch, self._alone = None, 0
                error.__traceback__ = None  # its frames hold the batch's KV cache
                with self._changed:
                    for request in self._active:
                        request.put(error)

    def _generate(self) -> None:
        bound(mlx_server.ResponseGenerator._generate, BatchGenerator=self._make_batch, **SAMPLING)(self)

    def _make_batch(self, *inputs: Any, **options: Any) -> Batch:
        self.batch = Batch(*inputs, **options)
        return self.batch

    def _tokenize(self, tokenizer: Any, request: Asked, args: Any) -> tuple[Any, ...]:
        return unpacked(request.tokenized)

    def _make_state_machine(self, model_key: Any, tokenizer: TokenizerWrapper, stop_words: list[str]) -> Any:
        """As mlx-lm's, which keeps a hundred of them: of stop words each takes megabytes."""
        found = super()._make_state_machine(model_key, tokenizer, stop_words)
        if stop_words:
            self._state_machine_cache.pop((model_key, tuple(stop_words)), None)
        return found

    def _next_request(self, timeout: float | None = None) -> tuple[Any, Asked, Any] | None:
        """The request whose turn it is, if it fits beside those being computed."""
        with self._changed:
            if not self._waiting and timeout:
                self._changed.wait(timeout)
            if not self._waiting or not self._fits(self._waiting[0]):
                self._room()
                return None
            request = self._waiting.popleft()
            self._active.append(request)
        self._alone = request.most  # until it is in the batch
        self.prompt_cache.make_room()
        self._alone = 0
        return request, request, request.args

    def _fits(self, request: Asked) -> bool:
        """Whether a request may be taken now; one that cannot be in a batch is, and waits in there for the others."""
        lengths = self._lengths()
        if not self._is_batchable(request.args):
            return True
        return len(lengths) < self.cli_args.decode_concurrency and padded([*lengths, request.most]) <= self._capacity

    def _lengths(self) -> list[int]:
        return self.batch.lengths if self.batch is not None else []

    def _room(self) -> int:
        """Bytes of the budget's KV cache that may hold earlier prompts now."""
        self._kv_tokens = padded([*self._lengths(), *([self._alone] if self._alone else [])])
        self._prompt_bytes = self.prompt_cache.nbytes
        return self._kv_bytes - self._token_bytes * self._kv_tokens

    def _serve_single(self, request: tuple[Any, Asked, Any], stream: Any) -> None:
        self._alone = request[1].most
        self.prompt_cache.make_room()
        try:
            bound(mlx_server.ResponseGenerator._serve_single, **SAMPLING)(self, request, stream)
        finally:
            self._alone = 0
            if request[2].seed is not None:  # else the next ones would draw what this seed says
                mx.random.seed(secrets.randbits(64))


SAMPLING = {"_make_sampler": sampler, "_make_logits_processors": logits_processors}
