"""Switch Transformers that are refused: options that make no sense, tokenizers without sentinels, configs, pickles."""

import json
import shutil
from pathlib import Path

import pytest
import switch_models

from tiny_qmoe_mlx import native
from tiny_qmoe_mlx.conversion.run import Settings, convert
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.original import checkpoint

pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
SMALL = {"sequences": 8, "sequence_tokens": 80}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return switch_models.write(tmp_path_factory.mktemp("switch") / "hf")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"finetune": True}, "--finetune-gains is not there for encoder-decoders"),
        ({"layer_rates": True}, {}, "--layer-rates is not there"),
        ({"calibration": "self"}, {}, "--calibration self is not there"),
        (
            {"sequence_tokens": 4000},
            {},
            r"a text to mask should have 2 to \d+ tokens, by the tokenizer's 100 sentinels",
        ),
        ({"sequence_tokens": 1}, {}, "a text to mask should have 2 to"),
    ],
)
def test_conversions_that_are_refused(original, tmp_path, changes, options, message):
    settings = Settings(**{"bits": 3.0, "calibration": "builtin", **SMALL, **changes})
    with pytest.raises(ValueError, match=message):
        convert(original, tmp_path / "out", settings, **options)


def test_a_tokenizer_without_sentinels_is_refused(original, tmp_path):
    source = shutil.copytree(original, tmp_path / "hf")
    switch_models.write_tokenizer(source, sentinels=0)
    with pytest.raises(FormatError, match="should have sentinels, <extra_id_0> and more, and has none"):
        convert(source, tmp_path / "out", Settings(bits=3.0, **SMALL))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dense_act_fn": "silu"},
            r"dense_act_fn should be one of \('relu',\) with is_gated_act False, received 'silu'",
        ),
        ({"router_dtype": "float8"}, "router_dtype should be float32, float16 or bfloat16, received 'float8'"),
        ({"num_experts": 9}, "mlx-lm cannot load .* 8"),
        ({"num_heads": 0}, "num_heads should be an integer of at least 1, received 0"),
        ({"expert_capacity": "many"}, "expert_capacity should be an integer of at least 1, received many"),
        (
            {"relative_attention_num_buckets": 3},
            "relative_attention_num_buckets should be at least 4, .* received 3 and 128",
        ),
        ({"relative_attention_max_distance": 16}, "should be at least 4, .* received 32 and 16"),
        ({"decoder_start_token_id": 384}, "decoder_start_token_id should lie in 0 to 383, received 384"),
    ],
)
def test_configs_that_are_refused(original, tmp_path, changes, message):
    source = shutil.copytree(original, tmp_path / "hf")
    (source / "config.json").write_text(json.dumps({**switch_models.CONFIG, **changes}))
    with pytest.raises(FormatError, match=message):
        checkpoint.load_lazy(source)


def test_a_pickled_checkpoint_is_refused_with_what_to_do(original, tmp_path):
    source = shutil.copytree(original, tmp_path / "hf")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(FormatError, match="if the checkpoint has pytorch_model.*bin, load it with transformers"):
        checkpoint.load_lazy(source)
