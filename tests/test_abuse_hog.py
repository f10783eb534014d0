"""Memory pressure from another process, in less time than it takes with the real constants:
`PYTHONPATH=tests python -m abuse.hog`.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import limits  # noqa: E402
from abuse import hog  # noqa: E402


@pytest.mark.slow
@pytest.mark.skipif(not limits.available(), reason="needs root on Linux, for a memory cgroup")
def test_a_run_gives_way_to_a_hog_and_takes_its_memory_again(tmp_path, monkeypatch):
    monkeypatch.setattr(hog, "HOLD_S", 3.0)
    model = hog.random_model.make(tmp_path / "m", 4.0, 4, hog.SHAPE, "noise for the hog")
    figures, faults = hog.attack(model, 120, {"CALM_S": 1.0, "GROWTH": 0.3}, tokens=16, rest_s=0.1)
    assert not faults
    assert figures["least of it under pressure, MB"] < 0.8 * figures["pool of experts, MB"]
