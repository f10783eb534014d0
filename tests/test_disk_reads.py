"""Reads of safetensors files and arrays that give all, or an error that names the file."""

import errno
import io
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tiny_qmoe_mlx import disk_errors, disk_reads, terminal
from tiny_qmoe_mlx.errors import FormatError

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "empty": np.zeros((0, 4), np.float16),
    "one": np.array(7, np.int64),
    "bytes": np.arange(11, dtype=np.uint8),
}


@pytest.fixture
def file(tmp_path) -> Path:
    save_file(ARRAYS, tmp_path / "x.safetensors", {"words": "some"})
    return tmp_path / "x.safetensors"


def test_tensors_are_those_of_the_library(file):
    tensors, words = disk_reads.read_header(file)
    found = {name: disk_reads.read_tensor(file, tensor) for name, tensor in tensors.items()}
    assert words == {"words": "some"} and found.keys() == ARRAYS.keys()
    for name, array in load_file(file).items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_a_file_without_metadata_as_mlx_writes_it(tmp_path):
    mx.save_safetensors(str(tmp_path / "m.safetensors"), {"a": mx.arange(4)})
    tensors, words = disk_reads.read_header(tmp_path / "m.safetensors")
    assert list(tensors) == ["a"] and words == {}


def with_header(file: Path, change) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


DAMAGE = {
    "no object": lambda h: [1],
    "unknown type": lambda h: h["a"].update(dtype="F3"),
    "negative size": lambda h: h["a"].update(shape=[-2, -3]),
    "sizes that are no numbers": lambda h: h["a"].update(shape=["2", 3]),
    "another size": lambda h: h["a"].update(shape=[2, 4]),
    "two at one place": lambda h: h["one"].update(data_offsets=[8, 16]),
    "a tensor less": lambda h: h.pop("bytes") and None,
    "no offsets": lambda h: h["a"].pop("data_offsets") and None,
    "metadata that is none": lambda h: h.update(__metadata__=3),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_header_is_refused_with_the_file(file, what):
    with_header(file, DAMAGE[what])
    with pytest.raises(FormatError, match=r"x.safetensors\] .*(copy|download)"):
        disk_reads.read_header(file)


@pytest.mark.parametrize("data", [b"", b"abc", b"\xff" * 5000, (2).to_bytes(8, "little") + b"{}" + b"more"])
def test_what_is_no_safetensors_file(tmp_path, data):
    (tmp_path / "y").write_bytes(data)
    with pytest.raises(FormatError, match=r"y\] .*(copy|download)"):
        disk_reads.read_header(tmp_path / "y")


def test_an_array_that_the_file_does_not_hold_whole(tmp_path):
    (tmp_path / "z").write_bytes(bytes(100))
    assert disk_reads.read_array(tmp_path / "z", "<u4", 20, 20).tolist() == [0] * 20
    with pytest.raises(FormatError, match=r"z\] should have 104 bytes, it ends at 100\."):
        disk_reads.read_array(tmp_path / "z", "<u4", 21, 20)


def test_reads_that_give_little_at_a_time():
    class Slow(io.BytesIO):
        def readinto(self, into):
            return super().readinto(into[:3])

    out = np.zeros((2, 5), np.uint8)
    assert disk_reads.read_into(Slow(bytes(range(20))), out) == 10 and out.tolist() == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
    ]
    assert disk_reads.read_into(Slow(b"1234567"), out) == 7


def test_an_error_of_the_system_names_the_file():
    with pytest.raises(OSError) as found, disk_errors.named("some/file"):
        raise OSError(errno.EIO, "Input/output error")
    assert terminal.sentence(found.value) == "[some/file] Input/output error"
    with pytest.raises(OSError) as found, disk_errors.named("other"), disk_errors.named("one"):
        raise OSError(errno.ENOSPC, "[one] the disk is full")
    assert terminal.sentence(found.value) == "[one] the disk is full"


def test_what_mlx_cannot_read_names_the_directory():
    with pytest.raises(OSError, match=r"\[hf\] its weights could not be read"), disk_errors.weights_of("hf"):
        raise RuntimeError("[read] Unable to read from file.")
    with pytest.raises(RuntimeError, match="another"), disk_errors.weights_of("hf"):
        raise RuntimeError("another")
