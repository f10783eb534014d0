"""Clients of the server's load test: polite ones, and all kinds that are not. Each asks for one known answer.

A client's function takes (port, question, draw) and returns a Reply; nothing raises, what went wrong is in the reply.
"""

import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse

KEY = "secret-7"
TIMEOUT_S = 300.0  # of an answer: one that never comes is a lost one
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Question:
    """A prompt with a number of its own, and the answer that a single client got."""

    path: str
    body: dict
    answer: str
    tokens: int


@dataclass
class Reply:
    """What a client got.

    status: of HTTP, None where it left before there was one; text: a whole answer, else None; fault: why what came is
    no answer and no refusal; left: the client went away; first_s, whole_s: seconds to the first and last byte of it.
    """

    kind: str
    status: int | None = None
    text: str | None = None
    fault: str | None = None
    left: bool = False
    retry_s: float = 0.0
    first_s: float | None = None
    whole_s: float | None = None
    started: float = field(default_factory=time.monotonic)


def headers(key: str = KEY) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}


def finish(reply: Reply, response: HTTPResponse) -> Reply:
    """Take a response that is no stream: an answer, or OpenAI's error."""
    data = response.read()
    reply.status, reply.whole_s = response.status, time.monotonic() - reply.started
    try:
        found = json.loads(data)
        if response.status == 200:
            choice = found["choices"][0]
            reply.text = choice["text"] if "text" in choice else choice["message"]["content"]
        elif not found["error"]["message"]:
            reply.fault = "an error without a message"
    except (ValueError, KeyError, TypeError) as error:
        reply.fault = f"status {response.status}, {type(error).__name__}: {data[:200]!r}"
    reply.retry_s = float(response.getheader("Retry-After") or 0)
    if response.status == 503 and not reply.retry_s:
        reply.fault = "503 without Retry-After"
    return reply


def pieces(response: HTTPResponse, pause: float = 0.0) -> Iterator[str | None]:
    """Texts of a stream's events, None at its end; a reader that pauses reads a few bytes at a time."""
    rest = b""
    while data := response.read1(64 if pause else 4096):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line == b"data: [DONE]":
                yield None
            elif line.startswith(b"data: "):
                event = json.loads(line.removeprefix(b"data: "))
                for choice in event["choices"]:  # KeyError is an error event
                    yield choice["text"] if "text" in choice else choice["delta"].get("content", "")
        time.sleep(pause)


def take_stream(reply: Reply, response: HTTPResponse, most: int | None = None, pause: float = 0.0) -> Reply:
    """Take a stream, or its first `most` events and then leave."""
    if response.status != 200:
        return finish(reply, response)
    reply.status, texts = 200, []
    for i, piece in enumerate(pieces(response, pause)):
        if reply.first_s is None:
            reply.first_s = time.monotonic() - reply.started
        if piece is None:
            reply.text, reply.whole_s = "".join(texts), time.monotonic() - reply.started
            return reply
        texts.append(piece)
        if most is not None and i + 1 >= most:
            reply.left = True
            return reply
    reply.fault = "a stream that ends without [DONE]"
    return reply


def ask(port: int, path: str, body: bytes, key: str = KEY) -> tuple[HTTPConnection, HTTPResponse]:
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", path, body, headers(key))
        return connection, connection.getresponse()
    except BaseException:
        connection.close()
        raise


def encoded(question: Question, **more: object) -> bytes:
    return json.dumps({**question.body, **more}).encode()


# ---- kinds of client


def whole(port: int, question: Question, draw: random.Random) -> Reply:
    reply = Reply("whole")
    connection, response = ask(port, question.path, encoded(question))
    with closing(connection):
        return finish(reply, response)


def stream(port: int, question: Question, draw: random.Random) -> Reply:
    reply = Reply("stream")
    connection, response = ask(port, question.path, encoded(question, stream=True))
    with closing(connection):
        return take_stream(reply, response)


def slow_reader(port: int, question: Question, draw: random.Random) -> Reply:
    """Reads 64 bytes at a time, with pauses."""
    reply = Reply("slow reader")
    connection, response = ask(port, question.path, encoded(question, stream=True))
    with closing(connection):
        return take_stream(reply, response, pause=draw.uniform(0.001, 0.01))


def leaves_in_stream(port: int, question: Question, draw: random.Random) -> Reply:
    reply = Reply("leaves in a stream")
    connection, response = ask(port, question.path, encoded(question, stream=True))
    with closing(connection):
        return take_stream(reply, response, most=draw.randint(1, 4))


def sent(port: int, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
    connection.sendall(data)
    return connection


def head(question: Question, size: int) -> bytes:
    lines = [f"POST {question.path} HTTP/1.1", "Host: localhost", f"Content-Length: {size}"]
    lines += [f"{name}: {value}" for name, value in headers().items()]
    return "\r\n".join([*lines, "", ""]).encode()


def leaves_unanswered(port: int, question: Question, draw: random.Random) -> Reply:
    """Some send a line more than their request first."""
    body = encoded(question)
    with closing(sent(port, head(question, len(body)) + body + draw.choice([b"", b"\r\n"]))):
        time.sleep(draw.uniform(0, 0.3))
    return Reply("leaves unanswered", left=True)


def slow_writer(port: int, question: Question, draw: random.Random) -> Reply:
    """Sends its request in 20 pieces, with pauses."""
    reply, body = Reply("slow writer"), encoded(question)
    data = head(question, len(body)) + body
    step = len(data) // 20 + 1
    with closing(sent(port, b"")) as connection:
        for at in range(0, len(data), step):
            connection.sendall(data[at : at + step])
            time.sleep(draw.uniform(0, 0.05))
        response = HTTPResponse(connection, method="POST")
        response.begin()
        return finish(reply, response)


def never_asks(port: int, question: Question, draw: random.Random) -> Reply:
    """Sends part of a head, waits, and goes."""
    data = head(question, 10)
    with closing(sent(port, data[: draw.randint(0, len(data) - 3)])):
        time.sleep(draw.uniform(0, 2))
    return Reply("never asks", left=True)


BAD = (
    *(b"{", b"[]", b'{"prompt": 1}', b'{"prompt": "x", "max_tokens": -1}', b"\xff\xfe", b'{"prompt": "x", "n": 9}'),
    b'{"prompt": "x", "temperature": 1, "xtc_probability": 1, "xtc_threshold": 1}',  # ended all answers under way once
    b'{"prompt": "x", "repetition_penalty": 1e-320}',
)


def malformed(port: int, question: Question, draw: random.Random) -> Reply:
    reply = Reply("malformed")
    connection, response = ask(port, TEXT, draw.choice(BAD))
    with closing(connection):
        return finish(reply, response)


def too_large(port: int, question: Question, draw: random.Random) -> Reply:
    reply = Reply("too large")
    connection, response = ask(port, question.path, b" " * (5 << 20))
    with closing(connection):
        return finish(reply, response)


def wrong_key(port: int, question: Question, draw: random.Random) -> Reply:
    reply = Reply("wrong key")
    connection, response = ask(port, question.path, encoded(question), draw.choice(["", KEY[:-1], KEY + "x"]))
    with closing(connection):
        return finish(reply, response)


Client = Callable[[int, Question, random.Random], Reply]
EXPECTED = {malformed: 400, too_large: 413, wrong_key: 401}  # the others get their answer, or 503
KINDS: dict[Client, int] = {  # with how often of a hundred
    whole: 28,
    stream: 27,
    slow_reader: 6,
    slow_writer: 6,
    leaves_in_stream: 8,
    leaves_unanswered: 6,
    never_asks: 3,
    malformed: 7,
    too_large: 4,
    wrong_key: 5,
}


def once(client: Client, port: int, question: Question, draw: random.Random) -> Reply:
    """One request; what breaks is in the reply."""
    start = time.monotonic()
    try:
        reply = client(port, question, draw)
    except (OSError, HTTPException, KeyError, ValueError) as error:
        return Reply(client.__name__, fault=f"{type(error).__name__}: {error}", started=start)
    if reply.fault is None and not reply.left:
        reply.fault = fault_of(client, reply, question)
    reply.started = start
    return reply


def fault_of(client: Client, reply: Reply, question: Question) -> str | None:
    """Why a reply is not what it should be."""
    expected = EXPECTED.get(client)
    if expected is not None:
        return None if reply.status == expected else f"status {reply.status} in place of {expected}"
    if reply.status == 503:
        return None
    if reply.status != 200:
        return f"status {reply.status}"
    return None if reply.text == question.answer else f"{reply.text!r} in place of {question.answer!r}"
