"""Ours beside llama.cpp at equal quality when half the experts fit, and beside mlx-lm's 4 bits when all do.

    python benchmarks/bench_side_by_side.py [--layers 48] [--runs 3] [--types Q3_K IQ3_S] [--dir DIR] [--quick] [--json]

Weights of noise in Qwen3-30B-A3B's shape; ours at the bits whose weight error is that of llama.cpp's type on Gaussian
matrices of these shapes (equal_quality.py). llama.cpp maps its file (llama-cpp-python's build). Each engine runs in a
process under a memory limit of the system: what it holds without experts, and half of its experts' bytes; page cache
dropped before. All get the same tokens, one at a time, and choose experts as good as at random, the worst case: no
engine's weights give it more hits than another's ("alike": hits of the choices themselves, replayed through LRU with
half of the experts). Fewer --layers keep the shapes, the share that fits and the statistics of each layer.
First token: from the start of loading. rest: MLX's dense layers. Where the kernel reads far ahead, a mapped file reads
more than was asked for: --read-ahead 128 is Linux's usual (of the whole disk, and put back at the end).
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
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
SMALL = {"num_experts": 64, "num_experts_per_tok": 4, "hidden_size": 1024, "moe_intermediate_size": 512}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096}
SYSTEM_BYTES = 64 << 20  # page tables, stacks and buffers of the kernel that a limit counts and a process does not see


def gguf_shape(config: dict[str, Any], layers: int) -> dict[str, int]:
    """The config in the terms of gguf_random."""
    names = {"experts": "num_experts", "chosen": "num_experts_per_tok", "hidden": "hidden_size"}
    names |= {"width": "moe_intermediate_size", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
    names |= {"head_dim": "head_dim", "vocabulary": "vocab_size"}
    return {**gguf_random.SHAPE, **{ours: config[theirs] for ours, theirs in names.items()}, "layers": layers}


PRESSURE, CALM_PERCENT, CALM_S = Path("/proc/pressure/memory"), 5.0, 120


def wait_for_calm() -> None:
    """Until the last run's shortage of memory has left the kernel's averages: ours would shrink its pool for it."""
    end = time.monotonic() + CALM_S
    while PRESSURE.exists() and time.monotonic() < end:
        if float(PRESSURE.read_text().split("avg10=")[1].split()[0]) < CALM_PERCENT:
            return
        time.sleep(1)


def run(words: dict[str, Any], limit: int | None, runs: int) -> dict[str, Any]:
    """Medians of runs from cold files; of those that the limit did not end."""
    rows = []
    for _ in range(runs):
        wait_for_calm()
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
    whole = run(words, None, 1)
    alike = run({**words, "routing": True}, None, 1)["lru_hits"]
    limit = int(file.stat().st_size - experts + whole["anonymous_bytes"] + SHARE * experts) + SYSTEM_BYTES
    row = {"engine": f"llama.cpp {kind}", "experts": experts, "limit": limit, **run(words, limit, runs)}
    return {**row, "lru_hits": alike, "resident_token_s": whole["token_s"]}


def our_row(model: Path, words: dict, runs: int) -> dict[str, Any]:
    """Ours with half of its experts."""
    experts = sum(layer.experts * layer.record_bytes for layer in open_model(model).spec.layers)
    words = {**words, "engine": "ours", "model": str(model)}
    whole = run({**words, "memory": "100%"}, None, 1)
    limit = int(whole["peak_bytes"] - whole["pool_bytes"] + SHARE * experts) + SYSTEM_BYTES
    found = run({**words, "memory": int(limit / HEADROOM)}, limit, runs)
    row = {"engine": f"ours {open_model(model).spec.bits:.2f} bits", "experts": experts, "limit": limit, **found}
    return {**row, "resident_token_s": whole["token_s"], "resident_experts_s": whole["experts_s"]}


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


HEADER = ["engine", "limit GB", "peak GB", "tokens/s", "first s", "MB/token", "experts ms", "wait ms", "rest ms"]
HEADER += ["hits %", "alike %", "pool %", "all in memory ms"]


def say(row: dict[str, Any]) -> list[object]:
    """A row of the table; "-" for what an engine does not tell."""
    limit = f"{row['limit'] / 1e9:.2f}" if "limit" in row else "-"
    if "token_s" not in row:
        return [row["engine"], limit, "killed", *["-"] * (len(HEADER) - 3)]
    cells = [row["engine"], limit, row["peak_bytes"] / 1e9, 1 / row["token_s"], row["first_s"]]
    cells.append(row["bytes_per_token"] / 1e6)
    rest = {"rest": row["token_s"] - row["experts_s"]} if "experts_s" in row else {}
    parts = {"experts": row.get("experts_s"), "wait": row.get("wait_s"), **rest}
    cells += [_cell(parts.get(key), 1e3) for key in ("experts", "wait", "rest")]
    held = row["pool_bytes"] - row["given_back_bytes"] if "limit" in row and "pool_bytes" in row else None
    cells += [_cell(row.get("hit_rate"), 100), _cell(row.get("lru_hits"), 100)]
    cells.append(_cell(held, 100 / row.get("experts", 1)))
    return [*cells, _cell(row.get("resident_token_s"), 1e3)]


def _cell(value: float | None, scale: float) -> object:
    return "-" if value is None else float(scale * value)


def read_ahead_files() -> list[Path]:
    """Of each disk, the file that tells and sets what the kernel reads ahead."""
    found = Path("/sys/block").glob("*/queue/read_ahead_kb")
    return [path for path in found if path.parts[3].startswith(("vd", "sd", "nvme"))]


@contextlib.contextmanager
def reading_ahead(kib: int | None) -> Iterator[None]:
    """Set what the kernel reads ahead on all disks, in KiB, and put it back.

    Raises:
        OSError: that is not allowed.
    """
    before = {path: path.read_text() for path in read_ahead_files()} if kib is not None else {}
    try:
        for path in before:
            path.write_text(str(kib))
        yield
    finally:
        for path, text in before.items():
            path.write_text(text)


def read_ahead() -> list[str]:
    """What the kernel reads ahead on each disk: it inflates what a mapped file reads."""
    return [f"{path.parts[3]} {path.read_text().strip()} KiB" for path in read_ahead_files()]


def bench(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = {**SHAPE, **(SMALL if args.quick else {})}
    layers = 4 if args.quick else args.layers
    words = {"prompt": 8, "warm": 4 if args.quick else args.warm, "tokens": 4 if args.quick else args.tokens}
    words |= {"vocabulary": config["vocab_size"], "slots": int(SHARE * layers * config["num_experts"])}
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
    parser.add_argument("--read-ahead", type=int, metavar="KIB", help="set the disks' (root; default: as it is)")
    parser.add_argument("--quick", action="store_true", help="a small shape, in a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with reading_ahead(args.read_ahead):
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
