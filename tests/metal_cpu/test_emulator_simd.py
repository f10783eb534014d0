"""simd functions against numpy, with lanes and simdgroups in random order."""

import mlx.core as mx
import numpy as np
import pytest

from metal_cpu import emulate, required

pytestmark = required

THREADS = 96
LANE = np.arange(32)

# Metal expression of v (uint) and lane -> the same for the 32 values of a simdgroup.
EXPRESSIONS = {
    "simd_sum(v)": lambda v: np.full(32, v.sum(dtype=np.uint32)),
    "simd_product(v | 1u)": lambda v: np.full(32, np.multiply.reduce(v | 1, dtype=np.uint32)),
    "simd_min(v)": lambda v: np.full(32, v.min()),
    "simd_max(v)": lambda v: np.full(32, v.max()),
    "simd_and(v | 5u)": lambda v: np.full(32, np.bitwise_and.reduce(v | 5)),
    "simd_or(v)": lambda v: np.full(32, np.bitwise_or.reduce(v)),
    "simd_xor(v)": lambda v: np.full(32, np.bitwise_xor.reduce(v)),
    "simd_prefix_exclusive_sum(v)": lambda v: np.cumsum(v, dtype=np.uint32) - v,
    "simd_prefix_inclusive_sum(v)": lambda v: np.cumsum(v, dtype=np.uint32),
    "simd_prefix_inclusive_product(v | 1u)": lambda v: np.cumprod(v | 1, dtype=np.uint32),
    "simd_shuffle(v, ushort((lane * 7 + 3) & 31))": lambda v: v[(LANE * 7 + 3) & 31],
    "simd_shuffle_xor(v, ushort(9))": lambda v: v[LANE ^ 9],
    "simd_shuffle_down(v, ushort(3))": lambda v: np.where(LANE + 3 < 32, v[np.minimum(LANE + 3, 31)], v),
    "simd_shuffle_up(v, ushort(4))": lambda v: np.where(LANE >= 4, v[LANE - 4], v),
    "simd_shuffle_rotate_down(v, ushort(1))": lambda v: np.roll(v, -1),
    "simd_shuffle_rotate_up(v, ushort(2))": lambda v: np.roll(v, 2),
    "simd_shuffle_and_fill_down(v, lane, ushort(5))": lambda v: np.concatenate([v[5:], LANE[:5]]),
    "simd_shuffle_and_fill_up(v, lane, ushort(5))": lambda v: np.concatenate([LANE[27:], v[:27]]),
    "simd_broadcast(v, ushort(5))": lambda v: np.full(32, v[5]),
    "simd_broadcast_first(v)": lambda v: np.full(32, v[0]),
    "uint(uint64_t(simd_ballot((v & 1u) != 0u)))": lambda v: np.full(32, sum(int(x & 1) << i for i, x in enumerate(v))),
    "uint(uint64_t(simd_active_threads_mask()))": lambda v: np.full(32, 0xFFFFFFFF),
    "uint(simd_all(v > 7u)) + 2u * uint(simd_any(v > 7u))": lambda v: np.full(32, (v > 7).all() + 2 * (v > 7).any()),
    "uint(simd_is_first())": lambda v: LANE == 0,
    "quad_sum(v)": lambda v: np.repeat(v.reshape(8, 4).sum(1, dtype=np.uint32), 4),
    "quad_shuffle_xor(v, ushort(1))": lambda v: v[LANE ^ 1],
    "quad_broadcast(v, ushort(2))": lambda v: v[(LANE & ~3) + 2],
    "simd_sum(uint4(v, 1u, lane, 7u)).z": lambda v: np.full(32, 496),
    "uint(simd_sum(half2(half(lane), 1.0h)).x)": lambda v: np.full(32, 496),
    "uint(simd_sum(ushort(v & 15u)))": lambda v: np.full(32, (v & 15).sum()),
    "popcount(v)": lambda v: np.array([bin(x).count("1") for x in v]),
    "clz(v)": lambda v: np.array([32 - int(x).bit_length() for x in v]),
    "ctz(v | 1024u)": lambda v: np.array([(int(x | 1024) & -int(x | 1024)).bit_length() - 1 for x in v]),
    "reverse_bits(v)": lambda v: np.array([int(f"{x:032b}"[::-1], 2) for x in v.tolist()]),
    "extract_bits(v, 3u, 9u)": lambda v: v >> 3 & 511,
    "insert_bits(v, 5u, 4u, 8u)": lambda v: (v & ~np.uint32(0xFF0)) | 0x50,
    "rotate(v, 9u)": lambda v: v << 9 | v >> 23,
    "mulhi(v, 0xCBAC1FEDu)": lambda v: (v.astype(np.uint64) * 0xCBAC1FED) >> 32,
}


def launch(x: mx.array) -> mx.array:
    lines = [f"o[i * {len(EXPRESSIONS)} + {n}] = {text};" for n, text in enumerate(EXPRESSIONS)]
    source = "uint lane = thread_index_in_simdgroup, i = thread_position_in_grid.x; uint v = x[i];\n" + "\n".join(lines)
    kernel = mx.fast.metal_kernel(name="operations", input_names=["x"], output_names=["o"], source=source)
    shape = (THREADS, len(EXPRESSIONS))
    return kernel(
        inputs=[x], grid=(THREADS, 1, 1), threadgroup=(THREADS, 1, 1), output_shapes=[shape], output_dtypes=[mx.uint32]
    )[0]


@pytest.mark.parametrize("mode", ["run", "check"])
def test_operations_equal_numpy(mode):
    x = np.random.default_rng(3).integers(1, 1 << 20, THREADS, np.uint32)
    out, report = emulate(launch, x, mode=mode, seed=11)
    assert not report.problems, report
    columns = np.array(out).T
    for (text, expected), got in zip(EXPRESSIONS.items(), columns, strict=True):
        want = np.concatenate([np.asarray(expected(v)).astype(np.uint32) for v in x.reshape(-1, 32)])
        np.testing.assert_array_equal(got, want, err_msg=text)


def matrix_launch(a: mx.array, b: mx.array, c: mx.array) -> mx.array:
    source = """
      simdgroup_matrix<T, 8, 8> ma, mb;
      simdgroup_matrix<float, 8, 8> mc;
      simdgroup_load(ma, a, 8);
      simdgroup_load(mb, b, 8, ulong2(0, 0), true);
      simdgroup_load(mc, c, 8);
      simdgroup_multiply_accumulate(mc, ma, mb, mc);
      simdgroup_store(mc, y, 8);
    """
    kernel = mx.fast.metal_kernel(name="matrix", input_names=["a", "b", "c"], output_names=["y"], source=source)
    size = {"grid": (32, 1, 1), "threadgroup": (32, 1, 1), "output_shapes": [(8, 8)], "output_dtypes": [mx.float32]}
    return kernel(inputs=[a, b, c], template=[("T", a.dtype)], **size)[0]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_simdgroup_matrix_equals_numpy(dtype):
    rng = np.random.default_rng(4)
    a, b = (mx.array(rng.normal(size=(8, 8)).astype(np.float32)).astype(dtype) for _ in range(2))
    c = mx.array(rng.normal(size=(8, 8)).astype(np.float32))
    y, report = emulate(matrix_launch, a, b, c, mode="check", seed=1)
    assert not report.problems, report
    exact = [np.array(m.astype(mx.float32), np.float64) for m in (a, b, c)]
    np.testing.assert_allclose(np.array(y), exact[0] @ exact[1].T + exact[2], rtol=0, atol=1e-5)
