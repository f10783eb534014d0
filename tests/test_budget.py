"""Reading budgets, and splitting them."""

import json
import math
from pathlib import Path

import pytest
import records

from tiny_qmoe_mlx import budget, container, footprint
from tiny_qmoe_mlx.errors import BudgetError

GB = 1000**3


@pytest.mark.parametrize(
    "text, expected",
    [
        ("6GB", 6 * GB),
        ("6 gb", 6 * GB),
        ("1.5GiB", 3 << 29),
        ("512mib", 512 << 20),
        ("50%", 16 * GB),
        ("auto", 20_800_000_000),
        ("123456", 123456),
        (99, 99),
    ],
)
def test_budgets_are_read(text, expected):
    assert budget.parse_memory(text, 32 * GB) == expected


@pytest.mark.parametrize(
    "text", ["banana", "", "GB", "-1GB", "1e9", "6XB", "nan", "10 20", "0", "0GB", "0%", "101%", "33GB"]
)
def test_budgets_that_make_no_sense_are_refused(text):
    with pytest.raises(BudgetError, match=r"^\[memory\] a budget should"):
        budget.parse_memory(text, 32 * GB)


@pytest.mark.parametrize("size", [1, 999, 1000, 123456, 999_999_999, 12_345_678_901])
def test_shown_minimum_suffices(size):
    assert budget.parse_memory(budget.show(size), 1000 * GB) >= size


@pytest.fixture
def model(tmp_path):
    directory = Path(tmp_path / "model")
    records.write_model(directory, hidden=64, width=64, experts=6, layers=2, alignment=128, rates=[2])
    return container.open_model(directory)


def smallest(model):
    return budget.split(model, 1 << 50).min_budget_bytes


def test_split_spends_no_more_than_the_budget(model):
    low, high = smallest(model), budget.split(model, 1 << 50).resident_budget_bytes
    for given in (low, low + 1, (low + high) // 2, high - 1, high, 2 * high):
        part = budget.split(model, given)
        spent = part.runtime_bytes + part.weight_bytes + part.kv_bytes + part.scratch_bytes + part.pool_bytes
        assert spent <= given
        assert part.mode == ("resident" if given >= high else "streamed")
        (slots,) = part.slots.values()
        assert slots <= 12 and (slots == 12) == (given >= high)


def test_too_small_names_the_smallest_that_works(model):
    low = smallest(model)
    with pytest.raises(BudgetError, match=f"the smallest that works is {budget.show(low)}"):
        budget.split(model, low - 1)
    budget.split(model, low)


def test_context_is_paid_for():
    config = {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "head_dim": 16,
    }
    short, long = (footprint.kv_bytes(config, n, cpu=True) for n in (100, 10_000))
    assert short >= 2 * 2 * 2 * 16 * 4 * 100 and long >= 100 * short / 5


def test_two_record_sizes_share_in_proportion():
    assert budget._share({1000: 100, 3000: 50}, {1000: 4, 3000: 4}, 16_000 + 96_000 // 2 + 138_000 // 2) == {
        1000: 52,
        3000: 27,
    }


def test_weights_are_counted_from_headers(model):
    found = footprint.tensor_sizes(model)
    total = sum(4 * math.prod(shape) for dtype, shape in found.values() if dtype in footprint.FLOAT_TYPES)
    assert footprint.weight_bytes(model, cpu=True) >= total > 0
    assert json.dumps({name: list(shape) for name, (_, shape) in found.items()})
