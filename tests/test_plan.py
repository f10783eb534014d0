"""Plans: expected hits against replays and exact sums, times that add up, and a plan beside its run."""

import itertools
import json
import math
import subprocess
from collections import OrderedDict

import numpy as np
import pytest
import records
from commands import refusal

from tiny_qmoe_mlx import budget, container, footprint, forecast, speed
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.plan import plan
from tiny_qmoe_mlx.streaming import expected, profile, trace

pytest_plugins = ["command_fixtures", "hub_server"]


@pytest.fixture
def model(tmp_path):
    records.write_model(tmp_path / "model", hidden=64, width=64, experts=6, layers=2, alignment=128, rates=[2])
    return container.open_model(tmp_path / "model")


def recorded(model, path, tokens=60, seed=0):
    """A trace of the model: a prefill of a few tokens, then one token a call."""
    rng, layers = np.random.default_rng(seed), model.spec.layers
    sizes = [layer.experts for layer in layers], [layer.record_bytes for layer in layers]
    writer = trace.TraceWriter(path, trace.header(profile.identity(model), *sizes))
    for call in range(tokens):
        for i, layer in enumerate(layers):
            chosen = [rng.permutation(layer.experts)[:2] for _ in range(5 if call == 0 else 1)]
            writer.write(i, np.array(chosen), call == 0)
    writer.close()
    return path


# ---- hits


def test_a_replay_is_that_of_a_plain_list(model, tmp_path):
    """Against dictionaries that are searched whole: the layer's step of each use, and what a prefill left behind."""
    found = trace.read_trace(recorded(model, tmp_path / "t"))
    (size,) = {layer.record_bytes for layer in model.spec.layers}
    for slots in (2, 5, 8, 12):
        used, loose, steps, now, hits, asked = {}, [], [0, 0], itertools.count(), 0, 0
        for call in found.calls:
            layer, keys = call.layer, [(call.layer, e) for e in sorted(set(call.chosen.ravel().tolist()))]
            there = [key for key in keys if key in used or key in loose]
            hits, asked = hits + len(there) * (not call.cold), asked + len(keys) * (not call.cold)
            steps[layer] += not call.cold
            for key in there if not call.cold else ():
                loose = [other for other in loose if other != key]
                used[key] = steps[layer], next(now)
            for key in [key for key in keys if key not in there]:
                if len(used) + len(loose) == slots and loose:
                    loose.pop()
                elif len(used) == slots:
                    # the oldest in steps of its layer, then the other layer's before its own, then the one used first
                    age = {k: (steps[k[0]] - step, k[0] != layer, -time) for k, (step, time) in used.items()}
                    del used[max(age, key=age.get)]
                loose += [key] * call.cold
                used |= {} if call.cold else {key: (steps[layer], next(now))}
        assert expected.from_trace(found, {size: slots}) == pytest.approx(hits / asked)
    assert expected.from_trace(found, {size: 12}) > expected.from_trace(found, {size: 5}) > 0


def test_a_profile_gives_what_independent_requests_find(model):
    """Against a simulated LRU cache that is asked at the profile's rates."""
    rng = np.random.default_rng(1)
    use = [rng.integers(1, 200, 6) for _ in model.spec.layers]
    (size,) = {layer.record_bytes for layer in model.spec.layers}
    rates = np.concatenate(use) / np.concatenate(use).sum()
    for slots in (3, 6, 9):
        held, hits, draws = OrderedDict(), 0, rng.choice(12, 40_000, p=rates)
        for key in draws.tolist():
            hits += key in held
            held[key] = None
            held.move_to_end(key)
            if len(held) > slots:
                held.popitem(last=False)
        assert expected.from_profile(use, model, {size: slots}) == pytest.approx(hits / len(draws), abs=0.02)
    assert expected.from_profile(use, model, {size: 12}) == 1
    assert expected.from_profile([0 * row for row in use], model, {size: 6}) == 0


def test_the_curve_begins_where_a_token_fits_and_ends_at_all():
    assert expected.from_curve(0.1, 0.2) == 0 and expected.from_curve(1.0, 0.2) == 1
    assert expected.from_curve(0.5, 8 / 128) == pytest.approx(0.719)
    rates = [expected.from_curve(share, 0.25) for share in np.linspace(0.25, 1, 20)]
    assert rates == sorted(rates) and rates[0] > 0.2
    assert expected.from_curve(0.5, 1.0) == 0 and expected.from_curve(1.0, 1.0) == 1


def test_hits_come_from_the_best_source_and_only_from_the_models_own(model, tmp_path):
    other = tmp_path / "other"
    records.write_model(other, hidden=64, width=64, experts=5, layers=2, alignment=128, rates=[2])
    theirs = container.open_model(other)
    (size,) = {layer.record_bytes for layer in model.spec.layers}
    mine = recorded(model, tmp_path / "mine.trace")
    profile.save_profile(tmp_path / "p", model, [np.arange(6), np.arange(6)], 30)
    assert forecast.hit_rate(model, {size: 6}, tmp_path / "p", mine)[1].startswith("a replay of")
    assert forecast.hit_rate(model, {size: 6}, tmp_path / "p", None)[1].startswith("the profile")
    assert forecast.hit_rate(model, {size: 6}, None, None)[1].startswith("the curve")
    for files in ((None, mine), (tmp_path / "p", None)):
        with pytest.raises(FormatError, match="model"):
            forecast.hit_rate(theirs, {size: 6}, *files)


# ---- times


def test_a_forecast_is_the_sum_of_its_parts(model, monkeypatch):
    """With probes of known answers: the disk, the experts, the memory and the processor bind in turn."""
    low = budget.split(model, 1 << 50).min_budget_bytes
    part = budget.split(model, low)
    token = forecast.bytes_of_token(model)
    assert token == sum(
        min(footprint.top_k(model.config), layer.experts) * layer.record_bytes for layer in model.spec.layers
    )
    monkeypatch.setattr(speed, "dense", lambda container: 0.010)
    for experts_s, rate, bandwidth, limit in (
        (0.005, token / 0.080, 1e12, "disk"),
        (0.050, token / 0.080, 1e12, "CPU"),
        (0.050, token / 0.080, (token + part.weight_bytes) / 0.055, "memory"),
    ):
        monkeypatch.setattr(speed, "experts", lambda container, k, s=experts_s: s)
        monkeypatch.setattr(speed, "memory_bandwidth", lambda b=bandwidth: b)
        found = forecast.forecast(model, part, 0.5, rate)
        assert found["disk_s"] == pytest.approx(0.040) and found["bytes_per_token"] == token / 2
        assert found["tokens_per_s"] == pytest.approx(1 / (0.010 + max(experts_s, 0.040)))
        assert found["limit"] == limit
    whole = budget.split(model, 1 << 50)
    assert forecast.forecast(model, whole, 1.0, 1.0)["bytes_per_token"] == 0


def test_probes_measure_something(converted):
    model = container.open_model(converted)
    assert speed.disk(model, 0.05) > 0
    assert speed.experts(model, 2) > 0
    assert speed.dense(model) > 0
    assert speed.memory_bandwidth() > 0


def test_the_dense_probe_multiplies_the_models_own_matrices(converted, monkeypatch):
    """The matrices of a layer in the middle, once for each layer's weights, and the output layer."""
    model = container.open_model(converted)
    seen = []
    monkeypatch.setattr(speed, "_seconds_of", lambda names, tensors, small_ops: seen.append(names) or 1.0)
    tensors = footprint.tensor_sizes(model)
    layers = speed._by_layer(footprint.matrices(model))
    middle = layers[sorted(layers)[len(layers) // 2]]
    assert len(layers) == model.config["num_hidden_layers"] and len(middle) >= 4
    words = {
        name: 4 if name.removesuffix("weight") + "scales" in tensors else 1 for name in tensors
    }  # of 8-bit weights
    weights = {name: words[name] * math.prod(tensors[name][1]) for name in tensors}
    ratio = sum(weights[n] for names in layers.values() for n in names) / sum(weights[n] for n in middle)
    assert speed.dense(model) == pytest.approx(1 + ratio)
    assert seen[0] == middle and len(seen[1]) == 1


# ---- the command


def test_a_check_that_fails_is_one_sentence(converted, here, monkeypatch):
    assert "a --context of at least 2" in refusal(here("plan", "--model", converted, "--check", "--context", 1))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, -9, b"", b"error: no\n"))
    said = refusal(here("plan", "--model", converted, "--check", "--no-probe"))
    assert said.endswith("the run of --check failed, status -9: error: no")


def test_a_plan_stands_beside_its_run(converted, here):
    sizes = json.loads(here("plan", "--model", converted, "--context", 128, "--no-probe", "--json").out)
    assert "tokens_per_s" not in sizes and sizes["mode"] == "resident" and sizes["hit_rate"] == 1
    done = here(
        "plan", "--model", converted, "--context", 128, "--memory", sizes["min_budget_bytes"], "--check", "--json"
    )
    assert done.status == 0 and done.err == ""
    found = json.loads(done.out)
    rows = {row["what"]: row for row in found["check"]}
    assert set(rows) == {"peak_memory_bytes", "hit_rate", "bytes_per_token", "tokens_per_s"}
    for row in rows.values():
        assert (
            row["error"] == pytest.approx(row["measured"] / row["planned"] - 1)
            if row["planned"]
            else row["error"] is None
        )
    assert rows["peak_memory_bytes"]["measured"] <= 1.05 * found["budget_bytes"]
    parts = ("runtime_bytes", "weight_bytes", "kv_bytes", "scratch_bytes", "pool_bytes")
    assert rows["peak_memory_bytes"]["planned"] == sum(found[part] for part in parts) <= found["budget_bytes"]


def test_a_plan_in_words(converted, here):
    done = here("plan", "--model", converted, "--context", 128)
    assert done.status == 0 and "tokens/s, bound by the" in done.out and "hits expected" not in done.out
    low = json.loads(here("plan", "--model", converted, "--context", 128, "--no-probe", "--json").out)[
        "min_budget_bytes"
    ]
    done = here("plan", "--model", converted, "--context", 128, "--memory", low)
    assert "hits expected from the curve of another model's routing" in done.out and "MB read at" in done.out


# ---- a model on the hub


def test_a_model_on_the_hub_is_planned_from_its_headers(hub, run, tmp_path):
    """The same figures as of the model here; a twentieth of its bytes or less are fetched, and none are left."""
    model = tmp_path / "here"
    records.write_model(model, hidden=256, width=512, experts=96, layers=2, alignment=4096, rates=[4] * 20)
    hub.repositories["org/big"] = model
    whole = plan(model, memory=(low := plan(model, probe=False)["min_budget_bytes"]), probe=False)
    done = run("plan", "--model", "org/big", "--memory", low, "--json")
    assert done.status == 0 and done.err == "", done
    found = json.loads(done.out)
    assert found["path"] == "org/big" and found["disk_bytes_per_s"] > 0 and found["tokens_per_s"] > 0
    assert {**whole, "path": "org/big"}.items() <= found.items()
    assert 0 < hub.sent < whole["file_bytes"] / 20
    assert {p.name for p in tmp_path.iterdir()} <= {"here", "hub", "cache"}


@pytest.mark.parametrize("change", ["--check", "missing", "unconverted"])
def test_what_cannot_be_planned_on_the_hub(hub, run, tmp_path, checkpoint, change):
    hub.repositories["org/name"] = checkpoint
    if change == "--check":
        assert "--check should be given a model on this machine" in refusal(
            run("plan", "--model", "org/name", "--check")
        )
    elif change == "missing":
        assert "not on the hub" in refusal(run("plan", "--model", "org/none"))
    else:
        assert "convert" in refusal(run("plan", "--model", "org/name"))


def test_headers_alone_are_planned_like_the_model(converted, tmp_path):
    """The disk is probed where it is told to be; what is not measured is the same."""
    low = plan(converted, context=128, probe=False)["min_budget_bytes"]
    whole = plan(converted, context=128, memory=low, probe=False)
    there = plan(converted, context=128, memory=low, disk_folder=tmp_path)
    assert there["disk_bytes_per_s"] > 0 and not list(tmp_path.iterdir())
    assert whole.items() <= there.items()


@pytest.mark.parametrize("shape", [[], [0], [8, 0], [0, 0]], ids=str)
def test_scales_of_no_columns_break_no_plan(converted, monkeypatch, shape):
    """From a stranger's headers: `load` refuses such a model, a plan counts its matrices as they lie."""
    sizes = footprint.tensor_sizes(container.open_model(converted))
    hostile = {name: (dtype, shape if name.endswith(".scales") else s) for name, (dtype, s) in sizes.items()}
    assert hostile != sizes
    monkeypatch.setattr(footprint, "tensor_sizes", lambda opened: hostile)
    found = plan(converted, context=128)
    assert found["fits"] and found["tokens_per_s"] > 0
    quantized = [n for n in sizes if n.endswith(".scales")]
    for name in quantized:
        rows, columns, bits = footprint.matrices(container.open_model(converted))[
            name.removesuffix("scales") + "weight"
        ]
        assert bits == 0 and [rows, columns] == sizes[name.removesuffix("scales") + "weight"][1]


def test_a_model_that_takes_more_experts_than_it_has_is_probed_with_those_it_has(converted):
    model = container.open_model(converted)
    assert speed.experts(model, 1 << 40) > 0


def test_a_trace_that_is_not_there_says_what_writes_one(here, converted, tmp_path):
    sentence = refusal(here("plan", "--model", converted, "--trace", tmp_path / "none"))
    assert "there is no such trace; a run with --trace writes one" in sentence and "none" in sentence


def test_a_revision_is_the_hubs(here, converted):
    assert "leave --revision out" in refusal(here("plan", "--model", converted, "--revision", "x"))
