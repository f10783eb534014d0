"""generate's options of streaming, as a person gives them: what they write, and what they refuse."""

import json
import signal

import pytest
from commands import INTERRUPTED, finish, generate, linux, names, refusal, start

import tiny_qmoe_mlx
from tiny_qmoe_mlx import models, native, runtime
from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.plan import plan
from tiny_qmoe_mlx.streaming.profile import load_profile
from tiny_qmoe_mlx.streaming.trace import read_trace

pytest_plugins = ["command_fixtures"]
pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")


def test_profile_and_trace_are_written_and_the_next_run_begins_warm(here, converted, tmp_path):
    least = plan(converted)["min_budget_bytes"] + 20_000
    files = ("--profile", tmp_path / "use.json", "--trace", tmp_path / "run.trace", "--memory", least)
    for _ in range(3):  # other tests may make memory short for a moment, and pools smaller
        (tmp_path / "use.json").unlink(missing_ok=True)
        first, second = (generate(here, converted, *files, "--lookahead", "off") for _ in range(2))
        if second["expert_misses"] < first["expert_misses"]:
            break
    assert first["tokens"] == second["tokens"] and first["mode"] == "streamed"
    opened, trace = open_model(converted), read_trace(tmp_path / "run.trace")
    assert [len(use) for use in load_profile(tmp_path / "use.json", opened)] == trace.experts
    assert trace.tokens(cold=False) >= second["generation_tokens"] - 1
    assert second["expert_misses"] < first["expert_misses"]


CASES = (
    "readers",
    "checks",
    "lookahead",
    "trace in no directory",
    "profile is a directory",
    "another model's",
    "no profile",
    pytest.param("trace cannot be written", marks=linux),  # /dev/full
)


def bad(tmp_path):
    """Options, and what of the sentence must be there."""
    (tmp_path / "other.json").write_text(json.dumps({"tiny_qmoe_profile": 1, "model": {"model": "another"}}))
    (tmp_path / "words.json").write_text("no profile")
    return {
        "readers": (("--readers", 0), "readers should lie in 1 to 64, received 0"),
        "checks": (("--checks", "often"), "--checks: invalid choice: 'often'"),
        "lookahead": (("--lookahead", "maybe"), "--lookahead: invalid choice: 'maybe'"),
        "trace in no directory": (("--trace", tmp_path / "none/t"), "--trace should name a file in a directory"),
        "profile is a directory": (("--profile", tmp_path), "--profile should name a file in a directory"),
        "another model's": (("--profile", tmp_path / "other.json"), "it is one of another model (another); remove it"),
        "no profile": (("--profile", tmp_path / "words.json"), "should be a usage profile and is no JSON"),
        "trace cannot be written": (("--trace", "/dev/full"), "the disk is full, the trace ends early"),
    }


@pytest.mark.parametrize("case", CASES)
def test_bad_options_are_refused_with_a_sentence(here, converted, tmp_path, case):
    options, sentence = bad(tmp_path)[case]
    before = names(tmp_path)
    done = here("generate", "--model", converted, "--prompt", "x", "--max-tokens", 400, "--json", *options)
    assert sentence in refusal(done)
    assert names(tmp_path) == before


def test_ctrl_c_keeps_the_profile(converted, tmp_path, interruptible):
    options = ("--prompt", "x", "--max-tokens", 1000, "--profile", tmp_path / "use.json")
    child = start("generate", "--model", converted, *options)
    assert child.stdout.read(20)
    child.send_signal(signal.SIGINT)
    done = finish(child)
    assert done.status in INTERRUPTED and "Traceback" not in done.err, done
    assert sum(use.sum() for use in load_profile(tmp_path / "use.json", open_model(converted))) > 0


def test_a_profile_is_written_where_it_was_named(converted, tmp_path, monkeypatch):
    """Whatever the current directory is when the model is closed."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    loaded, tokenizer = models.load(converted, streaming=runtime.Streaming(profile="use.json"))
    with loaded:
        tiny_qmoe_mlx.generate(loaded, tokenizer, "hello", max_tokens=2)
        monkeypatch.chdir("elsewhere")
    assert (tmp_path / "use.json").is_file() and not (tmp_path / "elsewhere" / "use.json").exists()
