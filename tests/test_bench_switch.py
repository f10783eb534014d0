"""The plan of switch-c-2048: its sizes are those that QMoE's paper reports, and headers suffice for them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import plan_switch as b  # noqa: E402
import public_sizes  # noqa: E402

EXPERT_WEIGHTS = 30 * 2048 * 2 * 2080 * 6144


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("Switch-base-128", 14.9), ("Switch-large-128", 52.7), ("Switch-c-2048", 3142)]
)
def test_bfloat16_takes_what_the_paper_says(name, gigabytes):
    public = next(m for m in public_sizes.MODELS if m.name == name)
    assert 2 * public_sizes.parameters(public_sizes.build(public)) / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_the_table_of_models_has_todays_words():
    table = Path(__file__).resolve().parents[1] / "docs" / "models.md"
    assert f"tokens: {public_sizes.words('switch_transformers')}." in table.read_text()


def test_at_the_papers_rate_it_takes_the_papers_disk():
    rest = public_sizes.parameters(public_sizes.build(b.model())) - EXPERT_WEIGHTS
    assert EXPERT_WEIGHTS * b.PAPER_RATE / 8 + 2 * rest == pytest.approx(b.PAPER_DISK, rel=0.002)


def test_sizes_of_a_plan():
    found = b.case(b.CASES["trellis .8"], 0.0, probe=False)
    rest = found["disk_bytes"] - EXPERT_WEIGHTS * found["bits"] / 8
    assert rest == pytest.approx(1.9e9, rel=0.05)  # rows of 2080 have no groups of 64: most of it keeps 16 bits
    assert found["bits"] == pytest.approx(0.8, rel=0.01) and found["min_budget_bytes"] < 6e9
    assert found["resident_budget_bytes"] > found["disk_bytes"]
    assert found["bytes_per_token"] == pytest.approx(15 * 2 * 2080 * 6144 * 0.8 / 8, rel=0.01)  # the decoder's layers


def test_qmoe_needs_less_than_the_paper_for_independent_weights(tmp_path):
    spec = b.planned(b.CASES["qmoe, dictionary"], tmp_path).spec
    assert len(spec.layers) == 30 and spec.bits == pytest.approx(0.757, abs=0.003) and spec.bits < b.PAPER_RATE
