"""What the server refuses: requests that are no requests, callers that may not ask, options that cannot be."""

import hmac
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import refusal
from server_process import CHAT, HEAD, TEXT, chat, least, serving

from tiny_qmoe_mlx import budget
from tiny_qmoe_mlx.serving import handler, wire
from tiny_qmoe_mlx.serving.refusal import Refused
from tiny_qmoe_mlx.serving.schema import Grammars

pytest_plugins = ["command_fixtures", "server_fixtures"]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

# ---- bad requests

OK = {"prompt": "hello", "max_tokens": 2}
IMAGE = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]
BODIES = {
    "no JSON": (TEXT, b'{"prompt": "he', 400, "JSON"),
    "nothing": (TEXT, b"", 400, "JSON"),
    "no UTF-8": (TEXT, b'{"prompt": "\xff\xfe"}', 400, "JSON"),
    "a list": (TEXT, [OK], 400, "object"),
    "nested too deeply": (TEXT, b"[" * 50_000, 400, "JSON"),
    "no number": (TEXT, b'{"prompt": "x", "temperature": NaN}', 400, "NaN"),
    "an endless number": (TEXT, b'{"prompt": "x", "temperature": 1e999}', 400, "1e999"),
    "another model": (TEXT, {**OK, "model": "gpt-4"}, 404, "model should be"),
    "a model of another kind": (TEXT, {**OK, "model": 7}, 404, "model should be"),
    "an adapter": (TEXT, {**OK, "adapters": "mine"}, 404, "adapters"),
    "a draft model": (TEXT, {**OK, "draft_model": "mine"}, 404, "draft_model"),
    "negative max_tokens": (TEXT, {**OK, "max_tokens": -1}, 400, "max_tokens"),
    "no max_tokens": (TEXT, {**OK, "max_tokens": 0}, 400, "max_tokens"),
    "too large an answer": (TEXT, {**OK, "max_tokens": 1 << 20}, 400, "context of 1024"),
    "an answer longer than any": (TEXT, {**OK, "max_tokens": 10**40}, 400, "max_tokens"),
    "a temperature beyond floats": (TEXT, {**OK, "temperature": 10**400}, 400, "temperature"),
    "a bias beyond floats": (TEXT, {**OK, "logit_bias": {"5": 10**400}}, 400, "logit_bias"),
    "more guesses than the budget has": (TEXT, {**OK, "num_draft_tokens": 4}, 400, "num_draft_tokens"),
    "max_tokens as text": (TEXT, {**OK, "max_tokens": "12"}, 400, "max_tokens"),
    "half a token": (TEXT, {**OK, "max_tokens": 1.5}, 400, "max_tokens"),
    "temperature below 0": (TEXT, {**OK, "temperature": -1}, 400, "temperature"),
    "top_p above 1": (TEXT, {**OK, "top_p": 2}, 400, "top_p"),
    "xtc_threshold above a half": (
        TEXT,
        {**OK, "xtc_threshold": 0.6},
        400,
        "xtc_threshold should be a number in 0 to 0.5",
    ),
    "a penalty of hardly anything": (TEXT, {**OK, "repetition_penalty": 1e-320}, 400, "a number in 0.01 to 100"),
    "top_k of all tokens": (TEXT, {**OK, "top_k": 100_000}, 400, "top_k"),
    "a negative seed": (TEXT, {**OK, "seed": -3}, 400, "seed"),
    "a bias for no token": (TEXT, {**OK, "logit_bias": {"999999": 1}}, 400, "logit_bias"),
    "a bias by name": (TEXT, {**OK, "logit_bias": {"the": 1}}, 400, "logit_bias"),
    "stop as number": (TEXT, {**OK, "stop": 3}, 400, "stop"),
    "an empty stop": (TEXT, {**OK, "stop": [""]}, 400, "stop"),
    "two answers": (TEXT, {**OK, "n": 2}, 400, "n should be 1"),
    "stream options": (TEXT, {**OK, "stream": True, "stream_options": 1}, 400, "stream_options"),
    "no prompt": (TEXT, {"max_tokens": 2}, 400, "prompt"),
    "an empty prompt": (TEXT, {**OK, "prompt": ""}, 400, "at least one token"),
    "several prompts": (TEXT, {**OK, "prompt": ["a", "b"]}, 400, "prompt"),
    "half a character": (TEXT, b'{"prompt": "\\ud800"}', 400, "prompt"),
    "no messages": (CHAT, {}, 400, "messages"),
    "empty messages": (CHAT, {"messages": []}, 400, "messages"),
    "messages as text": (CHAT, {"messages": "hello"}, 400, "messages"),
    "a message without role": (CHAT, {"messages": [{"content": "x"}]}, 400, "role"),
    "an image": (CHAT, {"messages": [{"role": "user", "content": IMAGE}]}, 400, "text alone"),
    "content as number": (CHAT, {"messages": [{"role": "user", "content": 3}]}, 400, "content"),
    "tool_calls as text": (CHAT, {"messages": [{"role": "assistant", "tool_calls": "x"}]}, 400, "tool_calls"),
    "tool_calls as 0": (CHAT, {"messages": [{"role": "assistant", "tool_calls": 0}]}, 400, "tool_calls"),
    "arguments that are no JSON": (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]},
        400,
        "refuses the prompt",
    ),
    "a tool that must be called": (CHAT, {"messages": chat("x"), "tool_choice": "required"}, 400, "tool_choice"),
    "tools as text": (CHAT, {"messages": chat("x"), "tools": "x"}, 400, "tools"),
    "a template of a stranger's": (
        CHAT,
        {"messages": chat("x"), "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        400,
        "chat_template_kwargs",
    ),
    "an unknown format": (CHAT, {"messages": chat("x"), "response_format": {"type": "xml"}}, 400, "response_format"),
    "a format without schema": (
        CHAT,
        {"messages": chat("x"), "response_format": {"type": "json_schema"}},
        400,
        "response_format",
    ),
    "tools and a schema": (
        CHAT,
        {"messages": chat("x"), "tools": [TOOL], "response_format": {"type": "json_object"}},
        400,
        "exclude",
    ),
}


@pytest.mark.parametrize("what", BODIES)
def test_a_bad_request_is_refused_in_openais_words(live, what):
    path, body, status, words = BODIES[what]
    found, error = live.refused(path, body)
    assert (found, error["type"]) == (status, "invalid_request_error") and words in error["message"], error
    assert live.get(TEXT, OK)["usage"]["completion_tokens"] == 2, "the server goes on"


def test_a_schema_that_cannot_be_followed(live):
    pytest.importorskip("llguidance")
    body = {
        "messages": chat("x"),
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}},
    }
    status, error = live.refused(CHAT, body)
    assert status == 400 and "response_format cannot be followed" in error["message"]


def test_a_prompt_of_a_megabyte(live, client):
    openai, text = pytest.importorskip("openai"), "stone " * 170_000
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="default_model", messages=chat(text))
    assert error.value.code == "context_length_exceeded"
    assert "context of 1024 tokens" in error.value.message and len(error.value.message) < 400
    assert live.metrics()["tiny_qmoe_requests_active"] == 0


def test_a_body_that_is_too_large(live):
    status, error = live.refused(TEXT, b" " * (9 << 20))
    assert (status, error["code"]) == (413, "too_large")


RAW = {
    "no length": (HEAD + b"\r\n", 411),
    "a length that is none": (HEAD + b"Content-Length: many\r\n\r\n", 400),
    "a negative length": (HEAD + b"Content-Length: -5\r\n\r\n", 400),
    "an unknown method": (b"BREW /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    "no HTTP": (b"hello\r\n\r\n", 400),
    "an endless line": (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
    "an endless header": (HEAD + b"X: " + b"a" * 70_000 + b"\r\n\r\n", 431),
    "many headers": (HEAD + b"X: y\r\n" * 200 + b"\r\n", 431),
    "a bomb of long headers": (HEAD + (b"X: " + b"a" * 60_000 + b"\r\n") * 3 + b"\r\n", 431),
    "a flood of headers": (HEAD + (b"X: " + b"a" * 60_000 + b"\r\n") * 90 + b"\r\n", 431),
    "two lengths": (HEAD + b"Content-Length: 2\r\nContent-Length: 30\r\n\r\n{}", 400),
    "a length and pieces": (HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 400),
    "pieces": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
    "a space before the colon": (HEAD + b"Content-Length : 2\r\n\r\n{}", 400),
    "a line that is no header": (HEAD + b"nonsense\r\nContent-Length: 2\r\n\r\n{}", 400),
    "two hosts": (HEAD + b"Host: localhost\r\nContent-Length: 2\r\n\r\n{}", 400),
    "a line within a value": (HEAD + b"X: a\rContent-Length: 2\r\n\r\n{}", 400),
    "a NUL within a value": (HEAD + b"X: a\0b\r\nContent-Length: 2\r\n\r\n{}", 400),
    "a value that goes on": (HEAD + b"X: a\r\n b\r\nContent-Length: 2\r\n\r\n{}", 400),
    "another HTTP": (b"GET /health HTTP/3.0\r\nHost: localhost\r\n\r\n", 505),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
}


@pytest.mark.parametrize("what", RAW)
def test_bad_http(live, what):
    data, status = RAW[what]
    answer = live.raw(data)
    body = json.loads(answer[answer.index(b"{") :])
    assert sorted(body["error"]) == ["code", "message", "type"]
    assert answer.split(b" ")[1] == str(status).encode()
    assert live.get("/health") == {"status": "ok"}


def test_what_follows_a_request_is_not_another(live):
    """One connection is one request: nothing is smuggled behind one."""
    before = live.metrics()
    first = HEAD + b"Content-Length: 33\r\n\r\n" + b'{"prompt": "hello","max_tokens":2}'[:33]
    answer = live.raw(first + b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.count(b"HTTP/1.0 ") == 1 and b'"data"' not in answer
    after = live.metrics()
    assert sum(after[k] - before.get(k, 0) for k in after if "http_responses" in k) == 2, "this one, and the figures"


def test_half_a_head_is_no_request(live):
    """The client has gone; what it sent so far might have been another request than it meant."""
    before = live.metrics()
    with socket.create_connection(("127.0.0.1", live.port), timeout=60) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorizat")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
    assert live.metrics()["tiny_qmoe_clients_gone_total"] == before["tiny_qmoe_clients_gone_total"] + 1


def test_old_http(live):
    assert live.raw(b"GET /health HTTP/1.0\r\n\r\n").endswith(b'{"status": "ok"}')
    assert live.raw(b"GET /health\r\n\r\n") == b'{"status": "ok"}'


PATHS = {TEXT: "POST, OPTIONS", "/v1/models": "GET, HEAD, OPTIONS", "/": "GET, HEAD, OPTIONS"}


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "TRACE"])
@pytest.mark.parametrize("path", PATHS)
def test_what_may_be_done_with_a_path(live, method, path):
    answer = live.open(path, json.dumps(OK).encode() if method == "POST" else None, method)
    body = answer.read()
    allowed = method in PATHS[path]
    assert answer.status == (200 if allowed else 405)
    assert answer.getheader("Allow") == (None if allowed else PATHS[path])
    assert (body == b"") == (method == "HEAD") and int(answer.getheader("Content-Length")) > 0


def test_a_client_that_dribbles_is_left(monkeypatch):
    """A head, or a body, of which a byte comes now and then: each would be in time, all of it is not."""
    monkeypatch.setattr(wire, "HEAD_S", 0.5)
    near, far = socket.socketpair()
    with near, far, io.BufferedReader(wire.Received(near)) as received:
        far.sendall(b"GET / HT")
        stopped = threading.Event()

        def dribble() -> None:
            while not stopped.wait(0.05):
                far.sendall(b"x")

        thread = threading.Thread(target=dribble)
        thread.start()
        with pytest.raises(TimeoutError):
            received.readline(100_000)
        stopped.set()
        thread.join()


def test_a_client_that_reads_slowly_gets_all(monkeypatch):
    """Longer than a client may be silent, which it is not."""
    monkeypatch.setattr(wire, "PIECE", 1 << 12)
    near, far = socket.socketpair()
    with near, far, ThreadPoolExecutor(1) as pool:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
        near.settimeout(2.0)
        far.settimeout(20.0)
        sent = pool.submit(wire.Sent(near).write, b"x" * (1 << 17))
        got = 0
        while got < 1 << 17:
            time.sleep(0.1)
            got += len(far.recv(1 << 12))
        assert sent.result() == 1 << 17


def test_a_schema_without_its_library_is_refused(monkeypatch, alone):
    monkeypatch.setitem(sys.modules, "llguidance", None)  # its import fails
    with pytest.raises(Refused, match=r"needs the package llguidance.*install tiny-qmoe-mlx\[server\]") as error:
        Grammars(alone.tokenizer, 262).processor({"type": "json_object"}, False)
    assert error.value.status == 501
    assert Grammars(alone.tokenizer, 262).processor({"type": "text"}, False) is None


def test_tools_for_a_model_without_any_are_refused(converted):
    """Not left unheeded: this model has no chat template."""
    with serving(converted, "--context", 512) as plain:
        status, error = plain.refused(CHAT, {"messages": chat("x"), "tools": [TOOL]})
        assert status == 400 and error["message"].startswith("tools: ")
        parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
        whole, cut = ({"messages": [{"role": "user", "content": c}], "max_tokens": 4} for c in ("hello", parts))
        found = [plain.get(CHAT, body)["choices"][0]["message"] for body in (whole, cut)]
        assert found[0] == found[1], "a text in parts is one text"


# ---- who may call


def test_what_people_ask_is_not_logged(live):
    for path, body in ((TEXT, {**OK, "prompt": "mother-of-pearl"}), (TEXT, b'{"mother-of-pearl": ')):
        live.open(path, body).read()
    live.wait(lambda m: m["tiny_qmoe_requests_active"] == 0)
    assert any("POST /v1/completions 200" in line for line in live.errors), "its log level is info"
    assert not any("mother-of-pearl" in line for line in live.errors)


def test_the_log_is_text_whatever_is_asked_for(live):
    """A terminal obeys some bytes; what comes after a question mark may be a prompt."""
    for line in (b"GET /\x1b]0;odd\x07\x9b31m HTTP/1.1", b"F\x1b[31m /odd?q=mother-of-pearl HTTP/1.1"):
        live.raw(line + b"\r\nHost: localhost\r\n\r\n")
    live.open("/health").read()
    lines = [line for line in live.errors if "odd" in line]
    assert len(lines) == 2 and all(line.rstrip("\n").isprintable() for line in lines), lines
    assert not any("mother-of-pearl" in line for line in lines)


def test_only_this_machine_reaches_it_unless_told(live):
    """Every socket on which it listens is on the loopback interface."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs /proc")
    tables = [Path(f"/proc/{live.child.pid}/net/{name}") for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    own = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{live.port:04X}")]
    assert own == [f"0100007F:{live.port:04X}"]


def test_keys_are_compared_in_constant_time(monkeypatch):
    """By the library's comparison, whatever was sent; a wrong key is not told from a wrong beginning."""
    asked = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: asked.append((a, b)) or a == b)
    for given, known in (("Bearer key", True), ("Bearer ke", False), ("bearer key", True), ("Bearer k\xe9y", False)):
        caller = SimpleNamespace(
            generation=SimpleNamespace(cli_args=SimpleNamespace(api_key="key")), headers={"Authorization": given}
        )
        with nullcontext() if known else pytest.raises(Refused, match="Authorization"):
            handler.Handler._check_key(caller)
    assert asked == [(b"key", b"key"), (b"ke", b"key"), (b"key", b"key"), ("k\xe9y".encode(), b"key")]


# ---- options


def test_a_port_in_use_is_one_sentence(here, served, live):
    sentence = refusal(here("server", "--model", served, "--port", live.port))
    assert f"port {live.port} of 127.0.0.1 should be free" in sentence


def test_a_port_in_use_is_found_before_the_model_is(here, live):
    assert "should be free" in refusal(here("server", "--model", "/nowhere", "--port", live.port))


REFUSED = {
    "no such host": (("--host", "no.such.host.invalid"), "--host"),
    "a port that is none": (("--port", "70000"), "--port should lie in 0 to 65535"),
    "a host that is more than a name": (("--allowed-host", "http://box.example"), "--allowed-host should be a name"),
    "no queue": (("--queue", "0"), "--queue"),
    "a budget that cannot be read": (("--memory", "lots"), r"\[memory\]"),
    "too small a budget": (("--memory", "50MB"), "too small to serve this model"),
    "a cache size that cannot be read": (("--prompt-cache-bytes", "some"), r"\[memory\]"),
    "a template argument that is no JSON": (("--chat-template-args", "{"), "--chat-template-args"),
    "a key file that is not there": (("--api-key-file", "/nowhere/key"), "/nowhere/key"),
    "a key file without an end": (("--api-key-file", "/dev/zero"), "should hold one key"),
    "a template that is none": (("--chat-template", "{% for"), "refuses it: .*; see --chat-template and"),
    "tools for every request": (("--chat-template-args", '{"tools": []}'), "a JSON object without .*, tools"),
    "two kinds of cache": (("--kv-bits", "4", "--draft-model", "x"), "exclude"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_options_are_one_sentence(here, served, what):
    options, words = REFUSED[what]
    sentence = refusal(here("server", "--model", served, "--port", 0, *options))
    assert re.search(words, sentence), sentence


def test_a_quantized_cache_that_does_not_fit_is_refused_at_the_start(here, served):
    """Heads of 16 values have no group of 64."""
    assert "--kv-bits 8 does not fit" in refusal(here("server", "--model", served, "--port", 0, "--kv-bits", 8))


def test_an_empty_key_is_refused(here, served, tmp_path):
    (tmp_path / "key").write_text("\n")
    assert "--api-key-file" in refusal(here("server", "--model", served, "--api-key-file", tmp_path / "key"))


def test_the_smallest_budget_is_named_and_works(here, served):
    sentence = refusal(here("server", "--model", served, "--port", 0, "--memory", "60MB", "--context", 256))
    named = sentence.split("the smallest that works is ")[1].split(";")[0]
    assert named == budget.show(least(served, 256))


def test_help_has_examples_and_is_fast(here):
    done = here("server", "--help")
    assert done.status == 0 and "python -m tiny_qmoe_mlx.server --model demo" in done.out
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tiny_qmoe_mlx.server", "--help"], capture_output=True, check=True
    )
    assert not {b"mlx.core", b"numpy", b"transformers"}.intersection(w.strip() for w in found.stderr.split(b"|"))
