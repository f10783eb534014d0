"""The server's memory budget beside the model's own: logits of several requests, KV caches of earlier prompts, a draft
model. Sizes are bytes."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tiny_qmoe_mlx import budget, footprint, generate_setup
from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.errors import BudgetError
from tiny_qmoe_mlx.vocabulary import vocabulary

CLIENTS_BYTES = 32_000_000  # threads and what they read and write
GRAMMAR_BYTES, GRAMMAR_FACTOR = 8_000_000, 14  # of its code, and over the size of tokenizer.json
LOGITS = 6 * 4  # bytes for each token of the vocabulary while one is chosen: float32, and what sampling makes of it


def prompt_cache_bytes(config: dict[str, Any], args: argparse.Namespace, cpu: bool) -> int:
    """Of --prompt-cache-bytes; as much as the context's KV cache where it was not given."""
    if args.prompt_cache_bytes is None:
        return footprint.kv_bytes(config, args.context, cpu)
    return 0 if args.prompt_cache_bytes.strip() == "0" else budget.parse_memory(args.prompt_cache_bytes)


def beside(directory: Path, config: dict[str, Any], draft: int, args: argparse.Namespace) -> int:
    """What the model's own budget does not count.

    Args:
        directory, config: the model's.
        draft: bytes of a draft model.
        args: the command line, with the prompt cache's bytes.
    """
    logits = LOGITS * vocabulary(config, 0) * (args.decode_concurrency - 1)
    return args.prompt_cache_bytes + logits + draft + CLIENTS_BYTES + grammar_bytes(directory)


def grammar_bytes(directory: Path) -> int:
    """Of llguidance and its own form of the tokenizer, where it is installed."""
    file = directory / "tokenizer.json"
    if find_spec("llguidance") is None or not file.exists():
        return 0
    return GRAMMAR_BYTES + GRAMMAR_FACTOR * file.stat().st_size


def memory_of_model(directory: Path, config: dict[str, Any], draft: int, args: argparse.Namespace, cpu: bool) -> int:
    """What of --memory is left for the model.

    Raises:
        BudgetError: too little; the text names the smallest budget that works.
    """
    asked, extra = budget.parse_memory(args.memory), beside(directory, config, draft, args)
    least = budget.split(open_model(directory), sys.maxsize, args.context, cpu).min_budget_bytes + extra
    if asked < least:
        raise BudgetError(
            f"[memory] {budget.show(asked)} is too small to serve this model with a context of {args.context} tokens "
            f"and {budget.show(args.prompt_cache_bytes)} of cached prompts; the smallest that works is "
            f"{budget.show(least)}; a smaller --context, --prompt-cache-bytes or --decode-concurrency needs less."
        )
    return asked - extra


def open_draft(directory: Path, tokenizer: Any, args: argparse.Namespace) -> tuple[nn.Module | None, int]:
    """The model of --draft-model, ready for another thread, and its bytes; None and 0 without one."""
    draft, size = generate_setup.open_draft(directory, tokenizer, args.context, args)
    if draft is not None:  # what is no parameter (a rope's frequencies) is lazy, and this thread's
        mx.eval([a for m in draft.modules() for k, a in m.items() if k[0] == "_" and isinstance(a, mx.array)])
    return draft, size
