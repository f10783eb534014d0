"""Models sent to the hub file by file: through the real huggingface_hub to a small server here."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import names
from safetensors.numpy import save_file

from tiny_qmoe_mlx.staging import MANIFEST

pytest_plugins = ["hub_server"]
slow = partial(pytest.param, marks=pytest.mark.slow)
WEIGHTS = [f"model-experts-{i:05d}.safetensors" for i in range(1, 19)]
WORDS = ["README.md", "config.json", "model.safetensors.index.json", MANIFEST, "tokenizer.json"]
OPEN = """
from tiny_qmoe_mlx.hub.upload import Uploader
model = Path("model")
weights = sorted(model.glob("model-*.safetensors"))
uploader = Uploader("org/sent")
"""
SEND = OPEN + "uploader.check()\nprint(uploader.finish(model), uploader.sent_bytes)"


@pytest.fixture
def model(tmp_path) -> Path:
    """A directory with the files of a converted model, and what a conversion leaves beside them while it runs."""
    directory = tmp_path / "model"
    directory.mkdir()
    for i, name in enumerate(WEIGHTS):
        save_file({"record": np.full((3, 100), i, np.uint8)}, directory / name)
    for name in WORDS:
        (directory / name).write_text(json.dumps({"name": name}) + "\n")
    (directory / "conversion.json").write_text("{}")
    (directory / "state.safetensors").write_bytes(b"state")
    (directory / ".partial-model").write_bytes(b"half")
    return directory


def same(repository: Path, model: Path) -> bool:
    """Whether the repository holds the whole model and nothing else."""
    if names(repository) != sorted([".gitattributes", *WEIGHTS, *WORDS]):
        return False
    return all((repository / n).read_bytes() == (model / n).read_bytes() for n in [*WEIGHTS, *WORDS])


def sentence(result) -> str:
    assert result.status == 1 and len(result.err.splitlines()) == 1 and "Traceback" not in result.err, result
    return result.err


def test_a_model_grows_on_the_hub_and_comes_back(hub, script, model, tmp_path):
    """Files go out as they are finished, several a commit, and the manifest is in the last one."""
    done = script(
        OPEN
        + """
uploader.check()
for path in weights:
    uploader.push(path)
uploader.wait()
model = model.rename("renamed")
print(uploader.finish(model), uploader.sent_bytes)
found = hub.locate("org/sent")
print(found.directory, found.revision)
"""
    )
    assert done.status == 0 and done.err == "", done.err
    model, (address, sent), (directory, revision) = tmp_path / "renamed", *map(str.split, done.out.splitlines())
    assert address == f"{hub.address}/org/sent" and revision == hub.revisions["org/sent"]
    assert int(sent) == sum((model / n).stat().st_size for n in WEIGHTS)
    assert same(hub.repositories["org/sent"], model)
    assert all((Path(directory) / n).read_bytes() == (model / n).read_bytes() for n in [*WEIGHTS, *WORDS])
    assert [len(paths) for paths in hub.commits] == [1, 16, 2, len(WORDS) + 1]
    assert hub.commits[0] == ["tiny_qmoe_upload.json"] and set(hub.commits[-1]) == {*WORDS, "-tiny_qmoe_upload.json"}


def test_an_upload_that_was_killed_goes_on(hub, script, model):
    """What is on the hub is not sent again, whether a commit names it already or not; a changed file is."""
    killed = script(
        OPEN
        + """
import os
uploader.check()
for path in weights[:17]:
    uploader.push(path)
uploader._files.join()
os.kill(os.getpid(), 9)
"""
    )
    assert killed.status == -9
    repository = hub.repositories["org/sent"]
    assert MANIFEST not in names(repository) and "tiny_qmoe_upload.json" in names(repository)
    assert len(hub.objects) == 17 and WEIGHTS[15] in names(repository) and WEIGHTS[16] not in names(repository)
    save_file({"record": np.full((3, 100), 99, np.uint8)}, model / WEIGHTS[0])
    hub.requests.clear()
    done = script(SEND)
    assert done.status == 0 and done.err == "", done.err
    assert same(repository, model)
    assert sum(path.startswith("/objects/") for _, path in hub.requests) == 2, "the changed one and the last one"
    commits = len(hub.commits)
    again = script(OPEN + "uploader.check(finished=model)\nprint(uploader.finish(model), uploader.sent_bytes)")
    assert again.out.split()[1] == "0" and len(hub.commits) == commits and again.err == ""


@pytest.mark.parametrize(
    "failures",
    [
        {
            r"PUT /objects": [503, 2],
            r"POST .*/commit/": [502, 2],
            r"POST .*/batch": [500, 1],
            r"POST .*/create": [500, 1],
        },
        slow({"PUT /objects": [0, 2], "POST .*/commit/": [0, 1], "POST .*/preupload": [0, 1]}),
    ],
)
def test_what_passes_is_tried_again(hub, script, model, failures):
    hub.failures = failures
    done = script("import time\ntime.sleep = lambda seconds: None\n" + SEND)
    assert done.status == 0, done.err
    assert same(hub.repositories["org/sent"], model)
    assert not any(left for _, left in failures.values())


def test_a_failure_in_the_background_is_told_by_the_next_call(hub, script, model):
    """It is one sentence, and `finish` sends what is missing once the hub takes it."""
    hub.failures = {"POST .*/batch": [403, 1]}
    done = script(
        OPEN
        + """
uploader = Uploader("org/sent", private=True, revision="two-bit")
uploader.check()
uploader.push(weights[0])
uploader._files.join()
try:
    uploader.push(weights[1])
except hub.HubError as error:
    print(error)
print(uploader.finish(model))
"""
    )
    assert done.status == 0 and done.err == "", done.err
    told = done.out.splitlines()[0]
    assert re.search(r"\[upload\] this login may not write to org/sent .*run the same command again to go on", told)
    assert same(hub.repositories["org/sent"], model)
    assert "/api/models/org/sent/commit/two-bit" in {path for _, path in hub.requests}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"HF_TOKEN": ""}, r"\[upload\] the hub wants a login; log in with `hf auth login`, or set HF_TOKEN"),
        ({"HF_TOKEN": "hf_stranger"}, r"\[upload\] the hub does not know this login .* log in again"),
        ({"HF_TOKEN": "hf_reader"}, r"\[upload\] this login may not write to org/sent .*use a token with write access"),
        ({"HF_HUB_OFFLINE": "1"}, r"\[upload\] the hub could not take org/sent: .*offline"),
        slow({"HF_ENDPOINT": "http://127.0.0.1:9"}, r"\[upload\] the hub could not take org/sent: "),
    ],
)
def test_refused_before_any_work(hub, script, model, changes, message):
    assert re.search(message, sentence(script(OPEN + "uploader.check()", **changes))), message
    assert not hub.repositories


def test_a_repository_of_someone_else(hub, script, model, tmp_path):
    """The login may read it, not write."""
    hub.repositories["org/sent"] = tmp_path / "theirs"
    (tmp_path / "theirs").mkdir()
    said = sentence(script(OPEN + "uploader.check()", HF_TOKEN="hf_reader"))
    assert re.search(r"this login may not write to org/sent \(.*you may not write here", said), said


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"model.safetensors": "other", "README.md": "other"}, r"it holds model.safetensors; choose another name"),
        ({MANIFEST: "other", WEIGHTS[0]: "other"}, r"holds a converted model already; --overwrite replaces it"),
        slow({"data.parquet": "other"}, r"it holds data.parquet; choose another name"),
    ],
)
def test_a_repository_of_another_kind(hub, script, model, tmp_path, held, message):
    repository = tmp_path / "other"
    repository.mkdir()
    for name, text in held.items():
        (repository / name).write_text(text)
    hub.repositories["org/sent"] = repository
    said = sentence(script(OPEN + "uploader.check()"))
    assert re.search(message, said), said
    assert {n: (repository / n).read_text() for n in names(repository)} == held


def test_overwrite_leaves_no_old_weights(hub, script, model, tmp_path):
    """An old model on the hub is not whole from the first moment on; its files that are not replaced go at the end."""
    repository = Path(shutil.copytree(model, tmp_path / "other", ignore=shutil.ignore_patterns("c*", "s*", ".p*")))
    for name in ("model-experts-00019.safetensors", ".gitattributes"):
        (repository / name).write_bytes(b"old")
    hub.repositories["org/sent"] = repository
    (model / MANIFEST).write_text("new")
    done = script(OPEN + "uploader.overwrite = True\nuploader.check()\nprint(uploader.finish(model))")
    assert done.status == 0 and done.err == "", done.err
    assert same(repository, model)
    assert hub.commits[0] == ["tiny_qmoe_upload.json", f"-{MANIFEST}"]


def test_no_id_of_a_repository(script):
    assert "should be ORG/NAME, received name" in sentence(
        script("from tiny_qmoe_mlx.hub.upload import Uploader\nUploader('name')")
    )
