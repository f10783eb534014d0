"""`chat` as a command: in a pipe, with --json, at a terminal; test_conversation.py has what it says."""

import io
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys

import chat_model
import pytest
import tiny_models
from command_fixtures import Here
from commands import environment, finish, linux, process, refusal, start

from tiny_qmoe_mlx import generate_options, native, terminal
from tiny_qmoe_mlx.conversion.run import Settings, convert

pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
LENGTH = 12


@pytest.fixture
def here(capfd) -> Here:
    return Here(capfd)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return chat_model.make(tmp_path_factory.mktemp("chat"))


# ---- the command, where nobody sits at a terminal


@pytest.fixture
def chat(here, converted, monkeypatch):
    """Runs the command here, on lines of standard input."""

    def run(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return here("chat", "--model", converted, "--max-tokens", LENGTH, *options)

    return run


def test_each_line_gives_a_line_of_json(chat, tmp_path):
    file, lines = tmp_path / "chat.json", ["why", "", "/stats", "//how", "/reset", "/help"]
    done = chat(*lines, f"/save {file}", "/nothing", "/exit", "never", options=("--json",))
    found = [json.loads(line) for line in done.out.splitlines()]
    assert done.err == "" and done.status == terminal.FAILED  # for /nothing
    why, stats, how, reset, help, save, wrong = found
    assert why["generation_tokens"] == len(why["tokens"]) == LENGTH and why["finish_reason"] == "length"
    assert why["prompt_tokens"] == len("<user>why;<assistant>") and why["context"] == 1024
    assert why["context_tokens"] == why["prompt_tokens"] + LENGTH
    assert stats == {"command": "/stats", **why}
    assert how["expert_hits"] < 2 * why["expert_hits"] and how["context_tokens"] > why["context_tokens"]
    assert reset == {"command": "/reset"} and "/load FILE" in help["help"]
    assert save == {"command": "/save", "file": str(file), "messages": 0}
    assert wrong["error"].startswith("[chat] /nothing should be one of /stats, ")


def test_a_pipe_gets_answers_and_nothing_else(converted, tmp_path):
    file = tmp_path / "chat.json"
    lines = f"why\n/system be brief\nhow\n/stats\n/save {file}\n"
    line = ("chat", "--model", converted, "--max-tokens", LENGTH)
    child = start(*line, stdin=subprocess.PIPE)
    out, err = child.communicate(lines.encode(), timeout=120)
    messages = json.loads(file.read_text())["messages"]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert (child.returncode, err) == (0, b"")
    text = out.decode()
    assert text.startswith(f"{answers[0]}\n{answers[1]}\n") and len(answers) == 2
    figures = text.removeprefix(f"{answers[0]}\n{answers[1]}\n")
    assert re.fullmatch(
        r"\d+ prompt tokens at [\d.]+/s, first after [\d.]+ s; 12 tokens at [\d.]+/s; experts resident, 100\.0 % hits "
        r"and 0\.0000 GB a token in decode; peak memory \d+ MB of \d+ MB; context \d+ of 1024 tokens\n",
        figures,
    ), figures


def test_a_saved_conversation_goes_on(chat, tmp_path):
    file, again = tmp_path / "chat.json", tmp_path / "again.json"
    options = ("--json", "--system-prompt", "be brief")
    chat("why", f"/save {file}", options=options)
    saved = json.loads(file.read_text())["messages"]
    done = chat(f"/load {file}", f"/save {again}", "how", options=("--json",))
    assert [m["role"] for m in saved] == ["system", "user", "assistant"] and done.status == 0
    assert json.loads(again.read_text())["messages"] == saved
    assert json.loads(done.out.splitlines()[2])["prompt_tokens"] > len("be brief") + LENGTH  # all of it was read
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".partial"] == []


def test_what_is_no_conversation_is_not_loaded_nor_replaced(chat, tmp_path):
    (tmp_path / "text").write_text("mine")
    (tmp_path / "list").write_text("[1]")
    (tmp_path / "role").write_text(json.dumps({"messages": [{"role": "tool", "content": "x"}]}))
    (tmp_path / "full").write_text(json.dumps({"messages": [{"role": "user", "content": "x" * 2000}]}))
    (tmp_path / "no").write_text(json.dumps({"messages": [{"role": "user", "content": "no"}]}))
    (tmp_path / "half").write_text('{"messages": [{"role": "user", "content": "\\ud800"}]}')
    (tmp_path / "deep").write_text('{"messages": ' + "[" * 100_000)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    names = ("text", "list", "role", "full", "no", "half", "deep", "bytes")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    lines = [f"/load {tmp_path / name}" for name in (*names, "nowhere")]
    lines += [f"/save {tmp_path / 'text'}", f"/save {tmp_path}/nowhere/x", "/save", "/load", "/stats"]
    done = chat(*lines, options=("--json",))
    errors = [json.loads(line)["error"] for line in done.out.splitlines()]
    assert len(errors) == len(lines) and done.err == "" and done.status == terminal.FAILED
    assert all(e.startswith("[") and "Traceback" not in e and "\n" not in e for e in errors), errors
    for error, words in zip(
        errors, (*["should be a conversation that /save wrote"] * 3, "is full", "not that"), strict=False
    ):
        assert words in error
    assert errors[-1] == "[chat] /stats needs an answer to tell of; say something first."
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_full_context_is_one_sentence_and_what_to_do(chat):
    done = chat("why", "x" * 30, "/reset", "why", options=("--context", 50))
    assert done.err == (
        "error: [chat] the context of 50 tokens is full; /save FILE keeps the conversation, /reset begins anew, "
        "and a larger --context has room for more\n"
    )
    assert done.status == terminal.FAILED and done.out.count("\n") >= 2
    assert "larger --context" not in chat("x" * 1100, options=("--context", 1024)).err


REFUSED = [
    ("--top-p 2", r"--top-p should lie in 0 to 1, received 2"),
    ("--context 2000", r"--context should lie between 1 and 1024 here, received 2000"),
    ("--context 600 --max-kv-size 64", r"--context should lie between 1 and 576 here, received 600"),
    ("--draft-model x --kv-bits 4", r"--draft-model and --kv-bits exclude each other in a chat"),
    ("--system-prompt no", r"the model's chat template refuses it: .*not that"),
    ("--memory 1MB", r"the smallest that works is"),
    ("--prompt x", r"unrecognized arguments: --prompt x"),
    ("--profile nowhere/x", r"--profile should name a file in a directory that exists"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_a_wrong_option_is_one_sentence(here, converted, line, message):
    assert re.search(message, refusal(here("chat", "--model", converted, *shlex.split(line))))


def test_a_line_without_an_end_is_not_read_whole(chat, here, converted, monkeypatch):
    monkeypatch.setattr(generate_options, "MOST_TEXT", 1000)
    done = chat("x" * 1000 + "y" * 5)
    assert "[chat] a line of standard input should have at most 1000 characters, one has more" in refusal(done)
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 1001))
    said = refusal(here("generate", "--model", converted, "--prompt", "-"))
    assert "[prompt] should have at most 1000 characters, standard input has more" in said


def test_files_that_are_none(chat, tmp_path):
    done = chat("/save /dev/full", f"/save {tmp_path}", "/load a\0b", f"/load {tmp_path / 'x'}")
    assert done.err.count("\n") == 4 and done.err.count("the file of a conversation, it is none") == 2, done.err
    assert "/load should be followed by a file's name" in done.err and "x should be the file of a conv" in done.err


def test_a_model_without_a_chat_template_and_input_that_is_no_text(here, tmp_path, converted, monkeypatch):
    bare = tiny_models.make_checkpoint(tmp_path / "hf", "qwen3_moe")
    out = convert(bare, tmp_path / "bare", Settings(bits=3.0, sequences=8, sequence_tokens=64))
    assert "should have a chat template, it has none" in refusal(here("chat", "--model", out))
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input should be open" in refusal(here("chat", "--model", converted))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), "utf-8"))
    assert "should be UTF-8 text and is not" in refusal(here("chat", "--model", converted))


@linux
def test_an_answer_that_cannot_be_written_ends_it(converted):
    with open("/dev/full", "wb") as full:
        child = start("chat", "--model", converted, "--max-tokens", 3, stdin=subprocess.PIPE, stdout=full)
        done = finish(child, b"why\nhow\n")
    assert "No space left on device" in refusal(done)


def test_help_imports_nothing_heavy():
    done = process("chat", "--help", env=environment(PYTHONPROFILEIMPORTTIME="1"))
    assert done.status == 0 and "/save FILE" in done.out and "Ctrl-D" in done.out
    assert not re.search(r"\b(mlx|mlx_lm|numpy|transformers)\b", re.sub("tiny_qmoe_mlx", "", done.err))


# ---- at a terminal


class Terminal:
    """The command at a terminal of its own."""

    def __init__(self, *argv):
        self._end, inner = pty.openpty()
        command = [sys.executable, "-m", "tiny_qmoe_mlx.chat", *map(str, argv)]
        streams = {"stdin": inner, "stdout": inner, "stderr": inner}
        self.child = subprocess.Popen(command, env=environment(TERM="dumb"), start_new_session=True, **streams)
        os.close(inner)
        self.seen = ""

    def until(self, words):
        """What was printed up to some words."""
        while words not in self.seen:
            self.more()
        before, _, self.seen = self.seen.partition(words)
        return before

    def more(self):
        """Wait for more of its output."""
        if not select.select([self._end], [], [], 10)[0]:
            pytest.fail(f"nothing came after {self.seen}")
        try:
            self.seen += os.read(self._end, 4096).decode(errors="replace")
        except OSError:
            pytest.fail(f"it has gone after {self.seen}")

    def type(self, text):
        os.write(self._end, text.encode())

    def interrupt(self):
        """Ctrl-C; once more where nothing follows, as one between a prompt and readline's wait is seen with the next
        key alone.
        """
        self.child.send_signal(signal.SIGINT)
        if not select.select([self._end], [], [], 3)[0]:
            self.child.send_signal(signal.SIGINT)

    def close(self):
        self.child.kill()
        self.child.wait()
        os.close(self._end)


@pytest.fixture
def at_terminal(converted, interruptible):
    opened = []

    def open_chat(*options):
        opened.append(Terminal("--model", converted, *options))
        opened[-1].until("/help lists the commands, Ctrl-D leaves.")
        opened[-1].until("> ")
        return opened[-1]

    yield open_chat
    for one in opened:
        one.close()


def test_a_person_talks_stops_an_answer_and_leaves(at_terminal, tmp_path):
    window = at_terminal("--max-tokens", 900)
    window.type("why\n")
    window.until("why\r\n")
    window.more()
    window.interrupt()
    window.until("(stopped)")
    window.until("> ")
    window.type(f"/save {tmp_path / 'chat.json'}\n")
    window.until("2 messages written to ")
    window.until("> ")
    assert 0 < len(json.loads((tmp_path / "chat.json").read_text())["messages"][1]["content"]) < 900
    window.interrupt()
    window.until("Ctrl-C again, or Ctrl-D, leaves.")
    window.type("/system be brief\n")
    window.until("system message set")
    window.until("> ")
    window.type("/nothing\n")
    window.until("error: [chat] /nothing should be one of")
    window.until("> ")
    window.type("\x04")
    assert window.child.wait(60) == 0


def test_a_second_interrupt_leaves(at_terminal):
    window = at_terminal("--max-tokens", 5)
    window.type("why\n")
    window.until("(cut at --max-tokens 5; say `go on`, or start with more)")
    window.until("> ")
    window.interrupt()
    window.until("leaves.")
    window.until("> ")
    window.interrupt()
    assert window.child.wait(60) == 0
    assert "Traceback" not in window.seen


def test_the_context_ends_within_an_answer(at_terminal):
    window = at_terminal("--context", 40)
    window.type("why\n")
    window.until("(the context of 40 tokens is full; /save FILE keeps the conversation, /reset begins anew, and a")
