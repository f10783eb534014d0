"""Converted models of six families against plain mlx-lm on the same dequantized weights."""

import gc
import threading
import weakref

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx_lm.models.cache import make_prompt_cache

from tiny_qmoe_mlx import expert_kind, models, native
from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.conversion.run import Settings, convert
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.generate import stream_generate
from tiny_qmoe_mlx.lookahead import Early
from tiny_qmoe_mlx.plan import plan
from tiny_qmoe_mlx.streaming.profile import load_profile
from tiny_qmoe_mlx.streaming.trace import read_trace

FAMILIES = list(tiny_models.FAMILIES)
VARIANTS = {**{f: (f, {}) for f in FAMILIES}, "mixtral top-1": ("mixtral", {"num_experts_per_tok": 1})}
SMALL = Settings(bits=3.0, sequences=8, sequence_tokens=64)
# float32 on both sides, logits of about 5: sums of 64 to 96 products in another order give about 1e-5
LOGIT_TOLERANCE = 2e-4

pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """family variant -> converted directory, made once."""
    made = {}

    def get(variant):
        if variant not in made:
            family, overrides = VARIANTS[variant]
            root = tmp_path_factory.mktemp(variant.replace(" ", "-"))
            made[variant] = convert(tiny_models.make_checkpoint(root / "hf", family, **overrides), root / "out", SMALL)
        return made[variant]

    return get


def budget(directory, share):
    """A budget that holds all experts (1), the fewest that work (0), or something between."""
    found = plan(directory, context=512, probe=False)
    low, high = found["min_budget_bytes"], found["resident_budget_bytes"]
    return int(low + share * (high - low))


def prompt(length, batch=1, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (batch, length))


def logits(model, tokens, cache=None):
    out = model(mx.array(tokens), cache=cache)
    mx.eval(out)
    return np.array(out)


def assert_close(got, want, tolerance):
    worst = np.unravel_index(np.abs(got - want).argmax(), got.shape)
    assert np.abs(got - want).max() <= tolerance, f"at {worst}: {got[worst]} should be {want[worst]}"


def greedy(model, tokenizer, tokens, count, **options):
    out = stream_generate(model, tokenizer, [int(t) for t in tokens], max_tokens=count, **options)
    return [r.token for r in out]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("share", [0, 0.5, 1], ids=["fewest", "half", "all"])
def test_logits_equal_plain_mlx_lm(converted, variant, share):
    directory = converted(variant)
    plain = tiny_models.plain_model(open_model(directory))
    model, _ = models.load(directory, memory=budget(directory, share), context=512)
    assert model.tiny_qmoe.budget.mode == ("resident" if share == 1 else "streamed")
    for tokens in (prompt(1), prompt(7), prompt(300), prompt(2, batch=4), prompt(40, batch=4)):
        assert_close(logits(model, tokens), logits(plain, tokens), LOGIT_TOLERANCE)
    model.close()


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_plain_mlx_lm_and_do_not_depend_on_the_budget(converted, variant):
    directory = converted(variant)
    plain = tiny_models.plain_model(open_model(directory))
    tokens = prompt(20)[0]
    expected = None
    for share in (0, 0.5, 1):
        model, tokenizer = models.load(directory, memory=budget(directory, share), context=512)
        expected = expected or greedy(plain, tokenizer, tokens, 60)
        assert greedy(model, tokenizer, tokens, 60) == expected
        model.close()


@pytest.mark.parametrize("variant", FAMILIES)
def test_prompt_cache_reuse(converted, variant):
    directory = converted(variant)
    plain = tiny_models.plain_model(open_model(directory))
    model, _ = models.load(directory, memory=budget(directory, 0), context=512)
    tokens = prompt(50)
    caches = make_prompt_cache(model), make_prompt_cache(plain)
    for part in (tokens[:, :30], tokens[:, 30:31], tokens[:, 31:35], tokens[:, 35:]):
        assert_close(logits(model, part, caches[0]), logits(plain, part, caches[1]), LOGIT_TOLERANCE)
    model.close()


def test_numpy_path_gives_the_same(converted, monkeypatch):
    directory = converted("gpt_oss")
    model, _ = models.load(directory, memory=budget(directory, 0.5), context=512)
    few, many = prompt(3), prompt(30)
    fast = logits(model, few), logits(model, many)
    monkeypatch.setattr(native, "available", lambda: False)
    assert_close(logits(model, few), fast[0], LOGIT_TOLERANCE)
    assert_close(logits(model, many), fast[1], LOGIT_TOLERANCE)
    assert {"decode numpy", "prefill numpy"} <= set(model.tiny_qmoe.dispatch.counts)
    model.close()


def test_counters_add_up(converted):
    directory = converted("qwen3_moe")
    sizes = [layer.record_bytes for layer in open_model(directory).spec.layers]
    for share in (0, 0.5, 1):
        streaming = models.Streaming(lookahead="off")
        model, tokenizer = models.load(directory, memory=budget(directory, share), context=512, streaming=streaming)
        greedy(model, tokenizer, prompt(20)[0], 20)
        stats = model.tiny_qmoe.stats()
        assert min(sizes) <= stats["bytes_read"] / stats["records_read"] <= max(sizes)
        total = sum(layer.experts for layer in open_model(directory).spec.layers)
        assert stats["records_read"] == (total if share == 1 else stats["expert_misses"])
        assert stats["expert_hits"] > 0 or share == 0  # with the fewest slots each layer drives out the one before
        assert stats["pool_bytes"] <= stats["budget_bytes"]
        model.close()


@pytest.mark.parametrize("variant", FAMILIES)
def test_tokens_depend_on_neither_lookahead_nor_readers_nor_checks(converted, variant):
    directory, tokens = converted(variant), prompt(20)[0]
    found = []
    for options in ({"lookahead": "off"}, {"lookahead": "on"}, {"readers": 1, "checks": "never"}, {"checks": "always"}):
        model, tokenizer = models.load(
            directory, memory=budget(directory, 0.4), context=512, streaming=models.Streaming(**options)
        )
        found.append((greedy(model, tokenizer, tokens, 40), logits(model, prompt(3)).tobytes()))
        stats = model.tiny_qmoe.stats()
        assert options.get("lookahead") != "off" or stats["lookahead_reads"] == 0
        assert stats["records_read"] <= stats["expert_misses"] + stats["lookahead_reads"]
        model.close()
    assert found.count(found[0]) == len(found)


def test_every_family_with_several_layers_can_look_ahead_and_start_its_shared_expert(converted):
    fits = {}
    for variant in FAMILIES:
        directory = converted(variant)
        model, _ = models.load(directory, memory=budget(directory, 0), context=512)
        stats = model.tiny_qmoe.stats()
        fits[variant] = stats["lookahead_layers"], stats["shared_layers"]
        model.close()
    layers = {v: len(open_model(converted(v)).spec.layers) for v in FAMILIES}
    assert {v: f[0] for v, f in fits.items()} == {v: n - 1 for v, n in layers.items()}
    assert {v for v, f in fits.items() if f[1]} == {"ernie4_5_moe", "deepseek_v2"}


def test_shared_expert_that_was_started_early_is_not_computed_again(converted, monkeypatch):
    directory = converted("ernie4_5_moe")
    model, _ = models.load(directory, budget(directory, 0), 512, streaming=models.Streaming(lookahead="off"))
    computed = []
    own = type(model.tiny_qmoe.memory.around[0].shared).__mro__[2]
    plain = own.__call__
    monkeypatch.setattr(own, "__call__", lambda self, x: computed.append(type(self)) or plain(self, x))
    logits(model, prompt(1))
    early = [t for t in computed if issubclass(t, Early)]  # the dense layer before them is of the plain class
    assert len(early) == len(open_model(directory).spec.layers)  # all misses: each was started while they loaded
    model.close()


def test_model_that_is_forgotten_frees_its_pool_and_threads(converted):
    directory = converted("olmoe")
    before = threading.active_count()
    model, _ = models.load(directory, budget(directory, 0.5), 512)
    logits(model, prompt(2))
    pool = weakref.ref(model.tiny_qmoe.cache.pool_of_layer[0])
    assert threading.active_count() > before
    del model
    gc.collect()
    assert pool() is None and threading.active_count() == before


def test_profile_and_trace_of_a_run(converted, tmp_path):
    directory = converted("qwen3_moe")
    opened = open_model(directory)
    files = {"profile": tmp_path / "use.json", "trace": tmp_path / "run.trace"}
    model, tokenizer = models.load(
        directory, budget(directory, 0.5), 512, streaming=models.Streaming(**files, lookahead="off")
    )
    greedy(model, tokenizer, prompt(20)[0], 10)
    use = [u.copy() for u in model.tiny_qmoe.cache.use]
    model.close()
    calls = read_trace(files["trace"]).calls
    counted = [np.zeros_like(u) for u in use]
    for call in calls:
        counted[call.layer][np.unique(call.chosen)] += 1
    assert all((a == b).all() for a, b in zip(use, counted, strict=True)) and any(call.cold for call in calls)
    assert all((a == b).all() for a, b in zip(use, load_profile(files["profile"], opened), strict=True))
    warm, _ = models.load(directory, budget(directory, 0.5), 512, streaming=models.Streaming(profile=files["profile"]))
    assert warm.tiny_qmoe.store.records_read > 0 == warm.tiny_qmoe.cache.misses
    warm.close()
    other = converted("olmoe")
    with pytest.raises(FormatError, match="of another model|another"):
        models.load(other, budget(other, 0.5), 512, streaming=models.Streaming(profile=files["profile"]))


def test_each_layer_has_one_dispatch_per_step(converted):
    directory = converted("mixtral")
    model, _ = models.load(directory, memory=budget(directory, 1), context=512)
    logits(model, prompt(1))
    assert dict(model.tiny_qmoe.dispatch.counts) == {"decode native fused": len(open_model(directory).spec.layers)}
    model.close()


def test_activation_outside_the_fused_list_is_computed_by_its_module(converted, monkeypatch):
    directory = converted("olmoe")
    model, _ = models.load(directory, memory=budget(directory, 1), context=512)
    fused = logits(model, prompt(4))
    monkeypatch.setattr(expert_kind, "fused_activation", lambda activation, matrices: None)
    other, _ = models.load(directory, memory=budget(directory, 1), context=512)
    assert_close(logits(other, prompt(4)), fused, LOGIT_TOLERANCE)
    assert set(other.tiny_qmoe.dispatch.counts) == {"decode native"}
    model.close()
    other.close()
