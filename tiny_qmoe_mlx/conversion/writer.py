"""Many texts written at once by one model: its own calibration text, and its answers to the tasks of a report.

All rows stand at the same position, so that no row is padded and every kind of cache of mlx-lm serves: while one row
writes, another may still be reading its longer prompt.
"""

from collections.abc import Callable, Collection
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from tiny_qmoe_mlx import budget, footprint
from tiny_qmoe_mlx.layers import use_cpu_kernels
from tiny_qmoe_mlx.library_errors import computing
from tiny_qmoe_mlx.original import checkpoint

TOKENS_AT_ONCE = footprint.PREFILL_CHUNK  # of all rows together, while prompts are read
ORIGINAL_SHARE = 0.7  # of the machine's memory that an original may take: a Mac's GPU gets about three quarters
Choose = Callable[[mx.array], mx.array]
Progress = Callable[[str, int, int], None]


def open_original(directory: Path) -> tuple[nn.Module, dict]:
    """The unconverted model and its config, fit for computing; its weights are read when they are first used.

    Raises:
        FormatError: mlx-lm cannot load it.
    """
    model, config = checkpoint.load_lazy(directory)
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)  # MLX's CPU backend multiplies gathered experts in float32 only
    use_cpu_kernels(model)
    return model, config


def memory_bytes(model: nn.Module, config: dict, tokens: int) -> int:
    """Bytes of an opened original once its weights are in memory, with a KV cache for `tokens` tokens."""
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    weights = sum(array.nbytes for array in arrays.values())
    return weights + footprint.kv_bytes(config, tokens, mx.default_device() == mx.cpu)


def available_bytes() -> int:
    """Bytes that an original in memory may take on this machine."""
    return int(ORIGINAL_SHARE * budget.machine_memory())


def write(
    model: nn.Module,
    prompts: list[list[int]],
    limits: list[int],
    choose: Choose,
    ends: Collection[int],
    after: Callable[[int], list[int]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """Continue prompts, one token of every row a step.

    Args:
        model: maps int (rows, tokens) and a cache to logits (rows, tokens, vocabulary).
        prompts: token ids of each row, at least one.
        limits: tokens of each row, its prompt included, after which it ends.
        choose: log probabilities (rows, vocabulary) -> token ids (rows,).
        ends: tokens that end a row.
        after: what a row that has ended reads next, by its number; None leaves it ended.
        progress: called with (positions done, positions in all).

    Returns:
        Token ids of each row with its prompt, at most its limit, an end token included.
    """
    rows = [list(p[:limit]) for p, limit in zip(prompts, limits, strict=True)]
    cache, seen, total = make_prompt_cache(model), 0, max(limits)
    step = max(1, TOKENS_AT_ONCE // len(rows))
    going = [i for i, row in enumerate(rows) if len(row) < limits[i]]
    while going:
        upto = min(seen + step, *(len(rows[i]) for i in going))
        # a row that has ended reads on, anything: no row sees another
        inputs = [(row[seen:upto] + [row[-1]] * (upto - seen))[: upto - seen] for row in rows]
        with computing("the model"):
            logits = model(mx.array(inputs), cache=cache)[:, -1].astype(mx.float32)
        picked = choose(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(picked, [part.state for part in cache])
        chosen: list[int] = picked.tolist()  # type: ignore[assignment]
        seen = upto
        for i in [i for i in going if len(rows[i]) == seen]:
            rows[i].append(chosen[i])
            if rows[i][-1] in ends and after is not None:
                rows[i] = (rows[i] + after(i))[: limits[i]]
            elif rows[i][-1] in ends:
                going.remove(i)
        going = [i for i in going if len(rows[i]) < limits[i]]
        progress(seen, total)
    return rows
