"""Products straight from records: each instance of the two kernels that the package can launch, in the emulator."""

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest
from metal_cases import TOLERANCE, assert_close, make_case

from tiny_qmoe_mlx import metal
from tiny_qmoe_mlx.codecs import trellis

pytestmark = metal_cpu.required
DTYPES = (mx.float16, mx.bfloat16, mx.float32)

PICKS = {1: (1, 3), 2: (2, 3), 5: (5, 2), 8: (8, 8)}  # tokens -> shape of the router's indices


def instances(kinds, first):
    """Pairs of a kind and a length; the fast tests take all kinds at L 16, and the first at L 12."""
    pairs = [(kind, length) for kind in kinds for length in trellis.LENGTHS]
    slow = [p for p in pairs if p[1] != 16 and p != (first, 12)]
    return [pytest.param(*p, marks=[pytest.mark.slow] if p in slow else []) for p in pairs]


def check_qmv(case, ids, z, matrix, dtype, mode="check", **options):
    """gather_qmv of the picks against the reference; z has a row for each token or each pick."""
    count, shared = len(ids), ids.size // len(z)
    ids_array = mx.array(ids.reshape(-1))

    def fn(records):
        return lambda z, ids: metal.gather_qmv(z, ids, records, case.layer, matrix, count, dtype)

    y, report = case.run(metal_cpu.emulate, fn, mx.array(z), ids_array, mode=mode, **options)
    assert not report.problems, report
    want = np.stack([case.product(int(e), matrix, z[p // shared]) for p, e in enumerate(ids.reshape(-1))])
    assert_close(y, want, TOLERANCE[dtype])


def check_gate_up(case, ids, z, mode="check", **options):
    count, shared = len(ids), ids.size // len(z)

    def fn(records):
        return lambda z, ids: metal.gather_gate_up(z, ids, records, case.layer, count)

    y, report = case.run(metal_cpu.emulate, fn, mx.array(z), mx.array(ids.reshape(-1)), mode=mode, **options)
    assert not report.problems, report
    want = np.stack([case.hidden(int(e), z[p // shared]) for p, e in enumerate(ids.reshape(-1))])
    assert_close(y, want, TOLERANCE[mx.float32])


def rows(rng, count, columns):
    return rng.normal(size=(count, columns)).astype(np.float32)


@pytest.mark.parametrize("dtype, length", instances(DTYPES, mx.float16), ids=str)
@pytest.mark.parametrize("count", [1, 5])
def test_every_instance_of_qmv_at_every_rate(rng, dtype, length, count):
    case = make_case(rng, d=70, middle=520, experts=9, length=length, rates=range(8), bias=count == 5)
    ids = rng.integers(0, 9, PICKS[count]).astype(np.uint32)
    check_qmv(case, ids, rows(rng, ids.size, 576), 2, dtype)


@pytest.mark.parametrize("name, length", instances(metal.ACTIVATIONS, "silu"))
@pytest.mark.parametrize("count", [1, 2])
def test_every_instance_of_gate_up_at_every_rate(rng, name, length, count):
    case = make_case(rng, d=520, middle=40, experts=9, name=name, length=length, rates=range(8), bias=count == 2)
    ids = rng.integers(0, 9, PICKS[count]).astype(np.int32)
    check_gate_up(case, ids, 8 * rows(rng, count, 576))  # far enough out for the clamps


@pytest.mark.parametrize("rate", range(8))
def test_one_rate_in_all_blocks(rng, rate):
    case = make_case(rng, d=128, middle=32, experts=2, length=16, rates=[rate], bias=rate == 0)
    check_qmv(case, np.array([[1]], np.uint32), rows(rng, 1, 128), 0, mx.float32)


def test_rule_for_records_or_dense_matrices():
    assert metal.takes_records(8, 128) and metal.takes_records(64 * 8, 128) and metal.takes_records(12, 1)
    assert not metal.takes_records(2048 * 8, 128) and not metal.takes_records(13, 1)


@pytest.mark.parametrize("seed", [1, 2])
def test_lanes_and_simdgroups_in_any_order(rng, seed):
    case = make_case(rng, d=520, middle=40, experts=9, rates=range(8))
    ids = rng.integers(0, 9, PICKS[2]).astype(np.uint32)
    check_gate_up(case, ids, rows(rng, 2, 576), seed=seed)


def test_one_token_top_one_with_inputs_in_constant_space(rng):
    case = make_case(rng, d=64, middle=32, experts=3)
    assert case.table.size < 8
    fn = lambda records: lambda z, ids: metal.gather_gate_up(z, ids, records, case.layer, 1)  # noqa: E731
    z = rows(rng, 1, 64)
    for mode in ("as", "check"):
        y, report = case.run(metal_cpu.emulate, fn, mx.array(z), mx.array([2], dtype=mx.uint32), mode=mode)
        assert not report.problems, report
    assert_close(y, case.hidden(2, z[0])[None], TOLERANCE[mx.float32])


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("experts", [3, 9])
def test_address_spaces_of_short_and_long_inputs(rng, count, experts):
    case = make_case(rng, d=64, middle=32, experts=experts)
    ids = mx.zeros((count * 2,), mx.uint32)
    qmv = lambda r: lambda z, ids: metal.gather_qmv(z, ids, r, case.layer, 0, count, mx.bfloat16)  # noqa: E731
    gate_up = lambda r: lambda z, ids: metal.gather_gate_up(z, ids, r, case.layer, count)  # noqa: E731
    for fn in (qmv, gate_up):
        _, report = case.run(metal_cpu.emulate, fn, mx.zeros((count, 64)), ids, mode="as")
        assert not report.problems, report


def test_eight_tokens_that_all_pick_one_expert(rng):
    case = make_case(rng, d=128, middle=40, experts=9)
    check_gate_up(case, np.full((8, 1), 4, np.uint32), rows(rng, 8, 128))


def test_more_picks_of_an_expert_than_one_group_takes(rng):
    """A router does not choose an expert twice for a token, but nothing breaks if it does."""
    case = make_case(rng, d=128, middle=40, experts=9)
    check_gate_up(case, np.full((8, 5), 4, np.uint32), rows(rng, 8, 128))


def test_shared_experts_are_decoded_once(rng):
    """The pool is read about once for 8 picks of one expert, not 8 times."""
    case = make_case(rng, d=512, middle=64, experts=9, rates=[4])
    fn = lambda r: lambda z, ids: metal.gather_qmv(z, ids, r, case.layer, 0, 8, mx.float32)  # noqa: E731
    ids = mx.full((8,), 3, mx.uint32)
    _, report = case.run(metal_cpu.emulate, fn, mx.array(rows(rng, 8, 512)), ids, mode="profile")
    payload = case.records[3].matrices[0].payload.nbytes
    assert payload <= report.profile.buffers["pool"].fetched < 1.5 * payload


@pytest.mark.parametrize("columns", [2048 + 64, 64 * 70 - 5])
def test_more_than_one_group_of_32_blocks(rng, columns):
    case = make_case(rng, d=columns, middle=33, experts=2, rates=[3, 0, 1, 7, 4], length=12)
    ids = np.array([[1, 0]], np.uint32)
    check_qmv(case, ids, rows(rng, 1, case.layer.sign_in.size), 0, mx.float32)


def test_order_of_two_bytes_above_256_blocks(rng):
    case = make_case(rng, d=64 * 257, middle=3, experts=1, rates=[1, 0, 0, 2, 0, 0, 0], length=12)
    check_qmv(case, np.array([[0]], np.uint32), rows(rng, 1, 64 * 257), 0, mx.float32)


@pytest.mark.parametrize("gains", [(False,) * 3, (True, False, False), (False, True, False), (False, False, True)])
def test_row_gains_of_some_matrices(rng, gains):
    case = make_case(rng, d=192, middle=33, experts=2, row_gain=gains, bias=True)
    for matrix in range(3):
        z = rows(rng, 1, 64 if matrix == 2 else 192)
        check_qmv(case, np.array([[1]], np.uint32), z, matrix, mx.float32)


def test_absent_blocks_at_the_end_of_the_pool(rng):
    """The order and rates of 6 blocks end 7 bytes before the buffer: lanes beyond them must not read."""
    case = make_case(rng, d=32, middle=384, experts=1, rates=[0])
    assert trellis.side_bytes(32, 384, True, False) == 128
    check_qmv(case, np.array([[0]], np.uint32), rows(rng, 1, 384), 2, mx.float32)


def test_records_begin_at_a_base(rng):
    case = make_case(rng, d=128, middle=33, experts=3, base=4096 - 128)
    check_gate_up(case, np.array([[2, 0]], np.uint32), rows(rng, 1, 128))


def test_expert_beyond_the_table_stays_inside_the_pool(rng):
    """The router cannot give one; a kernel never reads outside its buffers whatever the indices are."""
    case = make_case(rng, d=64, middle=32, experts=3)
    fn = lambda r: lambda z, ids: metal.gather_qmv(z, ids, r, case.layer, 0, 1, mx.float32)  # noqa: E731
    ids = mx.array([3, 2**32 - 1], dtype=mx.uint32)
    y, report = case.run(metal_cpu.emulate, fn, mx.zeros((1, 64)), ids, mode="check")
    assert not report.problems, report


def test_record_beyond_4_gib(rng, tmp_path):
    case = make_case(rng, d=64, middle=32, experts=1, length=12)
    record = case.pool
    at = (1 << 32) + 128 * 77
    shape = (5 << 10, 1 << 20)  # an MLX dimension is an int32
    pool = np.memmap(tmp_path / "pool", np.uint8, "w+", shape=shape)
    pool.reshape(-1)[at : at + record.size] = record
    case.pool, case.table = pool, np.array([0, at // 128], np.uint32)
    case.records = case.records * 2
    check_qmv(case, np.array([[1]], np.uint32), rows(rng, 1, 64), 0, mx.float32)


@pytest.mark.parametrize("count", [0, 300])
def test_number_of_tokens_is_checked(rng, count):
    case = make_case(rng, d=64, middle=32, experts=1)
    records = metal.Records(mx.array(case.pool), mx.array(case.table))
    with pytest.raises(ValueError, match=rf"1 to {metal.MAX_TOKENS} tokens but {count} were given"):
        metal.gather_qmv(mx.zeros((1, 64)), mx.zeros((1,), mx.uint32), records, case.layer, 0, count, mx.float32)
