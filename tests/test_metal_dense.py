"""The rotation and the dense decoder: each instance that the package can launch, in the emulator."""

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest
from metal_cases import TOLERANCE, assert_close, float64, make_case, tokens

from tiny_qmoe_mlx import metal
from tiny_qmoe_mlx.codecs import rotation

pytestmark = metal_cpu.required
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
LENGTHS = [12, pytest.param(14, marks=pytest.mark.slow), 16]
# (rows, columns): one for each size of the Hadamard transform, and columns that need padding.
SHAPES = {64: (2, 2880), 128: (3, 100), 256: (1, 768), 512: (2, 1500), 1024: (1, 7168), 2048: (1, 4095)}
EXACT = 4e-7  # of max |z|: float32 sums of up to 2048 terms


def check_rotate(rng, rows, columns, dtype, to, tolerance, **options):
    sign = rotation.signs(1, 2, 0, columns)
    x = tokens(rng, rows, columns, dtype)
    fn = lambda x, bits: metal.rotate(x, bits, to)  # noqa: E731
    z, report = metal_cpu.emulate(fn, x, metal.sign_bits(sign), **options)
    assert not report.problems, report
    if z is not None:
        assert_close(z, rotation.rotate(float64(x), sign), tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SHAPES)
def test_rotation_to_float32(rng, size, dtype):
    rows, columns = SHAPES[size]
    assert rotation.hadamard_size(columns) == size
    check_rotate(rng, rows, columns, dtype, mx.float32, EXACT, mode="check")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("size", [64, 256, pytest.param(2048, marks=pytest.mark.slow)])
def test_rotation_to_the_models_dtype(rng, size, dtype):
    check_rotate(rng, *SHAPES[size], dtype, dtype, TOLERANCE[dtype], mode="check")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("size", [128, 512, 1024])
def test_rotation_to_the_models_dtype_at_other_sizes(rng, size, dtype):
    check_rotate(rng, *SHAPES[size], dtype, dtype, TOLERANCE[dtype], mode="check")


@pytest.mark.parametrize("columns", [4, 64, 4096])
def test_rotation_address_spaces(rng, columns):
    """Four values, and the two words of signs of 64 columns, are inputs in constant space."""
    check_rotate(rng, 1, columns, mx.float16, mx.float32, EXACT, mode="as")


def test_rotation_of_four_columns(rng):
    check_rotate(rng, 1, 4, mx.float32, mx.float32, EXACT, mode="check")


@pytest.mark.parametrize("seed", [1, 2])
def test_rotation_in_any_order_of_lanes(rng, seed):
    check_rotate(rng, 1, 4096, mx.float32, mx.float32, EXACT, mode="check", seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_of_a_slice(rng, dtype):
    """Inputs may begin at any element: nothing wider than an element is loaded from them."""
    check_rotate(rng, 2, 130, dtype, mx.float32, EXACT, mode="check", skew=True)


def test_rotation_is_what_mlx_computes(rng):
    """mx.hadamard_transform on the same signs: made by other people."""
    columns = 1536
    sign, x = rotation.signs(5, 6, 1, columns), tokens(rng, 2, columns, mx.float32)
    z, _ = metal_cpu.emulate(lambda x, bits: metal.rotate(x, bits), x, metal.sign_bits(sign))
    want = mx.hadamard_transform((x * mx.array(sign)).reshape(2, 3, 512), scale=512**-0.5).reshape(2, columns)
    assert_close(z, float64(want), EXACT)


def check_dequantize(case, ids, matrix, dtype, **options):
    fn = lambda records: lambda ids: metal.dequantize(ids, records, case.layer, matrix, dtype)  # noqa: E731
    (w, bias), report = case.run(metal_cpu.emulate, fn, mx.array(ids), mode="check", **options)
    assert not report.problems, report
    want = np.stack([case.matrix(int(e), matrix) for e in ids])
    assert_close(w, want, TOLERANCE[dtype])
    biases = [case.records[int(e)].matrices[matrix].bias for e in ids]
    want_bias = [np.zeros(want.shape[1]) if b is None else b[: want.shape[1]] for b in biases]
    np.testing.assert_array_equal(np.array(bias), np.stack(want_bias).astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_instance_of_dequantize_at_every_rate(rng, dtype, length):
    case = make_case(rng, d=520, middle=40, experts=9, length=length, rates=range(8), bias=length == 12)
    check_dequantize(case, np.array([4, 0], np.uint32), 1, dtype)


@pytest.mark.parametrize("rates", [[0], [7, 1, 6, 2, 5, 3, 4]], ids=str)
def test_dequantize_down_with_more_than_32_blocks(rng, rates):
    case = make_case(rng, d=33, middle=64 * 35 - 7, experts=3, rates=rates)
    check_dequantize(case, np.array([2], np.int32), 2, mx.float16)


@pytest.mark.parametrize("experts", [3, 9])
def test_dequantize_address_spaces(rng, experts):
    case = make_case(rng, d=64, middle=32, experts=experts)
    fn = lambda records: lambda ids: metal.dequantize(ids, records, case.layer, 0, mx.float16)  # noqa: E731
    _, report = case.run(metal_cpu.emulate, fn, mx.arange(experts, dtype=mx.uint32), mode="as")
    assert not report.problems, report
