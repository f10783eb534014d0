"""Switch Transformers converted: the plain model's logits, calibration on masked spans, budgets, refusals."""

from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
import switch_models
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchMLP
from safetensors import safe_open
from test_models import LOGIT_TOLERANCE, assert_close, budget

from tiny_qmoe_mlx import batch_generate, footprint, masked_spans, mlx_lm_entry, models, native
from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.conversion import expert_pass, gptq, layer, layerwise, qmoe, unfinished
from tiny_qmoe_mlx.conversion.run import Settings, convert
from tiny_qmoe_mlx.original import checkpoint
from tiny_qmoe_mlx.original import switch_transformers as switch

pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
SMALL = {"sequences": 8, "sequence_tokens": 80}
GATED = {"is_gated_act": True, "dense_act_fn": "gated-gelu"}
VARIANTS = {
    "trellis": (Settings(bits=3.0, **SMALL), {}),
    "qmoe": (Settings(bits=1.5, codec="qmoe", **SMALL), {}),
    "trellis, gated, untied": (Settings(bits=3.0, **SMALL), {**GATED, "tie_word_embeddings": False}),
    "qmoe, gated, crowded": (Settings(bits=1.5, codec="qmoe", **SMALL), {**GATED, "expert_capacity": 5}),
}
SPARSE = ["encoder.layers.1", "decoder.layers.0", "decoder.layers.1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name of VARIANTS -> (checkpoint, converted directory), made once."""
    done = {}

    def get(name):
        if name not in done:
            settings, overrides = VARIANTS[name]
            root = tmp_path_factory.mktemp("switch")
            source = switch_models.write(root / "hf", **overrides)
            done[name] = source, convert(source, root / "out", settings)
        return done[name]

    return get


def tokens(rows=1, encoder=70, decoder=20, seed=1):
    """What the encoder and the decoder read, int."""
    rng = np.random.default_rng(seed)
    begun = np.concatenate([np.zeros((rows, 1), int), rng.integers(3, 250, (rows, decoder - 1))], axis=1)
    return mx.array(rng.integers(3, 250, (rows, encoder))), mx.array(begun)


def logits(model, encoder, decoder, parts=(1,)):
    cache = model.make_cache(encoder)
    return np.concatenate([np.array(model(part, cache=cache)) for part in mx.split(decoder, list(parts), 1)], axis=1)


# ---- logits


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("share", [0, 1], ids=["fewest", "all"])
def test_logits_equal_the_plain_model_on_the_same_weights(made, name, share):
    _, directory = made(name)
    assert [s.path.removesuffix(".mlp.experts") for s in open_model(directory).spec.layers] == SPARSE
    plain = switch_models.plain_model(directory)
    model, _ = models.load(directory, memory=budget(directory, share), context=512)
    assert model.tiny_qmoe.budget.mode == ("resident" if share else "streamed")
    for rows, encoder in ((1, 70), (3, 9)):
        both = tokens(rows, encoder)
        want = logits(plain, *both, parts=(1, 2, 9))
        assert want.std() > 0.3
        assert_close(logits(model, *both, parts=(1, 2, 9)), want, LOGIT_TOLERANCE)
    model.close()


def test_experts_change_the_logits(made):
    """Of the comparison above: it would notice an expert that is another one."""
    _, directory = made("trellis")
    plain, both = switch_models.plain_model(directory), tokens()
    before = logits(plain, *both)
    for stack in (plain.encoder, plain.decoder):
        weight = stack.layers[1].mlp.experts.fc1.weight
        stack.layers[1].mlp.experts.fc1.weight = mx.roll(weight, 1, axis=0)
        assert np.abs(logits(plain, *both) - before).max() > 100 * LOGIT_TOLERANCE
        stack.layers[1].mlp.experts.fc1.weight = weight


def test_the_rest_is_quantized_but_routers_and_biases_of_positions_are_not(made):
    _, directory = made("trellis")
    names = set()
    for file in directory.glob("model-rest*.safetensors"):
        with safe_open(file, "np") as opened:
            names |= set(opened.keys())
    for path in SPARSE:
        assert f"{path}.mlp.router.weight" in names and f"{path}.mlp.router.scales" not in names
        assert f"{path}.self_attn.q_proj.scales" in names
    for stack in ("encoder", "decoder"):
        assert f"{stack}.relative_attention_bias.scales" not in names
    assert "shared.scales" in names


def test_the_router_computes_in_float32_over_bfloat16_weights():
    args = switch.ModelArgs.from_dict({**switch_models.CONFIG, "num_experts": 64})
    mixture = switch.Mixture(args)
    rng = np.random.default_rng(0)
    weight, x = mx.array(rng.standard_normal((64, 64)) / 4), mx.array(rng.standard_normal((1, 60, 64)))
    mixture.router.weight, x = weight.astype(mx.bfloat16), x.astype(mx.bfloat16)
    scores = np.array(x.astype(mx.float32), np.float64) @ np.array(mixture.router.weight.astype(mx.float32)).T
    best = np.exp(scores - scores.max(-1, keepdims=True))
    best = mx.array((best / best.sum(-1, keepdims=True)).astype(np.float32)).astype(mx.bfloat16)
    chosen, probability = mixture.route(x)
    assert probability.dtype == mx.bfloat16
    assert mx.array_equal(chosen[..., 0], best.argmax(-1)) and mx.array_equal(probability[..., 0], best.max(-1))
    rounded = (x @ mixture.router.weight.T).astype(mx.float32)  # the same in bfloat16 is another probability
    assert not mx.array_equal(mx.softmax(rounded, axis=-1).max(-1).astype(mx.bfloat16), best.max(-1))


def test_experts_take_as_many_tokens_of_a_row_as_they_have_room_for():
    mixture = switch.Mixture(switch.ModelArgs.from_dict({**switch_models.CONFIG, "expert_capacity": 3}))
    x = mx.random.normal((2, 40, 64), key=mx.random.key(0))
    chosen, weight = (np.array(a)[..., 0] for a in mixture.route(x))
    for row in range(2):
        for expert in range(8):
            mine = np.flatnonzero(chosen[row] == expert)
            assert (weight[row, mine[:3]] > 0).all() and not weight[row, mine[3:]].any()
    assert (weight == 0).sum() >= 2 * (40 - 8 * 3)


# ---- calibration


def examples(source, settings):
    """What a conversion with builtin calibration reads: both halves in one array, and the encoder's length."""
    config = checkpoint.read_config(source)
    tokenizer = checkpoint.open_tokenizer(source, config)
    from tiny_qmoe_mlx.conversion.text import calibration_tokens

    raw = calibration_tokens("builtin", tokenizer, source, settings.sequences, settings.sequence_tokens)
    masked = masked_spans.mask_all(raw.tolist(), tokenizer, config, settings.seed)
    return masked, masked_spans.sentinels(tokenizer)


def inputs_of_experts(source, masked):
    """Of each mixture, by path: inputs (rows, length, d), experts and weights of an ordinary pass of the original."""
    model, _ = checkpoint.load_lazy(source)
    seen, route = {}, switch.Mixture.route
    paths = {id(module): path for path, module in model.named_modules()}

    def noted(self, x, inside=None):
        chosen, weight = route(self, x, inside)
        seen[paths[id(self)]] = [np.array(a) for a in (x, chosen[..., 0], weight[..., 0])]
        return chosen, weight

    with patch.object(switch.Mixture, "route", noted):
        mx.eval(
            model(mx.array([list(m) for m in masked]), cache=model.make_cache(mx.array([m.inputs for m in masked])))
        )
    return seen


@pytest.mark.parametrize("capacity", [200, 5])
def test_experts_of_both_stacks_are_calibrated_on_the_tokens_routed_to_them(tmp_path, monkeypatch, capacity):
    source = switch_models.write(tmp_path / "hf", expert_capacity=capacity)
    settings, learned, references = Settings(bits=3.0, rest_bits=16, **SMALL), [], []
    route, choose = layerwise.route, layer._learned_from

    def noted(*args):
        learned.append(choose(*args))
        return learned[-1]

    monkeypatch.setattr(layerwise, "route", lambda *args: references.append(route(*args)) or references[-1])
    monkeypatch.setattr(layer, "_learned_from", noted)
    convert(source, tmp_path / "out", settings)
    masked, marks = examples(source, settings)
    want = inputs_of_experts(source, masked)
    assert [path.removesuffix(".mlp") for path in want] == SPARSE and len(learned) == 3
    for i, (x, chosen, weight) in enumerate(want.values()):
        taken = weight > 0
        got = references[2 * i]  # of the original's stream
        np.testing.assert_allclose(got.x[got.counts[:, 0]], x[taken], rtol=0, atol=1e-4)
        np.testing.assert_array_equal(got.chosen[got.counts[:, 0], 0], chosen[taken])
        np.testing.assert_allclose(got.weight[got.counts[:, 0], 0], weight[taken], rtol=1e-4)
        halves = [m.inputs for m in masked] if i < 1 else [list(m) for m in masked]
        special = np.isin(halves, marks)
        if i >= 1:
            special = np.concatenate([special[:, 1:], np.ones((len(special), 1), bool)], axis=1)
        if i == 0:  # nothing was compressed before: what the quantizer learns from is the original's too
            np.testing.assert_allclose(learned[i].x, x[taken & ~special], rtol=0, atol=1e-4)
        if capacity == 200:
            assert taken.all() and len(learned[i].x) == (~special).sum()
        else:
            assert 0 < len(learned[i].x) < (~special).sum()


def test_qmoe_cuts_an_experts_tokens_before_sentinels_are_left_out(tmp_path, monkeypatch):
    """As published: max_tokens is a multiple of all tokens of the stack over experts, and sentinels are among them."""
    source = switch_models.write(tmp_path / "hf", expert_capacity=5)
    settings, seen, real = Settings(bits=1.5, codec="qmoe", rest_bits=16, **SMALL), [], qmoe.hessians
    monkeypatch.setattr(qmoe, "hessians", lambda x: seen.append(x) or real(x))
    monkeypatch.setattr(gptq, "TOKENS", 1)  # times the average: 4 cuts nothing in so small a model
    convert(source, tmp_path / "out", settings)
    masked, marks = examples(source, settings)
    x, chosen, weight = next(iter(inputs_of_experts(source, masked).values()))  # of the encoder: nothing was before it
    special = np.isin([m.inputs for m in masked], marks)
    taken, most = weight > 0, int((weight > 0).sum() / switch_models.CONFIG["num_experts"])
    cut = 0
    for e, got in enumerate(seen[0]):
        mine = np.argwhere(taken & (chosen == e))
        first = mine[:most]
        first = first[~special[tuple(first.T)]]
        np.testing.assert_allclose(got, x[tuple(first.T)], rtol=0, atol=1e-4)
        cut += len(mine) > most and len(first) < most
    assert cut  # a sentinel took the room of another token


def test_calibration_lowers_the_error_of_the_experts_outputs(made, tmp_path):
    source, directory = made("qmoe")
    plain = convert(source, tmp_path / "out", Settings(bits=1.5, codec="qmoe", calibration="none"))
    masked, _ = examples(source, Settings(seed=5, **SMALL))
    both = mx.array([m.inputs for m in masked]), mx.array([list(m) for m in masked])
    want = logits(checkpoint.load_lazy(source)[0], *both)
    errors = [np.square(logits(switch_models.plain_model(d), *both) - want).mean() for d in (directory, plain)]
    assert errors[0] < 0.8 * errors[1], errors


@pytest.mark.parametrize("moment", [2, 4])  # within the encoder, within the decoder
def test_a_stopped_conversion_goes_on_with_the_same_bytes(made, tmp_path, moment):
    source, directory = made("trellis")
    save, count = unfinished.save_state, 0

    class Stopped(BaseException):
        """Nothing in the package catches it."""

    def save_and_stop(*args):
        nonlocal count
        save(*args)
        count += 1
        if count == moment:
            raise Stopped

    with patch.object(unfinished, "save_state", save_and_stop), pytest.raises(Stopped):
        convert(source, tmp_path / "out", VARIANTS["trellis"][0])
    convert(source, tmp_path / "out", VARIANTS["trellis"][0])
    for file in directory.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_experts_are_read_a_few_at_a_time(made, tmp_path):
    source, directory = made("trellis")
    with patch.object(expert_pass, "GROUP_BYTES", 100_000):  # two experts
        assert len(expert_pass.groups(checkpoint.expert_layers(checkpoint.load_lazy(source)[0])[0])) == 4
        again = convert(source, tmp_path / "out", VARIANTS["trellis"][0])
    for file in directory.glob("model-experts-*"):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_an_expert_with_as_many_rows_as_there_are_experts_is_not_taken_for_all_of_them(tmp_path):
    source = switch_models.write(tmp_path / "hf", num_experts=32, d_ff=32)
    found = checkpoint.expert_layers(checkpoint.load_lazy(source)[0])[0]
    weights, _ = checkpoint.expert_weights(found, range(3, 5))
    stored = mx.load(str(source / "model.safetensors"))
    for name, got in zip(("wi", "wo"), weights, strict=True):
        want = [stored[f"encoder.block.1.layer.1.mlp.experts.expert_{e}.{name}.weight"] for e in (3, 4)]
        np.testing.assert_array_equal(got, np.array(mx.stack(want)))


def test_a_whole_model_is_not_finetuned(made):
    source, directory = made("trellis")
    with pytest.raises(ValueError, match="--finetune-gains is not there for encoder-decoders"):
        convert(source, directory, VARIANTS["trellis"][0], finetune=True)


def test_a_bfloat16_checkpoint(tmp_path):
    source = switch_models.write(tmp_path / "hf")
    file = str(source / "model.safetensors")
    mx.save_safetensors(file, {name: array.astype(mx.bfloat16) for name, array in mx.load(file).items()})
    directory = convert(source, tmp_path / "out", Settings(bits=3.0, sequences=4, sequence_tokens=40))
    model, _ = models.load(directory, memory=budget(directory, 0), context=512)
    assert_close(logits(model, *tokens()), logits(switch_models.plain_model(directory), *tokens()), LOGIT_TOLERANCE)
    model.close()


@pytest.mark.parametrize("name", ["trellis", "qmoe"])
def test_the_shortest_text_calibrates(made, tmp_path, name):
    settings = Settings(**{**VARIANTS[name][0].__dict__, "sequences": 1, "sequence_tokens": 2})
    directory = convert(made("trellis")[0], tmp_path / "out", settings)
    assert open_model(directory).spec.calibration["tokens"] == 2 + masked_spans.extra(2)


def test_codec_affine_takes_it_too(tmp_path):
    source = switch_models.write(tmp_path / "hf", d_ff=128)
    directory = convert(source, tmp_path / "out", Settings(bits=8, codec="affine", rest_bits=16))
    model, _ = models.load(directory, memory=budget(directory, 0), context=512)
    want = logits(checkpoint.load_lazy(source)[0], *tokens())
    assert np.abs(logits(model, *tokens()) - want).max() < 0.1 * want.std()  # 8 bits
    model.close()


# ---- budgets


def test_the_budget_provides_for_the_caches():
    config = switch_models.CONFIG
    model = switch.Model(switch.ModelArgs.from_dict(config))
    cache = model.make_cache(tokens(encoder=300)[0])
    mx.eval(model(tokens(decoder=212)[1], cache=cache))
    held = [c.state for c in cache] + [c.memory for c in cache]
    taken = sum(a.nbytes for _, a in tree_flatten(held) if isinstance(a, mx.array))
    assert 0.5 * taken < footprint.kv_bytes(config, 512, cpu=True) and taken <= footprint.kv_bytes(
        config, 512, cpu=True
    )
    assert footprint.longest_context(config) == 1024 and footprint.top_k(config) == 1


def test_what_a_written_token_asks_for_is_the_decoders(made):
    container = open_model(made("trellis")[1])
    assert [s.path.split(".")[0] for s in footprint.decoding_layers(container)] == ["decoder"] * 2


# ---- refusals


def test_a_model_that_goes_on_from_a_text_is_asked_for(made):
    _, directory = made("trellis")
    model, tokenizer = models.load(directory, memory=budget(directory, 1), context=512)
    with pytest.raises(ValueError, match="batch_generate should be given a model that goes on from a text"):
        batch_generate(model, tokenizer, ["a"])
    with pytest.raises(ValueError, match="decodes from a text that its encoder has read"):
        model(mx.array([[0]]), cache=make_prompt_cache(model))
    with pytest.raises(ValueError, match="parted by one start token 0; there are 0"):
        model(mx.array([[5, 6]]))
    model.close()
    with pytest.raises(ValueError, match="a tool of mlx-lm should be given a model that goes on from a text"):
        mlx_lm_entry.classes(directory)


def test_its_experts_are_of_the_kind_that_all_are():
    model = switch.Model(switch.ModelArgs.from_dict(switch_models.CONFIG))
    assert type(model.encoder.layers[1].mlp.experts) is SwitchMLP
