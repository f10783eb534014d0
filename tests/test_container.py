"""container.py, spec.py, staging.py and verify.py: whole files or none, and one sentence for each way to be broken."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from records import write_model
from safetensors import safe_open

from tiny_qmoe_mlx import container, staging, verify
from tiny_qmoe_mlx.codecs import trellis
from tiny_qmoe_mlx.container import MANIFEST, LayerSpec, ModelSpec, open_model
from tiny_qmoe_mlx.errors import FormatError

EXPERTS = "model-experts-00001.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pristine") / "model"
    write_model(directory)
    return directory


@pytest.fixture
def model(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def layer_spec(**changes) -> dict:
    spec = {
        "path": "model.layers.3.mlp",
        "layer": 3,
        "file": "model-experts-00003.safetensors",
        "experts": 2,
        "record_bytes": 4096,
        "matrices": [["fc1", 64, 32], ["fc2", 32, 64]],
        "bias": False,
    }
    return {**spec, **changes}


def model_spec(**changes) -> dict:
    spec = {
        "format_version": 1,
        "codec": "trellis",
        "bits": 2.5,
        "alignment": 128,
        "length": 12,
        "seed": 7,
        "layers": [layer_spec()],
        "source": {"model": "org/name", "revision": None},
        "calibration": {"source": "text.txt", "tokens": 5},
    }
    return {**spec, **changes}


def edit_config(directory: Path, change) -> None:
    """Change config.json and make the manifest agree again, so that only the content is wrong."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["tiny_qmoe"])
    path.write_text(json.dumps(config))
    edit_manifest(directory, lambda m: m["files"].update({"config.json": entry_of(path)}))


def entry_of(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "xxh3_128": xxhash.xxh3_128_hexdigest(path.read_bytes())}


def edit_manifest(directory: Path, change) -> None:
    """Change the manifest and give it its right hash, by the rule of FORMAT.md."""
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest)
    manifest["self_xxh3_128"] = "0" * 32
    text = json.dumps(manifest)
    digest = xxhash.xxh3_128_hexdigest(text.encode())
    (directory / MANIFEST).write_text(text.replace('"self_xxh3_128": "' + "0" * 32, f'"self_xxh3_128": "{digest}'))


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert text.startswith("[") and "\n" not in text and len(text) < 600
    return text


# ---- what is written


@pytest.mark.parametrize("alignment", container.ALIGNMENTS)
@pytest.mark.parametrize("matrices", [2, 3])
def test_a_written_model_opens_and_verifies(tmp_path, alignment, matrices):
    spec = write_model(tmp_path / "m", alignment=alignment, matrices=matrices, bias=matrices == 2)
    opened = open_model(tmp_path / "m", hash_files=True)
    assert opened.spec == spec and opened.config["model_type"] == "noise"
    assert list(verify.find_problems(tmp_path / "m")) == []
    for i, layer in enumerate(spec.layers):
        assert opened.record_offset(i, 0) % alignment == 0
        assert opened.expert_file(i).name == layer.file
        data = np.fromfile(opened.expert_file(i), np.uint8)
        for e in range(layer.experts):
            record = data[opened.record_offset(i, e) :][: layer.record_bytes]
            trellis.parse(record, layer.shapes, layer.bias, "test")
            pieces = [record[j : j + 65536].tobytes() for j in range(0, len(record), 65536)]
            assert opened.checksums(i)[e].tolist() == [xxhash.xxh3_64_intdigest(p) for p in pieces]


def test_both_libraries_read_an_experts_file(pristine):
    opened = open_model(pristine)
    file, layer = opened.expert_file(1), opened.spec.layers[1]
    raw = np.fromfile(file, np.uint8)[opened.record_offset(1, 0) :][: layer.experts * layer.record_bytes]
    records = raw.reshape(layer.experts, layer.record_bytes)
    with safe_open(file, "numpy") as tensors:
        assert list(tensors.keys()) in ([f"{layer.path}.{n}" for n in names] for names in (KEYS, KEYS[::-1]))
        np.testing.assert_array_equal(tensors.get_tensor(f"{layer.path}.records"), records)
        np.testing.assert_array_equal(tensors.get_tensor(f"{layer.path}.checksums"), opened.checksums(1))
    loaded = mx.load(str(file))
    np.testing.assert_array_equal(np.array(loaded[f"{layer.path}.records"]), records)
    assert loaded[f"{layer.path}.checksums"].dtype == mx.uint64


KEYS = ["records", "checksums"]


def test_records_longer_than_a_checksum_have_several(tmp_path):
    spec = write_model(tmp_path / "m", hidden=512, width=512, layers=1, experts=2)
    layer = spec.layers[0]
    assert layer.record_bytes > 2 * 65536 and layer.record_bytes % 65536
    assert open_model(tmp_path / "m").checksums(0).shape == (2, -(-layer.record_bytes // 65536))
    assert list(verify.find_problems(tmp_path / "m")) == []


def test_bits_count_every_byte_of_the_experts_files(pristine):
    spec = open_model(pristine).spec
    size = sum((pristine / layer.file).stat().st_size for layer in spec.layers)
    weights = 2 * 3 * 3 * 64 * 96  # layers x experts x matrices x shape
    assert container.bits_per_weight(spec.layers, spec.alignment) == 8 * size / weights


def test_an_experts_file_is_written_as_its_records_come(tmp_path):
    """One record is held at a time: the file grows while the generator runs."""
    layer, seen = LayerSpec.from_dict(layer_spec(record_bytes=1 << 20, experts=8)), []

    def records():
        for _ in range(8):
            seen.append(sum(p.stat().st_size for p in tmp_path.iterdir()))
            yield np.zeros(1 << 20, np.uint8)

    size = container.write_experts_file(tmp_path, layer, 128, records())
    assert seen[-1] >= 6 << 20 and size == (tmp_path / layer.file).stat().st_size


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([np.zeros(4096, np.uint8)], "should have 2 records, received 1"),
        ([np.zeros(4096, np.uint8)] * 3, "should have 2 records, received 3"),
        ([np.zeros(4095, np.uint8)] * 2, r"record 0 of .* uint8 of 4096, received uint8 of \(4095,\)"),
        ([np.zeros(4096, np.uint8), np.zeros(4096, np.int8)], "record 1 of .* received int8"),
    ],
)
def test_wrong_records_leave_nothing_behind(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        container.write_experts_file(tmp_path, LayerSpec.from_dict(layer_spec()), 128, iter(records))
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_says_what_format_md_says(pristine):
    raw = (pristine / MANIFEST).read_text()
    manifest = json.loads(raw)
    own = manifest["self_xxh3_128"]
    assert own == xxhash.xxh3_128_hexdigest(raw.replace(own, "0" * 32).encode())
    assert set(manifest["files"]) == {p.name for p in pristine.iterdir()} - {MANIFEST}
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert manifest["files"][name] == entry_of(pristine / name)
    data, entry = (pristine / EXPERTS).read_bytes(), manifest["files"][EXPERTS]
    start = 8 + int.from_bytes(data[:8], "little")
    sums = json.loads(data[8:start])["model.layers.1.mlp.switch_mlp.checksums"]["data_offsets"]
    covered = data[:start] + data[start + sums[0] : start + sums[1]]
    hashed = xxhash.xxh3_128_hexdigest(covered)
    assert entry == {"bytes": len(data), "header_bytes": start, "xxh3_128": hashed}


def test_the_manifest_is_not_written_over_a_wrong_directory(model):
    (model / MANIFEST).unlink()
    (model / "notes").mkdir()
    with pytest.raises(FormatError, match=r"\[notes\] a converted model holds plain files"):
        container.write_manifest(model)
    (model / "notes").rmdir()
    shutil.copy(model / EXPERTS, model / "model-experts-00009.safetensors")
    with pytest.raises(FormatError, match=r"model-experts-00009.* does not name"):
        container.write_manifest(model)
    (model / "model-experts-00009.safetensors").unlink()
    (model / EXPERTS).unlink()
    with pytest.raises(FormatError, match=f"{EXPERTS}.* missing"):
        container.write_manifest(model)
    assert not (model / MANIFEST).exists()


# ---- what is refused


def test_paths_that_are_no_model(tmp_path):
    for path in (tmp_path / "nothing", Path(__file__), tmp_path):
        with pytest.raises(FormatError, match="no directory|is no model: it has no config.json") as error:
            open_model(path)
        one_sentence(error.value)


def test_an_unconverted_checkpoint_says_how_to_convert_it(tmp_path):
    source = tmp_path / "Qwen3 30B"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "qwen3_moe"}')
    with pytest.raises(FormatError) as error:
        open_model(source)
    command = f"python -m tiny_qmoe_mlx.convert --hf-path '{source}' --mlx-path 'Qwen3 30B-tiny-qmoe' --bits 2.0"
    assert one_sentence(error.value).endswith(f"is an unconverted checkpoint; convert it first: {command}")


def test_a_directory_without_manifest_was_not_finished(model):
    (model / MANIFEST).unlink()
    with pytest.raises(FormatError, match=f"has no {MANIFEST}, so it was not finished"):
        open_model(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", EXPERTS])
def test_missing_truncated_and_grown_files(model, name):
    data = (model / name).read_bytes()
    for content, message in (
        (data[:-1], rf"\[{name}\] should have {len(data)} bytes, has {len(data) - 1}: it was cut short"),
        (data + b" ", rf"\[{name}\] should have {len(data)} bytes, has {len(data) + 1}: it has grown"),
        (None, rf"\[{name}\] is missing"),
    ):
        if content is None:
            (model / name).unlink()
        else:
            (model / name).write_bytes(content)
        if name == "config.json" and content == data[:-2]:
            continue
        with pytest.raises(FormatError, match=message) as error:
            open_model(model)
        assert "copy or convert the model again" in one_sentence(error.value)


def test_a_model_file_that_the_manifest_does_not_know(model):
    shutil.copy(model / "model.safetensors", model / "model-00002-of-00002.safetensors")
    with pytest.raises(FormatError, match="model-00002-of-00002.safetensors.* does not belong"):
        open_model(model)


def test_strange_files_and_edited_model_cards_are_nobodys_business(model):
    (model / "README.md").write_text("a card")
    (model / MANIFEST).unlink()
    container.write_manifest(model)
    (model / "README.md").write_text("a better card")
    (model / ".gitattributes").write_text("*.safetensors filter=lfs")
    open_model(model, hash_files=True)
    assert [p.file for p in verify.find_problems(model)] == ["README.md"]


@pytest.mark.parametrize("where", ["config", "manifest"])
def test_a_newer_format_says_so(model, where):
    if where == "config":
        edit_config(model, lambda spec: spec.update(format_version=2, layers="who knows"))
    else:
        edit_manifest(model, lambda manifest: manifest.update(format_version=2))
    with pytest.raises(FormatError, match="format version 1 is read here, received version 2; install a newer"):
        open_model(model)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"\xff\xfe", b'"\\ud800"']
)
@pytest.mark.parametrize("name", ["config.json", MANIFEST])
def test_files_that_are_not_json(model, name, text):
    (model / name).write_bytes(text)
    with pytest.raises(FormatError, match=rf"\[{name}\] should (be a JSON object|list)") as error:
        open_model(model)
    one_sentence(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": {}},
        {"files": {"../../etc/passwd": {"bytes": 1, "xxh3_128": "0" * 32}}},
        {"files": {"\ud800": {"bytes": 1, "xxh3_128": "0" * 32}}},
        {"files": {"config.json": {"bytes": -1, "xxh3_128": "0" * 32}}},
        {"files": {"config.json": {"bytes": 1.5, "xxh3_128": "0" * 32}}},
        {"files": {"config.json": {"bytes": 1, "xxh3_128": "zz"}}},
        {"files": {"config.json": 3}},
        {"format_version": "1"},
        {"format_version": True},
    ],
)
def test_hostile_manifests(model, change):
    edit_manifest(model, lambda manifest: manifest.update(change))
    with pytest.raises(FormatError, match=MANIFEST) as error:
        open_model(model)
    one_sentence(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": "zip"}, "codec should be"),
        ({"bits": 0}, "bits should lie in"),
        ({"bits": float("nan")}, "bits should lie in"),
        ({"bits": "2"}, "bits should lie in"),
        ({"alignment": 4095}, "alignment should be one of"),
        ({"alignment": 16384}, "record_bytes of model.layers.3.mlp should be a multiple of 16384"),
        ({"length": 13}, "length \\(of the trellis\\) should be one of"),
        ({"seed": -1}, "seed should be an integer in 0 to 4294967295"),
        ({"seed": 2**32}, "seed should be"),
        ({"seed": True}, "seed should be"),
        ({"layers": []}, "layers should be 1 to"),
        ({"layers": {}}, "layers should be a list"),
        ({"layers": [layer_spec(), layer_spec()]}, "every layer's path should be its own"),
        ({"source": {}}, "source should be an object"),
        ({"source": {"model": "a", "revision": 3}}, "revision of source"),
        ({"calibration": {"source": "a", "tokens": -1}}, "tokens of calibration"),
        ({"calibration": None}, "calibration should be an object"),
        ({"format_version": 0}, "format_version should be 1, received 0"),
        ({"format_version": None}, "format_version should be 1, received None"),
    ],
)
def test_wrong_model_specs(change, message):
    with pytest.raises(FormatError, match=message) as error:
        ModelSpec.from_dict(model_spec(**change))
    one_sentence(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": ""}, "path should be"),
        ({"path": "a/../b"}, "path should be"),
        ({"layer": 2048}, "layer index"),
        ({"layer": -1}, "layer index"),
        ({"file": "../model-experts-00003.safetensors"}, "file should be model-experts-00003.safetensors"),
        ({"file": "model-experts-00004.safetensors"}, "file should be model-experts-00003.safetensors"),
        ({"experts": 0}, "experts of"),
        ({"experts": 2.0}, "experts of"),
        ({"record_bytes": 2**31 + 128}, "record_bytes of"),
        ({"record_bytes": 256}, "record_bytes of .* should be at least"),
        ({"matrices": "fc"}, "matrices should be lists"),
        ({"matrices": [["fc1", 64, 32]]}, "matrices should be one of"),
        ({"matrices": [["fc1", 64], ["fc2", 32, 64]]}, "matrices should be one of"),
        ({"matrices": [["fc2", 64, 32], ["fc1", 32, 64]]}, "matrices should be one of"),
        ({"matrices": [["fc1", 64, 32], ["fc2", 32, 65]]}, "should fit one another"),
        ({"matrices": [["gate_proj", 64, 32], ["up_proj", 32, 32], ["down_proj", 32, 64]]}, "should fit one another"),
        ({"matrices": [["fc1", 2**20 + 1, 32], ["fc2", 32, 2**20 + 1]]}, "rows of"),
        ({"matrices": [["fc1", 0, 32], ["fc2", 32, 0]]}, "rows of"),
        ({"matrices": [[["fc1"], 64, 32], ["fc2", 32, 64]]}, "matrices should be one of"),
        ({"bias": 0}, "bias of"),
    ],
)
def test_wrong_layer_specs(change, message):
    with pytest.raises(FormatError, match=message) as error:
        LayerSpec.from_dict(layer_spec(**change))
    one_sentence(error.value)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists), st.data())
def test_any_json_value_in_any_place_is_a_sentence(value, data):
    spec = model_spec()
    target = data.draw(st.sampled_from([spec, spec["layers"][0], spec["source"], spec["calibration"]]))
    target[data.draw(st.sampled_from(sorted(target)))] = value
    try:
        read = ModelSpec.from_dict(spec)
    except FormatError as error:
        one_sentence(error)
    else:
        assert json.loads(json.dumps(read.to_dict())) == spec


def test_every_key_is_needed():
    assert ModelSpec.from_dict(json.loads(json.dumps(model_spec()))).to_dict() == model_spec()
    for key in model_spec():
        with pytest.raises(FormatError):
            ModelSpec.from_dict({k: v for k, v in model_spec().items() if k != key})
    for key in layer_spec():
        with pytest.raises(FormatError):
            LayerSpec.from_dict({k: v for k, v in layer_spec().items() if k != key})


def test_record_size_that_contradicts_the_file(model):
    edit_config(model, lambda spec: spec["layers"][1].update(record_bytes=spec["layers"][1]["record_bytes"] + 1024))
    with pytest.raises(FormatError, match=rf"\[{EXPERTS}\] config.json asks for .*records"):
        open_model(model)


HEADERS = [
    (lambda h: h[:20], "its header should be JSON"),
    (lambda h: b"[" * len(h), "its header should be JSON"),
    (lambda h: b"[]".ljust(len(h)), "the header says None"),
    (lambda h: h.replace(b'"U8"', b'"I8"'), "the header says .*I8"),
    (lambda h: h.replace(b"records", b"recordz"), "the header says None"),
    (lambda h: h.replace(b'"data_offsets":[0,', b'"data_offsets":[8,'), "the header says"),
    (lambda h: h.replace(b"}}", b'},"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "the header says"),
]


@pytest.mark.parametrize(("change", "message"), HEADERS)
def test_hostile_experts_headers(model, change, message):
    data = (model / EXPERTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length].rstrip(b" ")).ljust(length)[:length]
    (model / EXPERTS).write_bytes(data[:8] + header + data[8 + length :])
    with pytest.raises(FormatError, match=rf"\[{EXPERTS}\] .*{message}") as error:
        open_model(model)
    one_sentence(error.value)


@pytest.mark.parametrize("length", [0, 1, 2**20 + 1, 2**63, 2**64 - 1])
def test_hostile_header_lengths(model, length):
    data = (model / EXPERTS).read_bytes()
    (model / EXPERTS).write_bytes(length.to_bytes(8, "little") + data[8:])
    with pytest.raises(FormatError, match=f"header should have 2 to .* bytes, this says {length}"):
        open_model(model)


def test_record_offsets_are_bounded(pristine):
    opened = open_model(pristine)
    for expert in (-1, 3):
        with pytest.raises(ValueError, match=f"has experts 0 to 2, received {expert}"):
            opened.record_offset(0, expert)


# ---- every bit of every file


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


# ---- directories: whole or not at all


def test_a_directory_appears_when_it_is_whole(tmp_path):
    with staging.staged_directory(tmp_path / "deep" / "out") as staged:
        assert staged.parent == tmp_path / "deep" and not (tmp_path / "deep" / "out").exists()
        (staged / "a").write_text("x")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "a").read_text() == "x"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_after_an_error(tmp_path, error):
    with pytest.raises(error), staging.staged_directory(tmp_path / "out") as staged:
        (staged / "a").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with staging.staged_directory(tmp_path / "out") as staged:
        (staged / "a").write_text("x")
    assert (tmp_path / "out" / "a").exists()


def test_what_is_in_the_way_is_never_removed(tmp_path, model):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for name, message in (("file", "is no directory"), ("full", "is no converted model"), ("/", "root of a file")):
        with pytest.raises(OSError, match=message), staging.staged_directory(tmp_path / name, overwrite=True):
            raise AssertionError("should have been refused at once")
    with pytest.raises(OSError, match="--overwrite replaces it"), staging.staged_directory(model):
        raise AssertionError("should have been refused at once")
    (model / "thesis.tex").write_text("mine")
    with pytest.raises(OSError, match="thesis.tex"), staging.staged_directory(model, overwrite=True):
        raise AssertionError("should have been refused at once")
    assert (tmp_path / "full" / "thesis.tex").read_text() == (model / "thesis.tex").read_text() == "mine"


def test_a_converted_model_is_replaced_only_when_the_new_one_is_whole(model):
    before = (model / MANIFEST).read_bytes()
    with pytest.raises(ValueError), staging.staged_directory(model, overwrite=True):
        assert (model / MANIFEST).read_bytes() == before
        raise ValueError
    assert (model / MANIFEST).read_bytes() == before
    write_model(model, seed=5)
    assert open_model(model).spec.seed == 5
    assert [p.name for p in model.parent.iterdir()] == ["model"]


def test_leftovers_go_when_their_process_is_gone(tmp_path):
    """A killed conversion leaves its directory; the next one removes it, but never a running one's."""
    code = (
        "import sys, time\nfrom tiny_qmoe_mlx.staging import staged_directory\n"
        "with staged_directory(sys.argv[1]) as d:\n"
        "    (d / 'a').write_text('x'); print('ready', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        running = tmp_path / f"out.partial-{child.pid}"
        with staging.staged_directory(tmp_path / "out"):
            assert running.exists()
        shutil.rmtree(tmp_path / "out")
    finally:
        child.kill()
        child.communicate()
    assert running.exists()
    with staging.staged_directory(tmp_path / "out"):
        assert not running.exists()


def test_a_model_set_aside_by_a_killed_process_comes_back(model):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    model.rename(model.with_name(f"model.replaced-{dead.stdout.strip()}"))
    with pytest.raises(ValueError), staging.staged_directory(model, overwrite=True):
        raise ValueError
    open_model(model, hash_files=True)


def test_space_is_checked_before_work(tmp_path):
    staging.check_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(OSError, match=r"needs 1152921504606846976 bytes on its disk, \d+ are free") as error:
        staging.check_space(tmp_path, 1 << 60)
    assert error.value.errno == errno.ENOSPC


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB; mounting one needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(small_disk):
    layer = LayerSpec.from_dict(layer_spec(record_bytes=1 << 18, experts=8))
    records = (np.zeros(1 << 18, np.uint8) for _ in range(8))
    with pytest.raises(OSError, match="disk is full") as error, staging.staged_directory(small_disk / "out") as staged:
        container.write_experts_file(staged, layer, 128, records)
    assert error.value.errno == errno.ENOSPC and layer.file in str(error.value)
    assert list(small_disk.iterdir()) == []


# ---- the package itself


def test_importing_the_package_does_not_import_mlx():
    code = (
        "import sys, tiny_qmoe_mlx, tiny_qmoe_mlx.terminal, tiny_qmoe_mlx.container; print('mlx.core' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_functions_keep_their_names_beside_modules_of_the_same_name():
    import tiny_qmoe_mlx
    from tiny_qmoe_mlx.generate import stream_generate

    assert tiny_qmoe_mlx.stream_generate is stream_generate
    for name in ("load", "generate", "convert"):
        assert callable(getattr(tiny_qmoe_mlx, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = tiny_qmoe_mlx.nothing
