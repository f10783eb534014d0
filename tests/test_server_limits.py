"""What a request may cost before it is refused: memory, by its text and by what templates make of it."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from abuse.hostile_cases import forge
from jinja2.defaults import DEFAULT_FILTERS
from jinja2.sandbox import SandboxedEnvironment
from server_process import CHAT, chat, serving

from tiny_qmoe_mlx import chat_template, tokenizer
from tiny_qmoe_mlx.serving import prompt
from tiny_qmoe_mlx.serving.refusal import Refused

pytest_plugins = ["command_fixtures", "server_fixtures"]


def nested(depth: int, inner: object) -> object:
    for _ in range(depth):
        inner = [inner]
    return inner


SAID = chat("x")
CALLS = [{"function": {"arguments": json.dumps(nested(300, [1] * 9))}}]
LARGE = {  # requests that a tokenizer or a template would make much larger
    "a role": {"messages": [{"role": "x " * 500_000, "content": "x"}]},
    "many messages": {"messages": SAID * 8_000},
    "a template's text for each message": {"messages": SAID * 100, "chat_template_kwargs": {"date": "x " * 10_000}},
    "tools, indented": {"messages": SAID, "tools": [{"function": nested(300, [1] * 60_000)}]},
    "arguments of calls, indented": {"messages": [{"role": "assistant", "tool_calls": CALLS * 300}]},
    "many lists": {"messages": SAID, "tools": [{"function": [[]] * 400_000}]},
}


@pytest.mark.parametrize("what", LARGE)
def test_a_request_does_not_grow_before_it_is_refused(live, what):
    before = live.metrics()["tiny_qmoe_peak_memory_bytes"]
    status, error = live.refused(CHAT, LARGE[what])
    words = {"a template's text for each message": "chat_template_kwargs", "many lists": "at most 65536 values"}
    assert status == 400 and words.get(what, "context of 1024 tokens") in error["message"], error
    assert live.metrics()["tiny_qmoe_peak_memory_bytes"] - before < 50_000_000


def test_the_text_of_roles_is_counted_before_it_is_written(served, tmp_path):
    """Of a model without a chat template: a text for each role, times all messages."""
    model = Path(shutil.copytree(served, tmp_path / "model"))
    options = json.loads((model / "tokenizer_config.json").read_text())
    del options["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(options))
    forge(model)
    body = {"messages": [{"role": "u", "content": "x"}] * 4, "role_mapping": {"u": "USER: "}, "max_tokens": 2}
    with serving(model, "--context", 512) as running:
        before = running.metrics()["tiny_qmoe_peak_memory_bytes"]
        for name in ("u", "stop"):
            texts = {name: "y " * 50_000}
            status, error = running.refused(CHAT, {**body, "messages": body["messages"] * 10, "role_mapping": texts})
            assert (status, error["code"]) == (400, "context_length_exceeded")
        assert running.metrics()["tiny_qmoe_peak_memory_bytes"] - before < 50_000_000
        assert running.get(CHAT, body)["usage"]["prompt_tokens"] == len("USER: x") * 4


class Letters:
    """A tokenizer with a token for each letter but one, and a token of ten spaces; it notes how much it was given."""

    def __init__(self):
        self.given = []

    def get_vocab(self):
        return {"a": 0, " " * 10: 1}

    def encode(self, text, add_special_tokens=True):
        self.given.append(len(text))
        return list(text.replace(" " * 10, "_"))

    def apply_chat_template(self, messages, tools=None, tokenize=True):
        text = "".join(m["content"] for m in messages)
        return self.encode(text) if tokenize else text


@pytest.mark.parametrize(
    "text, fits", [("a" * 1000, True), ("a" * 50_000, False), (" " * 50_000, True), (" " * 50_020, False)]
)
def test_a_text_becomes_tokens_in_pieces_while_it_may_be_too_long(monkeypatch, text, fits):
    monkeypatch.setattr(tokenizer, "PIECE", 5000)
    own = Letters()
    measured = prompt.Measured(own, 5000)
    with nullcontext() if fits else pytest.raises(Refused, match="context of 5000 tokens"):
        assert measured.encode(text) == measured.apply_chat_template([{"content": text}]) == own.encode(text)
    assert fits or max(own.given, default=0) <= 5000


# ---- templates that compute


SUMS = {
    "a power": ("(7 ** (3 * 10 ** 7)) % 3", None),
    "a power of a power": ("2 ** (n ** (n ** n))", None),
    "a product in a loop": ("x", None),
    "a text": ("(('a' * 10 ** 6) * n)|length", None),
    "a list": ("([0] * 10 ** 9)|length", None),
    "a list from the left": ("(10 ** 9 * [0])|length", None),
    "a filter's power": ("1.5|round(10 ** 9, 'ceil')", None),
    "small numbers": (
        "2 ** 10 * n, n * 'ab', 1.26|round(1), 2 ** -1, -3 * n",
        "(9216, 'ababababababababab', 1.3, 0.5, -27)",
    ),
}


@pytest.mark.parametrize("what", SUMS)
def test_templates_compute_within_bounds(monkeypatch, alone, what):
    """In the sandbox that transformers makes: one operation on numbers stops every thread until it is done."""
    for owner, name in ((SandboxedEnvironment, "intercepted_binops"), (SandboxedEnvironment, "default_binop_table")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setitem(DEFAULT_FILTERS, "round", DEFAULT_FILTERS["round"])
    chat_template.bound_arithmetic()
    text, result = SUMS[what]
    loop = "{% set ns = namespace(x=9) %}{% for i in range(100) %}{% set ns.x = ns.x * ns.x %}{% endfor %}"
    written = loop if what == "a product in a loop" else "{% set n = 9 %}{{ " + text + " }}"
    how = {"chat_template": written, "tokenize": False}
    if result is None:
        with pytest.raises(OverflowError, match="a template should"):
            alone.tokenizer.apply_chat_template(chat("x"), **how)
    else:
        assert alone.tokenizer.apply_chat_template(chat("x"), **how) == result


def test_a_template_does_not_stop_the_server(served):
    template = "{% if 'go' in messages[0]['content'] %}{{ (7 ** (3 * 10 ** 7)) % 3 }}{% endif %}x"
    with serving(served, "--context", 512, "--chat-template", template) as running:
        status, error = running.refused(CHAT, {"messages": chat("go")})
        assert status == 400 and "a template should compute numbers of at most" in error["message"]
        assert running.get(CHAT, {"messages": chat("stay"), "max_tokens": 2})["usage"]["prompt_tokens"] == 1
        assert running.stop() == 0
