"""A short version of abuse.faults_reading, abuse.faults_writing and abuse.power_cut, and the schedules that once broke
the promise.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from abuse import disk, fault_models, faults_reading, faults_writing, power_cut
from abuse.fault_tasks import Task, tasks
from abuse.replayed_disk import Change, ReplayedDisk

from tiny_qmoe_mlx import native

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library"),
    pytest.mark.skipif(bool(disk.missing()), reason=disk.missing() or "here"),
]


slow = pytest.mark.slow
QUICK = ("generate, streamed", "verify")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def shim(work) -> Path:
    return disk.build(work)


@pytest.fixture(scope="module")
def commands(shim, work) -> dict[str, fault_models.Command]:
    return {command.name: command for command in fault_models.commands(shim, work, ("convert", *QUICK))}


# ---- the disk itself


def test_the_shim_sees_every_read_of_weights_and_records(shim, work, commands):
    """Every byte of the model's files is asked for below the shim; records past the page cache."""
    command = commands["generate, streamed"]
    top = disk.fresh(command.template, work / "run")
    plan = "see read 0 -1 *;see vread 0 -1 *"
    done = disk.run(shim, top, *command.argv, plan=plan)
    assert done.status == 0 and command.right(done, top)
    seen = {(words[1], Path(words[3]).name) for words in map(str.split, done.injected)}
    assert {("vread", p.name) for p in (top / "out").glob("model-experts-*")} <= seen
    assert {("read", p.name) for p in (top / "out").glob("model*.safetensors")} <= seen
    assert '"direct_reads": true' in done.out


def test_a_file_that_was_not_synced_may_be_empty_under_its_new_name(tmp_path):
    """The replay against a history written by hand: written, renamed, and only the directory synced."""
    (tmp_path / "top").mkdir()
    found = ReplayedDisk(tmp_path / "top")
    changes = [("C", found.top, "a.partial", "7"), ("W", "7", "0", "3"), ("R", found.top, "a.partial", found.top, "a")]
    for kind, *fields in changes:
        found.apply(Change(kind, tuple(fields), b"abc"))
    rng = random.Random(0)
    assert found.names("none", rng) == {} and list(found.names("all", rng)) == [(found.top, "a")]
    found.apply(Change("S", (found.top,)))
    for fate, content in {"lost": b"", "zeros": b"\0\0\0", "kept": b"abc"}.items():
        found.build(found.names("none", rng), fate, rng, tmp_path / fate)
        assert (tmp_path / fate / "a").read_bytes() == content
    found.apply(Change("S", ("7",)))
    found.build(found.names("none", rng), "lost", rng, tmp_path / "synced")
    assert (tmp_path / "synced" / "a").read_bytes() == b"abc"


# ---- reading

BROKE = {  # command -> plan, kind
    "a mapped file": ("generate, streamed", "eio map 0 -1 *", "eio"),
    "less than a record": ("verify", "short read p=0.3 5 *", "short, many"),
    "weights of the original": ("convert", "eio read 0 -1 hf/model.safetensors", "eio for good"),
    "the original, later": ("convert", "eio read 30 1 hf/model.safetensors", "eio"),
    "an array that numpy asks for": ("convert", "eio read 53 1 *", "eio"),
    "the calibration text": ("convert", "eio read 0 1 text.txt", "eio"),
    "weights of the model": ("generate, streamed", "eio read 3 1 model-rest-00001", "eio"),
    "a record that hangs": ("generate, streamed", "delay vread 9 1 *", "delay"),
}


@pytest.mark.parametrize("what", BROKE)
def test_schedules_that_broke_the_promise(shim, work, commands, what):
    name, plan, kind = BROKE[what]
    outcome = faults_reading.attempt(shim, work, commands[name], kind, plan)
    assert not outcome.wrong, outcome


def test_random_schedules_of_reading(shim, work, commands):
    rng, quick = random.Random(1), [commands[name] for name in QUICK]
    found = [faults_reading.attempt(shim, work, *faults_reading.draw(quick, rng)) for _ in range(4)]
    assert not [outcome for outcome in found if outcome.wrong], found


# ---- writing


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Iterator[tuple[Path, Path, list[Task]]]:
    """A directory to work in, the shim, and two tasks."""
    work = tmp_path_factory.mktemp("written")
    with tasks(work, ("convert", "profile")) as (shim, found):
        yield work, shim, found


def test_kills_and_full_disks(written):
    work, shim, found = written
    outcomes = list(faults_writing.campaign(shim, work, found, 4, 3))
    assert not [outcome for outcome in outcomes if outcome.wrong], outcomes


def test_power_cuts_of_a_conversion(written):
    work, shim, found = written
    cuts = list(power_cut.campaign(power_cut.journal(shim, work, found[0]), work, 20, 7))
    assert not [cut for cut in cuts if cut.wrong], cuts
    assert {"nothing", "unfinished"} <= {cut.found for cut in cuts}


LIES = ("*", "model-experts-00001", "config.json", "out.partial$", "state.safetensors", "README.md")


@pytest.mark.parametrize("part", ["*", *[pytest.param(part, marks=slow) for part in LIES[1:]]])
def test_a_sync_that_is_left_out_is_found(written, part):
    """The cuts find what they are there for: a disk that lies about one kind of fsync."""
    work, shim, found = written
    lying = power_cut.journal(shim, work, found[0], f"lie sync 0 -1 {part}")
    assert any(cut.wrong for cut in power_cut.campaign(lying, work, 60, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(power_cut.SHARES)[1:])
def test_power_cuts_of_what_replaces_files(tmp_path, name):
    with tasks(tmp_path, [name]) as (shim, found):
        cuts = list(power_cut.campaign(power_cut.journal(shim, tmp_path, found[0]), tmp_path, 20, 7))
    assert not [cut for cut in cuts if cut.wrong], cuts
