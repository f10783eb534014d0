"""Tiny-QMoE's parts: 8-bit levels, the table of 4-tuples with escapes, and records of coded planes."""

from collections import Counter

import numpy as np
import pytest
from container_files import one_sentence
from safetensors.numpy import save_file

from tiny_qmoe_mlx.codecs import affine, levels, packed, rans, tuples
from tiny_qmoe_mlx.errors import FormatError

# ---- levels


@pytest.mark.parametrize("group", levels.GROUPS)
def test_levels_are_the_papers_formula(rng, group):
    w = rng.normal(0, 0.02, (6, 200)).astype(np.float32)
    found = levels.quantize(w, group)
    for row in range(len(w)):
        for start in range(0, 200, group or 200):
            part = w[row : row + 1, start : start + group] if group else w
            at = (row, start // group) if group else (0, 0)
            scale = float(found["scales"][at])
            exact = (float(part.max()) - float(part.min())) / 255
            assert exact <= scale * (1 + 1e-7) and scale <= exact * (1 + 2**-9)  # float16, rounded up
            zero = round(-float(part.min()) / scale)
            assert found["zeros"][at] == zero
            codes = np.clip(np.rint(part / np.float32(scale)) + zero, 0, 255)
            got = found["weight"][row : row + 1, start : start + group] if group else found["weight"]
            np.testing.assert_array_equal(got, codes)
    near = np.abs(levels.dequantize(found, group) - w).max()
    assert near <= 0.51 * float(found["scales"].max()) + 1e-8


def test_levels_of_odd_matrices():
    for w in (np.zeros((2, 3)), np.full((2, 3), 0.5), np.full((2, 3), -0.5), np.full((1, 1), 1e-6)):
        for group in levels.GROUPS:
            found = levels.dequantize(levels.quantize(w.astype(np.float32), group), group)
            assert np.abs(found - w).max() <= max(np.abs(w).max(), 1) / 255
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            levels.quantize(np.full((2, 2), bad, np.float32), 128)
    with pytest.raises(ValueError, match="within 65504"):
        levels.quantize(np.array([[-3e37, 3e37]], np.float32), 128)


# ---- tuples


def counted(sequences):
    """The table by Python's Counter, as the published code counts; equals by their bytes."""
    found = Counter(tuple(s[i : i + 4].tolist()) for s in sequences for i in range(len(s) - 3))
    return [key for key, _ in sorted(found.items(), key=lambda item: (-item[1], item[0]))][:65534]


def test_the_table_counts_every_position(rng):
    sequences = [np.clip(rng.normal(8, 1, n), 0, 255).astype(np.uint8) for n in (900, 5, 4, 1000)]
    assert tuples.make_table(sequences).tolist() == [list(key) for key in counted(sequences)]


def test_the_table_is_the_same_whatever_is_sorted_at_once(rng, monkeypatch):
    """Also where more than 65534 tuples occur, most of them once: equals go by their bytes."""
    sequences = [rng.integers(0, 40, n).astype(np.uint8) for n in (60_000, 50_000, 9)]
    want = counted(sequences)
    assert len(want) == 65534
    for batch in (1, 70_000, 1 << 27):
        monkeypatch.setattr(tuples, "BATCH", batch)
        assert tuples.make_table(sequences).tolist() == [list(key) for key in want]


def test_the_table_has_65534_entries_and_no_codeword_is_the_escape(rng):
    symbols = rng.integers(0, 256, 200_000).astype(np.uint8)
    table = tuples.make_table([symbols])
    assert table.shape == (65534, 4)
    tuples.check_table(table, "table")
    coded = tuples.encode(table.reshape(-1), table)  # every entry, in order
    assert coded.tolist() == list(range(1, 65535)) and tuples.ESCAPE == 65535


@pytest.mark.parametrize("count", [4, 5, 6, 7, 8, 4001])
def test_tuples_come_back(rng, count):
    symbols = np.clip(np.rint(rng.normal(100, 1, count)), 0, 255).astype(np.uint8)
    table = tuples.make_table([symbols[: max(4, count // 2)]])
    coded = tuples.encode(symbols, table)
    np.testing.assert_array_equal(tuples.decode(coded, count, table, "here"), symbols)


def test_cost_of_hits_misses_and_the_tail():
    table = np.array([[1, 1, 1, 1]], np.uint8)
    assert tuples.encode(np.array([1, 1, 1, 1], np.uint8), table).tolist() == [1]
    assert tuples.encode(np.array([1, 1, 1, 2, 9], np.uint8), table).tolist() == [65535, 1, 1, 1, 2, 65535, 9]


TABLE = np.array([[1, 2, 3, 4], [9, 9, 9, 9]], np.uint8)


@pytest.mark.parametrize(
    "codes, count, words",
    [
        ([1, 65535], 8, "followed by 4 codes"),
        ([1, 65535, 5, 6, 7], 8, "followed by 4 codes"),
        ([65535, 1, 65535, 5, 6, 7, 8], 8, "followed by 4 codes"),
        ([3], 4, "out of the table"),
        ([0], 4, "out of the table"),
        ([65534], 4, "out of the table"),
        ([65535, 1, 2, 3, 256], 4, "above 255"),
        ([1, 1], 4, "should hold 4 codes"),
        ([1], 8, "should hold 8 codes"),
        ([], 4, "should hold 4 codes"),
        ([1, 2], 5, "should hold 5 codes"),
        ([65535, 1, 1], 5, "should hold 5 codes"),
    ],
)
def test_hostile_codewords_are_refused(codes, count, words):
    with pytest.raises(FormatError, match=words) as error:
        tuples.decode(np.array(codes, np.uint16), count, TABLE, "here")
    one_sentence(error.value)


def test_random_codewords_are_refused_or_have_a_second_reading(rng):
    """Whatever is not refused has as many symbols as were asked for, and they come back from their own code."""
    accepted = 0
    for _ in range(2000):
        odd = rng.random() < 0.3
        codes = rng.choice([1, 2, 65535, *([0, 3, 256, 65534] if odd else [1, 2, 1])], rng.integers(1, 12))
        codes, count = codes.astype(np.uint16), int(rng.integers(1, 20))
        try:
            found = tuples.decode(codes, count, TABLE, "here")
        except FormatError:
            continue
        accepted += 1
        assert len(found) == count
        np.testing.assert_array_equal(tuples.decode(tuples.encode(found, TABLE), count, TABLE, "here"), found)
    assert accepted > 20


@pytest.mark.parametrize(
    "table", [TABLE[:0], TABLE[[0, 0]], TABLE.astype(np.uint16), TABLE[:, :3], np.zeros((65535, 4), np.uint8)]
)
def test_a_table_that_no_coder_made_is_refused(tmp_path, table):
    save_file({tuples.TENSOR: table}, tmp_path / tuples.FILE)
    with pytest.raises(FormatError, match="distinct rows"):
        tuples.read_table(tmp_path)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    (tmp_path / tuples.FILE).write_bytes(b"no tensors")
    with pytest.raises(FormatError, match="should hold tiny_qmoe.tuples"):
        tuples.read_table(tmp_path)


# ---- records


PACKING = (
    affine.Packing("levels", 8, 128, "float16"),
    affine.Packing("levels", 8, 0, "float32"),
    affine.Packing("plain", 16, 0, "bfloat16"),
    affine.Packing("plain", 32, 0, "float32"),
    *(affine.Packing("affine", bits, 64, "bfloat16") for bits in (2, 3, 4, 5, 6, 8)),
    affine.Packing("mxfp4", 4, 32, "uint8"),
)
SHAPES = [(96, 200), (50, 71), *[(64, 128)] * 9]


def random_arrays(rng):
    """Arrays of every kind that a record may hold, with finite values."""
    out = []
    for (rows, columns), own in zip(SHAPES, PACKING, strict=True):
        if own.mode == "levels":
            out.append(levels.quantize(rng.normal(0, 0.02, (rows, columns)).astype(np.float32), own.group_size))
            continue
        arrays = {}
        for name, dtype, shape in own.parts(rows, columns):
            if dtype == "uint32":
                arrays[name] = rng.integers(0, 2**32, shape, np.uint32)
            elif dtype == "uint8":
                arrays[name] = rng.integers(100, 120, shape).astype(np.uint8)
            else:
                wide = rng.normal(0, 0.02, shape).astype(np.float32)
                arrays[name] = (wide.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else wide
        out.append(arrays)
    return out


@pytest.fixture(scope="module")
def made():
    arrays = random_arrays(np.random.default_rng(3))
    table = tuples.make_table([a["weight"].reshape(-1) for a in arrays[:2]])
    return arrays, table, {c: packed.pack(arrays, SHAPES, PACKING, c, table) for c in packed.CODERS}


@pytest.mark.parametrize("coder", packed.CODERS)
def test_a_record_gives_back_every_bit(made, coder):
    arrays, table, records = made
    found = packed.expand(records[coder], SHAPES, PACKING, "here", table)
    for before, after in zip(arrays, found, strict=True):
        packed.check_values(after, "here")
        assert before.keys() == after.arrays.keys()
        for name, array in before.items():
            assert after.arrays[name].dtype == array.dtype
            np.testing.assert_array_equal(after.arrays[name], array)


def test_what_would_grow_is_kept_as_it_is_and_said(made):
    methods = packed.methods(made[2]["rans"])
    kept = [size for method, size in methods if method == packed.RAW]
    assert (packed.RANS in dict(methods)) and kept  # noise in 32 bits does not shrink
    noise = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    grid = {"scales": np.ones((1, 1), np.float32), "zeros": np.zeros((1, 1), np.uint8)}
    record = packed.pack([{"weight": noise, **grid}], [(64, 64)], PACKING[1:2], "tuples", TABLE)
    assert packed.methods(record)[0] == (packed.RAW, 4096)


def test_exponents_shrink_and_mantissas_do_not(rng):
    """A plain bfloat16 matrix: its exponent plane is coded, and comes to its entropy."""
    w = (rng.normal(0, 0.02, (256, 512)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    record = packed.pack([{"weight": w}], [(256, 512)], PACKING[2:3], "rans")
    (high, size), (low, kept) = packed.methods(record)
    exponents = (w >> 7 & 0xFF).astype(np.uint8).reshape(-1)
    assert (high, low, kept) == (packed.RANS, packed.RAW, w.size)
    assert rans.entropy(exponents) * w.size / 8 < size < 1.02 * rans.entropy(exponents) * w.size / 8


def entry(plane, method=None, size=None):
    def change(record):
        words = record[packed.HEADER + packed.ENTRY * plane :][:8].view("<u4")
        words[0], words[1] = words[0] if method is None else method, words[1] if size is None else size
        signed(record)

    return change


def signed(record):
    import xxhash

    count = int(record[12:16].view("<u4")[0])
    text = record[:16].tobytes() + record[24 : packed.HEADER + packed.ENTRY * count].tobytes()
    record[16:24].view("<u8")[0] = xxhash.xxh3_64_intdigest(text)


def at(byte, value, sign=True):
    def change(record):
        record[byte] = value
        if sign:
            signed(record)

    return change


HOSTILE = {
    "magic": (at(0, 0), "header is damaged"),
    "hash": (at(20, 1, False), "header is damaged"),
    "an entry without its hash": (at(packed.HEADER, 7, False), "header is damaged"),
    "version": (at(4, 9), "received version 9"),
    "codec": (at(5, 2), "of codec 2"),
    "used": (at(8, 1), "header is damaged"),
    "used bytes past the record": (at(10, 255), "header is damaged"),
    "a method that there is not": (entry(0, method=3), "method 0 to 2"),
    "raw bytes of another number": (entry(0, method=0, size=64), "should have 19200 bytes"),
    "a payload past the end": (entry(0, size=1 << 30), "should end within"),
    "a payload that ends before": (entry(0, size=64), "here"),
    "tuples of half words": (entry(1, method=1, size=193), "whole codewords"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("coder", packed.CODERS)
def test_hostile_records_are_refused(made, name, coder):
    change, words = HOSTILE[name]
    record = made[2][coder].copy()
    change(record)
    with pytest.raises(FormatError, match=words) as error:
        packed.expand(record, SHAPES, PACKING, "here", made[1])
    one_sentence(error.value)


def test_tuples_without_a_table_are_refused(made):
    assert packed.TUPLES in dict(packed.methods(made[2]["tuples"]))
    with pytest.raises(FormatError, match="the model's table"):
        packed.expand(made[2]["tuples"], SHAPES, PACKING, "here")


def test_damage_anywhere_is_refused_or_gives_arrays_of_the_right_shape(made, rng):
    """Payload bytes have no hash of their own (the file's checksums do): no damage may crash, or read outside."""
    for coder in packed.CODERS:
        for _ in range(60):
            record = made[2][coder].copy()
            record[rng.integers(packed.HEADER, len(record), 3)] = rng.integers(0, 256, 3)
            signed(record)
            try:
                found = packed.expand(record, SHAPES, PACKING, "here", made[1])
            except FormatError:
                continue
            shapes = [m.arrays["weight"].shape for m in found]
            assert shapes == [a["weight"].shape for a in made[0]]


def test_values_that_are_not_finite_are_refused(made):
    arrays = [dict(a) for a in made[0]]
    arrays[0]["scales"] = np.full_like(arrays[0]["scales"], np.inf)
    matrix = affine.Matrix(PACKING[0], arrays[0])
    with pytest.raises(FormatError, match="finite"):
        packed.check_values(matrix, "here")
    arrays[2]["weight"] = np.full_like(arrays[2]["weight"], 0x7FC0)
    with pytest.raises(FormatError, match="finite"):
        packed.check_values(affine.Matrix(PACKING[2], arrays[2]), "here")
