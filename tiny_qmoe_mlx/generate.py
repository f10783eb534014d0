"""`python -m tiny_qmoe_mlx.generate`: write text with a converted model under one memory budget."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    import mlx.nn as nn
    from mlx_lm.generate import BatchResponse, GenerationResponse
    from mlx_lm.tokenizer_utils import TokenizerWrapper

PREFILL_BATCH = 8  # prompts that batch_generate reads at once


def stream_generate(
    model: "nn.Module", tokenizer: "TokenizerWrapper", prompt: str | Sequence[int], **options: Any
) -> "Iterator[GenerationResponse]":
    """mlx_lm.stream_generate with a prefill chunk that the memory budget counted on.

    Args:
        model, tokenizer: from `load`.
        prompt: text or token ids.
        options: as mlx_lm.stream_generate takes them (max_tokens, sampler, logits_processors, prompt_cache, ...).

    Yields:
        mlx_lm's GenerationResponse.

    Raises:
        ValueError: the model has been closed.
    """
    from mlx_lm import stream_generate as stream

    from tiny_qmoe_mlx.footprint import PREFILL_CHUNK

    text = prompt if isinstance(prompt, str) else list(prompt)
    return stream(model, tokenizer, text, **{"prefill_step_size": PREFILL_CHUNK, **options})


def generate(model: "nn.Module", tokenizer: "TokenizerWrapper", prompt: str | Sequence[int], **options: Any) -> str:
    """The text that `stream_generate` yields, whole."""
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, **options))


def batch_generate(
    model: "nn.Module", tokenizer: "TokenizerWrapper", prompts: Sequence[str | Sequence[int]], **options: Any
) -> "BatchResponse":
    """mlx_lm.batch_generate: answers to several prompts, computed side by side, so that each expert read serves all.

    A prompt's chunk is as much shorter as more of them are read at once. KV caches are as many as prompts, each as long
    as the longest: the context given to `load` should be their sum, or the process may hold more than its budget.

    Args:
        model, tokenizer: from `load`.
        prompts: texts or token ids, each of at least one token.
        options: as mlx_lm.batch_generate takes them (max_tokens, one for all or a list; sampler, logits_processors,
            completion_batch_size, prefill_batch_size, ...).

    Returns:
        mlx_lm's BatchResponse: texts in the order of the prompts, and stats.

    Raises:
        ValueError: a prompt without tokens, or the model has been closed.
    """
    from mlx_lm import batch_generate as batch

    from tiny_qmoe_mlx.footprint import PREFILL_CHUNK

    ids = [_encode(tokenizer, prompt) for prompt in prompts]
    if not all(ids):
        raise ValueError(f"[prompt] {ids.index([])} of the batch should have at least one token, it has none.")
    options = {"prefill_batch_size": PREFILL_BATCH, **options}
    rows = max(1, min(len(ids), options["prefill_batch_size"]))
    return batch(model, tokenizer, ids, **{"prefill_step_size": max(1, PREFILL_CHUNK // rows), **options})


def _encode(tokenizer: "TokenizerWrapper", prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt, with the special tokens that mlx_lm.stream_generate would give it."""
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    starts = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return list(tokenizer.encode(prompt, add_special_tokens=not starts))


# ---- the command


def main(argv: list[str]) -> int:
    """Run the command."""
    from tiny_qmoe_mlx import blas, locate, terminal
    from tiny_qmoe_mlx import generate_options as options
    from tiny_qmoe_mlx.staging import write_json

    args = options.parse(argv)
    text = options.prompt_text(args)
    directory = locate.model_directory(args.model, args.quiet or args.json)

    from tiny_qmoe_mlx import budget, models
    from tiny_qmoe_mlx import generate_setup as setup

    tokenizer = models.open_tokenizer(directory)
    setup.check_tokens(directory, tokenizer, args)
    cache = setup.open_prompt_cache(directory, args)
    prompt = setup.prompt_ids(tokenizer, text, args)
    context = setup.context(directory, len(prompt), setup.cached_tokens(cache), args)
    draft, beside = setup.open_draft(directory, tokenizer, context, args)
    memory = budget.parse_memory(args.memory) - beside
    with terminal.Bars(args.quiet or args.json) as bars:
        model, _ = models.load(directory, memory, context, bars, tokenizer, options.streaming_of(args))
    try:
        setup.check_caches(model, cache, args)
        with blas.shared_machine():
            stats = _write(model, tokenizer, prompt, _options(tokenizer, draft, cache, args), args.json)
    finally:
        model.close()  # which writes the profile, also after Ctrl-C
    stats["budget_bytes"] += beside
    if args.stats:
        write_json(Path(args.stats), stats)
    if args.json:
        terminal.print_json(stats)
    else:
        print(_line(stats), file=sys.stderr)
        if any("numpy" in path for path in stats["dispatch"]):
            print("experts were computed by numpy, slowly: the C++ library was not built here", file=sys.stderr)
    return 0


def _options(tokenizer: Any, draft: Any, cache: Any, args: "argparse.Namespace") -> dict[str, Any]:
    """What the command line says, as mlx_lm.stream_generate takes it; seeds the sampling."""
    import mlx.core as mx
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    mx.random.seed(args.seed)
    penalty = args.repetition_penalty if args.repetition_penalty != 1 else None
    return {
        "max_tokens": args.max_tokens,
        "sampler": make_sampler(
            args.temp,
            top_p=args.top_p if args.top_p < 1 else 0.0,
            min_p=args.min_p,
            min_tokens_to_keep=args.min_tokens_to_keep,
            top_k=args.top_k,
            xtc_probability=args.xtc_probability,
            xtc_threshold=args.xtc_threshold,
            xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
        ),
        "logits_processors": make_logits_processors(repetition_penalty=penalty, repetition_context_size=64),
        "prompt_cache": cache,
        "kv_bits": args.kv_bits,
        "kv_group_size": args.kv_group_size,
        "quantized_kv_start": args.quantized_kv_start,
        **({"max_kv_size": args.max_kv_size} if args.max_kv_size else {}),
        **({"draft_model": draft, "num_draft_tokens": args.num_draft_tokens} if draft else {}),
    }


def _write(model: Any, tokenizer: Any, prompt: list[int], options: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """Generate, streaming to stdout unless quiet; the run's figures."""
    import time

    start, first, pieces, tokens, drafted, response = time.perf_counter(), 0.0, [], [], 0, None
    for response in stream_generate(model, tokenizer, prompt, **options):
        if not first:
            first, prefill = time.perf_counter() - start, model.tiny_qmoe.stats()
        pieces.append(response.text)
        tokens.append(response.token)
        drafted += response.from_draft
        if not quiet:
            print(response.text, end="", flush=True)
    if not quiet:
        print()
    stats = _stats(model, response, first, prefill, tokens, "".join(pieces))
    return {**stats, "draft_tokens": drafted} if "draft_model" in options else stats


def _stats(
    model: Any, response: Any, first: float, prefill: dict[str, Any], tokens: list[int], text: str
) -> dict[str, Any]:
    """The run's figures; prefill: the counters when the first token was there."""
    own = model.tiny_qmoe.stats()
    hits, misses, read = (own[key] - prefill[key] for key in ("expert_hits", "expert_misses", "bytes_read"))
    return {
        "prompt_tokens": response.prompt_tokens,
        "prompt_tps": response.prompt_tps,
        "ttft_s": first,
        "generation_tokens": response.generation_tokens,
        "generation_tps": response.generation_tps,
        "finish_reason": response.finish_reason,
        "tokens": tokens,
        "text": text,
        **own,
        "bytes_per_token": own["bytes_read"] / max(1, response.generation_tokens),
        "decode_hit_rate": hits / max(1, hits + misses),
        "decode_bytes_per_token": read / max(1, response.generation_tokens - 1),
    }


def _line(stats: dict[str, Any]) -> str:
    asked = stats["expert_hits"] + stats["expert_misses"]
    return (
        f"{stats['prompt_tokens']} prompt tokens at {stats['prompt_tps']:.1f}/s, {stats['generation_tokens']} tokens "
        f"at "
        f"{stats['generation_tps']:.1f}/s, first after {stats['ttft_s']:.2f} s; experts {stats['mode']}, "
        f"{100 * stats['expert_hits'] / max(1, asked):.1f} % hits, {stats['bytes_read'] / 1e6:.1f} MB read; "
        f"peak memory {stats['peak_memory_bytes'] / 1e6:.0f} MB of {stats['budget_bytes'] / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    from tiny_qmoe_mlx import terminal

    sys.exit(terminal.run(main))
