"""What is checked of a model type with routed experts, for test_families.py and for the table of docs/models.md."""

import json
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import families
import family_layouts
import mlx.core as mx
import numpy as np
import source_layouts
import tiny_models
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, quantize_model, save_model
from test_models import LOGIT_TOLERANCE, assert_close, budget, greedy, logits, prompt

from tiny_qmoe_mlx import models
from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.conversion import expert_pass
from tiny_qmoe_mlx.conversion.run import Settings, convert
from tiny_qmoe_mlx.errors import FormatError

FEW = 100_000  # bytes of experts read at once: one or two of these models' eight
NO_METAL = "[metal_kernel] No Metal back-end."


@dataclass(frozen=True)
class Found:
    """What became of a type: "equal", "needs Metal", or "refused" with the sentence; whether it can be calibrated."""

    status: str
    sentence: str = ""
    calibrated: bool = False


def write(root: Path, model_type: str, change=dict, **overrides) -> Path:
    """Write a tiny checkpoint in a layout."""
    source = tiny_models.write_checkpoint(root / "hf", {**families.config(model_type), **overrides})
    source_layouts.rewrite(source, change)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")  # without one, a type may bring its own
    return source


def make(root: Path, model_type: str, change=dict, **overrides) -> Path:
    """Write a tiny checkpoint in a layout and convert it."""
    write(root, model_type, change, **overrides)
    return converted(root)


def converted(root: Path) -> Path:
    """The checkpoint in `root`/hf converted to 3 bits, not calibrated."""
    return convert(root / "hf", root / "out", Settings(bits=3.0, calibration="none"))


def quantize(directory: Path):
    """Quantize a checkpoint to 4 bits as mlx_lm.convert -q does; the model, in float32."""
    model, config = quantize_model(*load_model(directory), 32, 4)
    save_model(directory, model)
    (directory / "config.json").write_text(json.dumps(config))
    return load_model(directory)[0]


def check(root: Path, model_type: str) -> Found:
    """Convert a type's tiny checkpoint in each of its layouts, and compare with plain mlx-lm.

    Raises:
        AssertionError: another result, or a layout of which other experts are read.
    """
    try:
        directory = make(root / "mlx", model_type)
    except FormatError as error:
        return Found("refused", str(error))
    for number, (what, change) in enumerate(family_layouts.of_type(model_type)):
        with patch.object(expert_pass, "GROUP_BYTES", FEW):
            again = make(root / str(number), model_type, change)
        renamed = tensors(root / str(number)) != tensors(root / "mlx")
        assert renamed or change is dict, f"{model_type}, {what}: mlx-lm's own layout was written"
        assert experts_of(again) == experts_of(directory), f"{model_type}, {what}: other experts were read"
    try:
        compare(directory)
    except RuntimeError as error:
        if str(error) != NO_METAL:
            raise
        return Found("needs Metal")
    return Found("equal", calibrated=calibrated(root / "calibrated", model_type))


def calibrated(root: Path, model_type: str) -> bool:
    """Whether a type can be calibrated, by converting and comparing it so; else a sentence should say what can be done.

    Raises:
        AssertionError: another result, or another sentence.
    """
    source = write(root, model_type)
    try:
        directory = convert(source, root / "out", Settings(bits=3.0, sequences=4, sequence_tokens=48))
    except FormatError as error:
        assert "only --calibration none can convert it" in str(error), error
        return False
    compare(directory)
    return True


def tensors(root: Path) -> set[str]:
    """Names of the tensors of the checkpoint in `root`/hf."""
    return set(mx.load(str(root / "hf" / "model.safetensors")))


def experts_of(directory: Path) -> dict[str, bytes]:
    """The experts files of a converted model."""
    return {file.name: file.read_bytes() for file in directory.glob("model-experts-*")}


def compare(directory: Path, tolerance: float = LOGIT_TOLERANCE) -> None:
    """Resident and with the fewest slots: a prefill, decode steps through the cache, and greedy tokens.

    Args:
        directory: of the converted model.
        tolerance: of logits of up to 5; larger ones are allowed more.

    Raises:
        AssertionError: they are not those of plain mlx-lm on the dequantized weights.
    """
    plain = tiny_models.plain_model(open_model(directory))
    tokens, expected = prompt(43), None
    for share, mode in ((1, "resident"), (0, "streamed")):
        model, tokenizer = models.load(directory, memory=budget(directory, share), context=512)
        assert model.tiny_qmoe.budget.mode == mode
        caches = make_prompt_cache(model), make_prompt_cache(plain)
        for part in np.split(tokens, (40, 41, 42), axis=1):
            want = logits(plain, part, caches[1])
            assert np.isfinite(want).all() and want.std() > 0.01
            assert_close(logits(model, part, caches[0]), want, tolerance * max(1, np.abs(want).max() / 5))
        expected = expected or greedy(plain, tokenizer, tokens[0], 20)
        assert greedy(model, tokenizer, tokens[0], 20) == expected
        model.close()
