"""Ours beside llama.cpp at equal quality when half the experts fit, and beside mlx-lm's 4 bits when all do.

    python benchmarks/bench_side_by_side.py [--layers 48] [--runs 3] [--types Q3_K IQ3_S] [--dir DIR] [--quick] [--json]

Weights of noise in Qwen3-30B-A3B's shape; ours at the bits whose weight error is that of llama.cpp's type on Gaussian
matrices of these shapes (equal_quality.py). llama.cpp maps its file (llama-cpp-python's build). Each engine runs in a
process under a memory limit of the system: what it holds without experts, and half of its experts' bytes; page cache
dropped before. All get the same tokens, one at a time, and choose experts as good as at random, the worst case: no
engine's weights give it more hits than another's. Fewer --layers keep the shapes, and the share that fits.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import gguf_random
import limits
import random_model
from bench_convert import SHAPE
from common import machine, print_json, print_table

from tiny_qmoe_mlx.container import open_model

CASES = Path(__file__).with_name("side_cases.py")
BITS = {"Q3_K": 2.98, "IQ3_S": 3.05}  # equal_quality.py, L 12
SHARE = 0.5  # of the experts that fit
HEADROOM = 1.03  # of the limit over our budget
SMALL = {"num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 256, "moe_intermediate_size": 256}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096}
SYSTEM_BYTES = 64 << 20  # page tables, stacks and buffers of the kernel that a limit counts and a process does not see


def gguf_shape(config: dict[str, Any], layers: int) -> dict[str, int]:
    """The config in the terms of gguf_random."""
    names = {"experts": "num_experts", "chosen": "num_experts_per_tok", "hidden": "hidden_size"}
    names |= {"width": "moe_intermediate_size", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
    names |= {"head_dim": "head_dim", "vocabulary": "vocab_size"}
    return {**gguf_random.SHAPE, **{ours: config[theirs] for ours, theirs in names.items()}, "layers": layers}


def run(words: dict[str, Any], limit: int | None, runs: int) -> dict[str, Any]:
    """Medians of runs from cold files; of those that the limit did not end."""
    rows = []
    for _ in range(runs):
        limits.drop_page_cache()
        rows.append(limits.run(CASES, words, limit if limits.available() else None))
    alive = [row for row in rows if not row["killed"]]
    if not alive:
        return {"killed": runs}
    keys = [key for key, value in alive[0].items() if isinstance(value, float | int) and key != "killed"]
    middle = {key: statistics.median([row[key] for row in alive]) for key in keys}
    return {**alive[0], **middle, "killed": runs - len(alive)}


def llama_row(folder: Path, kind: str, config: dict[str, Any], layers: int, words: dict, runs: int) -> dict[str, Any]:
    """llama.cpp with half of its experts."""
    file, shape = folder / f"{kind}-{layers}.gguf", gguf_shape(config, layers)
    if not file.exists():
        gguf_random.write(file, shape, kind)
    experts = gguf_random.expert_bytes(shape, kind)
    words = {**words, "engine": "llama", "model": str(file)}
    beside = file.stat().st_size - experts + run({**words, "warm": 0, "tokens": 2}, None, 1)["anonymous_bytes"]
    limit = int(beside + SHARE * experts) + SYSTEM_BYTES
    return {"engine": f"llama.cpp {kind}", "experts": experts, "limit": limit, **run(words, limit, runs)}


def our_row(model: Path, words: dict, runs: int) -> dict[str, Any]:
    """Ours with half of its experts."""
    experts = sum(layer.experts * layer.record_bytes for layer in open_model(model).spec.layers)
    words = {**words, "engine": "ours", "model": str(model)}
    whole = run({**words, "memory": "100%", "warm": 0, "tokens": 2}, None, 1)
    limit = int(whole["peak_bytes"] - whole["pool_bytes"] + SHARE * experts) + SYSTEM_BYTES
    found = run({**words, "memory": int(limit / HEADROOM)}, limit, runs)
    return {"engine": f"ours {open_model(model).spec.bits:.2f} bits", "experts": experts, "limit": limit, **found}


def against(ours: dict[str, Any], llama: dict[str, Any]) -> dict[str, float]:
    """The goals' ratios: bytes (at most .6), experts and their reads over llama.cpp's whole token (1/3), speed (1)."""
    if "token_s" not in ours or "token_s" not in llama:
        return {}
    return {
        "bytes": ours["bytes_per_token"] / max(1.0, llama["bytes_per_token"]),
        "experts_over_llama": ours["experts_s"] / llama["token_s"],
        "speed": llama["token_s"] / ours["token_s"],
        "first_token": llama["first_s"] / ours["first_s"],
    }


def resident_rows(model: Path, words: dict, runs: int) -> list[dict[str, Any]]:
    """Ours and mlx-lm's 4 bits, all experts in memory, no limit."""
    ours = run({**words, "engine": "ours", "model": str(model), "memory": "100%"}, None, runs)
    theirs = run({**words, "engine": "mlx", "model": str(model)}, None, runs)
    return [{"engine": "ours, resident", **ours}, {"engine": "mlx-lm 4-bit, resident", **theirs}]


HEADER = [
    "engine",
    "limit GB",
    "peak GB",
    "tokens/s",
    "first s",
    "MB/token",
    "experts ms",
    "wait ms",
    "rest ms",
    "hits %",
]


def say(row: dict[str, Any]) -> list[object]:
    limit = f"{row['limit'] / 1e9:.2f}" if "limit" in row else "-"
    if "token_s" not in row:
        return [row["engine"], limit, "killed", *["-"] * (len(HEADER) - 3)]
    cells = [
        row["engine"],
        limit,
        row["peak_bytes"] / 1e9,
        1 / row["token_s"],
        row["first_s"],
        row["bytes_per_token"] / 1e6,
    ]
    if "experts_s" not in row:
        return [*cells, "-", "-", "-", "-"]
    parts = (row["experts_s"], row["wait_s"], row["token_s"] - row["experts_s"])
    return [*cells, *(1e3 * part for part in parts), 100 * row["hit_rate"]]


def read_ahead() -> list[str]:
    """What the kernel reads ahead on each disk: it inflates what a mapped file reads."""
    found = Path("/sys/block").glob("*/queue/read_ahead_kb")
    return [f"{p.parts[3]} {p.read_text().strip()} KiB" for p in found if p.parts[3].startswith(("vd", "sd", "nvme"))]


def bench(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = {**SHAPE, **(SMALL if args.quick else {})}
    layers = 2 if args.quick else args.layers
    words = {"prompt": 8, "warm": 4 if args.quick else args.warm, "tokens": 4 if args.quick else args.tokens}
    words["vocabulary"] = config["vocab_size"]
    rows, ratios = [], {}
    for kind in args.types:
        name = f"ours-{kind}-{layers}"
        model = random_model.make(folder / name, BITS[kind], layers, config, "noise")
        rows += [llama_row(folder, kind, config, layers, words, args.runs), our_row(model, words, args.runs)]
        ratios[kind] = against(rows[-1], rows[-2])
    rows += resident_rows(model, words, args.runs)
    ours, theirs = rows[-2:]
    ratios["resident"] = {"speed": theirs["token_s"] / ours["token_s"]}
    return {"machine": machine(), "layers": layers, "read_ahead": read_ahead(), "rows": rows, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--warm", type=int, default=24, help="tokens before those that are measured (default 24)")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--types", nargs="+", default=list(BITS), choices=BITS)
    parser.add_argument("--dir", type=Path, help="folder of the models; kept")
    parser.add_argument("--quick", action="store_true", help="a small shape, in a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            result = bench(args, args.dir or Path(scratch))
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise SystemExit(str(error)) from None
    print(f"{result['layers']} layers; read ahead by the kernel: {', '.join(result['read_ahead'])}")
    print_table(HEADER, [say(row) for row in result["rows"]])
    for name, ratio in result["ratios"].items():
        print(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {value:.2f}" for key, value in ratio.items()))
    if args.json:
        print_json(result)


if __name__ == "__main__":
    main()
