"""What `plan` times of coded models: noise that is coded as the model is, scaled to its weights, and added up."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import source_layouts
import tiny_models

from tiny_qmoe_mlx import budget, coded_probe, container, forecast, native, probes, speed
from tiny_qmoe_mlx.codecs import packed
from tiny_qmoe_mlx.conversion import run as conversion
from tiny_qmoe_mlx.conversion.settings import Settings
from tiny_qmoe_mlx.plan import plan

pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
TINY = {f"{group} {coder}": (group, coder) for group in (0, 128) for coder in packed.CODERS}
SHIPPED = {
    "llama, bfloat16": ("llama", None),
    "llama, 3 bits": ("llama", ("affine", 3, 32)),
    "llama, mxfp4": ("llama", ("mxfp4", 4, 32)),
    "mixture, 4 bits": ("qwen3_moe", ("affine", 4, 32)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A converted model by name, made once."""
    made = {}

    def get(name):
        if name not in made:
            root = tmp_path_factory.mktemp("model")
            family, quantization = SHIPPED.get(name, ("llama", None))
            sizes = {"hidden_size": 256, "intermediate_size": 512} if name in TINY else {}  # tables of rANS are small
            source = tiny_models.make_checkpoint(root / "hf", family, **sizes)
            source_layouts.rewrite(source, lambda w: {n: a.astype(mx.bfloat16) for n, a in w.items()})
            if quantization:
                source = source_layouts.quantize_with_mlx(source, *quantization)
            settings = Settings(codec="lossless")
            if name in TINY:
                settings = Settings(codec="tiny-qmoe", group=TINY[name][0], coder=TINY[name][1], rest_bits=16)
            made[name] = container.open_model(conversion.convert(source, root / "out", settings))
        return made[name]

    return get


@pytest.mark.parametrize("name", SHIPPED)
def test_noise_is_coded_as_the_models_records_are(model, name):
    """Plane by plane the same method, and as many bytes but for a tenth: weights of tiny models are noise too."""
    opened = model(name)
    index = len(opened.spec.layers) // 2
    layer = opened.spec.layers[index]
    kind = coded_probe._cut(layer)
    assert kind.shapes == layer.shapes and kind.packing == layer.packing  # small enough to be whole
    data = np.fromfile(opened.expert_file(index), np.uint8)[opened.record_offset(index, 0) :][: layer.record_bytes]
    ours, theirs = packed.methods(coded_probe._record(kind, opened)), packed.methods(data)
    assert [m for m, _ in ours] == [m for m, _ in theirs]
    assert sum(n for _, n in ours) == pytest.approx(sum(n for _, n in theirs), rel=0.1)


@pytest.mark.parametrize(
    ("name", "method"), [("128 tuples", packed.RAW), ("128 rans", packed.RANS), ("0 rans", packed.RANS)]
)
def test_8_bit_codes_of_noise(model, name, method):
    """As those of real weights: none is smaller by the table of 4-tuples, all are by rANS."""
    opened = model(name)
    record = coded_probe._record(coded_probe._cut(opened.spec.layers[1]), opened)
    codes = [m for m, size in packed.methods(record) if size > 50_000]  # of matrices whose table is small beside them
    assert len(codes) == 3 and set(codes) == {method}


def test_a_large_layer_is_cut_in_rows(model):
    layer = model("llama, 3 bits").spec.layers[0]
    whole = sum(rows * columns for rows, columns in layer.shapes)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(coded_probe, "MOST_WEIGHTS", whole // 3)
        kind = coded_probe._cut(layer)
    assert 0 < sum(rows * columns for rows, columns in kind.shapes) <= whole // 3
    assert [c for _, c in kind.shapes] == [c for _, c in layer.shapes]


@pytest.mark.parametrize("name", [*TINY, *(n for n in SHIPPED if "mixture" not in n)])
def test_a_layers_time_is_scaled_to_the_model(model, monkeypatch, name):
    """With a second for what is timed, which is run once: a layer expanded and multiplied."""
    opened, products = model(name), []
    called = nn.Linear.__call__
    monkeypatch.setattr(nn.Linear, "__call__", lambda self, x: products.append(self.weight.shape) or called(self, x))
    monkeypatch.setattr(probes, "seconds", lambda work, **how: (work(), 1.0)[1])
    layers = opened.spec.layers
    assert coded_probe.layer_seconds(opened) == pytest.approx(len(layers))
    if not any(own.mode in ("affine", "mxfp4") for own in layers[0].packing):
        assert products == layers[1].shapes
    assert speed.experts(opened, 8) == pytest.approx(len(layers))


def test_experts_are_decoded_where_they_are_not_in_memory(model, monkeypatch):
    opened = model("mixture, 4 bits")
    monkeypatch.setattr(probes, "seconds", lambda work, **how: (work(), 1.0)[1])
    layer = opened.spec.layers[0]
    weights = sum(rows * columns for rows, columns in layer.shapes)
    assert coded_probe.record_seconds(opened) == pytest.approx(1 / weights)
    monkeypatch.setattr(speed, "experts", lambda container, k: 0.25)
    monkeypatch.setattr(speed, "dense", lambda container: 0.5)
    low = budget.split(opened, 1 << 50).min_budget_bytes
    chosen = sum(min(forecast.footprint.top_k(opened.config), x.experts) for x in opened.spec.layers)
    found = forecast.forecast(opened, budget.split(opened, low), 0.25, 1e12)
    assert found["experts_s"] == pytest.approx(0.25 + 0.75 * chosen)
    assert forecast.forecast(opened, budget.split(opened, 1 << 50), 0.25, 1e12)["experts_s"] == 0.25


@pytest.mark.parametrize("name", ["128 rans", "llama, bfloat16", "mixture, 4 bits"])
def test_a_plan_has_a_speed(model, name):
    directory = model(name).directory
    low = plan(directory, context=128, probe=False)["min_budget_bytes"]
    for memory in ("auto", low):
        found = plan(directory, memory, context=128)
        assert found["tokens_per_s"] > 0 and found["experts_s"] > 0
