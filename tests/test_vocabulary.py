"""Token ids that a model does not have: of a prompt, of calibration and of a text that is measured."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import switch_models
import tiny_models
from safetensors.numpy import load_file, save_file

from tiny_qmoe_mlx import native
from tiny_qmoe_mlx.conversion.run import Settings, convert
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.original import checkpoint
from tiny_qmoe_mlx.report.compare import windows_of
from tiny_qmoe_mlx.vocabulary import check_ids, vocabulary

SMALL = {"bits": 2.0, "sequences": 4, "sequence_tokens": 60}
WORDS = "the river stone light walks under old quick bright over slow small green house "
needs_compiler = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")


@pytest.mark.parametrize("ids", [[0, 5, 9], np.array([[0, 9], [3, 3]], np.int32)])
def test_tokens_of_the_model_are_taken(ids):
    check_ids({"vocab_size": 10}, ids)
    check_ids({"text_config": {"vocab_size": 10}, "vocab_size": 4}, ids)
    check_ids({}, ids)  # its config does not say


@pytest.mark.parametrize(("ids", "wrong"), [([0, 10], 10), ([3, -1, 4], -1), (np.array([[2], [10**9]]), 10**9)])
def test_others_are_refused(ids, wrong):
    with pytest.raises(ValueError, match=rf"^\[text\] tokens should lie in 0 to 9, received {wrong}; is the tokenizer"):
        check_ids({"vocab_size": 10}, ids, "text")
    with pytest.raises(ValueError, match=r"^\[prompt\] it should have at least one token, it has none\.$"):
        check_ids({"vocab_size": 10}, [])


def test_a_config_that_does_not_say_it():
    assert vocabulary({}, 7) == vocabulary({"vocab_size": "many"}, 7) == 7


@pytest.fixture(scope="module")
def larger_tokenizer(tmp_path_factory) -> Path:
    """A mixture whose tokenizer has one token more than the model."""
    directory = tiny_models.make_checkpoint(tmp_path_factory.mktemp("larger") / "hf", "qwen3_moe")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    size = json.loads((directory / "config.json").read_text())["vocab_size"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer.setdefault("added_tokens", []).append({"id": size, "content": "@@", "special": True, **flags})
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


@needs_compiler
@pytest.mark.parametrize("codec", ["qmoe", "trellis"])
def test_calibration_on_tokens_that_the_model_does_not_have(larger_tokenizer, tmp_path, codec):
    text = tmp_path / "text.txt"
    text.write_text("the river @@ stone light " * 100)
    bits = 1.5 if codec == "qmoe" else 2.0
    settings = Settings(**{**SMALL, "bits": bits}, codec=codec, calibration=str(text))
    with pytest.raises(ValueError, match=r"text\.txt\] tokens should lie in 0 to 257, received 258; is the tokenizer"):
        convert(larger_tokenizer, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_a_text_with_tokens_that_the_model_does_not_have(larger_tokenizer):
    config = checkpoint.read_config(larger_tokenizer)
    tokenizer = checkpoint.open_tokenizer(larger_tokenizer, config)
    assert windows_of(WORDS * 9, 20, 40, tokenizer, config)
    with pytest.raises(ValueError, match=r"^\[text\] tokens should lie in 0 to 257, received 258"):
        windows_of(WORDS * 9 + "@@", 20, 40, tokenizer, config)


def test_sentinels_that_the_model_does_not_have(tmp_path):
    source = switch_models.write(tmp_path / "hf", vocab_size=300)
    config = checkpoint.read_config(source)
    tokenizer = checkpoint.open_tokenizer(source, config)
    with pytest.raises(ValueError, match=r"^\[text\] tokens should lie in 0 to 299, received 3\d\d; is the tokenizer"):
        windows_of(WORDS * 9, 80, 80, tokenizer, config)


@needs_compiler
@pytest.mark.parametrize("codec", ["qmoe", "trellis"])
def test_an_original_that_computes_what_is_not_finite(larger_tokenizer, tmp_path, codec):
    """Else QMoE's rule for a Hessian without a factor would round to nearest without a word."""
    source = shutil.copytree(larger_tokenizer, tmp_path / "hf")
    (file,) = source.glob("*.safetensors")
    weights = load_file(file)
    weights["model.layers.0.self_attn.o_proj.weight"][:] = 3e38  # finite, and sums of it are not
    save_file(weights, file, {"format": "mlx"})
    settings = Settings(**{**SMALL, "bits": 1.5 if codec == "qmoe" else 2.0}, codec=codec)
    with pytest.raises(
        FormatError, match=r"what reaches the experts of model\.layers\.1\.mlp\.switch_mlp should be finite numbers"
    ):
        convert(source, tmp_path / "out", settings)
