"""Counts of mode ``profile`` on kernels small enough to count by hand."""

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_cpu import Profile, emulate, required, sample

pytestmark = required

THREADS = 64  # two simdgroups, one a threadgroup
INDEX = "uint lane = thread_index_in_simdgroup, i = thread_position_in_grid.x;\n"


def profile(source: str, **options: Any) -> Profile:
    """The profile of a kernel that reads x, 512 words, and writes y, one word a thread."""
    kernel = mx.fast.metal_kernel(
        name="counted", input_names=["x"], output_names=["y"], source=INDEX + source, **options
    )

    def launch(x):
        size = {"grid": (THREADS, 1, 1), "threadgroup": (32, 1, 1)}
        return kernel(inputs=[x], **size, output_shapes=[(THREADS,)], output_dtypes=[mx.uint32])[0]

    _, report = emulate(launch, np.arange(8 * THREADS, dtype=np.uint32), mode="profile")
    assert not report.problems, report
    assert report.profile
    return report.profile


PLAIN = Counter({"device read": 2, "device write": 2, "getelementptr": 4})  # y[i] = x[i]


# Expression of v = x[i] -> slots of one simdgroup besides those of y[i] = x[i].
PRICES = {
    "v": {},
    "v ^ 12345u": {"xor": 1},
    "((v * 0xCBAC1FEDu) & 0x8fff8fffu) ^ 0x3b603b60u": {"mul": 4, "and": 1, "xor": 1},
    "(v >> 5) & 0xffffu": {"lshr": 4},  # one bit extract
    "v >> (i & 31u)": {"lshr": 8, "and": 1},
    "v << (i & 31u)": {"shl": 8, "and": 1},
    "(v << 27) | (i >> 5)": {"fshl": 4},
    "popcount(v)": {"ctpop": 4},
    "v > 7u ? v : i": {"select": 1},
    "simd_sum(v)": {"simd reduction": 15},
    "simd_shuffle_xor(v, ushort(1))": {"simd shuffle": 2, "xor": 1},
    "simd_prefix_exclusive_sum(v)": {"simd prefix": 12},
    "uint(uint64_t(simd_ballot(v > 7u)))": {"simd ballot": 3, "icmp": 1},
    "uint(float(v))": {"uitofp": 4, "fptoui": 4},
    "as_type<uint>(as_type<float>(v) * 3.0f)": {"fmul": 1},
    "as_type<uint>(as_type<float>(v) * 3.0f + 1.0f)": {"fadd": 1},  # fused
    "as_type<uint>(fma(as_type<float>(v), 3.0f, 1.0f))": {"fma": 1},
    "as_type<uint>(fma(float(as_type<half2>(v).x), 3.0f, float(as_type<half2>(v).y)))": {"fma": 1},
    "as_type<uint>(fast::exp(as_type<float>(v)))": {"expf": 8},
}


@pytest.mark.parametrize("expression", PRICES)
def test_slots(expression):
    found = profile(f"uint v = x[i]; y[i] = {expression};")
    assert found.slots == PLAIN + Counter({name: 2 * slots for name, slots in PRICES[expression].items()})
    assert found.issue_slots == found.slots.total()
    assert found.per_weight(THREADS) == found.issue_slots / 2
    assert found.lane_efficiency == 1


def test_loops_and_branches_count_as_often_as_they_run():
    loop = "for (uint j = 0; j < 8; j++) v = (v ^ x[i + 64 * j]) * 7u;"
    found = profile(f"uint v = 0;\n#pragma clang loop unroll(disable)\n{loop} y[i] = v;")
    assert found.slots["device read"] == 2 * 8
    assert found.slots["mul"] == 2 * 8 * 4
    assert found.buffers["x"].compulsory == 4 * 8 * THREADS


def test_traffic_of_a_word_for_each_lane():
    x = profile("y[i] = x[i];").buffers["x"]
    assert (x.size, x.requested, x.fetched, x.compulsory, x.lines) == (2048, 256, 256, 256, 256)


def test_traffic_of_a_word_for_all_lanes():
    x = profile("y[i] = x[3];").buffers["x"]
    assert (x.requested, x.fetched, x.compulsory, x.lines) == (256, 8, 4, 64)


def test_traffic_of_strided_words():
    x = profile("y[i] = x[8 * i];").buffers["x"]
    assert (x.requested, x.fetched, x.compulsory, x.lines) == (256, 256, 256, 2048)


def test_traffic_of_a_word_read_twice():
    x = profile("y[i] = x[i]; simdgroup_barrier(mem_flags::mem_device); y[i] += x[i ^ 1];").buffers["x"]
    assert (x.fetched, x.compulsory) == (512, 256)


def test_written_bytes():
    assert profile("y[i] = x[i];").buffers["y"].written == 4 * THREADS


def test_bank_conflicts_of_threadgroup_memory():
    """Stride 1: one pass over the banks; stride 2: two; all lanes one word: one."""
    fill = "threadgroup uint t[1024]; for (uint j = lane; j < 1024; j += 32) t[j] = 0;"
    barrier = "simdgroup_barrier(mem_flags::mem_threadgroup);"
    for stride, passes in ((1, 1), (2, 2), (32, 32), (0, 1)):
        assert (
            profile(f"{fill} {barrier} y[i] = t[lane * {stride}] + x[i];").slots["threadgroup read"] == 2 * 4 * passes
        )


def test_idle_lanes_lower_the_efficiency():
    busy = profile("uint v = x[i]; for (uint j = 0; j < 100; j++) v = v * v * 7u ^ j; y[i] = v;")
    idle = profile("uint v = x[i]; if (lane < 8) for (uint j = 0; j < 100; j++) v = v * v * 7u ^ j; y[i] = v;")
    assert busy.lane_efficiency == 1
    assert 0.25 < idle.lane_efficiency < 0.3


def test_the_sample_reads_each_weight_once():
    _, report = sample.check(mode="profile")
    assert report.profile
    buffers = report.profile.buffers
    assert buffers["w"].fetched == buffers["w"].compulsory == buffers["w"].size
    assert buffers["x"].fetched == sample.ROWS * buffers["x"].size
    assert report.profile.lane_efficiency > 0.4  # 64 words a row, 128 lanes
