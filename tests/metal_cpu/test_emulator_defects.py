"""Planted defects: each must be reported with its kind, in the line where it was planted; the clean kernel must not."""

import numpy as np
import pytest

from metal_cpu import required, sample
from metal_cpu.sample import edited

pytestmark = required

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
ACC = "float acc = 0.0f;"
GUARD = "if (row >= rows) return;"


@pytest.mark.parametrize("mode", ["run", "check", "profile"])
@pytest.mark.parametrize("seed", [None, 1])
def test_the_clean_kernel_is_right_and_has_no_problems(mode, seed):
    y, report = sample.check(mode=mode, seed=seed)
    want = sample.reference(*sample.inputs())
    assert np.abs(y - want).max() <= 1e-3 * np.abs(want).max()
    assert not report.problems, report
    assert report.counts["threads"] == sample.ROWS * sample.SIMDGROUPS * 32


def first(text: str) -> str:
    """The kernel with another beginning of its sum."""
    return edited(ACC, text)


# name: (kind, text that the reported line holds, source or header, options)
DEFECTS = {
    "read past an input": ("OOB", "scales[row * (words / 4)", edited("j < words;", "j <= words;"), {}),
    "row guard is missing": ("OOB", "w[row", edited(GUARD, ""), {"grid_rows": sample.ROWS + 1}),
    "read far outside": ("OOB", "x[i]", edited("x + j * 16", "x + j * (lane == 7 ? 4000000u : 16u)"), {}),
    "read before an input": ("OOB", "x[i]", edited("x + j * 16", "x + j * 16 - (row == 3 ? 2 : 0)"), {}),
    "write past the output": ("OOB", "y[row", edited("y[row]", "y[row + 1]"), {}),
    "write past a threadgroup array": ("OOB", "partial[", edited("partial[simdgroup]", "partial[simdgroup + 1]"), {}),
    "null pointer": ("OOB", "n[lane]", first("const device T* n = nullptr; float acc = float(n[lane]);"), {}),
    "barrier is missing": ("RACE", "partial[", edited(BARRIER, ""), {}),
    "barrier names other memory": ("RACE", "partial[", edited("mem_threadgroup", "mem_device"), {}),
    "barrier names no memory": ("RACE", "partial[", edited("mem_threadgroup", "mem_none"), {}),
    "all lanes write one word": ("RACE", "partial[", edited("if (lane == 0) partial", "partial"), {}),
    "two threadgroups write one output": ("RACE", "y[row", edited("y[row]", "y[row / 2]"), {}),
    "write after read without a barrier": (
        "RACE",
        "partial[0]",
        edited("if (simdgroup == 0 &&", "if (simdgroup == 1 && lane == 0) partial[0] = 0.0f; if (simdgroup == 0 &&"),
        {},
    ),
    "exchange through memory without a simdgroup_barrier": (
        "RACE",
        "spare[",
        first(
            "float acc = 0.0f; if (lane < 2 && simdgroup == 0) { spare[lane] = 0.0h; acc = float(spare[1 - lane]); }"
        ),
        {},
    ),
    "simd operation in a branch": (
        "SIMD-DIVERGENT",
        "simd_sum",
        edited("acc = simd_sum(acc);", "if (lane < 20) acc = simd_sum(acc);"),
        {},
    ),
    "simd operation in loops of unequal length": (
        "SIMD-DIVERGENT",
        "simd_max",
        edited("uint word =", "acc += 0.0f * simd_max(acc); uint word ="),
        {"columns": 1024 - 320},
    ),
    "shuffle from an inactive lane": (
        "SIMD-INACTIVE",
        "simd_shuffle",
        edited("acc = simd_sum(acc);", "if (lane < 16) acc = simd_shuffle(acc, 20);"),
        {},
    ),
    "shuffle from lane 32": (
        "SIMD-INACTIVE",
        "simd_shuffle",
        edited("acc = simd_sum(acc);", "acc = simd_shuffle(acc, lane + 1);"),
        {},
    ),
    "barrier in a branch": ("BARRIER-DIVERGENT", BARRIER, edited(BARRIER, f"if (simdgroup != 1) {BARRIER}"), {}),
    "lanes wait at different barriers": (
        "BARRIER-DIVERGENT",
        BARRIER,
        edited(BARRIER, f"if (simdgroup == 0)\n {BARRIER}\n else\n {BARRIER}"),
        {},
    ),
    "return before a barrier": (
        "BARRIER-DIVERGENT",
        BARRIER,
        edited(BARRIER, f"if (simdgroup == 3) return; {BARRIER}"),
        {},
    ),
    "uninitialised threadgroup memory": ("UNINIT", "spare[", first("float acc = 0.0f * float(spare[lane & 3]);"), {}),
    "output read before it is written": ("UNINIT", "y[row]", first("float acc = 0.0f * float(y[row]);"), {}),
    "an output is not written": ("UNWRITTEN", "", edited("lane == 0) y[row]", "lane == 0 && row != 5) y[row]"), {}),
    "shift by the width": ("UB", "word >>", edited("(word >> (2 * i))", "(word >> (2 * i + 2))", sample.HEADER), {}),
    "int overflow": ("UB", "uint(int", first("float acc = 0.0f * float(uint(int(row + 1000) * 100000000));"), {}),
    "ushort product overflows int": (
        "UB",
        "a * a",
        first("ushort a = ushort(50000 + row); float acc = 0.0f * float(uint(a * a));"),
        {},
    ),
    "float does not fit": ("UB", "int(1e20f", first("float acc = 0.0f * float(int(1e20f * float(row + 1)));"), {}),
    "division by zero": ("UB", "7 / int(row)", first("float acc = 0.0f * float(7 / int(row));"), {}),
    "misaligned load": (
        "MISALIGNED",
        "(const device uint*)",
        first("float acc = 0.0f * float(*(const device uint*)((const device uchar*)w + 4 * lane + 2) & 0u);"),
        {},
    ),
    "private array index": ("INDEX", "own[", first("float own[4] = {0}; float acc = own[(lane + 1) / 8];"), {}),
    "threadgroup array index": ("INDEX", "spare[", first("spare[lane & 7] = 0.0h; float acc = 0.0f;"), {}),
    "too much threadgroup memory": (
        "TG-MEMORY",
        "spare",
        edited("spare[4];", "spare[16384]; spare[thread_index_in_threadgroup] = 0.0h;"),
        {},
    ),
    "write to an input": ("CONST-WRITE", "((device T*)x)", first("((device T*)x)[0] = T(0); float acc = 0.0f;"), {}),
    "endless loop": ("TIMEOUT", "", first("float acc = 0.0f; while (row == 2) acc += 1.0f;"), {"limit_s": 0.3}),
    "endless loop over memory": (
        "TIMEOUT",
        "",
        first("float acc = 0.0f; for (uint i = 0; row == 2; i++) acc += float(x[i & 7]);"),
        {"limit_s": 0.3},
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defect_is_reported(name):
    kind, line, text, options = DEFECTS[name]
    in_header = text.startswith("\n// The dot")
    _, report = sample.check(*((sample.SOURCE, text) if in_header else (text,)), **options)
    found = [p for p in report.problems if p.split(" ", 1)[0] == kind]
    assert found, f"expected {kind}, found: {report}"
    assert any(line in p for p in found), found


def test_out_of_bounds_in_run_mode_ends_the_lane_not_the_process():
    far = edited("x + j * 16", "x + j * (lane == 7 ? 400000000u : 16u)")
    _, report = sample.check(far, mode="run")
    assert report.kinds["FAULT"] and "x[i]" in report.problems[0], report


def test_deep_stack_is_reported():
    deep = edited(ACC, "volatile float big[20000]; big[row] = 0.0f; float acc = big[row];")
    _, report = sample.check(deep, mode="run")
    assert report.kinds["STACK"], report


def test_problem_line_names_buffer_offset_and_thread():
    _, report = sample.check(edited("y[row]", "y[row + 1]"))
    (line,) = [p for p in report.problems if p.startswith("OOB")]
    assert "write of 2 B at byte offset 26 of buffer 'y' of 26 B" in line
    assert "threadgroup (12,0,0) thread 0 simdgroup 0 lane 0" in line


def test_partial_simdgroup_counts_as_present():
    """Lanes that do not exist at the grid's edge are not missing from a simd operation."""
    import mlx.core as mx

    from metal_cpu import emulate

    source = "uint i = thread_position_in_grid.x; y[i] = simd_sum(1u) + 100u * threads_per_threadgroup.x;"
    kernel = mx.fast.metal_kernel(name="tail", input_names=["x"], output_names=["y"], source=source)

    def launch(x):
        return kernel(
            inputs=[x], grid=(70, 1, 1), threadgroup=(64, 1, 1), output_shapes=[(70,)], output_dtypes=[mx.uint32]
        )[0]

    y, report = emulate(launch, mx.zeros((70,)), mode="check")
    assert not report.problems, report
    np.testing.assert_array_equal(np.array(y), [32 + 6400] * 64 + [6 + 600] * 6)
