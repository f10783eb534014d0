"""The kernels as CUDA: every instance compiles, and the same text gives the right results when a CPU runs it.

No test here needs a GPU; tests/test_gpu.py is for machines that have one. What a CPU shows is the arithmetic of the
translated text, thread for thread, not what a compiler for GPUs makes of it.
"""

import cuda_compilers
import mlx.core as mx
import pytest
from cuda_text import recorded
from gpu_checks import (
    check_codewords,
    check_dense_codewords,
    check_dequantize,
    check_encoder,
    check_experts,
    check_prefill,
    check_qmv,
    check_rotate,
    check_tiles,
)
from kernel_launches import DTYPES, LENGTHS, every_call
from qmoe_records import CODINGS, name_of

from tiny_qmoe_mlx import cuda, metal

compiler = pytest.mark.skipif(bool(cuda_compilers.no_compiler()), reason=cuda_compilers.no_compiler() or "-")
host = pytest.mark.skipif(bool(cuda_compilers.no_host()), reason=cuda_compilers.no_host() or "-")
slow = pytest.mark.slow
MAX_BLOCKS_YZ, MAX_THREADS = 65535, 1024
FAST = (
    "rotate 2048 bfloat16 float32",
    "qmv float16 L 12 tokens 1 ids uint32",
    "qmv bfloat16 L 16 tokens 8 ids int32",
    "gate_up swiglu_oai L 16 tokens 1 ids uint32",
    "dequantize bfloat16 L 12 ids int32",
    "qmoe ternary-dictionary-16 bias True float16 tokens 1 ids uint32",
    "qmoe dequantize ternary-dictionary-16 bias True float16 ids uint32",
    "rans",
    "viterbi rate 2 L 12",
    "viterbi rate 7 L 16",
)


def slow_ones(*values):
    return [pytest.param(value, marks=slow) for value in values]


def one_warp(source):
    """Launch a kernel of one input x and one output y."""
    kernel = cuda.kernel(name="k", input_names=["x"], output_names=["y"], header="", source=source)
    outputs = {"output_shapes": [(1,)], "output_dtypes": [mx.float32]}
    return kernel(inputs=[mx.zeros((1,))], grid=(32, 1, 1), threadgroup=(32, 1, 1), **outputs)


def texts(calls):
    """The different launches of the calls, by text."""
    with recorded() as found:
        for call in calls:
            call.function(*call.arrays)
    return {launch.source: launch for launch in found}.values()


@pytest.mark.parametrize(
    ("metal_text", "cuda_text"),
    [
        ("threadgroup float a[2 * B]; f(a);", "__shared__ float a[2 * B]; f(a);"),
        ("threadgroup vec<T, 2> a[3];", "__shared__ vec<T, 2> a[3];"),
        ("threadgroup Shared<N> a;", "__shared__ Shared<N> a;"),
        ("threadgroup Pair* mine = staged + 17 * lane;", "Pair* mine = staged + 17 * lane;"),
        ("(const device half*)at", "(const half*)at"),
        ("uint f(const thread uint* w, device uint* thread_index)", "uint f(const uint* w, uint* thread_index)"),
        ("a;  // device memory\nb;", "a;  \nb;"),
        ("#pragma clang loop unroll(full)\n", "#pragma unroll\n"),
        ("pool + ulong(base)", "pool + uint64_t(base)"),
        ("as_type<uint>(ushort2(a, b)), as_type<ushort2>(v)", "as_type<uint>(make_ushort2(a, b)), as_type<ushort2>(v)"),
    ],
)
def test_words_that_no_header_can_define(metal_text, cuda_text):
    assert cuda.translate(metal_text) == cuda_text


def test_lines_stay_where_they_are():
    text = metal.source("trellis_decode", "trellis_gather_qmv", "trellis_dequantize", "rotate")
    assert cuda.translate(text).count("\n") == text.count("\n")


def test_kernels_are_refused_where_mlx_has_no_cuda():
    if mx.cuda.is_available():
        pytest.skip("MLX has CUDA here")
    assert not cuda.available()
    with pytest.raises(RuntimeError, match="CUDA"):
        cuda.kernel("k", ["x"], ["y"], "", "y[0] = x[0];")


def test_launches_keep_to_cudas_rules():
    """Whole blocks of whole warps along x (CUDA rounds a grid up, and no kernel checks for threads beyond it)."""
    with recorded() as found:
        for call in every_call():
            call.function(*call.arrays)
    for launch in found:
        assert launch.threadgroup[0] % 32 == 0 and launch.threadgroup[0] <= MAX_THREADS, launch.name
        assert launch.threadgroup[1:] == (1, 1), launch.name
        assert launch.grid[0] % launch.threadgroup[0] == 0, launch.name
        assert max(launch.grid[1:]) <= MAX_BLOCKS_YZ, launch.name


@compiler
def test_one_instance_of_each_kernel_compiles():
    found = texts([call for call in every_call() if call.name in FAST])
    assert len({launch.name for launch in found}) == len(FAST)
    for launch in found:
        assert f".entry _ZN3mlx4core2cu{len(launch.name)}{launch.name}" in cuda_compilers.ptx(launch)


@compiler
@slow
def test_every_instance_compiles():
    for launch in texts(every_call()):
        assert ".entry" in cuda_compilers.ptx(launch), launch.name


@compiler
def test_errors_in_a_text_are_reported():
    with recorded() as found:
        one_warp("y[0] = nothing;")
    with pytest.raises(SyntaxError, match="nothing"):
        cuda_compilers.ptx(found[0])


# ---- the text on the CPU


@pytest.fixture
def on_host():
    with recorded(cuda_compilers.run_on_host) as found:
        yield found
    assert found


@host
@pytest.mark.parametrize("columns", [64, 2048, *slow_ones(128, 256, 512, 1024, 2880)])
def test_rotation_on_the_cpu(rng, on_host, columns):
    check_rotate(rng, 3, columns - 5, mx.float16, mx.float32)


@host
@pytest.mark.parametrize("tokens", [1, 5, *slow_ones(8)])
def test_experts_on_the_cpu(rng, on_host, tokens):
    dtype = {1: mx.float16, 5: mx.bfloat16, 8: mx.float32}[tokens]
    check_experts(rng, tokens, dtype, d=136, middle=104, length=16)
    assert len(on_host) == 4


@host
@slow
@pytest.mark.parametrize("name", metal.ACTIVATIONS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("tokens", [1, 8])
def test_every_activation_and_length_on_the_cpu(rng, on_host, name, length, tokens):
    check_experts(rng, tokens, mx.float32, d=136, middle=104, length=length, name=name, bias=tokens == 8)


@host
@slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_every_instance_of_qmv_on_the_cpu(rng, on_host, dtype, length, tokens):
    check_qmv(rng, tokens, dtype, d=70, middle=520, length=length)


@host
@pytest.mark.parametrize("dtype", [mx.bfloat16, *slow_ones(mx.float16, mx.float32)], ids=str)
@pytest.mark.parametrize("length", [12, *slow_ones(14, 16)])
def test_dense_matrices_on_the_cpu(rng, on_host, dtype, length):
    check_dequantize(rng, dtype, d=136, middle=104, length=length)


@host
@pytest.mark.parametrize("tokens", [1, *slow_ones(5)])
@pytest.mark.parametrize("coding", [CODINGS[0], *slow_ones(*CODINGS[1:3], CODINGS[4])], ids=name_of)
def test_codewords_on_the_cpu(rng, on_host, coding, tokens):
    check_codewords(rng, tokens, mx.float16 if tokens == 1 else mx.bfloat16, coding)


@host
@pytest.mark.parametrize("coding", [CODINGS[0], *slow_ones(*CODINGS[1:3], CODINGS[4])], ids=name_of)
def test_dense_codewords_on_the_cpu(rng, on_host, coding):
    check_dense_codewords(rng, mx.float16, coding)


@host
@pytest.mark.parametrize("count", [1000, *slow_ones(1, 70000)])
def test_tiles_on_the_cpu(rng, on_host, count):
    check_tiles(rng, count)


@host
@slow
def test_prefill_on_the_cpu(rng, on_host):
    check_prefill(rng, mx.float32, d=136, middle=104, length=12)


@host
@pytest.mark.parametrize("rate", [2, 6, *slow_ones(1, 3, 4, 5, 7)])
def test_encoder_on_the_cpu(rng, on_host, rate):
    check_encoder(rng, rate, 12, tiles=1)


@host
@slow
@pytest.mark.parametrize("rate", [1, 4, 7])
def test_encoder_of_long_codes_on_the_cpu(rng, on_host, rate):
    check_encoder(rng, rate, 16, tiles=1)


@host
def test_waiting_for_threads_that_never_come_is_an_error():
    with recorded(cuda_compilers.run_on_host), pytest.raises(RuntimeError, match="never come"):
        one_warp("if (thread_index_in_threadgroup < 16) simdgroup_barrier(mem_flags::mem_threadgroup); y[0] = x[0];")
