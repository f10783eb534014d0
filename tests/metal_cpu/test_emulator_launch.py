"""Launches: positions, edges, buffers beyond 4 GiB, small inputs, several kernels, initial values, whole functions."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_cpu import capture, emulate, emulated_kernels, required, sample

pytestmark = required


def kernel(source: str, inputs: list[str], outputs: list[str], **options: Any) -> Any:
    return mx.fast.metal_kernel(name="probe", input_names=inputs, output_names=outputs, source=source, **options)


def test_capture_gives_what_mlx_would_launch():
    (launch,) = capture(sample.make(), *sample.inputs())
    assert launch.grid == (sample.ROWS * sample.SIMDGROUPS * 32, 1, 1)
    assert launch.threadgroup == (sample.SIMDGROUPS * 32, 1, 1)
    assert [(a.shape, a.dtype) for a in launch.inputs][2] == ((sample.COLUMNS,), mx.float16)
    assert [(a.shape, a.dtype) for a in launch.outputs] == [((sample.ROWS,), mx.float16)]
    assert sample.HEADER in launch.source and "[[buffer(0)]]" in launch.source


POSITIONS = [
    "thread_position_in_grid", "thread_position_in_threadgroup", "threadgroup_position_in_grid", "threads_per_grid",
    "threads_per_threadgroup", "threadgroups_per_grid", "dispatch_threads_per_threadgroup",
]  # fmt: skip
INDICES = [
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
]


@pytest.mark.parametrize(("grid", "group"), [((8, 4, 2), (8, 4, 2)), ((7, 5, 3), (4, 4, 2)), ((3, 2, 1), (64, 1, 1))])
def test_positions_are_those_of_dispatch_threads(grid, group):
    lines = [f"{name}.{axis}" for name in POSITIONS for axis in "xyz"] + INDICES
    writes = "\n".join(f"y[at * {len(lines)} + {n}] = {text};" for n, text in enumerate(lines))
    p = "thread_position_in_grid"
    probe = kernel(
        f"uint at = ({p}.z * threads_per_grid.y + {p}.y) * threads_per_grid.x + {p}.x;\n{writes}", ["x"], ["y"]
    )
    shape = (grid[2], grid[1], grid[0], len(lines))

    def launch(x):
        return probe(inputs=[x], grid=grid, threadgroup=group, output_shapes=[shape], output_dtypes=[mx.uint32])[0]

    y, report = emulate(launch, mx.zeros((1,)), mode="check")
    assert not report.problems, report
    full = np.minimum(grid, group)
    want = np.zeros(shape, np.uint32)
    for z, row, x in np.ndindex(*shape[:3]):
        at = np.array([x, row, z])
        where, within = at // full, at % full
        size = np.minimum(full, np.array(grid) - where * full)
        index = within[0] + size[0] * (within[1] + size[1] * within[2])
        simdgroups = -(-int(np.prod(size)) // 32)
        positions = [at, within, where, grid, size, -(-np.array(grid) // full), full]
        want[z, row, x] = [*np.concatenate(positions), index, index % 32, index // 32, simdgroups]
    np.testing.assert_array_equal(np.array(y), want)


def test_scalars_small_inputs_and_shapes_are_bound():
    source = """
      uint i = thread_position_in_grid.x;
      y[i] = x[i] * s + small[i % 3] + T(x_shape[1]) * T(10) + T(x_strides[0]) * T(100) + T(x_ndim) * T(1000);
    """
    probe = kernel(source, ["x", "s", "small"], ["y"])

    def launch(x, s, small):
        size = {"grid": (20, 1, 1), "threadgroup": (32, 1, 1), "output_shapes": [x.shape], "output_dtypes": [x.dtype]}
        return probe(inputs=[x, s, small], template=[("T", x.dtype)], **size)[0]

    x = np.arange(20, dtype=np.float32).reshape(4, 5)
    y, report = emulate(launch, x, mx.array(3.0), mx.array([1.0, 2.0, 4.0]), mode="check")
    assert not report.problems, report
    want = x * 3 + np.array([1, 2, 4], np.float32)[np.arange(20) % 3].reshape(4, 5) + 50 + 500 + 2000
    np.testing.assert_array_equal(np.array(y), want)


def test_constants_kernel_chains_and_several_outputs():
    table = mx.array(np.arange(16, dtype=np.float32))
    first = kernel(
        "uint i = thread_position_in_grid.x; a[i] = x[i] + t[i]; b[i] = x[i] - t[i];", ["x", "t"], ["a", "b"]
    )
    second = kernel("uint i = thread_position_in_grid.x; y[i] = b[i] * a[i];", ["a", "b"], ["y"])

    def launch(x):
        size = {"grid": (16, 1, 1), "threadgroup": (16, 1, 1)}
        a, b = first(inputs=[x, table], **size, output_shapes=[(16,)] * 2, output_dtypes=[mx.float32] * 2)
        (y,) = second(inputs=[a, b], **size, output_shapes=[(16,)], output_dtypes=[mx.float32])
        return y, b

    x = np.linspace(0, 3, 16, dtype=np.float32)
    (y, b), report = emulate(launch, x, mode="check")
    assert not report.problems, report
    t = np.arange(16, dtype=np.float32)
    np.testing.assert_array_equal(np.array(y), (x - t) * (x + t))
    np.testing.assert_array_equal(np.array(b), x - t)


def test_init_value_fills_outputs():
    probe = kernel("if (thread_position_in_grid.x < 3) y[thread_position_in_grid.x] = 1.0f;", ["x"], ["y"])

    def launch(x):
        return probe(
            inputs=[x],
            grid=(8, 1, 1),
            threadgroup=(8, 1, 1),
            output_shapes=[(8,)],
            output_dtypes=[mx.float32],
            init_value=7,
        )[0]

    y, report = emulate(launch, mx.zeros((8,)), mode="check", init_value=7)
    assert not report.problems, report
    assert np.array(y).tolist() == [1, 1, 1, 7, 7, 7, 7, 7]
    _, report = emulate(launch, mx.zeros((8,)), mode="check")
    assert report.kinds == {"UNWRITTEN": 1}


def test_atomic_outputs():
    source = "if (x[thread_position_in_grid.x] > 0.0f) atomic_fetch_add_explicit(&count[0], 1u, memory_order_relaxed);"
    probe = kernel(source, ["x"], ["count"], atomic_outputs=True)

    def launch(x):
        return probe(
            inputs=[x], grid=(1000, 1, 1), threadgroup=(100, 1, 1), output_shapes=[(1,)], output_dtypes=[mx.uint32]
        )[0]

    x = np.random.default_rng(2).normal(size=1000).astype(np.float32)
    count, report = emulate(launch, x, mode="check", init_value=0, seed=3)
    assert not report.problems, report
    assert count.item() == (x > 0).sum()


@pytest.mark.parametrize("mode", ["run", "check", "profile"])
def test_buffer_beyond_4_gib(mode, tmp_path):
    # Zeros that take no space; in two dimensions, as one of MLX's is at most 2^31 - 1 long.
    pool = np.memmap(tmp_path / "sparse", np.uint8, "w+", shape=((5 << 30) // 4096 + 1, 4096))
    record = np.random.default_rng(6).integers(0, 2**32, 64, np.uint32)
    slot = (5 << 30) // 128
    pool[-1, :256] = record.view(np.uint8)
    source = """
      uint i = thread_position_in_grid.x;
      const device uint* words = (const device uint*)(pool + ulong(slots[0]) * 128);
      y[i] = words[i];
    """
    probe = kernel(source, ["pool", "slots"], ["y"])

    def launch(pool, slots):
        return probe(
            inputs=[pool, slots],
            grid=(64, 1, 1),
            threadgroup=(64, 1, 1),
            output_shapes=[(64,)],
            output_dtypes=[mx.uint32],
        )[0]

    y, report = emulate(launch, pool, np.full(8, slot, np.uint32), mode=mode)
    assert not report.problems, report
    np.testing.assert_array_equal(np.array(y), record)
    if mode == "check":
        beyond = np.full(8, slot + 31, np.uint32)  # 128 B are left, 256 are read
        _, report = emulate(launch, pool, beyond, mode="check")
        assert report.kinds["OOB"] == 32 and "buffer 'pool' of 5368713216 B" in report.problems[0], report


def test_wide_loads_from_a_slice_are_misaligned():
    probe = kernel("y[thread_position_in_grid.x] = ((const device uint*)x)[thread_position_in_grid.x];", ["x"], ["y"])

    def launch(x):
        return probe(
            inputs=[x], grid=(8, 1, 1), threadgroup=(8, 1, 1), output_shapes=[(8,)], output_dtypes=[mx.uint32]
        )[0]

    x = mx.zeros((16,), mx.float16)
    assert not emulate(launch, x, mode="check")[1].problems
    assert emulate(launch, x, mode="check", skew=True)[1].kinds["MISALIGNED"]


def test_some_threadgroups_only():
    y, report = sample.check(mode="check", groups=(2, 3))
    want = sample.reference(*sample.inputs())
    assert not report.problems, report
    assert np.abs(y - want)[2:5].max() <= 1e-3 * np.abs(want).max()
    assert report.counts["threads"] == 3 * sample.SIMDGROUPS * 32


def test_operation_between_argument_and_kernel_is_refused_with_its_name():
    launch = sample.make()
    w, scales, x = sample.inputs()
    with pytest.raises(ValueError, match="Negative is in between"):
        emulate(lambda w, scales, x: launch(w, scales, -x), w, scales, x)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_whole_function_with_operations_around_its_kernel(dtype):
    w, scales, x = sample.inputs(dtype=dtype)
    with emulated_kernels(mode="check", seed=1) as report:
        launch = sample.make(dtype=dtype)  # made inside
        y = launch(w, scales, -x) + launch(w, scales, x * 3)
    assert not report.problems, report
    assert report.counts["threads"] == 2 * sample.ROWS * sample.SIMDGROUPS * 32
    want = 2 * sample.reference(w, scales, x)
    tolerance = {mx.float16: 4e-3, mx.bfloat16: 3e-2}[dtype]  # roundings of x * 3, both products and the sum
    assert np.abs(np.array(y.astype(mx.float32)) - want).max() <= tolerance * np.abs(want).max()
    with pytest.raises(RuntimeError, match="No Metal back-end"):
        sample.make()(w, scales, x)


def test_bad_launches_are_refused():
    probe = kernel("y[0] = 1.0f;", ["x"], ["y"])

    def launch(x):
        return probe(
            inputs=[x], grid=(2048, 1, 1), threadgroup=(2048, 1, 1), output_shapes=[(1,)], output_dtypes=[mx.float32]
        )[0]

    with pytest.raises(ValueError, match="1 to 1024 threads"):
        emulate(launch, mx.zeros((8,)))
    with pytest.raises(ValueError, match="mode should be one of"):
        sample.check(mode="fast")
