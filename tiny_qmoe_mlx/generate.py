"""`python -m tiny_qmoe_mlx.generate`: write text with a converted model under one memory budget."""

import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    import mlx.nn as nn
    from mlx_lm.generate import BatchResponse, GenerationResponse
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from tiny_qmoe_mlx.budget import Budget

PREFILL_BATCH = 8  # prompts that batch_generate reads at once
COMPLETION_BATCH, MAX_TOKENS = 32, 128  # mlx_lm.batch_generate's own: answers at once, and tokens of each
COUNTERS = (  # of `model.tiny_qmoe.stats()`, that only grow
    "expert_hits",
    "expert_misses",
    "records_read",
    "bytes_read",
    "read_retries",
    "direct_reads",
    "io_wait_s",
    "disk_busy_s",
    "stalls",
    "lookahead_reads",
    "lookahead_used",
)


def stream_generate(
    model: "nn.Module", tokenizer: "TokenizerWrapper", prompt: str | Sequence[int], **options: Any
) -> "Generator[GenerationResponse, None, None]":
    """mlx_lm.stream_generate with a prefill chunk that the memory budget counted on; an encoder-decoder reads the
    prompt with its encoder, and fills the prompt's sentinels if it has some.

    Args:
        model, tokenizer: from `load`.
        prompt: text or token ids.
        options: as mlx_lm.stream_generate takes them (max_tokens, sampler, logits_processors, prompt_cache, ...).

    Yields:
        mlx_lm's GenerationResponse.

    Raises:
        ValueError: a prompt without tokens, or with one that the model does not have; the model has been closed.
    """
    from mlx_lm import stream_generate as stream

    from tiny_qmoe_mlx import generate_masked, masked_spans
    from tiny_qmoe_mlx.footprint import PREFILL_CHUNK

    ids = _encode(tokenizer, prompt)
    if ids or "input_embeddings" not in options:
        _check(model, ids)
    if masked_spans.is_encoder_decoder({"model_type": getattr(model, "model_type", None)}):
        return generate_masked.stream(model, tokenizer, ids, **options)
    return stream(model, tokenizer, ids, **{"prefill_step_size": PREFILL_CHUNK, **options})


def generate(
    model: "nn.Module",
    tokenizer: "TokenizerWrapper",
    prompt: str | Sequence[int],
    verbose: bool = False,
    **options: Any,
) -> str:
    """The text that `stream_generate` yields, whole; verbose: printed as it comes, too."""
    pieces = []
    for response in stream_generate(model, tokenizer, prompt, **options):
        pieces.append(response.text)
        if verbose:
            write(response.text)
    if verbose:
        print()
    return "".join(pieces)


def batch_generate(
    model: "nn.Module", tokenizer: "TokenizerWrapper", prompts: Sequence[str | Sequence[int]], **options: Any
) -> "BatchResponse":
    """mlx_lm.batch_generate: answers to several prompts, computed side by side, so that each expert read serves all.

    A prompt's chunk is as much shorter as more of them are read at once. Each has a KV cache as long as the longest
    prompt with its answer and a step of 256 tokens: prompts whose caches fit neither the context given to `load` nor
    what the budget has to spare beside all experts wait until others are done. With return_prompt_caches those of all
    prompts come on top of the budget.

    Args:
        model, tokenizer: from `load`.
        prompts: texts or token ids, each of at least one token.
        options: as mlx_lm.batch_generate takes them (max_tokens, one for all or a list; sampler, logits_processors,
            completion_batch_size, prefill_batch_size, ...).

    Returns:
        mlx_lm's BatchResponse: texts in the order of the prompts, and stats.

    Raises:
        ValueError: a prompt without tokens, or with one that the model does not have; the model has been closed, or is
            an encoder-decoder; a batch size below 1.
    """
    from mlx_lm import batch_generate as batch

    from tiny_qmoe_mlx.footprint import PREFILL_CHUNK
    from tiny_qmoe_mlx.masked_spans import refuse

    refuse({"model_type": getattr(model, "model_type", None)}, "batch_generate")
    ids = [_encode(tokenizer, prompt) for prompt in prompts]
    if not all(ids):
        raise ValueError(f"[prompt] {ids.index([])} of the batch should have at least one token, it has none.")
    for each in ids:
        _check(model, each)
    options = {"prefill_batch_size": PREFILL_BATCH, **options}
    for name in ("prefill_batch_size", "completion_batch_size"):
        if options.get(name, 1) < 1:  # with which mlx-lm gives empty texts
            raise ValueError(f"[options] {name} should be at least 1, received {options[name]}.")
    if hasattr(model, "tiny_qmoe"):
        options |= _batch_sizes(_rows(model.tiny_qmoe.budget, ids, options), len(ids), options)
    rows = max(1, min(len(ids), options["prefill_batch_size"]))
    return batch(model, tokenizer, ids, **{"prefill_step_size": max(1, PREFILL_CHUNK // rows), **options})


def _rows(budget: "Budget", ids: list[list[int]], options: dict[str, Any]) -> int:
    """Prompts at a time whose KV caches fit what the budget keeps for them, and what it has beside all experts."""
    from tiny_qmoe_mlx.footprint import KV_STEP

    most = options.get("max_tokens", MAX_TOKENS)
    each = most if isinstance(most, list | tuple) else [most] * len(ids)
    held = [_held(caches) for caches in options.get("prompt_caches") or [[]] * len(ids)]
    longest = max((sum(parts) for parts in zip(map(len, ids), each, held, strict=False)), default=0)
    spare = max(0, budget.budget_bytes - budget.resident_budget_bytes)
    row = budget.kv_bytes * (longest + KV_STEP) // (budget.context + KV_STEP)
    return max(1, (budget.kv_bytes + spare) // row) if row else len(ids)


def _held(caches: list[Any]) -> int:
    """Tokens in a prompt's caches, where they say it."""
    return max((entry.offset for entry in caches if isinstance(getattr(entry, "offset", None), int)), default=0)


def _batch_sizes(rows: int, prompts: int, options: dict[str, Any]) -> dict[str, int]:
    """mlx-lm's batch sizes with which no more than `rows` are under way: it adds prompts to those being read while
    those written are fewer than one size, so that both sizes together, less one, is the most there can be."""
    prefill, completion = options["prefill_batch_size"], options.get("completion_batch_size", COMPLETION_BATCH)
    if prompts <= rows:
        return {}
    prefill = min(prefill, (rows + 1) // 2)
    return {"prefill_batch_size": prefill, "completion_batch_size": min(completion, rows + 1 - prefill)}


def _check(model: "nn.Module", ids: list[int]) -> None:
    """Refuse what a converted model cannot read; a plain one of mlx-lm's says itself what it is made of."""
    from tiny_qmoe_mlx.vocabulary import check_ids

    if hasattr(model, "tiny_qmoe"):
        check_ids(model.tiny_qmoe.container.config, ids)


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
    from tiny_qmoe_mlx.staging import write_named

    args = options.parse(argv)
    text = options.prompt_text(args)
    directory = locate.model_directory(args.model, args.quiet or args.json)

    from tiny_qmoe_mlx import budget, generate_masked, masked_spans, models, prompt_cache
    from tiny_qmoe_mlx import generate_setup as setup
    from tiny_qmoe_mlx.original.checkpoint import read_config

    fills = masked_spans.is_encoder_decoder(read_config(directory))
    if fills:
        generate_masked.check_options(args)
        fills = masked_spans.SENTINEL.search(text) is not None
    tokenizer = models.open_tokenizer(directory)
    setup.check_tokens(directory, tokenizer, args)
    setup.check_length(directory, tokenizer, text)
    cache = prompt_cache.open_prompt_cache(directory, args)
    prompt = setup.prompt_ids(tokenizer, text, args)
    context = setup.context(directory, len(prompt), prompt_cache.cached_tokens(cache), args)
    draft, beside = setup.open_draft(directory, tokenizer, context, args)
    memory = budget.parse_memory(args.memory) - beside
    with terminal.Bars(args.quiet or args.json) as bars:
        model, _ = models.load(directory, memory, context, bars, tokenizer, options.streaming_of(args))
    try:
        setup.check_caches(model, cache, args)
        with blas.shared_machine():
            responses = stream_generate(model, tokenizer, prompt, **decoding(tokenizer, draft, cache, args))
            stats = _watch(model, responses, args.json or fills)
    finally:
        model.close()  # which writes the profile, also after Ctrl-C
    if fills:
        stats["filled"] = masked_spans.fill(text, stats["text"])
    if fills and not args.json:
        print(stats["filled"])
    stats["budget_bytes"] += beside
    if draft is None:
        del stats["draft_tokens"]
    if args.stats:
        write_named(Path(args.stats), stats)
    if args.json:
        terminal.print_json(stats)
    else:
        print(summary(stats), file=sys.stderr)
        if any("numpy" in path for path in stats["dispatch"]):
            print("experts were computed by numpy, slowly: the C++ library was not built here", file=sys.stderr)
    return 0


def decoding(tokenizer: Any, draft: Any, cache: Any, args: "argparse.Namespace") -> dict[str, Any]:
    """What the command line says, as mlx_lm.stream_generate takes it; seeds the sampling."""
    import mlx.core as mx
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    from tiny_qmoe_mlx import generate_options as options

    mx.random.seed(args.seed)
    penalty = args.repetition_penalty if args.repetition_penalty != 1 else None
    return {
        "max_tokens": args.max_tokens,
        "sampler": make_sampler(
            0.0 if options.is_greedy(args.temp, args.top_p) else args.temp,
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


def _watch(model: Any, responses: "Iterable[GenerationResponse]", quiet: bool) -> dict[str, Any]:
    """Print the text as it comes, unless quiet, and end the line that it began whatever happens; the run's figures."""
    if quiet:
        return measure(model, responses)
    begun = False

    def show(text: str) -> None:
        nonlocal begun
        begun = True
        write(text)

    try:
        return measure(model, responses, show)
    finally:
        if begun:
            print()


def write(text: str) -> None:
    """Print a piece of an answer at once."""
    print(text, end="", flush=True)


def measure(
    model: Any,
    responses: "Iterable[GenerationResponse]",
    say: Callable[[str], None] | None = None,
    since: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Take responses while they come, and give the run's figures.

    Args:
        model: from `load`.
        responses: of `stream_generate`.
        say: called with each piece of text as it comes.
        since: counters of `model.tiny_qmoe.stats()` that are not to be counted; those since loading are by default.

    Returns:
        The figures that `generate --json` prints; none where nothing came.
    """
    start, first, pieces, tokens, drafted, response = time.perf_counter(), 0.0, [], [], 0, None
    prefill: dict[str, Any] = {}
    for response in responses:
        if not first:
            first, prefill = time.perf_counter() - start, model.tiny_qmoe.stats()
        pieces.append(response.text)
        tokens.append(response.token)
        drafted += response.from_draft
        if say is not None:
            say(response.text)
    if response is None:
        return {}
    own = model.tiny_qmoe.stats()
    decode = {key: own[key] - prefill[key] for key in ("expert_hits", "expert_misses", "bytes_read")}
    own |= {key: own[key] - since[key] for key in COUNTERS} if since else {}
    return {
        "prompt_tokens": response.prompt_tokens,
        "prompt_tps": response.prompt_tps,
        "ttft_s": first,
        "generation_tokens": response.generation_tokens,
        "generation_tps": response.generation_tps,
        "finish_reason": response.finish_reason,
        "tokens": tokens,
        "text": "".join(pieces),
        **own,
        "bytes_per_token": own["bytes_read"] / max(1, response.generation_tokens),
        "decode_hit_rate": decode["expert_hits"] / max(1, decode["expert_hits"] + decode["expert_misses"]),
        "decode_bytes_per_token": decode["bytes_read"] / max(1, response.generation_tokens - 1),
        "draft_tokens": drafted,
    }


def summary(stats: dict[str, Any]) -> str:
    """The figures of `measure` in one line."""
    experts = "no decode step"
    if stats["generation_tokens"] > 1:
        rate, read = 100 * stats["decode_hit_rate"], stats["decode_bytes_per_token"] / 1e9
        experts = f"{rate:.1f} % hits and {read:.4f} GB a token in decode"
    return (
        f"{stats['prompt_tokens']} prompt tokens at {stats['prompt_tps']:.1f}/s, first after {stats['ttft_s']:.2f} s; "
        f"{stats['generation_tokens']} tokens at {stats['generation_tps']:.1f}/s; experts {stats['mode']}, {experts}; "
        f"peak memory {stats['peak_memory_bytes'] / 1e6:.0f} MB of {stats['budget_bytes'] / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    from tiny_qmoe_mlx import terminal

    sys.exit(terminal.run(main))
