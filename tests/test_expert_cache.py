"""Reading records, and the pool they live in."""

import os
import threading

import mlx.core as mx
import numpy as np
import pytest
import records
from mlx.nn import Module

from tiny_qmoe_mlx import container, metal
from tiny_qmoe_mlx.errors import BudgetError, FormatError
from tiny_qmoe_mlx.expert_kind import ExpertKind, expert_kind
from tiny_qmoe_mlx.streaming.cache import ExpertCache
from tiny_qmoe_mlx.streaming.demand import Demand, load_all
from tiny_qmoe_mlx.streaming.pool import PAGE, Pool
from tiny_qmoe_mlx.streaming.store import ExpertStore


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    records.write_model(directory, hidden=64, width=64, experts=6, layers=2, alignment=128, rates=[2])
    return container.open_model(directory)


def open_store(model):
    kinds = [expert_kind(layer, model.spec, Module()) for layer in model.spec.layers]
    return ExpertStore(model, kinds)


def bytes_of(model, layer, expert):
    size, start = model.spec.layers[layer].record_bytes, model.record_offset(layer, expert)
    return np.fromfile(model.expert_file(layer), np.uint8)[start : start + size]


@pytest.fixture
def cache(model):
    made = ExpertCache(open_store(model), {model.spec.layers[0].record_bytes: 4})
    yield made
    made.close()


def held(cache, layer, experts, size, cold=False):
    """Bytes of each expert while it is pinned."""
    found = {}
    with Demand(cache, layer, sorted(experts), cold) as demand:
        for group, offsets in demand:
            for expert, o in zip(group, offsets, strict=True):
                found[expert] = cache.pool_of_layer[layer].data[o : o + size].copy()
            demand.release(group)
    return [found[e] for e in experts]


def touch(cache, layer, *experts, cold=False):
    held(cache, layer, experts, 1, cold)


def test_acquired_bytes_are_the_files(model, cache):
    size = model.spec.layers[0].record_bytes
    for layer, experts in ((0, [1, 5]), (1, [0, 2]), (0, [3, 5, 1, 0])):
        for expert, got in zip(experts, held(cache, layer, experts, size), strict=True):
            np.testing.assert_array_equal(got, bytes_of(model, layer, expert))


def test_least_recently_used_leaves_first(cache):
    for expert in (0, 1, 2, 3, 0, 4):
        touch(cache, 0, expert)
    assert list(cache.pool_of_layer[0].order.used[0]) == [2, 3, 0, 4] and len(cache.pool_of_layer[0].slot_of) == 4
    assert (cache.hits, cache.misses) == (1, 5)


def test_pinned_experts_stay_and_their_bytes_do_not_change(model, cache):
    size = model.spec.layers[0].record_bytes
    with Demand(cache, 0, [0]) as demand:
        ((_, (offset,)),) = list(demand)
        kept = cache.pool_of_layer[0].data[offset : offset + size]
        assert demand.keep() == [0]
    for expert in (1, 2, 3, 4, 5, 1, 2):
        touch(cache, 0, expert)
    np.testing.assert_array_equal(kept, bytes_of(model, 0, 0))
    cache.unpin(0, [0])
    assert not cache.pool_of_layer[0].pins


def test_counters_are_records_times_size(model, cache):
    touch(cache, 1, 0, 1, 2)
    assert cache.store.records_read == 3 == cache.misses
    assert cache.store.bytes_read == 3 * model.spec.layers[1].record_bytes


def test_loading_all_counts_no_miss(model):
    size = model.spec.layers[0].record_bytes
    cache = ExpertCache(open_store(model), {size: 12})
    load_all(cache)
    touch(cache, 1, 0, 5)
    assert (cache.hits, cache.misses, cache.store.records_read) == (2, 0, 12)
    cache.close()


def test_pressure_moves_a_pool_between_its_bounds_slot_by_slot(model):
    """Steps may be smaller than a record; two pools would share them."""
    size = model.spec.layers[0].record_bytes
    cache = ExpertCache(open_store(model), {size: 10}, least={size: 3})
    (pool,) = cache.pools.values()
    assert [cache.shrink(1) for _ in range(8)] == [size] * 7 + [0] and pool.active == 3
    assert [cache.grow(1) for _ in range(2)] == [size] * 2 and pool.active == 5
    cache.resize({size: 6})
    assert cache.grow(100 * size) == 0 and pool.active == 6
    cache.resize({size: 10})
    assert pool.active == 10 and sorted(pool.free) == list(range(10))
    cache.close()


def test_slots_begin_at_a_page():
    assert Pool(4096, 3).data.ctypes.data % PAGE == 0


@pytest.mark.slow
def test_pool_beyond_two_gib_has_no_dimension_that_mlx_refuses():
    pool = Pool(1 << 20, 2200)  # takes its 2.3 GB of memory for a moment
    assert max(pool.array.shape) < 2**31 < pool.array.nbytes
    pool.slot(2199)[:] = 7
    assert (pool.data[-(1 << 20) :] == 7).all()


def test_pool_beyond_the_gpus_largest_buffer_is_refused(monkeypatch):
    monkeypatch.setattr(metal, "available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_buffer_length": 10_000})
    Pool(1024, 4)
    with pytest.raises(BudgetError, match="more than the 10000 that this GPU takes in one buffer"):
        Pool(1024, 16)


def damage(model, layer, offset):
    path = model.expert_file(layer)
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(bytes(data))


def test_damaged_record_is_refused_at_first_touch_and_leaves_no_pin(model, cache):
    damage(model, 0, model.record_offset(0, 2) + 300)
    with pytest.raises(FormatError, match=r"model-experts-00000.safetensors, expert 2\].*checksum"):
        touch(cache, 0, 1, 2)
    pool = cache.pool_of_layer[0]
    assert not pool.pins and len(pool.free) + len(pool.slot_of) == pool.slots


def test_record_that_fits_its_checksum_but_not_the_config_is_refused(model):
    kinds = [
        ExpertKind((("gate_proj", 64, 32), *layer.matrices[1:]), False, 12, 0, 0, Module())
        for layer in model.spec.layers
    ]
    store = ExpertStore(model, kinds)
    with pytest.raises(FormatError, match="matrix 0 should be 64 x 32, the record says 64 x 64"):
        store.read(0, [0], [np.empty(model.spec.layers[0].record_bytes, np.uint8)])
    store.close()


def test_file_that_shrank_after_opening_is_refused(model, cache):
    path = model.expert_file(0)
    path.write_bytes(path.read_bytes()[: model.record_offset(0, 3) + 10])
    with pytest.raises(FormatError, match="expert 4 should end at byte"):
        touch(cache, 0, 4)


def test_reads_from_several_threads(model):
    store, size = open_store(model), model.spec.layers[0].record_bytes
    failures = []

    def work(seed):
        rng, buffer = np.random.default_rng(seed), np.empty(size, np.uint8)
        for _ in range(50):
            layer, expert = int(rng.integers(2)), int(rng.integers(6))
            store.read(layer, [expert], [buffer])
            if not np.array_equal(buffer, bytes_of(model, layer, expert)):
                failures.append((layer, expert))

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures and store.records_read == 200
    store.close()


def test_prefill_leaves_what_decoding_uses_and_reads_through_few_slots(cache):
    touch(cache, 0, 0, 1, 2)
    touch(cache, 1, 0, 1, 2, 3, 4, 5, cold=True)
    assert {(0, 0), (0, 1), (0, 2)} <= set(cache.pool_of_layer[0].slot_of)
    assert next(iter(cache.pool_of_layer[0].order.first))[0] == 1 and cache.misses == 9


def test_what_is_expected_is_read_or_dropped_and_counted(model):
    size = model.spec.layers[0].record_bytes
    cache = ExpertCache(open_store(model), {size: 12})
    cache.expect(1, [2, 4])
    touch(cache, 1, 2, 3)
    assert (cache.lookahead_used, cache.misses + cache.hits) == (1, 2) and cache.lookahead_reads in (1, 2)
    assert not cache._expected[1] and len(cache.pool_of_layer[0].free) + len(cache.pool_of_layer[0].slot_of) <= 12
    cache.close()


def test_pool_shrinks_and_grows_and_still_gives_the_files_bytes(model):
    size = model.spec.layers[0].record_bytes
    cache = ExpertCache(open_store(model), {size: 12})
    touch(cache, 0, *range(6))
    before = cache.pool_bytes
    assert cache.shrink(5 * size) == 5 * size == before - cache.pool_bytes
    for expert, got in zip(range(6), held(cache, 1, range(6), size), strict=True):
        np.testing.assert_array_equal(got, bytes_of(model, 1, expert))
    assert cache.grow(100 * size) == 5 * size and cache.pool_bytes == before
    touch(cache, 0, *range(6))
    cache.close()


def test_read_that_fails_twice_is_tried_again_and_then_told(model, cache, monkeypatch):
    real, failures = os.preadv, [2]

    def flaky(*args):
        failures[0] -= 1
        if failures[0] >= 0:
            raise OSError(5, "Input/output error")
        return real(*args)

    monkeypatch.setattr("tiny_qmoe_mlx.streaming.store.PAUSES", (0.0, 0.0))
    monkeypatch.setattr(os, "preadv", flaky)
    np.testing.assert_array_equal(held(cache, 0, [3], model.spec.layers[0].record_bytes)[0], bytes_of(model, 0, 3))
    assert cache.store.retries == 2
    failures[0] = 3
    with pytest.raises(OSError, match=r"expert 4 of model.layers.0.mlp.switch_mlp should be read, 3 tries failed"):
        touch(cache, 0, 4)
    touch(cache, 0, 4)  # the disk is back: nothing was lost


def test_short_reads_are_continued(model, cache, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: real(file, [views[0][:100]], at))
    for expert, got in enumerate(held(cache, 0, range(4), model.spec.layers[0].record_bytes)):
        np.testing.assert_array_equal(got, bytes_of(model, 0, expert))


def test_file_that_is_written_to_in_use_is_refused(model, cache):
    touch(cache, 0, 0)
    path = model.expert_file(0)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(FormatError, match="should stay as it was opened"):
        touch(cache, 0, 1)
