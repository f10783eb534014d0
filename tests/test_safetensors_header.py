"""Headers of weights: those that lie, tensors that stand twice, more of them than a model has."""

import json
from pathlib import Path

import numpy as np
import pytest
import records
from abuse import hostile_cases
from container_files import one_sentence
from safetensors.numpy import save_file

from tiny_qmoe_mlx import container, footprint, safetensors_header
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.original import checkpoint


@pytest.fixture
def noise(tmp_path) -> Path:
    records.write_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": {"dtype": "U8", "shape": [4]}}, "should have dtype, shape, data_offsets"),
        ({"a": {"dtype": "U9", "shape": [4], "data_offsets": [0, 4]}}, "should have a known dtype, received U9"),
        ({"a": {"dtype": "F32", "shape": [2**31 - 1] * 4, "data_offsets": [0, 4]}}, "bytes as its shape asks for"),
        ({"a": {"dtype": "U8", "shape": [2**31], "data_offsets": [0, 4]}}, "sides of 0 to 2147483647"),
        ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, "sides of 0 to"),
        ({"a": {"dtype": "U8", "shape": [1] * 17, "data_offsets": [0, 1]}}, "at most 16 sides"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0.0, 4]}}, "two data_offsets"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}, "bytes as its shape asks for"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}, "a should begin at byte 0, it says 2"),
        (
            {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}},
            "should take the file's 4 bytes of data, take 2",
        ),
        ({"__metadata__": {"a": 1}}, "__metadata__ of its header should be an object of texts"),
    ],
)
def test_a_header_that_lies_is_refused(entries, message):
    with pytest.raises(FormatError, match=message) as error:
        safetensors_header.check_tensors(entries, 4, "file")
    one_sentence(error.value)


def test_a_name_that_stands_twice_is_refused():
    entry = b'{"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    with pytest.raises(FormatError, match="a name stands twice"):
        safetensors_header.parse(b'{"a": ' + entry + b', "a": ' + entry + b"}", "file")


def test_headers_of_the_library_are_taken(tmp_path):
    """Whatever the format's own library writes, in all of its types that numpy has."""
    types = "bool u1 i1 u2 i2 f2 u4 i4 f4 u8 i8 f8".split()
    arrays = {f"{kind}-{shape}": np.zeros(shape, kind) for kind in types for shape in ((), (3,), (0, 2), (2, 3, 4))}
    save_file(arrays, tmp_path / "a.safetensors", {"format": "pt"})
    assert safetensors_header.check(tmp_path / "a.safetensors") == len(arrays)


@pytest.mark.parametrize("index", [True, False])
def test_a_tensor_stands_in_one_file(tmp_path, index):
    """Shards, of which an index tells or not; a stale one beside them has to go, whichever of the two it is."""
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    parts = {"model-00001-of-00002": {"a": np.ones(3)}, "model-00002-of-00002": {"b": np.ones(3)}}
    for name, part in parts.items():
        save_file(part, tmp_path / f"{name}.safetensors")
    if index:
        listed = {tensor: f"{name}.safetensors" for name, part in parts.items() for tensor in part}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    assert checkpoint.read_original(tmp_path) == {"model_type": "x"}
    save_file({"c": np.ones(1), "b": np.zeros(3)}, tmp_path / "model-old.safetensors")
    with pytest.raises(FormatError, match=r"b should stand in one file, .*/model-00002-of-00002.* has it too") as error:
        checkpoint.read_original(tmp_path)
    assert "model-old.safetensors" in one_sentence(error.value)


def test_a_tensor_with_the_name_of_an_expert_layers_records(noise):
    """mlx-lm would leave it out, or the records: a converted model's own names are taken too."""
    name = next(iter(container.file_tensors(container.open_model(noise).spec.layers[0])))
    save_file({name: np.ones(3)}, noise / "model-rest-00009.safetensors")
    hostile_cases.forge(noise)
    with pytest.raises(FormatError, match="should stand in one file, model-experts-.* has it too") as error:
        container.open_model(noise)
    one_sentence(error.value)


def test_headers_are_bounded_together(tmp_path, monkeypatch):
    hostile_cases.tiny(90, 3)(tmp_path)
    files = sorted(tmp_path.iterdir())
    sizes = [file.stat().st_size for file in files]
    for name, most, message in (("TENSORS", 60, "at most 60 tensors"), ("HEADERS", sum(sizes) - 9, "bytes in all")):
        with monkeypatch.context() as bounds:
            bounds.setattr(safetensors_header, f"MOST_{name}", most)
            together = safetensors_header.Together()
            assert len(together.add(files[0])) == len(together.add(files[1])) == 30
            with pytest.raises(FormatError, match=message) as error:
                together.add(files[2])
            one_sentence(error.value)


def test_a_header_is_read_once_to_open_a_model(noise, monkeypatch):
    """A plan asks for the tensors' sizes many times."""
    read, seen = safetensors_header.read, []
    monkeypatch.setattr(safetensors_header, "read", lambda file, where: seen.append(file) or read(file, where))
    opened = container.open_model(noise)
    footprint.weight_bytes(opened, True)
    footprint.matrices(opened)
    assert len(seen) == len(set(seen)) > 0
