"""bench_ancestors.py's part on dense models: a Llama and a Gemma in the trellis, by the commands that users type.

`convert` codes every feed-forward layer as one expert and leaves all else bfloat16; `evaluate --against` measures the
directory; `generate` runs it with all experts in memory, and streamed layer by layer in the smallest budget that works:
the tokens have to be the same.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dense_directories as directories
from common import print_table
from dense_directories import Extent, Original

from tiny_qmoe_mlx import blas
from tiny_qmoe_mlx.plan import plan

PROMPT, TOKENS = "The tallest mountain of the world is", 48
CONTEXT = 256


def show(extent: Extent) -> dict[str, Any]:
    """Convert what is missing, measure, print; by model its rows."""
    found = {}
    for name in extent.models:
        with tempfile.TemporaryDirectory() as scratch, blas.shared_machine():
            source = directories.original(name, extent.folder or Path(scratch), extent)
            found[name] = list(rows(source, extent.rates))
        print_rows(name, found[name])
    return found


def rows(source: Original, asked: tuple[float, ...]) -> Iterator[dict[str, Any]]:
    """A row for each rate: bytes, quality, and a streamed run beside one from memory."""
    for bits in asked:
        model = directories.converted(source, f"trellis {bits:g}", {"bits": bits})
        line = ("--model", model, "--against", source.directory, "--text", source.held_out)
        scores = command("evaluate", *line, "--tokens", source.sample.held_out.size)
        found = {"asked": bits, **directories.measured_bytes(model), "kl": scores["kl_mean"], "top1": scores["top1"]}
        found |= {"perplexity": scores["perplexity"], "original_perplexity": scores["against_perplexity"]}
        yield found | streamed(model)


def streamed(model: Path) -> dict[str, Any]:
    """The model in the smallest budget that works, and whether it writes what it does from memory."""
    least = plan(model, context=CONTEXT, probe=False)
    line = (
        "--model",
        model,
        "--prompt",
        PROMPT,
        "--max-tokens",
        TOKENS,
        "--context",
        CONTEXT,
        "--ignore-chat-template",
    )
    small = command("generate", *line, "--memory", least["min_budget_bytes"])
    whole = command("generate", *line)
    return {
        "same_tokens": small["tokens"] == whole["tokens"]
        and (small["mode"], whole["mode"]) == ("streamed", "resident"),
        "budget_mb": least["min_budget_bytes"] / 1e6,
        "peak_mb": small["peak_memory_bytes"] / 1e6,
        "pool_mb": small["pool_bytes"] / 1e6,
        "experts_mb": least["expert_file_bytes"] / 1e6,
        "mb_a_token": small["decode_bytes_per_token"] / 1e6,
        "streamed_tps": small["generation_tps"],
        "resident_tps": whole["generation_tps"],
    }


def command(name: str, *words: object) -> dict[str, Any]:
    """What `python -m tiny_qmoe_mlx.NAME WORDS --json` prints."""
    line = [sys.executable, "-m", f"tiny_qmoe_mlx.{name}", *map(str, words), "--json"]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"[ancestors_dense] {name} failed: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


def print_rows(name: str, found: list[dict[str, Any]]) -> None:
    """Two tables for people."""
    original = found[0]["original_perplexity"] if found else float("nan")
    print(f"\n{name} in the trellis, feed-forward layers coded, the rest bfloat16; perplexity before: {original:.2f}")
    header = ["bits asked", "bits", "MB coded", "MB in all", "perplexity", "KL", "same best"]
    form = ("{:.2f}", "{:.1f}", "{:.1f}", "{:.2f}", "{:.4f}", "{:.1%}")
    keys = ("bits", "coded_mb", "model_mb", "perplexity", "kl", "top1")
    print_table(
        header, [[f"{r['asked']:g}", *(f.format(r[k]) for k, f in zip(keys, form, strict=True))] for r in found]
    )
    print("Streamed, in the smallest budget that works:")
    header = [
        "bits asked",
        "budget MB",
        "held MB",
        "experts MB",
        "in memory MB",
        "MB a token",
        "tokens/s",
        "all in memory",
        "same tokens",
    ]
    keys = ("budget_mb", "peak_mb", "experts_mb", "pool_mb", "mb_a_token", "streamed_tps", "resident_tps")
    print_table(header, [[f"{r['asked']:g}", *(f"{r[k]:.1f}" for k in keys), r["same_tokens"]] for r in found])
