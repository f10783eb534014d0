"""container.py and spec.py: what is written, and one sentence for each way to be broken."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import xxhash
from container_files import EXPERTS, edit_config, edit_manifest, entry_of, layer_spec, model_spec, one_sentence
from hypothesis import given
from hypothesis import strategies as st
from records import write_model
from safetensors import safe_open

from tiny_qmoe_mlx import container, container_writer, verify
from tiny_qmoe_mlx.codecs import trellis
from tiny_qmoe_mlx.container import MANIFEST, LayerSpec, ModelSpec, open_model
from tiny_qmoe_mlx.errors import FormatError

pytest_plugins = ["container_fixtures"]


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

    size = container_writer.write_experts_file(tmp_path, layer, 128, records())
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
        container_writer.write_experts_file(tmp_path, LayerSpec.from_dict(layer_spec()), 128, iter(records))
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
        container_writer.write_manifest(model)
    (model / "notes").rmdir()
    shutil.copy(model / EXPERTS, model / "model-experts-00009.safetensors")
    with pytest.raises(FormatError, match=r"model-experts-00009.* does not name"):
        container_writer.write_manifest(model)
    (model / "model-experts-00009.safetensors").unlink()
    (model / EXPERTS).unlink()
    with pytest.raises(FormatError, match=f"{EXPERTS}.* missing"):
        container_writer.write_manifest(model)
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
    container_writer.write_manifest(model)
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
