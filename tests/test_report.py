"""The report in a converted directory: figures, card, pictures, and a manifest that stays right."""

import builtins
import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from commands import refusal
from huggingface_hub import metadata_load
from mlx_lm.utils import load_model

from tiny_qmoe_mlx import budget, container, container_writer, evaluate, models, native, staging, verify
from tiny_qmoe_mlx.codecs import trellis
from tiny_qmoe_mlx.conversion import writer
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.report import card, compare, plots, tasks
from tiny_qmoe_mlx.report import write as report

pytest_plugins = ["command_fixtures"]
pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
SMALL = report.Extent(tokens=200, window=50, tasks=1, layer_tokens=40)
drawn = pytest.mark.skipif(not plots.available(), reason="needs matplotlib")


@pytest.fixture
def model(converted, tmp_path) -> Path:
    """A converted model whose conversion has written no report."""
    directory = Path(shutil.copytree(converted, tmp_path / "model"))
    for name in ("README.md", "quality.json", "rates.png", "kl.png", "tiny_qmoe_manifest.json"):
        (directory / name).unlink(missing_ok=True)
    container_writer.write_manifest(directory)
    return directory


def problems(directory: Path) -> list:
    return list(verify.find_problems(directory))


# ---- measured


@pytest.fixture(scope="module")
def quality(converted, checkpoint, text) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "REPLY_TOKENS", 8)
        return report.measure(converted, checkpoint, text, SMALL)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_figures_are_those_of_evaluate(quality, converted, checkpoint, text, here):
    line = ("--model", converted, "--against", checkpoint, "--text", text, "--window", 50, "--tokens", 200, "--json")
    found = json.loads(here("evaluate", *line).out)
    assert quality["kl"] == {name: found[f"kl_{name}"] for name in ("mean", "median", "p99")}
    assert quality["converted"]["perplexity"] == found["perplexity"] and quality["top1"] == found["top1"]
    assert quality["original"]["perplexity"] == found["against_perplexity"]
    assert quality["text"] == {"source": "text.txt", "tokens": 200, "window": 50}
    for who in ("original", "converted"):
        assert all(quality[who][key] == 0 for key in ("json_validity", "json_correct", "tool_call_pass"))
    assert quality["tasks"]["of_a_kind"] == 1 and 0 <= quality["tasks"]["agreement"] <= 1
    assert {"tiny_qmoe_mlx", "mlx", "mlx_lm", "python"} <= quality["versions"].keys()


def test_the_kl_of_one_layer(quality, converted, checkpoint, text):
    """Against plain mlx-lm with one layer's decoded weights put into the original."""
    tokenizer = models.open_tokenizer(converted)
    ids = tokenizer.encode(text.read_text(), add_special_tokens=False)[:41]
    dense = tiny_models.dense_experts(container.open_model(converted))

    def logits(layers: list[int]) -> np.ndarray:
        model, _ = load_model(checkpoint)
        model.set_dtype(mx.float32)
        own = [(n, mx.array(w)) for n, w in dense.items() if any(f"layers.{i}." in n for i in layers)]
        model.load_weights(own, strict=False)
        return log_softmax(np.array(model(mx.array([ids[:-1]]))[0]))

    p = logits([])
    wanted = [float((np.exp(p) * (p - logits([layer]))).sum(-1).mean()) for layer in (1, 2)]
    assert [row["layer"] for row in quality["layers"]] == [1, 2]
    assert [row["kl"] for row in quality["layers"]] == pytest.approx(wanted, rel=1e-3)  # float32, seen: 1e-5


def test_the_original_writes_the_text_where_none_is_given(converted, checkpoint):
    extent = report.Extent(tokens=96, window=32, tasks=0, layer_tokens=0)
    found = report.measure(converted, checkpoint, None, extent)
    assert found["text"] == {"source": "self", "seed": report.OWN_SEED, "tokens": 96, "window": 32}
    assert found["kl"]["mean"] > 0 and "tasks" not in found and "layers" not in found
    assert found["kl"] == report.measure(converted, checkpoint, None, extent)["kl"]


def test_an_original_larger_than_memory_is_read_layer_by_layer(quality, converted, checkpoint, text, monkeypatch):
    needed = budget.split(container.open_model(converted), 1 << 40, tasks.CONTEXT).min_budget_bytes
    monkeypatch.setattr(writer, "available_bytes", lambda: needed + 10_000)
    found = report.measure(converted, checkpoint, text, SMALL)
    assert found["kl"] == quality["kl"] and found["original"] == {"perplexity": quality["original"]["perplexity"]}
    assert found["tasks"]["agreement"] is None and "layers" not in found
    with pytest.raises(ValueError, match=r"does not fit this machine's memory .* give --text FILE"):
        report.measure(converted, checkpoint, None, SMALL)


def test_a_layer_that_was_read_once_is_gone(checkpoint):
    """The peak of a pass is one layer: the weights of those before it have been let go."""
    alive = []
    used_once = compare._used_once

    def watched(kind):
        class Watched(used_once(kind)):
            def __call__(self, *args, **kwargs):
                before = bool(self.parameters())
                y = super().__call__(*args, **kwargs)
                alive.append((before, bool(self.parameters())))
                return y

        return Watched

    tokens = mx.array([[1, 2, 3]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "_used_once", watched)
        found = compare.Reread(checkpoint)(tokens)
    assert alive == [(True, False)] * 3
    whole, _ = evaluate.open_any(str(checkpoint), quiet=True)
    assert np.array_equal(np.array(found), np.array(whole(tokens)))


# ---- written


def test_a_report_is_covered_and_the_rest_is_not_blessed(model, quality):
    damaged = next(p for p in model.glob("model*.safetensors") if "experts" not in p.name)
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    before = problems(model)
    assert len(before) == 1 and before[0].file == damaged.name
    report.write_report(model, None, quality)
    assert problems(model) == before
    data[-1] ^= 1
    damaged.write_bytes(data)
    assert problems(model) == []
    assert report.read_quality(model) == quality
    (model / "quality.json").write_text("{}")
    assert [p.file for p in problems(model)] == ["quality.json"]


class Killed(BaseException):
    pass


def test_a_report_that_is_killed_leaves_a_model(model, quality, monkeypatch):
    """At every file that is renamed into place, before and after."""
    report.write_report(model, None, quality)
    changed = {**quality, "top1": 0.123}
    real, moments = os.replace, 0

    for moment in range(100):
        count = 0

        def replace(a, b, last=moment):
            nonlocal count
            if count == last:
                raise Killed
            count += 1
            real(a, b)
            if count == last:
                raise Killed

        monkeypatch.setattr("tiny_qmoe_mlx.staging.os.replace", replace)
        try:
            report.write_report(model, None, changed)
        except Killed:
            moments += 1
            assert problems(model) == []
            models.open_tokenizer(model)
            continue
        break
    assert moments >= 5 and report.read_quality(model)["top1"] == 0.123 and problems(model) == []


def test_layers_of_a_conversion_and_of_a_measurement_are_joined(model, quality):
    (model / "tiny_qmoe_manifest.json").unlink()  # a conversion writes its report before the manifest
    rows = [{"layer": layer, "relative_error": 0.1 * layer, "bits": 3.0} for layer in (1, 2)]
    report.write_report(model, None, {"layers": rows}, made={"rest_bits": 8, "calibration": "/x"}, name="tiny-3bit")
    assert not (model / "tiny_qmoe_manifest.json").exists()
    text = (model / "README.md").read_text()
    assert "Not measured yet" in text and "| rest bits | 8 |" in text and "\n# tiny-3bit\n" in text
    container_writer.write_manifest(model)
    report.write_report(model, None, quality)
    found = report.read_quality(model)
    assert found["layers"] == [{**a, **b} for a, b in zip(rows, quality["layers"], strict=True)]
    text = (model / "README.md").read_text()
    assert (
        "/x" not in text
        and "| rest bits | 8 |" in text
        and f"mean **{quality['kl']['mean']:.4f}**" in text
        and problems(model) == []
    )


def test_figures_that_are_not_finite(model, quality):
    rows = [{"layer": 1, "kl": float("nan")}, {"layer": 2, "kl": 0.5}]
    report.write_report(model, None, {**quality, "kl": {**quality["kl"], "mean": float("inf")}, "layers": rows})
    found = report.read_quality(model)
    assert found["kl"]["mean"] is None and [row["kl"] for row in found["layers"]] == [None, 0.5]
    assert "mean **not finite**" in (model / "README.md").read_text() and problems(model) == []


def test_without_matplotlib_the_pictures_are_skipped_with_one_sentence(model, quality, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    assert report.write_report(model, None, quality) == [plots.MISSING]
    assert not list(model.glob("*.png")) and "![" not in (model / "README.md").read_text() and problems(model) == []


@drawn
def test_pictures(model, quality):
    assert report.write_report(model, None, quality) == []
    for name in ("rates.png", "kl.png"):
        assert (model / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in (model / "README.md").read_text()


def test_rates_are_those_of_the_records(converted):
    opened = container.open_model(converted)
    found = plots.layer_rates(opened)
    for index, layer in enumerate(opened.spec.layers):
        data, means = opened.expert_file(index).read_bytes(), []
        for e in range(layer.experts):
            start = opened.record_offset(index, e)
            record = np.frombuffer(data[start : start + layer.record_bytes], np.uint8)
            parsed = trellis.parse(record, layer.shapes, layer.bias, "test")
            sizes = [32 * m.payload.size / (m.payload.shape[0] * 32 * 64 * len(m.rates)) for m in parsed.matrices]
            means.append(sizes)
        assert found[index]["layer"] == layer.layer
        assert list(found[index]["bits"].values()) == pytest.approx(np.mean(means, 0), abs=1e-4)


# ---- the card


def test_the_card_tells_the_hub(model, checkpoint, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    (source / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage:\n- de\nbase_model: a/b\ntags: [x]\n---\n# A\n"
    )
    report.write_report(model, source)
    found = metadata_load(model / "README.md")
    assert (found["library_name"], found["pipeline_tag"]) == ("mlx", "text-generation")
    assert (found["license"], found["language"], found["base_model"]) == ("apache-2.0", ["de"], "a/b")
    assert str(checkpoint.parent) not in (model / "README.md").read_text(), "no paths of a machine"
    assert "mlx" in found["tags"] and "tiny-qmoe-mlx" in found["tags"]
    report.write_report(model)  # without the source, what was there stays
    assert metadata_load(model / "README.md") == found


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B"),
        ("/x/hub/models--Qwen--Qwen3-30B-A3B/snapshots/0123", "Qwen/Qwen3-30B-A3B"),
        ("/data/qwen", None),
    ],
)
def test_base_model(name, base):
    assert card.front_matter(None, name).get("base_model") == base


@pytest.mark.parametrize("text", ["", "---\nlicense: [\n---\n", "---\n- a\n---\n", "no front matter", "---\n\0\n---\n"])
def test_a_source_card_that_says_nothing(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert "license" not in card.front_matter(tmp_path, "x")


def test_what_a_person_wrote_into_the_card_stays(model, quality):
    report.write_report(model)
    path = model / "README.md"
    path.write_text(path.read_text().replace(card.BEGIN, f"Before.\n{card.BEGIN}") + "After.\n")
    assert report.write_report(model, None, quality) == [] or not plots.available()
    text = path.read_text()
    assert "Before.\n" in text and text.endswith("After.\n") and "KL divergence" in text
    path.write_text("# Mine\n")
    assert "README.md was left as it is" in report.write_report(model, None, quality)[-1]
    assert path.read_text() == "# Mine\n" and problems(model) == []


def test_machines_are_those_of_plan(converted):
    opened = container.open_model(converted)
    rows = card.machine_rows(opened)
    assert [gib for gib, *_ in rows] == [8, 16, 24, 32, 48, 64, 96, 128]
    assert all(mode == "resident" and share == 1 for _, _, mode, share in rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "MAC_GIB", (1, 2, 3))
        sizes = {1 << 30: 10, 2 << 30: None, 3 << 30: 1 << 40}
        least = budget.split(opened, 1 << 40, 1024, cpu=False)
        sizes[2 << 30] = (least.min_budget_bytes + least.resident_budget_bytes) // 2
        patch.setattr(budget, "parse_memory", lambda text, machine: sizes[machine])
        rows = card.machine_rows(opened)
    assert [row[2] for row in rows] == ["does not fit", "streamed", "resident"]
    assert rows[0][3] == 0 and 0 < rows[1][3] < 1 and rows[2][3] == 1


# ---- the command


class Certain:
    """A model that gives one token all of its trust."""

    def __init__(self, logit):
        self.logit = logit

    def __call__(self, inputs):
        return mx.zeros((1, inputs.shape[1], 9)) + self.logit * (mx.arange(9) == 0)


def test_a_perplexity_beyond_numbers():
    found = compare.evaluate(Certain(1e4), [[0, 1, 2]], Certain(1e4))
    assert found["nll"] == 1e4 and found["perplexity"] == found["against_perplexity"] == float("inf")
    assert json.dumps(staging.finite(found["perplexity"])) == "null" and found["kl_mean"] == 0
    with pytest.raises(ValueError, match="should predict probabilities, it gives NaN"):
        compare.evaluate(Certain(float("nan")), [[0, 1, 2]])


def test_evaluate_report(model, checkpoint, here):
    line = ("--window", 32, "--tokens", 64, "--tasks", 0)
    done = here("evaluate", "--model", model, "--against", checkpoint, "--report", *line)
    assert done.status == 0 and "KL mean" in done.out and done.err in ("", plots.MISSING + "\n")
    assert "that the original wrote itself" in (model / "README.md").read_text()
    assert here("verify", "--model", model).status == 0
    again = json.loads(here("evaluate", "--model", model, "--against", checkpoint, "--report", *line, "--json").out)
    assert again["kl"] == report.read_quality(model)["kl"]


def test_reports_that_cannot_be(model, checkpoint, here, tmp_path):
    assert "--text should name a text" in refusal(here("evaluate", "--model", model))
    assert "--report should have --against" in refusal(here("evaluate", "--model", model, "--report"))
    line = ("evaluate", "--report", "--against", checkpoint)
    assert "--tasks of at least 0" in refusal(here(*line, "--model", model, "--tasks", -1))
    assert "leave it out" in refusal(here(*line, "--model", model, "--memory", "1GB"))
    assert "unconverted checkpoint" in refusal(here(*line, "--model", checkpoint))
    assert "is converted already" in refusal(here("evaluate", "--report", "--model", model, "--against", model))
    assert "[text]" in refusal(here(*line, "--model", model, "--text", tmp_path / "none.txt"))
    other = tiny_models.make_checkpoint(tmp_path / "other", "qwen3_moe", num_experts=4)
    said = refusal(here("evaluate", "--report", "--model", model, "--against", other))
    assert (
        "other should be the original that was converted, its num_experts is 4, that of the converted model 8" in said
    )
    (model / "quality.json").write_text("[" * 10000)
    assert report.read_quality(model) == {}
    with pytest.raises(FormatError):
        report.write_report(checkpoint)
