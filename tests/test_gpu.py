"""The kernels on a GPU, Metal or CUDA, against float64 references: every instance, at shapes of real models too.

Skipped where MLX computes on the CPU. On a Mac these are the tests marked `metal`; on a machine with an NVIDIA GPU
they run with MLX's CUDA build.
"""

import mlx.core as mx
import numpy as np
import pytest
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
    records_of,
)
from kernel_launches import COLUMNS, DTYPES, LENGTHS
from metal_cases import TOLERANCE, assert_close, make_case, tokens
from qmoe_records import CODINGS, name_of

from tiny_qmoe_mlx import cuda, metal
from tiny_qmoe_mlx.codecs import rotation

pytestmark = [] if cuda.available() else pytest.mark.metal
# Experts of Qwen3-30B-A3B, gpt-oss, Mixtral, DeepSeek-V3: (d, middle).
MODELS = {"qwen3": (2048, 768), "gpt-oss": (2880, 2880), "mixtral": (4096, 14336), "deepseek": (7168, 2048)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [*COLUMNS, 2880, 70])
def test_rotation(rng, columns, dtype):
    check_rotate(rng, 5, columns, dtype, mx.float32)
    check_rotate(rng, 5, columns, dtype, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("count", [1, 2, 8, 20])
@pytest.mark.parametrize("name", metal.ACTIVATIONS)
def test_experts(rng, name, count, length, dtype):
    check_experts(rng, count, dtype, d=136, middle=104, length=length, name=name, bias=count == 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("count", [1, 5])
def test_products(rng, count, length, dtype):
    check_qmv(rng, count, dtype, d=70, middle=520, length=length)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_dense_matrices_and_prefill(rng, length, dtype):
    check_dequantize(rng, dtype, d=136, middle=104, length=length)
    check_prefill(rng, dtype, d=136, middle=104, length=length)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("coding", CODINGS, ids=name_of)
def test_codewords(rng, coding, count, dtype):
    check_codewords(rng, count, dtype, coding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("coding", CODINGS, ids=name_of)
def test_dense_codewords(rng, coding, dtype):
    check_dense_codewords(rng, dtype, coding)


@pytest.mark.parametrize("count", [1, 1000, 65536, 5 * 65536 + 77])
def test_tiles(rng, count):
    check_tiles(rng, count)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rate", range(1, 8))
def test_encoder(rng, rate, length):
    check_encoder(rng, rate, length, tiles=3)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_shapes_of_real_models(rng, model):
    d, middle = MODELS[model]
    case = make_case(rng, d, middle, experts=2, rates=[2, 1, 3, 0, 4], bias=model == "gpt-oss", length=12)
    x = tokens(rng, 1, d, mx.float16)
    y = metal.experts(x, mx.array([[1, 0]], dtype=mx.uint32), records_of(case), case.layer)
    row = np.array(x[0].astype(mx.float32)).astype(np.float64)
    assert_close(y, np.stack([case.expert(1, row), case.expert(0, row)])[None], TOLERANCE[mx.float16])


def test_many_rows_are_rotated(rng):
    """More than 65535: a limit of CUDA's grids in y and z."""
    sign = rotation.signs(1, 2, 0, 64)
    x = tokens(rng, 70_000, 64, mx.float16)
    z = metal.rotate(x, metal.sign_bits(sign), mx.float16)
    want = rotation.rotate(np.array(x[-3:].astype(mx.float32)).astype(np.float64), sign)
    assert_close(z[-3:], want, TOLERANCE[mx.float16])


def test_four_launches_are_one_graph(rng):
    """Nothing is evaluated before the result is asked for, and ids may come from another operation."""
    case = make_case(rng, d=128, middle=64, experts=9)
    x, scores = tokens(rng, 1, 128, mx.float16), mx.random.normal((1, 9))
    ids = mx.argpartition(-scores, kth=1, axis=-1)[..., :2]
    y = metal.experts(x, ids, records_of(case), case.layer)
    assert y.shape == (1, 2, 128) and np.isfinite(np.array(y.astype(mx.float32))).all()
