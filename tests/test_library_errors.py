"""What libraries raise over a model's files: one sentence, and nothing of Rust's own report on stderr."""

import json
import os
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
from abuse import hostile_cases
from container_files import one_sentence

from tiny_qmoe_mlx import chat_template, generate_options, library_errors, terminal
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.original import checkpoint
from tiny_qmoe_mlx.serving import generation, handler


class PanicException(BaseException):
    """As pyo3 names what a library in Rust raises."""


def panic(*args, **how):
    raise PanicException("no entry found\nfor key")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("hf")
    tiny_models.write_tokenizer(made)
    return made


@pytest.fixture(autouse=True)
def command(monkeypatch):
    """The process is a command's."""
    monkeypatch.setattr(library_errors, "_ours", [True])


@pytest.fixture
def tokenizer(directory):
    return checkpoint.open_tokenizer(directory, {})


# ---- tokenizers


@pytest.mark.parametrize("what", hostile_cases.PANICS)
def test_a_tokenizer_that_panics_is_refused_when_it_is_opened(directory, tmp_path, capfd, what):
    """With special tokens too; Rust's report of the panic, its trace and all, does not reach a person."""
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    hostile_cases.edit("tokenizer.json", **hostile_cases.PANICS[what])(tmp_path)
    with pytest.raises(
        FormatError, match="should hold a tokenizer that transformers can load, .*PanicException"
    ) as error:
        checkpoint.open_tokenizer(tmp_path, {})
    one_sentence(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_sound_tokenizer_says_what_it_said(tokenizer):
    ids = tokenizer.encode("hello\nthere", add_special_tokens=False)
    assert ids == tokenizer._tokenizer.encode("hello\nthere", add_special_tokens=False)
    assert tokenizer.decode(ids) == "hello\nthere"
    parts, detokenizer = [], tokenizer.detokenizer
    for token in ids:
        detokenizer.add_token(token)
        parts.append(detokenizer.last_segment)
    detokenizer.finalize()
    assert "".join(parts) + detokenizer.last_segment == detokenizer.text == "hello\nthere"
    assert detokenizer.tokens == ids


@pytest.mark.parametrize("call", ["encode", "decode", "apply_chat_template"])
def test_a_panic_with_one_text_is_one_sentence(tokenizer, monkeypatch, call):
    monkeypatch.setattr(tokenizer._tokenizer, call, panic)
    with pytest.raises(FormatError, match=r"^\[tokenizer\] .*: PanicException no entry found for key; \w.*\.$"):
        getattr(tokenizer, call)([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("call", ["add_token", "finalize"])
def test_a_vocabulary_with_holes(tokenizer, monkeypatch, call):
    detokenizer = tokenizer.detokenizer
    detokenizer._own = SimpleNamespace(add_token=lambda token: "a" + None, finalize=lambda: "a" + None)
    with pytest.raises(FormatError, match=r"\[tokenizer\] .* should have a text for every token, .*: TypeError"):
        getattr(detokenizer, call)(*[5][: call == "add_token"])


def test_names_of_our_own_in_the_templates_options(tokenizer):
    """`render` has parameters of its own, and transformers gives the template `messages`."""
    tokenizer.has_chat_template, tokenizer.chat_template = True, "{{ messages[0].content }}"
    with pytest.raises(ValueError, match=r"\[prompt\] the model's chat template refuses it"):
        chat_template.render(tokenizer, [{"role": "user", "content": "x"}], "", messages=1)
    assert chat_template.render(
        tokenizer, [{"role": "user", "content": "x"}], "", tokenize=False, tokenizer=1, advice=""
    )
    with pytest.raises(ValueError, match="a JSON object without conversation, messages"):
        generate_options.parse(["--model", "x", "--prompt", "x", "--chat-template-config", '{"messages": 1}'])


# ---- stderr


def test_what_others_write_meanwhile_is_kept_unless_there_is_a_panic(capfd):
    with library_errors.quiet_panics():
        os.write(2, b"first\n")
    with pytest.raises(PanicException), library_errors.quiet_panics():
        os.write(2, b"thread panicked\n")
        panic()
    with pytest.raises(KeyError), library_errors.quiet_panics():
        os.write(2, b"second\n")
        raise KeyError
    os.write(2, b"third\n")
    assert capfd.readouterr().err == "first\nsecond\nthird\n"


def test_two_threads_leave_stderr_as_it_was(capfd):
    def hold(number: int) -> None:
        for _ in range(20):
            with library_errors.quiet_panics():
                os.write(2, f"{number}\n".encode())

    threads = [threading.Thread(target=hold, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(2, b"end\n")
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == "end" and sorted(lines[:-1]) == sorted(str(number) for number in range(4) for _ in range(20))


def test_a_program_that_imports_the_package_keeps_its_stderr(monkeypatch):
    monkeypatch.setattr(library_errors, "_ours", [])
    before = os.fstat(2).st_ino
    with library_errors.quiet_panics():
        assert os.fstat(2).st_ino == before


def test_no_disk_to_hold_it_on(capfd, monkeypatch):
    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with library_errors.quiet_panics():
        os.write(2, b"said\n")
    assert capfd.readouterr().err == "said\n"


def test_warnings_of_transformers_are_ours_to_say(directory, tmp_path, capfd, caplog):
    """They quote a model's files; afterwards they are as loud as before."""
    from transformers.utils import logging

    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "a" * 100_000}))
    before = logging.get_verbosity()
    checkpoint.open_tokenizer(tmp_path, {})
    assert capfd.readouterr().err == "" and not caplog.records and logging.get_verbosity() == before


def test_control_characters_of_a_stranger_are_not_printed(capsys):
    def fail(argv):
        raise ValueError("[prompt] \x1b]0;pwned\x07 \u202e \x9b2J\nagain; caf\u00e9 is \u4e2d\u6587")

    assert terminal.run(fail, []) == 1
    assert capsys.readouterr().err == "error: [prompt] ?]0;pwned? ? ?2J again; caf\u00e9 is \u4e2d\u6587\n"


# ---- a forward pass


@pytest.mark.parametrize("error", [TypeError("rope()"), KeyError("x"), ZeroDivisionError("x"), PanicException("x")])
def test_a_config_that_trips_mlx_lm(error):
    with pytest.raises(
        FormatError, match=rf"\[model\] qwen should have a config .*: {type(error).__name__} "
    ) as caught:
        with library_errors.computing("qwen"):
            raise error
    one_sentence(caught.value)


@pytest.mark.parametrize("error", [ValueError, OSError, MemoryError, RuntimeError, StopIteration, KeyboardInterrupt])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(error) as caught, library_errors.computing("qwen"):
        raise error("said")
    assert type(caught.value) is error


# ---- the server


def test_a_panic_in_the_generation_thread_does_not_end_it():
    own = generation.Generation.__new__(generation.Generation)
    told: list = []
    own._active, own._changed, own._stop = [SimpleNamespace(put=told.append)], threading.Condition(), False

    def generate() -> None:
        own._stop = True
        panic()

    own._generate = generate
    own._run_generate()
    assert [type(error) for error in told] == [FormatError]


def test_a_panic_in_a_request_is_answered(monkeypatch):
    own, refused = handler.Handler.__new__(handler.Handler), []
    own.path, own.command, own.headers, own.request_version = "/v1/completions", "POST", {}, "HTTP/1.1"
    own._received = SimpleNamespace(ended=False, allow=lambda *limits: None)
    monkeypatch.setattr(handler.wire, "check_head", lambda *head: None)
    monkeypatch.setattr(handler.wire, "body_length", lambda *head: 0)
    own._check_caller = own._check_method = lambda: None
    own._refuse = refused.append
    own._guard(panic)
    assert [(error.status, error.code) for error in refused] == [(500, "internal_error")]
