"""codecs/trellis.py and codecs/rotation.py against a decoder written from docs/FORMAT.md alone, and hostile records."""

import hashlib

import numpy as np
import pytest
import reference_decoder as reference
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from records import random_matrix, random_record, record_size

from tiny_qmoe_mlx.codecs import rotation, trellis
from tiny_qmoe_mlx.errors import FormatError


def packed(record: trellis.Record) -> np.ndarray:
    return trellis.pack(record, record_size(record))


def assert_same_as_reference(data: np.ndarray, shapes: list[tuple[int, int]], bias: bool) -> None:
    """Bit for bit: both round to float32 after each of the two multiplications."""
    record = trellis.parse(data, shapes, bias, "test")
    for matrix, want in zip(record.matrices, reference.decode_record(data.tobytes()), strict=True):
        assert (matrix.rows, matrix.columns) == (want["rows"], want["columns"])
        got = trellis.decode_matrix(matrix, record.length)
        np.testing.assert_array_equal(got, np.array(want["weights"], np.float32), strict=True)
        if bias:
            np.testing.assert_array_equal(matrix.bias, np.array(want["bias"], np.float16))
        else:
            assert matrix.bias is None and want["bias"] is None


# ---- values


@pytest.mark.parametrize("inst3", [False, True])
def test_all_states_have_the_documented_values(inst3):
    table = trellis.code_table(16, inst3)
    want = [(reference.inst3(s),) if inst3 else reference.t2(s) for s in range(1 << 16)]
    np.testing.assert_array_equal(table, np.array(want, np.float32), strict=True)


def test_t2_magnitudes_lie_between_an_eighth_and_two():
    # The top three bits of the exponent are fixed, two vary: no state is Inf, NaN, denormal or zero.
    size = np.abs(trellis.code_table(16, False))
    assert 0.125 <= size.min() and size.max() < 2


# ---- decoding


@pytest.mark.parametrize("length", trellis.LENGTHS)
@pytest.mark.parametrize("rate", range(8))
def test_every_rate_and_length_decodes_as_documented(rng, rate, length):
    record = trellis.Record(
        length, [random_matrix(rng, 32, 64, rates=[rate]), random_matrix(rng, 64, 32, rates=[rate])]
    )
    assert_same_as_reference(packed(record), [(32, 64), (64, 32)], bias=False)


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 140),
    bias=st.booleans(),
    row_gain=st.booleans(),
    length=st.sampled_from(trellis.LENGTHS),
    matrices=st.integers(2, 3),
    seed=st.integers(0, 2**32),
)
def test_any_shape_decodes_as_documented(rows, columns, bias, row_gain, length, matrices, seed):
    shapes = [(rows, columns)] * (matrices - 1) + [(columns, rows)]
    record = random_record(np.random.default_rng(seed), shapes, bias, length, row_gain=row_gain)
    assert_same_as_reference(packed(record), shapes, bias)


def test_more_than_256_blocks_have_a_two_byte_order(rng):
    rates = np.zeros(260, int)
    rates[[0, 3, 255, 256, 259]] = 1, 7, 2, 6, 5
    record = trellis.Record(14, [random_matrix(rng, 32, 260 * 64, rates=rates), random_matrix(rng, 33, 32, rates=[3])])
    assert_same_as_reference(packed(record), [(32, 260 * 64), (33, 32)], bias=False)


@pytest.mark.parametrize("bits", [0, 0xFFFFFFFF, 0x55555555])
def test_payload_of_one_pattern(rng, bits):
    record = random_record(rng, [(32, 512), (512, 32)])
    for matrix in record.matrices:
        matrix.payload[:] = bits
    assert_same_as_reference(packed(record), [(32, 512), (512, 32)], bias=False)


def test_a_tile_is_circular(rng):
    # The last windows of a tile run into its first bits: flipping bit 0 must change the last weights too.
    record = random_record(rng, [(32, 64), (64, 32)], rates=[1])
    before = trellis.decode_matrix(record.matrices[0], 12)
    record.matrices[0].payload[0, 0] ^= 1
    changed = np.argwhere(trellis.decode_matrix(record.matrices[0], 12) != before)
    assert {tuple(p) for p in changed} >= {(0, 0), (31, 14), (31, 15)}
    assert changed[:, 1].max() < 16, "the flip left its tile"


def counted_matrix(rows: int, columns: int, rates: list[int]) -> trellis.Matrix:
    """A matrix made by arithmetic alone: numpy's random streams may change between its versions."""
    padded, blocks = trellis.padded_rows(rows), len(rates)
    words = 32 * int(trellis.PLANES[rates].sum())
    payload = (np.arange(padded // 32 * words, dtype=np.uint64) * 2654435761 % 2**32).astype(np.uint32)
    return trellis.Matrix(
        rows=rows,
        columns=columns,
        rates=np.array(rates, np.uint8),
        order=np.arange(blocks)[::-1],
        block_gain=(1 + np.arange(4 * blocks) / 8).astype(np.float16),
        row_gain=(0.5 + np.arange(padded) / 64).astype(np.float16),
        bias=(np.arange(padded) / 4).astype(np.float16),
        payload=payload.reshape(padded // 32, words),
    )


def test_bytes_and_weights_of_version_1_are_pinned():
    """A change of these digests breaks every converted model there is."""
    rates = [[1, 2, 3], [4, 5, 0], [6, 7]]
    matrices = [
        counted_matrix(40, 190, rates[0]),
        counted_matrix(40, 190, rates[1]),
        counted_matrix(190, 100, rates[2]),
    ]
    data = packed(trellis.Record(16, matrices))
    assert (
        hashlib.sha256(data.tobytes()).hexdigest() == "4665e99f10553d71394ad713cb9b11b51c81104964b98ad6c26fdd9a0fb5cd81"
    )
    weights = b"".join(trellis.decode_matrix(m, 16).astype("<f4").tobytes() for m in matrices)
    assert hashlib.sha256(weights).hexdigest() == "39667f9e166ead271b3cc8968df94e8b23e48a77300336863b2e64b5a5377bfb"


# ---- packing and parsing


def test_parse_gives_back_what_was_packed(rng):
    shapes = [(48, 200), (48, 200), (200, 48)]
    record = random_record(rng, shapes, bias=True)
    parsed = trellis.parse(packed(record), shapes, True, "test")
    assert parsed.length == record.length
    for got, want in zip(parsed.matrices, record.matrices, strict=True):
        for name in ("rows", "columns", "rates", "order", "block_gain", "row_gain", "bias", "payload"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)


def test_padding_after_the_used_bytes_is_zero(rng):
    record = random_record(rng, [(32, 64), (64, 32)])
    size = record_size(record)
    data = trellis.pack(record, size + 1024)
    assert not data[size:].any() and int(data[8:12].view("<u4")[0]) == size
    trellis.parse(data, [(32, 64), (64, 32)], False, "test")


def test_pack_refuses_a_record_that_is_too_small(rng):
    record = random_record(rng, [(32, 64), (64, 32)])
    with pytest.raises(
        ValueError, match=f"needs {record_size(record)} bytes but was given {record_size(record) - 128}"
    ):
        trellis.pack(record, record_size(record) - 128)


# ---- hostile records

SHAPES = [(32, 128), (128, 32)]
GAINS = 128  # where the first matrix's section begins: 32 row gains, 8 block gains, 2 of order, 1 of rates
BLOCK_GAINS, ORDER, RATES = GAINS + 64, GAINS + 80, GAINS + 82


def sealed(data: np.ndarray) -> np.ndarray:
    """Give a changed header its right hash: what an attacker, not an accident, would do."""
    data[56:64].view("<u8")[0] = xxhash.xxh3_64_intdigest(data[:56].tobytes())
    return data


@pytest.fixture
def data(rng) -> np.ndarray:
    return packed(random_record(rng, SHAPES, rates=None))


def set_word(word: int, value: int):
    def change(data: np.ndarray) -> None:
        data[:64].view("<u4")[word] = value

    return change


def set_bytes(offset: int, *values: int):
    def change(data: np.ndarray) -> None:
        data[offset : offset + len(values)] = values

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_word(0, 0x31525155), "header is damaged"),
        (set_bytes(4, 2), "version 2 of codec 1; a newer"),
        (set_bytes(5, 9), "version 1 of codec 9"),
        (set_bytes(6, 13), "received 13 and"),
        (set_bytes(7, 3), "asks for 2 matrices and bias False, the record has 3"),
        (set_word(2, 0), "received 12 and 0"),
        (set_word(2, 129), "received 12 and 129"),
        (set_word(2, 2**31), "received 12 and 2147483648"),
        (set_word(3, 1), "has 2 and True"),
        (set_word(4, 33), "should be 32 x 128, the record says 33 x 128"),
        (set_word(5, 2**32 - 1), "should be 32 x 128, the record says 32 x 4294967295"),
        (set_word(6, 0), "needs 128 bytes at 0"),
        (set_word(6, 2**32 - 1), "needs 128 bytes at 549755813760"),
        (set_word(2, 128), "needs 128 bytes at 128, the record uses 128"),
        (set_word(2, 256), "the record uses 256"),
        (set_bytes(GAINS, 0, 0x7C), "row gains should be finite"),
        (set_bytes(BLOCK_GAINS, 1, 0xFC), "block gains should be finite"),
        (set_bytes(ORDER, 1, 1), "should be a permutation"),
        (set_bytes(ORDER, 0, 2), "should be a permutation"),
        (set_bytes(RATES, 0x81), "rates should be 0 to 7, received 8"),
        (set_bytes(RATES, 0x1F), "rates should be 0 to 7, received 15"),
    ],
)
def test_each_wrong_field_is_refused(data, change, message):
    change(data)
    with pytest.raises(FormatError, match=message) as error:
        trellis.parse(sealed(data), SHAPES, False, "file.safetensors, expert 5")
    assert str(error.value).startswith("[file.safetensors, expert 5] ")


def test_infinite_bias_is_refused(rng):
    record = random_record(rng, SHAPES, bias=True)
    record.matrices[1].bias[3] = np.inf
    with pytest.raises(FormatError, match="biases should be finite"):
        trellis.parse(packed(record), SHAPES, True, "test")


@pytest.mark.parametrize("size", [0, 63, 127])
def test_a_record_that_is_cut_short_is_refused(data, size):
    with pytest.raises(FormatError, match=f"at least 128 bytes, received {size}"):
        trellis.parse(data[:size], SHAPES, False, "test")


def test_any_flipped_header_bit_is_found(data):
    for bit in range(8 * 64):
        changed = data.copy()
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError, match="damaged"):
            trellis.parse(changed, SHAPES, False, "test")


@given(
    changes=st.dictionaries(st.integers(0, 255), st.integers(0, 255), min_size=1, max_size=12), size=st.integers(0, 9)
)
def test_hostile_bytes_are_refused_or_decode_to_finite_weights(changes, size):
    record = random_record(np.random.default_rng(1), SHAPES)
    data = packed(record)
    for offset, value in changes.items():
        data[offset] = value
    data = sealed(data[: len(data) - 128 * size])
    try:
        parsed = trellis.parse(data, SHAPES, False, "test")
    except FormatError:
        return
    for matrix in parsed.matrices:
        assert np.isfinite(trellis.decode_matrix(matrix, parsed.length)).all()


# ---- rotation


@pytest.mark.parametrize("columns", [1, 64, 100, 192, 576, 1024])
@pytest.mark.parametrize("side", [0, 1])
def test_rotate_is_the_documented_matrix(rng, columns, side):
    seed, layer = 2**32 - 1 - columns, 2047 - columns
    matrix = np.array(reference.rotation_matrix(seed, layer, side, columns))
    sign = rotation.signs(seed, layer, side, columns)
    x = rng.normal(size=(3, columns))
    want = np.pad(x, ((0, 0), (0, len(sign) - columns))) @ matrix.T
    np.testing.assert_allclose(rotation.rotate(x, sign), want, rtol=0, atol=1e-12)


def test_the_hadamard_block_is_at_most_2048():
    assert [rotation.hadamard_size(c) for c in (1, 64, 576, 768, 1536, 4096, 14336, 8192)] == [
        *(64, 64, 64, 256, 512, 2048, 2048, 2048)
    ]


def test_unrotate_undoes_rotate(rng):
    sign = rotation.signs(3, 5, 0, 200)
    x = rng.normal(size=(2, 7, 256)).astype(np.float32)
    np.testing.assert_allclose(rotation.unrotate(rotation.rotate(x, sign), sign), x, rtol=0, atol=1e-5)


def test_unrotated_weights_give_the_same_product(rng):
    # Section 5: W = Q P, so that W x = Q (P x).
    sign = rotation.signs(3, 5, 1, 192)
    q, x = rng.normal(size=(40, 192)), rng.normal(size=(5, 192))
    np.testing.assert_allclose(x @ rotation.unrotate(q, sign).T, rotation.rotate(x, sign) @ q.T, rtol=0, atol=1e-11)


def test_signs_differ_between_layers_sides_and_seeds():
    every = [rotation.signs(*key, 640) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1))]
    for i, a in enumerate(every):
        assert abs(a.mean()) < 0.15
        for b in every[:i]:
            assert abs((a * b).mean()) < 0.15  # 640 fair coins: four standard deviations
