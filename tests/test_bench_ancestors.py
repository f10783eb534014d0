"""What bench_ancestors.py prints: of QMoE, beside the paper's figures; its table and dense models, at a tiny size."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import source_layouts
import tiny_models

from tiny_qmoe_mlx import native

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import ancestors_dense as dense  # noqa: E402
import ancestors_qmoe as a  # noqa: E402
import ancestors_table as table  # noqa: E402
import bench_quality  # noqa: E402
import dense_directories  # noqa: E402


def test_random_matrices_compress_as_the_paper_says():
    paper, record = a.over_shapes(np.random.default_rng(0), a.C2048, True, zeros=a.ZEROS)
    assert 16 / paper == pytest.approx(a.PAPER, rel=0.005)  # seen: 21.1
    assert paper < record < 1.02 * paper


def test_a_repaired_code_is_smaller_at_every_share_of_zeros(rng):
    for zeros in (0.5, 0.885, 0.95):
        symbols = a.ternary(rng, 100, 6144, zeros)
        codings = [a.DICTIONARY, *(a.qmoe.Coding("ternary", "tunstall", bits) for bits in (8, 12, 16))]
        bits = [a.coded(rng, symbols, coding)[0] for coding in codings]
        own = a.entropy(zeros)
        assert all(own < b < bits[0] for b in bits[1:])
        assert bits[3] - 64 * 101 / symbols.size < 1.12 * own  # seen: 1.01, 1.04, 1.09


def test_rows_that_differ_take_more(rng):
    same, different = (a.over_shapes(rng, a.BASE, True, zeros=0.857, spread=spread)[0] for spread in (0.0, 0.1))
    assert different > 1.02 * same


def test_a_code_that_decodes_wrongly_is_not_counted(rng, monkeypatch):
    monkeypatch.setattr(a.qmoe, "decode_matrix", lambda m, coding: np.zeros((m.rows, m.columns), np.float32))
    with pytest.raises(AssertionError, match="does not decode to what was coded"):
        a.coded(rng, a.ternary(rng, 2, 64, 0.5), a.DICTIONARY)


# ---- the table, at a tiny size


TOKENS = np.random.default_rng(5).integers(0, 256, (2, 24))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Llama with bfloat16 weights, and texts; there is no numpy model of it."""
    if not native.available():
        pytest.skip("conversion needs the C++ library")
    directory = tiny_models.make_checkpoint(tmp_path_factory.mktemp("tiny") / "hf", "llama")
    source_layouts.rewrite(directory, lambda w: {n: a.astype(mx.bfloat16) for n, a in w.items()})
    text = directory.parent / "text.txt"
    text.write_text("the river stone light walks under old quick bright over slow small green house " * 20)
    sample = bench_quality.Sample(np.zeros((4, 32), int), TOKENS, TOKENS)
    return dense_directories.Original(directory, None, sample, text, text)


@pytest.fixture(scope="module")
def rows(source):
    names = ("QMoE ternary, dictionary", "trellis 2", "trellis 4", "8 bits, a scale for 128 columns, rans", "lossless")
    found = table.whole(source, {n: table.CONVERTED[n] for n in names}, 2, 3)
    return {row["method"]: row for row in found}


def test_every_row_has_quality_bytes_and_speed(rows):
    assert [*rows][-2:] == [table.BFLOAT16, table.AFFINE]
    for row in rows.values():
        assert row["tokens_per_s"] > 0 and row["ratio"] > 0 and 0 <= row["top1"] <= 1
        assert row["coded_mb"] <= row["model_mb"]
    assert rows[table.AFFINE]["ratio"] == 1 and rows[table.AFFINE]["bits"] == pytest.approx(4.5)


def test_kl_orders_the_methods(rows):
    """Nothing is lost by lossless (seen: 2e-9, sums in another order); more bits are better."""
    kl = {name: row["kl"] for name, row in rows.items()}
    assert kl[table.BFLOAT16] == 0 and kl["lossless"] < 1e-6
    assert kl["8 bits, a scale for 128 columns, rans"] < kl["trellis 4"] < kl["trellis 2"]
    assert kl["trellis 4"] < kl["QMoE ternary, dictionary"]


def test_bytes_are_those_on_the_disk(source, rows):
    out = dense_directories.converted(source, "trellis 2", {"bits": 2.0})
    weights = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    experts = sum(f.stat().st_size for f in out.glob("model-experts-*.safetensors"))
    assert rows["trellis 2"]["model_mb"] == weights / 1e6 and rows["trellis 2"]["coded_mb"] == experts / 1e6


def test_a_table_of_tuples_is_counted(source):
    name = "8 bits, a scale for 128 columns, tuples"
    out = dense_directories.converted(source, name, table.CONVERTED[name][1])
    found = dense_directories.measured_bytes(out)
    experts = sum(f.stat().st_size for f in out.glob("model-experts-*.safetensors"))
    assert found["coded_mb"] == (experts + (out / "model-tuples.safetensors").stat().st_size) / 1e6


def test_the_table_is_printed_as_it_is(rows, capsys):
    table.print_rows(
        [*rows.values(), {"method": "m", "coded": table.FEED_FORWARD, "bits": 8.0, "kl": 0.5, "top1": 0.25}]
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(rows) + 1 and lines[-1].split() == ["m", "feed-forward", "8.00", "0.5000", "25.0%"]


def test_speeds_are_medians_of_turns_beside_each_other():
    seconds = iter([1, 1, 2.0, 4.0, 3.0, 12.0, 8.0, 8.0])  # two to warm up, then pairs
    found = table.in_turns({"ours": lambda: next(seconds), table.AFFINE: lambda: next(seconds)}, 3)
    assert found["ours"] == {"tokens_per_s": 3.0, "ratio": 0.5}


def test_equal_quality_says_so_only_where_it_is_reached():
    def row(method, bits, kl):
        return {"method": method, "coded": table.FEED_FORWARD, "bits": bits, "kl": kl}

    ours = [row("trellis 2", 2.0, 0.4), row("trellis 3", 3.0, 0.1), row("trellis 4", 4.0, 0.04)]
    reached, beyond = table.equal_quality([*ours, row("8 bits a", 3.5, 0.2), row("8 bits b", 5.5, 0.01)])
    assert reached["same_kl"] == pytest.approx(2.5) and reached["same_bits"] == pytest.approx((0.1 * 0.04) ** 0.5)
    assert beyond["same_kl"] is None and beyond["same_bits"] is None
    assert "has that KL at 2.50 bits; at equal size it has KL 0.0632" in table.sentence(reached)
    assert "No trellis has that KL: at its most, 4.00 bits, it has KL 0.0400; it has no rate" in table.sentence(beyond)
    (alone,) = table.equal_quality([row("8 bits a", 3.5, 0.2)])
    assert "No trellis beside it" in table.sentence(alone)


def test_a_dense_model_streams_in_the_smallest_budget(source):
    found = dense.streamed(dense_directories.converted(source, "trellis 2", {"bits": 2.0}))
    assert found["same_tokens"] and found["pool_mb"] < found["experts_mb"] and found["mb_a_token"] > 0
