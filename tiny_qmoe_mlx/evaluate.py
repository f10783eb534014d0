"""`python -m tiny_qmoe_mlx.evaluate`: perplexity of a model on a text, and how far its predictions are from another
model's.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny_qmoe_mlx import blas, locate, terminal
from tiny_qmoe_mlx.staging import MANIFEST, finite

EXAMPLES = """
  python -m tiny_qmoe_mlx.evaluate --model qwen3-2bit --text held-out.txt
  python -m tiny_qmoe_mlx.evaluate --model qwen3-2bit --text held-out.txt --against Qwen/Qwen3-30B-A3B --json
  python -m tiny_qmoe_mlx.evaluate --model qwen3-2bit --against Qwen/Qwen3-30B-A3B --report
"""


def open_any(name: str, memory: str | int = "auto", quiet: bool = False, context: int = 512) -> tuple[Any, Any]:
    """(model, tokenizer) of a converted model, or of an original checkpoint by plain mlx-lm, in memory if it fits."""
    from tiny_qmoe_mlx import footprint, masked_spans, models
    from tiny_qmoe_mlx.masked_spans import is_encoder_decoder
    from tiny_qmoe_mlx.original import checkpoint
    from tiny_qmoe_mlx.report.compare import open_original

    directory = locate.model_directory(name, quiet)
    config = checkpoint.read_config(directory)
    converted = "tiny_qmoe" in config or (directory / MANIFEST).is_file()
    tokenizer = models.open_tokenizer(directory) if converted else None
    limit = footprint.longest_context(config)
    context += masked_spans.extra(context) if is_encoder_decoder(config) else 0
    if context > limit:
        raise ValueError(
            f"[evaluate] --window should be at most the model's context of {limit} tokens, received {context}."
        )
    if converted:
        with terminal.Bars(quiet) as bars:
            return models.load(directory, memory, context, bars, tokenizer)
    model, config, _ = open_original(directory, 0, context)
    return model, checkpoint.open_tokenizer(directory, config)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = terminal.parser("evaluate", __doc__.split(": ", 1)[1], EXAMPLES)
    terminal.add_model(p)
    p.add_argument(
        "--text", metavar="FILE", help="UTF-8 text to predict (with --report default: text that the original writes)"
    )
    p.add_argument(
        "--against",
        metavar="DIR|HUB_ID",
        help="a converted or original model: KL divergence from it and top-1 agreement with it",
    )
    p.add_argument(
        "--window",
        type=int,
        default=512,
        help="tokens predicted with one context; of an encoder-decoder those of a text with spans masked (default 512)",
    )
    p.add_argument("--tokens", type=int, default=8192, help="most tokens to predict (default 8192)")
    p.add_argument(
        "--report",
        action="store_true",
        help="measure everything, generated JSON and tool tasks too, against the original, and write quality.json, "
        "pictures and the model card into the converted directory",
    )
    p.add_argument("--tasks", type=int, default=40, help="tasks of a kind with --report; 0 for none (default 40)")
    p.add_argument(
        "--memory",
        default="auto",
        metavar="6GB|60%|auto",
        help="budget of the converted model (default auto; not with --report)",
    )
    terminal.add_quiet(p)
    terminal.add_json(p)
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.window < 1 or args.tokens < 1:
        raise ValueError(
            f"[evaluate] --window and --tokens should be at least 1, received {args.window} and {args.tokens}."
        )
    quiet = args.quiet or args.json
    if args.report:
        return _report(args, quiet)
    if not args.text:
        raise ValueError("[evaluate] --text should name a text to predict; only --report can do without.")
    from tiny_qmoe_mlx.conversion.text import read_text
    from tiny_qmoe_mlx.masked_spans import Masked
    from tiny_qmoe_mlx.report.compare import evaluate, windows_of

    text = read_text(Path(args.text), "text")
    config = _config(args, quiet)
    model, tokenizer = open_any(args.model, args.memory, quiet, args.window)
    against = open_any(args.against, args.memory, quiet, args.window)[0] if args.against is not None else None
    windows = windows_of(text, args.window, args.tokens, tokenizer, config)
    with terminal.Bars(quiet) as bars, blas.shared_machine():
        found = evaluate(model, windows, against, bars)
    if not isinstance(windows[0], Masked):  # sentinels are no bytes of a text
        read = sum(len(tokenizer.decode(w[1:]).encode()) for w in windows)
        found["bits_per_byte"] = found["nll"] * found["tokens"] / math.log(2) / max(1, read)
    if args.json:
        terminal.print_json({"model": args.model, "against": args.against, "text": args.text, **finite(found)})
    else:
        print("\n".join(_lines(found)))
    return 0


def _config(args: argparse.Namespace, quiet: bool) -> dict[str, Any]:
    """The model's config; before anything is loaded.

    Raises:
        ValueError: one of two models is an encoder-decoder, the other is not.
    """
    from tiny_qmoe_mlx.masked_spans import is_encoder_decoder
    from tiny_qmoe_mlx.original.checkpoint import read_config

    names = [name for name in (args.model, args.against) if name is not None]
    configs = [read_config(locate.model_directory(name, quiet)) for name in names]
    if len({is_encoder_decoder(config) for config in configs}) == 2:
        raise ValueError("[evaluate] --model and --against should be both encoder-decoders or neither, one of them is.")
    return configs[0]


def _report(args: argparse.Namespace, quiet: bool) -> int:
    if not args.against or args.tasks < 0:
        raise ValueError("[evaluate] --report should have --against with the original, and --tasks of at least 0.")
    if args.memory != "auto":
        raise ValueError(
            f"[evaluate] --report takes what the machine has beside the original, received --memory {args.memory}; "
            "leave it out."
        )
    from tiny_qmoe_mlx.original import checkpoint
    from tiny_qmoe_mlx.report import write as report

    directory = locate.model_directory(args.model, quiet)
    source = checkpoint.find_directory(args.against, quiet=quiet)
    extent = report.Extent(args.tokens, args.window, args.tasks)
    with terminal.Bars(quiet) as bars:
        quality = report.measure(directory, source, Path(args.text) if args.text else None, extent, bars)
    for note in report.write_report(directory, source, quality):
        print(note, file=sys.stderr)
    if args.json:
        terminal.print_json({"model": args.model, "against": args.against, **finite(quality)})
    else:
        kl = quality["kl"]
        print(
            f"{directory}: KL mean {kl['mean']:.4f}, median {kl['median']:.4f}, 99th percentile {kl['p99']:.4f}; same "
            f"best token {100 * quality['top1']:.1f} %; the rest is in {report.QUALITY} and README.md"
        )
    return 0


def _lines(found: dict[str, float]) -> Iterator[str]:
    words, perplexity = f"{found['tokens']} tokens", f"perplexity {found['perplexity']:.3f}"
    if "bits_per_byte" in found:
        yield f"{words}: {perplexity}, {found['bits_per_byte']:.4f} bits per byte"
    else:
        yield f"{words} of masked spans: loss {found['nll']:.4f} ({perplexity})"
    if "kl_mean" in found:
        yield (
            f"against the other model (perplexity {found['against_perplexity']:.3f}): KL mean "
            f"{found['kl_mean']:.4f}, median "
            f"{found['kl_median']:.4f}, 99th percentile {found['kl_p99']:.4f}; same best token "
            f"{100 * found['top1']:.1f} %"
        )


if __name__ == "__main__":
    sys.exit(terminal.run(main))
