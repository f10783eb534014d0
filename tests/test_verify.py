"""`verify`: every bit of every file of a converted model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from container_files import EXPERTS, edit_config, one_sentence
from records import write_model

from tiny_qmoe_mlx import verify
from tiny_qmoe_mlx.container import MANIFEST, open_model
from tiny_qmoe_mlx.errors import FormatError

pytest_plugins = ["container_fixtures"]


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def problems_of(directory: Path) -> list[verify.Problem]:
    try:
        return list(verify.find_problems(directory))
    except FormatError as error:
        return [verify.Problem(MANIFEST, one_sentence(error))]


def test_a_flipped_bit_anywhere_is_found_and_its_file_named(model, rng):
    for path in sorted(model.iterdir()):
        size = 8 * path.stat().st_size
        for bit in {0, 7, size - 1, *rng.integers(0, size, 40).tolist()}:
            flip(path, bit)
            found = problems_of(model)
            assert found and path.name in {p.file for p in found}, f"bit {bit} of {path.name}: {found}"
            assert all(path.name in p.problem or p.file != path.name for p in found)
            flip(path, bit)
    assert problems_of(model) == []


def test_a_flip_in_the_padding_after_a_record_is_found(model):
    opened = open_model(model)
    layer = opened.spec.layers[1]
    with open(model / EXPERTS, "rb") as file:
        file.seek(opened.record_offset(1, 2) + 8)
        used = int.from_bytes(file.read(4), "little")
    for position in (64, 127, used - 1, layer.record_bytes - 1):
        flip(model / EXPERTS, 8 * (opened.record_offset(1, 2) + position))
        (problem,) = problems_of(model)
        assert (problem.file, problem.layer, problem.expert) == (EXPERTS, 1, 2)
        assert "do not have their checksum" in problem.problem
        flip(model / EXPERTS, 8 * (opened.record_offset(1, 2) + position))


def test_several_problems_are_all_named(model):
    opened = open_model(model)
    for expert in (0, 2):
        flip(model / EXPERTS, 8 * (opened.record_offset(1, expert) + 200))
    flip(model / "tokenizer.json", 5)
    (model / "model.safetensors").unlink()
    found = [(p.file, p.layer, p.expert) for p in problems_of(model)]
    assert sorted(found, key=str) == sorted(
        [(EXPERTS, 1, 0), (EXPERTS, 1, 2), ("tokenizer.json", None, None), ("model.safetensors", None, None)], key=str
    )


def test_a_rightly_hashed_record_of_another_shape_is_found(model):
    """Hashes prove nothing about sense: verify takes each record apart."""
    write_model(model, width=128, alignment=1024)
    edit_config(model, lambda spec: [m.update(matrices=NARROW) for m in spec["layers"]])
    found = [p for p in problems_of(model) if p.expert is not None]
    assert len(found) == 6 and all("should be 120 x 64, the record says 128 x 64" in p.problem for p in found)


NARROW = [["gate_proj", 120, 64], ["up_proj", 120, 64], ["down_proj", 64, 120]]


def test_stated_bits_that_are_not_the_files_are_found(model):
    edit_config(model, lambda spec: spec.update(bits=spec["bits"] * 1.01))
    (problem,) = problems_of(model)
    assert problem.file == "config.json" and "bits per expert weight, the files come to" in problem.problem


def test_damaged_checksums_are_not_trusted(model):
    opened = open_model(model)
    flip(model / EXPERTS, 8 * (opened.record_offset(1, 0) + 3 * opened.spec.layers[1].record_bytes))
    with pytest.raises(FormatError, match=f"{EXPERTS}.* its header and checksums should hash to"):
        opened.checksums(1)


def run_verify(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tiny_qmoe_mlx.verify", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_verify_command(model):
    good = run_verify("--model", str(model))
    assert (good.returncode, good.stderr) == (0, "") and "5 files" in good.stdout
    flip(model / EXPERTS, 8 * open_model(model).record_offset(1, 1))
    bad = run_verify("--model", str(model))
    assert bad.returncode == 1 and f"[{EXPERTS}, layer 1, expert 1]" in bad.stdout
    assert bad.stderr == f"error: {model} has 1 problem\n"
    report = run_verify("--model", str(model), "--json")
    assert report.returncode == 1 and report.stderr == ""
    content = json.loads(report.stdout)
    assert not content["ok"] and [(p["layer"], p["expert"]) for p in content["problems"]] == [(1, 1)]
    nothing = run_verify("--model", str(model / "nothing"))
    assert nothing.returncode == 1 and nothing.stdout == "" and nothing.stderr.startswith("error: [")
    assert nothing.stderr.count("\n") == 1
