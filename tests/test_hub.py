"""Models named by a hub id: downloaded through the real huggingface_hub from a small server here."""

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from commands import FILES, SMALL, names, refusal

from tiny_qmoe_mlx import native
from tiny_qmoe_mlx.hub import client

pytest_plugins = ["command_fixtures", "hub_server"]
pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
slow = partial(pytest.param, marks=pytest.mark.slow)


def test_convert_downloads_a_checkpoint(hub, run, checkpoint, converted, text, tmp_path):
    repository = shutil.copytree(checkpoint, tmp_path / "repository")
    (repository / "pytorch_model.bin").write_bytes(b"the same weights once more")
    hub.repositories["org/name"] = repository
    done = run("convert", "--hf-path", "org/name", "--mlx-path", "out", "--calibration", text, *SMALL)
    assert done.status == 0 and done.err == "", done
    assert set(hub.fetched()) == set(names(checkpoint)), "all that is needed and nothing else"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tiny_qmoe"]["source"]["model"] == "org/name"
    for name in FILES[1:7]:
        assert (tmp_path / "out" / name).read_bytes() == (converted / name).read_bytes()


def test_generate_downloads_a_converted_model_once(hub, run, converted):
    hub.repositories["org/converted"] = converted
    line = ("generate", "--model", "org/converted", "--prompt", "x", "--max-tokens", 5, "--json")
    first = run(*line)
    assert first.status == 0 and first.err == "", first
    assert set(hub.fetched()) == {"README.md", *FILES}
    hub.requests.clear()
    for changes in ({}, {"HF_HUB_OFFLINE": "1"}):
        again = run(*line, **changes)
        assert json.loads(again.out)["tokens"] == json.loads(first.out)["tokens"] and again.err == ""
    assert not [path for _, path in hub.requests if "/resolve/" in path]


def test_an_unconverted_checkpoint_on_the_hub_says_how_to_convert_it(hub, run, checkpoint):
    hub.repositories["org/name"] = checkpoint
    sentence = refusal(run("generate", "--model", "org/name", "--prompt", "x"))
    assert "python -m tiny_qmoe_mlx.convert --hf-path org/name --mlx-path name-tiny-qmoe" in sentence


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, "RepoNotFound"), r"org/name .*is no directory here and not on the hub"),
        ((401, "GatedRepo"), r"org/name needs a login and accepted terms on the hub; log in with `hf auth login`"),
        ((500, ""), r"org/name is no directory here, and the hub could not be asked: .*500"),
        slow((403, "GatedRepo"), r"org/name needs a login and accepted terms on the hub"),
        slow((401, "RepoNotFound"), r"org/name .*is no directory here and not on the hub"),
    ],
)
def test_a_hub_that_refuses(hub, run, tmp_path, answer, message):
    hub.repositories["org/name"] = answer
    sentence = refusal(run("convert", "--hf-path", "org/name", "--mlx-path", "out"))
    assert re.search(message, sentence), sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [{"HF_ENDPOINT": "http://127.0.0.1:9"}, slow({"HF_HUB_OFFLINE": "1"}), slow({"HF_ENDPOINT": "http://hub.invalid"})],
)
def test_no_hub(run, changes):
    sentence = refusal(run("generate", "--model", "org/name", "--prompt", "x", **changes))
    assert "org/name is no directory here, and the hub could not be asked: " in sentence


@pytest.mark.slow
def test_a_download_that_breaks_off(hub, run, converted):
    """The hub's client tries again and says so; in the end it is one sentence, and the next run resumes."""
    hub.repositories["org/converted"] = converted
    hub.broken = "model-rest.safetensors"
    failed = run("plan", "--model", "org/converted")
    assert "org/converted is no directory here, and the hub could not be asked" in failed.err.splitlines()[-1]
    assert failed.status == 1 and failed.out == "" and "Traceback" not in failed.err
    hub.broken = None
    assert run("plan", "--model", "org/converted").status == 0
    assert run("verify", "--model", "org/converted").status == 0


@pytest.fixture
def plain(tmp_path) -> Path:
    """A directory with a config and two files of weights that nobody opens."""
    directory = tmp_path / "plain"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "x"}')
    for i in (1, 2):
        (directory / f"model-0000{i}-of-00002.safetensors").write_bytes(b"x" * i)
    return directory


def test_a_model_of_the_hub_knows_its_revision(hub, script, plain):
    """Also offline, where a branch is what it was when the hub was asked last; and a commit can be asked for."""
    hub.repositories["org/name"] = plain
    text = """
found = hub.locate("org/name", *sys.argv[1:])
print(found.revision, found.hub_id, hub.fingerprint(found))
"""
    for argv, changes in (((), {}), ((), {"HF_HUB_OFFLINE": "1"}), ((hub.commit,), {})):
        done = script(text, *argv, **changes)
        assert done.err == "" and done.out.split(" ", 2)[:2] == [hub.commit, "org/name"], done
        assert done.out.count(hub.commit) == 2
    refused = script(text, "other").err
    assert refused == "error: [model] org/name (revision other) is no directory here and not on the hub.\n"


def test_a_fingerprint_names_what_changed(plain, tmp_path):
    """It stays when the directory moves."""
    before = client.fingerprint(client.locate(str(plain)))
    assert client.fingerprint(client.locate(str(plain.rename(tmp_path / "moved")))) == before
    moved = tmp_path / "moved"
    assert json.loads(json.dumps(before)) == before and len(before) == 3
    (moved / "config.json").write_text('{"model_type": "y"}')
    os.utime(moved / "model-00001-of-00002.safetensors", ns=(1, 1))
    (moved / "model-00003-of-00003.safetensors").write_bytes(b"new")
    now = client.fingerprint(client.locate(str(moved)))
    changed = {name for name in {*before, *now} if before.get(name) != now.get(name)}
    assert changed == {"config.json", "model-00001-of-00002.safetensors", "model-00003-of-00003.safetensors"}


def test_a_full_disk_is_named(hub, script):
    done = script("""
import errno, huggingface_hub
def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device", "blobs")
huggingface_hub.snapshot_download = full
hub.locate("org/name")
""")
    assert (
        "org/name cannot be kept on this disk (blobs): No space left on device; make room, or set HF_HOME" in done.err
    )
    assert len(done.err.splitlines()) == 1
