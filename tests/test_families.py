"""Every model type of mlx-lm with routed experts: converted, and compared with plain mlx-lm on the same weights."""

import json
from pathlib import Path

import families
import family_checks
import mlx.core as mx
import mlx.nn as nn
import muse_kernels
import numpy as np
import public_sizes
import pytest
import source_layouts
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear
from test_models import LOGIT_TOLERANCE, assert_close, budget, logits, prompt

from tiny_qmoe_mlx import footprint, models, native
from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.conversion.run import Settings, convert
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.original import checkpoint

FAST = {"dbrx", "kimi_k3", "llama4"}  # of unusual structure
TYPES = [t if t in FAST else pytest.param(t, marks=pytest.mark.slow) for t in sorted(families.TYPES)]
TABLE = Path(__file__).resolve().parents[1] / "docs" / "models.md"

# transformers says it of the tiny configs
DEPRECATED = pytest.mark.filterwarnings("ignore:.rope_scaling. is deprecated:FutureWarning")
pytestmark = [pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library"), DEPRECATED]


def table_rows():
    """Model type -> (file, layouts, status, calibration, smallest Mac) as docs/models.md has them."""
    lines = [line.split("|")[1:-1] for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): tuple(cell.strip() for cell in row[1:]) for row in lines}


def test_every_type_of_the_installed_mlx_lm_is_in_the_table():
    installed = families.installed()
    assert len(installed) > 40 and {"dbrx.py", "qwen3_moe.py"} <= set(installed.values())
    unknown = sorted(set(installed) - set(families.TYPES))
    assert not unknown, f"mlx-lm has new types with routed experts: give tests/families.py tiny configs of {unknown}"
    rows = table_rows()
    missing = sorted(set(installed) - set(rows))
    assert not missing, f"docs/models.md lacks {missing}; run python tests/families_table.py"
    assert {t: rows[t][0].strip("`") for t in installed} == installed
    macs = {t: rows[t][4] for t in installed if rows[t][4] or public_sizes.words(t)}
    assert macs == {t: public_sizes.words(t) for t in macs} and len(macs) > 10, "run python tests/families_table.py"


@pytest.mark.parametrize("public", public_sizes.MODELS, ids=lambda public: public.name)
def test_public_models_have_as_many_parameters_as_their_makers_say(public):
    assert public_sizes.parameters(public_sizes.build(public)) == pytest.approx(1e9 * public.billions, rel=0.01)


@pytest.mark.parametrize("model_type", TYPES)
def test_type_is_as_the_table_says(tmp_path, model_type):
    if model_type not in families.installed():
        pytest.skip(f"the installed mlx-lm has no {model_type}")
    found = family_checks.check(tmp_path, model_type)
    _, _, status, calibration, _ = table_rows()[model_type]
    assert (found.status, found.calibrated) == (status.split(":")[0], calibration == "yes"), found
    assert found.status != "refused" or model_type == "prism_hadamard_qwen35"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(families.TYPES) - {"muse_spark"}))
def test_budget_provides_for_the_cache(model_type):
    config = families.config(model_type)
    kind, arguments = models.adapted.model_classes(config)
    model = kind(arguments.from_dict(config))
    cache = make_prompt_cache(model)
    logits(model, prompt(512), cache)
    held = sum(a.nbytes for c in cache for _, a in tree_flatten(c.state) if isinstance(a, mx.array))
    assert held <= footprint.kv_bytes(config, 512, cpu=True)


def test_muse_spark_with_plain_stand_ins_for_its_kernels(tmp_path, monkeypatch):
    muse_spark = pytest.importorskip("mlx_lm.models.muse_spark")
    for kernel in muse_kernels.KERNELS:
        monkeypatch.setattr(muse_spark, kernel.__name__, kernel)
    directory = family_checks.make(tmp_path, "muse_spark")
    names = {name for file in directory.glob("model-rest-0*") for name in mx.load(str(file))}
    assert "model.language_model.layers.1.mlp.experts.post_expert_norm.weight" in names
    family_checks.compare(directory, tolerance=0.01)  # its layers round to bfloat16: a step of it where float32 differs


@pytest.mark.slow
def test_gpt_oss_as_published(tmp_path):
    source_layouts.make_gpt_oss_mxfp4(tmp_path / "hf")
    family_checks.compare(family_checks.converted(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(families.TYPES) - {"muse_spark", "prism_hadamard_qwen35"}))
def test_codec_affine_keeps_the_codes_of_mlx_lms_own_quantization(tmp_path, model_type):
    source = tiny_models.write_checkpoint(tmp_path / "hf", families.config(model_type))
    stock = family_checks.quantize(source)
    directory = convert(source, tmp_path / "out", Settings(codec="affine", rest_bits=16))
    model, _ = models.load(directory, memory=budget(directory, 0), context=512)
    want = logits(stock, prompt(12))
    assert_close(logits(model, prompt(12)), want, LOGIT_TOLERANCE * max(1, np.abs(want).max() / 5))
    model.close()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama4", "qwen3_moe", "nemotron_h"])
def test_one_expert_a_token(tmp_path, model_type):
    config = families.config(model_type)
    assert "num_experts_per_tok" in config
    family_checks.compare(family_checks.make(tmp_path, model_type, num_experts_per_tok=1))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bailing_moe", "bailing_moe_linear", "bailing_hybrid"])
def test_experts_with_biases_and_an_output_layer_that_mlx_lm_normalizes(tmp_path, model_type):
    directory = family_checks.make(tmp_path, model_type, use_bias=True, norm_head=True)
    assert all(layer.bias for layer in open_model(directory).spec.layers)
    family_checks.compare(directory)


def test_switch_linear_outside_of_the_experts_may_be_quantized(tmp_path):
    source = tiny_models.write_checkpoint(tmp_path / "hf", families.config("deepseek_v41"))
    source_layouts.quantize_with_mlx(source, "mxfp8", 8, 32)
    assert "model.layers.0.self_attn.o_a_proj.scales" in mx.load(str(source / "model.safetensors"))
    family_checks.compare(family_checks.converted(tmp_path))


# ---- a type that mlx-lm may add one day: refused where it would be computed wrongly


class Doubled(SwitchGLU):
    """Experts that compute in their own way."""

    def __call__(self, x, indices):
        return 2 * super().__call__(x, indices)


def qwen3(change):
    """A lazy tiny model with something of its own in decoder layer 1."""
    kind, arguments = models.adapted.model_classes(families.config("qwen3_moe"))
    model = kind(arguments.from_dict(families.config("qwen3_moe")))
    change(model.layers[1].mlp)
    return model


def own_call(block):
    block.switch_mlp = Doubled(64, 64, 8)


def own_norm(block):
    block.switch_mlp.norm = nn.RMSNorm(64)


def own_matrix(block):
    block.switch_mlp.up_proj = type("OwnLinear", (SwitchLinear,), {})(64, 64, 8, bias=False)


def two_of_them(block):
    block.second_mlp = SwitchGLU(64, 64, 8)


def learned_activation(block):
    block.switch_mlp.activation = nn.PReLU()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (own_call, r"layers\.1\.mlp\.switch_mlp has a Doubled that computes in its own way"),
        (own_norm, r"has norm\.weight beside the matrices"),
        (own_matrix, "has matrices of a class of their own"),
        (learned_activation, r"has activation\.weight beside the matrices"),
        (two_of_them, r"received model\.layers\.1\.mlp\.\w+ and model\.layers\.1\.mlp\.\w+ in layer 1"),
    ],
)
def test_experts_of_another_kind_are_refused(change, reason):
    with pytest.raises(FormatError, match=f"{reason}.*is not supported"):
        checkpoint.expert_layers(qwen3(change))


def test_experts_outside_of_the_decoder_layers_are_refused():
    model = qwen3(lambda block: None)
    model.draft = SwitchGLU(64, 64, 8)
    with pytest.raises(FormatError, match="decoder layers, draft does not"):
        checkpoint.expert_layers(model)


@pytest.mark.parametrize("own", [lambda: [nn.Linear(64, 64)], lambda: SwitchLinear(64, 64, 8)])
def test_experts_that_are_no_switch_layer_are_not_taken_for_a_dense_model(own):
    model = qwen3(lambda block: None)
    for layer in model.layers[1:]:
        del layer.mlp["switch_mlp"]
        layer.mlp.experts = own()
    with pytest.raises(FormatError, match=r"model\.layers\.\d\.mlp\.experts.* is of another kind"):
        checkpoint.expert_layers(model)


def test_layer_index_is_the_place_among_the_decoder_layers_whatever_the_path():
    model = qwen3(lambda block: None)
    inner = nn.Module()
    inner.switch_mlp, model.layers[1].mlp = model.layers[1].mlp.switch_mlp, nn.Module()
    model.layers[1].mlp.towers = [nn.Module(), inner]
    assert [(f.path, f.layer) for f in checkpoint.expert_layers(model)] == [
        ("model.layers.1.mlp.towers.1.switch_mlp", 1),
        ("model.layers.2.mlp.switch_mlp", 2),
    ]


def test_unknown_type_is_refused_with_a_sentence(tmp_path):
    source = tiny_models.write_checkpoint(tmp_path / "hf", families.config("mixtral"))
    config = {**json.loads((source / "config.json").read_text()), "model_type": "moe_of_tomorrow"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="Model type moe_of_tomorrow not supported"):
        family_checks.converted(tmp_path)
