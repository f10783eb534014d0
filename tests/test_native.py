"""The C++ library against the numpy specification and float64 products, with records of strangers too."""

import ctypes
import mmap
import subprocess
import sys
import threading

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from records import pool_of, random_record, record_size

from tiny_qmoe_mlx import native
from tiny_qmoe_mlx.codecs import rotation, trellis
from tiny_qmoe_mlx.errors import FormatError

pytestmark = pytest.mark.skipif(not native.available(), reason="the C++ library is not built")
ISAS = native.supported_isas() if native.available() else []


@pytest.fixture(autouse=True)
def best_settings():
    """Each test begins, and leaves the library, with the machine's best instruction set and two threads."""
    native.use_isa(ISAS[0])
    native.set_threads(2)
    yield
    native.use_isa(ISAS[0])
    native.set_threads(2)


@pytest.fixture(params=ISAS)
def isa(request) -> str:
    native.use_isa(request.param)
    return request.param


def shapes_of(record: trellis.Record) -> list[tuple[int, int]]:
    return [(m.rows, m.columns) for m in record.matrices]


# ---- decoding


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 130),
    columns=st.integers(1, 300),
    length=st.sampled_from(trellis.LENGTHS),
    row_gain=st.booleans(),
    bias=st.booleans(),
)
def test_dequantize_equals_the_specification_to_the_bit(seed, rows, columns, length, row_gain, bias):
    rng = np.random.default_rng(seed)
    record = random_record(rng, [(3, 70), (rows, columns)], bias, length, row_gain=row_gain)
    data, _ = pool_of([record])
    want = trellis.decode_matrix(record.matrices[1], length)
    start = int(rng.integers(0, len(want)))
    stop = int(rng.integers(start + 1, len(want) + 1))
    for name in ISAS:
        native.use_isa(name)
        got = native.dequantize(data, 1, start, stop)
        np.testing.assert_array_equal(got.view(np.uint32), want[start:stop].view(np.uint32))


@pytest.mark.parametrize("length", trellis.LENGTHS)
def test_dequantize_every_rate(rng, isa, length):
    record = random_record(rng, [(64, 512)], length=length, rates=range(8))
    data, _ = pool_of([record])
    np.testing.assert_array_equal(native.dequantize(data, 0, 0, 64), trellis.decode_matrix(record.matrices[0], length))


def test_dequantize_fills_a_given_array_with_one_and_many_threads(rng):
    record = random_record(rng, [(500, 200)])
    data, _ = pool_of([record])
    want = trellis.decode_matrix(record.matrices[0], 12)
    for count in (1, 2, 5):
        native.set_threads(count)
        out = np.full_like(want, np.nan)
        assert native.dequantize(data, 0, 0, len(want), out) is out
        np.testing.assert_array_equal(out, want)


def test_more_than_256_blocks_have_a_two_byte_order(rng, isa):
    record = random_record(rng, [(32, 64 * 257)], rates=rng.integers(0, 2, 257))
    data, _ = pool_of([record])
    assert native.check_record(data, shapes_of(record), False)
    np.testing.assert_array_equal(native.dequantize(data, 0, 0, 32), trellis.decode_matrix(record.matrices[0], 12))


# ---- products


def expected_product(record: trellis.Record, index: int, z: np.ndarray) -> np.ndarray:
    """float64 of one matrix times a rotated token, plus bias."""
    matrix = record.matrices[index]
    y = trellis.decode_matrix(matrix, record.length).astype(np.float64) @ z
    return (y if matrix.bias is None else y + matrix.bias.astype(np.float64))[: matrix.rows]


def assert_near(got: np.ndarray, want: np.ndarray) -> None:
    # Sums of up to 2048 float32 products; the largest error seen is 2e-6 of the largest result.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("length", trellis.LENGTHS)
@pytest.mark.parametrize(
    ("rows", "columns", "bias"), [(64, 512, False), (1, 1, True), (97, 200, True), (33, 2048, False)]
)
def test_gather_qmv(rng, isa, threads, length, rows, columns, bias):
    native.set_threads(threads)
    records = [random_record(rng, [(5, 64), (rows, columns)], bias, length, row_gain=bool(i % 2)) for i in range(3)]
    pool, size = pool_of(records)
    x = rng.standard_normal((4, columns)).astype(np.float32)
    sign = rotation.signs(1, 0, 0, columns)
    # Experts with one pick, with several, with the same pick twice, and with more picks than share one decoding.
    expert = np.array([2, 0, 1, 0, 0] + [1] * 11)
    rows_of = np.array([0, 1, 2, 3, 3, *rng.integers(0, 4, 11)], np.int32)
    got = native.gather_qmv(pool, expert * size, 1, x, rows_of, sign)
    z = rotation.rotate(x.astype(np.float64), sign)
    assert_near(got, np.stack([expected_product(records[e], 1, z[r]) for e, r in zip(expert, rows_of, strict=True)]))


@pytest.mark.parametrize("tokens", range(1, 9))
def test_gather_qmv_of_each_number_of_tokens_and_rate(rng, isa, tokens):
    record = random_record(rng, [(32, 512)], length=16, rates=range(8))
    pool, _ = pool_of([record])
    x = rng.standard_normal((tokens, 512)).astype(np.float32)
    sign = rotation.signs(0, 3, 0, 512)
    got = native.gather_qmv(pool, np.zeros(tokens, np.int64), 0, x, np.arange(tokens, dtype=np.int32), sign)
    z = rotation.rotate(x.astype(np.float64), sign)
    assert_near(got, np.stack([expected_product(record, 0, row) for row in z]))


def sigmoid(v: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-v))


def gelu_tanh(v: np.ndarray) -> np.ndarray:
    return 0.5 * v * (1 + np.tanh((2 / np.pi) ** 0.5 * (v + 0.044715 * v**3)))


def swiglu_oai(gate: np.ndarray, up: np.ndarray, alpha: float = 1.3, limit: float = 2.5) -> np.ndarray:
    gate = np.minimum(gate, limit)
    return gate * sigmoid(alpha * gate) * (np.clip(up, -limit, limit) + 1)


ACTIVATIONS = {
    native.SILU: lambda gate, up: gate * sigmoid(gate) * up,
    native.GELU_TANH: lambda gate, up: gelu_tanh(gate) * up,
    native.SWIGLU_OAI: swiglu_oai,
    native.RELU2: lambda gate, _: np.maximum(gate, 0) ** 2,
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
@pytest.mark.parametrize(("hidden", "middle", "bias"), [(128, 64, False), (200, 97, True), (64, 1, False)])
def test_gather_moe(rng, isa, threads, activation, hidden, middle, bias):
    native.set_threads(threads)
    count = 2 if activation == native.RELU2 else 3
    shapes = [(middle, hidden)] * (count - 1) + [(hidden, middle)]
    records = [random_record(rng, shapes, bias) for _ in range(40)]  # more than one batch of groups
    for record in records:
        for matrix in record.matrices:
            matrix.block_gain *= np.float16(0.1)  # so that the activations see both of their ends
    pool, size = pool_of(records)
    x = rng.standard_normal((3, hidden)).astype(np.float32)
    sides = [rotation.signs(5, 1, 0, hidden), rotation.signs(5, 1, 1, middle)]
    expert, rows_of = rng.integers(0, 40, 70), rng.integers(0, 3, 70).astype(np.int32)
    out = np.full((70, hidden), np.nan, np.float32)
    got = native.gather_moe(pool, expert * size, x, rows_of, *sides, activation, alpha=1.3, limit=2.5, out=out)
    assert got is out
    z, want = rotation.rotate(x.astype(np.float64), sides[0]), []
    for e, row in zip(expert, rows_of, strict=True):
        gate, up = expected_product(records[e], 0, z[row]), expected_product(records[e], count - 2, z[row])
        middle_z = rotation.rotate(ACTIVATIONS[activation](gate, up), sides[1])
        want.append(expected_product(records[e], count - 1, middle_z))
    assert_near(got, np.stack(want))


def test_no_picks_give_an_empty_result():
    x, none = np.zeros((1, 64), np.float32), np.zeros(0, np.int64)
    sign = rotation.signs(0, 0, 0, 64)
    args = (np.zeros(256, np.uint8), none)
    assert native.gather_qmv(*args, 0, x, none.astype(np.int32), sign).shape[0] == 0
    assert native.gather_moe(*args, x, none.astype(np.int32), sign, sign, native.SILU).shape[0] == 0


def test_python_threads_may_call_at_once_while_the_pool_changes(rng):
    pool, _ = pool_of([random_record(rng, [(320, 256)])])
    x, sign = rng.standard_normal((1, 256)).astype(np.float32), rotation.signs(0, 0, 0, 256)
    arguments = (pool, np.zeros(1, np.int64), 0, x, np.zeros(1, np.int32), sign)
    want = native.gather_qmv(*arguments)
    wrong = []

    def work(number: int) -> None:
        for i in range(50):
            if number == 0:
                native.set_threads(1 + i % 4)
            if not np.array_equal(native.gather_qmv(*arguments), want):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


FORK = """
import os, numpy as np
from tiny_qmoe_mlx import native
native.set_threads(3)
x = np.ones((9, 32, 16), np.float32)
native.encode_tiles(x, 1, 12)
child = os.fork()
codes = native.encode_tiles(x, 1, 12)[0]
if child:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="no fork")
def test_a_forked_child_has_a_pool_of_its_own():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], timeout=60, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


# ---- records of strangers


def rehash(data: np.ndarray) -> None:
    data[56:64].view("<u8")[0] = xxhash.xxh3_64_intdigest(data[:56].tobytes())


def parse_accepts(data: np.ndarray, shapes: list[tuple[int, int]], bias: bool) -> bool:
    try:
        trellis.parse(data, shapes, bias, "test")
    except FormatError:
        return False
    return True


def mutate(rng: np.random.Generator, data: np.ndarray) -> np.ndarray:
    """Damage, by chance and on purpose: single bits, wild words, cut ends; mostly with a right hash."""
    data = data.copy()
    for _ in range(rng.integers(0, 3)):
        place = int(rng.integers(0, 56 if rng.random() < 0.6 else min(len(data), 600)))
        if rng.random() < 0.5:
            data[place] ^= 1 << rng.integers(0, 8)
        else:
            word = data[place // 4 * 4 :][:4].view("<u4")
            word[0] = rng.choice([0, 1, 2, 128, 2**31, 2**32 - 1, rng.integers(0, 2**32)])
    if rng.random() < 0.2:
        data = data[: rng.integers(0, len(data))].copy()
    if len(data) >= 64 and rng.random() < 0.8:
        rehash(data)
    return data


def test_check_record_has_the_verdict_of_parse_on_damaged_records(rng):
    accepted = 0
    for trial in range(4000):
        bias = bool(trial % 2)
        shapes = [(33, 64 * int(rng.integers(1, 4)))] * int(rng.integers(1, 4))
        if trial % 20 == 0 or not trial:
            record = random_record(rng, shapes, bias, row_gain=bool(rng.integers(2)))
            base, base_shapes, base_bias = trellis.pack(record, record_size(record, 256)), shapes, bias
        data = mutate(rng, base)
        found = native.check_record(data, base_shapes, base_bias)
        assert found == parse_accepts(data, base_shapes, base_bias), data[:64].tobytes().hex()
        accepted += found
    assert 400 < accepted < 3600  # the trial means something only if both verdicts occur


def test_check_record_refuses_what_the_config_does_not_ask_for(rng):
    record = random_record(rng, [(32, 64), (32, 64), (64, 32)])
    data, _ = pool_of([record])
    assert native.check_record(data, shapes_of(record), False)
    assert not native.check_record(data, shapes_of(record), True)
    assert not native.check_record(data, shapes_of(record)[:2], False)
    assert not native.check_record(data, [(32, 64), (32, 64), (64, 33)], False)


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00])  # Inf, -Inf, NaN
def test_check_record_refuses_gains_that_are_not_finite(rng, bits):
    record = random_record(rng, [(32, 64)], bias=True)
    for values in (record.matrices[0].row_gain, record.matrices[0].bias, record.matrices[0].block_gain):
        values.view(np.uint16)[-1], kept = bits, values[-1]
        data, _ = pool_of([record])
        assert not native.check_record(data, [(32, 64)], True)
        values[-1] = kept


@pytest.fixture
def guarded_copy():
    """Copies of an array that end where unreadable memory begins: reading one byte too far ends the process."""
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    kept = []

    def copy(data: np.ndarray) -> np.ndarray:
        page = mmap.PAGESIZE
        pages = -(-len(data) // page)
        area = np.frombuffer(mmap.mmap(-1, (pages + 1) * page), np.uint8)
        assert libc.mprotect(area.ctypes.data + pages * page, page, 0) == 0
        out = area[pages * page - len(data) : pages * page]
        out[:] = data
        kept.append(area)
        return out

    yield copy
    for area in kept:
        libc.mprotect(area.ctypes.data, area.size, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
@pytest.mark.parametrize("rate", range(8))
def test_no_byte_past_the_record_is_read(rng, isa, guarded_copy, rate):
    record = random_record(rng, [(64, 128)], length=16, rates=[7, rate])
    data = guarded_copy(pool_of([record])[0])
    assert native.check_record(data, [(64, 128)], False)
    np.testing.assert_array_equal(native.dequantize(data, 0, 0, 64), trellis.decode_matrix(record.matrices[0], 16))
    x, sign = rng.standard_normal((1, 128)).astype(np.float32), rotation.signs(0, 0, 0, 128)
    assert np.isfinite(native.gather_qmv(data, np.zeros(1, np.int64), 0, x, np.zeros(1, np.int32), sign)).all()


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
def test_kernels_stay_inside_records_that_nobody_checked(rng, guarded_copy):
    shapes = [(64, 128), (64, 128), (128, 64)]
    base, _ = pool_of([random_record(rng, shapes, bias=True)])
    x, zero = rng.standard_normal((1, 128)).astype(np.float32), np.zeros(1, np.int64)
    signs = [rotation.signs(0, 0, 0, 128), rotation.signs(0, 0, 1, 64)]
    refused = 0
    for _ in range(300):
        data = guarded_copy(mutate(rng, base))
        for call in (
            lambda data=data: native.dequantize(data, 0, 0, 64),
            lambda data=data: native.gather_qmv(data, zero, 2, x[:, :64], zero.astype(np.int32), signs[1]),
            lambda data=data: native.gather_moe(data, zero, x, zero.astype(np.int32), *signs, native.SILU),
        ):
            try:
                call()
            except ValueError:
                refused += 1
    assert refused > 100
