"""The encoder: codes equal to the C++ encoder's, bit for bit, at every rate and length."""

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest

from tiny_qmoe_mlx import metal_encode, native
from tiny_qmoe_mlx.codecs import trellis

pytestmark = [metal_cpu.required, pytest.mark.skipif(not native.available(), reason="the C++ library is not built")]
RATES = range(1, 8)
# Rates whose costs lie in device memory; one of 2^16 states takes seconds in check mode.
LENGTHS = [12, pytest.param(14, marks=pytest.mark.slow), pytest.param(16, marks=pytest.mark.slow)]


def tiles(rng, count, scale=0.6):
    """Gaussian tiles at about the scale of the codes."""
    return (rng.normal(size=(count, 32, 16)) * scale).astype(np.float32)


def check(x, rate, length, mode, **options):
    fn = lambda x: metal_encode.search(x, rate, length)  # noqa: E731
    (codes, values), report = metal_cpu.emulate(fn, mx.array(x), mode=mode, limit_s=600, **options)
    assert not report.problems, report
    want_codes, want_values = native.encode_tiles(x, rate, length)
    np.testing.assert_array_equal(np.array(codes), want_codes)
    np.testing.assert_array_equal(np.array(values), want_values)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("length", LENGTHS)
def test_codes_are_those_of_the_cpu(rng, rate, length):
    check(tiles(rng, 2), rate, length, "run")


@pytest.mark.parametrize("rate", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)])
def test_checked_with_costs_in_threadgroup_memory(rng, rate):
    check(tiles(rng, 1), rate, 12, "check")


@pytest.mark.slow
@pytest.mark.parametrize("rate, length", [(1, 14), (2, 16)])
def test_checked_with_costs_in_device_memory(rng, rate, length):
    check(tiles(rng, 1), rate, length, "check")


def test_costs_in_device_memory(rng):
    assert 1 << (14 - 1) > metal_encode.CHIP_COSTS
    check(tiles(rng, 1), 1, 14, "run")


def test_in_any_order_of_lanes(rng):
    check(tiles(rng, 1), 4, 12, "run", seed=3)


@pytest.mark.parametrize("rate", [3, 6])
def test_targets_far_outside_the_code(rng, rate):
    """Errors saturate and targets are clipped as on the CPU."""
    check(tiles(rng, 1, scale=20.0), rate, 12, "run")


def test_tiles_of_zeros():
    """Many paths cost the same: ties are broken as on the CPU."""
    check(np.zeros((1, 32, 16), np.float32), 1, 12, "run")


@pytest.mark.parametrize("rate, length", [(4, 12), (1, 14)])
def test_address_spaces(rate, length):
    fn = lambda x: metal_encode.search(x, rate, length)  # noqa: E731
    _, report = metal_cpu.emulate(fn, mx.zeros((1, 32, 16)), mode="as")
    assert not report.problems, report


def test_encode_tiles_in_several_launches(rng, monkeypatch):
    """The drop-in for native.encode_tiles, with less scratch memory than tiles need."""
    one = metal_encode.SCRATCH_BYTES // metal_encode.tiles_in_a_launch(5, 12)
    monkeypatch.setattr(metal_encode, "SCRATCH_BYTES", 2 * one)
    x = tiles(rng, 5)
    metal_encode._viterbi_kernel.cache_clear()
    with metal_cpu.emulated_kernels(mode="run") as report:
        codes, values = metal_encode.encode_tiles(x, 5, 12)
    metal_encode._viterbi_kernel.cache_clear()
    assert report.counts["threads"] == 5 * 32
    want = native.encode_tiles(x, 5, 12)
    np.testing.assert_array_equal(codes, want[0])
    np.testing.assert_array_equal(values, want[1])


@pytest.mark.parametrize(
    "x, rate, length, text",
    [
        (np.zeros((1, 32, 16)), 2, 12, "x should be a numpy array of float32"),
        (np.zeros((1, 16, 32), np.float32), 2, 12, "x should be a numpy array of float32"),
        (np.full((1, 32, 16), np.nan, np.float32), 2, 12, "x should be finite"),
        (np.zeros((1, 32, 16), np.float32), 0, 12, "rate should be 1 to 7"),
        (np.zeros((1, 32, 16), np.float32), 2, 13, r"length one of \(12, 14, 16\)"),
    ],
)
def test_bad_arguments(x, rate, length, text):
    with pytest.raises(ValueError, match=text):
        metal_encode.encode_tiles(x, rate, length)


def test_scratch_fits_the_limit():
    for length in trellis.LENGTHS:
        for rate in RATES:
            assert metal_encode.tiles_in_a_launch(rate, length) >= 128
