"""Replays: each policy against a slow reference of its own, Belady against an exhaustive search; routing's traces."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import records
from mlx.nn import Module

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import policies  # noqa: E402
import replay  # noqa: E402

from tiny_qmoe_mlx.container import open_model  # noqa: E402
from tiny_qmoe_mlx.expert_kind import expert_kind  # noqa: E402
from tiny_qmoe_mlx.streaming import demand as demands  # noqa: E402
from tiny_qmoe_mlx.streaming import trace as traces  # noqa: E402
from tiny_qmoe_mlx.streaming.cache import ExpertCache  # noqa: E402
from tiny_qmoe_mlx.streaming.demand import Demand  # noqa: E402
from tiny_qmoe_mlx.streaming.store import ExpertStore  # noqa: E402


def random_calls(rng, count: int = 200, keys: int = 20, most: int = 4, cold: float = 0.1):
    sizes = rng.integers(1, most + 1, count)
    drawn = [
        sorted(rng.permutation(keys)[: 3 * n if c else n].tolist())
        for n, c in zip(sizes, rng.random(count) < cold, strict=True)
    ]
    return [(keys, len(keys) > most) for keys in drawn]


def slow_lru(calls, slots):
    """By the time of last use, searched for at each miss."""
    used, out, now = {}, [], 0
    for keys, cold in calls:
        parts = [[k] for k in keys] if cold else [keys]
        missed = 0
        for part in parts:
            absent = [k for k in part if k not in used]
            for k in [k for k in part if k in used] + absent:
                if k not in used and len(used) == slots:
                    used.pop(min((t, x) for x, t in used.items() if x not in part)[1])
                now += 1
                used[k] = now
            missed += len(absent)
        out.append(missed)
    return out


def slow_lfu_da(calls, slots):
    """By (uses + age at the time of use, time), searched for at each miss."""
    uses, rank, out, now, age = {}, {}, [], 0, 0
    for keys, cold in calls:
        missed = 0
        for part in [[k] for k in keys] if cold else [keys]:
            absent = [k for k in part if k not in rank]
            for k in [k for k in part if k in rank] + absent:
                if k not in rank and len(rank) == slots:
                    victim = min((r, x) for x, r in rank.items() if x not in part)[1]
                    age = rank.pop(victim)[0]
                    del uses[victim]
                now += 1
                uses[k] = uses.get(k, 0) + 1
                rank[k] = (age + uses[k], now)
            missed += len(absent)
        out.append(missed)
    return out


def slow_clock(calls, slots):
    """A queue of [key, used], the hand at its head."""
    ring, out = [], []
    for keys, cold in calls:
        missed = 0
        for part in [[k] for k in keys] if cold else [keys]:
            held = [x[0] for x in ring]
            for x in ring:
                x[1] = x[1] or x[0] in part
            for k in [k for k in part if k not in held]:
                missed += 1
                if len(ring) < slots:
                    ring.append([k, True])
                    continue
                while ring[0][1] or ring[0][0] in part:
                    head = ring.pop(0)
                    ring.append([head[0], head[0] in part and head[1]])
                ring.pop(0)
                ring.append([k, True])
        out.append(missed)
    return out


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("policy", "slow"), [(policies.Lru, slow_lru), (policies.LfuDa, slow_lfu_da), (policies.Clock, slow_clock)]
)
def test_a_policy_is_its_slow_reference(policy, slow, seed):
    rng = np.random.default_rng(seed)
    slots = int(rng.integers(4, 21))
    calls = random_calls(rng)
    state = policy(slots)
    assert [policies.serve(state, keys, cold) for keys, cold in calls] == slow(calls, slots)


def fewest_misses(calls, slots):
    """Over all ways to throw out: the least number of misses, by a search over the sets that a pool may hold."""
    best = {frozenset(): 0}
    for keys, cold in calls:
        for part in [[k] for k in keys] if cold else [keys]:
            need, found = frozenset(part), {}
            for held, cost in best.items():
                room, absent = held - need, need - held
                spare = slots - len(need)
                sizes = [min(spare, len(room))]  # throwing out more than must be never helps
                for kept in (c for n in sizes for c in itertools.combinations(sorted(room), n)):
                    after = need | frozenset(kept)
                    found[after] = min(found.get(after, 1 << 30), cost + len(absent))
            best = found
    return min(best.values())


@pytest.mark.parametrize("seed", range(30))
def test_belady_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    slots = int(rng.integers(2, 6))
    calls = random_calls(rng, 25, 8, 2, 0.15)
    found = policies.belady(calls, slots)
    assert sum(found) == fewest_misses(calls, slots)
    for policy in (policies.Lru, policies.LfuDa, policies.Clock):
        state = policy(slots)
        assert sum(policies.serve(state, keys, cold) for keys, cold in calls) >= sum(found)


def test_a_prefill_leaves_decode_its_experts():
    state = policies.ByStep(40)
    for key in range(40):
        policies.serve(state, [key], False)
    assert policies.serve(state, list(range(100, 200)), True) == 100
    kept = [key for key in range(40) if key in state.keys()]
    assert kept == list(range(10, 40))  # a quarter of the slots
    assert policies.serve(state, kept, False) == 0
    plain = policies.Lru(40)
    for keys, cold in [([k], False) for k in range(40)] + [(list(range(100, 200)), True)]:
        policies.serve(plain, keys, cold)
    assert not any(key in plain for key in range(40))


def test_a_prefill_fills_what_is_free_and_is_next_to_leave():
    state = policies.ByStep(6)
    policies.serve(state, [1, 2], False)
    assert policies.serve(state, [1, 10, 11, 12, 13], True) == 4
    assert {1, 2, 10, 11, 12, 13} <= set(state.keys())
    assert policies.serve(state, [20, 21, 22], False) == 3
    assert {1, 2} <= set(state.keys())


def engine_cache(folder: Path, slots: int, experts: int) -> ExpertCache:
    """The engine's cache over 2 layers of experts of noise, with one reader: what arrives does so in order."""
    if not folder.exists():
        records.write_model(folder, hidden=64, width=64, experts=experts, layers=2, alignment=128, rates=[0])
    opened = open_model(folder)
    kinds = [expert_kind(layer, opened.spec, Module()) for layer in opened.spec.layers]
    return ExpertCache(ExpertStore(opened, kinds), {opened.spec.layers[0].record_bytes: slots}, readers=1)


def engine_misses(cache: ExpertCache, layer: int, experts: list[int], cold: bool) -> int:
    before = cache.misses
    with Demand(cache, layer, experts, cold) as demand:
        for group, _ in demand:
            demand.release(group)
    return cache.misses - before


def layer_calls(rng, experts: int, count: int = 60):
    """(layer, experts, cold) of decode, of batches that may ask for more than there are slots, and of prefills."""
    for _ in range(count):
        kind = rng.choice(3, p=[0.6, 0.15, 0.25])
        size = int(rng.integers(1, [4, experts, experts][kind] + 1))
        yield int(rng.integers(2)), sorted(rng.permutation(experts)[:size].tolist()), bool(kind == 2)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("experts", "most", "group"), [(12, 19, 4), (48, 90, 64)], ids=["by fours", "by windows"])
def test_the_engines_policy_is_the_engine(tmp_path_factory, monkeypatch, experts, most, group, seed):
    """To the order of its slots. By fours: as many as a window of so few slots has. By windows: larger ones, where the
    engine too is made to wait for all of one, as a timing of its own would decide which of it leaves last.
    """
    monkeypatch.setattr(demands, "GROUP", group)
    monkeypatch.setattr(policies, "GROUP", group)
    rng = np.random.default_rng(seed)
    slots = int(rng.integers(1, most + 1))
    cache = engine_cache(tmp_path_factory.getbasetemp() / f"engine-{experts}", slots, experts)
    (pool,), state = cache.pools.values(), policies.ByStep(slots)
    for layer, asked, cold in layer_calls(rng, experts):
        expected = policies.serve(state, [layer * replay.STRIDE + e for e in asked], cold)
        assert engine_misses(cache, layer, asked, cold) == expected
        assert {at * replay.STRIDE + e for at, e in pool.slot_of} == set(state.keys())
        assert [at * replay.STRIDE + e for at, e in reversed(pool.order.first)] == list(state.first)
        for at, held in pool.order.used.items():
            assert [at * replay.STRIDE + e for e in held] == list(state.held.get(at, ()))
    assert cache.store.records_read == cache.misses
    cache.close()


def write_trace(path: Path, calls, experts=(20, 20, 10), sizes=(1024, 1024, 512)) -> traces.Trace:
    writer = traces.TraceWriter(path, traces.header({"model": "noise"}, list(experts), list(sizes)))
    for layer, chosen, cold in calls:
        writer.write(layer, np.array(chosen), cold)
    writer.close()
    return traces.read_trace(path)


def random_trace(path: Path, tokens: int = 50) -> traces.Trace:
    rng = np.random.default_rng(3)
    calls = [(layer, [rng.permutation(10)[:3] for _ in range(20)], True) for layer in range(3)]
    calls += [(layer, [rng.permutation(10)[:3]], False) for _ in range(tokens) for layer in range(3)]
    return write_trace(path, calls)


def test_figures_of_a_replay(tmp_path):
    found = random_trace(tmp_path / "t")
    whole = 40 * 1024 + 10 * 512
    every = replay.replay(found, whole)
    for name in ("lru", "lfu-da", "clock", "belady"):
        assert every[name]["prefill_bytes"] == 2 * 10 * 1024 + 10 * 512  # each expert that was used, once
        assert every[name]["hit_rate"] == 1 and every[name]["bytes_per_token"] == 0
    few = replay.replay(found, 0, least=3)
    assert few["belady"]["bytes_read"] <= few["lru"]["bytes_read"]
    assert 0 < few["belady"]["hit_rate"] < 1
    asked = replay.demands(found)
    slots = replay.pool_slots(found, 0, 3)
    assert slots == {1024: 3, 512: 3}
    by_hand = sum(
        slow_lru([(d.keys, d.cold) for d in asked if d.size == size and not d.cold], 3)[i] * size
        for size in slots
        for i in range(50 * (2 if size == 1024 else 1))
    )
    warm = [d for d in asked if not d.cold]
    assert int((replay.misses(warm, slots, "lru, prefill alike") * [d.size for d in warm]).sum()) == by_hand


def test_pools_are_split_as_a_run_splits_them(tmp_path):
    found = random_trace(tmp_path / "t")
    slots = replay.pool_slots(found, (40 * 1024 + 10 * 512) // 2, 3)
    assert sum(size * n for size, n in slots.items()) <= (40 * 1024 + 10 * 512) // 2
    assert slots[1024] >= 18 and slots[512] >= 4


def test_the_command(tmp_path):
    random_trace(tmp_path / "t")
    command = [sys.executable, str(BENCHMARKS / "replay.py"), str(tmp_path / "t"), "--pools", "30%,20KB", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "belady" in done.stdout and '"rows"' in done.stdout.splitlines()[-1]
    (tmp_path / "bad").write_text("no trace\n")
    bad = subprocess.run([*command[:2], str(tmp_path / "bad")], capture_output=True, text=True)
    assert bad.returncode == 1 and "Traceback" not in bad.stderr and "routing trace" in bad.stderr


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    found = random_trace(tmp_path / "t")
    replay.plot(replay.sweep(found, replay.pool_sizes(found, "20%,60%"), 3), tmp_path / "p.png", "t")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("seed", range(8))
def test_by_step_drops_the_oldest_of_the_layer_whose_turn_is_farthest(seed):
    """Against a plain list of what is held, searched whole; calls larger than the pool among them."""
    rng = np.random.default_rng(seed)
    layers, slots = 4, int(rng.integers(3, 14))
    policy, held, calls = policies.ByStep(slots), {}, [0] * layers
    for turn in range(120):
        layer = turn % layers
        keys = sorted((layer * policies.STRIDE + rng.permutation(8)[: rng.integers(1, 6)]).tolist())
        calls[layer] += 1
        want = sum(key not in held for key in keys)
        order = [key for key in keys if key in held] + [key for key in keys if key not in held]
        for key in order:
            if key not in held and len(held) == slots:
                ages = {k: calls[k // policies.STRIDE] - last for k, (last, _) in held.items()}
                turns = {k: (k // policies.STRIDE - layer - 1) % layers for k in held}
                own = {k: k // policies.STRIDE == layer for k in held}
                first = max(held, key=lambda k: (ages[k], not own[k], turns[k], -held[k][1]))
                del held[first]
            held[key] = (calls[layer], 100 * turn + order.index(key))
        assert policy.call(keys, False) == want
        assert set(policy.keys()) == set(held)
