"""`python -m tiny_qmoe_mlx.evaluate`: perplexity of a model on a text, and how far its predictions are from another
model's.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_qmoe_mlx import blas, locate, terminal
from tiny_qmoe_mlx.staging import MANIFEST

EXAMPLES = """
  python -m tiny_qmoe_mlx.evaluate --model qwen3-2bit --text held-out.txt
  python -m tiny_qmoe_mlx.evaluate --model qwen3-2bit --text held-out.txt --against Qwen/Qwen3-30B-A3B --json
  python -m tiny_qmoe_mlx.evaluate --model qwen3-2bit --against Qwen/Qwen3-30B-A3B --report
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

    targets = mx.array(window[1:])[:, None]
    q = _log_probabilities(model, window)
    parts = [-mx.take_along_axis(q, targets, -1)[:, 0]]
    if against is not None:
        p = _log_probabilities(against, window)
        if p.shape != q.shape:
            raise ValueError(
                f"[evaluate] both models should have one vocabulary, received {q.shape[-1]} and {p.shape[-1]} tokens."
            )
        kl = _divergence(p, q)
        parts += [-mx.take_along_axis(p, targets, -1)[:, 0], kl, (p.argmax(-1) == q.argmax(-1)).astype(mx.float32)]
    mx.eval(parts)
    return [np.array(part) for part in parts]


def _log_probabilities(model: Any, window: list[int]) -> Any:
    """float32 (tokens - 1, vocabulary)."""
    import mlx.core as mx

    logits = model(mx.array(window[:-1])[None])[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _divergence(p: Any, q: Any) -> Any:
    """KL of q from the truth p, both log probabilities, float32 (tokens,)."""
    import mlx.core as mx

    return (mx.exp(p) * (p - q)).sum(-1)


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
    """(model, tokenizer) of a converted model, or of an original checkpoint by plain mlx-lm, in memory if it fits."""
    from tiny_qmoe_mlx import budget, checkpoint, models

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
    model, config, _ = open_original(directory, 0, context)
    return model, checkpoint.open_tokenizer(directory, config)


def open_original(directory: Path, reserved: int, context: int) -> tuple[Any, dict[str, Any], bool]:
    """(model, config, whether it is held in memory): read anew for every call where memory does not suffice.

    Args:
        directory: of the checkpoint.
        reserved: bytes of memory that something else needs.
        context: tokens of one call.
    """
    from tiny_qmoe_mlx import writer

    model, config = writer.open_original(directory)
    if writer.memory_bytes(model, config, context) + reserved <= writer.available_bytes():
        return model, config, True
    return Reread(directory), config, False


class Reread:
    """An original larger than memory: each call reads it once, and holds one decoder layer at a time."""

    def __init__(self, directory: Path):
        self._directory = directory

    def __call__(self, inputs: Any) -> Any:
        """int (1, tokens) -> logits (1, tokens, vocabulary)."""
        from tiny_qmoe_mlx import writer

        model, _ = writer.open_original(self._directory)
        for layer in model.layers:
            layer.__class__ = _used_once(type(layer))
        return model(inputs)


def _used_once(kind: type) -> type:
    """A decoder layer's class whose weights are gone after its first call."""
    import mlx.core as mx

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = kind.__call__(self, *args, **kwargs)
        mx.eval(y)
        self.clear()
        mx.clear_cache()
        return y

    return type(kind.__name__, (kind,), {"__call__": call})


@dataclass
class Pair:
    """A converted model beside its original; `whole`: the original is held in memory."""

    converted: Any
    original: Any
    tokenizer: Any
    whole: bool


def open_pair(directory: Path, source: Path, context: int) -> Pair:
    """Both models, in as much memory as this machine can give.

    Raises:
        FormatError: one of them is not what it should be.
        BudgetError: the converted model does not fit.
    """
    import mlx.core as mx

    from tiny_qmoe_mlx import budget, models, writer
    from tiny_qmoe_mlx.container import open_model

    tokenizer = models.open_tokenizer(directory)
    limit = budget.split(open_model(directory), sys.maxsize, context, mx.default_device() == mx.cpu)
    original, config, whole = open_original(source, limit.min_budget_bytes, context)
    room = writer.available_bytes() - (writer.memory_bytes(original, config, context) if whole else 0)
    converted, _ = models.load(directory, min(room, limit.resident_budget_bytes), context, tokenizer=tokenizer)
    return Pair(converted, original, tokenizer, whole)


def layer_kl(
    pair: Pair, window: list[int], progress: Progress = lambda what, done, total: None
) -> list[dict[str, float]]:
    """KL to the original when the experts of one layer alone are the compressed ones.

    Args:
        pair: with the original in memory; it is as it was afterwards.
        window: token ids.

    Returns:
        [{"layer": decoder layer, "kl": mean in nats}] of every MoE layer.
    """
    import mlx.core as mx
    from mlx.utils import tree_unflatten

    from tiny_qmoe_mlx import models

    layers = pair.converted.tiny_qmoe.container.spec.layers
    own = dict(pair.original.named_modules())
    p, found = _log_probabilities(pair.original, window), []
    mx.eval(p)
    for i, (layer, experts) in enumerate(zip(layers, models.trellis_layers(pair.converted), strict=True)):
        pair.original.update_modules(tree_unflatten([(layer.path, experts)]))
        kl = _divergence(p, _log_probabilities(pair.original, window)).mean().item()
        pair.original.update_modules(tree_unflatten([(layer.path, own[layer.path])]))
        found.append({"layer": layer.layer, "kl": kl})
        progress("measuring layers", i + 1, len(layers))
    return found


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
    p.add_argument("--window", type=int, default=512, help="tokens predicted with one context (default 512)")
    p.add_argument("--tokens", type=int, default=8192, help="most tokens to predict (default 8192)")
    p.add_argument(
        "--report",
        action="store_true",
        help="measure everything, generated JSON and tool tasks too, against the original, and write quality.json, "
        "pictures and the model card into the converted directory",
    )
    p.add_argument("--tasks", type=int, default=40, help="tasks of a kind with --report; 0 for none (default 40)")
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
    if args.report:
        return _report(args, quiet)
    if not args.text:
        raise ValueError("[evaluate] --text should name a text to predict; only --report can do without.")
    from tiny_qmoe_mlx.calibration_text import read_text

    text = read_text(Path(args.text), "text")
    model, tokenizer = open_any(args.model, args.memory, quiet, args.window)
    against = open_any(args.against, args.memory, quiet, args.window)[0] if args.against else None
    windows = cut(tokenizer.encode(text, add_special_tokens=False, verbose=False), args.window, args.tokens)
    with terminal.Bars(quiet) as bars, blas.shared_machine():
        found = evaluate(model, windows, against, bars)
    read = sum(len(tokenizer.decode(w[1:]).encode()) for w in windows)
    found["bits_per_byte"] = found["nll"] * found["tokens"] / math.log(2) / max(1, read)
    if args.json:
        terminal.print_json({"model": args.model, "against": args.against, "text": args.text, **found})
    else:
        print("\n".join(_lines(found)))
    return 0


def _report(args: argparse.Namespace, quiet: bool) -> int:
    if not args.against or args.tasks < 0:
        raise ValueError("[evaluate] --report should have --against with the original, and --tasks of at least 0.")
    from tiny_qmoe_mlx import checkpoint, report

    directory = locate.model_directory(args.model, quiet)
    source = checkpoint.find_directory(args.against, quiet=quiet)
    extent = report.Extent(args.tokens, args.window, args.tasks)
    with terminal.Bars(quiet) as bars:
        quality = report.measure(directory, source, Path(args.text) if args.text else None, extent, bars)
    for note in report.write_report(directory, source, quality):
        print(note, file=sys.stderr)
    if args.json:
        terminal.print_json({"model": args.model, "against": args.against, **quality})
    else:
        kl = quality["kl"]
        print(
            f"{directory}: KL mean {kl['mean']:.4f}, median {kl['median']:.4f}, 99th percentile {kl['p99']:.4f}; same "
            f"best token {100 * quality['top1']:.1f} %; the rest is in {report.QUALITY} and README.md"
        )
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
