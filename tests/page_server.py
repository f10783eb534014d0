"""A stub of the server that the page talks to: it speaks the same contract, and does what a test tells it.

The experts it reports are data that a test sets; what a chat request meets is `server.reply`, a function that writes
to the connection. Every request is kept, so that a test can see what the page sent and that it asked for nothing else.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import tiny_qmoe_mlx

PAGE = Path(tiny_qmoe_mlx.__file__).parent / "serving" / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
FIGURES = {
    "tokens_per_second": 12.34,
    "hit_rate": 0.914,
    "bytes_per_token": 1_234_000,
    "budget_bytes": 431_000_000,
    "held_bytes": 323_250_000,
    "pool_bytes": 107_750_000,
    "tokens": 1234,
    "active": 1,
    "waiting": 2,
    "context": 4096,
}


def experts(layers: int = 4, count: int = 6, state: str = ".", first: int = 0) -> dict:
    """What GET /experts answers: every expert in one state, none of them used yet."""
    return {
        "model": "stub-model",
        "layers": [{"layer": first + i, "experts": count, "record_bytes": 27520} for i in range(layers)],
        "state": [state * count] * layers,
        "use": [[0] * count for _ in range(layers)],
        "stats": dict(FIGURES),
    }


class Stub(ThreadingHTTPServer):
    """Serves the page, `experts` and `reply`.

    Attributes:
        experts: the answer to GET /experts; `polls` counts them.
        reply: writes the answer to a chat request, given its handler and its parsed body.
        chats: the parsed bodies of all chat requests.
        paths: of every request.
        token: the bearer token that requests need, or None.
        gone: set when a client has left in mid-stream.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.experts = experts()
        self.reply: Callable[[Handler, dict], None] = say("Hello.")
        self.chats: list[dict] = []
        self.paths: list[str] = []
        self.polls = 0
        self.token: str | None = None
        self.gone = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        """A browser that closes in the middle is nothing to report."""
        try:
            super().handle()
        except (BrokenPipeError, ConnectionResetError):
            pass

    def answer(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def locked(self) -> bool:
        """Refuse a request without the token that is asked for."""
        if self.server.token is None or self.headers.get("Authorization") == f"Bearer {self.server.token}":
            return False
        self.answer(401, json.dumps({"error": {"message": "A token is needed."}}).encode())
        return True

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        name = "index.html" if self.path == "/" else self.path.removeprefix("/page/")
        file = PAGE / name
        if self.path == "/experts":
            if not self.locked():
                self.server.polls += 1
                self.answer(200, json.dumps(self.server.experts).encode())
        elif self.path == "/" or (self.path.startswith("/page/") and file.parent == PAGE and file.is_file()):
            self.answer(200, file.read_bytes(), TYPES[file.suffix])
        else:
            self.answer(404, b"{}")

    def do_POST(self) -> None:
        self.server.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            return self.answer(404, b"{}")
        if self.locked():
            return None
        self.server.chats.append(body)
        try:
            self.server.reply(self, body)
        except (BrokenPipeError, ConnectionResetError):
            self.server.gone.set()


def begin(handler: Handler) -> None:
    """Open a stream of server-sent events."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.end_headers()


def event(handler: Handler, data: str | dict, end: str = "\n\n") -> None:
    handler.wfile.write(f"data: {data if isinstance(data, str) else json.dumps(data)}{end}".encode())
    handler.wfile.flush()


def piece(text: str, reason: str | None = None, key: str = "content") -> dict:
    """A chunk of an answer."""
    return {"choices": [{"index": 0, "delta": {"role": "assistant", key: text}, "finish_reason": reason}]}


def say(*pieces: str, reason: str = "stop", gate: threading.Semaphore | None = None) -> Callable[[Handler, dict], None]:
    """An answer in pieces; with a gate, each piece waits for a release of it."""

    def reply(handler: Handler, body: dict) -> None:
        begin(handler)
        for text in pieces:
            if gate is not None:
                gate.acquire()
            event(handler, piece(text))
        event(handler, piece("", reason))
        event(handler, {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": len(pieces)}})
        event(handler, "[DONE]")

    return reply


def endless(handler: Handler, body: dict) -> None:
    """An answer that goes on until the client leaves (or for half a minute)."""
    begin(handler)
    for count in range(1500):
        event(handler, piece(f"word{count} "))
        time.sleep(0.02)


def refuse(status: int, message: str, code: str | None = None, **headers: str) -> Callable[[Handler, dict], None]:
    """An error in OpenAI's shape."""
    data = json.dumps({"error": {"message": message, "code": code}}).encode()
    return lambda handler, body: handler.answer(status, data, **headers)


@contextmanager
def serving() -> Iterator[Stub]:
    """A stub that runs, on a port of its own."""
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
