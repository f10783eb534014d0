"""Converted models of six families against plain mlx-lm on the same dequantized weights."""

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx_lm.models.cache import make_prompt_cache

from tiny_qmoe_mlx import expert_kind, models, native, plan
from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.conversion.run import Settings, convert
from tiny_qmoe_mlx.generate import stream_generate

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
    found = plan.plan(directory, context=512)
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
        model, tokenizer = models.load(directory, memory=budget(directory, share), context=512)
        greedy(model, tokenizer, prompt(20)[0], 20)
        stats = model.tiny_qmoe.stats()
        assert min(sizes) <= stats["bytes_read"] / stats["records_read"] <= max(sizes)
        total = sum(layer.experts for layer in open_model(directory).spec.layers)
        assert stats["records_read"] == (total if share == 1 else stats["expert_misses"])
        assert stats["expert_hits"] > 0 or share == 0  # with the fewest slots each layer drives out the one before
        assert stats["pool_bytes"] <= stats["budget_bytes"]
        model.close()


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
