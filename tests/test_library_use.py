"""The package in a program of somebody else's: what it prints, where it writes, what it refuses and leaves behind."""

import os

import pytest
from commands import linux

import tiny_qmoe_mlx
from tiny_qmoe_mlx import native, runtime
from tiny_qmoe_mlx.models import Streaming

pytest_plugins = ["command_fixtures"]
pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")


def test_generate_prints_where_it_is_asked_to_as_mlx_lms(converted, capsys):
    model, tokenizer = tiny_qmoe_mlx.load(converted)
    with model:
        text = tiny_qmoe_mlx.generate(model, tokenizer, "hello", max_tokens=5)
        assert capsys.readouterr().out == ""
        assert tiny_qmoe_mlx.generate(model, tokenizer, "hello", verbose=True, max_tokens=5) == text
        assert capsys.readouterr().out == f"{text}\n"


def test_a_profile_is_written_where_it_was_named(converted, tmp_path, monkeypatch):
    """Also by a program that has gone to another directory meanwhile."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_qmoe_mlx.load(converted, streaming=Streaming(profile="use.json"))
    tiny_qmoe_mlx.generate(model, tokenizer, "hello", max_tokens=2)
    monkeypatch.chdir(tmp_path / "elsewhere")
    model.close()
    assert (tmp_path / "use.json").exists() and not (tmp_path / "elsewhere/use.json").exists()


@linux
def test_a_pool_without_memory_leaves_no_file_open(converted, monkeypatch):
    def fail(*inputs):
        raise MemoryError

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(runtime, "ExpertCache", fail)
    with pytest.raises(MemoryError):
        tiny_qmoe_mlx.load(converted)
    assert len(os.listdir("/proc/self/fd")) == before
