"""Counts of the kernels at the shape of Qwen3-30B-A3B: issue slots, bytes, lanes. A model, not a measurement.

Slots are priced as tests/metal_cpu/profile.py says. Two row tiles of each launch are counted; the others are alike.
"""

import metal_cpu
import mlx.core as mx
import pytest
from metal_cases import make_case

from tiny_qmoe_mlx import metal, metal_encode
from tiny_qmoe_mlx.codecs import trellis

pytestmark = metal_cpu.required
D, MIDDLE, TILES = 2048, 768, 2
# Issue slots a weight of gate and up, rounded up from what was counted.
SLOTS = {1: 7.3, 2: 7.1, 3: 7.8, 4: 7.0, 5: 7.7, 6: 14.3, 7: 13.7}


def profile(case, fn, *arrays):
    _, report = case.run(metal_cpu.emulate, fn, *arrays, mode="profile", groups=(0, TILES))
    assert not report.problems, report
    return report.profile


def traffic(case, matrices, counted):
    """Bytes that must be read: two row tiles' payload, and the side information of the matrices."""
    out = 0
    for m in (case.records[0].matrices[i] for i in matrices):
        out += TILES * 4 * m.payload.shape[1] + 2 * 32 * TILES + trellis.side_bytes(m.rows, m.columns, False, False)
    return counted.buffers["pool"].lines / out


@pytest.mark.parametrize("rate", SLOTS)
def test_gate_and_up(rng, rate):
    case = make_case(rng, D, MIDDLE, experts=1, rates=[rate])
    ids = mx.zeros((8,), mx.uint32)
    fn = lambda r: lambda z, ids: metal.gather_gate_up(z, ids, r, case.layer, 1)  # noqa: E731
    counted = profile(case, fn, mx.ones((1, D)), ids)
    assert counted.per_weight(2 * TILES * 32 * D) <= SLOTS[rate]
    assert counted.lane_efficiency >= 0.95
    assert 0.97 <= traffic(case, (0, 1), counted) <= 1.03
    # Without any cache each simdgroup's own look at order and rates would count; that is 8 % at half a bit.
    pool = counted.buffers["pool"]
    assert pool.fetched <= (1.09 if rate < 3 else 1.03) * pool.compulsory


@pytest.mark.parametrize("rate", [4])
def test_down(rng, rate):
    case = make_case(rng, D, MIDDLE, experts=1, rates=[rate])
    ids = mx.zeros((8,), mx.uint32)
    fn = lambda r: lambda z, ids: metal.gather_qmv(z, ids, r, case.layer, 2, 1, mx.bfloat16)  # noqa: E731
    counted = profile(case, fn, mx.ones((8, MIDDLE)), ids)
    assert counted.per_weight(TILES * 32 * MIDDLE) <= 7.0
    assert counted.lane_efficiency >= 0.95
    assert 0.97 <= traffic(case, (2,), counted) <= 1.03


@pytest.mark.parametrize("shared, most", [(1, 7.4), (8, 19.7)])
def test_tokens_that_share_an_expert_share_its_decoding(rng, shared, most):
    """8 tokens cost 19 slots a weight where one costs 7: 2.4 a token."""
    case = make_case(rng, D, MIDDLE, experts=128, distinct=1, rates=[4])
    ids = mx.arange(8, dtype=mx.uint32) if shared == 1 else mx.zeros((8,), mx.uint32)
    fn = lambda r: lambda z, ids: metal.gather_gate_up(z, ids, r, case.layer, 8)  # noqa: E731
    counted = profile(case, fn, mx.ones((8, D)), ids)
    assert counted.per_weight(2 * TILES * 32 * D) <= most


def test_dense_decoder(rng):
    case = make_case(rng, D, MIDDLE, experts=1, rates=[4])
    fn = lambda r: lambda ids: metal.dequantize(ids, r, case.layer, 0, mx.float16)[0]  # noqa: E731
    counted = profile(case, fn, mx.zeros((8,), mx.uint32))
    assert counted.per_weight(TILES * 32 * D) <= 16.0
    assert counted.lane_efficiency >= 0.95
    assert counted.buffers["w"].written == TILES * 32 * D * 2


def test_encoder(rng):
    """About 42 slots for each state and step, 3200 a weight with L 12; 4 times that for 2 bits more of state."""
    rate, length = 4, 12
    x = mx.array(rng.normal(size=(1, 32, 16)).astype("float32"))
    _, report = metal_cpu.emulate(lambda x: metal_encode.search(x, rate, length), x, mode="profile")
    steps = 256 + 2 * (8 * length // rate)
    assert report.profile.per_weight(steps << length) <= 44
    assert report.profile.lane_efficiency >= 0.9
