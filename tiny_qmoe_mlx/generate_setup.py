"""What `generate` gets ready before it writes: the prompt's tokens, a saved KV cache, a draft model, and the context
that the budget has to provide for."""

import argparse
import copy
import math
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _get_classes, load_model

from tiny_qmoe_mlx import budget, footprint, lookahead
from tiny_qmoe_mlx.chat_template import render
from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.disk_reads import read_header
from tiny_qmoe_mlx.errors import BudgetError, FormatError
from tiny_qmoe_mlx.layers import use_cpu_kernels
from tiny_qmoe_mlx.original import checkpoint
from tiny_qmoe_mlx.tokenizer import longest_token, too_many
from tiny_qmoe_mlx.vocabulary import vocabulary

QUERY = "<query>"  # stands for the prompt where a chat's text is cut before it


def check_tokens(directory: Path, tokenizer: TokenizerWrapper, args: argparse.Namespace) -> None:
    """Take in the tokens of --extra-eos-token, and refuse what the vocabulary does not have.

    Raises:
        ValueError: no such token, or more of them than there are.
    """
    size = vocabulary(checkpoint.read_config(directory), len(tokenizer))
    for name in ("top_k", "min_tokens_to_keep"):
        if getattr(args, name) >= size:
            raise ValueError(
                f"[options] --{name.replace('_', '-')} should be less than the model's {size} tokens, "
                f"received {getattr(args, name)}."
            )
    for token in args.extra_eos_token:
        number = int(token) if token.isdecimal() and len(token) < 20 else tokenizer.convert_tokens_to_ids(token)
        unknown = number is None or (number == tokenizer.unk_token_id and token != tokenizer.unk_token)
        if unknown or not 0 <= number < size:
            raise ValueError(
                f"[options] --extra-eos-token should be a token of the model or its number, {token} is not."
            )
        tokenizer.add_eos_token(str(number))


# ---- the prompt


def check_length(directory: Path, tokenizer: TokenizerWrapper, text: str) -> None:
    """Refuse a text that is longer than the model's context before it becomes tokens, whose memory no budget counts.

    Raises:
        ValueError: with its length.
    """
    limit = footprint.longest_context(checkpoint.read_config(directory))
    if len(text) > limit and (found := too_many(tokenizer, longest_token(tokenizer), text, limit)):
        raise ValueError(f"[prompt] has {found}; the model's context is {limit}; give a shorter prompt.")


def prompt_ids(tokenizer: TokenizerWrapper, text: str, args: argparse.Namespace) -> list[int]:
    """Tokens of the prompt as a chat, or as it is; with a saved cache, only what comes after it.

    Raises:
        ValueError: it has none; the chat template refuses it, or there is none to begin the answer in.
    """
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        if args.prefill_response is not None:
            raise ValueError("[options] --prefill-response needs a chat template; add the text to --prompt instead.")
        ids = tokenizer.encode(text, add_special_tokens=args.prompt_cache_file is None)
    else:
        chat = _chat(tokenizer, text, args)
        if args.prompt_cache_file is not None:
            chat = chat[_chat(tokenizer, QUERY, args).find(QUERY) :]
        ids = tokenizer.encode(chat, add_special_tokens=False)
    if not ids:
        raise ValueError(
            "[prompt] should have at least one token, this model's tokenizer makes none of it; give another text."
        )
    return list(ids)


def _chat(tokenizer: TokenizerWrapper, text: str, args: argparse.Namespace) -> str:
    """The prompt in the model's chat template."""
    messages = [{"role": "user", "content": text}]
    if args.system_prompt:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    begun = args.prefill_response is not None
    if begun:
        messages.append({"role": "assistant", "content": args.prefill_response})
    how = {"tokenize": False, "continue_final_message": begun, "add_generation_prompt": not begun}
    return render(tokenizer, messages, "see --ignore-chat-template", **args.chat_template_config, **how)


def context(directory: Path, prompt_tokens: int, cached: int, args: argparse.Namespace) -> int:
    """Tokens of KV cache to provide for.

    Args:
        directory: the model's.
        prompt_tokens, cached: of the prompt, and of the saved cache before it.
        args: the command line.

    Raises:
        ValueError: more than the model, --context or the kind of its cache can hold.
    """
    config = checkpoint.read_config(directory)
    limit, needed = footprint.longest_context(config), cached + prompt_tokens + args.max_tokens
    before = f" after {cached} in --prompt-cache-file" if cached else ""
    if needed > limit:
        raise ValueError(
            f"[prompt] has {prompt_tokens} tokens{before} and --max-tokens is {args.max_tokens}; together they should "
            f"be at most the model's {limit}; give a shorter prompt or fewer tokens."
        )
    most = longest_cache(config, args)
    needed = min(needed, most)
    if args.context is not None and not needed <= args.context <= limit:
        raise ValueError(
            f"[options] --context should lie between {needed} (prompt and --max-tokens) and the model's {limit}, "
            f"received {args.context}."
        )
    return args.context or min(limit, most, max(needed, budget.DEFAULT_CONTEXT))


def chat_context(directory: Path, args: argparse.Namespace) -> tuple[int, int]:
    """Tokens of KV cache to provide for in a chat, and tokens that the chat may grow to.

    Raises:
        ValueError: more than the model or the kind of its cache can hold.
    """
    config = checkpoint.read_config(directory)
    limit, most = footprint.longest_context(config), longest_cache(config, args)
    if args.context is not None and not 1 <= args.context <= most:
        raise ValueError(f"[options] --context should lie between 1 and {most} here, received {args.context}.")
    provided = args.context or min(most, budget.DEFAULT_CONTEXT)
    return provided, limit if args.max_kv_size is not None else provided


# ---- the KV cache


def longest_cache(config: dict, args: argparse.Namespace) -> int:
    """Most tokens that the KV cache ever holds.

    Raises:
        ValueError: --max-kv-size for a model that does not heed it.
    """
    limit = footprint.longest_context(config)
    if args.max_kv_size is None:
        return limit
    if hasattr(_get_classes(config)[0], "make_cache"):
        raise ValueError(
            f"[options] --max-kv-size has no effect on {config['model_type']}, which shapes its cache itself; "
            "leave it out."
        )
    # a chunk is added before the oldest are dropped
    return min(limit, args.max_kv_size + footprint.PREFILL_CHUNK)


def check_caches(model: nn.Module, cache: list[Any] | None, args: argparse.Namespace) -> None:
    """Refuse a saved or a quantized cache that the model's layers cannot work with, by two steps of which nothing but
    shapes is computed.

    Raises:
        ValueError: with what mlx-lm or MLX says.
    """
    if cache is None and args.kv_bits is None:
        return
    fresh = make_prompt_cache(model)
    if cache is not None and len(cache) != len(fresh):
        raise ValueError(
            f"[options] --prompt-cache-file should have {len(fresh)} layers as the model has, it has {len(cache)}."
        )
    trial, errors = copy.deepcopy(cache) or fresh, []

    def steps(token: mx.array) -> None:
        try:
            for _ in range(2):
                model(token, cache=trial)
                maybe_quantize_kv_cache(trial, 0, args.kv_group_size, args.kv_bits)
        except Exception as error:  # each family's attention has its own way to fail
            errors.append(" ".join(f"{type(error).__name__} {error}".split())[:300])

    lookahead.guess(steps, mx.array([[0]]))  # type: ignore[arg-type]  # a probe: experts give zeros
    if errors:
        what = "--prompt-cache-file" if cache is not None else f"--kv-bits {args.kv_bits}"
        raise ValueError(f"[options] {what} does not fit this model's attention in mlx-lm: {errors[0]}; leave it out.")


# ---- a draft model


def open_draft(
    directory: Path, tokenizer: TokenizerWrapper, context: int, args: argparse.Namespace
) -> tuple[nn.Module | None, int]:
    """The model of --draft-model, and the bytes that it takes of the budget; None and 0 without one.

    Raises:
        ValueError: it is no model of mlx-lm with a vocabulary of the same size.
        BudgetError: both do not fit; the text names the smallest budget that works.
    """
    if args.draft_model is None:
        return None, 0
    path = checkpoint.find_directory(args.draft_model, quiet=args.quiet or args.json)
    config = checkpoint.read_original(path)
    if "tiny_qmoe" in config:
        raise ValueError(f"[options] --draft-model should be a plain model of mlx-lm, {path} is a converted one.")
    sizes = checkpoint.open_tokenizer(path, config).vocab_size, vocabulary(config, 0)
    if sizes[0] != tokenizer.vocab_size or sizes[1] < len(tokenizer):
        raise ValueError(f"[options] --draft-model should have the model's tokenizer, that of {path} is another.")
    beside = draft_bytes(path, config, context, args.num_draft_tokens)
    _check_both_fit(directory, beside, context, args.memory)
    return _load_draft(path), beside


def _check_both_fit(directory: Path, draft: int, context: int, memory: str) -> None:
    asked, cpu = budget.parse_memory(memory), mx.default_device() == mx.cpu
    least = budget.split(open_model(directory), sys.maxsize, context, cpu).min_budget_bytes
    if asked < least + draft:
        raise BudgetError(
            f"[memory] {budget.show(asked)} is too small for this model with a context of {context} tokens and the "
            f"draft model's {budget.show(draft)}; the smallest that works is {budget.show(least + draft)}."
        )


def draft_bytes(directory: Path, config: dict, context: int, guesses: int) -> int:
    """Bytes that a draft model takes: its weights, its KV cache, and the logits of each guess in the model.

    Raises:
        FormatError: it has no weights, or a file of them is damaged.
    """
    cpu, total = mx.default_device() == mx.cpu, 0
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise FormatError(f"[model] {directory} should hold model*.safetensors and does not.")
    for file in files:
        tensors, _ = read_header(file)
        total += sum(_width(tensor.dtype, cpu) * math.prod(tensor.shape) for tensor in tensors.values())
    logits = 6 * 4 * guesses * vocabulary(config, 0)
    return total + footprint.kv_bytes(config, context, cpu) + logits


def _width(dtype: str, cpu: bool) -> int:
    """Bytes of a number in memory: floating point becomes float32 on the CPU, as the model's own does."""
    if cpu and dtype in footprint.FLOAT_TYPES:
        return 4
    return footprint.FLOAT_TYPES.get(dtype) or footprint.INTEGER_BYTES.get(dtype, 8)


def _load_draft(directory: Path) -> nn.Module:
    try:
        model, _ = load_model(directory, lazy=True)
        if mx.default_device() == mx.cpu:
            model.set_dtype(mx.float32)
        use_cpu_kernels(model)
        mx.eval(model.parameters())
        model(mx.array([[0]]))  # is not computed: a config may trip mlx-lm here too
    except Exception as error:  # a config that contradicts itself trips mlx-lm in many ways
        if isinstance(error, MemoryError):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise FormatError(f"[model] mlx-lm cannot load the draft model {directory}: {reason}") from error
    return model
