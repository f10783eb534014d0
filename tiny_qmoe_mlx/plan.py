"""`python -m tiny_qmoe_mlx.plan`: what a converted model takes on disk and in memory, from its files' headers alone."""

import argparse
import sys
from pathlib import Path
from typing import Any

from tiny_qmoe_mlx import locate, terminal

EXAMPLES = """
  python -m tiny_qmoe_mlx.plan --model demo
  python -m tiny_qmoe_mlx.plan --model qwen3-2bit --memory 6GB --context 8192 --json
"""


def plan(directory: str | Path, memory: str | int = "auto", context: int | None = None) -> dict[str, Any]:
    """Whether and how a converted model runs in a budget.

    Args:
        directory: of a converted model.
        memory: as `load` takes it.
        context: tokens of KV cache; 2048 or the model's limit if that is less.

    Returns:
        What `sizes` gives, and in bytes: the smallest budget that works, the one that keeps every expert in memory, the
        budget asked about and its split; fits, and mode ("resident", "streamed", or None where it does not fit).

    Raises:
        FormatError: it is not a converted model.
        BudgetError: the budget cannot be read, or is more than the machine has.
    """
    import mlx.core as mx

    from tiny_qmoe_mlx import budget
    from tiny_qmoe_mlx.container import open_model, sizes

    container = open_model(directory)
    limit = budget.longest_context(container.config)
    context = min(budget.DEFAULT_CONTEXT, limit) if context is None else context
    if not 0 < context <= limit:
        raise ValueError(f"[plan] --context should lie in 1 to the model's {limit}, received {context}.")
    asked = budget.parse_memory(memory)
    cpu = mx.default_device() == mx.cpu
    most = budget.split(container, sys.maxsize, context, cpu)
    fits = asked >= most.min_budget_bytes
    part = budget.split(container, asked, context, cpu) if fits else None
    return {
        **sizes(directory),
        "context": context,
        "min_budget_bytes": most.min_budget_bytes,
        "resident_budget_bytes": most.resident_budget_bytes,
        "budget_bytes": asked,
        "fits": fits,
        "mode": part.mode if part else None,
        "runtime_bytes": most.runtime_bytes,
        "weight_bytes": most.weight_bytes,
        "kv_bytes": most.kv_bytes,
        "scratch_bytes": most.scratch_bytes,
        "pool_bytes": part.pool_bytes if part else None,
    }


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
    terminal.add_quiet(p)
    terminal.add_json(p)
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    found = plan(locate.model_directory(args.model, args.quiet or args.json), args.memory, args.context)
    if args.json:
        terminal.print_json(found)
    else:
        print("\n".join(_lines(found)))
    return 0


def _lines(found: dict[str, Any]) -> list[str]:
    from tiny_qmoe_mlx.budget import show

    verdict = f"runs {found['mode']}, with {show(found['pool_bytes'])} for experts" if found["fits"] else "does not fit"
    return [
        f"{found['path']}",
        f"  on disk     {show(found['file_bytes'])}: {found['experts']} experts in {found['expert_layers']} layers "
        f"take "
        f"{show(found['expert_file_bytes'])} at {found['bits']:.3f} bits per weight",
        f"  in memory   {show(found['weight_bytes'])} other weights, {show(found['kv_bytes'])} KV cache at "
        f"{found['context']} tokens, "
        f"{show(found['scratch_bytes'])} scratch, {show(found['runtime_bytes'])} program",
        f"  budgets     {show(found['min_budget_bytes'])} is the smallest that works, "
        f"{show(found['resident_budget_bytes'])} keeps every expert in memory",
        f"  {show(found['budget_bytes']):<10}  {verdict}",
    ]


if __name__ == "__main__":
    sys.exit(terminal.run(main))
