"""The page of what was tried: every record is on it, a promise that was broken is called so, what was not run too."""

import json

import pytest
from abuse import record, report, whole


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["soak.py", "--tokens", "5 6"])
    return tmp_path


def test_records_come_back_and_are_shown(results, capsys):
    record.keep(5, "soak", "Memory stays flat.", "abuse.soak", 130.04, {"tokens": 100000, "growth, %": 0.251}, 0)
    record.keep(1, "fuzz", "Nothing crashes.", "abuse.fuzz", 9, {"crashes": 2}, 2)
    assert json.loads((results / "soak.json").read_text())["figures"]["tokens"] == 100000
    text = report.page(record.read_all())
    assert text.index("Nothing crashes.** Broken 2 times.") < text.index("Memory stays flat.** Held.")
    assert "| tokens | 100,000 |" in text and "| growth, % | 0.251 |" in text and "2 min on " in text
    assert "python -m abuse.soak --tokens '5 6'" in text
    assert text.count("Not run.") == len(report.SECTIONS) - 2
    assert "broken: 2" in capsys.readouterr().out


def test_the_runs_are_modules_that_exist():
    for run in whole.RUNS:
        assert (record.RESULTS.parent / f"{run.split()[0]}.py").is_file(), run


def test_a_name_that_is_none_of_them_is_refused():
    with pytest.raises(SystemExit, match="received nothing"):
        whole.chosen(["nothing"])
    assert whole.chosen(["hog"]) == [["hog"]]
