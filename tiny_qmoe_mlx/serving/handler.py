"""HTTP: mlx_lm.server's handler of requests, with OpenAI's shape for every error, the page, and the figures.

Who may ask is settled before anything is read: the key, the `Host` by which this machine was called (a name that a
stranger points at 127.0.0.1 is refused), and the `Origin` of a web page.
"""

import hmac
import io
import json
import logging
import select
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from types import MappingProxyType
from typing import Any, NoReturn
from urllib.parse import unquote

from mlx_lm import server as mlx_server

from tiny_qmoe_mlx.errors import shown
from tiny_qmoe_mlx.library_errors import panics
from tiny_qmoe_mlx.serving import bodies, callers, calls, checks, figures, logprobs, openapi, paths, wire
from tiny_qmoe_mlx.serving.generation import Asked, Generation
from tiny_qmoe_mlx.serving.prompt import packed, too_long
from tiny_qmoe_mlx.serving.refusal import Refused, reason
from tiny_qmoe_mlx.serving.schema import Grammars

BODY_BYTES = 4 << 20
DRAIN_BYTES = 32 << 20  # of a body that is refused: a client that still writes would not read why
DRAIN_S = 2.0  # of what was no request
NOTHING = "there is nothing of this name here."
SHARES = ("temperature", "top_p", "min_p", "xtc_probability", "xtc_threshold")
READ = b"{}"  # for mlx-lm, where the body has been read
LOGGED = 200  # characters of a request in the log
log = logging.getLogger("tiny_qmoe_mlx.server")


class Handler(mlx_server.APIHandler):
    """One connection; mlx-lm's class does what lies between a request that has been checked and its answer."""

    timeout = wire.SILENCE_S
    server_version, sys_version = "tiny-qmoe-mlx", ""
    response_generator: Generation
    max_tokens: int

    def __init__(self, *inputs: Any, generation: Generation, grammars: Grammars, fingerprint: str):
        self.generation, self.grammars = generation, grammars
        self._unread, self._streaming, self._origin, self._status = 0, False, "", 0
        super().__init__(generation, *inputs, system_fingerprint=fingerprint)

    # ---- requests

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._received = wire.Received(self.connection)
        self.wfile = wire.Sent(self.connection)
        self.rfile = self._head = wire.Head(self._received)

    def do_GET(self) -> None:
        self._guard(self._get)

    def do_POST(self) -> None:
        self._guard(self._post)

    def do_OPTIONS(self) -> None:
        self._guard(self._options)

    do_HEAD = do_GET
    do_PUT = do_PATCH = do_DELETE = do_TRACE = do_CONNECT = do_OPTIONS  # which no path takes

    def _guard(self, answer: Callable[[], None]) -> None:
        """Answer, or say why not."""
        self.path = self.path.partition("?")[0]
        try:
            if self._received.ended:  # the library takes the end of what came for the end of the head
                raise ConnectionAbortedError("the client left in mid-request")
            wire.check_head(self.headers, self.request_version, self._head.odd)
            self._unread = wire.body_length(self.headers, self.command == "POST")
            self._received.allow(wire.BODY_S, 2 * DRAIN_BYTES)
            self._check_caller()
            self._check_method()
            with panics("request", "a library should take this, it failed", "ask otherwise"):
                answer()
        except Refused as refused:
            self._refuse(refused)
        except (ConnectionError, TimeoutError) as error:
            self.generation.counters.left()
            log.info("%s: %s", self._asked, reason(error))
            self.close_connection = True
        except Exception as error:  # one request's trouble is not the server's
            log.error("%s failed: %s %s", self._asked, type(error).__name__, reason(error))
            self._refuse(Refused(500, f"the request failed: {reason(error)}", "internal_error"))

    def _get(self) -> None:
        if self.path in paths.PAGES:
            self._send_page(*paths.PAGES[self.path])
        elif self.path == "/metrics":
            found = figures.rows(self.generation.stats(), self.generation.counters)
            self._send(figures.text(found).encode(), figures.CONTENT_TYPE)
        elif self.path == "/experts":
            self._send_json(figures.experts(self.generation.stats(), self.generation.cache, self.model_name))
        elif self.path == "/openapi.json":
            self._send_json(openapi.DESCRIPTION)
        elif self.path == "/health":
            well = self.generation.is_healthy
            self._send_json({"status": "ok" if well else "unavailable"}, 200 if well else 503)
        else:
            self.handle_models_request()

    def _options(self) -> None:
        self.send_response(204)
        self.send_header("Allow", ", ".join(paths.methods(self.path)))
        self._set_cors_headers()
        self.end_headers()

    def _post(self) -> None:
        if self._unread > BODY_BYTES:
            raise Refused(413, f"a request should have at most {BODY_BYTES} bytes, it has {self._unread}.", "too_large")
        with ExitStack() as self._turns:
            self._turns.enter_context(self.generation.bodies.reading(self._unread))
            if self._unread > bodies.SMALL_BYTES:
                self._received.allow(wire.LARGE_S, 2 * DRAIN_BYTES, wire.LARGE_RATE)
            self._body = self._checked_body()
            self._post_checked()

    def _post_checked(self) -> None:
        """mlx-lm's part, which takes the request from `body`."""
        connection = self.rfile
        del self.headers["Content-Length"]
        self.headers["Content-Length"] = str(len(READ))
        self.rfile = io.BytesIO(READ)
        try:
            super().do_POST()
        finally:
            self.rfile = connection

    @property
    def body(self) -> dict[str, Any]:
        """The request's JSON, of which only what is answered is left."""
        return self._body

    @body.setter
    def body(self, value: Any) -> None:
        """mlx-lm would read it once more, and keep both."""

    def _forget(self, request: Any) -> None:
        """Of what was asked the tokens are left, and what reads calls of tools: many may wait for their turn."""
        request.prompt, request.messages, request.tools, request.role_mapping = "", [], None, None
        self._body, self.chat_template_kwargs = {}, None
        self._turns.close()

    def _checked_body(self) -> dict[str, Any]:
        data = self._read_body()
        self._turns.enter_context(self.generation.bodies.objects())
        body = checks.parse(data)
        self._check_model(body)
        checks.check(body, self.grammars.vocabulary)
        checks.check_prompt(body, self.path.endswith("/chat/completions"))
        return body

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """As mlx-lm's, for a request that fits the budget, when its turn has come."""
        with self.generation.entered():
            asked = self._ask(request)
            self._forget(request)
            try:
                super().handle_completion(asked, stop_words)
            finally:
                self.generation.withdraw(asked)

    def _ask(self, request: Any) -> Asked:
        if request.tools and not self.generation.model_provider.tokenizer.has_tool_calling:
            raise Refused(400, "tools: mlx-lm knows no way in which this model calls any; leave them out.")
        tokenized = self.generation.tokens_of(request, self.chat_template_kwargs)
        asked = Asked(
            request.request_type, "", [], calls.packed(request.tools), None, packed(tokenized), gone=self._gone
        )
        prompt, limit = len(tokenized[0]), self.generation.limit
        stated = {"max_tokens", "max_completion_tokens"}.intersection(self.body)
        if prompt >= limit or (stated and prompt + self.max_tokens > limit):
            most = f" and max_tokens is {self.max_tokens}" if stated else ""
            raise too_long(f"{prompt} tokens{most}", limit)
        self.max_tokens = min(self.max_tokens, limit - prompt)
        self._written = asked.written
        asked.most = prompt + self.max_tokens
        asked.grammar = self._grammar(tokenized[3] == "reasoning")
        return asked

    def _grammar(self, thinks: bool) -> Callable | None:
        found = self.grammars.processor(self.body.get("response_format"), thinks)
        if found is not None and self.generation.model_provider.draft_model is not None:
            raise Refused(501, "response_format does not work with --draft-model.", "response_format_unavailable")
        return found

    # ---- who asks

    def _check_caller(self) -> None:
        host, origin, args = self.headers.get("Host", ""), self.headers.get("Origin"), self.generation.cli_args
        callers.check(host, origin, args.host, args.allowed_host, args.allowed_origins)
        self._origin = origin or ""
        if self.command != "OPTIONS" and self.path not in paths.OPEN:
            self._check_key()

    def _check_method(self) -> None:
        allowed = paths.methods(self.path)
        if not allowed:
            raise Refused(404, NOTHING)
        if self.command not in allowed:
            what = f"{self.path} takes {' and '.join(allowed)}, received {self.command}."
            raise Refused(405, what, headers={"Allow": ", ".join(allowed)})

    def _check_key(self) -> None:
        key = self.generation.cli_args.api_key
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        known = key is None or (
            kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode())
        )
        if not known:
            what = "the header Authorization should be Bearer and this server's key."
            raise Refused(401, what, "invalid_api_key", {"WWW-Authenticate": "Bearer"})

    def _set_cors_headers(self) -> None:
        """Tell a browser that the page's origin is one that may ask."""
        if self._origin:
            self.send_header("Access-Control-Allow-Origin", self._origin)
            self.send_header("Vary", "Origin")
            self.send_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
            self.send_header("Access-Control-Allow-Headers", "Authorization, Content-Type, *")

    # ---- what they ask

    def _read_body(self) -> bytes:
        small, parts = self._unread <= bodies.SMALL_BYTES, []
        how = f"within {wire.BODY_S:g} s" if small else f"with at least {wire.LARGE_RATE} bytes a second"
        while self._unread:
            try:
                parts.append(self.rfile.read1(min(self._unread, 1 << 16)))
            except TimeoutError as error:
                self._unread = 0  # nobody waits for the rest
                raise Refused(408, f"a request should come {how}.") from error
            self._unread -= len(parts[-1])
            if not parts[-1]:
                raise ConnectionAbortedError("the client left in mid-request")
        return b"".join(parts)

    @property
    def model_name(self) -> str:
        """What this server's model is called."""
        return self.generation.cli_args.model

    def _check_model(self, body: dict[str, Any]) -> None:
        known = (self.model_name, self.generation.directory, "default_model")
        for name, allowed in (("model", known), ("draft_model", ("default_model",)), ("adapters", ())):
            if name in body and body[name] not in allowed:
                raise Refused(
                    404,
                    f"{name} should be {self.model_name if name == 'model' else 'left out'} on this server, received "
                    f"{str(body[name])[:80]!r}.",
                    "model_not_found",
                )
        guesses, most = body.get("num_draft_tokens"), self.generation.cli_args.num_draft_tokens
        if isinstance(guesses, int) and guesses > most:
            raise Refused(400, f"num_draft_tokens should be at most {most} here, received {str(guesses)[:20]}.")

    def _gone(self) -> bool:
        """Whether the client has closed the connection; what it sent beyond its one request is dropped."""
        look = select.poll()
        look.register(self.connection, select.POLLIN)
        try:
            for _ in range(16):  # one that sends without end has not gone
                if not look.poll(0):
                    return False
                if not self.connection.recv(1 << 16):
                    return True
        except OSError:
            return True
        return False

    # ---- answers

    def validate_model_parameters(self) -> None:
        """As mlx-lm's, for numbers given as whole ones too: MLX keeps what it has compiled by a number's bits, and
        takes the whole number 1 for 5e-324, which one client may send to spoil what all others sample."""
        for name in SHARES:
            setattr(self, name, _as_float(getattr(self, name)))
        super().validate_model_parameters()

    def generate_response(self, *inputs: Any, **named: Any) -> dict[str, Any]:
        """As mlx-lm's, with the logarithms of what has been written since the last piece of a stream."""
        found = super().generate_response(*inputs, **named)
        if self.logprobs or self.top_logprobs > 0:
            content = logprobs.content(self._written, self.generation.model_provider.tokenizer)
            found["choices"][0]["logprobs"] = {"content": content}
        self._written.clear()
        return found

    def handle_models_request(self) -> None:
        """This server's one model, or word that there is no other."""
        one = {"id": self.model_name, "object": "model", "created": self.created, "owned_by": "tiny-qmoe-mlx"}
        if self.path == "/v1/models":
            self._send_json({"object": "list", "data": [one]})
            return
        self._check_model({"model": unquote(self.path.removeprefix("/v1/models/"))})  # a client writes / as %2F
        self._send_json(one)

    def _set_completion_headers(self, status_code: int = 200) -> None:
        """mlx-lm is about to answer; where that is an error, it is given OpenAI's shape."""
        if status_code >= 400:
            self._raise_as_ours(status_code)
        super()._set_completion_headers(status_code)

    def _raise_as_ours(self, status: int) -> NoReturn:
        error = sys.exc_info()[1]
        if isinstance(error, ConnectionError | Refused):
            raise error
        if error is None:
            raise Refused(status, NOTHING if status == 404 else "generation has stopped; start the server again.")
        if status != 400:
            log.error("%s failed: %s %s", self._asked, type(error).__name__, reason(error))
            raise Refused(500, f"the answer could not be computed: {reason(error)}", "internal_error") from error
        raise Refused(400, reason(error)) from error

    def _set_stream_headers(self, status_code: int = 200) -> None:
        super()._set_stream_headers(status_code)
        self._streaming = True

    def _refuse(self, refused: Refused) -> None:
        """Say why there is no answer, or no more of it."""
        data = json.dumps(refused.body).encode()
        try:
            if self._streaming:
                self.wfile.write(b"data: " + data + b"\n\n")
                return
            self._headers_buffer: list[bytes] = []  # of an answer that has failed before its first byte
            self._send(data, "application/json", refused.status, refused.headers)
            self._read_rest()
        except OSError:
            self.generation.counters.left()

    def _read_rest(self) -> None:
        """Take what the client still sends, so that it gets to read the answer; it is told that this is all."""
        with suppress(OSError):  # it has been answered, whatever becomes of the rest
            self.connection.shutdown(socket.SHUT_WR)
            left = min(self._unread, DRAIN_BYTES)
            while left > 0 and (data := self.rfile.read1(min(left, 1 << 16))):
                left -= len(data)

    def _send_page(self, name: str, kind: str) -> None:
        self._send((paths.PAGE / name).read_bytes(), kind, more={"Content-Security-Policy": paths.POLICY})

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), "application/json", status)

    def _send(self, data: bytes, kind: str, status: int = 200, more: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_response(status)
        own = {"Content-Type": kind, "Content-Length": str(len(data)), "X-Content-Type-Options": "nosniff"}
        for name, value in {**own, "Cache-Control": "no-cache", **more}.items():
            self.send_header(name, value)
        self._set_cors_headers()
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the HTTP library refuses by itself; how much is still to come is not known."""
        self._unread, self.request_version = DRAIN_BYTES, "HTTP/1.0"  # which has a status, whatever it was
        self._received.allow(DRAIN_S, 2 * DRAIN_BYTES)
        self._refuse(Refused(code, message or "the request is not HTTP as this server speaks it."))
        self.close_connection = True

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        self._status = int(code)

    def end_headers(self) -> None:
        """The status goes out, and is counted: mlx-lm says 200 when it begins, before an answer may fail."""
        super().end_headers()
        self.generation.counters.status(self._status)
        log.info("%s %d", self._asked, self._status)

    @property
    def _asked(self) -> str:
        """Method and path for the log: bytes of a stranger's, which a terminal might obey."""
        return shown(f"{self.command} {getattr(self, 'path', '').partition('?')[0]}", LOGGED)

    def log_message(self, format: str, *values: Any) -> None:
        log.info("%s", shown(format % values, LOGGED))


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) else value
