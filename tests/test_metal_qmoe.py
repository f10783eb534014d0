"""Products straight from qmoe records: every instance of the kernel, in the emulator, against float64."""

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest
import qmoe_records
from metal_cases import TOLERANCE, assert_close, float64, tokens
from qmoe_records import CODINGS, name_of, random_record

from tiny_qmoe_mlx import metal, metal_qmoe, models, ops, qmoe_product
from tiny_qmoe_mlx.codecs import qmoe
from tiny_qmoe_mlx.expert_kind import ExpertKind

pytestmark = metal_cpu.required
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
DICTIONARY, EIGHT, TWELVE, SIXTEEN, FOUR = CODINGS[:5]
PICKS = {1: (1, 3), 5: (5, 2)}


class Case:
    """A layer of random experts in a pool, and what they are in float64."""

    def __init__(self, rng, coding, shapes, experts=4, bias=False, zeros=0.8, base=0):
        self.coding, self.shapes, self.bias = coding, shapes, bias
        records = [random_record(rng, coding, shapes, bias, zeros, more=0) for _ in range(experts)]
        size = max(map(len, records))
        self.records = [np.pad(r, (0, size - len(r))) for r in records]
        slots = rng.permutation(experts)
        self.pool = np.zeros(base + size * experts, np.uint8)
        for record, slot in zip(self.records, slots, strict=True):
            self.pool[base + slot * size : base + (slot + 1) * size] = record
        self.table, self.base = (slots * (size // 128)).astype(np.uint32), base

    def layer(self, matrix):
        return metal_qmoe.Shapes(self.coding, self.shapes[matrix], self.bias)

    def run(self, x, ids, matrix, **options):
        """The kernel's product of picks, (picks, rows), and the emulator's report."""
        count = len(ids)

        def traced(pool, table, x, ids):
            records = metal.Records(pool, table, self.base)
            return metal_qmoe.gather_qmv(x, ids, records, self.layer(matrix), matrix, count)

        return metal_cpu.emulate(traced, self.pool, mx.array(self.table), x, mx.array(ids.reshape(-1)), **options)

    def dense(self, ids, matrix, dtype, mode="check", **options):
        """One matrix of listed experts, their biases, and the emulator's report."""

        def traced(pool, table, ids):
            records = metal.Records(pool, table, self.base)
            return list(metal_qmoe.dequantize(ids, records, self.layer(matrix), matrix, dtype))

        arrays = self.pool, mx.array(self.table), mx.array(ids)
        (w, bias), report = metal_cpu.emulate(traced, *arrays, mode=mode, **options)
        return w, bias, report

    def product(self, expert, matrix, x):
        record = self.records[expert]
        w = qmoe_records.decode(record, matrix, self.coding, self.bias)
        y = w @ x.astype(np.float64)
        if self.bias:
            y += qmoe.parse(record, self.shapes, True, self.coding, "here")[matrix].bias
        return y


def check(case, rng, ids, dtype, matrix=0, mode="check", **options):
    x = tokens(rng, len(ids), case.shapes[matrix][1], dtype)
    y, report = case.run(x, ids, matrix, mode=mode, **options)
    assert not report.problems, report
    k = ids.shape[1]
    want = np.stack([case.product(int(e), matrix, float64(x)[p // k]) for p, e in enumerate(ids.reshape(-1))])
    assert_close(y, want, TOLERANCE[dtype])


def clear():
    """Kernels that were built inside the emulator stay there, and others outside."""
    metal_qmoe._kernel.cache_clear()
    metal_qmoe._dense_kernel.cache_clear()


def instances():
    """All codings in float32, all types with the dictionary; the slow tests take all pairs."""
    for coding in CODINGS:
        for dtype in DTYPES:
            fast = coding in (DICTIONARY, TWELVE, FOUR) and (dtype == mx.float32 or coding is DICTIONARY)
            yield pytest.param(coding, dtype, marks=[] if fast else [pytest.mark.slow], id=f"{name_of(coding)}-{dtype}")


@pytest.mark.parametrize("coding, dtype", list(instances()))
@pytest.mark.parametrize("count", [1, 5])
def test_every_instance(rng, coding, dtype, count):
    case = Case(rng, coding, [(19, 150), (150, 19)], bias=count == 5)
    ids = rng.integers(0, 4, PICKS[count]).astype(np.uint32)
    for matrix in (0, 1):
        check(case, rng, ids, dtype, matrix)


@pytest.mark.parametrize("coding, dtype", list(instances()))
def test_every_instance_of_dequantize(rng, coding, dtype):
    """Both matrices of listed experts, biases on one of the types; values are bfloat16, so float16 rounds them."""
    case = Case(rng, coding, [(19, 150), (150, 19)], bias=dtype == mx.float16)
    ids = np.array([2, 0, 2], np.uint32)
    for matrix in (0, 1):
        w, bias, report = case.dense(ids, matrix, dtype)
        assert not report.problems, report
        want = np.stack([qmoe_records.decode(case.records[e], matrix, coding, case.bias) for e in ids])
        np.testing.assert_array_equal(float64(w), float64(mx.array(want.astype(np.float32)).astype(dtype)))
        biases = [qmoe.parse(case.records[e], case.shapes, case.bias, coding, "here")[matrix].bias for e in ids]
        np.testing.assert_array_equal(np.array(bias), np.stack(biases) if case.bias else np.zeros_like(np.array(bias)))


@pytest.mark.parametrize("seed", [1, 2])
def test_dense_rows_of_many_codewords_in_any_order_of_lanes(rng, seed):
    case = Case(rng, TWELVE, [(9, 700)], zeros=0.3)
    w, _, report = case.dense(np.array([1, 3], np.uint32), 0, mx.float32, seed=seed)
    assert not report.problems, report
    want = np.stack([qmoe_records.decode(case.records[e], 0, TWELVE, False) for e in (1, 3)])
    np.testing.assert_array_equal(np.array(w), want.astype(np.float32))


@pytest.mark.parametrize("coding", [DICTIONARY, TWELVE, EIGHT], ids=name_of)
def test_dense_rows_whose_codewords_end_too_early_end_in_zeros(rng, coding):
    """No codewords at all, and places of rows that run backwards or past the end: everything is written, nothing but
    the row.
    """
    case = Case(rng, coding, [(19, 150)], experts=2, zeros=0.2)
    start = int(case.table[0]) * 128
    section = case.pool[start : start + int(case.pool[start + 8 : start + 12].view("<u4")[0])]
    places = section[144 : 144 + 4 * 20].view("<u4")
    first = qmoe_records.decode(case.records[0], 0, coding, False)[0]
    places[2:] = places[1]
    w, _, report = case.dense(np.array([0], np.uint32), 0, mx.float32)
    assert not report.problems, report
    np.testing.assert_array_equal(np.array(w[0, 0]), first.astype(np.float32))
    assert not np.array(w[0, 1:]).any()
    places[:] = rng.integers(0, 2**32, 20)
    assert not case.dense(np.array([0], np.uint32), 0, mx.float32)[2].problems


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("coding", [DICTIONARY, TWELVE], ids=name_of)
def test_few_zeros_and_many(rng, zeros, coding):
    """More than 32 codewords a row, and one codeword for all of it."""
    check(Case(rng, coding, [(9, 400)], zeros=zeros), rng, np.array([[1, 3]], np.uint32), mx.float32)


@pytest.mark.parametrize("seed", [1, 2])
def test_lanes_and_simdgroups_in_any_order(rng, seed):
    check(Case(rng, DICTIONARY, [(19, 150)]), rng, rng.integers(0, 4, (2, 3)).astype(np.int32), mx.float32, seed=seed)


@pytest.mark.parametrize("experts", [3, 9])
def test_address_spaces(rng, experts):
    case = Case(rng, EIGHT, [(4, 6)], experts)
    for dtype in DTYPES:
        for count in (1, 8):
            x, ids = tokens(rng, count, 6, dtype), np.zeros((count, 1), np.uint32)
            _, report = case.run(x, ids, 0, mode="as")
            assert not report.problems, report
        assert not case.dense(np.zeros(experts, np.uint32), 0, dtype, mode="as")[2].problems


def test_rows_without_negative_weights(rng):
    """The smallest value of a row may be 0 (published: wrong there)."""
    symbols = 2 * (rng.random((8, 90)) < 0.3).astype(np.uint8)
    values = qmoe_records.random_values(rng, 8, 3)
    values[:, 0] = 0
    case = Case(rng, DICTIONARY, [(8, 90)], experts=1)
    case.records = [qmoe.pack([qmoe.encode(symbols, values, DICTIONARY)], DICTIONARY)]
    case.pool = case.records[0]
    check(case, rng, np.array([[0]], np.uint32), mx.float32)


def test_picks_of_one_expert_share_a_decoding(rng):
    case = Case(rng, DICTIONARY, [(16, 600)])
    check(case, rng, np.full((8, 1), 2, np.uint32), mx.float32)
    check(case, rng, np.full((4, 5), 2, np.uint32), mx.float32)
    x = tokens(rng, 8, 600, mx.float32)
    _, report = case.run(x, np.full((8, 1), 2, np.uint32), 0, mode="profile")
    used = int(case.records[2][8:12].view("<u4")[0])
    assert report.profile.buffers["pool"].fetched < 1.5 * used + 8 * 16 * 128


def test_records_begin_at_a_base(rng):
    check(Case(rng, TWELVE, [(9, 64)], base=4096 - 128), rng, np.array([[2, 0]], np.uint32), mx.float32)


def test_an_expert_beyond_the_table_stays_inside_the_pool(rng):
    case = Case(rng, EIGHT, [(9, 64)])
    _, report = case.run(tokens(rng, 1, 64, mx.float32), np.array([[4, 2**32 - 1]], np.uint32), 0, mode="check")
    assert not report.problems, report


@pytest.mark.parametrize("coding", [DICTIONARY, TWELVE, EIGHT], ids=name_of)
@pytest.mark.parametrize("part", ["places", "codewords", "none", "all"])
def test_whatever_lies_in_a_record_nothing_outside_is_read(rng, coding, part):
    """Places of rows that run backwards or past the end, codewords of noise or such as there are none, no such table:
    all but the header may be anything.
    """
    case = Case(rng, coding, [(19, 150)], experts=2, bias=part == "all", zeros=0.2)
    codes = 128 + qmoe.side_bytes(19, coding, case.bias)
    for start in np.sort(case.table.astype(int) * 128):
        stop = start + int(case.pool[start + 8 : start + 12].view("<u4")[0])
        section = case.pool[start:stop]
        if part == "places":
            section[144 : 144 + 4 * 20].view("<u4")[:] = rng.integers(0, 500, 20)
        elif part == "all":
            section[128:] = rng.integers(0, 256, stop - start - 128, np.uint8)
        else:
            section[132:136].view("<u4")[0] = 2**32 - 1
            section[codes:] = 255 if part == "none" else rng.integers(0, 256, stop - start - codes, np.uint8)
    case.pool = case.pool[:stop]  # the last record ends where the buffer does
    x, ids = tokens(rng, 2, 150, mx.float32), np.array([[0], [1]], np.uint32)
    _, report = case.run(x, ids, 0, mode="check")
    assert not report.problems, report


def test_a_whole_expert_for_any_number_of_tokens(rng, monkeypatch):
    """The launches of a layer, each run in the emulator, for more tokens than one of them takes."""
    monkeypatch.setattr(metal, "MAX_TOKENS", 4)
    case = Case(rng, DICTIONARY, [(24, 40), (24, 40), (40, 24)], bias=True)

    def activation(up, gate):
        return gate * mx.sigmoid(gate) * up

    names = ("gate_proj", "up_proj", "down_proj")
    kind = ExpertKind(
        tuple((n, *s) for n, s in zip(names, case.shapes, strict=True)), True, 0, 0, 0, activation, (), DICTIONARY
    )
    x, ids = tokens(rng, 10, 40, mx.float32), rng.integers(0, 4, (10, 2)).astype(np.uint32)
    clear()
    with metal_cpu.emulated_kernels("run") as report:
        records = metal.Records(mx.array(case.pool), mx.array(case.table), 0)
        y = qmoe_product.gather(x, mx.array(ids), records, kind)
        order = np.argsort(ids.reshape(-1), kind="stable")
        of, rows, dispatch = ids.reshape(-1)[order], order // 2, ops.Dispatch()
        many = ops.gpu_many(x, np.unique(of), of, rows, records, kind, dispatch)
        mx.eval(y, many)
    clear()
    assert not report.problems and dispatch.counts == {f"qmoe prefill {ops.gpu_name()}": 1}, report
    want = np.empty((10, 2, 40))
    for t in range(10):
        for i, e in enumerate(ids[t]):
            gate, up = (case.product(int(e), m, float64(x)[t]) for m in (0, 1))
            want[t, i] = case.product(int(e), 2, gate / (1 + np.exp(-gate)) * up)
    assert_close(y, want, TOLERANCE[mx.float32])
    assert_close(many, want.reshape(20, 40)[order], TOLERANCE[mx.float32])
    assert ops.gpu_from_records(8, 2, 4, kind) and not ops.gpu_from_records(65, 2, 4, kind)
    assert ops.gpu_group_size(kind) == ops.GPU_DENSE_BYTES // (2 * 24 * 40)


@pytest.fixture
def on_gpu(monkeypatch):
    """What runs where there is a GPU, its kernels in the emulator."""
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    clear()
    with metal_cpu.emulated_kernels("run") as report:
        yield report
    clear()


def test_a_gpu_that_computes_rightly_is_accepted_and_others_are_not(on_gpu, monkeypatch):
    models.check_gpu(0, DICTIONARY)
    wrong = metal_qmoe.tables(EIGHT)
    monkeypatch.setattr(metal_qmoe, "tables", lambda coding: wrong)
    with pytest.raises(ValueError, match=r"\[gpu\] experts should come within"):
        models.check_gpu(0, TWELVE)
    assert not on_gpu.problems, on_gpu


def test_the_number_of_tokens_is_checked(rng):
    case = Case(rng, EIGHT, [(9, 64)])
    records = metal.Records(mx.array(case.pool), mx.array(case.table))
    with pytest.raises(ValueError, match=f"1 to {metal.MAX_TOKENS} tokens but 65 were given"):
        metal_qmoe.gather_qmv(mx.zeros((1, 64)), mx.zeros((1,), mx.uint32), records, case.layer(0), 0, 65)
