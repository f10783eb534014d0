"""A tiny converted model with a chat template, for the tests of what talks with a person; it never ends by itself."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import tiny_models
from safetensors.numpy import save_file

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }};{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_checkpoint(directory: Path, **overrides) -> Path:
    """Write the original, whose attention is wide enough for a quantized cache."""
    tiny_models.make_checkpoint(directory, "qwen3_moe", head_dim=32, **overrides)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    weights = {name: np.array(w) for name, w in mx.load(str(directory / "model.safetensors")).items()}
    weights["lm_head.weight"][tiny_models.BASE["eos_token_id"]] = 0  # of other tokens, the likeliest has a logit of 10
    save_file(weights, directory / "model.safetensors", {"format": "mlx"})
    return directory


def make(directory: Path) -> Path:
    """Write the original and convert it; the converted directory."""
    from tiny_qmoe_mlx.conversion.run import Settings, convert

    original = make_checkpoint(directory / "hf")
    return convert(original, directory / "model", Settings(bits=3.0, sequences=8, sequence_tokens=64))


def text_of(messages: list[dict[str, str]]) -> str:
    """The template, written by hand."""
    return "".join(f"<{m['role']}>{m['content']};" for m in messages) + "<assistant>"
