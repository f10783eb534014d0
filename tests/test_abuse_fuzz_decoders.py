"""Damaged records of every codec: two decoders refuse the same ones and agree on the others."""

import numpy as np
import pytest
from abuse import fuzz_decoders
from abuse.mutation import mutate, rehash, resize

from tiny_qmoe_mlx import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the C++ library is not built")
COUNT = 800  # half a second of each


@pytest.mark.parametrize("name", fuzz_decoders.CODECS)
def test_two_decoders_agree_on_damaged_records(name, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_decoders, "CRASHES", tmp_path)
    found = fuzz_decoders.fuzz(name, COUNT, seed=1)
    assert not found.wrong, list(found.wrong)
    assert found.inputs == COUNT and 10 < found.decoded < COUNT - 10  # both verdicts occur


@pytest.mark.parametrize("path", sorted(fuzz_decoders.CRASHES.glob("decoder_*")), ids=lambda path: path.name)
def test_what_broke_a_decoder_once_does_not_again(path):
    assert fuzz_decoders.replay(path) == ""


@pytest.mark.parametrize("name", fuzz_decoders.CODECS)
def test_a_decoder_that_is_wrong_is_found(name):
    """Another last byte of the weights, a refusal of sound bytes, and an exception that is no refusal."""
    _, codec = fuzz_decoders.sound_record(name, 0, 0)
    assert fuzz_decoders.check(codec, codec.sound) == (True, "")
    right = codec.second

    def other_weights(data):
        values = [v.copy() for v in right(data)]
        values[-1].reshape(-1).view(np.uint8)[-1] ^= 1
        return values

    for wrong, words in (
        (other_weights, "differs"),
        (lambda data: None, "second alone"),
        (lambda data: [][0], "IndexError"),
    ):
        codec.second = wrong
        assert words in fuzz_decoders.check(codec, codec.sound)[1]


def test_damages(rng):
    """They change bytes from the first that they may, and the length only where asked."""
    data = rng.integers(0, 256, 500, np.uint8)
    changed = [mutate(rng, data, 100) for _ in range(200)]
    assert all(len(c) == 500 and (c[:100] == data[:100]).all() for c in changed)
    assert sum((c != data).any() for c in changed) > 150
    sizes = {len(resize(rng, data)) for _ in range(200)}
    assert min(sizes) < 8 and max(sizes) > 500
    rehash(short := data[:10].copy())
    assert (short == data[:10]).all()
