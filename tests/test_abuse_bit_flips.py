"""Silent corruption: a short run of abuse/bit_flips.py, and that it would see what it looks for."""

import random

import pytest
from abuse import bit_flips, models

from tiny_qmoe_mlx import native
from tiny_qmoe_mlx.errors import FormatError

pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(root):
    return bit_flips.Model(models.make(root, "qmoe"))


def test_flipped_bits_are_named_and_stop_a_run(model):
    found = bit_flips.Found()
    bit_flips.flip_bits(found, model, 60, random.Random(1))
    assert not found.broken
    tried = sum(n for (_, key), n in found.outcomes.items() if key == "tried")
    stopped = sum(n for (_, key), n in found.outcomes.items() if key == "stopped")
    assert tried == 60 and stopped >= 30


def test_records_that_rot_while_a_model_runs(model):
    found = bit_flips.Found()
    bit_flips.rot(found, model, 8, random.Random(2))
    assert not found.broken and sum(n for (_, key), n in found.outcomes.items() if key == "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("codec", models.MADE)
def test_every_codec(root, codec):
    found = bit_flips.break_models(root / codec, [codec], 60, seed=3)
    assert not found.broken


def test_a_wrong_token_and_a_silent_verify_are_seen():
    found = bit_flips.Found()
    found.note("experts", False, bit_flips.outcome(lambda: [1], [2]), "bit 5")
    assert found.broken == ["bit 5: verify does not name it", "bit 5: the run wrote other tokens"]


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("no place"), RuntimeError("[x] should")])
def test_an_error_that_is_no_sentence_is_not_taken_for_one(error):
    def run():
        raise error

    with pytest.raises(type(error)):
        bit_flips.outcome(run, [])
    assert bit_flips.outcome(lambda: (_ for _ in ()).throw(FormatError("[x] should be y.")), []) == "stopped"
