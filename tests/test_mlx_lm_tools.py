"""mlx-lm's own tools, unpatched, on a converted directory: same tokens as our generate."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from commands import FILES, environment, finish, refusal
from container_files import edit_manifest, entry_of
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache

import tiny_qmoe_mlx
from tiny_qmoe_mlx import budget, container, model_file
from tiny_qmoe_mlx.errors import BudgetError, FormatError

pytest_plugins = ["command_fixtures"]


@pytest.fixture
def model(converted, tmp_path) -> Path:
    """A copy to damage; here, as other modules' plugins have a fixture of the same name."""
    return Path(shutil.copytree(converted, tmp_path / "model"))


PROMPTS = ("the river stone", "old quick bright over")
TOKENS = 12
GREEDY = ("--trust-remote-code", "--temp", "0", "--max-tokens", TOKENS)


def tool(name: str, *argv: object, data: bytes | None = None, **env: str):
    """Run `python -m mlx_lm <name>`."""
    command = [sys.executable, "-m", "mlx_lm", name, *map(str, argv)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return finish(subprocess.Popen(command, env=environment(**env), **pipes), data or b"")


def least(directory: Path) -> str:
    """The smallest budget of a model, in bytes: experts are streamed."""
    return str(budget.split(container.open_model(directory), sys.maxsize, cpu=True).min_budget_bytes)


@pytest.fixture(scope="module")
def texts(converted) -> list[str]:
    """What our generate writes after each prompt."""
    model, tokenizer = tiny_qmoe_mlx.load(converted)
    with model:
        return [tiny_qmoe_mlx.generate(model, tokenizer, p, max_tokens=TOKENS) for p in PROMPTS]


@pytest.fixture(scope="module")
def opened(converted):
    """The directory as `mlx_lm.load` opens it."""
    return mlx_lm.load(str(converted), trust_remote_code=True)


def test_the_file_is_one_text_that_the_format_prints(converted):
    text = (converted / "tiny_qmoe_model.py").read_text()
    printed = (Path(__file__).parents[1] / "docs" / "FORMAT.md").read_text()
    assert text.replace("\n\n", "\n") in re.sub("^    ", "", printed, flags=re.M).replace("\n\n", "\n")
    assert json.loads((converted / "config.json").read_text())["model_file"] == "tiny_qmoe_model.py"
    assert "tiny_qmoe_model.py" in FILES


def test_generate_as_a_command(converted, texts):
    for prompt, text in zip(PROMPTS, texts, strict=True):
        done = tool("generate", "--model", converted, "--prompt", prompt, *GREEDY, "--verbose", "False")
        assert (done.status, done.out) == (0, text + "\n"), done


def test_generate_asks_for_trust(converted):
    done = tool("generate", "--model", converted, "--prompt", "x")
    assert done.status != 0 and "trust_remote_code=True" in done.err


def test_streamed_under_the_budget_of_the_environment(converted, texts, monkeypatch):
    monkeypatch.setenv("TINY_QMOE_MEMORY", least(converted))
    model, tokenizer = mlx_lm.load(str(converted), trust_remote_code=True)
    assert mlx_lm.generate(model, tokenizer, PROMPTS[0], max_tokens=TOKENS) == texts[0]
    stats = model.tiny_qmoe.stats()
    assert (stats["mode"], stats["budget_bytes"]) == ("streamed", int(least(converted)))
    assert stats["expert_misses"] > 0
    model.close()


def test_the_model_is_the_one_that_ours_loads(converted, opened):
    ours, tokenizer = tiny_qmoe_mlx.load(converted)
    inputs = mx.array([tokenizer.encode(PROMPTS[0])])
    with ours:
        assert mx.array_equal(ours(inputs), opened[0](inputs))
    assert opened[0].tiny_qmoe.stats()["mode"] == "resident"


@pytest.mark.parametrize("memory", ["lots", "1KB", "-3"])
def test_a_bad_budget_is_one_sentence_about_the_variable(converted, monkeypatch, memory):
    monkeypatch.setenv("TINY_QMOE_MEMORY", memory)
    with pytest.raises(BudgetError, match=r"^\[TINY_QMOE_MEMORY\] ") as error:
        mlx_lm.load(str(converted), trust_remote_code=True)
    assert "\n" not in str(error.value)


def test_batch_generate(opened, texts):
    model, tokenizer = opened
    asked = [tokenizer.encode(p) for p in PROMPTS]
    assert len({len(p) for p in asked}) == 2, "one prompt is padded"
    assert mlx_lm.batch_generate(model, tokenizer, asked, max_tokens=TOKENS).texts == texts


@pytest.mark.slow
def test_a_prompt_cache_of_one_command_serves_another(converted, texts, tmp_path):
    file = tmp_path / "prompt.safetensors"
    head, tail = PROMPTS[0][:9], PROMPTS[0][9:]
    done = tool("cache_prompt", "--model", converted, "--prompt", head, "--prompt-cache-file", file, GREEDY[0])
    assert done.status == 0, done
    assert load_prompt_cache(str(file))[0].offset == len(head)
    done = tool("generate", "--prompt-cache-file", file, "--prompt", tail, *GREEDY, "--verbose", "False")
    assert (done.status, done.out) == (0, texts[0] + "\n"), done


@pytest.mark.slow
def test_speculative_decoding_with_the_original_as_draft(converted, checkpoint, texts):
    options = ("--draft-model", checkpoint, "--num-draft-tokens", 3, "--verbose", "False")
    done = tool("generate", "--model", converted, "--prompt", PROMPTS[0], *GREEDY, *options)
    assert (done.status, done.out) == (0, texts[0] + "\n"), done


def test_a_draft_proposes_tokens_that_are_accepted(opened, checkpoint, texts):
    model, tokenizer = opened
    draft, _ = mlx_lm.load(str(checkpoint))
    found = list(mlx_lm.stream_generate(model, tokenizer, PROMPTS[0], max_tokens=TOKENS, draft_model=draft))
    assert "".join(f.text for f in found) == texts[0]
    assert any(f.from_draft for f in found)


@pytest.mark.slow
def test_chat_keeps_its_history(model, tmp_path):
    """Two turns as one command; the model sees the first when it answers the second."""
    path = model / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    edit_manifest(model, lambda m: m["files"].update({path.name: entry_of(path)}))
    done = tool("chat", "--model", model, *GREEDY, data="\n".join([*PROMPTS, "q", ""]).encode())
    assert done.status == 0, done
    ours, tokenizer = tiny_qmoe_mlx.load(model)
    with ours:
        cache = make_prompt_cache(ours)
        for prompt in PROMPTS:
            # the reply stands in the cache, without its last token; chat sends each turn's own message alone
            turn = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
            options = {"max_tokens": TOKENS, "prompt_cache": cache}
            reply = "".join(f.text for f in mlx_lm.stream_generate(ours, tokenizer, turn, **options))
            assert reply in done.out, (reply, done.out)


@pytest.fixture
def server(converted):
    """The address of mlx_lm.server, started on a free port with experts streamed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--model", str(converted), "--port", str(port), "--trust-remote-code")
    child = subprocess.Popen(
        [sys.executable, "-m", "mlx_lm", "server", *options],
        env=environment(TINY_QMOE_MEMORY=least(converted)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}/v1"
    try:
        wait_for(f"{address}/models", child)
        yield address
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


def wait_for(address: str, child: subprocess.Popen) -> None:
    for _ in range(600):
        assert child.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(address, timeout=60).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("no answer")


@pytest.mark.slow
def test_server_answers_plain_requests(server, texts):
    for prompt, text in zip(PROMPTS, texts, strict=True):
        body = json.dumps({"prompt": prompt, "max_tokens": TOKENS, "temperature": 0}).encode()
        request = urllib.request.Request(f"{server}/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["choices"][0]["text"] == text


QUESTIONS = [("the river", [" stone", " x"]), ("old quick", [" bright over", " tree"]), ("wind", [" rain", " of and"])]


def likelihood(model, tokenizer, question: str, choice: str) -> float:
    """Log probability of a choice's bytes after the question, token by token."""
    head, tokens = tokenizer.encode(question), tokenizer.encode(question + choice)
    logits = np.array(model(mx.array([tokens]))[0].astype(mx.float32), np.float64)
    steps = (
        logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1)[:, None]
    )
    return sum(steps[i - 1, tokens[i]] for i in range(len(head), len(tokens)))


@pytest.mark.slow
def test_evaluate_on_a_task_of_our_own(converted, tmp_path):
    """lm_eval's multiple choice through mlx-lm's class; the targets are what our model finds likelier, but for one."""
    harness = pytest.importorskip("lm_eval", reason="mlx_lm.evaluate needs lm-eval")
    from mlx_lm.evaluate import MLXLM

    model, tokenizer = tiny_qmoe_mlx.load(converted)
    with model:
        scores = [[likelihood(model, tokenizer, q, c) for c in choices] for q, choices in QUESTIONS]
    best = [int(np.argmax(s)) for s in scores]
    best[0] = 1 - best[0]
    rows = [{"q": q, "choices": c, "best": b} for (q, c), b in zip(QUESTIONS, best, strict=True)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "task.jsonl")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "best",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    found = harness.simple_evaluate(MLXLM(str(converted), trust_remote_code=True), tasks=[task], bootstrap_iters=0)
    assert found["results"]["local"]["acc,none"] == pytest.approx(2 / 3)
    answered = {s["doc_id"]: [r[0] for r in s["filtered_resps"]] for s in found["samples"]["local"]}
    np.testing.assert_allclose([answered[i] for i in range(len(rows))], scores, rtol=1e-4)


# ---- what may stand in the file


def change(directory: Path, name: str, text: bytes, **config: object) -> None:
    """Write a file and change config.json, and make the manifest agree: only our own check can refuse."""
    (directory / name).write_bytes(text)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    edit_manifest(directory, lambda m: m["files"].update({n: entry_of(directory / n) for n in (name, path.name)}))


EVIL = b"from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
OTHERS = {
    "another text": ("tiny_qmoe_model.py", EVIL, {}),
    "a line more": ("tiny_qmoe_model.py", model_file.TEXT + EVIL, {}),
    "a byte less": ("tiny_qmoe_model.py", model_file.TEXT[:-1], {}),
    "our text under another name": ("model.py", model_file.TEXT, {"model_file": "model.py"}),
    "a path": ("evil.py", EVIL, {"model_file": "../model/evil.py"}),
    "a number": ("evil.py", EVIL, {"model_file": 7}),
    "a text that config.json does not name": ("tiny_qmoe_model.py", EVIL, {"model_file": None}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_code_is_refused_by_every_command_and_never_run(model, here, what):
    name, text, config = OTHERS[what]
    change(model, name, text, **config)
    for command in (("generate", "--prompt", "x"), ("plan", "--no-probe")):
        sentence = refusal(here(command[0], "--model", model, *command[1:]))
        assert re.search(r"model_file should be|should be the file that convert writes", sentence), sentence
    found = json.loads(here("verify", "--model", model, "--json").out)
    assert [p["file"] for p in found["problems"]] == [
        "config.json" if "model_file" in config and config["model_file"] else name
    ]
    with pytest.raises(FormatError):
        container.open_model(model)
    assert not (model / "ran").exists()


def test_a_file_that_the_manifest_does_not_list(model):
    edit_manifest(model, lambda m: m["files"].pop("tiny_qmoe_model.py"))
    (model / "tiny_qmoe_model.py").write_bytes(EVIL)
    with pytest.raises(FormatError, match="model_file should be tiny_qmoe_model.py, listed by the manifest"):
        container.open_model(model)


def test_a_directory_of_before_keeps_loading(model, texts):
    path = model / "config.json"
    config = json.loads(path.read_text())
    del config["model_file"]
    path.write_text(json.dumps(config))
    (model / "tiny_qmoe_model.py").unlink()
    edit_manifest(
        model, lambda m: (m["files"].pop("tiny_qmoe_model.py"), m["files"].update({path.name: entry_of(path)}))
    )
    ours, tokenizer = tiny_qmoe_mlx.load(model)
    with ours:
        assert tiny_qmoe_mlx.generate(ours, tokenizer, PROMPTS[0], max_tokens=TOKENS) == texts[0]
