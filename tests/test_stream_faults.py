"""A disk that stalls, fails or changes under a run: the same tokens, or one sentence; and Ctrl-C meanwhile."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import records
from commands import Result, environment, finish, generate, refusal
from mlx.nn import Module

from tiny_qmoe_mlx import budget, container, container_writer, models, native, terminal
from tiny_qmoe_mlx.container import Container, open_model
from tiny_qmoe_mlx.expert_kind import expert_kind
from tiny_qmoe_mlx.generate import stream_generate
from tiny_qmoe_mlx.streaming import demand as demands
from tiny_qmoe_mlx.streaming import store
from tiny_qmoe_mlx.streaming.cache import ExpertCache
from tiny_qmoe_mlx.streaming.demand import Demand
from tiny_qmoe_mlx.streaming.profile import load_profile

pytest_plugins = ["command_fixtures"]


@pytest.fixture
def model(converted, tmp_path) -> Path:
    """A copy to damage; here, as other modules' plugins have a fixture of the same name."""
    return Path(shutil.copytree(converted, tmp_path / "model"))


pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")

EXIT_S = 5.0  # from Ctrl-C to the end of the process; a second on an idle machine
WAIT_S = 120.0  # for what must come
PROMPT = "hello there"  # more tokens than decode takes at once: a prefill
SHORT = "x"
CONTEXT = 1024  # tokens, the most that the tiny model takes: generate's default
REAL = os.preadv


def least(model: Path) -> int:
    """Bytes of a budget in which nearly every expert is read anew for every token."""
    return budget.split(open_model(model), sys.maxsize, CONTEXT).min_budget_bytes + 20_000


def streamed(here, model: Path, *options: object) -> dict:
    found = generate(here, model, "--memory", least(model), *options, prompt=PROMPT)
    assert found["mode"] == "streamed"
    return found


@pytest.fixture(scope="module")
def undisturbed(converted) -> list[int]:
    """Tokens of a run on a disk that works."""
    model, tokenizer = models.load(converted, least(converted), context=CONTEXT)
    found = [r.token for r in stream_generate(model, tokenizer, tokenizer.encode(PROMPT), max_tokens=40)]
    model.close()
    return found


# ---- what a run survives


def failing(times: int, after: int = 5):
    """preadv that fails `times` times after some calls."""
    calls = iter(range(1 << 30))

    def preadv(*args):
        if after <= next(calls) < after + times:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return REAL(*args)

    return preadv


def short(file, views, offset):
    """preadv that returns a sixth of what was asked for, of the first buffer alone."""
    return REAL(file, [views[0][: max(1, len(views[0]) // 6)]], offset)


def changing(change, after: int = 5):
    """preadv before one of whose calls the files change."""
    calls = iter(range(1 << 30))

    def preadv(*args):
        if next(calls) == after:
            change()
        return REAL(*args)

    return preadv


def waiting(for_what):
    """preadv that returns once something has come."""

    def preadv(*args):
        until = time.monotonic() + WAIT_S
        while not for_what() and time.monotonic() < until:
            time.sleep(0.005)
        return REAL(*args)

    return preadv


def test_reads_that_fail_twice_change_no_token(here, converted, undisturbed, monkeypatch):
    monkeypatch.setattr(store, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(os, "preadv", failing(2))
    found = streamed(here, converted)
    assert (found["tokens"], found["read_retries"]) == (undisturbed, 2)


def test_short_reads_change_no_token(here, converted, undisturbed, monkeypatch):
    monkeypatch.setattr(os, "preadv", short)
    found = streamed(here, converted)
    assert (found["tokens"], found["read_retries"]) == (undisturbed, 0)


def test_files_that_are_replaced_are_read_on_as_they_were_opened(here, model, undisturbed, monkeypatch):
    def replace():
        for file in sorted(model.glob("model-experts-*"))[:2]:
            file.with_name("new").write_bytes(b"another model's")
            os.replace(file.with_name("new"), file)

    monkeypatch.setattr(os, "preadv", changing(replace))
    assert streamed(here, model)["tokens"] == undisturbed
    assert {f.read_bytes() for f in model.glob("model-experts-*")} == {b"another model's"}


@pytest.fixture
def noise(tmp_path):
    """(the open model, its cache) of 2 layers of 6 experts of noise, 12 slots, one reader."""
    records.write_model(tmp_path / "noise", hidden=64, width=64, experts=6, alignment=128, rates=[2])
    opened = open_model(tmp_path / "noise")
    kinds = [expert_kind(layer, opened.spec, Module()) for layer in opened.spec.layers]
    size = opened.spec.layers[0].record_bytes
    cache = ExpertCache(store.ExpertStore(opened, kinds), {size: 12}, readers=1)
    yield opened, cache
    cache.close()


def given_out(cache: ExpertCache, layer: int, expert: int) -> np.ndarray:
    """An expert's bytes as a product sees them."""
    pool = cache.pool_of_layer[layer]
    with Demand(cache, layer, [expert]) as demand:
        ((_, (at,)),) = list(demand)
        return pool.data[at : at + pool.record_bytes].copy()


def of_file(opened: Container, layer: int, expert: int) -> np.ndarray:
    start = opened.record_offset(layer, expert)
    return np.fromfile(opened.expert_file(layer), np.uint8)[start : start + opened.spec.layers[layer].record_bytes]


def test_lookahead_that_cannot_be_read_is_read_again_when_it_is_demanded(noise, monkeypatch):
    opened, cache = noise
    monkeypatch.setattr(store, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(os, "preadv", failing(3, after=0))
    cache.expect(1, [2])
    until = time.monotonic() + WAIT_S
    while cache._loading and time.monotonic() < until:
        time.sleep(0.001)
    assert (cache.store.retries, cache.store.records_read, len(cache.pool_of_layer[1].free)) == (2, 0, 12)
    np.testing.assert_array_equal(given_out(cache, 1, 2), of_file(opened, 1, 2))


# ---- what a run refuses


def ends(here, model: Path) -> str:
    """The sentence of a run that was refused."""
    options = ("--max-tokens", 40, "--memory", least(model), "--readers", 1, "--json")
    return refusal(here("generate", "--model", model, "--prompt", PROMPT, *options))


def test_reads_that_fail_three_times_are_one_sentence_with_file_layer_and_expert(here, converted, monkeypatch):
    monkeypatch.setattr(store, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(os, "preadv", failing(3))
    sentence = ends(here, converted)
    layers = open_model(converted).spec.layers
    named = [x for x in layers if x.file in sentence and re.search(rf"expert \d of {re.escape(x.path)} ", sentence)]
    assert len(named) == 1 and "3 tries failed: Input/output error" in sentence


def shrink(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 3)


def write_over(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    with open(file, "r+b") as opened:
        opened.write(data)


@pytest.mark.parametrize(
    ("change", "why"), [(shrink, "the file ends at|it has been written to"), (write_over, "it has been written to")]
)
def test_files_that_change_in_use_are_one_sentence_with_the_file(here, model, change, why, monkeypatch, request):
    files = sorted(model.glob("model-experts-*"))
    monkeypatch.setattr(os, "preadv", changing(lambda: [change(file) for file in files]))
    sentence = ends(here, model)
    assert sum(str(file) in sentence for file in files) == 1
    assert any(part in sentence for part in why.split("|"))


# ---- a disk that stalls

# Runs generate with reads that hang once the file argv[1] is there: for good, or until the stall has been reported.
CHILD = """
import logging, os, runpy, sys, threading, time
hang, hung, until, threshold = sys.argv[1], sys.argv[1] + ".hung", sys.argv[2], float(sys.argv[3])
real, reported, once = os.preadv, threading.Event(), threading.Lock()

def preadv(*args):
    if os.path.exists(hang) and (until == "for good" or once.acquire(blocking=False)):
        open(hung, "w").close()
        reported.wait(60 if until == "reported" else 600)
    return real(*args)

os.preadv = preadv
if until == "reported":
    logging.getLogger("tiny_qmoe_mlx").addFilter(lambda record: reported.set() or True)
from tiny_qmoe_mlx.streaming import demand
demand.STALL_S = threshold
sys.argv = sys.argv[4:]
runpy.run_module("tiny_qmoe_mlx." + sys.argv[0], run_name="__main__", alter_sys=True)
"""


def on_hanging_disk(hang: Path, until: str, threshold: float, model: Path, *options: object) -> subprocess.Popen:
    argv = (hang, until, threshold, "generate", "--model", model, *options)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, argv)], env=environment(), **pipes)


def test_a_stall_is_reported_once_and_changes_no_token(converted, undisturbed, tmp_path):
    (tmp_path / "hang").touch()
    options = ("--prompt", PROMPT, "--max-tokens", 40, "--memory", least(converted), "--json", "--readers", 1)
    done = finish(on_hanging_disk(tmp_path / "hang", "reported", 1.0, converted, *options))
    assert done.status == 0, done
    found = json.loads(done.out)
    assert found["tokens"] == undisturbed and found["stalls"] == 1
    (line,) = done.err.splitlines()
    assert any(str(open_model(converted).expert_file(i)) in line for i in range(2))
    assert "the disk stalls; waiting" in line


def test_a_long_stall_is_reported_again_and_counted_once(noise, monkeypatch, caplog):
    opened, cache = noise
    monkeypatch.setattr(demands, "STALL_S", 0.05)
    monkeypatch.setattr(os, "preadv", waiting(lambda: len(caplog.records) >= 3))
    np.testing.assert_array_equal(given_out(cache, 0, 4), of_file(opened, 0, 4))
    assert len(caplog.records) >= 3 and cache.stalls == 1


def interrupted(child: subprocess.Popen, hung: Path) -> Result:
    """Ctrl-C once a read hangs."""
    until = time.monotonic() + WAIT_S
    while not hung.exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert child.poll() is None and hung.exists()
    child.send_signal(signal.SIGINT)
    try:
        child.wait(EXIT_S)
    except subprocess.TimeoutExpired:
        child.kill()
    return finish(child)


SLOW = [pytest.param(phase, marks=pytest.mark.slow) for phase in ("load of a resident model", "warm start", "prefill")]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("phase", ["decode", *SLOW])
def test_ctrl_c_while_a_read_hangs(here, converted, tmp_path, phase):
    hang, profile = tmp_path / "hang", tmp_path / "use.json"
    if phase == "warm start":
        streamed(here, converted, "--profile", profile)
    memory = "1GB" if phase == "load of a resident model" else least(converted)
    options = ("--prompt", SHORT if phase == "decode" else PROMPT, "--max-tokens", 1000, "--memory", memory)
    if phase != "decode":
        hang.touch()
    child = on_hanging_disk(hang, "for good", 600.0, converted, *options, "--profile", profile)
    if phase == "decode":
        assert child.stdout.read(20)
        hang.touch()
    done = interrupted(child, Path(f"{hang}.hung"))
    assert (done.status, done.err) == (terminal.INTERRUPTED, "error: interrupted\n"), done
    if phase != "load of a resident model":  # which had computed nothing
        assert sum(use.sum() for use in load_profile(profile, open_model(converted))) > 0


# ---- some layers in memory for good, others streamed


@pytest.fixture
def two_sizes(model) -> Path:
    """The converted model, the records of its first layer made larger by an alignment."""
    opened = open_model(model)
    spec, first = opened.spec, opened.spec.layers[0]
    larger = dataclasses.replace(first, record_bytes=first.record_bytes + spec.alignment)
    padded = [np.pad(of_file(opened, 0, e), (0, spec.alignment)) for e in range(first.experts)]
    container_writer.write_experts_file(model, larger, spec.alignment, padded)
    layers = (larger, *(dataclasses.replace(x, record_bytes=first.record_bytes) for x in spec.layers[1:]))
    assert layers[1:] == spec.layers[1:]  # they were of one size
    config = json.loads((model / "config.json").read_text())
    config["tiny_qmoe"] = dataclasses.replace(spec, layers=layers).to_dict()
    container.write_json(model / "config.json", config)
    container_writer.write_manifest(model)
    return model


def mixed(monkeypatch, model: Path, whole: int, lookahead: str = "on"):
    """The model with every expert of layer `whole` in memory, and the fewest slots for the other."""
    size = open_model(model).spec.layers[whole].record_bytes
    share = lambda counts, least, pool: {**least, size: counts[size]}  # noqa: E731
    monkeypatch.setattr(budget, "_share", share)
    found, _ = models.load(model, least(model), CONTEXT, streaming=models.Streaming(lookahead=lookahead))
    assert found.tiny_qmoe.budget.mode == "streamed"
    return found


def run(model) -> list[bytes]:
    """Logits of a prefill, then of tokens one by one, as bytes."""
    prompts = [np.arange(40)[None], np.arange(3)[None], *np.random.default_rng(0).integers(0, 256, (12, 1, 1))]
    return [np.array(model(mx.array(tokens))).tobytes() for tokens in prompts]


@pytest.mark.parametrize("whole", [0, 1])
def test_mixed_residency_gives_the_resident_models_logits(two_sizes, monkeypatch, whole):
    resident, _ = models.load(two_sizes, "1GB", CONTEXT)
    assert resident.tiny_qmoe.budget.mode == "resident" and len(resident.tiny_qmoe.cache.pools) == 2
    expected = run(resident)
    resident.close()
    model = mixed(monkeypatch, two_sizes, whole)
    assert run(model) == expected
    assert model.tiny_qmoe.stats()["expert_misses"] > 0
    model.close()


@pytest.mark.parametrize("whole", [0, 1])
def test_the_resident_layers_of_a_mixed_model_read_nothing(two_sizes, monkeypatch, whole):
    model = mixed(monkeypatch, two_sizes, whole, "off")
    cache, asked = model.tiny_qmoe.cache, []
    assert [pool.resident for pool in cache.pool_of_layer] == [layer == whole for layer in (0, 1)]
    read = cache.store.read
    monkeypatch.setattr(cache.store, "read", lambda layer, *rest: asked.append(layer) or read(layer, *rest))
    run(model)
    assert set(asked) == {1 - whole}
    model.close()


def test_a_streamed_layer_does_not_guess_at_one_that_is_in_memory(two_sizes, monkeypatch):
    model = mixed(monkeypatch, two_sizes, 1)
    model.tiny_qmoe.cache.pool_of_layer[1].resident = True
    guessed = []
    monkeypatch.setattr("tiny_qmoe_mlx.lookahead.guess", lambda block, x: guessed.append(block))
    run(model)
    assert not guessed
    model.close()
