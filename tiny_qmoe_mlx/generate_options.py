"""What a person may ask of `generate` and `chat`: their options, those of mlx_lm.generate among them, and what is
refused before a model is loaded. Imports nothing heavy: `--help` answers at once."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_qmoe_mlx import locate, terminal
from tiny_qmoe_mlx.errors import shown

if TYPE_CHECKING:
    from tiny_qmoe_mlx.runtime import Streaming

DESCRIPTION = "write text with a converted model under one memory budget."
EXAMPLES = """
  python -m tiny_qmoe_mlx.generate --model demo
  python -m tiny_qmoe_mlx.generate --model qwen3-2bit --prompt "Why is the sky blue?" --memory 6GB
  echo "Tell me a story." | python -m tiny_qmoe_mlx.generate --model demo --prompt - --stats stats.json
"""
MANY = 1 << 20
MOST_TEXT = 1 << 24  # characters that are read from standard input at once: more than any context holds
COLDEST = 1e-6  # below it the likeliest token is alone, and float32 has no room for logits over the temperature
RANGES = (
    ("max_tokens", 1, MANY),
    ("temp", 0, 100),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("min_tokens_to_keep", 1, MANY),
    ("top_k", 0, MANY),
    ("xtc_probability", 0, 1),
    ("xtc_threshold", 0, 0.5),
    ("repetition_penalty", 0.01, 100),
    ("seed", 0, 2**64 - 1),
    ("max_kv_size", 16, MANY),
    ("quantized_kv_start", 0, MANY),
    ("num_draft_tokens", 1, 64),
)
EXCLUDE = (
    ("max_kv_size", "kv_bits"),  # mlx-lm quantizes no rotating cache
    ("max_kv_size", "draft_model"),  # nor takes back what one has overwritten
    ("max_kv_size", "prompt_cache_file"),  # a cache has its size already
    ("draft_model", "prompt_cache_file"),  # which holds nothing for the draft model
    ("system_prompt", "prompt_cache_file"),  # it would come before what the cache holds
)
TEMPLATE_OWN = ("conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message")  # said by us


def is_greedy(temperature: float, top_p: float) -> bool:
    """Whether the likeliest token is the only one that may be chosen: mlx-lm would draw from all where the one or the
    other vanishes in float32."""
    return min(temperature, top_p) < COLDEST


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = terminal.parser("generate", DESCRIPTION, EXAMPLES)
    terminal.add_model(p)
    p.add_argument(
        "--prompt",
        metavar="TEXT|-",
        help="the prompt; - reads it from standard input (the demo has one of its own)",
    )
    add_template(p)
    p.add_argument("--prefill-response", metavar="TEXT", help="how the answer begins; the model goes on from there")
    p.add_argument("--ignore-chat-template", action="store_true", help="give the prompt to the model as it is")
    add_length(p)
    add_sampling(p)
    add_memory(p)
    p.add_argument(
        "--prompt-cache-file", metavar="FILE", help="go on from a prompt that mlx_lm.cache_prompt has computed"
    )
    add_draft(p)
    add_streaming(p)
    p.add_argument("--stats", metavar="FILE", help="write the run's figures as JSON")
    terminal.add_quiet(p)
    terminal.add_json(p)
    for short, name, kind in (("-p", "prompt", str), ("-m", "max_tokens", int)):  # mlx_lm.generate's
        p.add_argument(short, dest=name, type=kind, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return p


def add_template(to: argparse.ArgumentParser) -> None:
    """Add the options of how a prompt becomes a chat."""
    to.add_argument("--system-prompt", metavar="TEXT", help="a system message before the prompt")
    to.add_argument(
        "--chat-template-config",
        metavar="JSON",
        help='more for the chat template, as {"enable_thinking": false}',
    )


def add_length(to: argparse.ArgumentParser) -> None:
    """Add the options of where a text ends."""
    to.add_argument("--max-tokens", type=int, help="most tokens to write at a time (default 256)")
    to.add_argument("--extra-eos-token", nargs="+", default=(), metavar="TOKEN", help="tokens that end the text too")


def add_sampling(to: argparse.ArgumentParser) -> None:
    """Add the options of how a token is chosen."""
    to.add_argument("--temp", type=float, help="sampling temperature; 0 is greedy (default 0; the demo 0.3)")
    to.add_argument(
        "--top-p", type=float, help="sample from the likeliest tokens of this total probability (default 1)"
    )
    to.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="leave out tokens less likely than this share of the likeliest (default 0)",
    )
    to.add_argument("--min-tokens-to-keep", type=int, default=1, help="tokens that --min-p leaves at least (default 1)")
    to.add_argument("--top-k", type=int, default=0, help="sample from so many of the likeliest; 0 is all (default 0)")
    to.add_argument(
        "--xtc-probability",
        type=float,
        default=0.0,
        help="how often all but the least likely of several likely tokens are left out (default 0)",
    )
    to.add_argument(
        "--xtc-threshold", type=float, default=0.1, help="probability of a likely token there (default 0.1)"
    )
    to.add_argument("--repetition-penalty", type=float, help="make recent tokens less likely; 1 is off (default 1)")
    to.add_argument("--seed", type=int, help="of the sampling (default 0)")


def add_budget(to: argparse.ArgumentParser) -> None:
    """Add --memory."""
    to.add_argument(
        "--memory",
        default="auto",
        metavar="6GB|60%|auto",
        help="budget for everything the process holds (default auto: at most 65%% of the machine)",
    )


def add_memory(to: argparse.ArgumentParser) -> None:
    """Add the options of the budget and of the KV cache, which is part of it."""
    add_budget(to)
    to.add_argument(
        "--context",
        type=int,
        help="tokens that the budget provides for (default 2048; `generate`: or what prompt and --max-tokens need)",
    )
    to.add_argument(
        "--max-kv-size", type=int, metavar="N", help="keep the KV cache of the last N tokens and the first 4 alone"
    )
    to.add_argument("--kv-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="quantize the KV cache to so many bits")
    to.add_argument(
        "--kv-group-size", type=int, default=64, choices=(32, 64, 128), help="values that share a scale (default 64)"
    )
    to.add_argument(
        "--quantized-kv-start", type=int, default=5000, metavar="N", help="from this token on (default 5000)"
    )


def add_draft(to: argparse.ArgumentParser) -> None:
    """Add the options of speculative decoding."""
    to.add_argument(
        "--draft-model",
        metavar="DIR|HUB_ID",
        help="a small model of mlx-lm with the same tokenizer, whose guesses the model checks; its memory is part of "
        "the budget",
    )
    to.add_argument("--num-draft-tokens", type=int, default=3, metavar="N", help="tokens that it guesses (default 3)")


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


def streaming_of(args: argparse.Namespace) -> "Streaming":
    """The options of `add_streaming` as `load` takes them."""
    from tiny_qmoe_mlx.runtime import Streaming

    for name, file in (("--profile", args.profile), ("--trace", args.trace)):
        require_writable(name, file)
    return Streaming(args.readers, args.checks, args.lookahead, args.profile, args.trace)


def require_writable(name: str, file: str | None) -> None:
    """Refuse a file that could not be written when the run is over.

    Raises:
        ValueError: it is a directory, or lies in none that exists.
    """
    if file and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
        raise ValueError(f"[options] {name} should name a file in a directory that exists, received {file}.")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line with every default filled in, `chat_template_config` as a dictionary.

    Raises:
        ValueError: a value out of range, or options that exclude each other.
    """
    args = parser().parse_args(argv)
    check(args)
    require_writable("--stats", args.stats)
    return args


def check(args: argparse.Namespace) -> None:
    """Fill in every default, make `chat_template_config` a dictionary; raises as `parse`."""
    _fill_defaults(args)
    for name, low, high in RANGES:
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"[options] {_flag(name)} should lie in {low} to {high}, received {value}.")
    for one, other in EXCLUDE:
        if getattr(args, one) is not None and getattr(args, other) is not None:
            raise ValueError(f"[options] {_flag(one)} and {_flag(other)} exclude each other; leave one of them out.")
    args.chat_template_config = _template_config(args.chat_template_config)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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


def _template_config(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"[options] --chat-template-config should be JSON and is not: {error}.") from error
    if not isinstance(value, dict) or set(value).intersection(TEMPLATE_OWN):
        raise ValueError(
            f"[options] --chat-template-config should be a JSON object without {', '.join(TEMPLATE_OWN)}, "
            f"received {shown(text)}."
        )
    return value


def prompt_text(args: argparse.Namespace) -> str:
    """The prompt, from the command line or from standard input.

    Raises:
        ValueError: it is empty, no UTF-8, or has no end.
    """
    try:
        # None where it was closed
        text = args.prompt if args.prompt != "-" else sys.stdin.read(MOST_TEXT + 1) if sys.stdin else ""
        for part in (text, args.system_prompt, args.prefill_response):
            (part or "").encode()  # bytes that were no UTF-8 came in as lone surrogates, which no tokenizer takes
    except UnicodeError as error:
        raise ValueError(f"[prompt] should be UTF-8 text and is not: {error}.") from error
    if text and len(text) > MOST_TEXT:
        raise ValueError(f"[prompt] should have at most {MOST_TEXT} characters, standard input has more; give fewer.")
    if not text or not text.strip():
        raise ValueError(
            "[prompt] should be some text, it is empty; give --prompt TEXT, or --prompt - and text on standard input."
        )
    return text
