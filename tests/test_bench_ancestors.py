"""What bench_ancestors.py prints of QMoE, beside the paper's figures."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import ancestors_qmoe as a  # noqa: E402


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
