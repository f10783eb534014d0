"""metal.py's functions against float64 references, wherever MLX's kernels run: on a GPU or a stand-in for one."""

import mlx.core as mx
import numpy as np
import pytest
from metal_cases import TOLERANCE, Case, assert_close, float64, make_case, tokens
from qmoe_records import random_record

from tiny_qmoe_mlx import metal, metal_encode, metal_qmoe, metal_rans, native
from tiny_qmoe_mlx.codecs import qmoe, rans, rotation

EXPERTS, TOP_K = 5, 2
ROTATED = 4e-7  # of max |z|: float32 sums of up to 2048 terms


def records_of(case: Case) -> metal.Records:
    return metal.Records(mx.array(case.pool), mx.array(case.table), case.base)


def router(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, EXPERTS, (count, TOP_K)).astype(np.uint32)


def check_rotate(rng, rows: int, columns: int, dtype: mx.Dtype, to: mx.Dtype) -> None:
    sign = rotation.signs(1, 2, 0, columns)
    x = tokens(rng, rows, columns, dtype)
    z = metal.rotate(x, metal.sign_bits(sign), to)
    assert z.dtype == to
    assert_close(z, rotation.rotate(float64(x), sign), ROTATED if to == mx.float32 else TOLERANCE[to])


def check_experts(rng, count: int, dtype: mx.Dtype, **shape) -> None:
    """Whole experts at all rates, fused."""
    case = make_case(rng, experts=EXPERTS, rates=range(8), **shape)
    x, ids = tokens(rng, count, shape["d"], dtype), router(rng, count)
    y = metal.experts(x, mx.array(ids), records_of(case), case.layer)
    want = np.array([[case.expert(int(e), row) for e in chosen] for row, chosen in zip(float64(x), ids, strict=True)])
    assert_close(y, want, TOLERANCE[dtype])


def check_qmv(rng, count: int, dtype: mx.Dtype, **shape) -> None:
    """The second matrix's shape: a row of z for each pick."""
    case = make_case(rng, experts=EXPERTS, rates=range(8), **shape)
    ids = router(rng, count).reshape(-1)
    z = rng.normal(size=(ids.size, rotation.padded_columns(shape["middle"]))).astype(np.float32)
    y = metal.gather_qmv(mx.array(z), mx.array(ids), records_of(case), case.layer, 2, count, dtype)
    assert_close(y, np.stack([case.product(int(e), 2, row) for e, row in zip(ids, z, strict=True)]), TOLERANCE[dtype])


def check_dequantize(rng, dtype: mx.Dtype, **shape) -> None:
    case = make_case(rng, experts=EXPERTS, rates=range(8), bias=True, **shape)
    weights, bias = metal.dequantize(mx.array([3, 0], dtype=mx.uint32), records_of(case), case.layer, 0, dtype)
    assert_close(weights, np.stack([case.matrix(e, 0) for e in (3, 0)]), TOLERANCE[dtype])
    rows = shape["middle"]
    assert_close(bias, np.stack([case.records[e].matrices[0].bias[:rows].astype(np.float64) for e in (3, 0)]), 0.0)


def check_prefill(rng, dtype: mx.Dtype, **shape) -> None:
    """A group of experts, each decoded once."""
    case = make_case(rng, experts=EXPERTS, rates=range(8), bias=True, **shape)
    x, ids = tokens(rng, 9, shape["d"], dtype), np.array([4, 1, 2], np.uint32)
    place, rows = np.sort(rng.integers(0, 3, 20)), rng.integers(0, 9, 20)
    z = metal.rotate(x, case.layer.bits_in, dtype)
    picks = mx.array(rows), mx.array(place.astype(np.uint32))
    y = metal.expert_group(z, *picks, mx.array(ids), records_of(case), case.layer)
    want = np.stack([case.expert(int(ids[p]), float64(x)[r]) for p, r in zip(place, rows, strict=True)])
    # Weights and hidden values are rounded to the model's type, too.
    assert_close(y, want, (1 if dtype == mx.float32 else 4) * TOLERANCE[dtype])


def check_codewords(rng, count: int, dtype: mx.Dtype, coding: qmoe.Coding) -> None:
    """Products from qmoe records, biases included."""
    shapes, experts = [(19, 150)], [0, 1, 2]
    own = [random_record(rng, coding, shapes, True, 0.6, more=0) for _ in experts]
    size = max(map(len, own))
    pool, table = np.stack([np.pad(r, (0, size - len(r))) for r in own]), np.array(experts, np.uint32) * (size // 128)
    x, ids = tokens(rng, count, 150, dtype), rng.integers(0, 3, (count, 2)).astype(np.uint32)
    records, layer = metal.Records(mx.array(pool), mx.array(table)), metal_qmoe.Shapes(coding, shapes[0], True)
    y = metal_qmoe.gather_qmv(x, mx.array(ids.reshape(-1)), records, layer, 0, count)
    want = []
    for p, e in enumerate(ids.reshape(-1)):
        (m,) = qmoe.parse(own[e], shapes, True, coding, "here")
        want.append(qmoe.decode_matrix(m, coding).astype(np.float64) @ float64(x)[p // 2] + m.bias)
    assert_close(y, np.stack(want), TOLERANCE[dtype])


def check_dense_codewords(rng, dtype: mx.Dtype, coding: qmoe.Coding) -> None:
    """Matrices of listed experts, written out."""
    shapes = [(19, 150)]
    own = random_record(rng, coding, shapes, True, 0.6, more=0)
    records = metal.Records(mx.array(own[None]), mx.zeros((1,), mx.uint32))
    layer = metal_qmoe.Shapes(coding, shapes[0], True)
    weights, bias = metal_qmoe.dequantize(mx.array([0, 0], dtype=mx.uint32), records, layer, 0, dtype)
    (m,) = qmoe.parse(own, shapes, True, coding, "here")
    want = float64(mx.array(qmoe.decode_matrix(m, coding)).astype(dtype))
    assert_close(weights, np.stack([want, want]), 0.0)
    assert_close(bias, np.stack([m.bias, m.bias]).astype(np.float64), 0.0)


def check_tiles(rng, count: int) -> None:
    """rANS, bit for bit, and a fault where a word is another."""
    symbols = np.clip(np.rint(rng.normal(128, 20, count)), 0, 255).astype(np.uint8)
    payload = rans.encode(symbols).pack()
    for damage in (0, 1):
        payload[-2:] ^= np.uint8(damage)
        coded = rans.parse(payload, count, "here")
        out, faults = metal_rans.decode(mx.array(payload), 0, 0, len(payload), coded, count)
        assert np.array(faults).any() == bool(damage)
        assert (np.array(out) == symbols).all() or damage


def check_encoder(rng, rate: int, length: int, tiles: int) -> None:
    """Codes equal to the C++ encoder's, bit for bit."""
    if not native.available():
        pytest.skip("the C++ library was not built")
    x = rng.normal(size=(tiles, 32, 16)).astype(np.float32)
    codes, values = metal_encode.encode_tiles(x, rate, length)
    want_codes, want_values = native.encode_tiles(x, rate, length)
    np.testing.assert_array_equal(codes, want_codes)
    np.testing.assert_array_equal(values, want_values)
