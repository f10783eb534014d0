"""The commands as they should work: help, what they print, the figures of a run; and that budgets change no token."""

import json
import math
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from commands import SMALL, environment, finish, generate, linux, process, refusal, start
from mlx_lm.utils import load_model
from records import random_record, record_size
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from tiny_qmoe_mlx import container, container_writer, native
from tiny_qmoe_mlx.codecs import trellis

pytest_plugins = ["command_fixtures"]
pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
COMMANDS = ("chat", "convert", "evaluate", "generate", "plan", "verify")
# of DESIGN.md, section 8
STATS = (
    "prompt_tokens prompt_tps ttft_s generation_tokens generation_tps tokens text budget_bytes resident_bytes "
    "pool_bytes peak_memory_bytes expert_hits expert_misses bytes_read bytes_per_token lookahead_reads io_wait_s mode"
).split()
PLAN = "path bits file_bytes min_budget_bytes resident_budget_bytes budget_bytes fits mode".split()


@pytest.fixture
def planned(converted, here) -> dict:
    return json.loads(here("plan", "--model", converted, "--json", "--no-probe").out)


# ---- help and JSON


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_option_and_examples_that_parse(here, command):
    shown = here(command, "--help")
    assert shown.status == 0 and shown.err == ""
    examples = shown.out.split("examples:\n")[1].strip().splitlines()
    assert len(examples) >= 2
    options = set(re.findall(r"(--[a-z-]+)", shown.out.split("options:")[1].split("examples:")[0]))
    for example in examples:
        words = shlex.split(example)
        start = words.index("-m")
        assert words[start + 1] == f"tiny_qmoe_mlx.{command}"
        assert {w for w in words[start + 2 :] if w.startswith("--")} <= options


HELP = """
import runpy, sys
sys.argv[1:] = ["--help"]
try:
    runpy.run_module("tiny_qmoe_mlx.generate", run_name="__main__")
except SystemExit:
    sys.exit(any(name in sys.modules for name in ("mlx.core", "mlx_lm", "transformers")))
"""


def test_help_does_not_load_mlx():
    command = [sys.executable, "-W", "ignore", "-c", HELP]
    assert subprocess.run(command, env=environment(), stdout=subprocess.DEVNULL).returncode == 0


def test_json_is_all_that_is_printed(converted, checkpoint, text, tmp_path, here):
    out = tmp_path / "out"
    for line, keys in (
        (
            ("convert", "--hf-path", checkpoint, "--mlx-path", out, "--calibration", text, *SMALL),
            {"path", "bits", "file_bytes"},
        ),
        (("generate", "--model", converted, "--prompt", "x", "--max-tokens", 5), set(STATS)),
        (("plan", "--model", converted), set(PLAN)),
        (
            ("evaluate", "--model", converted, "--text", text, "--tokens", 100),
            {"tokens", "nll", "perplexity", "bits_per_byte"},
        ),
        (("verify", "--model", converted), {"ok", "problems", "files", "bytes"}),
    ):
        done = here(*line, "--json")
        assert done.status == 0 and done.err == "" and done.out.count("\n") == 1, done
        assert keys <= set(json.loads(done.out)), line


def test_json_in_a_process_of_its_own(converted):
    """The streams are the real ones here, so that a library's word on either would be seen."""
    done = process("generate", "--model", converted, "--prompt", "x", "--max-tokens", 5, "--json")
    assert done.status == 0 and done.err == "", done
    assert json.loads(done.out)


# ---- what generate reports


@pytest.mark.parametrize("share", [0, 0.5, 1], ids=["fewest", "half", "all"])
def test_stats_have_every_key_and_add_up(converted, planned, tmp_path, here, share):
    low, high = planned["min_budget_bytes"], planned["resident_budget_bytes"]
    budget = int(low + share * (high - low))
    done = here(
        "generate",
        "--model",
        converted,
        "--prompt",
        "hello there",
        "--max-tokens",
        40,
        "--memory",
        budget,
        "--lookahead",
        "off",
        "--stats",
        tmp_path / "s.json",
    )
    stats = json.loads((tmp_path / "s.json").read_text())
    assert done.status == 0 and set(STATS) <= set(stats)
    spec = container.open_model(converted).spec
    records = [layer.record_bytes for layer in spec.layers]
    experts = sum(layer.experts for layer in spec.layers)
    assert min(records) <= stats["bytes_read"] / stats["records_read"] <= max(records)
    assert stats["bytes_per_token"] == stats["bytes_read"] / stats["generation_tokens"]
    assert stats["generation_tokens"] == len(stats["tokens"]) <= 40 and stats["prompt_tokens"] == 11  # bytes
    assert done.out == stats["text"] + "\n"
    assert stats["budget_bytes"] == budget
    assert stats["pool_bytes"] + planned["weight_bytes"] <= stats["resident_bytes"] <= budget
    assert stats["lookahead_reads"] == 0 and stats["ttft_s"] > 0 and 0 <= stats["io_wait_s"] < 60
    if share == 1:
        assert (stats["mode"], stats["records_read"], stats["expert_misses"]) == ("resident", experts, 0)
        assert stats["pool_bytes"] >= sum(layer.experts * layer.record_bytes for layer in spec.layers)
        assert stats["bytes_read"] == sum(layer.experts * layer.record_bytes for layer in spec.layers)
    else:
        assert stats["mode"] == "streamed" and stats["records_read"] == stats["expert_misses"] > 0
    # the prompt's last token and every one of the reply but the last pass both layers with 4 experts each (mlx-lm may
    # be a step ahead); the rest of the prompt asks for an expert at most once a layer
    asked, steps = stats["expert_hits"] + stats["expert_misses"], len(stats["tokens"])
    assert 2 * 4 * steps < asked <= 2 * 4 * (steps + 1) + 2 * 8
    for figure in (
        f"{stats['prompt_tokens']} prompt tokens",
        f"{stats['generation_tokens']} tokens",
        f"experts {stats['mode']}",
    ):
        assert figure in done.err and done.err.count("\n") == 1


def test_the_budget_changes_no_token(converted, planned, here):
    low, high = planned["min_budget_bytes"], planned["resident_budget_bytes"]
    for options in ((), ("--temp", 1, "--top-p", 0.9, "--seed", 7, "--repetition-penalty", 1.2)):
        runs = [generate(here, converted, "--memory", budget, *options) for budget in (low, (low + high) // 2, high)]
        assert runs[0]["tokens"] == runs[1]["tokens"] == runs[2]["tokens"] and len(runs[0]["tokens"]) > 10


def test_the_seed_decides(converted, here):
    runs = [generate(here, converted, "--temp", 1, "--seed", seed)["tokens"] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_a_prompt_from_standard_input(converted, here):
    line = ("generate", "--model", converted, "--prompt", "-", "--max-tokens", 40, "--json")
    done = finish(start(*line, stdin=subprocess.PIPE), b"hello there\n")
    assert done.status == 0 and done.err == ""
    assert json.loads(done.out)["tokens"] == generate(here, converted, prompt="hello there\n")["tokens"]


@pytest.mark.parametrize(("data", "message"), [(b" \n", "it is empty"), (b"abc\xff\xfe", "should be UTF-8 text")])
def test_a_standard_input_that_is_no_prompt(converted, data, message):
    child = start("generate", "--model", converted, "--prompt", "-", stdin=subprocess.PIPE)
    assert message in refusal(finish(child, data))


def test_a_prompt_that_is_no_text(converted, here):
    for line in (("--prompt", "abc\udcff"), ("--prompt", "abc", "--system-prompt", "\udcff")):
        assert "[prompt] should be UTF-8 text" in refusal(here("generate", "--model", converted, *line))


# ---- budgets


def test_the_planned_minimum_works_and_one_byte_less_does_not(converted, here):
    for context in (64, 1024):
        line = ("--model", converted, "--context", context)
        found = json.loads(here("plan", *line, "--json", "--no-probe").out)
        low, high = found["min_budget_bytes"], found["resident_budget_bytes"]
        run = ("generate", *line, "--prompt", "x", "--max-tokens", 3, "--json", "--memory")
        for budget, mode in ((low, "streamed"), (high - 1, "streamed"), (high, "resident")):
            assert json.loads(here(*run, budget).out)["mode"] == mode
            asked = json.loads(here("plan", *line, "--memory", budget, "--json", "--no-probe").out)
            assert (asked["fits"], asked["mode"], asked["budget_bytes"]) == (True, mode, budget)
        assert "too small" in refusal(here(*run, low - 1))
        asked = json.loads(here("plan", *line, "--memory", low - 1, "--json", "--no-probe").out)
        assert (asked["fits"], asked["mode"], asked["min_budget_bytes"]) == (False, None, low)
        shown = here("plan", *line, "--memory", low - 1)
        assert shown.status == 0 and "does not fit" in shown.out


def test_plan_counts_the_files_of_the_directory(converted, planned):
    sizes = {p.name: p.stat().st_size for p in converted.iterdir()}
    del sizes["tiny_qmoe_manifest.json"]
    assert planned["file_bytes"] == sum(sizes.values())
    experts = sum(n for name, n in sizes.items() if "experts" in name)
    assert planned["expert_file_bytes"] == experts and planned["experts"] == 16 and planned["expert_layers"] == 2
    assert planned["bits"] == pytest.approx(8 * experts / (16 * 3 * 64 * 64), abs=1e-4)
    parts = sum(planned[f"{part}_bytes"] for part in ("runtime", "weight", "kv", "scratch"))
    records = [layer.record_bytes for layer in container.open_model(converted).spec.layers]
    assert planned["min_budget_bytes"] == parts + 4 * sum(set(records))  # a pool for each size
    assert planned["resident_budget_bytes"] == parts + 8 * sum(records)


@pytest.fixture(scope="session")
def wide(tmp_path_factory) -> Path:
    """A Qwen3-MoE with 80 MB of experts, all noise: large enough that the pool shows in the memory of a process."""
    root = tmp_path_factory.mktemp("wide")
    size, layers, experts = 512, 6, 64
    overrides = {
        "hidden_size": size,
        "moe_intermediate_size": size,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "mlp_only_layers": [],
    }
    config = {**tiny_models.BASE, "model_type": "qwen3_moe", **tiny_models.FAMILIES["qwen3_moe"], **overrides}
    hf = tiny_models.make_checkpoint(root / "hf", "qwen3_moe", **{**overrides, "num_experts": 4})
    rest = {name: w for name, w in load_file(hf / "model.safetensors").items() if "switch_mlp" not in name}
    rng = np.random.default_rng(0)
    for name in [n for n in rest if n.endswith("mlp.gate.weight")]:
        rest[name] = rng.normal(0, 0.05, (experts, size)).astype(rest[name].dtype)
    record = random_record(rng, [(size, size)] * 3, rates=[4] * (size // 64))
    for matrix in record.matrices:  # noise of a trained layer's size: else the activations grow without end
        matrix.block_gain[:], matrix.row_gain[:] = 0.04, 1
    packed = trellis.pack(record, record_size(record))
    specs = [
        container.LayerSpec(
            path=f"model.layers.{i}.mlp.switch_mlp",
            layer=i,
            file=container.expert_file_name(i),
            experts=experts,
            record_bytes=len(packed),
            matrices=tuple((n, size, size) for n in ("gate_proj", "up_proj", "down_proj")),
            bias=False,
        )
        for i in range(layers)
    ]
    with container.staged_directory(root / "model") as staged:
        for layer in specs:
            container_writer.write_experts_file(staged, layer, 128, (packed for _ in range(experts)))
        spec = container.ModelSpec(
            format_version=1,
            codec="trellis",
            bits=round(container.bits_per_weight(specs, 128), 4),
            alignment=128,
            seed=0,
            length=12,
            layers=tuple(specs),
            source={"model": "noise", "revision": None},
            calibration={"source": "none", "tokens": 0},
        )
        container.write_json(staged / "config.json", {**config, "tiny_qmoe": spec.to_dict()})
        save_file(rest, staged / "model.safetensors", {"format": "mlx"})
        tiny_models.write_tokenizer(staged)
        container_writer.write_manifest(staged)
    return root / "model"


def watched_peak(child: subprocess.Popen) -> int:
    """The high-water mark of a process's memory, read as long as it lives."""
    peak = 0
    while child.poll() is None:
        try:
            peak = max(peak, int(Path(f"/proc/{child.pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024)
        except (OSError, IndexError):
            pass
        time.sleep(0.01)
    return peak


@linux
def test_the_process_stays_within_its_budget(wide, tmp_path):
    """As the system counts it, whatever the parent holds: pytest itself is larger than some of these budgets."""
    found = json.loads(process("plan", "--model", wide, "--context", 512, "--json").out)
    low, high = found["min_budget_bytes"], found["resident_budget_bytes"]
    assert high - low > 60e6
    runs = []
    for budget in (low, (low + high) // 2, high):
        line = (
            "--memory",
            budget,
            "--context",
            512,
            "--max-tokens",
            30,
            "--prompt",
            "some words " * 20,
            "--stats",
            tmp_path / "stats.json",
        )
        child = start("generate", "--model", wide, *line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        peak = watched_peak(child)
        assert child.returncode == 0
        stats = json.loads((tmp_path / "stats.json").read_text())
        assert max(peak, stats["peak_memory_bytes"]) <= 1.1 * budget
        assert peak <= 1.1 * stats["peak_memory_bytes"], "the command should report its own peak"
        runs.append((stats, peak))
    assert [s["mode"] for s, _ in runs] == ["streamed", "streamed", "resident"]
    assert runs[0][0]["tokens"] == runs[1][0]["tokens"] == runs[2][0]["tokens"]
    assert runs[2][1] - runs[0][1] > 0.8 * (runs[2][0]["pool_bytes"] - runs[0][0]["pool_bytes"]), "the pool should show"


# ---- evaluate


def test_evaluate_against_itself_and_the_original(converted, checkpoint, text, here):
    run = ("evaluate", "--model", converted, "--text", text, "--window", 100, "--tokens", 300, "--json")
    itself = json.loads(here(*run, "--against", converted).out)
    assert itself["kl_mean"] == itself["kl_median"] == itself["kl_p99"] == 0 and itself["top1"] == 1
    assert itself["against_perplexity"] == itself["perplexity"]
    found = json.loads(here(*run, "--against", checkpoint).out)
    own = json.loads(here("evaluate", "--model", checkpoint, *run[3:]).out)
    assert found["perplexity"] == itself["perplexity"] and found["against_perplexity"] == own["perplexity"]

    opened = container.open_model(converted)
    ids = np.array(Tokenizer.from_file(str(converted / "tokenizer.json")).encode(text.read_text()).ids[:301])
    nll, kl, best = [], [], []
    original = load_model(checkpoint)[0]
    original.set_dtype(mx.float32)
    models = (tiny_models.plain_model(opened), original)
    for start_ in (0, 100, 200):
        window = ids[start_ : start_ + 101]
        q, p = (log_softmax(np.array(m(mx.array(window[None, :-1])))[0]) for m in models)
        nll.append(-q[np.arange(100), window[1:]])
        kl.append((np.exp(p) * (p - q)).sum(-1))
        best.append(p.argmax(-1) == q.argmax(-1))
    nll, kl, best = map(np.concatenate, (nll, kl, best))
    assert found["tokens"] == 300
    assert found["perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-4)  # float32 against float64: about 1e-6
    assert found["kl_mean"] == pytest.approx(kl.mean(), rel=1e-3) and found["kl_p99"] == pytest.approx(
        np.quantile(kl, 0.99), rel=1e-3
    )
    assert found["top1"] == pytest.approx(best.mean(), abs=0.011)  # a near tie may fall either way
    assert found["bits_per_byte"] == pytest.approx(nll.mean() / math.log(2), rel=1e-4)  # a token is a byte


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_evaluate_refuses_another_vocabulary(converted, text, tmp_path, here):
    other = tiny_models.make_checkpoint(tmp_path / "other", "qwen3_moe", vocab_size=300)
    sentence = refusal(here("evaluate", "--model", converted, "--text", text, "--against", other, "--tokens", 50))
    assert "both models should have one vocabulary, received 258 and 300 tokens" in sentence
