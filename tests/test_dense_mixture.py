"""Dense models whose feed-forward layers are one expert each: computed as before, coded by the trellis, streamed."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from tiny_qmoe_mlx import container, models, native
from tiny_qmoe_mlx.conversion import run as conversion
from tiny_qmoe_mlx.conversion.settings import Settings
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.generate import stream_generate
from tiny_qmoe_mlx.original import dense
from tiny_qmoe_mlx.plan import plan
from tiny_qmoe_mlx.report import write as report

TOKENS = np.random.default_rng(1).integers(0, 256, (1, 12))
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text")


def make(root, family):
    made = tiny_models.make_checkpoint(root / "hf", family)
    if family == "gemma3_text":  # as it is shipped: without a head, by which mlx-lm knows that the embedding is one
        (file,) = made.glob("*.safetensors")
        kept = {name: array for name, array in mx.load(str(file)).items() if not name.startswith("lm_head.")}
        mx.eval(kept)
        mx.save_safetensors(str(file), kept, {"format": "mlx"})
    return made


def logits(model):
    return np.array(model(mx.array(TOKENS)))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_computes_what_the_block_did(tmp_path, family):
    model, _ = load_model(make(tmp_path, family))
    want = logits(model)
    dense.as_mixture(model)
    assert dense.is_mixture(model)
    np.testing.assert_allclose(logits(model), want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(("family", "bits"), [*((f, 3.0) for f in FAMILIES), ("llama", 1.5), ("llama", 4.0)])
@pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
def test_a_dense_model_in_the_trellis_computes_what_mlx_lm_does_on_its_values(tmp_path, family, bits):
    source = make(tmp_path, family)
    settings = Settings(bits=bits, rest_bits=16, calibration="none")
    opened = container.open_model(conversion.convert(source, tmp_path / "out", settings))
    assert [layer.experts for layer in opened.spec.layers] == [1, 1, 1]
    stock, _ = load_model(source)
    values = tiny_models.dense_experts(opened)
    named = [(name.replace(".switch_mlp", ""), mx.array(w[0])) for name, w in values.items()]
    assert {n for n, _ in named} == {n for n, _ in tree_flatten(stock.parameters()) if ".mlp." in n}
    stock.load_weights(named, strict=False)
    want = logits(stock)
    with models.load(opened.directory, context=512)[0] as model:
        np.testing.assert_allclose(logits(model), want, rtol=0, atol=1e-4 * np.abs(want).max())
        tokenizer = models.open_tokenizer(opened.directory)
        written = [r.token for r in stream_generate(model, tokenizer, TOKENS[0].tolist(), max_tokens=8)]
    least = plan(opened.directory, context=512, probe=False)["min_budget_bytes"]
    with models.load(opened.directory, least, 512)[0] as model:
        assert [r.token for r in stream_generate(model, tokenizer, TOKENS[0].tolist(), max_tokens=8)] == written
        stats = model.tiny_qmoe.stats()
    assert stats["mode"] == "streamed" and stats["expert_misses"] > 8


@pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_calibration_helps_a_dense_model(tmp_path, family):
    """The layer's output errors on calibration tokens are smaller with them than without, as of a mixture; also where a
    norm stands after the experts, whose derivatives at zero look like weights."""
    source = make(tmp_path, family)
    text = tmp_path / "text.txt"
    text.write_text("the river stone light walks under old quick bright over slow small green house " * 80)
    stock, _ = load_model(source)
    want, errors = logits(stock), {}
    for calibration in ("none", str(text)):
        out = tmp_path / f"out-{len(errors)}"
        settings = Settings(bits=2.0, rest_bits=16, calibration=calibration, sequences=8, sequence_tokens=64)
        with models.load(conversion.convert(source, out, settings), context=512)[0] as model:
            tokens = mx.array(models.open_tokenizer(out).encode("the river stone light walks under old"))[None]
            errors[calibration] = float(mx.square(model(tokens) - stock(tokens)).mean())
    assert want.size and errors[str(text)] < errors["none"]


@pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_layers_that_matter_more_get_more_bits(tmp_path, family):
    """The rates that a probe of KL asks for; all bytes stay what they were."""
    source = make(tmp_path, family)
    text = tmp_path / "text.txt"
    text.write_text("the river stone light walks under old quick bright over slow small green house " * 40)
    settings = Settings(
        bits=2.0, rest_bits=16, calibration=str(text), sequences=4, sequence_tokens=32, layer_rates=True
    )
    spec = container.open_model(conversion.convert(source, tmp_path / "out", settings)).spec
    assert spec.bits == pytest.approx(2.0, abs=0.2)  # records of 3 KB
    assert len({layer.record_bytes for layer in spec.layers}) > 1


@pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
def test_a_report_measures_the_layers_of_a_dense_model(tmp_path):
    extent = report.Extent(tokens=64, window=32, tasks=0, layer_tokens=16)
    settings = Settings(bits=2.0, rest_bits=16, calibration="none")
    out = conversion.convert(make(tmp_path, "qwen3"), tmp_path / "out", settings, extent=extent)
    quality = json.loads((out / "quality.json").read_text())
    assert [row["layer"] for row in quality["layers"]] == [0, 1, 2] and quality["kl"]["mean"] > 0
    assert "its 3 feed-forward layers compressed" in (out / "README.md").read_text()


def test_other_blocks_are_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)

        def __call__(self, x):
            return self.down_proj(nn.relu(self.gate_proj(x)) * self.up_proj(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Block()

    with pytest.raises(FormatError, match="down.silu.gate"):
        dense.as_mixture(Model())
    with pytest.raises(FormatError, match="neither was found"):
        dense.as_mixture(nn.Linear(3, 3))
