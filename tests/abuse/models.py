"""Tiny converted models, one of each codec, and what a run writes with each: for the modules that break them."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import source_layouts
import tiny_models

from tiny_qmoe_mlx import models
from tiny_qmoe_mlx.conversion import run as conversion
from tiny_qmoe_mlx.conversion.settings import Settings
from tiny_qmoe_mlx.generate import stream_generate

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 258}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": []}
PROMPT = [3, 141, 59, 26, 53, 58, 97, 9, 32, 38]
TOKENS = 6
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def _checkpoint(root: Path, family: str = "qwen3_moe", seed: int = 0, **config) -> Path:
    own = SMALL | (EXPERTS if family == "qwen3_moe" else {})
    directory = tiny_models.make_checkpoint(root / f"{family}-{seed}", family, seed, **own, **config)
    (directory / "generation_config.json").write_text('{"temperature": 0.7, "top_p": 0.9}\n')
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def _quantized(root: Path, seed: int) -> Path:
    return source_layouts.quantize_with_mlx(_checkpoint(root / "q", seed=seed), "affine", 4, 32)


def _bfloat16(root: Path, seed: int) -> Path:
    directory = _checkpoint(root / "b", "llama", seed)
    return source_layouts.rewrite(directory, lambda w: {n: a.astype(mx.bfloat16) for n, a in w.items()})


PLAIN = {"calibration": "builtin", "sequences": 4, "sequence_tokens": 64}
MADE: dict[str, tuple[Callable[[Path, int], Path], Settings]] = {
    "trellis": (lambda root, seed: _checkpoint(root, seed=seed), Settings(bits=3.0, **PLAIN)),
    "qmoe": (lambda root, seed: _checkpoint(root, seed=seed), Settings(bits=1.5, codec="qmoe", **PLAIN)),
    "affine": (_quantized, Settings(bits=4, codec="affine", calibration="none")),
    "lossless": (_bfloat16, Settings(codec="lossless")),
    "tiny-qmoe": (_bfloat16, Settings(codec="tiny-qmoe")),
}


def make(root: Path, codec: str, seed: int = 0) -> Path:
    """A converted model below `root`, made if it is not there; another seed gives one of the same shapes."""
    (source, settings), out = MADE[codec], root / f"{codec}-{seed}" / "out"
    return out if out.exists() else conversion.convert(source(out.parent, seed), out, settings)


def tokens(directory: Path, checks: str = "first") -> list[int]:
    """The greedy answer to PROMPT."""
    model, tokenizer = models.load(directory, context=512, streaming=models.Streaming(checks=checks))
    with model:
        return [r.token for r in stream_generate(model, tokenizer, PROMPT, max_tokens=TOKENS)]
