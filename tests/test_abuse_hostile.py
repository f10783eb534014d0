"""Model directories made to do harm: a part of abuse/hostile_models.py, and what is asked of the package's own text."""

import ast
import io
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import families
import pytest
import records
from abuse import hostile_cases
from abuse import hostile_models as hostile
from abuse import models as tiny
from commands import ROOT, finish, start
from container_files import one_sentence

from tiny_qmoe_mlx import config_file, container, models, native, plain_files, staging
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.original import checkpoint

compiled = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
CASES = hostile_cases.cases()
QUICK = [  # one or two of a kind; `python -m abuse.hostile_models` and the slow test take all
    name
    for name in CASES
    if any(
        part in name
        for part in (
            "model_file", "of its own", "tokenizer.pkl", "a pickle", "type /tmp", "links out", "to /etc", "a pipe",
            "a folder", "socket", "device", "'../", "does not list", "layers 1000000000", "experts 2147483648",
            "10,000 deep", "200 deep", "1 GB", "header of 9223", "overlapping", "overflows", "unknown type",
            "globals of", "reaches in", "without end", "other text", "itself", "index that", "two files",
            "500,000 tensors", "cuts of no", "is not there", "another class", "text_config x", "rope_theta x",
            "model_type of", "rope_scaling", "with holes", "surrogate", "escapes in",
        )
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return hostile.Bench(tmp_path_factory.mktemp("bench"))


def check(bench, name):
    case = CASES[name]
    slow = ("convert", "evaluate") if case.harmless else ()
    only = tuple(c for c in ("convert", "generate", "draft", "verify", "server") if c not in slow)
    found = bench.attempt(case, only or ("generate",))
    assert found and [wrong for _, _, wrong in found if wrong] == []


@compiled
@pytest.mark.parametrize("name", QUICK)
def test_a_hostile_directory_is_refused_or_does_no_harm(bench, name):
    check(bench, name)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_the_others(bench, name):
    check(bench, name)


@compiled
def test_code_that_runs_is_seen(bench):
    """The bench itself: a mark that a model's code would leave is found and taken away."""
    case = hostile_cases.Case(
        hostile_cases.CONVERTED, lambda directory: hostile_cases.mark(directory).touch(), harmless=True
    )
    assert [wrong for _, _, wrong in bench.attempt(case, ("plan",))] == ["ran the model's code"]


# ---- the package's own text

RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "imp", "code"}
CALLS = {"eval", "exec", "compile", "__import__", "exec_module", "spec_from_file_location", "system", "popen"}


def sources() -> list[Path]:
    return sorted((ROOT / "tiny_qmoe_mlx").rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=[str(p.relative_to(ROOT / "tiny_qmoe_mlx")) for p in sources()])
def test_the_package_has_no_way_to_run_code_from_a_file(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not RUNS_CODE.intersection(name.split(".")[0] for name in names), ast.unparse(node)
        if isinstance(node, ast.Call):
            check_call(path, node)


def check_call(path: Path, node: ast.Call) -> None:
    text = ast.unparse(node)
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    of = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
    options = {k.arg: ast.unparse(k.value) for k in node.keywords}
    assert name not in CALLS or of in ("mx", "re", "platform"), text
    assert not (name == "eval" and of != "mx"), text
    assert options.get("allow_pickle", "False") == "False", text
    assert options.get("trust_remote_code", "False") == "False", text
    assert options.get("shell", "False") == "False", text
    assert not (name == "load" and of in ("torch", "yaml")), text
    if name == "import_module":
        assert path.name == "__init__.py", text  # with the names of our own modules
    if name == "load_model" and "get_model_classes" not in options:
        assert path.name == "generate_setup.py", text  # a draft model, after checkpoint.read_original
    if name == "load_tokenizer":
        assert "'trust_remote_code': False" in text, text


# ---- links, and files that change


@pytest.fixture
def noise(tmp_path) -> Path:
    records.write_model(tmp_path / "model")
    return tmp_path / "model"


def test_links_inside_are_followed(noise):
    (noise / "tokenizer.json").rename(noise / ".real")
    (noise / "tokenizer.json").symlink_to(".real")
    container.open_model(noise, hash_files=True)


def test_a_snapshot_of_the_hubs_cache_is_followed_to_its_blobs_alone(noise, tmp_path):
    repository = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in noise.iterdir():
        file.rename(blobs / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    container.open_model(snapshot, hash_files=True)
    (snapshot / "vocab.txt").symlink_to("../../refs")
    with pytest.raises(FormatError, match="'vocab.txt' is a link that leaves the model's directory"):
        container.open_model(snapshot)
    (snapshot / "vocab.txt").unlink()
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")  # a stranger's cache whose blobs are any folder
    with pytest.raises(FormatError, match="is a link that leaves"):
        container.open_model(snapshot)


def test_a_link_to_a_blob_of_this_machines_cache(noise, tmp_path, monkeypatch):
    blobs = tmp_path / "cache" / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (noise / "tokenizer.json").rename(blobs / "0a")
    (noise / "tokenizer.json").symlink_to(blobs / "0a")
    with pytest.raises(FormatError, match="is a link that leaves"):
        container.open_model(noise)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    container.open_model(noise)


@compiled
@pytest.mark.parametrize("name", ["model-rest.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_changes_between_check_and_use_is_refused(bench, tmp_path, monkeypatch, name):
    directory = Path(shutil.copytree(bench.sound[hostile_cases.CONVERTED], tmp_path / "model"))
    checked = container.check_hash

    def check_then_change(where, file, entry, layer=None):
        checked(where, file, entry, layer)
        if file == name:  # the same bytes: what counts is that somebody wrote
            (where / "new").write_bytes((where / file).read_bytes())
            (where / "new").replace(where / file)

    monkeypatch.setattr(container, "check_hash", check_then_change)
    monkeypatch.setattr(models, "check_hash", check_then_change)
    with pytest.raises(FormatError, match=rf"\[{name}\] should stay as it was while it is read"):
        tiny.tokens(directory)


# ---- reading and writing


@pytest.mark.parametrize("kind", ["pipe", "folder", "too long"])
def test_a_file_that_is_none_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"x" * 101)
    with pytest.raises((FormatError, IsADirectoryError)) as error:
        plain_files.read(path, 100)
    if kind != "folder":
        assert "should" in one_sentence(error.value)


def test_a_file_of_just_the_size_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert plain_files.read(tmp_path / "a", 100) == b"x" * 100


def test_writing_follows_no_link_in_the_place_of_the_temporary_name(tmp_path):
    """Whoever can write into the directory could otherwise have any file of ours replaced."""
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    for target in ("profile.json", "config.json"):
        (tmp_path / f"{target}.partial").symlink_to(precious)
        staging.write_json(tmp_path / target, {"a": 1})
        assert not (tmp_path / target).is_symlink() and (tmp_path / target).read_text() == '{\n  "a": 1\n}\n'
    assert precious.read_text() == "years of work"


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    (tmp_path / "profile.json").symlink_to(precious)
    staging.write_json(tmp_path / "profile.json", {})
    assert precious.read_text() == "years of work" and not (tmp_path / "profile.json").is_symlink()


@compiled
def test_an_unfinished_directory_with_a_link_out_is_not_written_into(bench, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / staging.PLAN).write_text("{}")
    (partial / "model-rest.safetensors").symlink_to(precious)
    (partial / "config.json.partial").symlink_to(precious)
    source = bench.sound[hostile_cases.ORIGINAL]
    options = ["--bits", "3", "--calibration", "none", "--report", "none", "--quiet"]
    result = hostile.run("convert", ["--hf-path", source, "--mlx-path", tmp_path / "out", *options])
    assert result.status == 1 and "is a link that leaves" in result.err
    assert precious.read_text() == "years of work"


# ---- templates that do not end


@compiled
@pytest.mark.slow
def test_a_template_without_an_end_is_ended_by_an_interrupt(bench, tmp_path, interruptible):
    """jinja bounds one range, not a nest of them: a person ends the command, with one word."""
    directory = Path(shutil.copytree(bench.sound[hostile_cases.CONVERTED], tmp_path / "model"))
    loops = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
    (directory / "chat_template.jinja").write_text(loops)
    hostile_cases.forge(directory)
    child = start("generate", "--model", directory, "--prompt", "x", "--quiet")
    wait_until_busy(child.pid, 4.0)
    child.send_signal(signal.SIGINT)
    done = finish(child)
    assert (done.status, done.err) == (130, "error: interrupted\n"), done


def wait_until_busy(pid: int, seconds: float) -> None:
    """Until a process has computed for so long: by then imports are done, and the template loops."""
    until = time.monotonic() + 100
    while time.monotonic() < until:
        if sys.platform == "linux":
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            if (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") > seconds:
                return
        elif time.monotonic() > until - 85:
            return
        time.sleep(0.1)
    raise AssertionError("the command did not get to its template")


@pytest.mark.parametrize("kind", ["phixtral", "bailing_moe"])  # transformers has no config of these types
def test_a_tokenizer_of_a_type_that_transformers_does_not_know(tmp_path, monkeypatch, kind):
    """It would ask whether to run the model's code, and take a yes from whatever stands on standard input."""
    directory = tmp_path / "hf"
    directory.mkdir()
    tiny.tiny_models.write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": 258}))
    hostile_cases.edit("tokenizer_config.json", tokenizer_class="EvilTokenizer", **hostile_cases.AUTO)(directory)
    hostile_cases.evil("tokenization_evil.py")(directory)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(FormatError, match="should hold a tokenizer that transformers can load"):
        checkpoint.open_tokenizer(directory, {})
    assert not hostile_cases.mark(directory).exists()


@compiled
def test_read_original_refuses_code_before_mlx_lm_sees_it(bench, tmp_path):
    """Old versions of mlx-lm run a config's model_file unasked."""
    directory = Path(shutil.copytree(bench.sound[hostile_cases.ORIGINAL], tmp_path / "hf"))
    hostile_cases.edit("config.json", model_file="evil.py")(directory)
    with pytest.raises(FormatError, match="code of the model's own is never run here"):
        checkpoint.load_lazy(directory)


def test_a_link_out_is_not_uploaded(noise):
    """What it leads to would be published."""
    from tiny_qmoe_mlx.hub.upload import Uploader

    (noise / "LICENSE").symlink_to("/etc/passwd")
    with pytest.raises(FormatError, match="'LICENSE' is a link that leaves the model's directory"):
        Uploader.finish(Uploader.__new__(Uploader), noise)


def test_bounds_are_beyond_every_known_model():
    """Configs as published, and those of the families' tests, are taken as they are."""
    known = json.loads((Path(__file__).parent / "public_models.json").read_text())
    configs = [entry["config"] for entry in known] + [{**families.COMMON, **own} for own in families.TYPES.values()]
    assert len(configs) > 60
    for config in configs:
        config_file.check(config)


def test_folders_that_nobody_reads_may_lie_in_a_model(noise):
    for name in ("tokenizer", "original", ".cache", "vocab"):
        (noise / name).mkdir()
    container.open_model(noise)
    (noise / "additional_chat_templates").mkdir()
    with pytest.raises(FormatError, match=r"\[additional_chat_templates\] does not belong to this model"):
        container.open_model(noise)


@pytest.mark.parametrize(
    "name", ["../model-1.safetensors", "a/model.safetensors", "/model.safetensors", "model\0.safetensors"]
)
def test_a_shard_of_another_folder_is_none(name, tmp_path):
    """Notes of a download name files that are cut to their header."""
    from tiny_qmoe_mlx.hub import shards

    precious = tmp_path / "model-1.safetensors"
    precious.write_bytes(b"x" * 100)
    place = tmp_path / "shards"
    place.mkdir()
    facts = {"size": 100, "header": 8, "sha256": None, "git": ""}
    notes = {"model": "a/b", "revision": "main", "shards": {name: facts}, "whole": []}
    (place / shards.SHARDS).write_text(json.dumps(notes))
    reader = shards.SourceShards.__new__(shards.SourceShards)
    reader.directory, reader.hub_id, reader.revision = place, "a/b", "main"
    with pytest.raises(FormatError, match="is damaged"):
        reader._read_notes()
    assert shards._is_shard("model-00001-of-00002.safetensors") and precious.read_bytes() == b"x" * 100
