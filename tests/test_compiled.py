"""MLX's compiler keeps libraries in a directory that all users share: only ours is used, and none is needed."""

import json
import os
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import pytest
from commands import environment, generate, linux, process

from tiny_qmoe_mlx import compiled, native

pytest_plugins = ["command_fixtures"]
pytestmark = [linux, pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")]


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    """What TMPDIR names."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_the_folder_is_made_and_ours_alone(base):
    found = compiled.folder()
    assert found == base / "mlx" / version("mlx") / "cpu" == compiled.folder()
    assert all(part.stat().st_mode & 0o777 == 0o700 for part in (found, found.parent, base / "mlx"))
    base.chmod(0o1777)  # as /tmp is
    assert compiled.folder() == found


def link(base: Path) -> None:
    (base / "elsewhere").mkdir()
    (base / "mlx").symlink_to("elsewhere")


UNSAFE = {
    "writable by others": lambda base: (base / "mlx").mkdir() or (base / "mlx").chmod(0o777),
    "writable by the group": lambda base: (base / "mlx").mkdir() or (base / "mlx").chmod(0o775),
    "a link": link,
    "a file": lambda base: (base / "mlx").write_text(""),
    "others may rename it": lambda base: base.chmod(0o777),
    "no directory": lambda base: os.environ.update(TMPDIR=str(base / "nowhere")),
    "the empty name": lambda base: os.environ.update(TMPDIR=""),
    "a device": lambda base: os.environ.update(TMPDIR="/dev/null"),
}


@pytest.mark.parametrize("make", UNSAFE.values(), ids=UNSAFE)
def test_another_folder_is_not_used(base, make):
    make(base)
    assert compiled.folder() is None


def test_a_folder_of_another_user_is_not_used(base, monkeypatch):
    assert compiled.folder() is not None
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    base.chmod(0o1777)
    assert compiled.folder() is None


def test_a_library_that_a_power_cut_left_is_removed(base, monkeypatch):
    found, whole = compiled.folder(), native._library()._name
    monkeypatch.setattr(mx, "disable_compile", lambda: pytest.fail("the folder is ours"))
    for name, size in (("whole", None), ("short", 3000), ("empty", 0), ("young", 3000)):
        file = Path(shutil.copy(whole, found / f"lib{name}.so"))
        if size is not None:
            os.truncate(file, size)
        if name != "young":
            os.utime(file, (time.time() - 3600,) * 2)
    compiled.settle.__wrapped__()
    assert sorted(file.name for file in found.iterdir()) == ["libwhole.so", "libyoung.so"]


@pytest.mark.parametrize("folder", ["/nowhere/at/all", "/proc"])
def test_without_a_folder_the_tokens_are_the_same(converted, here, folder):
    line = ("generate", "--model", converted, "--prompt", "hello there", "--max-tokens", 40, "--json")
    done = process(*line, env=environment(TMPDIR=folder))
    assert done.status == 0 and done.err == "", done
    assert generate(here, converted)["tokens"] == json.loads(done.out)["tokens"]
