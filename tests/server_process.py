"""Servers for tests: the command in a process of its own, and plain HTTP with no client library between."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from commands import start

from tiny_qmoe_mlx import budget, container, footprint
from tiny_qmoe_mlx.serving import room

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"

TOKENS, CONTEXT = 20, 2048


def chat(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def least(model: Path, context: int, rows: int = 8) -> int:
    """The smallest budget that serves a model, in bytes, by what it has to hold: experts are then streamed."""
    held = container.open_model(model)
    logits = 6 * 4 * held.config["vocab_size"] * (rows - 1)
    cached = footprint.kv_bytes(held.config, context, True)
    grammar = room.GRAMMAR_BYTES + room.GRAMMAR_FACTOR * (model / "tokenizer.json").stat().st_size
    clients = room.CLIENTS_BYTES + (grammar if find_spec("llguidance") else 0)
    return budget.split(held, sys.maxsize, context, True).min_budget_bytes + cached + logits + clients


@dataclass
class Server:
    """A server under test."""

    child: subprocess.Popen
    line: str
    port: int
    errors: list[str]
    key: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> HTTPResponse:
        """An answer whose body is not read yet; a body that is not bytes is sent as JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if body is None else "POST"), path, data, named)
        return connection.getresponse()

    def get(self, path: str, body: Any = None, **options: Any) -> Any:
        """The JSON of an answer with status 200."""
        answer = self.open(path, body, **options)
        text = answer.read()
        assert answer.status == 200, (answer.status, text)
        return json.loads(text)

    def refused(self, path: str, body: Any = None, **options: Any) -> tuple[int, dict[str, Any]]:
        """Status and error of an answer that is OpenAI's error and nothing else."""
        answer = self.open(path, body, **options)
        found = json.loads(answer.read())
        assert answer.getheader("Content-Type") == "application/json"
        assert list(found) == ["error"] and sorted(found["error"]) == ["code", "message", "type"], found
        message = found["error"]["message"]
        assert message and "\n" not in message and "Traceback" not in message and len(message) < 600, message
        return answer.status, found["error"]

    def metrics(self) -> dict[str, float]:
        """The figures at /metrics, by name with labels."""
        answer = self.open("/metrics", **({"Authorization": f"Bearer {self.key}"} if self.key else {}))
        assert answer.status == 200 and answer.getheader("Content-Type").startswith("text/plain; version=0.0.4")
        return parse_metrics(answer.read().decode())

    def wait(self, true: Callable[[dict[str, float]], bool], seconds: float = 60) -> dict[str, float]:
        """The figures once they are as they should be."""
        end = time.monotonic() + seconds
        while not true(found := self.metrics()):
            assert time.monotonic() < end, found
            time.sleep(0.05)
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit status."""
        self.child.send_signal(number)
        return self.child.wait(timeout=60)

    def raw(self, data: bytes) -> bytes:
        """Bytes that may be no HTTP, and what comes back."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@contextmanager
def serving(model: Path, *options: object) -> Iterator[Server]:
    """`python -m tiny_qmoe_mlx.server` on a free port, until the block is left."""
    child = start("server", "--model", model, "--port", 0, "--quiet", *options)
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(map(bytes.decode, child.stderr)))
    reader.start()
    try:
        line = child.stdout.readline().decode()
        port = re.search(r":(\d+) \(", line)
        assert port, (line, errors, child.poll())
        yield Server(child, line, int(port[1]), errors)
    finally:
        child.kill()
        child.wait()
        reader.join()
        child.stdout.close()
        child.stderr.close()


def parse_metrics(text: str) -> dict[str, float]:
    """Prometheus' text format 0.0.4, strictly: every sample has HELP and TYPE before it, and a number."""
    found: dict[str, float] = {}
    kinds: dict[str, str] = {}
    helped: set[str] = set()
    assert text.endswith("\n")
    for line in text.splitlines():
        if match := re.fullmatch(r"# HELP ([a-z_][a-z0-9_]*) \S.*", line):
            helped.add(match[1])
        elif match := re.fullmatch(r"# TYPE ([a-z_][a-z0-9_]*) (counter|gauge)", line):
            assert match[1] not in kinds
            kinds[match[1]] = match[2]
        else:
            match = re.fullmatch(r'([a-z_][a-z0-9_]*)(\{[a-z]+="[^"\\]*"\})? (\S+)', line)
            assert match and match[1] in kinds and match[1] in helped, line
            assert match[1].endswith("_total") == (kinds[match[1]] == "counter"), line
            found[match[1] + (match[2] or "")] = float(match[3])
    return found


def events(answer: HTTPResponse) -> Iterator[Any]:
    """The events of a stream, to its end; comments are left out."""
    for line in answer:
        if line.startswith(b"data: "):
            text = line.removeprefix(b"data: ").strip()
            yield text.decode() if text == b"[DONE]" else json.loads(text)
