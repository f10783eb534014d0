"""Streaming under memory limits: tokens per second, bytes, bandwidth, overlap and peak memory, each beside its bound.

    python benchmarks/bench_stream.py [--model DIR|demo|30b] [--limits 2GB,3GB,4GB,8GB] [--runs 5] [--trace FILE]
                                      [--quick] [--whole] [--residency FILE.png] [--json]

30b: random bytes in Qwen3-30B-A3B's shape (random_model.py, 9 GB in --dir). Every run is a process of its own under a
memory cgroup (root on Linux; without one, the budget alone), with the page cache dropped before it. "experts": the
expert layers alone, routing from the trace. In the same run as many threads read as many records with bare preadv:
that is disk time. Compute time is that of the same calls with every expert in memory. "whole" is the model itself.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import limits
import numpy as np
import random_model
import routing
from bench_convert import SHAPE
from common import machine, print_json, print_table
from policies import ENGINE, ByStep, serve
from replay import STRIDE, demands, pool_slots
from stream_cases import beside_experts

from tiny_qmoe_mlx import locate
from tiny_qmoe_mlx.budget import parse_memory
from tiny_qmoe_mlx.container import Container, open_model
from tiny_qmoe_mlx.footprint import top_k
from tiny_qmoe_mlx.streaming.trace import Trace, read_trace

CASES = Path(__file__).with_name("stream_cases.py")
HEADROOM = 1.05  # a limit over the budget in it: what the promise allows
SMALL = {
    **SHAPE,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
}
QUICK_SHARES = (0.3, 0.7)  # of the experts, on top of what the process needs beside them
READERS = 8


# ---- runs


def run(words: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """One child with cold files, under the operating system's limit where there can be one."""
    limits.drop_page_cache()
    return limits.run(CASES, words, limit if limits.available() else None)


def repeated(words: dict[str, Any], limit: int | None, runs: int) -> list[dict[str, Any]]:
    return [run(words, limit) for _ in range(runs)]


def median(rows: list[dict], value: Callable[[dict], float]) -> float:
    """Of those runs that were not killed; 0 where none is left."""
    return statistics.median([value(r) for r in rows if not r["killed"]] or [0.0])


def compute_seconds(words: dict[str, Any], runs: int) -> float:
    """The same calls with every expert in memory."""
    found = run({**words, "memory": 1 << 48, "rounds": runs}, None)
    return statistics.median(found["rounds_s"])


def expert_row(name: str, words: dict[str, Any], limit: int, runs: int, compute: float) -> dict[str, Any]:
    """Medians of one case of the experts alone at one limit."""
    rows = repeated({**words, "case": "experts", "memory": int(limit / HEADROOM)}, limit, runs)
    count = words.get("prompt") or words["tokens"] * words["batch"]
    row: dict[str, Any] = {"case": name, "limit": limit, "killed": sum(r["killed"] for r in rows), "tokens": count}
    if row["killed"] == runs:
        return row
    last = next(r for r in rows if not r["killed"])
    row |= {key: last[key] for key in ("mode", "budget_bytes", "pool_bytes", "bytes_read", "records_read")}
    row["seconds"], row["compute_s"] = median(rows, lambda r: r["seconds"]), compute
    row["tokens_per_s"] = count / row["seconds"]
    row["bytes_per_token"] = row["bytes_read"] / count
    row["hit_rate"] = last["expert_hits"] / max(1, last["expert_hits"] + last["expert_misses"])
    row["peak_over_budget"] = max(r["peak_bytes"] for r in rows if not r["killed"]) / row["budget_bytes"]
    row["wait_s"] = median(rows, lambda r: r["io_wait_s"])
    return row | (_against_disk(rows, last, compute) if last["mode"] == "streamed" else {})


def _against_disk(rows: list[dict], last: dict[str, Any], compute: float) -> dict[str, Any]:
    """Bandwidth beside bare reads of the same run, time beside the slower of disk and compute, bytes beside replays."""
    per_byte = lambda r: r["bare_s"] / max(1, r["bare_bytes"])  # noqa: E731
    disk = median(rows, lambda r: per_byte(r) * r["bytes_read"])
    return {
        "disk_s": disk,
        "read_bandwidth": median(rows, lambda r: r["bytes_read"] / r["seconds"]),
        "bare_bandwidth": median(rows, lambda r: r["bare_bytes"] / r["bare_s"] if r["bare_s"] else 0.0),
        "read_bandwidth_ratio": median(rows, lambda r: per_byte(r) * r["bytes_read"] / r["seconds"]),
        "overlap_ratio": median(rows, lambda r: r["seconds"] / max(compute, per_byte(r) * r["bytes_read"])),
        "disk_bound": disk > compute,
        "bytes_over_replay": last["bytes_read"] / max(1, last[f"{ENGINE}_bytes"]),
        "bytes_over_lru": last["bytes_read"] / max(1, last["lru_bytes"]),
        "bytes_over_belady": last["bytes_read"] / max(1, last["belady_bytes"]),
        "union_records": last["union_records"],
        "bare_bytes": last["bare_bytes"],
    }


def expert_rows(base: dict[str, Any], sizes: list[int], runs: int, quick: bool) -> list[dict[str, Any]]:
    """Decode of one stream and of eight, and a prompt, at every limit."""
    warm, tokens, prompt = (4, 4, 100) if quick else (24, 16, 1000)
    cases = {
        "decode": {**base, "batch": 1, "warm": warm, "tokens": tokens},
        "batch 8": {**base, "batch": 8, "warm": warm // 4, "tokens": tokens // 4},
        "prompt": {**base, "batch": 1, "warm": 0, "tokens": 0, "prompt": prompt},
    }
    rows = []
    for name, words in cases.items():
        compute = compute_seconds({**words, "case": "experts"}, min(runs, 3))
        rows += [expert_row(name, words, limit, runs, compute) for limit in sizes]
    for row in (r for r in rows if r["case"] == "batch 8" and "tokens_per_s" in r):
        one = next(r for r in rows if r["case"] == "decode" and r["limit"] == row["limit"])
        if "tokens_per_s" in one:
            row["gain"] = row["tokens_per_s"] / one["tokens_per_s"]
            row["union_gain"] = one["bytes_per_token"] / max(1, row["bytes_per_token"])
    return rows


def whole_row(model: Path, limit: int, tokens: int, runs: int, prompt: int) -> dict[str, Any]:
    """The model itself: medians, or the sentence that refuses the budget."""
    words = {"case": "whole", "model": str(model), "memory": int(limit / HEADROOM), "tokens": tokens, "prompt": prompt}
    words["context"] = tokens + prompt
    try:
        rows = repeated(words, limit, runs)
    except RuntimeError as error:
        return {"case": "whole", "limit": limit, "refused": str(error).splitlines()[-1][-300:]}
    row: dict[str, Any] = {"case": "whole", "limit": limit, "killed": sum(r["killed"] for r in rows), "tokens": tokens}
    alive = [r for r in rows if not r["killed"]]
    if not alive:
        return row
    row |= {key: alive[0][key] for key in ("mode", "budget_bytes", "pool_bytes", "bytes_read")}
    for key in ("seconds", "ttft_s", "first_experts_s", "first_wait_s"):
        row[key] = median(rows, lambda r, key=key: r[key])
    row["generated"] = alive[0]["generated"]
    row["tokens_per_s"] = max(0, alive[0]["generated"] - 1) / max(1e-9, row["seconds"])
    row["hit_rate"] = alive[0]["expert_hits"] / max(1, alive[0]["expert_hits"] + alive[0]["expert_misses"])
    row["bytes_per_token"] = row["bytes_read"] / max(1, alive[0]["generated"])
    row["peak_over_budget"] = max(r["peak_bytes"] for r in alive) / row["budget_bytes"]
    return row


# ---- residency


def residency(trace: Trace, pool_bytes: int, least: int) -> np.ndarray:
    """Which experts the engine's pool holds after each call of the last layer, bool (steps, layers, experts)."""
    slots = pool_slots(trace, pool_bytes, least)
    pools = {size: ByStep(count) for size, count in slots.items()}
    steps = []
    for call, demand in zip(trace.calls, demands(trace), strict=True):
        serve(pools[demand.size], demand.keys, demand.cold)
        if call.layer == len(trace.experts) - 1:
            held = np.zeros((len(trace.experts), max(trace.experts)), bool)
            for pool in pools.values():
                keys = np.array(pool.keys(), np.int64)
                held[keys // STRIDE, keys % STRIDE] = True
            steps.append(held)
    return np.stack(steps)


def plot_residency(held: np.ndarray, path: Path, title: str) -> None:
    """Left: every expert of every layer over the steps; right: the share of the steps in which each was in memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, layers, experts = held.shape
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 8), layout="constrained", width_ratios=(2, 1))
    left.imshow(held.reshape(steps, -1).T, aspect="auto", interpolation="nearest", cmap="Greys")
    left.set(xlabel="prefill, then tokens of decode", ylabel="layer (each row an expert)", title=title)
    marks = range(0, layers, max(1, layers // 12))
    left.set_yticks([layer * experts for layer in marks], [str(layer) for layer in marks])
    shares = right.imshow(held.mean(0), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
    right.set(xlabel="expert", ylabel="layer", title="share of the steps in memory")
    figure.colorbar(shares, ax=right)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ---- what is run


def find_model(name: str, folder: Path, quick: bool) -> Path:
    if quick:
        return random_model.make(folder / "small", 2.0, 3, SMALL, "noise in a small shape")
    if name == "30b":
        return random_model.make(folder / "noise-30b-2bit")
    return locate.model_directory(name)


def find_trace(given: Path | None, model: Path, container: Container, folder: Path, quick: bool) -> Path:
    """A recorded trace, or one made for the model's shape: of text where all layers have equally many experts."""
    if given is not None:
        return given
    path = folder / f"routing-{len(container.spec.layers)}x{container.spec.layers[0].experts}.trace"
    kind, prompt, tokens = ("uniform", 120, 60) if quick else ("text", 512, 512)
    if not path.exists() or quick:
        routing.make(kind, path, prompt, tokens, model)
    return path


def limits_of(text: str | None, container: Container, quick: bool) -> list[int]:
    records = sum(layer.experts * layer.record_bytes for layer in container.spec.layers)
    if quick:
        return [int(HEADROOM * (sum(beside_experts(container)) + share * records)) for share in QUICK_SHARES]
    return [parse_memory(word, 1 << 62) for word in (text or "2GB,3GB,4GB,8GB").split(",")]


def say(row: dict[str, Any]) -> list[object]:
    if "seconds" not in row:
        return [row["case"], f"{row['limit'] / 1e9:.2f}", row.get("refused", f"killed {row.get('killed')} times")]
    found = [row["case"], f"{row['limit'] / 1e9:.2f}", row["tokens_per_s"], row["bytes_per_token"] / 1e6]
    found += [100 * row["hit_rate"], row["seconds"], row.get("compute_s", 0.0), row.get("disk_s", 0.0)]
    keys = ("overlap_ratio", "read_bandwidth_ratio", "bytes_over_replay", "bytes_over_lru", "bytes_over_belady")
    keys = (*keys, "peak_over_budget")
    return found + [f"{row[key]:.3f}" if key in row else "-" for key in keys]


HEADER = ["case", "limit GB", "tokens/s", "MB/token", "hits %", "s", "compute s", "disk s", "s / max", "read / bare"]
HEADER += ["bytes / replay", "/ LRU", "/ Belady", "peak / budget"]


def show(rows: list[dict[str, Any]]) -> None:
    print_table(HEADER, [cells + ["-"] * (len(HEADER) - len(cells)) for cells in map(say, rows)])
    for row in rows:
        if "gain" in row:
            print(
                f"batch 8 at {row['limit'] / 1e9:.2f} GB: {row['gain']:.2f} times the tokens/s of batch 1; the union "
                f"of experts alone would give {row['union_gain']:.2f}"
            )
        if "first_experts_s" in row:
            print(
                f"whole at {row['limit'] / 1e9:.2f} GB: first token after {row['ttft_s']:.2f} s, "
                f"{row['first_experts_s']:.2f} s of them in experts ({row['first_wait_s']:.2f} s waiting for the disk)"
            )
        if row["case"] == "prompt" and row.get("mode") == "streamed":
            print(f"prompt: {row['records_read']} records read, {row['union_records']} in the chunks' unions")


def bench(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = find_model(args.model, folder, args.quick)
    container = open_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    path = args.trace
    if not args.only_whole or args.residency:
        path = find_trace(args.trace, model, container, folder, args.quick)
    sizes = limits_of(args.limits, container, args.quick)
    base = {"model": str(model), "trace": str(path), "readers": READERS}
    rows = [] if args.only_whole else expert_rows(base, sizes, args.runs, args.quick)
    if args.whole or args.only_whole:
        tokens = args.tokens or (4 if args.quick else 16)
        rows += [whole_row(model, limit, tokens, args.runs, args.prompt) for limit in sizes]
    if args.residency:
        pool = max((r["pool_bytes"] for r in rows if r.get("mode") == "streamed"), default=sizes[0])
        held = residency(read_trace(path), pool, top_k(container.config))
        plot_residency(held, args.residency, f"experts in memory, pool {pool / 1e6:.0f} MB")
    first = next((r for r in rows if r["case"] == "decode" and "overlap_ratio" in r), {})
    keys = ("read_bandwidth_ratio", "overlap_ratio")
    peaks = [r["peak_over_budget"] for r in rows if "peak_over_budget" in r]
    own = {**{key: first.get(key) for key in keys}, "peak_over_budget": max(peaks, default=None)}
    return {"machine": machine(), "model": str(model), "limited": limits.available(), "rows": rows, **own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="30b", help="a converted model, demo, or 30b (default)")
    parser.add_argument("--dir", type=Path, help="folder of the 30b model and its trace; kept")
    parser.add_argument("--trace", type=Path, help="a recorded trace (default: real text through random routers)")
    parser.add_argument("--limits", help="memory limits (default 2GB,3GB,4GB,8GB)")
    parser.add_argument("--runs", type=int, default=5, help="of each case (default 5)")
    parser.add_argument("--whole", action="store_true", help="the whole model too")
    parser.add_argument("--only-whole", action="store_true", help="the whole model alone")
    parser.add_argument("--tokens", type=int, help="tokens that the whole model generates (default 16)")
    parser.add_argument("--prompt", type=int, default=8, help="tokens of the whole model's prompt (default 8)")
    parser.add_argument("--residency", type=Path, metavar="FILE.png")
    parser.add_argument("--quick", action="store_true", help="small shapes, in a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            result = bench(args, args.dir or Path(scratch))
        except (OSError, ValueError, RuntimeError) as error:
            raise SystemExit(str(error)) from None
    show(result["rows"])
    if args.json:
        print_json(result)


if __name__ == "__main__":
    main()
