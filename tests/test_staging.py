"""Directories whole or not at all, and the package itself."""

import errno
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from commands import environment, names
from container_files import layer_spec
from records import write_model

from tiny_qmoe_mlx import container_writer, staging
from tiny_qmoe_mlx.container import MANIFEST, LayerSpec, open_model

pytest_plugins = ["container_fixtures"]


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
    (model / "thesis.tex").rename(model / ".thesis")  # nor what a listing does not show, as a repository's .git
    with pytest.raises(OSError, match="holds .thesis, which no conversion wrote"):
        staging.check_target(model, overwrite=True)
    (model / ".thesis").rename(model / ".gitattributes")
    staging.check_target(model, overwrite=True)


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
        container_writer.write_experts_file(staged, layer, 128, records)
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


WRITER = """
import sys
from pathlib import Path
from tiny_qmoe_mlx.staging import atomic_file
for i in range(60):
    with atomic_file(Path(sys.argv[1])) as file:
        for _ in range(40):
            file.write(sys.argv[2].encode() * 1000)
            file.flush()
"""


def test_two_processes_that_write_one_file(tmp_path):
    """Each time it is one of them whole, and neither takes the other's away."""
    path, seen = tmp_path / "use.json", set()
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, x], env=environment()) for x in "ab"]
    while any(w.poll() is None for w in writers):
        if path.exists():
            found = path.read_bytes()
            assert len(found) == 40_000 and len(set(found)) == 1
            seen.add(found[:1])
    assert [w.returncode for w in writers] == [0, 0] and seen == {b"a", b"b"} and names(tmp_path) == ["use.json"]


def test_a_file_that_another_process_keeps(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "LONGEST_S", 0.1)
    (tmp_path / "x.partial").write_bytes(b"left by one that was killed")
    with staging.atomic_file(tmp_path / "x") as file:
        file.write(b"mine")
        other = staging.atomic_file(tmp_path / "x")
        with pytest.raises(OSError, match="another process is writing it"):
            other.__enter__()
    assert (tmp_path / "x").read_bytes() == b"mine" and names(tmp_path) == ["x"]
