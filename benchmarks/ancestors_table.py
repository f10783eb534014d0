"""bench_ancestors.py's one table: both ancestors' codes, their repairs and the trellis on SmolLM2-135M's real weights.

Each row with a speed is a whole directory as `convert` writes it, loaded and run by the package. QMoE and the trellis
code the feed-forward layers, tiny-qmoe and lossless every linear layer of a decoder layer; what is not coded stays
bfloat16 everywhere. So that no row is flattered, bits are those of what is coded, beside the megabytes of the whole
model, and the 8-bit codes are there a second time for feed-forward layers alone, without a directory. KL is that of
bench_quality.py, on the same tokens. Speeds are taken in turns within one process, beside plain mlx-lm.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_quality
import dense_directories as directories
import mlx.core as mx
import numpy as np
from bench_generate import PROMPT_TOKENS, tokens_per_second
from bench_tiny_qmoe import GROUPS, tiny_qmoe
from common import print_table
from dense_directories import TRELLIS, Extent, Original
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from tiny_qmoe_mlx import blas, models
from tiny_qmoe_mlx.codecs import packed
from tiny_qmoe_mlx.report.compare import evaluate

FEED_FORWARD, LAYERS, ALL = "feed-forward", "decoder layers", "all matrices"
Conversion = tuple[str, dict[str, Any]]  # what is coded, and options of `convert`
CONVERTED: dict[str, Conversion] = {
    "QMoE ternary, dictionary": (FEED_FORWARD, {"codec": "qmoe", "bits": 1.5}),
    **{f"trellis {bits:g}": (FEED_FORWARD, {"bits": bits}) for bits in TRELLIS},
    **{
        f"8 bits, a scale for {name}, {coder}": (LAYERS, {"codec": "tiny-qmoe", "group": group, "coder": coder})
        for name, group in GROUPS.items()
        for coder in packed.CODERS
    },
    "lossless": (LAYERS, {"codec": "lossless"}),
}
BFLOAT16, AFFINE = "mlx-lm, bfloat16 computed in float32", "mlx-lm, affine 4 bits"
PLAIN = (BFLOAT16, AFFINE)
GROUP_SIZE, AFFINE_BITS = 64, 4
CONTEXT, TOKENS = 512, 8


def show(extent: Extent) -> dict[str, Any]:
    """Convert what is missing, measure, print; the rows. Quick: no trellis but at 2 bits."""
    quick = extent.quick
    chosen = {n: c for n, c in CONVERTED.items() if not quick or not n.startswith("trellis") or n == "trellis 2"}
    with tempfile.TemporaryDirectory() as scratch, blas.shared_machine():
        source = directories.original("SmolLM2-135M", extent.folder or Path(scratch), extent)
        rows = [*feed_forward(source), *whole(source, chosen, 3 if quick else 5, TOKENS)]
    print_rows(rows)
    found = {"rows": rows, "equal": list(equal_quality(rows))}
    print("\n".join(map(sentence, found["equal"])), flush=True)
    return found


# ---- feed-forward layers alone, as bench_quality.py and rivals.py measure them


def feed_forward(source: Original) -> Iterator[dict[str, Any]]:
    """Rows of codes that no directory holds for feed-forward layers alone."""
    model, sample = source.model, source.sample
    score = bench_quality.Scorer(model, sample)
    for name, group in GROUPS.items():
        spent = {coder: tiny_qmoe(model, sample.calibration, group, coder) for coder in packed.CODERS}
        scores = score(spent["rans"][0])  # the same weights with either coder
        for coder, (_, bits) in spent.items():
            yield _row(f"8 bits, a scale for {name}, {coder}", FEED_FORWARD, bits, scores)
    weights, bits = bench_quality.affine(model, AFFINE_BITS)
    yield _row("MLX affine 4 bits", FEED_FORWARD, bits, score(weights))


def _row(method: str, coded: str, bits: float, scores: dict[str, float], **more: float) -> dict[str, Any]:
    return {"method": method, "coded": coded, "bits": bits, "kl": scores["kl"], "top1": scores["top1"], **more}


# ---- whole models


def whole(source: Original, chosen: dict[str, Conversion], turns: int, tokens: int) -> list[dict[str, Any]]:
    """Rows of converted directories, and of plain mlx-lm, all loaded at once.

    Args:
        chosen: of CONVERTED.
        turns: rounds in which each model decodes once.
        tokens: decoded in a turn, greedily.
    """
    made = {name: directories.converted(source, name, options) for name, (_, options) in chosen.items()}
    sizes = {name: directories.measured_bytes(path) for name, path in made.items()}
    opened: dict[str, Any] = {name: models.load(path, context=CONTEXT)[0] for name, path in made.items()}
    opened[BFLOAT16], sizes[BFLOAT16] = _plain(source.directory)
    opened[AFFINE], sizes[AFFINE] = affine(source.directory)
    try:
        scores = quality(opened, source.sample.held_out)
        prompt = mx.array(source.sample.held_out[0, :PROMPT_TOKENS].astype(np.int32))
        speeds = in_turns({n: _decoding(m, prompt, tokens) for n, m in opened.items()}, turns)
    finally:
        for name in made:
            opened[name].close()
    coded = {**{name: what for name, (what, _) in chosen.items()}, BFLOAT16: "nothing", AFFINE: ALL}
    return [
        _row(name, coded[name], sizes[name].pop("bits"), scores[name], **sizes[name], **speeds[name]) for name in opened
    ]


def _decoding(model: Any, prompt: mx.array, tokens: int) -> Callable[[], float]:
    return lambda: tokens_per_second(model, prompt, tokens)


def _plain(directory: Path) -> tuple[Any, dict[str, float]]:
    """A checkpoint opened by mlx-lm in float32, which it computes fastest on a CPU, and its bytes."""
    model, _ = load_model(directory)
    arrays = [a for _, a in tree_flatten(model.parameters())]
    megabytes = sum(a.nbytes for a in arrays) / 1e6
    model.set_dtype(mx.float32)
    return model, {"bits": 16.0, "coded_mb": 0.0, "model_mb": megabytes}


def affine(directory: Path) -> tuple[Any, dict[str, float]]:
    """A checkpoint quantized, written and opened again as mlx_lm.convert does, the embedding too; and its bytes."""
    model, config = load_model(directory)[0], load_model(directory, lazy=True)[1]
    quantized, config = quantize_model(model, config, GROUP_SIZE, AFFINE_BITS)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), quantized)
        save_config(config, Path(folder) / "config.json")
        opened = load_model(Path(folder))[0]
    parts = dict(tree_flatten(opened.parameters()))
    whole = {name.removesuffix("scales") for name in parts if name.endswith("scales")}
    coded = sum(a.nbytes for name, a in parts.items() if name.rsplit(".", 1)[0] + "." in whole)
    weights = sum(parts[name + "scales"].size * GROUP_SIZE for name in whole)
    megabytes = sum(a.nbytes for a in parts.values()) / 1e6
    opened.set_dtype(mx.float32)
    return opened, {"bits": 8 * coded / weights, "coded_mb": coded / 1e6, "model_mb": megabytes}


def quality(opened: dict[str, Any], held_out: np.ndarray) -> dict[str, dict[str, float]]:
    """KL from the first plain model and agreement with it, of each; a window at a time, so that its logits are made
    once.
    """
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in opened}
    for window in held_out.tolist():
        logits = opened[BFLOAT16](mx.array(window[:-1])[None])
        mx.eval(logits)
        for name, model in opened.items():
            rows[name].append(evaluate(model, [window], lambda ids, logits=logits: logits))
    return {
        name: {"kl": statistics.fmean(r["kl_mean"] for r in found), "top1": statistics.fmean(r["top1"] for r in found)}
        for name, found in rows.items()
    }


def in_turns(decoding: dict[str, Callable[[], float]], turns: int) -> dict[str, dict[str, float]]:
    """Tokens a second of each, the median of its turns, and the median of its ratios to affine 4 bits of the same
    turn.
    """
    seen: dict[str, list[float]] = {name: [] for name in decoding}
    for decode in decoding.values():
        decode()
    for _ in range(turns):
        for name, decode in decoding.items():
            seen[name].append(decode())
    return {
        name: {
            "tokens_per_s": statistics.median(found),
            "ratio": statistics.median(a / b for a, b in zip(found, seen[AFFINE], strict=True)),
        }
        for name, found in seen.items()
    }


# ---- at equal quality, and at equal size


def equal_quality(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each 8-bit code of feed-forward layers: at how many bits the trellis has its KL, and the trellis's KL at its
    bits; None where that lies beyond the trellis's rates. log KL is taken as straight between two rates.
    """
    ours = sorted((r["bits"], r["kl"]) for r in rows if r["method"].startswith("trellis"))
    for row in rows:
        if row["coded"] != FEED_FORWARD or not row["method"].startswith("8 bits"):
            continue
        bits, logs = [b for b, _ in ours], [float(np.log(kl)) for _, kl in ours]
        reached = bool(ours) and ours[-1][1] <= row["kl"]
        same = float(np.interp(-np.log(row["kl"]), [-kl for kl in logs], bits)) if reached else None
        beside = float(np.exp(np.interp(row["bits"], bits, logs))) if ours and row["bits"] <= bits[-1] else None
        least = {"least_kl": ours[-1][1], "most_bits": ours[-1][0]} if ours else {}
        yield {
            "method": row["method"],
            "bits": row["bits"],
            "kl": row["kl"],
            "same_kl": same,
            "same_bits": beside,
        } | least


def sentence(row: dict[str, Any]) -> str:
    """One of `equal_quality` in words."""
    text = f"{row['method']}: {row['bits']:.2f} bits, KL {row['kl']:.4f}. "
    if "least_kl" not in row:
        return text + "No trellis beside it."
    most = f"at its most, {row['most_bits']:.2f} bits, it has KL {row['least_kl']:.4f}"
    text += (
        f"The trellis has that KL at {row['same_kl']:.2f} bits" if row["same_kl"] else f"No trellis has that KL: {most}"
    )
    if row["same_bits"] is None:
        return text + "; it has no rate of equal size."
    return text + f"; at equal size it has KL {row['same_bits']:.4f}."


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table for people."""
    print("SmolLM2-135M's real weights; bits count all bytes of what is coded, MB the whole model's files")
    header = ["method", "coded", "bits", "MB coded", "MB in all", "KL", "same best", "tokens/s", "x affine 4"]
    form = ("{:.2f}", "{:.1f}", "{:.1f}", "{:.4f}", "{:.1%}", "{:.1f}", "{:.2f}")
    keys = ("bits", "coded_mb", "model_mb", "kl", "top1", "tokens_per_s", "ratio")
    cells = [[f.format(r[k]) if k in r else "" for k, f in zip(keys, form, strict=True)] for r in rows]
    print_table(header, [[r["method"], r["coded"], *c] for r, c in zip(rows, cells, strict=True)])
