"""Usage profiles: written, merged, read back with every value bounded, and the experts that they keep warm."""

import json
from pathlib import Path

import numpy as np
import pytest
import records

from tiny_qmoe_mlx import container
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.streaming import profile

USE = [np.array([5, 0, 9], np.int64), np.array([1, 7, 0], np.int64)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("profile") / "model"
    records.write_model(directory)
    return container.open_model(directory)


def test_round_trip(model, tmp_path):
    path = tmp_path / "use.json"
    profile.save_profile(path, model, USE, 12)
    for got, expected in zip(profile.load_profile(path, model), USE, strict=True):
        assert got.dtype == np.int64 and got.tolist() == expected.tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["use.json"]


def test_a_second_run_counts_the_first_half(model, tmp_path):
    path = tmp_path / "use.json"
    profile.save_profile(path, model, USE, 12)
    profile.save_profile(path, model, USE, 3)
    assert [row.tolist() for row in profile.load_profile(path, model)] == [[7, 0, 13], [1, 10, 0]]
    assert json.loads(path.read_text())["decisions"] == 9


def test_counts_stay_bounded(model, tmp_path):
    path = tmp_path / "use.json"
    for _ in range(2):
        profile.save_profile(path, model, [np.full(3, profile.MAX_COUNT)] * 2, profile.MAX_COUNT)
    assert profile.load_profile(path, model)[0].tolist() == [profile.MAX_COUNT] * 3


def test_rates_share_a_profile_other_models_do_not(model, tmp_path):
    records.write_model(tmp_path / "other_rate", rates=[1], experts=3, width=64)
    records.write_model(tmp_path / "other_model", experts=4)
    path = tmp_path / "use.json"
    profile.save_profile(path, model, USE, 12)
    profile.load_profile(path, container.open_model(tmp_path / "other_rate"))
    other = container.open_model(tmp_path / "other_model")
    before = path.read_bytes()
    with pytest.raises(FormatError, match="it is one of another model"):
        profile.save_profile(path, other, [np.zeros(4, np.int64)] * 2, 1)
    with pytest.raises(FormatError, match="it is one of another model"):
        profile.load_profile(path, other)
    assert path.read_bytes() == before


def change(**values):
    def changed(found):
        return {**found, **values}

    return changed


BAD = [
    change(use=None),
    change(use=[[1, 2, 3]]),
    change(use=[[1, 2, 3], [1, 2]]),
    change(use=[[1, 2, -3], [1, 2, 3]]),
    change(use=[[1, 2, 3.5], [1, 2, 3]]),
    change(use=[[1, 2, True], [1, 2, 3]]),
    change(use=[[1, 2, 10**30], [1, 2, 3]]),
    change(use=[[1, 2, "3"], [1, 2, 3]]),
    change(use={"0": [1, 2, 3], "1": [1, 2, 3]}),
    change(decisions=-1),
    change(decisions=None),
    change(model=None),
    change(model={"model": "noise"}),
    change(tiny_qmoe_profile=2),
    change(tiny_qmoe_profile=True),
    lambda found: [found],
    lambda found: 7,
    lambda found: {},
]


@pytest.mark.parametrize("damage", BAD)
def test_damaged_profiles_are_refused_and_kept(model, tmp_path, damage):
    path = tmp_path / "use.json"
    profile.save_profile(path, model, USE, 12)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    before = path.read_bytes()
    for attempt in (
        lambda: profile.load_profile(path, model),
        lambda: profile.save_profile(path, model, USE, 1),
    ):
        with pytest.raises(FormatError, match=r"should (be|have)") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"NaN", b'{"tiny_qmoe_profile": 1'])
def test_what_is_no_json_is_refused(model, tmp_path, content):
    path = Path(tmp_path / "use.json")
    path.write_bytes(content)
    with pytest.raises(FormatError, match="should be a usage profile"):
        profile.load_profile(path, model)


def test_directories_and_missing_files(model, tmp_path):
    with pytest.raises(FormatError, match="no plain file"):
        profile.load_profile(tmp_path, model)
    with pytest.raises(FileNotFoundError, match="no such profile"):
        profile.load_profile(tmp_path / "none", model)


def test_warmest_fit_the_pool_in_file_order(tmp_path):
    records.write_model(tmp_path / "model", rates=[2], width=64)
    model = container.open_model(tmp_path / "model")
    (size,) = {layer.record_bytes for layer in model.spec.layers}
    assert profile.warmest(USE, model, {size: 3}) == [(0, 0), (0, 2), (1, 1)]
    assert profile.warmest(USE, model, {size: 99}) == [(0, 0), (0, 2), (1, 0), (1, 1)]
    assert len(profile.warmest(USE, model, {size: 99}, unused=True)) == 6
    assert profile.warmest(USE, model, {size: 0}) == []


def test_warmest_fill_each_pool_by_itself(model):
    first, second = (layer.record_bytes for layer in model.spec.layers)
    assert first != second
    assert profile.warmest(USE, model, {first: 1, second: 1}) == [(0, 2), (1, 1)]
