"""Whole experts through the emulator: all fused and unfused activations, prefill, shapes of real models."""

from contextlib import contextmanager

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest
from metal_cases import TOLERANCE, assert_close, float64, make_case, tokens

from tiny_qmoe_mlx import metal

pytestmark = metal_cpu.required
DTYPES = (mx.float16, mx.bfloat16, mx.float32)


@contextmanager
def emulated(**options):
    """Kernels of metal.py run in the emulator, with MLX's own operations between them; no problem may be reported."""
    builders = [f for name, f in vars(metal).items() if name.endswith("_kernel")]
    for build in builders:
        build.cache_clear()
    try:
        with metal_cpu.emulated_kernels(**options) as report:
            yield
    finally:
        for build in builders:
            build.cache_clear()
    assert not report.problems, report


def records_of(case):
    return metal.Records(mx.array(case.pool), mx.array(case.table), case.base)


def check_experts(case, x, ids, **options):
    with emulated(**options):
        y = metal.experts(x, mx.array(ids), records_of(case), case.layer)
    assert y.dtype == x.dtype
    assert_close(y, wanted(case, x, ids), TOLERANCE[x.dtype])


def wanted(case, x, ids):
    rows = float64(x).reshape(-1, x.shape[-1])
    of = ids.reshape(len(rows), -1)
    y = [[case.expert(int(e), row) for e in chosen] for row, chosen in zip(rows, of, strict=True)]
    return np.array(y).reshape(*ids.shape, -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", metal.ACTIVATIONS)
def test_fused_experts(rng, name, dtype):
    case = make_case(rng, d=136, middle=104, name=name, bias=name == "swiglu_oai", length=12)
    ids = rng.integers(0, 5, (1, 2, 3)).astype(np.uint32)
    check_experts(case, tokens(rng, 2, 136, dtype).reshape(1, 2, 136), ids, mode="check")


@pytest.mark.parametrize("name", ["silu", "relu2"])
def test_unfused_experts_call_the_modules_activation(rng, name):
    case = make_case(rng, d=136, middle=104, name=name, bias=True, length=12, fused=False)
    check_experts(case, tokens(rng, 2, 136, mx.float32), rng.integers(0, 5, (2, 3)).astype(np.uint32), mode="check")


@pytest.mark.parametrize("bias", [False, True])
def test_prefill_of_a_group_of_experts(rng, bias):
    case = make_case(rng, d=136, middle=104, bias=bias, length=12)
    x = tokens(rng, 9, 136, mx.float32)
    ids, place, rows = np.array([4, 1, 2], np.uint32), np.sort(rng.integers(0, 3, 20)), rng.integers(0, 9, 20)
    with emulated(mode="check"):
        z = metal.rotate(x, case.layer.bits_in, x.dtype)
        picks = (mx.array(rows), mx.array(place.astype(np.uint32)))
        y = metal.expert_group(z, *picks, mx.array(ids), records_of(case), case.layer)
    want = np.stack([case.expert(int(ids[p]), float64(x)[r]) for p, r in zip(place, rows, strict=True)])
    assert_close(y, want, TOLERANCE[mx.float32])


def test_a_layer_is_four_launches_and_no_evaluation(rng, monkeypatch):
    """A decode step is one graph: what comes out of the router goes into the kernels as it is."""
    case = make_case(rng, d=64, middle=32)
    records = records_of(case)
    case.layer.bits_in, case.layer.bits_mid  # noqa: B018 - made when the model is loaded

    def refuse(*_):
        raise AssertionError("evaluated")

    monkeypatch.setattr(mx, "eval", refuse)

    def step(x, gate):
        for _ in range(3):
            indices = mx.argpartition(-(x @ gate), 2, axis=-1)[..., :2]
            x = x + metal.experts(x, indices, records, case.layer).sum(-2)
        return x

    launches = metal_cpu.capture(step, mx.zeros((1, 64)), mx.zeros((64, 5)))
    names = [launch.name.removeprefix("custom_kernel_") for launch in launches]
    kernels = ["rotate", "trellis_gather_gate_up", "rotate", "trellis_gather_qmv"] * 3
    assert [n.startswith(k) for n, k in zip(names, kernels, strict=True)] == [True] * 12, names


@pytest.mark.parametrize("dtype", [mx.bfloat16], ids=str)
def test_qwen3_30b_a3b(rng, dtype):
    case = make_case(rng, d=2048, middle=768, experts=128, distinct=2, rates=[5, 4, 4, 3, 3, 2, 2, 1])
    check_experts(case, tokens(rng, 1, 2048, dtype), np.array([[5, 120]], np.uint32), mode="run")
    check_experts(case, tokens(rng, 1, 2048, dtype), np.array([[5]], np.uint32), mode="check")


@pytest.mark.slow
def test_qwen3_30b_a3b_with_8_tokens(rng):
    case = make_case(rng, d=2048, middle=768, experts=128, distinct=4, rates=[5, 4, 4, 3, 3, 2, 2, 1])
    ids = np.stack([rng.permutation(128)[:8] for _ in range(8)]).astype(np.uint32)
    check_experts(case, tokens(rng, 8, 2048, mx.float16), ids, mode="run", limit_s=600)


def test_gpt_oss(rng):
    case = make_case(rng, d=2880, middle=2880, experts=32, distinct=1, name="swiglu_oai", bias=True, rates=[4, 3, 6])
    check_experts(case, tokens(rng, 1, 2880, mx.bfloat16), np.array([[31]], np.uint32), mode="run", limit_s=600)


@pytest.mark.slow
def test_gpt_oss_in_check_mode(rng):
    case = make_case(rng, d=2880, middle=2880, experts=32, distinct=2, name="swiglu_oai", bias=True, rates=[4, 3, 6])
    ids = np.array([[31, 2, 0, 3]], np.uint32)
    check_experts(case, tokens(rng, 1, 2880, mx.bfloat16), ids, mode="check", limit_s=600)


@pytest.mark.slow
@pytest.mark.parametrize("d, middle, experts", [(4096, 14336, 8), (7168, 2048, 256)], ids=["mixtral", "deepseek_v3"])
def test_large_models(rng, d, middle, experts):
    case = make_case(rng, d=d, middle=middle, experts=experts, distinct=1, length=12, rates=[3, 3, 2, 2, 1])
    check_experts(case, tokens(rng, 1, d, mx.bfloat16), np.array([[1]], np.uint32), mode="check", limit_s=600)


@pytest.mark.parametrize("d, middle", [(33, 31), (1, 1), (65, 129)])
def test_sizes_that_fill_no_tile(rng, d, middle):
    case = make_case(rng, d=d, middle=middle, bias=True)
    check_experts(case, tokens(rng, 2, d, mx.float32), np.array([[0, 4], [4, 2]], np.uint32), mode="check")


def test_an_expert_whose_rates_are_all_0_gives_its_biases(rng):
    case = make_case(rng, d=96, middle=64, rates=[0], bias=True)
    check_experts(case, tokens(rng, 1, 96, mx.float32), np.array([[1]], np.uint32), mode="check")
