"""`python -m tiny_qmoe_mlx.plan`: what a converted model takes on disk and in memory, and how fast it will be, from its
files' headers and short probes of this machine."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tiny_qmoe_mlx import locate, paths, terminal

EXAMPLES = """
  python -m tiny_qmoe_mlx.plan --model demo
  python -m tiny_qmoe_mlx.plan --model qwen3-2bit --memory 6GB --context 8192 --json
  python -m tiny_qmoe_mlx.plan --model org/qwen3-2bit --memory 6GB      # on the hub: only headers are fetched
  python -m tiny_qmoe_mlx.plan --model demo --memory 480MB --check      # runs it too, and compares
"""
CHECK_TOKENS = 64  # that --check writes, after a prompt that fills the rest of the context


def plan(
    directory: str | Path,
    memory: str | int = "auto",
    context: int | None = None,
    probe: bool = True,
    profile: str | Path | None = None,
    trace: str | Path | None = None,
    disk_folder: str | Path | None = None,
) -> dict[str, Any]:
    """Whether and how a converted model runs in a budget, and how fast.

    Args:
        directory: of a converted model, or of its headers alone, as `hub.headers` makes it.
        memory: as `load` takes it.
        context: tokens of KV cache; 2048 or the model's limit if that is less.
        probe: whether to measure this machine (seconds) for tokens per second.
        profile, trace: files that `generate` wrote, to expect hits from.
        disk_folder: where to probe the disk, for headers without records.

    Returns:
        What `sizes` gives, and in bytes: the smallest budget that works, the one that keeps every expert in memory, the
        budget asked about and its split; fits, and mode ("resident", "streamed", or None where it does not fit);
        resident_share of the expert bytes, hit_rate and hit_rate_from; with `probe` disk_bytes_per_s and what
        `forecast` gives.

    Raises:
        FormatError: it is not a converted model; the profile or trace is not its own.
        BudgetError: the budget cannot be read, or is more than the machine has.
    """
    import mlx.core as mx

    from tiny_qmoe_mlx import budget, footprint
    from tiny_qmoe_mlx.container import open_model, sizes

    container = open_model(directory)
    limit = footprint.longest_context(container.config)
    context = min(budget.DEFAULT_CONTEXT, limit) if context is None else context
    if not 0 < context <= limit:
        raise ValueError(f"[plan] --context should lie in 1 to the model's {limit}, received {context}.")
    asked = budget.parse_memory(memory)
    cpu = mx.default_device() == mx.cpu
    most = budget.split(container, sys.maxsize, context, cpu)
    part = budget.split(container, asked, context, cpu) if asked >= most.min_budget_bytes else None
    return {
        **sizes(directory),
        "context": context,
        "min_budget_bytes": most.min_budget_bytes,
        "resident_budget_bytes": most.resident_budget_bytes,
        "budget_bytes": asked,
        "fits": part is not None,
        "mode": part.mode if part else None,
        "runtime_bytes": most.runtime_bytes,
        "weight_bytes": most.weight_bytes,
        "kv_bytes": most.kv_bytes,
        "scratch_bytes": most.scratch_bytes,
        "loading_bytes": most.loading_bytes,
        "pool_bytes": part.pool_bytes if part else None,
        **(_expected(container, part, probe, profile, trace, disk_folder) if part else {}),
    }


def _expected(container: Any, part: Any, probe: bool, profile: Any, trace: Any, disk_folder: Any) -> dict[str, Any]:
    """What a budget that works gives: hits, and with `probe` times."""
    from tiny_qmoe_mlx import blas, forecast, speed

    hits, source = forecast.hit_rate(container, part.slots, profile, trace)
    hits, source = (1.0, "all in memory") if part.mode == "resident" else (hits, source)
    whole = sum(layer.experts * layer.slot for layer in container.spec.layers)
    found = {"resident_share": part.pool_bytes / whole, "hit_rate": hits, "hit_rate_from": source}
    if container.spec.layers[0].whole:  # they come in turn, and no chain of them can be longer than the pool
        found |= {"hit_rate": part.pool_bytes / whole, "hit_rate_from": "the share of layers that fit"}
    if not probe:
        return found
    largest = max(layer.record_bytes for layer in container.spec.layers)
    blas.install()
    with blas.shared_machine():
        rate = speed.disk_of(Path(disk_folder), largest) if disk_folder else speed.disk(container)
        return {**found, "disk_bytes_per_s": rate, **forecast.forecast(container, part, hits, rate)}


# ---- compared with a run


def check(directory: Path, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the model in the planned budget, in a process of its own, and put plan and run side by side.

    Args:
        directory: of the model.
        found: what `plan` gave for it.

    Returns:
        Rows of what, planned, measured and error (measured over planned, less 1). Memory is the most that the process
        held, its context filled.

    Raises:
        ValueError: the run failed, with its words.
    """
    run = _run(directory, found)
    parts = ("runtime_bytes", "weight_bytes", "kv_bytes", "scratch_bytes", "pool_bytes")
    most = max(found["loading_bytes"], sum(found[part] for part in parts))
    pairs = {"peak_memory_bytes": (most, run["peak_memory_bytes"])}
    if found["mode"] == "streamed":
        pairs["hit_rate"] = (found["hit_rate"], run["decode_hit_rate"])
    if "tokens_per_s" in found:
        if found["mode"] == "streamed":
            pairs["bytes_per_token"] = (found["bytes_per_token"], run["decode_bytes_per_token"])
        pairs["tokens_per_s"] = (found["tokens_per_s"], run["generation_tps"])
    return [
        {"what": what, "planned": planned, "measured": got, "error": got / planned - 1 if planned else None}
        for what, (planned, got) in pairs.items()
    ]


def _run(directory: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The figures of a run of `generate` that fills the planned context."""
    from tiny_qmoe_mlx import models
    from tiny_qmoe_mlx.conversion.text import BUILTIN_TEXT

    written = min(CHECK_TOKENS, found["context"] // 2)
    tokenizer, room = models.open_tokenizer(directory), found["context"] - written - 8  # 8: text is no exact measure
    ids = tokenizer.encode(BUILTIN_TEXT.read_text(encoding="utf-8")[: 16 * found["context"]])
    with tempfile.TemporaryDirectory() as folder:
        stats = Path(folder) / "stats.json"
        command = [sys.executable, "-m", "tiny_qmoe_mlx.generate", "--model", str(directory), "--prompt", "-"]
        command += ["--ignore-chat-template", "--max-tokens", str(written), "--memory", str(found["budget_bytes"])]
        command += ["--context", str(found["context"]), "--stats", str(stats), "--quiet"]
        text = tokenizer.decode(ids[: max(1, room)]).encode()
        done = subprocess.run(command, input=text, capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()[-300:]
            raise ValueError(f"[plan] the run of --check failed, status {done.returncode}: {said}")
        return json.loads(stats.read_bytes())


# ---- the command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = terminal.parser("plan", __doc__.split(": ", 1)[1], EXAMPLES)
    terminal.add_model(p)
    p.add_argument(
        "--memory",
        default="auto",
        metavar="6GB|60%|auto",
        help="the budget to plan for (default auto: at most 65%% of the machine)",
    )
    p.add_argument("--context", type=int, help="tokens of KV cache to provide for (default 2048)")
    p.add_argument("--profile", metavar="FILE", help="expect hits from a usage profile that `generate` wrote")
    p.add_argument("--trace", metavar="FILE", help="expect hits from a routing trace that `generate` wrote")
    p.add_argument("--no-probe", action="store_true", help="sizes alone: do not measure this machine")
    p.add_argument("--check", action="store_true", help="run the model too, and print how far the plan was off")
    p.add_argument("--revision", help="branch, tag or commit on the hub")
    terminal.add_quiet(p)
    terminal.add_json(p)
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    found = _plan(args)
    if args.json:
        terminal.print_json(found)
    else:
        print("\n".join(_lines(found)))
    return 0


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    """The plan of a model on this machine, or of the headers of one on the hub, which are fetched into a folder."""
    from tiny_qmoe_mlx.hub.client import require_no_revision
    from tiny_qmoe_mlx.hub.headers import skeleton

    quiet = args.quiet or args.json
    options = (args.memory, args.context, not args.no_probe, args.profile, args.trace)
    if args.model == locate.DEMO or paths.expanded(args.model).exists():
        require_no_revision(args.model, args.revision)
        directory = locate.model_directory(args.model, quiet)
        found = plan(directory, *options)
    else:
        if args.check:
            raise ValueError(f"[plan] --check should be given a model on this machine, {args.model} is not.")
        with tempfile.TemporaryDirectory() as folder:
            directory = skeleton(args.model, args.revision, Path(folder), quiet)
            found = {**plan(directory, *options, disk_folder="."), "path": args.model}
    if args.check and found["context"] < 2:
        raise ValueError("[plan] --check should have a --context of at least 2: a prompt and an answer; received 1.")
    if args.check and found["fits"]:
        found["check"] = check(directory, found)
    return found


def _lines(found: dict[str, Any]) -> list[str]:
    from tiny_qmoe_mlx.budget import show

    verdict = f"runs {found['mode']}, with {show(found['pool_bytes'])} for experts" if found["fits"] else "does not fit"
    return [
        f"{found['path']}",
        f"  on disk     {show(found['file_bytes'])}: {found['experts']} experts in {found['expert_layers']} layers "
        f"take {show(found['expert_file_bytes'])} at {found['bits']:.3f} bits per weight",
        f"  in memory   {show(found['weight_bytes'])} other weights, {show(found['kv_bytes'])} KV cache at "
        f"{found['context']} tokens, {show(found['scratch_bytes'])} scratch, {show(found['runtime_bytes'])} program",
        f"  budgets     {show(found['min_budget_bytes'])} is the smallest that works, "
        f"{show(found['resident_budget_bytes'])} keeps every expert in memory",
        f"  {show(found['budget_bytes']):<10}  {verdict}",
        *(_expectations(found) if found["fits"] else []),
        *map(_compared, found.get("check", [])),
    ]


def _expectations(found: dict[str, Any]) -> list[str]:
    lines, read, streamed = [], "", found["mode"] == "streamed"
    if streamed:
        lines = [
            f"  experts     {100 * found['resident_share']:.0f} % of their bytes fit; "
            f"{100 * found['hit_rate']:.0f} % hits expected from {found['hit_rate_from']}"
        ]
    if "tokens_per_s" not in found:
        return lines
    if streamed:
        read = f", {found['bytes_per_token'] / 1e6:.0f} MB read at {found['disk_bytes_per_s'] / 1e9:.2f} GB/s"
    dense, experts, disk = (f"{1e3 * found[part]:.1f} ms" for part in ("dense_s", "experts_s", "disk_s"))
    return [
        *lines,
        f"  expected    {found['tokens_per_s']:.1f} tokens/s, bound by the {found['limit']}{read}",
        f"              ({dense} beside the experts, and the longer of {experts} of products and {disk} of reads)",
    ]


def _compared(row: dict[str, Any]) -> str:
    off = "" if row["error"] is None else f" ({100 * row['error']:+.1f} %)"
    what = row["what"].replace("_", " ")
    return f"  run         {what}: planned {row['planned']:.6g}, measured {row['measured']:.6g}{off}"


if __name__ == "__main__":
    sys.exit(terminal.run(main))
