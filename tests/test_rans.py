"""rANS: lossless, at the entropy, read by an integer decoder written from docs/FORMAT.md, and damage refused by numpy
and C++ alike.
"""

import numpy as np
import pytest
from container_files import one_sentence

from tiny_qmoe_mlx import native, native_rans
from tiny_qmoe_mlx.codecs import rans
from tiny_qmoe_mlx.errors import FormatError

needs_library = pytest.mark.skipif(not native.available(), reason="the C++ library was not built")


def noise(rng, count, sigma=20.0):
    return np.clip(np.rint(rng.normal(128, sigma, count)), 0, 255).astype(np.uint8)


def payload_of(symbols):
    return rans.encode(symbols).pack()


def decoded(payload, count):
    return rans.decode(rans.parse(payload, count, "here"), count, "here")


def integers_only(payload: bytes, count: int) -> list[int]:
    """Section 8.1 of docs/FORMAT.md in plain integers, a symbol at a time; no use of the package."""
    first, last, at, frequency = payload[0], payload[1], 2, [0] * 256
    for symbol in range(first, last + 1):
        frequency[symbol], at = payload[at], at + 1
        if frequency[symbol] >= 128:
            frequency[symbol], at = frequency[symbol] - 128 + 128 * payload[at], at + 1
    at += -at % 4
    slots = [(s, i) for s, f in enumerate(frequency) for i in range(f)]
    tiles = -(-count // 65536)
    ends = [int.from_bytes(payload[at + 4 * t : at + 4 * t + 4], "little") for t in range(tiles)]
    at += 4 * tiles
    states = [int.from_bytes(payload[at + 4 * i : at + 4 * i + 4], "little") for i in range(32 * tiles)]
    at += 128 * tiles
    words = [int.from_bytes(payload[at + 2 * i : at + 2 * i + 2], "little") for i in range(ends[-1])]
    out, position = [], 0
    for tile in range(tiles):
        lanes = states[32 * tile : 32 * tile + 32]
        for i in range(min(65536, count - 65536 * tile)):
            x = lanes[i % 32]
            symbol, within = slots[x % 16384]
            x = frequency[symbol] * (x // 16384) + within
            if x < 65536:
                x, position = x * 65536 + words[position], position + 1
            lanes[i % 32] = x
            out.append(symbol)
        assert position == ends[tile] and lanes == [65536] * 32
    assert at + 2 * ends[-1] == len(payload)
    return out


@pytest.mark.parametrize("count", [1, 31, 32, 33, 1000, 65536, 65537, 70000])
@pytest.mark.parametrize("sigma", [0.0, 0.4, 60.0])
def test_every_symbol_comes_back(rng, count, sigma):
    symbols = noise(rng, count, sigma)
    payload = payload_of(symbols)
    np.testing.assert_array_equal(decoded(payload, count), symbols)
    if count < 2000 or (count == 70000 and sigma == 60.0):
        assert integers_only(payload.tobytes(), count) == symbols.tolist()


@needs_library
@pytest.mark.parametrize("count", [1, 32, 33, 65535, 65536, 200_001])
@pytest.mark.parametrize("sigma", [0.0, 0.4, 60.0])
def test_the_cpp_decoder_gives_the_same(rng, count, sigma):
    symbols = noise(rng, count, sigma)
    coded = rans.parse(payload_of(symbols), count, "here")
    np.testing.assert_array_equal(native_rans.decode(coded, count, "here"), symbols)


@pytest.mark.parametrize("sigma", [1.0, 5.0, 20.0, 40.0])
def test_within_two_percent_of_the_entropy(rng, sigma):
    """Seen: 0.5 to 0.9 %, of which the states of the lanes are 0.2."""
    symbols = noise(rng, 300_000, sigma)
    bits = 8 * len(payload_of(symbols)) / len(symbols)
    assert rans.entropy(symbols) < bits < 1.02 * rans.entropy(symbols)


def test_entropy_of_known_sequences():
    assert rans.entropy(np.array([1, 2, 3, 4], np.uint8)) == 2.0
    assert rans.entropy(np.array([7, 7, 7, 9], np.uint8)) == pytest.approx(0.8112781244591328)


def test_frequencies_sum_and_keep_every_symbol(rng):
    for _ in range(50):
        counts = (rng.random(256) < rng.random()) * rng.integers(1, 10 ** rng.integers(1, 9), 256)
        counts[rng.integers(256)] += 1
        found = rans.frequencies(counts)
        assert found.sum() == rans.TOTAL and ((found > 0) == (counts > 0)).all()


# ---- damage


COUNT = 70_000


@pytest.fixture(scope="module")
def sound():
    return payload_of(noise(np.random.default_rng(5), COUNT))


def places(payload):
    """Where ends, states and words begin."""
    coded = rans.parse(payload, COUNT, "here")
    words = len(payload) - 2 * len(coded.words)
    return words - 128 * 2 - 8, words - 128 * 2, words


def word(payload, at, value):
    payload[at : at + 4].view("<u4")[0] = value
    return payload


def last_end(payload):
    return int(payload[places(payload)[0] + 4 :][:4].view("<u4")[0])


DAMAGE = {
    "frequencies that do not sum": (lambda p: np.append(p[:2], np.append(p[2] + 1, p[3:])), "sum"),
    "first symbol after last": (lambda p: np.append(np.array([9, 3], np.uint8), p[2:]), "first and last"),
    "a table that ends early": (lambda p: p[:20], "ends early"),
    "nothing at all": (lambda p: p[:0], "first and last"),
    "no room for states": (lambda p: p[: places(p)[1] + 50], "should take"),
    "ends that run backwards": (lambda p: word(p, places(p)[0], last_end(p) + 1), "one after the other"),
    "a last end past the payload": (lambda p: word(p, places(p)[0] + 4, last_end(p) + 1), "one after the other"),
    "a payload cut short": (lambda p: p[:-2], "one after the other"),
    "a payload that goes on": (lambda p: np.append(p, np.zeros(2, np.uint8)), "one after the other"),
    "half a word": (lambda p: p[:-1], "one after the other"),
    "a state below its least": (lambda p: word(p, places(p)[1], 5), "lanes should begin"),
    "another state": (lambda p: word(p, places(p)[1], 0x00FFFFFF), "damaged"),
    "a tile that ends early": (lambda p: word(p, places(p)[0], last_end(p) // 2), "damaged"),
    "a tile that ends late": (lambda p: word(p, places(p)[0], last_end(p) - 1), "damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(sound, name):
    change, words = DAMAGE[name]
    payload = np.ascontiguousarray(change(sound.copy()).astype(np.uint8))
    with pytest.raises(FormatError) as error:
        decoded(payload, COUNT)
    assert words in one_sentence(error.value)
    with pytest.raises(FormatError, match=words):
        native_rans.decode(rans.parse(payload, COUNT, "here"), COUNT, "here")


def test_another_count_is_refused(sound):
    for count in (1, COUNT - 1, COUNT + 1, 65536, 10 * COUNT):
        with pytest.raises(FormatError):
            decoded(sound, count)


@needs_library
def test_numpy_and_cpp_agree_on_hostile_bytes(rng):
    """Whatever bytes come, both decode them to the same or both refuse; 300 random damages of small payloads."""
    refused = 0
    for _ in range(300):
        count = int(rng.integers(1, 400))
        payload = payload_of(noise(rng, count, 3.0))
        for _ in range(rng.integers(1, 4)):
            payload[rng.integers(len(payload))] = rng.integers(256)
        try:
            coded = rans.parse(payload, count, "here")
        except FormatError:
            continue
        found = native_rans.by_library(coded.frequencies, coded.ends, coded.states, coded.words, count)
        if found is None:
            refused += 1
            with pytest.raises(FormatError):
                rans.decode(coded, count, "here")
        else:
            np.testing.assert_array_equal(found, rans.decode(coded, count, "here"))
    assert refused > 50


@needs_library
def test_cpp_checks_what_parse_would_have(sound):
    """Called without `parse` before it: tables that do not sum, ends backwards or past the words, a wrong count."""
    good = rans.parse(sound, COUNT, "here")
    table, ends, states, words = good.frequencies, good.ends, good.states, good.words
    assert native_rans.by_library(table, ends, states, words, COUNT) is not None
    for i, value in ((3, 1), (255, 1 << 31), (128, 0)):
        other = table.copy()
        other[i] = value
        assert native_rans.by_library(other, ends, states, words, COUNT) is None
    assert native_rans.by_library(table, ends[::-1].copy(), states, words, COUNT) is None
    assert native_rans.by_library(table, ends, states, words[:-1], COUNT) is None
    assert native_rans.by_library(table, ends, states, words, COUNT + rans.TILE) is None
    assert native_rans.by_library(table, ends[1:], states[1:], words, COUNT) is None
