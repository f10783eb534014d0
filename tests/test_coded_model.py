"""Models with the codecs tiny-qmoe and lossless: logits of plain mlx-lm on the same weights, one layer expanded at a
time, every shipped bit kept, damage refused.
"""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import source_layouts
import tiny_models
from container_files import edit_config, edit_manifest, entry_of, one_sentence
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from safetensors.numpy import save_file

from tiny_qmoe_mlx import container, models, native, verify
from tiny_qmoe_mlx.codecs import levels, packed, tuples
from tiny_qmoe_mlx.conversion import run as conversion
from tiny_qmoe_mlx.conversion import unfinished
from tiny_qmoe_mlx.conversion.settings import Settings
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.expert_kind import expert_kind
from tiny_qmoe_mlx.generate import stream_generate
from tiny_qmoe_mlx.plan import plan

pytest_plugins = ["command_fixtures"]
pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
TOKENS = np.random.default_rng(1).integers(0, 256, (1, 12))
EXPERTS = "model-experts-00001.safetensors"


def bfloat16(directory: Path) -> Path:
    return source_layouts.rewrite(directory, lambda w: {n: a.astype(mx.bfloat16) for n, a in w.items()})


def llama(root, family="llama"):
    return bfloat16(tiny_models.make_checkpoint(root / "hf", family, num_hidden_layers=3))


def quantized(family, mode, bits, group):
    return lambda root: source_layouts.quantize_with_mlx(llama(root, family), mode, bits, group)


def mixture(root):
    return source_layouts.quantize_with_mlx(
        bfloat16(tiny_models.make_checkpoint(root / "hf", "qwen3_moe")), "affine", 4, 32
    )


def gpt_oss(root):
    source_layouts.make_gpt_oss_mxfp4(root / "hf")
    return root / "hf"


def int4(root):
    directory = source_layouts.make(root / "hf", "deepseek_v3 each")
    change = source_layouts.to_int4({})
    return source_layouts.rewrite(directory, change, quantization_config=source_layouts.PACKED)


LEVELS = {f"{group} {coder}": (group, coder) for group in levels.GROUPS for coder in packed.CODERS}
LOSSLESS = {
    "llama bfloat16": llama,
    "qwen2 with biases, 4 bits": quantized("qwen2", "affine", 4, 32),
    "llama 3 bits": quantized("llama", "affine", 3, 32),
    "llama 8 bits": quantized("llama", "affine", 8, 64),
    "llama mxfp4": quantized("llama", "mxfp4", 4, 32),
    "qwen3 mixture, 4 bits": mixture,
    "gpt-oss mxfp4": gpt_oss,
    "deepseek int4": int4,
}
MIXTURES = ("qwen3 mixture, 4 bits", "gpt-oss mxfp4", "deepseek int4")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(source, converted) by what is converted how, made once."""
    done = {}

    def get(name):
        if name not in done:
            root = tmp_path_factory.mktemp("made")
            source = LOSSLESS.get(name, llama)(root)
            settings = Settings(codec="lossless")
            if name in LEVELS:
                group, coder = LEVELS[name]
                settings = Settings(codec="tiny-qmoe", group=group, coder=coder, rest_bits=16)
            done[name] = source, conversion.convert(source, root / "out", settings)
        return done[name]

    return get


def plain(source):
    """Stock mlx-lm, in float32 as the CPU computes."""
    model, _ = load_model(source)
    model.set_dtype(mx.float32)
    return model


def rounded(model, group):
    """Its decoder layers' matrices put through levels and back, in place."""
    inside = [(n, w) for n, w in tree_flatten(model.parameters()) if ".layers." in n and w.ndim == 2]
    assert len(inside) == 3 * 7
    new = [(n, mx.array(levels.dequantize(levels.quantize(np.array(w), group), group))) for n, w in inside]
    model.load_weights(new, strict=False)
    return model


def logits(model):
    return np.array(model(mx.array(TOKENS)))


def budget(directory, share):
    found = plan(directory, context=512, probe=False)
    low, high = found["min_budget_bytes"], found["resident_budget_bytes"]
    return int(low + share * (high - low))


def greedy(model, tokenizer, count=12):
    return [r.token for r in stream_generate(model, tokenizer, TOKENS[0].tolist(), max_tokens=count)]


# ---- the same numbers


@pytest.mark.parametrize("name", LEVELS)
def test_tiny_qmoe_computes_what_mlx_lm_does_on_the_rounded_weights(made, name):
    source, directory = made(name)
    want = logits(rounded(plain(source), LEVELS[name][0]))
    with models.load(directory, context=512)[0] as model:
        np.testing.assert_allclose(logits(model), want, rtol=0, atol=1e-5 * np.abs(want).max())  # seen: 0
        counts = model.tiny_qmoe.stats()["dispatch"]
    assert counts == {"layers expanded": 3}
    assert np.abs(want - logits(plain(source))).max() > 1e-3 * np.abs(want).max()  # rounding does something


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_computes_what_mlx_lm_does_on_the_checkpoint(made, name):
    source, directory = made(name)
    want = logits(plain(source))
    with models.load(directory, context=512)[0] as model:
        np.testing.assert_allclose(logits(model), want, rtol=0, atol=2e-5 * np.abs(want).max())  # sums in another order


@pytest.mark.parametrize("name", LOSSLESS)
def test_every_shipped_bit_is_kept(made, name):
    """Of decoder layers one matrix is one array; of a mixture's experts each has its part of an array."""
    source, directory = made(name)
    opened = container.open_model(directory)
    stock = dict(tree_flatten(load_model(source, lazy=True)[0].parameters()))
    for index, layer in enumerate(opened.spec.layers):
        data = np.fromfile(opened.expert_file(index), np.uint8)
        records = [data[opened.record_offset(index, e) :][: layer.record_bytes] for e in range(layer.experts)]
        experts = [packed.expand(r, layer.shapes, layer.packing, "x") for r in records]
        for m, (path, _, _) in enumerate(layer.matrices):
            for key in experts[0][m].arrays:
                array = np.stack([matrices[m].arrays[key] for matrices in experts])
                want = stock.pop(f"{layer.path}.{path}.{key}")
                want = np.array(want.view(mx.uint16) if want.dtype == mx.bfloat16 else want)
                want = want if name in MIXTURES else want[None]
                assert array.dtype == want.dtype
                np.testing.assert_array_equal(array, want)
    coded = tuple(f"{layer.path}." for layer in opened.spec.layers)
    assert not any(w.ndim > 1 for n, w in stock.items() if n.startswith(coded))  # all matrices were there


@pytest.mark.parametrize("name", ["128 rans", "qwen3 mixture, 4 bits", "llama bfloat16"])
def test_streamed_and_resident_write_the_same(made, name):
    _, directory = made(name)
    with models.load(directory, context=512)[0] as model:
        tokenizer = models.open_tokenizer(directory)
        want = greedy(model, tokenizer)
        assert model.tiny_qmoe.stats()["mode"] == "resident"
    for share in (0, 0.5):
        with models.load(directory, budget(directory, share), 512)[0] as model:
            assert greedy(model, tokenizer) == want
            stats = model.tiny_qmoe.stats()
        assert stats["mode"] == "streamed" and stats["expert_misses"] > 0


@pytest.mark.parametrize("name", ["128 tuples", "llama mxfp4"])
def test_mlx_lms_own_loader_gives_the_same(made, name):
    """As mlx_lm.generate opens the directory with --trust-remote-code."""
    _, directory = made(name)
    with models.load(directory, context=512)[0] as model:
        want = logits(model)
    model, _ = load_model(directory, trust_remote_code=True)
    np.testing.assert_array_equal(logits(model), want)
    model.close()


def test_one_layer_is_expanded_at_a_time(made, monkeypatch):
    from tiny_qmoe_mlx import whole

    _, directory = made("128 rans")
    model, _ = models.load(directory, context=512)
    held, fill = [], whole.fill

    def watched(module, matrix, dtype):
        fill(module, matrix, dtype)
        held.append(sum("weight" in part for layer in model.layers for part in layer._parts()))

    with model, monkeypatch.context() as m:
        m.setattr(whole, "fill", watched)
        logits(model)
        assert held == 3 * [1, 2, 3, 4, 5, 6, 7]
        assert not any("weight" in part for layer in model.layers for part in layer._parts())


def test_layers_are_expanded_for_their_checks_by_one_thread(made, monkeypatch):
    """Whichever threads read: a layer in each at once, or what the allocator keeps for each, is in no plan."""
    from tiny_qmoe_mlx.streaming import store

    _, directory = made("128 rans")
    opened, threads, check = container.open_model(directory), set(), store.check_record
    kinds = [expert_kind(layer, opened.spec, nn.Identity()) for layer in opened.spec.layers]

    def watched(*args):
        threads.add(threading.get_ident())
        check(*args)

    monkeypatch.setattr(store, "check_record", watched)
    read = store.ExpertStore(opened, kinds)
    into = [np.empty(layer.slot, np.uint8) for layer in opened.spec.layers]
    with ThreadPoolExecutor(3) as readers:
        barrier = threading.Barrier(3)
        list(readers.map(lambda i: (barrier.wait(), read.read(i, [0], [into[i]])), range(3)))
    read.close()
    assert len(threads) == 1


# ---- files


def test_files_say_how_planes_are_coded_and_verify_reads_them(made):
    for name in ("128 tuples", "0 rans", "llama 3 bits", "gpt-oss mxfp4"):
        _, directory = made(name)
        assert list(verify.find_problems(directory)) == []
        coding = json.loads((directory / "quality.json").read_text())["coding"]
        assert sum(part["planes"] for part in coding.values()) > 3 * 7
        files = container.open_model(directory).spec.layers
        assert sum(part["bytes"] for part in coding.values()) <= sum(x.experts * x.record_bytes for x in files)
    coding = json.loads((made("llama bfloat16")[1] / "quality.json").read_text())["coding"]
    assert coding["rans"]["planes"] == coding["no coder"]["planes"] == 3 * 7  # exponents; signs and mantissas


def test_lossless_is_smaller_than_what_was_shipped(made):
    """Noise of a few kilobytes; real weights are benchmarked."""
    _, directory = made("llama bfloat16")
    assert container.open_model(directory).spec.bits < 13


def test_a_stopped_conversion_goes_on_with_the_same_bytes(made, tmp_path, monkeypatch):
    source, directory = made("128 tuples")
    settings = Settings(codec="tiny-qmoe", group=128, coder="tuples", rest_bits=16)
    save = unfinished.save_state

    def stop_after(directory, layer, *rest):
        save(directory, layer, *rest)
        if layer == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(unfinished, "save_state", stop_after)
        conversion.convert(source, tmp_path / "out", settings)
    conversion.convert(source, tmp_path / "out", settings)
    skip = ("README.md", "tiny_qmoe_manifest.json")
    files = {p.name: p.read_bytes() for p in directory.iterdir() if p.name not in skip}
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.name not in skip} == files


def damaged(made, name, tmp_path):
    out = tmp_path / "model"
    shutil.copytree(made(name)[1], out)
    return out


def test_damage_in_a_record_is_found_by_verify_and_by_load(made, tmp_path):
    out = damaged(made, "128 rans", tmp_path)
    opened = container.open_model(out)
    with open(out / EXPERTS, "r+b") as file:
        file.seek(opened.record_offset(1, 0) + 3000)
        file.write(b"\xff\x00\xff")
    problems = list(verify.find_problems(out))
    assert [p.layer for p in problems] == [1] and "checksum" in problems[0].problem
    with pytest.raises(FormatError, match="checksum"):
        models.load(out, context=512)


def test_a_damaged_table_is_refused_at_opening(made, tmp_path):
    out = damaged(made, "0 tuples", tmp_path)
    save_file({tuples.TENSOR: np.zeros((2, 4), np.uint8)}, out / tuples.FILE)
    with pytest.raises(FormatError, match=tuples.FILE):
        models.load(out, context=512)
    edit_manifest(out, lambda m: m["files"].update({tuples.FILE: entry_of(out / tuples.FILE)}))
    with pytest.raises(FormatError, match="distinct rows"):
        models.load(out, context=512)
    assert any(p.file == tuples.FILE for p in verify.find_problems(out))


def layer(change):
    return lambda spec: change(spec["layers"][1])


WRONG = {
    "no slot bytes": (layer(lambda x: x.pop("slot_bytes")), "matrices should be"),
    "slots smaller than records": (layer(lambda x: x.update(slot_bytes=128)), "slot_bytes of"),
    "slots of text": (layer(lambda x: x.update(slot_bytes="9")), "slot_bytes of"),
    "two experts": (layer(lambda x: x.update(experts=2)), "one record without biases"),
    "a name twice": (layer(lambda x: x["matrices"].__setitem__(0, x["matrices"][1])), "matrices should be"),
    "a name that is none": (layer(lambda x: x["matrices"][0].__setitem__(0, "a/b")), "matrices should be"),
    "a packing too few": (layer(lambda x: x["packing"].pop()), "one per matrix"),
    "a mode of another codec": (
        layer(lambda x: x["packing"][0].update(mode="mxfp4", bits=4, group_size=32)),
        "packing of",
    ),
    "another codec": (lambda spec: spec.update(codec="lossless"), "should be one of codec lossless"),
    "codec affine": (lambda spec: spec.update(codec="affine"), "slot_bytes if and only if"),
    "a length": (lambda spec: spec.update(length=12), "should be 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_config_that_contradicts_itself_is_refused(made, tmp_path, name):
    out = damaged(made, "128 rans", tmp_path)
    change, words = WRONG[name]
    edit_config(out, change)
    with pytest.raises(FormatError, match=words) as error:
        container.open_model(out)
    one_sentence(error.value)


def test_matrices_that_are_not_the_models_are_refused(made, tmp_path):
    out = damaged(made, "128 rans", tmp_path)
    edit_config(out, layer(lambda x: x["matrices"][0].__setitem__(0, "self_attn.other")))
    with pytest.raises(FormatError, match="linear layers of their shapes"):
        models.load(out, context=512)


# ---- what is not taken


def test_what_the_codecs_do_not_take_is_refused(tmp_path):
    moe = bfloat16(tiny_models.make_checkpoint(tmp_path / "moe", "qwen3_moe"))
    for settings, words in (
        (Settings(codec="tiny-qmoe"), "takes dense models"),
        (Settings(codec="lossless"), "these are not quantized"),
    ):
        with pytest.raises(FormatError, match=words) as error:
            conversion.convert(moe, tmp_path / "out", settings)
        one_sentence(error.value)
    for settings, words in (
        (Settings(codec="tiny-qmoe", bits=4), "no bits to choose"),
        (Settings(codec="tiny-qmoe", group=64), "the group should be"),
        (Settings(codec="tiny-qmoe", coder="lzw"), "the coder one of"),
    ):
        with pytest.raises(ValueError, match=words):
            conversion.convert(moe, tmp_path / "out", settings)
    with pytest.raises(ValueError, match="--stream-shards"):
        conversion.convert(moe, tmp_path / "out", Settings(codec="lossless"), stream_shards=True)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    source = llama(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    source_layouts.rewrite(
        source, lambda w: {**w, name: mx.where(mx.arange(w[name].size).reshape(w[name].shape) == 5, mx.nan, w[name])}
    )
    for codec in ("tiny-qmoe", "lossless"):
        with pytest.raises(ValueError, match="layers.1.mlp.up_proj"):
            conversion.convert(source, tmp_path / "out", Settings(codec=codec))


# ---- commands


def test_convert_generate_and_plan(here, tmp_path):
    source, out = llama(tmp_path), tmp_path / "out"
    line = ("--hf-path", source, "--mlx-path", out, "--codec", "tiny-qmoe", "--coder", "rans", "--group-size", 0)
    done = here("convert", *line, "--report", "none", "--json")
    assert done.status == 0 and 0 < json.loads(done.out)["bits"] < 16
    done = here("generate", "--model", out, "--prompt", "hello", "--max-tokens", 3, "--context", 256, "--json")
    assert done.status == 0 and len(json.loads(done.out)["tokens"]) <= 3
    done = here("plan", "--model", out, "--context", 256, "--json")
    assert done.status == 0 and json.loads(done.out)["mode"] == "resident"
