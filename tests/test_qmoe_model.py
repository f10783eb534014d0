"""Models with the qmoe codec: converted by the command, the same logits as plain mlx-lm on the decoded weights."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import qmoe_records
import tiny_models
from commands import process
from mlx_lm.utils import _get_classes, load_model

from tiny_qmoe_mlx import container, container_writer, models, native_qmoe, ops, verify
from tiny_qmoe_mlx.codecs import qmoe
from tiny_qmoe_mlx.conversion import layer as conversion_layer
from tiny_qmoe_mlx.conversion import qmoe as conversion_qmoe
from tiny_qmoe_mlx.conversion.gptq import grid_of
from tiny_qmoe_mlx.conversion.run import convert
from tiny_qmoe_mlx.conversion.settings import Settings
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.generate import stream_generate
from tiny_qmoe_mlx.original import checkpoint as original
from tiny_qmoe_mlx.plan import plan

pytest_plugins = ["command_fixtures"]

ASKED = {
    "dictionary": {"bits": 1.5},
    "tunstall-8": {"bits": 1.5, "codewords": "tunstall-8"},
    "2-bit": {"bits": 2.0, "codewords": "tunstall-12"},
}
SMALL = {"codec": "qmoe", "rest_bits": 8, "sequences": 4, "sequence_tokens": 64}


@pytest.fixture(scope="module")
def made(tmp_path_factory, checkpoint, text):
    """name of ASKED -> converted directory, made once."""
    done = {}

    def get(name):
        if name not in done:
            out = tmp_path_factory.mktemp("qmoe") / name
            done[name] = convert(checkpoint, out, Settings(calibration=str(text), **SMALL, **ASKED[name]))
        return done[name]

    return get


def records_of(opened, index):
    layer, data = opened.spec.layers[index], np.fromfile(opened.expert_file(index), np.uint8)
    starts = [opened.record_offset(index, e) for e in range(layer.experts)]
    return layer, [data[s : s + layer.record_bytes] for s in starts]


def dense(opened):
    """Every expert matrix as mlx-lm stacks them, by the tests' own decoder."""
    out = {}
    for index in range(len(opened.spec.layers)):
        layer, records = records_of(opened, index)
        for m, (name, _, _) in enumerate(layer.matrices):
            decoded = [qmoe_records.decode(r, m, layer.coding, layer.bias) for r in records]
            out[f"{layer.path}.{name}.weight"] = mx.array(np.stack(decoded).astype(np.float32))
            if layer.bias:
                biases = [qmoe.parse(r, layer.shapes, True, layer.coding, "x")[m].bias for r in records]
                out[f"{layer.path}.{name}.bias"] = mx.array(np.stack(biases))
    return out


def plain_model(directory):
    """Plain mlx-lm on the decoded weights."""
    opened = container.open_model(directory)

    def classes(config):
        base, args = _get_classes(config)

        class Plain(base):
            def sanitize(self, weights):
                kept = {k: w for k, w in weights.items() if not k.endswith((".records", ".checksums"))}
                kept = base.sanitize(self, kept) if hasattr(base, "sanitize") else kept
                return {**kept, **dense(opened)}

        return Plain, args

    model, _ = load_model(directory, lazy=True, model_config={"model_file": None}, get_model_classes=classes)
    model.set_dtype(mx.float32)
    return model


def budget(directory, share):
    found = plan(directory, context=512, probe=False)
    low, high = found["min_budget_bytes"], found["resident_budget_bytes"]
    return int(low + share * (high - low))


def greedy(model, tokenizer, tokens, count):
    return [r.token for r in stream_generate(model, tokenizer, tokens, max_tokens=count)]


@pytest.mark.parametrize("name", ASKED)
def test_logits_equal_plain_mlx_lm_on_the_decoded_weights(made, name):
    plain, rng = plain_model(made(name)), np.random.default_rng(1)
    for share in (0, 1):
        model, _ = models.load(made(name), memory=budget(made(name), share), context=512)
        assert model.tiny_qmoe.budget.mode == ("resident" if share else "streamed")
        for shape in ((1, 1), (1, 7), (1, 60), (4, 2)):
            tokens = mx.array(rng.integers(0, 256, shape))
            want = np.array(plain(tokens))
            assert np.abs(np.array(model(tokens)) - want).max() <= 1e-4 * np.abs(want).max()
        assert set(model.tiny_qmoe.dispatch.counts) == {"qmoe native" if native_qmoe.available() else "qmoe numpy"}
        model.close()


@pytest.mark.parametrize("name", ASKED)
def test_greedy_tokens_do_not_depend_on_the_budget(made, name):
    tokens, expected = list(range(20)), None
    for share in (0, 0.5, 1):
        model, tokenizer = models.load(made(name), memory=budget(made(name), share), context=512)
        expected = expected or greedy(plain_model(made(name)), tokenizer, tokens, 20)
        assert greedy(model, tokenizer, tokens, 20) == expected
        model.close()


def test_without_the_cpp_library(made, monkeypatch):
    monkeypatch.setattr(native_qmoe, "available", lambda: False)
    model, _ = models.load(made("dictionary"), memory=budget(made("dictionary"), 1), context=512)
    tokens = mx.arange(6)[None]
    want = np.array(plain_model(made("dictionary"))(tokens))
    assert np.abs(np.array(model(tokens)) - want).max() <= 1e-4 * np.abs(want).max()
    model.close()


def test_experts_with_biases(tmp_path, text):
    source = tiny_models.make_checkpoint(tmp_path / "hf", "gpt_oss")
    directory = convert(source, tmp_path / "out", Settings(calibration=str(text), bits=1.5, **SMALL))
    assert list(verify.find_problems(directory)) == []
    tokens = mx.arange(9)[None]
    want = np.array(plain_model(directory)(tokens))
    model, _ = models.load(directory, memory=budget(directory, 1), context=512)
    assert np.abs(np.array(model(tokens)) - want).max() <= 1e-4 * np.abs(want).max()
    model.close()


# ---- conversion


@pytest.mark.parametrize("name", ASKED)
def test_records_have_the_size_of_the_layers_largest(made, name):
    opened = container.open_model(made(name))
    assert list(verify.find_problems(made(name))) == []
    for index in range(len(opened.spec.layers)):
        layer, records = records_of(opened, index)
        used = [int(r[8:12].view("<u4")[0]) for r in records]
        assert max(used) <= layer.record_bytes < max(used) + opened.spec.alignment
    counted = container.bits_per_weight(opened.spec.layers, opened.spec.alignment)
    assert opened.spec.bits == pytest.approx(counted, abs=1e-4)


def test_without_calibration_every_weight_is_the_nearest_of_its_row(checkpoint, tmp_path):
    directory = convert(checkpoint, tmp_path / "out", Settings(calibration="none", codec="qmoe", bits=1.5))
    opened = container.open_model(directory)
    for index, found in enumerate(original.expert_layers(original.load_lazy(checkpoint)[0])):
        weights, _ = original.expert_weights(found, range(8))
        layer, records = records_of(opened, index)
        for m, w in enumerate(weights):
            grid = grid_of(w, "ternary")
            for e in range(8):
                symbols = np.stack([grid.symbols(w[..., c]) for c in range(w.shape[2])], -1)[e]
                want = np.take_along_axis(grid.value[e], symbols.astype(np.int64), -1)
                np.testing.assert_array_equal(qmoe_records.decode(records[e], m, layer.coding, False), want)


def test_a_stopped_conversion_goes_on_with_the_same_bytes(made, checkpoint, text, tmp_path, monkeypatch):
    settings, whole = Settings(calibration=str(text), **SMALL, **ASKED["dictionary"]), made("dictionary")
    real, seen = conversion_layer.convert_layer, []

    def stopped(job, index, *rest):
        if index == 2:
            raise KeyboardInterrupt
        real(job, index, *rest)
        seen.append(index)

    monkeypatch.setattr("tiny_qmoe_mlx.conversion.run.convert_layer", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, tmp_path / "dictionary", settings)
    monkeypatch.undo()
    assert seen == [0, 1] and (tmp_path / "dictionary.partial").is_dir()
    directory = convert(checkpoint, tmp_path / "dictionary", settings)
    for path in sorted(whole.iterdir()):
        if path.suffix in (".safetensors", ".json"):
            assert path.read_bytes() == (directory / path.name).read_bytes(), path.name


def test_a_spool_that_a_kill_left_does_not_stay(checkpoint, tmp_path, monkeypatch):
    def kill(*inputs: object) -> None:
        raise KeyboardInterrupt

    settings = Settings(calibration="none", codec="qmoe", bits=1.5)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(conversion_layer, "qmoe_records", kill)
        convert(checkpoint, tmp_path / "out", settings)
    (tmp_path / "out.partial" / ".partial-records").write_bytes(b"half")
    out = convert(checkpoint, tmp_path / "out", settings)
    assert not any(p.name.startswith(".partial") for p in out.iterdir())


def test_the_hessians_see_at_most_four_times_the_average(checkpoint, text, tmp_path, monkeypatch):
    asked, seen, real = [], [], conversion_qmoe.hessians
    monkeypatch.setattr(conversion_qmoe, "hessians", lambda x: seen.append([len(i) for i in x]) or real(x))
    monkeypatch.setattr(conversion_qmoe, "most_tokens", lambda *numbers: asked.append(numbers) or 5)
    convert(checkpoint, tmp_path / "out", Settings(calibration=str(text), bits=1.5, **SMALL))
    assert asked == [(4 * 64, 4, 8)] * 2  # tokens, picks of each, experts; 2 layers
    assert len(seen) == 4 and all(max(sizes) == 5 for sizes in seen)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 3.0}, "bits of codec qmoe should be 1.5 .* or 2 .*, received 3.0"),
        ({"bits": 2.0}, "the dictionary is of ternary weights"),
        ({"bits": 1.5, "codewords": "zip"}, "codewords should be one of"),
        ({"bits": 1.5, "layer_rates": True}, "leave out layer_rates"),
    ],
)
def test_settings_that_do_not_serve(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(codec="qmoe", **change).check()


# ---- commands


COMMAND = (*"--codec qmoe --calibration-sequences 8 --calibration-tokens 64 --report none --quiet".split(),)


@pytest.mark.slow
def test_the_commands(checkpoint, text, tmp_path):
    out = tmp_path / "model"
    made = process("convert", "--hf-path", checkpoint, "--mlx-path", out, "--calibration", text, *COMMAND)
    assert made.status == 0 and "bits per weight" in made.out, made
    assert json.loads((out / "config.json").read_text())["tiny_qmoe"]["layers"][0]["coding"] == {
        "grid": "ternary", "code": "dictionary", "bits": 16,
    }  # fmt: skip
    assert process("verify", "--model", out, "--quiet").status == 0
    told = process("generate", "--model", out, "--prompt", "a", "--max-tokens", "5", "--quiet")
    assert told.status == 0, told
    measured = process("evaluate", "--model", out, "--text", text, "--against", checkpoint, "--quiet", "--json")
    assert measured.status == 0 and 0 < json.loads(measured.out)["kl_mean"] < 20


@pytest.mark.parametrize("name", ["dictionary", "2-bit"])
def test_the_plan_probes_products_of_the_codec(made, name):
    assert plan(made(name), context=512)["tokens_per_s"] > 0


def test_a_damaged_record_is_named(made, tmp_path):
    """Its checksums made right again, so that only the codec's own check can find it."""
    directory = shutil.copytree(made("dictionary"), tmp_path / "copy")
    opened = container.open_model(directory)
    layer, records = records_of(opened, 0)
    spoiled = records[3].copy()
    spoiled[128 + 16 : 128 + 20] = 1  # the first row's place
    path, start = opened.expert_file(0), opened.record_offset(0, 3)
    sums = opened.record_offset(0, 0) + layer.experts * layer.record_bytes
    data = bytearray(path.read_bytes())
    data[start : start + len(spoiled)] = spoiled.tobytes()
    at = sums + 3 * 8 * layer.checksums
    data[at : at + 8 * layer.checksums] = container.record_checksums(spoiled).tobytes()
    path.write_bytes(data)
    (directory / "tiny_qmoe_manifest.json").unlink()
    container_writer.write_manifest(directory)
    found = list(verify.find_problems(directory))
    assert [(p.layer, p.expert) for p in found] == [(layer.layer, 3)] and "first row should begin" in found[0].problem
    with pytest.raises(FormatError, match="first row should begin"):
        models.load(directory, memory=budget(directory, 1), context=512)


def test_a_gpu_takes_few_tokens_straight_from_codewords_and_writes_matrices_out_for_many(made):
    opened = container.open_model(made("dictionary"))
    kind = conversion_layer.expert_kind(opened.spec.layers[0], opened.spec, None)
    assert ops.gpu_from_records(8, 8, 8, kind) and not ops.gpu_from_records(5000, 8, 8, kind)
    assert not ops.from_records(1, kind)
    assert ops.gpu_group_size(kind) > 8 and ops.gpu_rotate(mx.zeros((1, 64)), kind).shape == (1, 64)
