"""The pool of experts with delays where threads meet: a short run of abuse/races.py."""

import pytest
from abuse import races as abuse

from tiny_qmoe_mlx.streaming.cache import ExpertCache
from tiny_qmoe_mlx.streaming.pool import Pool


@pytest.mark.parametrize("seed", range(3))
def test_slots_and_records_stay_whole(tmp_path, seed):
    found = abuse.stress(tmp_path / "model", seed, 1.5)
    assert min(found.values()) > 0 and len(found) == 4


@pytest.mark.parametrize("defect", ["no pin", "a record that comes early", "a demand that asks twice"])
def test_planted_defects_are_seen(tmp_path, monkeypatch, defect):
    """Each was or could be: what is in use leaves; what is not read is taken for read; one expert has two slots."""
    if defect == "no pin":
        monkeypatch.setattr(Pool, "take", lambda self: self.free.pop() if self.free else _leave(self))
    elif defect == "a record that comes early":
        monkeypatch.setattr(abuse.ExpertStore, "read", lambda self, layer, experts, into: None)
    else:
        monkeypatch.setattr(abuse.ExpertCache, "_claim", lambda self, key: None)
        monkeypatch.setattr("tiny_qmoe_mlx.streaming.demand.Demand._look_again", lambda self: None)
    monkeypatch.setattr(abuse, "HANG_S", 5)
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(20):
            abuse.stress(tmp_path / "model", seed, 1.0)


def _leave(pool: Pool) -> int | None:
    leaves = pool.order.leave({})
    return None if leaves is None else pool.slot_of.pop(leaves)


def test_delays_leave_no_trace():
    before = ExpertCache._finished
    with abuse.delays(0):
        assert ExpertCache._finished is not before
    assert ExpertCache._finished is before
