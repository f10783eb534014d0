"""A budget that changes while a model runs: the pool follows, tokens do not, what cannot be is refused."""

import random
import re
import sys
import threading
from pathlib import Path

import pytest

import tiny_qmoe_mlx
from tiny_qmoe_mlx import budget, models, ops
from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.errors import BudgetError

pytest_plugins = ["command_fixtures"]
CONTEXT, TOKENS = 256, 60
PROMPT = "the river stone light walks under old"


def bounds(model: Path) -> tuple[int, int]:
    """The smallest budget that works, and the one that keeps every expert in memory."""
    found = budget.split(open_model(model), sys.maxsize, CONTEXT, True)
    return found.min_budget_bytes, found.resident_budget_bytes


def written(loaded, tokenizer, each=lambda i: None) -> list[int]:
    """Tokens of an answer; `each` is called between them."""
    out = []
    for i, response in enumerate(tiny_qmoe_mlx.stream_generate(loaded, tokenizer, PROMPT, max_tokens=TOKENS)):
        out.append(response.token)
        each(i)
    return out


@pytest.fixture(scope="module")
def expected(converted) -> list[int]:
    loaded, tokenizer = models.load(converted, bounds(converted)[1], CONTEXT)
    with loaded:
        return written(loaded, tokenizer)


def test_a_budget_that_changes_after_every_token_changes_no_token(converted, expected):
    low, high = bounds(converted)
    loaded, tokenizer = models.load(converted, high, CONTEXT)
    draw, cache = random.Random(0), loaded.tiny_qmoe.cache
    seen = set()

    def change(i: int) -> None:
        asked = draw.randint(low, high)
        loaded.tiny_qmoe.set_memory(asked)
        (pool,) = cache.pools.values()
        slots = budget.split(open_model(converted), asked, CONTEXT, True).slots[pool.record_bytes]
        assert pool.active == slots and len(pool.slot_of) + len(pool.free) <= slots
        assert loaded.tiny_qmoe.stats()["budget_bytes"] == asked
        seen.add(slots)

    with loaded:
        assert written(loaded, tokenizer, change) == expected
        assert len(seen) > 5, "sizes from the least to all"
        assert loaded.tiny_qmoe.stats()["expert_misses"] > 0


def test_a_model_in_memory_shrinks_and_is_whole_again(converted, expected):
    low, high = bounds(converted)
    loaded, tokenizer = models.load(converted, high, CONTEXT)
    runtime = loaded.tiny_qmoe
    with loaded:
        whole = runtime.cache.pool_bytes
        runtime.set_memory(low)
        assert runtime.stats()["mode"] == "streamed" and runtime.cache.pool_bytes < whole
        assert written(loaded, tokenizer) == expected and runtime.stats()["expert_misses"] > 0
        runtime.set_memory(high)
        before = runtime.stats()["expert_misses"]
        assert runtime.stats()["mode"] == "resident" and runtime.cache.pool_bytes == whole
        assert written(loaded, tokenizer) == expected and runtime.stats()["expert_misses"] == before


def test_another_thread_may_change_it(converted, expected):
    low, high = bounds(converted)
    loaded, tokenizer = models.load(converted, high - 1, CONTEXT)
    draw, over = random.Random(1), threading.Event()
    changes = []

    def change() -> None:
        while not over.is_set():
            changes.append(draw.randint(low, high - 1))
            loaded.tiny_qmoe.set_memory(changes[-1])

    thread = threading.Thread(target=change)
    with loaded:
        thread.start()
        found = [written(loaded, tokenizer) for _ in range(3)]
        over.set()
        thread.join()
    assert found == [expected] * 3 and len(changes) > 10


def test_too_small_is_refused_with_the_smallest_that_works(converted, expected):
    low, high = bounds(converted)
    loaded, tokenizer = models.load(converted, high - 1, CONTEXT)
    with loaded:
        with pytest.raises(BudgetError, match="too small") as error:
            loaded.tiny_qmoe.set_memory(low - 1)
        assert loaded.tiny_qmoe.stats()["budget_bytes"] == high - 1, "as it was"
        smallest = re.search(r"smallest that works is (\S+),", str(error.value))[1]
        loaded.tiny_qmoe.set_memory(smallest)
        assert written(loaded, tokenizer) == expected


def test_a_closed_model_is_refused(converted):
    """It would start a thread, and say yes to any size."""
    low, high = bounds(converted)
    loaded, _ = models.load(converted, high - 1, CONTEXT)
    loaded.close()
    with pytest.raises(ValueError, match="should be open, it has been closed"):
        loaded.tiny_qmoe.set_memory(low)
    assert loaded.tiny_qmoe.stats()["budget_bytes"] == high - 1


def test_more_than_the_pool_was_made_for_is_refused(converted):
    low, high = bounds(converted)
    loaded, _ = models.load(converted, low, CONTEXT)
    with loaded, pytest.raises(BudgetError, match="at most .* with which the model was loaded.*load it again"):
        loaded.tiny_qmoe.set_memory(high)


def test_what_a_gpu_may_still_read_stays(converted, monkeypatch):
    low, high = bounds(converted)
    loaded, _ = models.load(converted, high, CONTEXT)
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    with loaded:
        with pytest.raises(BudgetError, match="in memory for good"):
            loaded.tiny_qmoe.set_memory(low)
        loaded.tiny_qmoe.set_memory(high + 1)


def test_pressure_goes_on_from_the_new_size(converted):
    low, high = bounds(converted)
    loaded, _ = models.load(converted, high - 1, CONTEXT)
    runtime = loaded.tiny_qmoe
    with loaded:
        runtime._pressure.stop()
        runtime._pressure._follow("critical", 1e9)
        assert runtime._pressure.given_back > 0
        runtime.set_memory((low + high) // 2)
        (pool,) = runtime.cache.pools.values()
        assert runtime._pressure.given_back == 0 and pool.active == runtime.budget.slots[pool.record_bytes]
        runtime._pressure._follow("critical", 2e9)
        assert pool.active < runtime.budget.slots[pool.record_bytes]


@pytest.mark.parametrize("context", [0, -1, 1.5, "5", None, True])
def test_a_context_is_a_number_of_tokens(converted, context):
    with pytest.raises(ValueError, match=r"^\[load\] context should be a whole number of tokens, at least 1, received"):
        models.load(converted, context=context)
