"""Gains and norms trained after a conversion: gradients, what is written, what is left alone, and what is refused."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_models import make_checkpoint, plain_model

from tiny_qmoe_mlx import container, container_writer, native
from tiny_qmoe_mlx.codecs import trellis
from tiny_qmoe_mlx.conversion import run as conversion
from tiny_qmoe_mlx.errors import BudgetError, FormatError
from tiny_qmoe_mlx.finetune import distill
from tiny_qmoe_mlx.finetune import gains as finetune
from tiny_qmoe_mlx.finetune.distill import Schedule, Teacher, divergence, teach
from tiny_qmoe_mlx.finetune.model import in_model_order, in_stored_order
from tiny_qmoe_mlx.verify import find_problems

pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
SMALL = finetune.Settings(steps=12, batch=2, rate=0.01, held_out=2, every=4, top=258)


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def models(request, tmp_path_factory):
    """(original, converted at 1.5 bits): SwiGLU without biases, and gpt-oss with its own activation and biases."""
    folder = tmp_path_factory.mktemp(request.param)
    source = make_checkpoint(folder / "source", request.param)
    settings = conversion.Settings(bits=1.5, calibration="none")
    return source, conversion.convert(source, folder / "out", settings)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 256, (8, 24)).astype(np.int32)


def files_of(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def copied(directory, to):
    to.mkdir()
    for name, data in files_of(directory).items():
        (to / name).write_bytes(data)
    return to


def records_of(directory):
    """All records of a converted model, parsed by the specification: (layer, expert, record)."""
    opened = container.open_model(directory)
    for index, layer in enumerate(opened.spec.layers):
        data = np.fromfile(opened.expert_file(index), np.uint8)
        for e in range(layer.experts):
            start = opened.record_offset(index, e)
            part = data[start : start + layer.record_bytes]
            yield index, e, trellis.parse(part, layer.shapes, layer.bias, layer.file)


def test_model_is_what_plain_mlx_lm_computes(models, tokens):
    """The differentiable model against stock mlx-lm on the dequantized weights."""
    opened = container.open_model(models[1])
    store, model = finetune.differentiable(opened, lambda *a: None)
    store.close()
    ours, theirs = model(mx.array(tokens[:2])), plain_model(opened)(mx.array(tokens[:2]))
    assert np.abs(np.array(ours - theirs)).max() < 1e-3 * np.abs(np.array(theirs)).max()


def test_gradients_are_finite_differences(models, tokens):
    """Along a random direction of every trained parameter; the routers' picks do not change on so short a way."""
    opened = container.open_model(models[1])
    store, model = finetune.differentiable(opened, lambda *a: None)
    store.close()
    names = list(finetune.trainable(model, opened))
    held = dict(tree_flatten(model.parameters()))
    random = np.random.default_rng(0)
    ids = np.arange(258)[None].repeat(8, 0)
    teacher = Teacher(ids[None], np.log(random.dirichlet(np.ones(258), 8)).astype(np.float32)[None])

    def loss(changed, way=distill._surrogate):
        model.load_weights(list(changed.items()), strict=False)
        return way(model, tokens[0, :8], teacher, 0)

    def value(model, row, teacher, i):
        return distill.held_out_loss(model, row[None], teacher, 1)

    start = {name: held[name] for name in names}
    gradient = mx.grad(loss)(start)
    for name in names:
        way = mx.array(random.standard_normal(start[name].shape).astype(np.float32)) * mx.abs(start[name])
        slope = (gradient[name] * way).sum().item()
        up, down = (loss({**start, name: start[name] + h * way}, value) for h in (3e-4, -3e-4))
        assert (up - down) / 6e-4 == pytest.approx(slope, rel=0.05, abs=4e-3), name


def test_loss_falls_and_only_gains_and_norms_change(models, tokens, tmp_path):
    source, converted = models
    out = copied(converted, tmp_path / "model")
    before, sizes = list(records_of(out)), {n: len(d) for n, d in files_of(out).items()}
    found = finetune.finetune_gains(out, source, tokens, SMALL)
    assert found["changed"] and found["kl_after"] < found["kl_before"]
    assert {n: len(d) for n, d in files_of(out).items() if n.startswith("model-experts")} == {
        n: size for n, size in sizes.items() if n.startswith("model-experts")
    }
    moved = 0
    for (_, _, old), (_, _, new) in zip(before, records_of(out), strict=True):
        for a, b in zip(old.matrices, new.matrices, strict=True):
            assert np.array_equal(a.payload, b.payload)
            assert np.array_equal(a.rates, b.rates) and np.array_equal(a.order, b.order)
            assert (a.bias is None) == (b.bias is None) and (a.bias is None or np.array_equal(a.bias, b.bias))
            assert np.all(b.block_gain.astype(np.float32) >= 0)
            moved += int((a.block_gain != b.block_gain).sum())
    assert moved
    old, new = (rest_of(directory) for directory in (converted, out))
    changed = {n for n in old if not mx.array_equal(old[n], new[n])}
    assert changed and all("norm" in n for n in changed)
    assert all(old[n].dtype == new[n].dtype for n in old)
    assert not list(find_problems(out))


def rest_of(directory):
    found = {}
    for file in directory.glob("model-rest*.safetensors"):
        found |= mx.load(str(file))
    return found


def test_what_was_written_is_what_was_measured(models, tokens, tmp_path):
    """kl_after, computed anew from the files by stock mlx-lm on the dequantized weights."""
    source, converted = models
    out = copied(converted, tmp_path / "model")
    found = finetune.finetune_gains(out, source, tokens, SMALL)
    original, _ = finetune.checkpoint.load_lazy(source)
    original.set_dtype(mx.float32)
    p, q = (m(mx.array(tokens[-2:])) for m in (original, plain_model(container.open_model(out))))
    p, q = (a - mx.logsumexp(a, -1, keepdims=True) for a in (p, q))
    kl = (mx.exp(p) * (p - q)).sum(-1).mean().item()
    assert found["kl_after"] == pytest.approx(kl, rel=0.02)


def test_a_model_that_gets_no_better_is_left_alone(models, tokens, tmp_path, monkeypatch):
    source, converted = models
    out = copied(converted, tmp_path / "model")
    before = files_of(out)
    monkeypatch.setattr(finetune, "held_out_loss", lambda *a: 1e9)
    found = finetune.finetune_gains(out, source, tokens, SMALL)
    assert not found["changed"] and found["kl_after"] == found["kl_before"]
    assert files_of(out) == before


@pytest.mark.parametrize("where", ["write_experts_file", "write_manifest", "check_space"])
def test_interruption_leaves_the_old_model(models, tokens, tmp_path, monkeypatch, where):
    source, converted = models
    out = copied(converted, tmp_path / "model")
    before = files_of(out)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(container if where == "check_space" else container_writer, where, stop)
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune_gains(out, source, tokens, SMALL)
    assert files_of(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_refusals(models, tokens, tmp_path):
    source, converted = models
    with pytest.raises(BudgetError, match="about .* of memory, received 104"):
        finetune.finetune_gains(converted, source, tokens, finetune.Settings(memory=100 << 20, held_out=2))
    with pytest.raises(ValueError, match="more than the 8 sequences"):
        finetune.finetune_gains(converted, source, tokens)
    with pytest.raises(ValueError, match="rate should lie in"):
        finetune.finetune_gains(converted, source, tokens, finetune.Settings(rate=1.0))
    with pytest.raises(ValueError, match="tokens should lie in 0 to 257"):
        finetune.finetune_gains(converted, source, tokens + 200, SMALL)
    with pytest.raises(ValueError, match="integers"):
        finetune.finetune_gains(converted, source, tokens.astype(np.float32), SMALL)
    other = make_checkpoint(tmp_path / "other", "mixtral", vocab_size=300)
    with pytest.raises(FormatError, match="model_type of the original"):
        finetune.finetune_gains(converted, other, tokens, SMALL)
    with pytest.raises(FormatError, match="unconverted"):
        finetune.finetune_gains(source, source, tokens, SMALL)


def test_gains_as_stored_stay_normal():
    gain = np.array([0, 2.0**-20, 1e-4, 1, 60000], np.float16)
    small, large = (finetune.as_stored(gain, np.full(5, f, np.float32)) for f in (0.25, 4.0))
    assert small.tolist() == [0, 2.0**-20, 2.0**-14, 0.25, np.float16(15000)]
    assert np.isfinite(large).all() and large[0] == 0 and large[-1] == np.float16(65504)


def test_orders_are_inverse():
    order = np.array([2, 0, 1])
    gain = np.arange(12)
    assert in_model_order(gain, order).tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3]
    assert np.array_equal(in_stored_order(in_model_order(gain, order), order), gain)


def test_divergence_with_all_tokens_is_exact_and_with_few_a_lower_bound():
    random = np.random.default_rng(0)
    logits = random.standard_normal((5, 40)).astype(np.float32)
    other = random.standard_normal((5, 40)).astype(np.float32)
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (other, logits))
    exact = (p * np.log(p / q)).sum(-1)
    for top, near in ((40, 1e-4), (8, None)):
        teacher = teach(lambda t: mx.array(other[None]), np.zeros((1, 5), np.int32), top, lambda *a: None)
        ours, slope = divergence(logits.copy(), teacher.ids[0], teacher.log_p[0])
        assert np.allclose(ours, exact, atol=near) if near else np.all(ours < exact) and np.all(ours > 0)
        assert near is None or np.allclose(slope, q - p, atol=1e-5)
        for token in (0, 7, 39):
            up, down = (
                divergence(logits + h * np.eye(40)[token], teacher.ids[0], teacher.log_p[0])[0] for h in (1e-4, -1e-4)
            )
            assert np.allclose((up - down) / 2e-4, slope[:, token], atol=1e-4)


def test_rate_rises_and_falls():
    rates = [Schedule(100, 1, 0.01, 10).rate_at(i) for i in range(100)]
    assert rates[0] < rates[4] < rates[9] > rates[50] > rates[99] > 0 and max(rates) <= 0.01
