"""`python -m tiny_qmoe_mlx.generate`: write text with a converted model under one memory budget."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny_qmoe_mlx import blas, locate, terminal
from tiny_qmoe_mlx.staging import write_json

EXAMPLES = """
  python -m tiny_qmoe_mlx.generate --model demo
  python -m tiny_qmoe_mlx.generate --model qwen3-2bit --prompt "Why is the sky blue?" --memory 6GB
  echo "Tell me a story." | python -m tiny_qmoe_mlx.generate --model demo --prompt - --stats stats.json
"""


def stream_generate(model: Any, tokenizer: Any, prompt: str | list[int], **options: Any) -> Iterator[Any]:
    """mlx_lm.stream_generate with a prefill chunk that the memory budget counted on.

    Args:
        model, tokenizer: from `load`.
        prompt: text or token ids.
        options: as mlx_lm.stream_generate takes them (max_tokens, sampler, logits_processors, prompt_cache, ...).

    Yields:
        mlx_lm's GenerationResponse.
    """
    from mlx_lm import stream_generate as stream

    from tiny_qmoe_mlx.footprint import PREFILL_CHUNK

    return stream(model, tokenizer, prompt, **{"prefill_step_size": PREFILL_CHUNK, **options})


def generate(model: Any, tokenizer: Any, prompt: str | list[int], **options: Any) -> str:
    """The text that `stream_generate` yields, whole."""
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, **options))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = terminal.parser("generate", __doc__.split(": ", 1)[1], EXAMPLES)
    terminal.add_model(p)
    p.add_argument(
        "--prompt", metavar="TEXT|-", help="the prompt; - reads it from standard input (the demo has one of its own)"
    )
    p.add_argument("--system-prompt", metavar="TEXT", help="a system message before the prompt")
    p.add_argument("--ignore-chat-template", action="store_true", help="give the prompt to the model as it is")
    p.add_argument("--max-tokens", type=int, help="most tokens to write (default 256)")
    p.add_argument("--temp", type=float, help="sampling temperature; 0 is greedy (default 0; the demo 0.3)")
    p.add_argument("--top-p", type=float, help="sample from the likeliest tokens of this total probability (default 1)")
    p.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="leave out tokens less likely than this share of the likeliest (default 0)",
    )
    p.add_argument("--repetition-penalty", type=float, help="make recent tokens less likely; 1 is off (default 1)")
    p.add_argument("--seed", type=int, help="of the sampling (default 0)")
    p.add_argument(
        "--memory",
        default="auto",
        metavar="6GB|60%|auto",
        help="budget for everything the process holds (default auto: at most 65%% of the machine)",
    )
    p.add_argument(
        "--context",
        type=int,
        help="tokens that the budget provides for (default 2048, or what prompt and --max-tokens need)",
    )
    add_streaming(p)
    p.add_argument("--stats", metavar="FILE", help="write the run's figures as JSON")
    terminal.add_quiet(p)
    terminal.add_json(p)
    return p


def add_streaming(to: argparse.ArgumentParser) -> None:
    """Add the options of how experts that are not in memory are read."""
    to.add_argument("--profile", metavar="FILE", help="begin with the experts used most so far; written on exit")
    to.add_argument("--trace", metavar="FILE", help="write every routing decision, for benchmarks/replay.py")
    to.add_argument(
        "--lookahead",
        default="auto",
        choices=("auto", "on", "off"),
        help="read ahead what the next layer's router may choose (default auto: where it pays)",
    )
    to.add_argument("--readers", type=int, default=8, metavar="N", help="threads that read experts (default 8)")
    to.add_argument(
        "--checks",
        default="first",
        choices=("first", "always", "never"),
        help="which reads have their checksum verified (default first: a record's first)",
    )


def streaming_of(args: argparse.Namespace) -> Any:
    """The options of `add_streaming` as `load` takes them."""
    from tiny_qmoe_mlx.models import Streaming

    for name, file in (("--profile", args.profile), ("--trace", args.trace)):
        if file and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
            raise ValueError(f"[generate] {name} should name a file in a directory that exists, received {file}.")
    return Streaming(args.readers, args.checks, args.lookahead, args.profile, args.trace)


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    _fill_defaults(args)
    text = _prompt_text(args)
    if args.stats and (Path(args.stats).is_dir() or not Path(args.stats).absolute().parent.is_dir()):
        raise ValueError(f"[generate] --stats should name a file in a directory that exists, received {args.stats}.")
    directory = locate.model_directory(args.model, args.quiet or args.json)

    from tiny_qmoe_mlx import models

    tokenizer = models.open_tokenizer(directory)
    prompt = _prompt_ids(tokenizer, text, args)
    if not prompt:
        raise ValueError(
            "[prompt] should have at least one token, this model's tokenizer makes none of it; give another text."
        )
    context = _context(directory, len(prompt), args)
    with terminal.Bars(args.quiet or args.json) as bars:
        model, _ = models.load(directory, args.memory, context, bars, tokenizer, streaming_of(args))
    try:
        with blas.shared_machine():
            stats = _write(model, tokenizer, prompt, args)
    finally:
        model.close()  # which writes the profile, also after Ctrl-C
    if args.stats:
        write_json(Path(args.stats), stats)
    if args.json:
        terminal.print_json(stats)
    else:
        print(_line(stats), file=sys.stderr)
        if any("numpy" in path for path in stats["dispatch"]):
            print("experts were computed by numpy, slowly: the C++ library was not built here", file=sys.stderr)
    return 0


def _fill_defaults(args: argparse.Namespace) -> None:
    """What the command line left open: the demo's own defaults read better than greedy decoding, which loops."""
    from tiny_qmoe_mlx import demo

    common = {"prompt": None, "max_tokens": 256, "temp": 0.0, "top_p": 1.0, "repetition_penalty": 1.0, "seed": 0}
    own = {
        "prompt": demo.PROMPT,
        "max_tokens": demo.MAX_TOKENS,
        "temp": demo.TEMPERATURE,
        "top_p": demo.TOP_P,
        "repetition_penalty": demo.REPETITION_PENALTY,
        "seed": demo.SEED,
    }
    for name, value in (own if args.model == locate.DEMO else common).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, low, high in (
        ("max_tokens", 1, 1 << 20),
        ("temp", 0, 100),
        ("top_p", 0, 1),
        ("min_p", 0, 1),
        ("repetition_penalty", 0.01, 100),
        ("seed", 0, 2**64 - 1),
    ):
        if not low <= getattr(args, name) <= high:
            raise ValueError(
                f"[generate] --{name.replace('_', '-')} should lie in {low} to {high}, received {getattr(args, name)}."
            )


def _prompt_text(args: argparse.Namespace) -> str:
    try:
        text = args.prompt if args.prompt != "-" else sys.stdin.read() if sys.stdin else ""  # None where it was closed
        for part in (text, args.system_prompt):
            (part or "").encode()  # bytes that were no UTF-8 came in as lone surrogates, which no tokenizer takes
    except UnicodeError as error:
        raise ValueError(f"[prompt] should be UTF-8 text and is not: {error}.") from error
    if not text or not text.strip():
        raise ValueError(
            "[prompt] should be some text, it is empty; give --prompt TEXT, or --prompt - and text on standard input."
        )
    return text


def _prompt_ids(tokenizer: Any, text: str, args: argparse.Namespace) -> list[int]:
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        ids = tokenizer.encode(text)
    else:
        system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
        ids = tokenizer.apply_chat_template([*system, {"role": "user", "content": text}], add_generation_prompt=True)
    return list(ids)


def _context(directory: Path, prompt_tokens: int, args: argparse.Namespace) -> int:
    """Tokens of context to provide for; refuses what the model or --context cannot hold."""
    from tiny_qmoe_mlx import budget, footprint
    from tiny_qmoe_mlx.original import checkpoint

    needed = prompt_tokens + args.max_tokens
    limit = footprint.longest_context(checkpoint.read_config(directory))
    if needed > limit:
        raise ValueError(
            f"[prompt] has {prompt_tokens} tokens and --max-tokens is {args.max_tokens}; together they should be at "
            f"most "
            f"the model's {limit}; give a shorter prompt or fewer tokens."
        )
    if args.context is not None and not needed <= args.context <= limit:
        raise ValueError(
            f"[generate] --context should lie between {needed} (prompt and --max-tokens) and the model's {limit}, "
            f"received {args.context}."
        )
    return args.context or min(limit, max(needed, budget.DEFAULT_CONTEXT))


def _write(model: Any, tokenizer: Any, prompt: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Generate, streaming to stdout; the run's figures."""
    import time

    import mlx.core as mx
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    mx.random.seed(args.seed)
    penalty = args.repetition_penalty if args.repetition_penalty != 1 else None
    options = {
        "max_tokens": args.max_tokens,
        "sampler": make_sampler(args.temp, top_p=args.top_p if args.top_p < 1 else 0.0, min_p=args.min_p),
        "logits_processors": make_logits_processors(repetition_penalty=penalty, repetition_context_size=64),
    }
    start, first, pieces, tokens, response = time.perf_counter(), 0.0, [], [], None
    for response in stream_generate(model, tokenizer, prompt, **options):
        if not first:
            first, prefill = time.perf_counter() - start, model.tiny_qmoe.stats()
        pieces.append(response.text)
        tokens.append(response.token)
        if not args.json:
            print(response.text, end="", flush=True)
    if not args.json:
        print()
    return _stats(model, response, first, prefill, tokens, "".join(pieces))


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
    sys.exit(terminal.run(main))
