"""A soak of seconds, by the same functions as the long one: `PYTHONPATH=tests python -m abuse.soak`."""

import dataclasses
import sys

import pytest
from abuse import soak

pytest_plugins = ["command_fixtures", "server_fixtures"]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


@linux
def test_nothing_grows_and_no_token_is_wrong(served):
    """Memory is judged by long runs alone: in seconds, buffers are still finding their size."""
    found, faults = soak.soak(served, 900, 300, seed=1, prompts=6)
    assert [fault for fault in faults if "resident" not in fault] == []
    assert found.written >= 900 and len(found.rounds) >= 5
    assert found.model.tiny_qmoe.stats()["mode"] == "streamed"


def test_growth_is_found():
    """Each figure in turn, on samples made by hand."""
    at = [
        soak.Sample(tokens, 100_000_000, 90_000_000, 5_000_000, 1_000_000, 10, 20, 30)
        for tokens in range(500, 3000, 500)
    ]
    assert soak.grown(at, 1000) == []
    for name, value in (
        ("bytes", 102_000_001),
        ("kept_bytes", 91_800_001),
        ("active_bytes", 7_000_000),
        ("cache_bytes", 40_000_000),
        ("files", 11),
        ("threads", 21),
        ("objects", 31),
    ):
        more = dataclasses.replace(at[-1], **{name: value})
        assert len(soak.grown([*at[:-1], more], 1000)) == 1, name


def test_a_batch_may_part_only_where_two_tokens_are_close():
    one = soak.Known([1], [5, 6, 7], [1.0, soak.CLOSE / 2, 1.0])
    assert one.agrees([5, 6, 7]) and one.agrees([5, 9, 9])
    assert not one.agrees([4, 6, 7]) and not one.agrees([5, 6, 8])
