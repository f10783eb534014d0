"""The qmoe codec: its tables, records that give back every weight, and hostile bytes, in numpy and in C++."""

import ctypes
import mmap

import numpy as np
import pytest
import qmoe_records
import xxhash
from container_files import one_sentence
from hypothesis import given, settings
from hypothesis import strategies as st
from qmoe_records import CODINGS, SHAPES, name_of, random_record, random_symbols, random_values

from tiny_qmoe_mlx import native, native_qmoe, spec
from tiny_qmoe_mlx.codecs import qmoe, qmoe_tables
from tiny_qmoe_mlx.errors import FormatError

DICTIONARY, EIGHT, TWELVE = CODINGS[0], CODINGS[1], CODINGS[2]
codings = pytest.mark.parametrize("coding", CODINGS, ids=name_of)
built = pytest.mark.skipif(not native_qmoe.available(), reason="the C++ library is not built")

# ---- tables


def test_the_dictionary_is_the_published_heaps():
    table = qmoe_tables.dictionary()
    for c, pairs in enumerate(qmoe_records.published_dictionary()):
        symbols = [s for pair in pairs for s in (pair % 3, pair // 3)]
        assert table.symbols[table.start[c] : table.start[c + 1]].tolist() == symbols, c
    assert len(table.lengths) == 65536


def test_the_dictionarys_lengths_and_order():
    table = qmoe_tables.dictionary()
    histogram = [9, 65, 233, 577, 1161, 2049, 3305, 4993, 7177, 9921, 13289, 17345, 3843, 1569]
    assert np.bincount(table.lengths // 2).tolist() == [0, *histogram]
    assert table.lengths[:12].tolist() == list(range(2, 26, 2)) and not table.symbols[: table.start[12]].any()
    assert ((table.tree[:-1] >= 0).any(1)).sum() == 46991  # inner nodes: most codewords are prefixes of others
    assert xxhash.xxh3_64_hexdigest(table.symbols.tobytes()) == "1d49c7d5a3e35257"


@pytest.mark.parametrize("levels", [3, 4])
@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize("index", [0, 10, 15])
def test_tunstalls_leaves(levels, bits, index):
    table = qmoe_tables.tunstall(levels, bits, index)
    got = [tuple(table.symbols[a:b].tolist()) for a, b in zip(table.start[:-1], table.start[1:], strict=True)]
    assert got == qmoe_records.leaves(levels, bits, qmoe_records.NUMERATORS[index])
    p = qmoe_tables.PROBABILITIES[index]
    single = np.array([p] + [(1 - p) / (levels - 1)] * (levels - 1))
    leaf = np.array([single[list(sequence)].prod() for sequence in got])
    assert leaf.sum() == pytest.approx(1, abs=1e-12)  # complete: every row can be coded
    inner = {sequence[:-1] for sequence in got}
    assert min(single[list(s)].prod() for s in inner if s) >= leaf.max() * (1 - 1e-12)


def test_no_code_is_longer_than_its_bits_allow():
    for coding in CODINGS:
        count = len(coding.table(0).lengths)
        assert 2**coding.bits - (coding.levels - 1) < count <= 2**coding.bits


@pytest.mark.parametrize("table", [qmoe_tables.dictionary(), qmoe_tables.tunstall(4, 8, 3)], ids=["pairs", "leaves"])
def test_words_hold_16_symbols_each(table):
    found = (table.words[:, None] >> (2 * np.arange(16, dtype=np.uint32)) & 3).reshape(-1)
    np.testing.assert_array_equal(found[: len(table.symbols)], table.symbols)
    assert not found[len(table.symbols) :].any() and len(found) >= len(table.symbols) + 32


def test_rows_are_cut_into_the_longest_sequences(rng):
    """A brute-force search for the longest prefix, pair by pair."""
    table, known = qmoe_tables.dictionary(), {}
    for c, pairs in enumerate(qmoe_records.published_dictionary()):
        known[pairs] = c
    symbols = random_symbols(rng, 20, 120, 3, 0.8)
    codewords, offsets = qmoe_tables.encode(symbols, table, True)
    for row in range(20):
        pairs, want = tuple((symbols[row, ::2] + 3 * symbols[row, 1::2]).tolist()), []
        while pairs:
            size = max(n for n in range(1, 15) if pairs[:n] in known)
            want.append(known[pairs[:size]])
            pairs = pairs[size:]
        assert codewords[offsets[row] : offsets[row + 1]].tolist() == want


# ---- records


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    coding=st.sampled_from([c for c in CODINGS if c.code == "dictionary" or c.bits < 16]),
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    zeros=st.sampled_from([0.0, 0.3, 0.885, 0.99, 1.0]),
    bias=st.booleans(),
)
def test_every_weight_comes_back(seed, coding, rows, columns, zeros, bias):
    rng = np.random.default_rng(seed)
    symbols = random_symbols(rng, rows, columns, coding.levels, zeros)
    values = random_values(rng, rows, coding.levels)
    biases = rng.normal(size=rows).astype(np.float32) if bias else None
    record = qmoe.pack([qmoe.encode(symbols, values, coding, biases)] * 2, coding)
    shapes = [(rows, columns)] * 2
    assert len(record) % 128 == 0 and len(record) >= qmoe.least_bytes(shapes, coding, bias)
    first, second = qmoe.parse(record, shapes, bias, coding, "here")
    floats = np.concatenate([np.zeros((rows, 1), np.uint32), values.astype(np.uint32) << 16], 1).astype(np.uint32)
    want = np.take_along_axis(floats.view(np.float32), symbols.astype(np.int64), 1)
    for m in (first, second):
        np.testing.assert_array_equal(qmoe.decode_matrix(m, coding), want)
        assert (m.bias is None) == (biases is None) and (biases is None or np.array_equal(m.bias, biases))
    if native_qmoe.available():
        assert native_qmoe.is_sound(second, coding)
        np.testing.assert_array_equal(native_qmoe.dequantize(second, coding, 0, rows), want)


@codings
def test_a_second_decoder_agrees(rng, coding):
    for bias in (False, True):
        record = random_record(rng, coding, bias=bias)
        for i, m in enumerate(qmoe.parse(record, SHAPES, bias, coding, "here")):
            np.testing.assert_array_equal(qmoe.decode_matrix(m, coding), qmoe_records.decode(record, i, coding, bias))


def test_many_rows_are_decoded_in_parts(rng, monkeypatch):
    monkeypatch.setattr(qmoe, "SYMBOLS_AT_ONCE", 200)
    record = random_record(rng, TWELVE)
    for i, m in enumerate(qmoe.parse(record, SHAPES, False, TWELVE, "here")):
        np.testing.assert_array_equal(qmoe.decode_matrix(m, TWELVE), qmoe_records.decode(record, i, TWELVE, False))


def test_bytes_are_pinned():
    """Files that were written once must be readable for ever."""
    for coding, want in zip(CODINGS[:4], PINNED, strict=True):
        record = random_record(np.random.default_rng(7), coding, bias=True)
        assert xxhash.xxh3_64_hexdigest(record.tobytes()) == want, name_of(coding)


PINNED = ("082a9772270a6311", "b108495f43696334", "d7205bb380b602cc", "ef4f1d3c4b4b4f6a")


@pytest.mark.parametrize("zeros, index", [(0, 0), (0.25, 0), (0.885, 10), (0.95, 13), (1, 15)])
def test_a_matrix_takes_the_table_of_its_zeros(zeros, index):
    assert qmoe.best_table(zeros, 3) == index
    assert 0 <= qmoe.best_table(zeros, 4) <= 15


def test_a_record_that_is_too_small_is_refused(rng):
    m = qmoe.encode(random_symbols(rng, 4, 8, 3), random_values(rng, 4, 3), EIGHT)
    with pytest.raises(ValueError, match="a record needs 384 bytes but was given 256"):
        qmoe.pack([m], EIGHT, 256)


# ---- hostile bytes


def signed(data: np.ndarray) -> np.ndarray:
    data[56:64].view("<u8")[0] = xxhash.xxh3_64_intdigest(data[:56].tobytes())
    return data


def word(at, value, width="<u4"):
    def change(data):
        data[at : at + np.dtype(width).itemsize].view(width)[0] = value

    return change


# The first section of SHAPES with 8-bit codewords: head at 128, offsets at 144, values at 280, codewords at 512.
OFFSETS, VALUES = 144, 144 + 4 * 34
CODES = 128 + qmoe.side_bytes(33, EIGHT, False)
HOSTILE = [
    (word(0, 3), "header is damaged"),
    (word(5, 1, "u1"), "codec 3 is asked for, received version 1 of codec 1"),
    (word(4, 2, "u1"), "received version 2"),
    (word(7, 2, "u1"), "the config asks for matrices"),
    (word(12, 1), "the config asks for matrices"),
    (word(16, 34), "the config asks for matrices"),
    (word(8, 130), "used bytes should be a multiple of 128"),
    (word(8, 1 << 31), "used bytes should be a multiple of 128"),
    (word(8, 128), "matrix 0 begins at 128, the record uses 128"),
    (word(24, 2), "matrix 0 should begin at 128, the header says otherwise"),
    (word(128, 2**32 - 1), "4294967295 codewords end at"),
    (word(128, 3), "these should fit one another"),
    (word(132, 16), "the table should be 0 to 15, received 16"),
    (word(VALUES, 0x7F80, "<u2"), "finite"),
    (word(OFFSETS, 1), "first row should begin at codeword 0, begins at 1"),
    (word(OFFSETS + 4, 0), "row 0 should have a codeword at least"),
    (word(OFFSETS + 8, 2**32 - 1), "row 2 should have a codeword at least"),
    (word(OFFSETS + 4, 2), "codewords of row 0 should stand for 70 weights"),
    (word(CODES, 255, "u1"), "codewords should be 0 to 254, received 255"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", HOSTILE)
def test_damage_is_named_and_cpp_agrees(rng, change, message):
    record = random_record(rng, EIGHT)
    change(record)
    if message != "header is damaged":
        signed(record)
    with pytest.raises(FormatError, match=message) as error:
        qmoe.parse(record, SHAPES, False, EIGHT, "here")
    one_sentence(error.value)
    assert not sound_in_cpp(record, EIGHT)


def test_codewords_that_write_past_the_row(rng):
    table = qmoe_tables.dictionary()
    m = qmoe.encode(np.zeros((2, 28), np.uint8), random_values(rng, 2, 3), DICTIONARY)
    m.payload.view("<u2")[0] = np.flatnonzero((table.lengths == 28) & (table.symbols[table.start[1:] - 1] == 0))[0]
    for columns, fine in ((28, True), (27, True), (26, False), (14, False)):
        m.columns = columns
        record = qmoe.pack([m], DICTIONARY)
        if fine:
            qmoe.parse(record, [(2, columns)], False, DICTIONARY, "here")
            continue
        with pytest.raises(FormatError, match=f"row 0 should stand for {columns} weights, they stand for 28"):
            qmoe.parse(record, [(2, columns)], False, DICTIONARY, "here")


@pytest.mark.parametrize("coding", [DICTIONARY, EIGHT], ids=name_of)
def test_weights_beyond_the_row_should_be_zeros(rng, coding):
    """The one weight of the row is a zero; its codeword goes on with another that is none."""
    m = qmoe.encode(np.zeros((1, 1), np.uint8), random_values(rng, 1, 3), coding)
    table = coding.table(m.table)
    starts, second = table.start[:-1], table.symbols[np.minimum(table.start[:-1] + 1, len(table.symbols) - 1)]
    fits = (table.lengths == 2) if coding is DICTIONARY else (table.lengths >= 2)
    chosen = np.flatnonzero(fits & (table.symbols[starts] == 0) & (second > 0))[0]
    m.payload = qmoe.pack_codewords(np.array([chosen], np.uint16), coding.bits)
    record = qmoe.pack([m], coding)
    with pytest.raises(FormatError, match="beyond the end of row 0 should be zeros"):
        qmoe.parse(record, [(1, 1)], False, coding, "here")
    assert not sound_in_cpp(record, coding, [(1, 1)])


def sound_in_cpp(record, coding, shapes=SHAPES, bias=False) -> bool:
    """The verdict of numpy's checks of the frame and the library's of what it frames; the same without the library."""
    if not native_qmoe.available():
        return False
    try:
        matrices = qmoe.views(record, shapes, bias, coding, "here")
    except FormatError:
        return False
    return all(native_qmoe.is_sound(m, coding) for m in matrices)


@settings(max_examples=150)
@given(data=st.data(), coding=st.sampled_from([CODINGS[0], *CODINGS[1:3], *CODINGS[4:6]]), bias=st.booleans())
def test_any_damage_is_a_sentence_or_harmless(data, coding, bias):
    """Any bytes are changed; what is not refused decodes as a second reader of the format decodes it."""
    record = random_record(np.random.default_rng(1), coding, bias=bias)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(record) - 1))
        record[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        record = signed(record)[: data.draw(st.integers(0, len(record)))]
    try:
        matrices = qmoe.parse(record, SHAPES, bias, coding, "here")
    except FormatError as error:
        one_sentence(error)
        assert not sound_in_cpp(record, coding, bias=bias)
        return
    assert not native_qmoe.available() or sound_in_cpp(record, coding, bias=bias)
    for i, m in enumerate(matrices):
        np.testing.assert_array_equal(qmoe.decode_matrix(m, coding), qmoe_records.decode(record, i, coding, bias))


@built
@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), coding=st.sampled_from(CODINGS[:3]))
def test_cpp_never_reads_outside_whatever_the_codewords(seed, coding):
    """The payload ends where the memory ends: one byte further would kill the process."""
    rng = np.random.default_rng(seed)
    rows, columns = 5, 60
    count = int(rng.integers(rows, 60))
    size = qmoe.payload_bytes(count, coding)
    guarded = guarded_bytes(size)
    guarded[:] = rng.integers(0, 256, size, np.uint8)
    offsets = np.sort(rng.integers(0, count + 1, rows + 1)).astype(np.uint32)
    if rng.random() < 0.5:
        offsets = rng.integers(0, 2**32, rows + 1, np.uint32)
    offsets[-1] = count
    m = qmoe.Matrix(rows, columns, 0, offsets, random_values(rng, rows, coding.levels), None, guarded)
    sound = native_qmoe.is_sound(m, coding)
    for call in (lambda: native_qmoe.dequantize(m, coding, 0, rows), lambda: native_qmoe.qmv(m, coding, X60)):
        try:
            call()
        except ValueError as error:
            assert "damaged" in str(error) and not sound


X60 = np.ones((3, 60), np.float32)


def guarded_bytes(size: int) -> np.ndarray:
    """u8 (size,) that end with the last page of a file, whose next page cannot be read."""
    page = mmap.PAGESIZE
    pages = -(-size // page) + 1
    memory = mmap.mmap(-1, pages * page)
    array = np.frombuffer(memory, np.uint8)
    protect = ctypes.CDLL(None).mprotect
    assert protect(ctypes.c_void_p(array.ctypes.data + (pages - 1) * page), ctypes.c_size_t(page), 0) == 0
    return array[(pages - 1) * page - size : (pages - 1) * page]


# ---- the C++ library


@built
@codings
@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_products_in_cpp(rng, coding, tokens):
    record = random_record(rng, coding, [(70, 301)] * 2, zeros=0.7)
    for m in qmoe.parse(record, [(70, 301)] * 2, False, coding, "here"):
        x = rng.normal(size=(tokens, 301)).astype(np.float32)
        want = x.astype(np.float64) @ qmoe.decode_matrix(m, coding).astype(np.float64).T
        got = native_qmoe.qmv(m, coding, x)
        assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()  # seen: 4e-7
        np.testing.assert_array_equal(native_qmoe.dequantize(m, coding, 17, 60), qmoe.decode_matrix(m, coding)[17:60])


@built
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_rows(rng, threads):
    before = native.threads()
    record = random_record(rng, EIGHT, [(203, 64)], zeros=0.5)
    (m,) = qmoe.parse(record, [(203, 64)], False, EIGHT, "here")
    try:
        native.set_threads(threads)
        np.testing.assert_array_equal(native_qmoe.dequantize(m, EIGHT, 0, 203), qmoe.decode_matrix(m, EIGHT))
    finally:
        native.set_threads(before)


@built
def test_wrong_arguments_are_sentences(rng):
    (m,) = qmoe.parse(random_record(rng, EIGHT, [(33, 70)]), [(33, 70)], False, EIGHT, "here")
    x = np.zeros((1, 70), np.float32)
    for call, message in [
        (lambda: native_qmoe.dequantize(m, EIGHT, 0, 34), "rows should lie in 0 to 33"),
        (lambda: native_qmoe.qmv(m, EIGHT, np.zeros((9, 70), np.float32)), "1 to 8 tokens, received 9"),
        (lambda: native_qmoe.qmv(m, EIGHT, x[:, 1:].copy()), "x should have shape"),
        (lambda: native_qmoe.qmv(m, CODINGS[4], x), "offsets and values should be"),
        (lambda: native_qmoe.qmv(m, CODINGS[3], x), "should lie in the payload"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# ---- config.json


def words(**changes):
    coding = {"grid": "ternary", "code": "dictionary", "bits": 16}
    layer = {
        "path": "a.b", "layer": 1, "file": "model-experts-00001.safetensors", "experts": 2, "record_bytes": 4096,
        "matrices": [[n, 32, 32] for n in ("gate_proj", "up_proj", "down_proj")], "bias": False, "coding": coding,
    }  # fmt: skip
    layer.update({k: v for k, v in changes.items() if k in layer})
    layer["coding"] = {**coding, **{k: v for k, v in changes.items() if k in coding}}
    if "coding" in changes:
        layer["coding"] = changes["coding"]
    top = {
        "format_version": 1, "codec": "qmoe", "bits": 1.0, "alignment": 128, "length": 0, "seed": 0, "layers": [layer],
        "source": {"model": "x", "revision": None}, "calibration": {"source": "none", "tokens": 0},
    }  # fmt: skip
    return {**top, **{k: v for k, v in changes.items() if k in top and k != "bits"}}


def test_the_words_come_back():
    read = spec.ModelSpec.from_dict(words())
    assert read.to_dict() == words() and read.layers[0].coding == DICTIONARY


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grid": "octal"}, "grid should be one of"),
        ({"grid": ["ternary"]}, "grid should be one of"),
        ({"code": "zip"}, "code should be one of"),
        ({"bits": 12}, "bits of code dictionary should be one of"),
        ({"bits": 16.0}, "bits of code dictionary should be one of"),
        ({"code": "tunstall", "bits": 10}, "bits of code tunstall should be one of"),
        ({"grid": "2-bit"}, "code dictionary should be of grid ternary"),
        ({"coding": None}, "a coding if and only if codec is qmoe"),
        ({"coding": 3}, "coding should be an object with"),
        ({"coding": {"grid": "ternary"}}, "coding should be an object with"),
        ({"record_bytes": 1024}, "record_bytes of a.b should be at least 1664"),
        ({"length": 12}, "length and seed of codec qmoe should be 0"),
    ],
)
def test_wrong_words_are_refused(change, message):
    with pytest.raises(FormatError, match=message) as error:
        spec.ModelSpec.from_dict(words(**change))
    one_sentence(error.value)
