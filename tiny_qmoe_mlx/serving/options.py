"""What a person may ask of `server`: mlx_lm.server's flags, and those of the budget. Imports nothing heavy."""

import argparse
import json
from typing import Any

from tiny_qmoe_mlx import generate_options, terminal
from tiny_qmoe_mlx.errors import shown

DESCRIPTION = (
    "serve a converted model under one memory budget: OpenAI's API at /v1, a page at /, figures at /metrics; several "
    "clients at once share every expert that is read."
)
EXAMPLES = """
  python -m tiny_qmoe_mlx.server --model demo
  python -m tiny_qmoe_mlx.server --model qwen3-2bit --memory 6GB --context 8192 --port 8000
  python -m tiny_qmoe_mlx.server --model qwen3-2bit --host 0.0.0.0 --api-key-file key.txt --allowed-host box.example
  curl http://127.0.0.1:8080/v1/chat/completions -H "Content-Type: application/json" \\
    -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
"""
MANY = 1 << 20
MOST_KEY = 1 << 14  # bytes: a header has no more
TEMPLATE_OWN = (*generate_options.TEMPLATE_OWN, "tools")  # said by us, or by each request
RANGES = (
    ("port", 0, 65535),
    ("context", 16, MANY),
    ("temp", 0, 100),
    ("top_p", 0, 1),
    ("top_k", 0, MANY),
    ("min_p", 0, 1),
    ("max_tokens", 1, MANY),
    ("decode_concurrency", 1, 256),
    ("prompt_concurrency", 1, 256),
    ("queue", 1, 100_000),
    ("prompt_cache_size", 1, 10_000),
    ("num_draft_tokens", 1, 64),
    ("quantized_kv_start", 0, MANY),
    ("grace", 0, 3600),
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = terminal.parser("server", DESCRIPTION, EXAMPLES)
    terminal.add_model(p)
    add_network(p)
    add_budget(p)
    add_defaults(p)
    generate_options.add_draft(p)
    generate_options.add_streaming(p)
    p.add_argument(
        "--log-level",
        default="warning",
        type=str.lower,
        choices=("debug", "info", "warning", "error", "critical"),
        help="info has a line for each request; only debug has what was asked and answered (default warning)",
    )
    terminal.add_quiet(p)
    return p


def add_network(to: argparse.ArgumentParser) -> None:
    """Add the options of who may ask."""
    to.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    to.add_argument("--port", type=int, default=8080, help="port to listen on; 0 is any free one (default 8080)")
    to.add_argument("--api-key-file", metavar="FILE", help="clients have to send the key in it, as a bearer token")
    to.add_argument(
        "--allowed-origins",
        default="",
        metavar="URL,URL|*",
        help="web pages of other sites that may ask, by their origin (default: pages of this server and of localhost)",
    )
    to.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name by which clients call this machine, as a proxy's or a container's; may be repeated "
        "(default: localhost; with a --host that is not local also addresses and this machine's own name)",
    )
    to.add_argument("--queue", type=int, default=64, help="requests that may wait; more are sent away (default 64)")
    to.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that answers have when it stops (default 30)",
    )


def add_budget(to: argparse.ArgumentParser) -> None:
    """Add the options of the budget, and of how much is computed at once."""
    generate_options.add_budget(to)
    to.add_argument(
        "--context",
        type=int,
        default=4096,
        help="tokens of KV cache that the budget provides for, of one request or of several together; those that do "
        "not fit wait (default 4096)",
    )
    to.add_argument(
        "--decode-concurrency", type=int, default=8, metavar="N", help="requests computed at once (default 8)"
    )
    to.add_argument("--prompt-concurrency", type=int, default=8, metavar="N", help="prompts of them (default 8)")
    to.add_argument(
        "--prompt-cache-bytes",
        metavar="SIZE",
        help="memory for the KV cache of prompts answered before; 0 is none (default: as much as --context takes)",
    )
    to.add_argument("--prompt-cache-size", type=int, default=10, metavar="N", help="prompts kept there (default 10)")
    to.add_argument(
        "--kv-bits",
        type=int,
        choices=(2, 3, 4, 5, 6, 8),
        help="quantize the KV cache; requests are served in turn",
    )
    to.add_argument("--kv-group-size", type=int, default=64, choices=(32, 64, 128), help="values that share a scale")
    to.add_argument("--quantized-kv-start", type=int, default=5000, metavar="N", help="from here on (default 5000)")


def add_defaults(to: argparse.ArgumentParser) -> None:
    """Add what holds where a request does not say."""
    to.add_argument("--temp", type=float, default=0.0, help="sampling temperature; 0 is greedy (default 0)")
    to.add_argument("--top-p", type=float, default=1.0, help="total probability of the tokens sampled from (default 1)")
    to.add_argument("--top-k", type=int, default=0, help="number of the tokens sampled from; 0 is all (default 0)")
    to.add_argument("--min-p", type=float, default=0.0, help="least share of the likeliest token (default 0)")
    to.add_argument("--max-tokens", type=int, default=512, help="most tokens of an answer (default 512)")
    to.add_argument("--chat-template", metavar="TEXT", help="a chat template (Jinja) in place of the model's own")
    to.add_argument(
        "--chat-template-args", metavar="JSON", help='more for the chat template, as {"enable_thinking": false}'
    )


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, with what mlx_lm.server's own classes expect beside it.

    Raises:
        ValueError: a value out of range, or options that exclude each other.
    """
    args = parser().parse_args(argv)
    for name, low, high in RANGES:
        if not low <= getattr(args, name) <= high:
            raise ValueError(
                f"[server] --{name.replace('_', '-')} should lie in {low} to {high}, received {getattr(args, name)}."
            )
    if args.draft_model and args.kv_bits:
        raise ValueError("[server] --draft-model and --kv-bits exclude each other; leave one of them out.")
    args.allowed_origins = [origin.strip().rstrip("/") for origin in args.allowed_origins.split(",") if origin.strip()]
    args.allowed_host = [host_name(name) for name in args.allowed_host]
    args.chat_template_args = template_args(args.chat_template_args)
    args.api_key = api_key(args.api_key_file)
    args.prompt_concurrency = min(args.prompt_concurrency, args.decode_concurrency)
    # of mlx_lm.server, and not offered: adapters, other code, other machines
    args.adapter_path, args.trust_remote_code, args.pipeline, args.json = None, False, False, False
    return args


def host_name(name: str) -> str:
    """A value of --allowed-host, as the header Host has it.

    Raises:
        ValueError: it is more than a name.
    """
    if not name or set(name) & set("/:@*?# ") or not name.isascii():
        raise ValueError(f"[server] --allowed-host should be a name as in box.example, received {shown(name)}.")
    return name.lower().removesuffix(".")


def template_args(text: str | None) -> dict[str, Any]:
    """The value of --chat-template-args."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"[server] --chat-template-args should be JSON and is not: {error}.") from error
    if not isinstance(value, dict) or set(value).intersection(TEMPLATE_OWN):
        own = ", ".join(TEMPLATE_OWN)
        raise ValueError(
            f"[server] --chat-template-args should be a JSON object without {own}, received {shown(text)}."
        )
    return value


def api_key(file: str | None) -> str | None:
    """The key in a file: its text without the white space around it.

    Raises:
        ValueError: the file cannot be read, holds no key, or one that could not be sent in a header.
    """
    if file is None:
        return None
    try:
        with open(file, "rb") as opened:  # a pipe too, as a shell's <(pass key) is one
            text = opened.read(MOST_KEY).decode(errors="replace").strip()
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"[server] --api-key-file should name a file with a key, {file}: {why}.") from error
    if not text or not text.isascii() or not text.isprintable() or " " in text or len(text) >= MOST_KEY:
        raise ValueError(f"[server] --api-key-file should hold one key of visible ASCII characters, {file} does not.")
    return text
