"""`python -m tiny_qmoe_mlx.evaluate`: perplexity of a model on a text, and how far its predictions are from another
model's.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tiny_qmoe_mlx import blas, locate, terminal
from tiny_qmoe_mlx.staging import MANIFEST

EXAMPLES = """
  python -m tiny_qmoe_mlx.evaluate --model qwen3-2bit --text held-out.txt
  python -m tiny_qmoe_mlx.evaluate --model qwen3-2bit --text held-out.txt --against Qwen/Qwen3-30B-A3B --json
"""
Progress = Callable[[str, int, int], None]


def evaluate(
    model: Any, windows: list[list[int]], against: Any = None, progress: Progress = lambda what, done, total: None
) -> dict[str, float]:
    """Score a model on token windows; the first token of each is context only.

    Args:
        model: maps int (1, tokens) to logits (1, tokens, vocabulary).
        windows: token ids.
        against: another model over the same vocabulary, whose predictions are the truth for KL and top-1.

    Returns:
        tokens, nll (mean, nats), perplexity; with `against` also kl_mean, kl_median, kl_p99 (nats), top1 (share of
        positions where both like the same token best) and against_perplexity.

    Raises:
        ValueError: the two vocabularies differ.
    """
    import numpy as np

    rows = []
    for i, window in enumerate(windows):
        rows.append(_score(model, against, window))
        progress("evaluating", i + 1, len(windows))
    columns = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
    nll = float(columns[0].mean())
    out = {"tokens": len(columns[0]), "nll": nll, "perplexity": math.exp(nll)}
    if against is not None:
        kl = columns[2]
        out |= {
            "kl_mean": float(kl.mean()),
            "kl_median": float(np.median(kl)),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "top1": float(columns[3].mean()),
            "against_perplexity": math.exp(float(columns[1].mean())),
        }
    return out


def _score(model: Any, against: Any, window: list[int]) -> list[Any]:
    """Per predicted token: nll, and with another model its nll, the KL divergence from it, and whether the best
    agree.
    """
    import mlx.core as mx
    import numpy as np

    inputs, targets = mx.array(window[:-1])[None], mx.array(window[1:])[:, None]

    def log_probabilities(m: Any) -> mx.array:
        logits = m(inputs)[0].astype(mx.float32)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    q = log_probabilities(model)
    parts = [-mx.take_along_axis(q, targets, -1)[:, 0]]
    if against is not None:
        p = log_probabilities(against)
        if p.shape != q.shape:
            raise ValueError(
                f"[evaluate] both models should have one vocabulary, received {q.shape[-1]} and {p.shape[-1]} tokens."
            )
        kl = (mx.exp(p) * (p - q)).sum(-1)
        parts += [-mx.take_along_axis(p, targets, -1)[:, 0], kl, (p.argmax(-1) == q.argmax(-1)).astype(mx.float32)]
    mx.eval(parts)
    return [np.array(part) for part in parts]


def cut(ids: list[int], length: int, tokens: int) -> list[list[int]]:
    """Windows of `length` predictions each (one token more), one after the other, of at most `tokens` predictions.

    Raises:
        ValueError: fewer than two tokens.
    """
    ids = ids[: tokens + 1]
    if len(ids) < 2:
        raise ValueError("[evaluate] the text should have at least two tokens; give a longer one.")
    return [ids[start : start + length + 1] for start in range(0, len(ids) - 1, length)]


def open_any(name: str, memory: str | int = "auto", quiet: bool = False, context: int = 512) -> tuple[Any, Any]:
    """(model, tokenizer) of a converted model, or of an original checkpoint, whole in memory by plain mlx-lm."""
    from tiny_qmoe_mlx import budget, checkpoint, layers, models

    directory = locate.model_directory(name, quiet)
    converted = "tiny_qmoe" in checkpoint.read_config(directory) or (directory / MANIFEST).is_file()
    tokenizer = models.open_tokenizer(directory) if converted else None
    limit = budget.longest_context(checkpoint.read_config(directory))
    if context > limit:
        raise ValueError(
            f"[evaluate] --window should be at most the model's context of {limit} tokens, received {context}."
        )
    if converted:
        with terminal.Bars(quiet) as bars:
            return models.load(directory, memory, context, bars, tokenizer)
    import mlx.core as mx

    model, config = checkpoint.load_lazy(directory)
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
    layers.use_cpu_kernels(model)
    return model, checkpoint.open_tokenizer(directory, config)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = terminal.parser("evaluate", __doc__.split(": ", 1)[1], EXAMPLES)
    terminal.add_model(p)
    p.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to predict")
    p.add_argument(
        "--against",
        metavar="DIR|HUB_ID",
        help="a converted or original model: KL divergence from it and top-1 agreement with it",
    )
    p.add_argument("--window", type=int, default=512, help="tokens predicted with one context (default 512)")
    p.add_argument("--tokens", type=int, default=8192, help="most tokens to predict (default 8192)")
    p.add_argument(
        "--memory", default="auto", metavar="6GB|60%|auto", help="budget of the converted model (default auto)"
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
    from tiny_qmoe_mlx.calibrate import read_text

    text = read_text(Path(args.text), "text")
    model, tokenizer = open_any(args.model, args.memory, quiet, args.window)
    against = open_any(args.against, args.memory, quiet, args.window)[0] if args.against else None
    windows = cut(tokenizer.encode(text, add_special_tokens=False), args.window, args.tokens)
    with terminal.Bars(quiet) as bars, blas.shared_machine():
        found = evaluate(model, windows, against, bars)
    read = sum(len(tokenizer.decode(w[1:]).encode()) for w in windows)
    found["bits_per_byte"] = found["nll"] * found["tokens"] / math.log(2) / max(1, read)
    if args.json:
        terminal.print_json({"model": args.model, "against": args.against, "text": args.text, **found})
    else:
        print("\n".join(_lines(found)))
    return 0


def _lines(found: dict[str, float]) -> Iterator[str]:
    yield f"{found['tokens']} tokens: perplexity {found['perplexity']:.3f}, {found['bits_per_byte']:.4f} bits per byte"
    if "kl_mean" in found:
        yield (
            f"against the other model (perplexity {found['against_perplexity']:.3f}): KL mean "
            f"{found['kl_mean']:.4f}, median "
            f"{found['kl_median']:.4f}, 99th percentile {found['kl_p99']:.4f}; same best token "
            f"{100 * found['top1']:.1f} %"
        )


if __name__ == "__main__":
    sys.exit(terminal.run(main))
