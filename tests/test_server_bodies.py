"""What clients send takes little memory, while it comes and while its answer waits: the budget is the process's."""

import json
import random
import socket
import sys
import time
from contextlib import ExitStack

import pytest
from commands import linux
from server_process import CHAT, HEAD, TEXT, Server, least, serving

from tiny_qmoe_mlx.serving import bodies, checks, prompt
from tiny_qmoe_mlx.serving.refusal import Refused

pytest_plugins = ["command_fixtures", "server_fixtures"]
CLIENTS, MB = 24, 1_000_000
SENT = {  # what the server does not read, or reads before it answers
    "texts": {"unknown": "a" * 4 * MB},
    "options of streams": {"stream_options": {"include_usage": True, "unknown": "a" * 4 * MB}},
    "messages": {"messages": [{"role": "user", "content": "x", "unknown": "a" * 4 * MB}]},
}


@pytest.fixture(scope="module")
def narrow(served):
    """One request is computed at a time, the others wait."""
    with serving(served, "--context", 512, "--decode-concurrency", 1, "--memory", least(served, 512, 1)) as running:
        running.get(TEXT, {"prompt": "x", "max_tokens": 2})
        yield running


def connected(server: Server, clients: ExitStack, data: bytes, length: int) -> None:
    connection = clients.enter_context(socket.create_connection(("127.0.0.1", server.port)))
    connection.sendall(HEAD.replace(b"/completions", b"/chat/completions"))
    connection.sendall(b"Content-Length: %d\r\n\r\n" % length + data)


@linux
def test_bodies_that_do_not_come_take_little(narrow):
    before = narrow.metrics()["tiny_qmoe_resident_memory_bytes"]
    with ExitStack() as clients:
        for _ in range(200):
            connected(narrow, clients, b"{" * 250_000, 256_000)
        time.sleep(1)
        assert narrow.metrics()["tiny_qmoe_resident_memory_bytes"] - before < 30 * MB
        assert narrow.get(TEXT, {"prompt": "x", "max_tokens": 2}), "a small one needs no turn"


@linux
@pytest.mark.parametrize("what", SENT)
def test_a_request_that_waits_keeps_nothing_but_its_tokens(narrow, what):
    message = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "stream": True}
    data = json.dumps({**message, **SENT[what]}).encode()
    before = narrow.metrics()["tiny_qmoe_resident_memory_bytes"]
    with ExitStack() as clients:
        for _ in range(CLIENTS):
            connected(narrow, clients, data, len(data))
        found = narrow.wait(lambda m: m["tiny_qmoe_requests_waiting"] > CLIENTS - 8)
        assert found["tiny_qmoe_resident_memory_bytes"] - before < 80 * MB  # 100 and more, were the bodies kept
    narrow.wait(lambda m: not m["tiny_qmoe_requests_active"] + m["tiny_qmoe_requests_waiting"])


@linux
def test_a_schema_that_waits_takes_little(narrow):
    """Each as a matcher takes 11 MB."""
    pytest.importorskip("llguidance")
    texts = {f"k{i}": {"type": "string", "pattern": f"^[a-z]{{1,{i + 50}}}$"} for i in range(1100)}
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": texts}}}
    asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "stream": True}
    plain, data = json.dumps(asked).encode(), json.dumps({**asked, "response_format": form}).encode()
    before = narrow.metrics()["tiny_qmoe_resident_memory_bytes"]
    with ExitStack() as clients:
        connected(narrow, clients, plain, len(plain))
        for _ in range(12):
            connected(narrow, clients, data, len(data))
        found = narrow.wait(lambda m: m["tiny_qmoe_requests_waiting"] > 10)
        assert found["tiny_qmoe_resident_memory_bytes"] - before < 60 * MB
    narrow.wait(lambda m: not m["tiny_qmoe_requests_active"] + m["tiny_qmoe_requests_waiting"])
    form["json_schema"]["schema"]["description"] = "x" * 70_000
    status, error = narrow.refused(CHAT, {**asked, "response_format": form})
    assert status == 400 and "a schema of at most 65536 characters" in error["message"]


@linux
def test_stop_words_are_forgotten_with_their_answer(narrow):
    draw = random.Random(0)
    before = narrow.metrics()["tiny_qmoe_resident_memory_bytes"]
    for _ in range(30):
        words = ["".join(draw.choices("abcdefgh ", k=checks.STOP_LENGTH)) for _ in range(checks.STOPS)]
        narrow.get(TEXT, {"prompt": "x", "max_tokens": 1, "stop": words})
    assert narrow.metrics()["tiny_qmoe_resident_memory_bytes"] - before < 30 * MB  # 75, were they kept


def test_turns():
    held = bodies.Bodies()
    with ExitStack() as stack:
        for size, turns in bodies.TURNS.items():
            for _ in range(turns):
                stack.enter_context(held.reading(size))
        for size in bodies.TURNS:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Refused) as caught:
                patch.setattr(bodies, "WAIT_S", 0.01)
                stack.enter_context(held.reading(size))
            assert caught.value.status == 503 and "Retry-After" in caught.value.headers
        with held.reading(bodies.SMALL_BYTES), held.objects():
            pass
    with held.reading(max(bodies.TURNS)):
        pass


def test_tokens_that_wait_are_packed():
    tokens = (list(range(5000)), [list(range(4000)), list(range(4000, 5000))], ["user", "assistant"], "normal", None)
    held = prompt.packed(tokens)
    assert prompt.unpacked(held) == tokens and prompt.unpacked(held)[2] is not tokens[2]
    assert sum(map(sys.getsizeof, (held[0], *held[1]))) < 10 * 5000  # where an int alone has 28 bytes


def count(value: object) -> int:
    if isinstance(value, dict):
        return 1 + sum(1 + count(inner) for inner in value.values())
    return 1 + sum(map(count, value)) if isinstance(value, list) else 1


def made(draw: random.Random, depth: int) -> object:
    kind = draw.randrange(6) if depth else 5
    text = "".join(draw.choices('ab"\\,:[{é\n', k=draw.randrange(8)))
    if kind == 0:
        return [made(draw, depth - 1) for _ in range(draw.randrange(5))]
    if kind == 1:
        return {text + str(i): made(draw, depth - 1) for i in range(draw.randrange(4))}
    return draw.choice([1, 1.5, None, True, text, text])


def test_values_are_counted_before_they_are_made():
    draw = random.Random(0)
    for _ in range(3000):
        value = [made(draw, 5)]
        data = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode()
        assert count(value) / 2 <= checks.values(data) <= 2 * count(value), value
    assert checks.values(json.dumps("[,:{" * 10**6).encode()) == 1


@pytest.mark.parametrize("value", [[0] * 10**5, [""] * 10**5, {str(i): 0 for i in range(50_000)}], ids=type)
def test_more_values_than_memory_is_meant_for(value):
    with pytest.raises(Refused, match="at most 65536 values"):
        checks.parse(json.dumps({"unknown": value}).encode())
