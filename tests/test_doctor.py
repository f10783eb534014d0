"""The doctor finds a wrong kernel, and reports what it should."""

import json

import pytest

from tiny_qmoe_mlx import doctor, native, probes, terminal

pytestmark = pytest.mark.skipif(not native.available(), reason="without the C++ library the doctor takes minutes here")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(probes, "MODELS", {"tiny": (128, 64, 2)})
    monkeypatch.setattr(doctor, "PROBE_BYTES", 16 << 24)


def run(tmp_path, capsys, *options):
    status = terminal.run(doctor.main, ["--quick", "--quiet", "--folder", str(tmp_path), *options])
    return status, capsys.readouterr()


def test_this_machine_is_right_and_the_record_says_so(tmp_path, capsys):
    record = tmp_path / "record.json"
    status, shown = run(tmp_path, capsys, "--record", str(record))
    found = json.loads(record.read_text())
    assert status == 0 and found["passed"] and found["preadv_reaches_device"]
    assert all(check["error"] <= check["tolerance"] for check in found["checks"])
    assert {"system", "chip", "memory_bytes", "packages", "device", "wired_limit_mb"} <= set(found["machine"])
    assert [r["outstanding"] for r in found["disk"]] == [1, 2, 4, 8, 16, 32]
    assert all(t > 0 for times in found["speed"].values() for t in times.values())
    assert f"{len(found['checks'])} of {len(found['checks'])} right" in shown.out
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]  # the probe's file is gone


def test_a_record_that_cannot_be_written_is_refused_before_minutes_of_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "examine", None)
    status, shown = run(tmp_path, capsys, "--record", str(tmp_path / "none" / "record.json"))
    assert status == 1 and "--record should name a file in a directory that exists" in shown.err


def test_a_wrong_kernel_is_named_and_fails(tmp_path, capsys, monkeypatch):
    true = native.gather_moe
    monkeypatch.setattr(native, "gather_moe", lambda *args, **options: true(*args, **options) * 1.001)
    status, shown = run(tmp_path, capsys, "--json")
    found = json.loads(shown.out)
    assert status == 1 and not found["passed"]
    assert all(not check["passed"] for check in found["checks"] if " 1 tokens" in check["name"])


def test_missing_folder_is_one_sentence(tmp_path, capsys):
    status = terminal.run(doctor.main, ["--folder", str(tmp_path / "nowhere")])
    assert status == 1 and capsys.readouterr().err.startswith("error: [doctor] --folder should be a directory")
