"""The package as a library: its names, batches, closing, two models in one process, threads, types."""

import dataclasses
import gc
import inspect
import subprocess
import sys
import threading
import weakref

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from commands import ROOT, environment
from mlx_lm.generate import BatchGenerator

import tiny_qmoe_mlx
from tiny_qmoe_mlx import footprint, native
from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.conversion.run import Settings, convert
from tiny_qmoe_mlx.door import Door
from tiny_qmoe_mlx.layers import RecordExperts
from tiny_qmoe_mlx.plan import plan

SMALL = Settings(bits=3.0, sequences=8, sequence_tokens=64)
CLOSED = r"^\[model\] should be open, it has been closed; load it again\.$"
PROMPTS = [[7, 8, 9, 10], list(range(20, 220)), "hello there", [65] * 30, list(range(90))]
CONTEXT = 1000
needs_compiler = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """family -> converted directory, made once."""
    done = {}

    def get(family):
        if family not in done:
            root = tmp_path_factory.mktemp(family)
            done[family] = convert(tiny_models.make_checkpoint(root / "hf", family), root / "out", SMALL)
        return done[family]

    return get


def load(directory, share=0.5):
    """Loaded with a budget between the fewest experts (0) and all (1)."""
    found = plan(directory, context=CONTEXT, probe=False)
    low, high = found["min_budget_bytes"], found["resident_budget_bytes"]
    return tiny_qmoe_mlx.load(directory, int(low + share * (high - low)), CONTEXT)


def tokens_of(model, tokenizer, prompt=PROMPTS[0], count=30):
    return [r.token for r in tiny_qmoe_mlx.stream_generate(model, tokenizer, prompt, max_tokens=count)]


def in_thread(work):
    """What `work` returns in a thread of its own, or raises there."""
    found = []

    def run():
        try:
            found.append((work(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result():
        thread.join(60)
        assert found, "the thread has not ended"
        if found[0][1] is not None:
            raise found[0][1]
        return found[0][0]

    result.thread = thread
    return result


# ---- names and imports


def test_public_names_are_functions_and_stay_so():
    assert tiny_qmoe_mlx.__all__ == ["__version__", *sorted(tiny_qmoe_mlx._HOMES)]
    code = """
import tiny_qmoe_mlx.generate, tiny_qmoe_mlx.convert, types
from tiny_qmoe_mlx import *
import tiny_qmoe_mlx as t
for name in t._HOMES:
    assert isinstance(getattr(t, name), types.FunctionType) and globals()[name] is getattr(t, name), name
try:
    t.nonsense
except AttributeError as error:
    assert "'tiny_qmoe_mlx' has no attribute 'nonsense'" in str(error)
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment()).returncode == 0


LIGHT = """
import sys
before = set(sys.modules)
import tiny_qmoe_mlx
new = set(sys.modules) - before
assert not new & {"argparse", "mlx.core", "mlx_lm", "numpy", "transformers", "tqdm"}, new
tiny_qmoe_mlx.load, tiny_qmoe_mlx.generate, tiny_qmoe_mlx.stream_generate, tiny_qmoe_mlx.batch_generate
own = {name for name in sys.modules if name.startswith("tiny_qmoe_mlx.")}
command = {f"tiny_qmoe_mlx.{name}" for name in ("terminal", "locate", "generate_options", "demo", "convert")}
assert "tiny_qmoe_mlx.models" in own and not own & command, own & command
"""


def test_import_loads_neither_mlx_nor_the_commands():
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", LIGHT], env=environment()).returncode == 0


@needs_compiler
def test_library_prints_nothing(made, capfd):
    directory = made("qwen3_moe")
    capfd.readouterr()
    model, tokenizer = load(directory)
    text = tiny_qmoe_mlx.generate(model, tokenizer, "hello", max_tokens=10)
    tiny_qmoe_mlx.batch_generate(model, tokenizer, ["hello"], max_tokens=10)
    model.close()
    printed = capfd.readouterr()
    assert text and (printed.out, printed.err) == ("", "")


@needs_compiler
def test_progress_comes_by_callback(made):
    seen = []
    tiny_qmoe_mlx.load(made("qwen3_moe"), progress=lambda *step: seen.append(step))[0].close()
    assert seen == [("loading experts", 8, 16), ("loading experts", 16, 16)]


@needs_compiler
def test_a_converted_directory_names_no_directory_of_the_machine(tmp_path):
    """What is uploaded tells nobody where it was made."""
    text = tmp_path / "corpus.txt"
    text.write_text("the long river carries it down to the sea " * 60)
    source = tiny_models.make_checkpoint(tmp_path / "hf", "qwen3_moe")
    settings = dataclasses.replace(SMALL, calibration=str(text)), Settings(codec="tiny-qmoe", group=128)
    for number, given in enumerate(settings):
        original = source if not number else tiny_models.make_checkpoint(tmp_path / "dense", "llama")
        made = convert(original, tmp_path / f"out{number}", given)
        assert open_model(made).spec.source["model"] == original.name
        naming = [file.name for file in made.iterdir() if str(tmp_path).encode() in file.read_bytes()]
        assert naming == []


# ---- batches


@needs_compiler
@pytest.mark.parametrize("share", [0, 1], ids=["fewest", "all"])
def test_batch_gives_the_texts_that_each_prompt_gets_alone(made, share):
    model, tokenizer = load(made("qwen3_moe"), share)
    alone = [tiny_qmoe_mlx.generate(model, tokenizer, prompt, max_tokens=20) for prompt in PROMPTS]
    together = tiny_qmoe_mlx.batch_generate(model, tokenizer, PROMPTS, max_tokens=20)
    assert together.texts == alone and len(set(alone)) > 1
    lengths = tiny_qmoe_mlx.batch_generate(model, tokenizer, PROMPTS, max_tokens=[1, 2, 3, 4, 5], return_token_ids=True)
    assert [len(ids) for ids in lengths.token_ids] == [1, 2, 3, 4, 5]
    model.close()


@needs_compiler
def test_batch_keeps_to_the_chunk_that_the_budget_counts_on(made, monkeypatch):
    model, tokenizer = tiny_qmoe_mlx.load(made("qwen3_moe"), context=4 * CONTEXT)
    seen, plain = [], RecordExperts.__call__
    monkeypatch.setattr(RecordExperts, "__call__", lambda self, x, i: seen.append(i.shape[:-1]) or plain(self, x, i))
    prompts = [[(7 * i + j) % 256 for i in range(300)] for j in range(4)]
    tiny_qmoe_mlx.batch_generate(model, tokenizer, prompts, max_tokens=2)
    assert max(map(np.prod, seen)) == footprint.PREFILL_CHUNK == 4 * 128
    seen.clear()
    tiny_qmoe_mlx.batch_generate(model, tokenizer, prompts, max_tokens=2, prefill_batch_size=2)
    assert max(seen) == (2, footprint.PREFILL_CHUNK // 2)
    model.close()


@needs_compiler
@pytest.mark.parametrize(("share", "most"), [(0, 2), (1, 7)], ids=["fewest experts", "all"])
def test_batch_keeps_the_kv_caches_within_what_the_budget_has_for_them(made, monkeypatch, share, most):
    """A context of 1000 tokens and a step hold two rows of 250 + 120 and a step; memory beside all experts more."""
    model, tokenizer = load(made("qwen3_moe"), share)
    runtime, seen, plain = model.tiny_qmoe, [], BatchGenerator._next
    spare = 5 * runtime.budget.kv_bytes // 2 if share else 0
    assert runtime.budget.context == CONTEXT
    full = runtime.budget.resident_budget_bytes + spare if share else runtime.budget.budget_bytes
    monkeypatch.setattr(runtime, "budget", dataclasses.replace(runtime.budget, budget_bytes=full))

    def counted(self):
        found = plain(self)
        seen.append(len(self._prompt_batch) + len(self._generation_batch))
        return found

    monkeypatch.setattr(BatchGenerator, "_next", counted)
    prompts = [[(7 * i + j) % 256 for j in range(20 + 23 * i)] for i in range(11)]
    sizes = [120 if i == 10 else 1 + 2 * i for i in range(11)]
    found = tiny_qmoe_mlx.batch_generate(model, tokenizer, prompts, max_tokens=sizes)
    monkeypatch.undo()
    assert 2 <= max(seen) <= most
    pairs = zip(prompts, sizes, strict=True)
    assert found.texts == [tiny_qmoe_mlx.generate(model, tokenizer, p, max_tokens=size) for p, size in pairs]
    model.close()


@needs_compiler
def test_batch_refuses_an_empty_prompt_and_takes_an_empty_batch(made):
    model, tokenizer = load(made("qwen3_moe"))
    with pytest.raises(ValueError, match=r"^\[prompt\] 1 of the batch should have at least one token, it has none\.$"):
        tiny_qmoe_mlx.batch_generate(model, tokenizer, ["a", ""])
    assert tiny_qmoe_mlx.batch_generate(model, tokenizer, []).texts == []
    model.close()


# ---- closing


@needs_compiler
def test_context_manager_frees_the_pool_and_ends_the_threads(made):
    before = threading.active_count()
    loaded, tokenizer = load(made("qwen3_moe"))
    with loaded as model:
        assert model is loaded
        tokens_of(model, tokenizer, count=3)
        pool = weakref.ref(model.tiny_qmoe.cache.pool_of_layer[0])
        assert threading.active_count() > before
    gc.collect()
    assert pool() is None and threading.active_count() == before
    assert loaded.tiny_qmoe.stats()["pool_bytes"] >= 0
    with pytest.raises(KeyError), load(made("qwen3_moe"))[0] as model:
        raise KeyError
    assert threading.active_count() == before
    model.close()  # again does nothing


@needs_compiler
@pytest.mark.parametrize("share", [0.5, 1], ids=["streamed", "resident"])
def test_a_closed_model_is_refused_in_one_sentence(made, share):
    model, tokenizer = load(made("qwen3_moe"), share)
    model.close()
    for use in (
        lambda: model(mx.array([[1]])),
        lambda: tiny_qmoe_mlx.generate(model, tokenizer, "x"),
        lambda: next(tiny_qmoe_mlx.stream_generate(model, tokenizer, "x")),
        lambda: tiny_qmoe_mlx.batch_generate(model, tokenizer, ["x"]),
        lambda: in_thread(lambda: model(mx.array([[1]])))(),
    ):
        with pytest.raises(ValueError, match=CLOSED):
            use()


@needs_compiler
def test_closing_between_two_tokens_ends_the_generation(made):
    model, tokenizer = load(made("qwen3_moe"))
    running = tiny_qmoe_mlx.stream_generate(model, tokenizer, PROMPTS[0], max_tokens=50)
    next(running)
    model.close()
    with pytest.raises(ValueError, match=CLOSED):
        list(running)


@needs_compiler
def test_closing_waits_for_a_call_in_another_thread(made, monkeypatch):
    model, _ = load(made("qwen3_moe"), 0)
    prompt = mx.array([list(range(40))])
    expected = np.array(model(prompt))
    arrived, go_on, plain = threading.Event(), threading.Event(), RecordExperts.__call__

    def slow(self, x, indices):
        arrived.set()
        assert go_on.wait(60)
        return plain(self, x, indices)

    monkeypatch.setattr(RecordExperts, "__call__", slow)
    caller = in_thread(lambda: np.array(model(prompt)))
    assert arrived.wait(60)
    closer = in_thread(model.close)
    closer.thread.join(0.2)
    assert closer.thread.is_alive() and model.tiny_qmoe.cache.pool_of_layer
    with pytest.raises(ValueError, match=CLOSED):  # nobody else gets in
        model(prompt)
    go_on.set()
    assert np.abs(caller() - expected).max() < 1e-5
    closer()
    assert not model.tiny_qmoe.cache.pool_of_layer


def test_a_call_that_closes_does_not_wait_for_itself():
    door = Door()
    with door.call():
        door.shut()
    with pytest.raises(ValueError, match=CLOSED), door.call():
        pass


@needs_compiler
def test_signature_is_that_of_mlx_lms_class(made):
    model, _ = load(made("qwen3_moe"))
    base = type(model).__mro__[1]
    assert inspect.signature(model.__call__) == inspect.signature(base.__call__.__get__(model))
    model.close()


# ---- several models, several threads


def counted(stats):
    """What does not depend on when a read ends."""
    demanded = stats["expert_hits"] + stats["expert_misses"]
    return demanded, *(stats[key] for key in ("budget_bytes", "pool_bytes", "mode"))


@needs_compiler
def test_two_models_in_turns_give_what_each_gives_alone(made):
    first, second = made("qwen3_moe"), made("deepseek_v2")
    cases = [(first, 0), (first, 1), (second, 0.5)]
    alone = []
    for directory, share in cases:
        model, tokenizer = load(directory, share)
        alone.append((tokens_of(model, tokenizer), model.tiny_qmoe.stats()))
        model.close()
    loaded = [load(*case) for case in cases]
    running = [
        tiny_qmoe_mlx.stream_generate(model, tokenizer, PROMPTS[0], max_tokens=30) for model, tokenizer in loaded
    ]
    found = [[] for _ in cases]
    for _ in range(30):
        for tokens, responses in zip(found, running, strict=True):
            tokens += [r.token for r in [next(responses, None)] if r is not None]
    for (model, _), tokens, (expected, stats) in zip(loaded, found, alone, strict=True):
        assert tokens == expected
        assert counted(model.tiny_qmoe.stats()) == counted(stats)
    for index, (model, _) in enumerate(loaded):  # the others go on when one has gone
        model.close()
        for (other, tokenizer), (expected, _) in list(zip(loaded, alone, strict=True))[index + 1 :]:
            assert tokens_of(other, tokenizer) == expected


@needs_compiler
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_worker_thread_generates_what_the_main_thread_does(made, family):
    """Arrays that a model made lazily belong to the thread that made them: here they are evaluated in another."""
    model, tokenizer = load(made(family))
    found = in_thread(lambda: tokens_of(model, tokenizer))()
    assert found == tokens_of(model, tokenizer) and len(found) > 1
    model.close()


@needs_compiler
def test_threads_on_two_models_at_once(made):
    directories = (made("qwen3_moe"), made("deepseek_v2"))
    loaded = [in_thread(lambda d=d: load(d, 0))() for d in directories]  # in threads, too
    expected = [tokens_of(*each) for each in loaded]
    barrier = threading.Barrier(2)

    def work(model, tokenizer):
        barrier.wait(60)
        return [tokens_of(model, tokenizer) for _ in range(3)]

    results = [in_thread(lambda each=each: work(*each)) for each in loaded]
    assert [result() for result in results] == [[tokens] * 3 for tokens in expected]
    for model, _ in loaded:
        in_thread(model.close)()


# ---- types


@pytest.mark.slow
def test_public_api_passes_mypy_strict():
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "tests/public_api.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_mypy_strict_sees_a_wrong_use(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "wrong.py").write_text(
        "from tiny_qmoe_mlx import generate, load\n"
        "model, tokenizer = load(3)\n"
        "count: int = generate(model, tokenizer, 'x')\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(tmp_path / "wrong.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.count("error:") == 2, done.stdout + done.stderr
