"""What ends early: clients that leave, requests past the queue, a server that is stopped, generation that fails."""

import ctypes
import errno
import json
import os
import platform
import select
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from mlx_lm import server as mlx_server
from server_process import HEAD, TEXT, TOKENS, Server, events, least, serving

from tiny_qmoe_mlx import container
from tiny_qmoe_mlx import server as command
from tiny_qmoe_mlx.serving import bodies, checks, sockets, wire
from tiny_qmoe_mlx.serving import options as serving_options

pytest_plugins = ["command_fixtures", "server_fixtures"]
PROMPT, OK = "the river stone", {"prompt": "hello", "max_tokens": 2}

# ---- clients that leave


def gone_in_the_middle(live: Server, stream: bool, more: bytes | None = None) -> None:
    """With a reset, as a client that is killed; or politely, after bytes that nobody asked for."""
    before = live.metrics()
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        body = json.dumps({"prompt": "the river", "max_tokens": 900, "stream": stream}).encode()
        connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        live.wait(lambda m: m["tiny_qmoe_generated_tokens_total"] > before["tiny_qmoe_generated_tokens_total"] + 3)
        if more is None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            connection.sendall(more)
            connection.shutdown(socket.SHUT_WR)
            live.wait(lambda m: m["tiny_qmoe_requests_active"] == 0)
    after = live.wait(lambda m: m["tiny_qmoe_requests_active"] == 0 and m["tiny_qmoe_kv_tokens"] == 0)
    assert after["tiny_qmoe_clients_gone_total"] == before["tiny_qmoe_clients_gone_total"] + 1
    written = after["tiny_qmoe_generated_tokens_total"] - before["tiny_qmoe_generated_tokens_total"]
    assert written < 900, "it was not written to its end"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(live, alone, stream):
    gone_in_the_middle(live, stream)
    assert live.get(TEXT, {"prompt": PROMPT, "max_tokens": TOKENS})["choices"][0]["text"] == alone(PROMPT)


@pytest.mark.parametrize("more", [b"", b"\r\n", HEAD * 1000], ids=["nothing", "a line", "another request's head"])
def test_a_client_that_sends_more_and_leaves_has_gone(live, more):
    gone_in_the_middle(live, False, more)


def test_a_client_that_sends_more_and_stays_is_answered(live, alone):
    body = json.dumps({"prompt": PROMPT, "max_tokens": TOKENS}).encode()
    head = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode()
    answer = live.raw(head + body + b"\r\n")
    assert json.loads(answer[answer.index(b"{") :])["choices"][0]["text"] == alone(PROMPT)


def test_a_client_of_openai_that_closes_its_stream(live, client):
    before = live.metrics()["tiny_qmoe_clients_gone_total"]
    stream = client.completions.create(model="default_model", prompt="old", max_tokens=900, stream=True)
    next(iter(stream))
    stream.close()
    live.wait(lambda m: m["tiny_qmoe_requests_active"] == 0 and m["tiny_qmoe_clients_gone_total"] == before + 1)


# ---- a narrow server with a key


@pytest.fixture(scope="module")
def narrow(served, tmp_path_factory):
    """One request at a time, one that waits, and a key."""
    key = tmp_path_factory.mktemp("key") / "key.txt"
    key.write_text("secret-7\n")
    options = ("--decode-concurrency", 1, "--queue", 1, "--api-key-file", key, "--context", 512)
    with serving(served, *options) as running:
        running.key = "secret-7"
        yield running


KEY = {"Authorization": "Bearer secret-7"}


def test_past_the_queue_is_503(narrow):
    streams = [narrow.open(TEXT, {"prompt": "x", "max_tokens": 400, "stream": True}, **KEY)]
    next(events(streams[0]))  # it is being computed
    waiting = threading.Thread(target=lambda: streams.append(narrow.open(TEXT, OK, **KEY)))
    waiting.start()
    narrow.wait(lambda m: m["tiny_qmoe_requests_active"] == m["tiny_qmoe_requests_waiting"] == 1)
    answer = narrow.open(TEXT, OK, **KEY)
    error = json.loads(answer.read())["error"]
    assert (answer.status, error["type"], error["code"]) == (503, "server_error", "server_busy")
    assert 1 <= int(answer.getheader("Retry-After")) <= 60
    waiting.join()
    for stream in streams:
        stream.read()


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer secret-"}, {"Authorization": "Basic secret-7"}])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/experts", TEXT])
def test_the_key_is_asked_for(narrow, path, headers):
    status, error = narrow.refused(path, OK if path == TEXT else None, **headers)
    assert (status, error["type"], error["code"]) == (401, "authentication_error", "invalid_api_key")


def test_the_key_opens(narrow):
    assert len(narrow.get("/v1/models", **KEY)["data"]) == 1
    assert narrow.get(TEXT, OK, **KEY)["usage"]["completion_tokens"] == 2
    assert narrow.get("/health")["status"] == "ok", "a watcher needs none"
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{narrow.url}/v1", api_key="secret-7", max_retries=0) as own:
        assert len(own.models.list().data) == 1


# ---- generation that fails


@contextmanager
def serving_here(model: Path, *options: object) -> Iterator[Server]:
    """The server in this process, so that a test can make it fail."""
    args = serving_options.parse(["--model", str(model), "--port", "0", "--quiet", *map(str, options)])
    with sockets.Server(args.host, args.port) as listening:
        opened, generation = command._open(model, args)
        clients = command.answer(listening, generation)
        try:
            yield Server(None, "", listening.server_port, [])
        finally:
            listening.shutdown()
            clients.join()
            generation.stop_and_join()
            opened.close()


def dribbled(here: Server, start: bytes) -> bytes:
    """What comes back where a client sends something every now and then, and never all."""
    with socket.create_connection(("127.0.0.1", here.port), timeout=60) as connection:
        connection.sendall(start)
        with suppress(OSError):
            while not select.select([connection], [], [], 0.05)[0]:
                connection.sendall(b"x")
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_a_request_that_dribbles_in_is_ended(served, monkeypatch):
    """Each byte comes in time, the whole does not: a thread and a connection are worth too much."""
    monkeypatch.setattr(wire, "HEAD_S", 1.0)
    monkeypatch.setattr(wire, "BODY_S", 1.0)
    with serving_here(served, "--context", 512) as here:
        assert dribbled(here, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ") == b""
        answer = dribbled(here, HEAD + b"Content-Length: 10000\r\n\r\n{")
        assert answer.split(b" ")[1] == b"408" and b"should come within 1 s" in answer
        assert here.get("/health") == {"status": "ok"}


SLOW = HEAD + b"Content-Length: 300000\r\n\r\n{"


@contextmanager
def slow_clients(here: Server) -> Iterator[list[bytes]]:
    """As many as large bodies are read at once, none of which ever comes; what they are told, in the end."""
    with ThreadPoolExecutor(2) as pool:
        told: list[bytes] = []
        asked = [pool.submit(dribbled, here, SLOW) for _ in range(2)]
        time.sleep(0.5)  # they have their turn
        yield told
        told += [one.result() for one in asked]


def test_slow_clients_do_not_hold_up_large_requests(served, monkeypatch):
    """Nor does the time that another waits for its turn count as its own."""
    monkeypatch.setattr(wire, "BODY_S", 3.0)
    monkeypatch.setattr(wire, "LARGE_S", 2.0)
    with serving_here(served, "--context", 512) as here:
        with slow_clients(here) as told:
            status, error = here.refused(TEXT, {"prompt": "x" * 300_000})
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert all(b" 408 " in answer and b"bytes a second" in answer for answer in told)


def test_a_large_request_whose_turn_does_not_come_is_told_so(served, monkeypatch):
    monkeypatch.setattr(wire, "LARGE_S", 3.0)
    monkeypatch.setattr(bodies, "WAIT_S", 0.1)
    with serving_here(served, "--context", 512) as here:
        with slow_clients(here):
            answer = here.open(TEXT, {"prompt": "x" * 300_000})
            assert answer.status == 503 and int(answer.getheader("Retry-After")) > 0
            assert json.loads(answer.read())["error"]["code"] == "server_busy"
            assert here.get(TEXT, OK)["usage"]["completion_tokens"] == 2, "a small one needs no turn"
        assert here.refused(TEXT, {"prompt": "x" * 300_000})[0] == 400


def test_a_large_body_has_the_more_time_the_more_of_it_has_come(monkeypatch):
    near, far = socket.socketpair()
    with near, far, wire.Received(near) as received:
        monkeypatch.setattr(wire.time, "monotonic", lambda: now)
        now = 100.0
        received.allow(2, 100_000, rate=1000)
        far.sendall(bytes(3000))
        assert len(received.read(3000)) == 3000
        now = 104.9  # 2 s, and one for each thousand
        far.sendall(bytes(1))
        assert received.read(1) == bytes(1)
        now = 105.1
        with pytest.raises(TimeoutError):
            received.read(1)


def test_more_connections_than_the_machine_can_hold_are_told_so(served, monkeypatch):
    """Also those that have sent their request already."""
    monkeypatch.setattr(sockets, "CONNECTIONS", 4)
    with serving_here(served, "--context", 512) as here:
        idle = [socket.create_connection(("127.0.0.1", here.port)) for _ in range(4)]
        time.sleep(0.5)  # they are accepted in turn
        for _ in range(20):
            answer = here.open(TEXT, {"prompt": "x" * 5000})
            assert answer.status == 503 and int(answer.getheader("Retry-After")) > 0
            assert json.loads(answer.read())["error"]["code"] == "server_busy"
        for connection in idle:
            connection.close()
        end = time.monotonic() + 60
        while here.open("/health").status != 200:
            assert time.monotonic() < end, "the others go on"
            time.sleep(0.1)


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT])
@pytest.mark.parametrize("stream", [False, True])
def test_a_disk_that_fails_for_a_while_fails_one_answer(served, alone, monkeypatch, stream, number):
    """Experts are read anew for every token; the request that meets the fault is told, the next one is answered. A
    network's disk may be too late: no client has left."""
    failing, real = threading.Event(), os.preadv

    def preadv(*inputs, **options):
        if failing.is_set():
            raise OSError(number, os.strerror(number))
        return real(*inputs, **options)

    monkeypatch.setattr(os, "preadv", preadv)
    with serving_here(served, "--context", 512, "--memory", least(served, 512)) as here:
        if not stream:
            failing.set()
        answer = here.open(TEXT, {"prompt": PROMPT, "max_tokens": 400, "stream": stream})
        if stream:
            next(events(answer))
            failing.set()
        error = json.loads(answer.read().decode().strip().splitlines()[-1].removeprefix("data: "))["error"]
        assert (error["type"], answer.status) == ("server_error", 200 if stream else 500)
        assert os.strerror(number) in error["message"]
        failing.clear()
        here.wait(lambda m: m["tiny_qmoe_requests_active"] == 0)
        assert here.get("/health") == {"status": "ok"}
        assert here.get(TEXT, {"prompt": PROMPT, "max_tokens": TOKENS})["choices"][0]["text"] == alone(PROMPT)


@pytest.mark.parametrize("where", ["sampler", "processor"])
def test_sampling_that_fails_ends_its_own_request_alone(served, alone, monkeypatch, where):
    """Numbers that our checks let through and mlx-lm refuses, when both are in one batch."""
    monkeypatch.setitem(checks.NUMBERS, "xtc_threshold", (float, 0, 1))

    def fail(*inputs):
        raise ValueError("no such bias")

    if where == "processor":
        monkeypatch.setattr(
            mlx_server, "_make_logits_processors", lambda args: [fail] if args.logits.logit_bias else []
        )
    bad = {
        "sampler": {"temperature": 1, "xtc_probability": 1, "xtc_threshold": 1},
        "processor": {"logit_bias": {"5": 1}},
    }
    with serving_here(served, "--context", 4096) as here:  # of which there is enough for both at once
        stream = events(here.open(TEXT, {"prompt": PROMPT, "max_tokens": 400, "stream": True}))
        text = next(stream)["choices"][0]["text"]
        status, error = here.refused(TEXT, {**OK, **bad[where]})
        assert status == 500 and ("threshold" if where == "sampler" else "no such bias") in error["message"]
        assert text + "".join(e["choices"][0]["text"] for e in stream if e != "[DONE]") == alone(PROMPT, 400)
        here.wait(lambda m: m["tiny_qmoe_requests_active"] == 0)
        assert here.refused(TEXT, {**OK, **bad[where], "seed": 1})[0] == 500, "alone"
        assert here.get(TEXT, {"prompt": PROMPT, "max_tokens": TOKENS})["choices"][0]["text"] == alone(PROMPT)


@pytest.mark.slow
def test_files_that_change_under_a_server_are_told(served, tmp_path):
    model = Path(shutil.copytree(served, tmp_path / "model"))
    expert = container.open_model(model).expert_file(0)
    whole = expert.read_bytes()
    with serving(model, "--context", 512, "--memory", least(model, 512)) as running:
        expert.write_bytes(whole[:4096] + bytes(len(whole) - 4096))
        status, error = running.refused(TEXT, {"prompt": PROMPT, "max_tokens": TOKENS})
        assert status == 500 and expert.name in error["message"]
        running.wait(lambda m: m["tiny_qmoe_requests_active"] == 0)


# ---- stops


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_answers_end(served, interruptible, alone, number):
    with serving(served, "--context", 512) as running:
        answer = running.open(TEXT, {"prompt": PROMPT, "max_tokens": 300, "stream": True})
        stream = events(answer)
        text = next(stream)["choices"][0]["text"]
        running.child.send_signal(number)
        found = list(stream)
        assert found[-1] == "[DONE]"
        assert text + "".join(f["choices"][0]["text"] for f in found[:-1]) == alone(PROMPT, 300)
        assert running.child.wait(timeout=60) == 0
        with pytest.raises(ConnectionError):
            running.open("/health")
    assert running.errors == []


SYS_TGKILL = {"x86_64": 234, "aarch64": 131}.get(platform.machine())


@pytest.mark.skipif(sys.platform != "linux" or SYS_TGKILL is None, reason="Linux's call for a signal to one thread")
def test_a_signal_that_another_thread_gets_stops_it_too(served):
    """Python runs its handler in the main thread alone, which such a signal does not wake."""
    with serving(served, "--context", 512) as running:
        pid = running.child.pid
        others = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir() if int(task.name) != pid]
        assert ctypes.CDLL(None).syscall(SYS_TGKILL, pid, others[0], signal.SIGTERM) == 0
        assert running.child.wait(timeout=60) == 0


@pytest.mark.slow
def test_a_stop_does_not_wait_for_ever(served):
    with serving(served, "--context", 1024, "--grace", 0) as running:
        stream = events(running.open(TEXT, {"prompt": "x", "max_tokens": 1000, "stream": True}))
        next(stream)
        assert running.stop() == 0
        assert "cut off" in "".join(running.errors)
