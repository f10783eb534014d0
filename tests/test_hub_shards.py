"""Shards of a checkpoint that come from the hub when their tensors are needed, and go again."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest_plugins = ["hub_server"]
slow = partial(pytest.param, marks=pytest.mark.slow)
LAYERS, WIDTH = 4, 131072
OPEN = """
from tiny_qmoe_mlx.hub.shards import SourceShards
shards = SourceShards("org/name", Path("source"))
"""


@pytest.fixture
def repository(hub, tmp_path) -> Path:
    """Four shards of a half to three quarters of a megabyte; layers 2 and 3 each lie in two of them, and so do the
    tensors of no layer, in the first and the last.
    """
    directory = tmp_path / "repository"
    directory.mkdir()
    rng = np.random.default_rng(0)
    make = {f"model.layers.{i}.mlp.experts.{j}.w": rng.normal(size=WIDTH // 2) for i in range(LAYERS) for j in (0, 1)}
    tensors = {"model.embed.w": rng.normal(size=64), **make, "model.norm.w": rng.normal(size=8)}
    order = list(tensors)
    parts = [order[:3], order[3:6], order[6:8], order[8:]]
    index = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-00004.safetensors"
        save_file({n: tensors[n].astype(np.float32) for n in part}, directory / file, {"format": "pt"})
        index.update(dict.fromkeys(part, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (directory / "config.json").write_text('{"model_type": "x"}')
    (directory / "pytorch_model.bin").write_bytes(b"the same weights once more")
    hub.repositories["org/name"] = directory
    return directory


def originals(repository: Path) -> dict[str, np.ndarray]:
    return {n: v for file in sorted(repository.glob("model-*")) for n, v in load_file(file).items()}


def test_lazy_arrays_read_what_came_after_them(hub, script, repository, tmp_path):
    """Layer by layer, from arrays made before anything was fetched; the disk never holds more than a layer's shards."""
    done = script(
        OPEN
        + """
import json
import mlx.core as mx, numpy as np
empty = shards.bytes_on_disk()
inodes = [p.stat().st_ino for p in sorted(Path("source").glob("model-*"))]
arrays = {n: a for p in sorted(Path("source").glob("model-*")) for n, a in mx.load(str(p)).items()}
read, spans, steps = {}, [], []
for layer in (None, 0, 1, 2, 3):
    names = shards.names(layer)
    shards.ensure(names, lambda *step: steps.append(step))
    spans.append(len(shards.needs(names)))
    read |= {n: np.array(arrays.pop(n)) for n in names}
np.savez("read.npz", **read)
peak = shards.peak_bytes
shards.release()
same = inodes == [p.stat().st_ino for p in sorted(Path("source").glob("model-*"))]
facts = [same, empty, peak, shards.bytes_on_disk(), shards.fetched_bytes, spans, not arrays, shards.revision, steps]
print(json.dumps(facts))
"""
    )
    assert done.status == 0 and done.err == "", done.err
    same, empty, peak, left, fetched, spans, all_read, revision, steps = json.loads(done.out)
    read, wanted = np.load(tmp_path / "read.npz"), originals(repository)
    assert all_read and set(read) == set(wanted)
    assert all(np.array_equal(read[n], wanted[n]) for n in wanted)
    sizes = [p.stat().st_size for p in sorted(repository.glob("model-*"))]
    assert spans == [2, 1, 1, 2, 2]
    assert same and revision == hub.commit
    assert empty == left < 4 * 16384, "headers only"
    assert peak <= max(sizes[0] + sizes[3], sizes[1] + sizes[2]) + 4 * 16384 < sum(sizes) * 0.7
    assert fetched < 1.6 * sum(sizes)
    assert "pytorch_model.bin" not in hub.fetched()
    assert all(0 < done <= total and re.match("fetching model-0000", what) for what, done, total in steps)


def test_a_killed_run_is_gone_on_with(hub, script, repository):
    """Kill in the middle of a shard: it is not taken for whole; the shard before it is."""
    killed = script(
        OPEN
        + """
import os
from tiny_qmoe_mlx.hub import shards as hub_shards
hub_shards.PIECE, hub_shards.CONNECTIONS = 1 << 16, 1
shards.ensure(shards.names(1))
def kill(what, done, total):
    if done > total // 2:
        os.kill(os.getpid(), 9)
shards.ensure(shards.names(2), kill)
"""
    )
    assert killed.status == -9, killed.err
    hub.requests.clear()
    again = script(
        OPEN
        + """
import numpy as np
from safetensors.numpy import load_file
before = shards.bytes_on_disk()
shards.ensure(shards.names(2))
print(before, *shards.needs(shards.names(2)))
for name in shards.needs(shards.names(2)):
    assert (Path("source") / name).read_bytes() == (Path("repository") / name).read_bytes(), name
"""
    )
    assert again.status == 0 and again.err == "", again.err
    before, *used = again.out.split()
    whole = (repository / used[0]).stat().st_size
    assert len(used) == 2 and whole <= int(before) < whole + 4 * 16384, "the half shard is empty, the whole one stays"
    assert set(hub.fetched()) == {used[1]}


def test_another_revision_is_refused(hub, script, repository):
    assert script(OPEN).status == 0
    hub.revisions["org/name"] = "f" * 40
    refused = script(OPEN)
    assert re.search(f"was begun with org/name at revision {hub.commit}, received org/name at f+", refused.err), refused


def test_what_passes_is_tried_again(hub, script, repository):
    hub.failures = {r"GET /org/name/resolve/.*00001": [503, 2], r"GET /org/name/resolve/.*00002": [0, 2]}
    done = script(OPEN + "shards.ensure(shards.names(1))")
    assert done.status == 0 and done.err == "", done.err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("corrupt", r"model-00001-of-00004.safetensors arrived damaged: its hash is not the hub's; run again"),
        ("header", r"model-00002-of-00004.safetensors should be a safetensors file, its header is damaged"),
        slow("none", r"org/name should hold model\*.safetensors on the hub and does not"),
        (
            "twice",
            r"\[model-00004-of-00004.safetensors\] model.embed.w should stand in one file, "
            "model-00001-of-00004.safetensors has it too",
        ),
        slow("tensor", r"\[org/name\] should hold the tensor model.other, no shard does"),
        slow("notes", r"tiny_qmoe_shards.json\] is damaged; remove source and begin anew"),
        ("disk", r"needs \d+ bytes on its disk, 10 are free"),
    ],
)
def test_bad_sources(hub, script, repository, damage, message, tmp_path):
    names = 'shards.ensure(["model.other"] if "tensor" in sys.argv else shards.names(0))'
    if damage == "corrupt":
        hub.corrupt = "model-00001-of-00004.safetensors"
    elif damage == "header":
        (repository / "model-00002-of-00004.safetensors").write_bytes(b"\xff" * 100)
    elif damage == "none":
        for file in repository.glob("model-*"):
            file.unlink()
    elif damage == "twice":
        file = repository / "model-00004-of-00004.safetensors"
        save_file(load_file(file) | {"model.embed.w": np.zeros(64, np.float32)}, file)
    elif damage == "notes":
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "tiny_qmoe_shards.json").write_text("{}")
    elif damage == "disk":
        names = "import shutil\nshutil.disk_usage = lambda path: type('Usage', (), {'free': 10})\n" + names
    refused = script(OPEN + names, damage)
    assert refused.status == 1 and len(refused.err.splitlines()) == 1, refused.err
    assert re.search(message, refused.err), refused.err


@pytest.mark.parametrize("changes", [{"HF_HUB_OFFLINE": "1"}, slow({"HF_ENDPOINT": "http://127.0.0.1:9"})])
def test_no_hub(script, changes):
    refused = script(OPEN, **changes)
    assert "org/name is no directory here, and the hub could not be asked: " in refused.err
    assert len(refused.err.splitlines()) == 1
