"""Conversion as a whole: the two streams, sizes of layers, what it computes against mlx-lm's own layers."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_unflatten

from tiny_qmoe_mlx import native
from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.conversion import layerwise, sensitivity
from tiny_qmoe_mlx.conversion import run as conversion
from tiny_qmoe_mlx.conversion.expert_pass import Sums, original_outputs
from tiny_qmoe_mlx.conversion.settings import Settings
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.expert_kind import ExpertKind
from tiny_qmoe_mlx.models import load
from tiny_qmoe_mlx.original import checkpoint
from tiny_qmoe_mlx.verify import find_problems

pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
FAMILIES = ("qwen3_moe", "ernie4_5_moe", "mixtral", "gpt_oss")
SETTINGS = Settings(bits=3.0, calibration="", sequences=8, sequence_tokens=64)


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory) -> Path:
    return tiny_models.make_checkpoint(tmp_path_factory.mktemp(request.param) / "hf", request.param)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(0)
    path.write_text(" ".join(rng.choice(["river", "stone", "light", "walks", "under", "old", "quick", "bright"], 4000)))
    return path


def open_float32(source: Path):
    model, config = checkpoint.load_lazy(source)
    model.set_dtype(mx.float32)
    return model, config


def tokens_of(config: dict, rows: int = 3, length: int = 40, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config["vocab_size"], (rows, length)).astype(np.int32)


def test_streams_are_what_mlx_lm_computes(source):
    """Layer by layer with the experts taken out and put back as weighted sums, against the model's own forward pass."""
    model, config = open_float32(source)
    tokens = tokens_of(config, seed=5)  # of seed 1 one choice of a router hangs on rounding, by the machine
    expected = model(mx.array(tokens))
    model, _ = open_float32(source)
    found = {f.layer: f for f in checkpoint.expert_layers(model)}
    experts = {layer: layerwise.Experts() for layer in found}
    model.update_modules(tree_unflatten([(f.path, experts[layer]) for layer, f in found.items()]))

    def visit(index, layer, call, x):
        stream = np.array(x)
        if index not in found:
            return mx.array(layerwise.run(call, stream))
        f = found[index]
        shapes = tuple(checkpoint.matrix_shapes(f))
        kind = ExpertKind(shapes, checkpoint.has_bias(f), 12, 0, index, f.module.activation)
        routed = layerwise.route(call, experts[index], stream, shapes[-1][1])
        assert routed.linear
        (outputs,) = original_outputs(f, kind, [routed])
        return mx.array(layerwise.finish(call, experts[index], stream, routed, outputs))

    got = layerwise.run_layers(model, tokens, visit, to_logits=True)
    assert np.abs(np.array(got) - np.array(expected)).max() < 2e-4 * max(1, np.abs(np.array(expected)).max())


def test_a_layer_that_is_not_linear_in_its_experts_is_run_again(source):
    model, config = open_float32(source)
    found = checkpoint.expert_layers(model)[0]
    layer, experts = model.layers[found.layer], layerwise.Experts()
    stream = np.random.default_rng(2).standard_normal((2, 20, config["hidden_size"])).astype(np.float32)
    call = lambda x: layer(mx.array(x), None)  # noqa: E731
    expected = np.array(call(stream))
    model.update_modules(tree_unflatten([(found.path, experts)]))
    width = checkpoint.matrix_shapes(found)[-1][1]
    routed = layerwise.route(call, experts, stream, width)
    routed.linear = False
    sums = Sums(routed, width)
    y = np.array(found.module(mx.array(routed.x), mx.array(routed.chosen)))
    sums.values[:] = y
    got = layerwise.finish(call, experts, stream, routed, sums.values)
    assert np.abs(got - expected).max() < 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("layer_rates", [True, False])
def test_bits_are_those_of_the_files(source, text, tmp_path, layer_rates):
    settings = replace(SETTINGS, calibration=str(text), layer_rates=layer_rates)
    out = conversion.convert(source, tmp_path / "out", settings)
    spec = open_model(out).spec
    weights = sum(layer.weights for layer in spec.layers)
    counted = 8 * sum((out / layer.file).stat().st_size for layer in spec.layers) / weights
    assert abs(counted - spec.bits) < 1e-3
    assert abs(counted - 3.0) < 0.1, "experts of 64 x 64 weights: steps are coarse"
    sizes = {layer.record_bytes for layer in spec.layers}
    assert len(sizes) <= 4 and (layer_rates or len(sizes) == 1)
    model, _ = load(out)
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])))).all()
    model.close()


def test_drift_is_less_with_the_correction(source, text, tmp_path):
    errors = {}
    for drift in (True, False):
        settings = replace(SETTINGS, bits=1.5, calibration=str(text), layer_rates=False, drift=drift, rest_bits=16)
        out = conversion.convert(source, tmp_path / str(drift), settings)
        quality = json.loads((out / "quality.json").read_text())
        errors[drift] = quality["layers"][-1]["relative_error"]
    assert errors[True] < errors[False]


def test_sensitivities_are_positive_and_the_same_every_time(source):
    model, config = open_float32(source)
    found = checkpoint.expert_layers(model)
    kinds = {
        f.layer: ExpertKind(
            tuple(checkpoint.matrix_shapes(f)), checkpoint.has_bias(f), 12, 0, f.layer, f.module.activation
        )
        for f in found
    }
    tokens = tokens_of(config, 8, 64)
    measured = sensitivity.sensitivities(source, kinds, tokens, lambda *a: None)
    assert measured.shape == (len(found),) and (measured > 0).all() and np.isfinite(measured).all()
    again = sensitivity.sensitivities(source, kinds, tokens, lambda *a: None)
    assert np.array_equal(measured, again)


def test_affine_codes_of_an_unquantized_checkpoint(source, tmp_path):
    settings = replace(SETTINGS, codec="affine", bits=4, calibration="none", rest_bits=16)
    if json.loads((source / "config.json").read_text())["model_type"] in ("mixtral", "gpt_oss"):
        with pytest.raises(FormatError, match="columns should be a multiple of 64"):
            conversion.convert(source, tmp_path / "out", settings)
        return
    out = conversion.convert(source, tmp_path / "out", settings)
    model, _ = load(out)
    tokens = mx.array([[1, 2, 3, 4]])
    got = np.array(model(tokens))
    model.close()
    plain, _ = open_float32(source)
    paths = tuple(f.path for f in checkpoint.expert_layers(plain))
    nn.quantize(plain, 64, 4, class_predicate=lambda path, m: hasattr(m, "to_quantized") and path.startswith(paths))
    expected = np.array(plain(tokens))
    assert np.abs(got - expected).max() < 2e-3 * np.abs(expected).max()


def test_stream_shards_wants_one_reading(source, tmp_path):
    with pytest.raises(ValueError, match="every shard should be read once"):
        conversion.convert(source, tmp_path / "out", replace(SETTINGS, layer_rates=True), stream_shards=True)


@pytest.mark.slow
def test_gains_are_finetuned_after_a_conversion_and_later(source, text, tmp_path):
    settings = replace(SETTINGS, bits=1.5, calibration=str(text), sequences=16, rest_bits=16)
    out = conversion.convert(source, tmp_path / "out", settings)
    plain = {p.name: p.read_bytes() for p in out.iterdir()}
    conversion.convert(source, out, settings, finetune=True)
    found = json.loads((out / "quality.json").read_text())["finetune"]
    assert found["kl_after"] < found["kl_before"] or not found["changed"]
    assert {p.name for p in out.iterdir()} == set(plain)
    assert not list(find_problems(out))
    at_once = conversion.convert(source, tmp_path / "once" / "out", settings, finetune=True)
    experts = [name for name in plain if "experts" in name]
    assert all((at_once / name).read_bytes() == (out / name).read_bytes() for name in experts)


@pytest.mark.parametrize("options", [{"finetune": True, "stream_shards": True}, {"finetune": True}])
def test_finetuning_wants_the_original_and_tokens(source, tmp_path, options):
    with pytest.raises(ValueError, match="finetuning needs the original on the disk"):
        conversion.convert(source, tmp_path / "out", replace(SETTINGS, calibration="none"), **options)


@pytest.mark.parametrize("normed", [False, True])
def test_a_norm_after_the_experts_is_no_sum(normed):
    """Its derivatives at zero look like weights; as Gemma 2 and 3 have it."""
    experts, stream = layerwise.Experts(), np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)

    def call(part: np.ndarray) -> mx.array:
        x = mx.array(part)
        found = experts(x, mx.zeros((*x.shape[:-1], 1), mx.uint32))[..., 0, :]
        return x + (mx.fast.rms_norm(found, mx.ones(8), 1e-6) if normed else 0.5 * found)

    routed = layerwise.route(call, experts, stream, 8)
    assert routed.linear is not normed
    np.testing.assert_allclose(routed.weight, 1.0 if normed else 0.5, rtol=1e-6)
