"""Models with the affine codec: codes kept bit for bit, logits and tokens those of plain mlx-lm."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import source_layouts
import tiny_models
from mlx.utils import tree_unflatten
from mlx_lm.utils import load_model, save_model
from records import stored

from tiny_qmoe_mlx import affine_product, container, container_writer, models, native, ops, spec, verify
from tiny_qmoe_mlx.codecs import affine
from tiny_qmoe_mlx.conversion import affine as affine_convert
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.expert_kind import expert_kind
from tiny_qmoe_mlx.generate import stream_generate
from tiny_qmoe_mlx.metal import Records
from tiny_qmoe_mlx.original import checkpoint
from tiny_qmoe_mlx.plan import plan

# ---- models


def convert(source: Path, out: Path, bits: int = 4) -> Path:
    """A converted model whose experts are affine records and whose other weights are the checkpoint's."""
    model, config = checkpoint.load_lazy(source)
    layers = checkpoint.expert_layers(model)
    found, alignment = affine_convert.affine_layer_specs(layers, bits)
    words = spec.ModelSpec(
        1, "affine", round(spec.bits_per_weight(found, alignment), 4), alignment, 0, 0, tuple(found),
        {"model": "x", "revision": None}, {"source": "none", "tokens": 0},
    )  # fmt: skip
    with container.staged_directory(out) as staged:
        for layer, own in zip(layers, found, strict=True):
            groups = (range(i, min(i + 3, own.experts)) for i in range(0, own.experts, 3))
            records = (r for group in groups for r in affine_convert.affine_records(layer, group, own))
            container_writer.write_experts_file(staged, own, alignment, records)
        model.update_modules(tree_unflatten([(layer.path, nn.Module()) for layer in layers]))
        save_model(staged, model)
        container.write_json(staged / "config.json", {**config, "tiny_qmoe": words.to_dict()})
        tiny_models.write_tokenizer(staged)
        container_writer.write_manifest(staged)
    return out


def quantize_experts(directory: Path) -> Path:
    """What `--codec affine --bits 4` makes of plain experts, by mlx-lm's own means."""
    model, config = load_model(directory)
    nn.quantize(model, 64, 4, class_predicate=lambda path, module: type(module).__name__ == "SwitchLinear")
    out = directory.parent / "quantized"
    save_model(out, model)
    (out / "config.json").write_text(json.dumps({**config, "quantization": {"group_size": 64, "bits": 4}}))
    tiny_models.write_tokenizer(out)
    return out


def mlx_source(family, mode, bits, group, mixed=False, **options):
    def make(root):
        directory = tiny_models.make_checkpoint(root / "hf", family, **options)
        source_layouts.rewrite(directory, lambda w: {n: a.astype(mx.bfloat16) for n, a in w.items()})
        return (source_layouts.quantize_with_mlx(directory, mode, bits, group, mixed),) * 2

    return make


def gpt_oss(root):
    source_layouts.make_gpt_oss_mxfp4(root / "hf")
    return root / "hf", root / "hf"


def plain_qwen(root):
    directory = source_layouts.make(root / "hf", "qwen3_moe each")
    return directory, quantize_experts(directory)


def biased(root):
    directory = tiny_models.make_checkpoint(root / "hf", "gpt_oss", intermediate_size=64)
    return (source_layouts.quantize_with_mlx(directory, "affine", 4, 64),) * 2


def int4(root):
    directory = source_layouts.make(root / "hf", "deepseek_v3 each")
    return (
        source_layouts.rewrite(directory, source_layouts.to_int4({}), quantization_config=source_layouts.PACKED),
    ) * 2


SOURCES = {
    "deepseek_v3 int4": int4,
    "qwen3 4 bits": mlx_source("qwen3_moe", "affine", 4, 64),
    "qwen3 mixed 3 and 8 bits": mlx_source("qwen3_moe", "affine", 3, 32, True),
    "mixtral 6 bits": mlx_source("mixtral", "affine", 6, 32),
    "olmoe mxfp8": mlx_source("olmoe", "mxfp8", 8, 32),
    "qwen3 nvfp4": mlx_source("qwen3_moe", "nvfp4", 4, 16),
    "gpt-oss mxfp4": gpt_oss,
    "gpt-oss affine": biased,
    "qwen3 not quantized": plain_qwen,
}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """name of a source -> (converted directory, checkpoint that mlx-lm loads to the same codes), made once."""
    done = {}

    def get(name):
        if name not in done:
            root = tmp_path_factory.mktemp(name.replace(" ", "-"))
            source, same = SOURCES[name](root)
            done[name] = convert(source, root / "out"), same
        return done[name]

    return get


def plain_model(directory):
    model, _ = load_model(directory, lazy=True)
    model.set_dtype(mx.float32)
    return model


def logits(model, tokens):
    return np.array(model(mx.array(tokens)))


def budget(directory, share):
    found = plan(directory, context=512, probe=False)
    low, high = found["min_budget_bytes"], found["resident_budget_bytes"]
    return int(low + share * (high - low))


def greedy(model, tokenizer, tokens, count):
    return [r.token for r in stream_generate(model, tokenizer, tokens, max_tokens=count)]


@pytest.mark.parametrize("name", SOURCES)
def test_codes_are_kept_bit_for_bit(made, name):
    directory, same = made(name)
    opened = container.open_model(directory)
    stock, _ = load_model(same, lazy=True)
    for index, found in enumerate(checkpoint.expert_layers(stock)):
        layer = opened.spec.layers[index]
        data = np.fromfile(opened.expert_file(index), np.uint8)
        for e in range(layer.experts):
            start = opened.record_offset(index, e)
            record = data[start : start + layer.record_bytes]
            for matrix, (m, _, _) in zip(
                affine.parse(record, layer.shapes, layer.packing, "x"), layer.matrices, strict=True
            ):
                for key, array in matrix.arrays.items():
                    np.testing.assert_array_equal(array, stored({key: found.module[m][key][e]})[key])
    assert list(verify.find_problems(directory)) == []


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("share", [0, 0.5, 1], ids=["fewest", "half", "all"])
def test_logits_equal_plain_mlx_lm(made, name, share):
    directory, same = made(name)
    plain = plain_model(same)
    model, _ = models.load(directory, memory=budget(directory, share), context=512)
    assert model.tiny_qmoe.budget.mode == ("resident" if share == 1 else "streamed")
    rng = np.random.default_rng(1)
    for shape in ((1, 1), (1, 7), (1, 60), (4, 2)):
        tokens = rng.integers(0, 256, shape)
        want = logits(plain, tokens)
        assert np.abs(logits(model, tokens) - want).max() <= 1e-4 * np.abs(want).max()
    assert set(model.tiny_qmoe.dispatch.counts) == {"affine"}
    model.close()


@pytest.mark.parametrize("name", ["qwen3 4 bits", "gpt-oss mxfp4", "mixtral 6 bits"])
def test_greedy_tokens_equal_plain_mlx_lm_whatever_the_budget(made, name):
    directory, same = made(name)
    tokens = [int(t) for t in np.random.default_rng(1).integers(0, 256, 20)]
    expected = None
    for share in (0, 0.5, 1):
        model, tokenizer = models.load(directory, memory=budget(directory, share), context=512)
        expected = expected or greedy(plain_model(same), tokenizer, tokens, 25)
        assert greedy(model, tokenizer, tokens, 25) == expected
        model.close()


def test_without_the_cpp_library(made, monkeypatch):
    directory, same = made("qwen3 4 bits")
    monkeypatch.setattr(native, "available", lambda: False)
    model, _ = models.load(directory, memory=budget(directory, 1), context=512)
    tokens = np.arange(6)[None]
    want = logits(plain_model(same), tokens)
    assert np.abs(logits(model, tokens) - want).max() <= 1e-4 * np.abs(want).max()
    model.close()


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("resident", [True, False])
def test_a_gpus_product_over_the_pool_equals_the_cpus(made, name, tokens, resident, rng):
    """MLX's gather_qmm over views of the pool, here on the CPU backend, which has it too."""
    directory, same = made(name)
    opened = container.open_model(directory)
    stock = plain_model(same)
    found, layer = checkpoint.expert_layers(stock)[-1], opened.spec.layers[-1]
    kind = expert_kind(layer, opened.spec, found.module.activation)
    data = np.fromfile(opened.expert_file(len(opened.spec.layers) - 1), np.uint8)
    slots = rng.permutation(layer.experts + 3)[: layer.experts]
    base = 4096 - 24
    pool = np.full(base + (layer.experts + 5) * layer.record_bytes, 0xFF, np.uint8)
    for e, slot in enumerate(slots):
        start, to = opened.record_offset(len(opened.spec.layers) - 1, e), base + slot * layer.record_bytes
        pool[to : to + layer.record_bytes] = data[start : start + layer.record_bytes]
    pool = mx.array(pool[: len(pool) // layer.record_bytes * layer.record_bytes].reshape(-1, layer.record_bytes))
    records = ops.gpu_records(pool, base, layer.record_bytes, slots)
    columns = layer.shapes[0][1]
    x = mx.array(rng.normal(size=(2, tokens, columns)).astype(np.float32))
    indices = mx.array(rng.integers(0, layer.experts, (2, tokens, 3)).astype(np.uint32))
    want = np.array(found.module(x, indices))
    if resident:
        got = affine_product.gather(x, indices, records, kind)
    else:
        flat = np.array(indices).reshape(-1).astype(np.int64)
        order = np.argsort(flat, kind="stable")
        z, of = ops.gpu_rotate(x.reshape(-1, columns), kind), flat[order]
        y = ops.gpu_many(z, np.unique(of), of, order // 3, records, kind, ops.Dispatch())
        got = y[mx.array(np.argsort(order))].reshape(2, tokens, 3, -1)
    assert np.abs(np.array(got) - want).max() <= 1e-4 * np.abs(want).max()


def test_the_views_share_the_pools_memory(made):
    directory, _ = made("qwen3 4 bits")
    opened = container.open_model(directory)
    layer = opened.spec.layers[0]
    pool = mx.zeros((200, layer.record_bytes), dtype=mx.uint8)
    mx.eval(pool)
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    places = affine.layout(tuple(layer.shapes), layer.packing)[0]
    views = [affine_product._pool_views(Records(pool, mx.zeros(1), 128), parts) for parts in places]
    mx.eval(views)
    assert mx.get_peak_memory() <= held + 4096


def test_alignment_costs_little():
    assert affine_convert.affine_alignment(13 << 20) == 16384
    for used in (128, 12928, 100_096, 2_654_336, 13_236_608):
        alignment = affine_convert.affine_alignment(used)
        assert alignment == 128 or -used % alignment <= 0.005 * used


def test_what_cannot_be_kept_is_refused(tmp_path):
    directory = tiny_models.make_checkpoint(tmp_path / "hf", "qwen3_moe", moe_intermediate_size=80)
    layer = checkpoint.expert_layers(checkpoint.load_lazy(directory)[0])[0]
    with pytest.raises(
        FormatError, match="down_proj cannot be kept by codec affine: columns should be a multiple of 64"
    ):
        affine_convert.affine_layer_spec(layer, 4, 128)
    with pytest.raises(FormatError, match="bits of mode affine should be one of .*, received '7'"):
        affine_convert.affine_layer_spec(layer, 7, 128)


def test_weights_that_are_not_finite_are_named(tmp_path):
    def spoil(weights):
        name = "model.layers.2.mlp.experts.5.up_proj.weight"
        array = np.array(weights[name])
        array[3, 2] = np.nan
        return {**weights, name: mx.array(array)}

    directory = source_layouts.rewrite(source_layouts.make(tmp_path / "hf", "qwen3_moe each"), spoil)
    layer = checkpoint.expert_layers(checkpoint.load_lazy(directory)[0])[-1]
    own = affine_convert.affine_layer_spec(layer, 4, 128)
    with pytest.raises(ValueError, match=r"\[model.layers.2.mlp.switch_mlp\] up_proj of expert 5 should be finite"):
        list(affine_convert.affine_records(layer, range(4, 8), own))
    assert len(list(affine_convert.affine_records(layer, range(5), own))) == 5
