"""Replay a routing trace through eviction policies: hit rate and bytes read per token for pools of any size.

    python benchmarks/replay.py TRACE [--pools 10%,25%,1GB] [--least 8] [--plot FILE.png] [--json]

The pool is split over the record sizes as a run splits it. "by step" is the engine's policy, "lru" has its way of a
prefill, "belady" is the optimum for what came. Hit rate and bytes per token are those of decode; a prefill's bytes
stand apart.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import print_json, print_table
from policies import BELADY, POLICIES, STRIDE, belady, serve

from tiny_qmoe_mlx.budget import _share, parse_memory
from tiny_qmoe_mlx.streaming.trace import Trace, read_trace

POOLS = "10%,15%,25%,35%,50%,75%"


@dataclass(frozen=True)
class Demand:
    """What one call asks of one pool: distinct experts' keys in file order."""

    keys: list[int]
    cold: bool
    size: int  # bytes of a record


def demands(trace: Trace) -> list[Demand]:
    """A trace's calls, each the union of its tokens' experts."""
    return [
        Demand((call.layer * STRIDE + np.unique(call.chosen)).tolist(), call.cold, trace.record_bytes[call.layer])
        for call in trace.calls
    ]


def record_counts(trace: Trace) -> dict[int, int]:
    """Number of records of each size."""
    counts: dict[int, int] = {}
    for experts, size in zip(trace.experts, trace.record_bytes, strict=True):
        counts[size] = counts.get(size, 0) + experts
    return counts


def pool_slots(trace: Trace, pool_bytes: int, least: int) -> dict[int, int]:
    """Slots of each record size, as a run with that many bytes of pool has them; at least `least` of each."""
    counts = record_counts(trace)
    floor = {size: min(n, least) for size, n in counts.items()}
    shared = _share(counts, floor, max(pool_bytes, sum(size * n for size, n in floor.items())))
    return {size: min(counts[size], n) for size, n in shared.items()}


def misses(asked: Sequence[Demand], slots: dict[int, int], policy: str) -> np.ndarray:
    """Misses of each call, int64 (calls,), from empty pools."""
    found = np.zeros(len(asked), np.int64)
    for size, count in slots.items():
        mine = [i for i, d in enumerate(asked) if d.size == size]
        if policy == BELADY:
            found[mine] = belady([(asked[i].keys, asked[i].cold) for i in mine], count)
            continue
        state = POLICIES[policy](count)
        found[mine] = [serve(state, asked[i].keys, asked[i].cold) for i in mine]
    return found


def figures(trace: Trace, asked: Sequence[Demand], missed: np.ndarray) -> dict[str, float]:
    """hit_rate and bytes_per_token of decode, bytes of prefill, and all bytes read."""
    warm = np.array([not d.cold for d in asked], bool)
    sizes, wanted = np.array([d.size for d in asked], np.int64), np.array([len(d.keys) for d in asked], np.int64)
    read = missed * sizes
    demanded = int(wanted[warm].sum())
    return {
        "hit_rate": 1 - float(missed[warm].sum()) / demanded if demanded else 0.0,
        "bytes_per_token": float(read[warm].sum()) / max(1, trace.tokens(cold=False)),
        "prefill_bytes": int(read[~warm].sum()),
        "bytes_read": int(read.sum()),
    }


def replay(trace: Trace, pool_bytes: int, least: int = 8, policies: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """Figures of each policy at one pool size; all policies and the optimum where none is named."""
    asked, slots = demands(trace), pool_slots(trace, pool_bytes, least)
    names = policies or (*POLICIES, BELADY)
    return {name: figures(trace, asked, misses(asked, slots, name)) for name in names}


def pool_sizes(trace: Trace, text: str) -> list[int]:
    """Bytes of each pool in a list of shares of all records and of sizes.

    Raises:
        BudgetError: an entry is neither.
    """
    whole = sum(size * n for size, n in record_counts(trace).items())
    return sorted(parse_memory(word, whole if word.strip().endswith("%") else 1 << 62) for word in text.split(","))


def sweep(trace: Trace, pools: list[int], least: int, say: Callable[[str], object] = lambda text: None) -> list[dict]:
    """A row per pool and policy."""
    whole = sum(size * n for size, n in record_counts(trace).items())
    rows: list[dict[str, Any]] = []
    for pool in pools:
        say(f"pool {pool / 1e6:.0f} MB")
        for policy, found in replay(trace, pool, least).items():
            rows.append({"pool_bytes": pool, "share": pool / whole, "policy": policy, **found})
    return rows


def plot(rows: list[dict], path: Path, title: str) -> None:
    """Hit rate, and bytes per token, against the pool's share of all records: a line per policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, key, scale, label in (
        (both[0], "hit_rate", 100, "hits, % of demands of decode"),
        (both[1], "bytes_per_token", 1e-6, "MB read per token of decode"),
    ):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            mine = [row for row in rows if row["policy"] == policy]
            style = "k--" if policy == BELADY else "-"
            points = [100 * row["share"] for row in mine], [scale * row[key] for row in mine]
            axes.plot(*points, style, marker="o", markersize=3, label=policy)
        axes.set(xlabel="pool, % of all experts", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    both[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    pools = f"sizes, or shares of all records (default {POOLS})".replace("%", "%%")
    parser.add_argument("--pools", default=POOLS, help=pools)
    parser.add_argument("--least", type=int, default=8, help="fewest slots of a record size: the model's top k")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    try:
        trace = read_trace(args.trace)
        rows = sweep(trace, pool_sizes(trace, args.pools), args.least)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    print(f"{args.trace}: {trace.tokens(cold=True)} tokens of prefill, {trace.tokens(cold=False)} of decode")
    table = [
        [r["policy"], f"{r['pool_bytes'] / 1e6:.1f}", 100 * r["share"], 100 * r["hit_rate"], r["bytes_per_token"] / 1e6]
        + [r["prefill_bytes"] / 1e6]
        for r in rows
    ]
    print_table(["policy", "pool MB", "share %", "hits %", "MB/token", "prefill MB"], table)
    if args.plot:
        plot(rows, args.plot, args.trace.name)
    if args.json:
        print_json({"trace": str(args.trace), "rows": rows})


if __name__ == "__main__":
    main()
