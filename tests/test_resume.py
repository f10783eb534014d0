"""A conversion that was stopped, killed, or ran out of disk goes on where it was, with the same bytes in the end."""

import json
import os
import random
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from commands import SMALL, finish, names, refusal, start

from tiny_qmoe_mlx import native
from tiny_qmoe_mlx.conversion import run as conversion
from tiny_qmoe_mlx.conversion import unfinished
from tiny_qmoe_mlx.conversion.settings import Settings
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.staging import PLAN, STATE, TOKENS

pytest_plugins = ["command_fixtures"]
pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
SETTINGS = {"bits": 3.0, "sequences": 8, "sequence_tokens": 64}
LINE = SMALL


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def whole(checkpoint, text, tmp_path_factory) -> dict[str, bytes]:
    """What an uninterrupted conversion writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    conversion.convert(checkpoint, out, Settings(calibration=str(text), **SETTINGS))
    return contents(out)


class Stopped(BaseException):
    """Nothing in the package catches it, as nothing can catch a kill."""


def stopped_after(monkeypatch, moment: int, checkpoint: Path, out: Path, text: Path) -> None:
    """A conversion that ends at the moment-th write of its state, before or after."""
    save, count = unfinished.save_state, 0

    def save_and_stop(*args):
        nonlocal count
        if count == moment // 2 and not moment % 2:
            raise Stopped
        save(*args)
        count += 1
        if count == moment // 2 + 1 and moment % 2:
            raise Stopped

    with monkeypatch.context() as m, pytest.raises(Stopped):
        m.setattr(unfinished, "save_state", save_and_stop)
        conversion.convert(checkpoint, out, Settings(calibration=str(text), **SETTINGS))


@pytest.mark.parametrize("moment", range(8))
def test_a_stopped_conversion_goes_on_with_the_same_bytes(monkeypatch, checkpoint, text, tmp_path, whole, moment):
    out = tmp_path / "out"
    stopped_after(monkeypatch, moment, checkpoint, out, text)
    assert names(tmp_path) == (["out.partial"] if moment else [])
    began = [name for name in names(tmp_path / "out.partial") if name.endswith(".safetensors")] if moment else []
    times = {name: (tmp_path / "out.partial" / name).stat().st_mtime_ns for name in began if name != STATE}
    conversion.convert(checkpoint, out, Settings(calibration=str(text), **SETTINGS))
    assert contents(out) == whole and names(tmp_path) == ["out"]
    finished = moment // 2 + moment % 2  # states written: the embeddings', then one for each of the three layers
    again = [name for name, then in times.items() if (out / name).stat().st_mtime_ns != then]
    assert len(times) - len(again) >= max(finished - 1, 0)


def test_many_stops_in_a_row(monkeypatch, checkpoint, text, tmp_path, whole):
    for _ in range(3):
        stopped_after(monkeypatch, 1, checkpoint, tmp_path / "out", text)
    conversion.convert(checkpoint, tmp_path / "out", Settings(calibration=str(text), **SETTINGS))
    assert contents(tmp_path / "out") == whole


def test_a_conversion_that_stopped_before_its_manifest(monkeypatch, checkpoint, text, tmp_path, whole):
    """Card and pictures are there already, and are not counted as a part of themselves."""
    with monkeypatch.context() as m, pytest.raises(Stopped):
        m.setattr(conversion, "write_manifest", lambda directory: (_ for _ in ()).throw(Stopped))
        conversion.convert(checkpoint, tmp_path / "out", Settings(calibration=str(text), **SETTINGS))
    assert "README.md" in names(tmp_path / "out.partial")
    conversion.convert(checkpoint, tmp_path / "out", Settings(calibration=str(text), **SETTINGS))
    assert contents(tmp_path / "out") == whole


def test_a_model_that_was_set_aside_comes_back(checkpoint, text, tmp_path, whole, here):
    """A kill between the two renames of --overwrite leaves no model under its name, and the old one beside it."""
    child = start("convert", "--help")
    finish(child)
    aside = tmp_path / f"out.replaced-{child.pid}"
    aside.mkdir()
    for name, data in whole.items():
        (aside / name).write_bytes(data)
    line = ("--hf-path", checkpoint, "--mlx-path", tmp_path / "out", "--calibration", text, *LINE)
    assert "is a converted model already" in refusal(here("convert", *line))
    assert names(tmp_path) == ["out"] and contents(tmp_path / "out") == whole


KILLS = [pytest.param(n, marks=[] if n < 2 else pytest.mark.slow) for n in range(30)]


@pytest.mark.parametrize("number", KILLS)
def test_kill_at_a_random_moment(checkpoint, text, tmp_path, whole, number):
    """kill -9 again and again, at moments that the seed decides, until the conversion gets through."""
    draw, out, kills = random.Random(number), tmp_path / "out", 0
    while not out.exists():
        child = start("convert", "--hf-path", checkpoint, "--mlx-path", out, "--calibration", text, *LINE)
        time.sleep(draw.uniform(0.5, 4) if kills < 4 else 60 * (kills > 8))
        if kills < 4:
            child.send_signal(signal.SIGKILL)
            kills += 1
        result = finish(child)
        assert "Traceback" not in result.err and set(names(tmp_path)) <= {"out", "out.partial"}
    assert contents(out).keys() - whole.keys() <= {PLAN, STATE}
    assert {name: data for name, data in contents(out).items() if name in whole} == whole


# ---- what is not gone on with

OTHERS = {
    "bits": (("--bits", 2.5), "was begun with bits 3.0, received bits 2.5"),
    "rest bits": (("--rest-bits", 4), "was begun with rest bits 8, received rest bits 4"),
    "seed": (("--seed", 1), "was begun with seed 0, received seed 1"),
    "trellis": (("--trellis-length", 14), "was begun with length 12, received length 14"),
    "tokens": (("--calibration-tokens", 32), "was begun with sequence tokens 64, received sequence tokens 32"),
    "calibration": (("--calibration", "none"), "was begun with calibration .*, received calibration none"),
}


@pytest.fixture
def begun(monkeypatch, checkpoint, text, tmp_path) -> Path:
    """An unfinished conversion with one layer done."""
    stopped_after(monkeypatch, 3, checkpoint, tmp_path / "out", text)
    return tmp_path / "out.partial"


@pytest.mark.parametrize("what", OTHERS)
def test_other_settings_are_refused(begun, checkpoint, text, here, what):
    options, message = OTHERS[what]
    before = contents(begun)
    line = ("--hf-path", checkpoint, "--mlx-path", begun.with_suffix(""), "--calibration", text, *LINE, *options)
    sentence = refusal(here("convert", *line))
    assert str(begun) in sentence and "remove that directory to begin anew" in sentence
    assert re.search(message, sentence), sentence
    assert contents(begun) == before


def test_another_calibration_text_is_refused(begun, checkpoint, text, tmp_path, here):
    before = text.read_text()
    try:
        text.write_text(before[::-1])
        line = ("--hf-path", checkpoint, "--mlx-path", begun.with_suffix(""), "--calibration", text, *LINE)
        assert "was begun with a calibration whose" in refusal(here("convert", *line)) and begun.exists()
    finally:
        text.write_text(before)


def test_a_source_that_changed_is_refused(begun, checkpoint, text, tmp_path, here):
    source = Path(shutil.copytree(checkpoint, tmp_path / "hf"))
    os.utime(source / "model.safetensors", (1, 1))
    line = ("--hf-path", source, "--mlx-path", begun.with_suffix(""), "--calibration", text, *LINE)
    sentence = refusal(here("convert", *line))
    assert "was begun with a source whose" in sentence and begun.exists()


def test_a_run_that_fails_early_keeps_what_an_earlier_one_finished(begun, checkpoint, text, tmp_path, here):
    before = contents(begun)
    line = ("--hf-path", tmp_path / "nowhere", "--mlx-path", begun.with_suffix(""), "--calibration", text, *LINE)
    refusal(here("convert", *line))
    (tmp_path / "short.txt").write_text("too short")
    line = (
        "--hf-path",
        checkpoint,
        "--mlx-path",
        begun.with_suffix(""),
        "--calibration",
        tmp_path / "short.txt",
        *LINE,
    )
    refusal(here("convert", *line))
    assert contents(begun) == before


@pytest.mark.parametrize(
    ("error", "stays"), [(FormatError("the hub"), True), (OSError("the disk"), True), (ValueError("NaN"), False)]
)
def test_what_is_finished_outlives_a_hub_or_a_disk_that_fails(tmp_path, error, stays):
    with pytest.raises(type(error)), unfinished.unfinished_directory(tmp_path / "out", False) as directory:
        (directory / PLAN).write_text("{}")
        unfinished.save_state(directory, 0, [], {})
        raise error
    assert names(tmp_path) == (["out.partial"] if stays else [])


def damage_plan(directory: Path) -> None:
    (directory / PLAN).write_text("{")


def damage_state(directory: Path) -> None:
    data = (directory / STATE).read_bytes()
    (directory / STATE).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("damage", [damage_plan, damage_state])
def test_damaged_notes_are_refused(begun, checkpoint, text, here, damage):
    damage(begun)
    line = ("--hf-path", checkpoint, "--mlx-path", begun.with_suffix(""), "--calibration", text, *LINE)
    sentence = refusal(here("convert", *line))
    assert "is damaged; remove" in sentence and begun.exists()


def test_a_finished_file_that_is_gone_is_noticed(begun, checkpoint, text, here):
    victim = next(begun.glob("model-rest-*.safetensors"))
    victim.unlink()
    line = ("--hf-path", checkpoint, "--mlx-path", begun.with_suffix(""), "--calibration", text, *LINE)
    sentence = refusal(here("convert", *line))
    assert victim.name in sentence and begun.exists()


def test_a_strangers_directory_is_left_alone(checkpoint, text, tmp_path, here):
    stranger = tmp_path / "out.partial"
    line = ("--hf-path", checkpoint, "--mlx-path", tmp_path / "out", "--calibration", text, *LINE)
    for name in ("notes.txt", "film.partial"):
        stranger.mkdir()
        (stranger / name).write_text("mine")
        assert "no conversion began it" in refusal(here("convert", *line)) and names(stranger) == [name]
        shutil.rmtree(stranger)
    (tmp_path / "mine").mkdir()
    stranger.symlink_to("mine")  # a link is not followed
    assert "no conversion began it" in refusal(here("convert", *line)) and names(tmp_path / "mine") == []
    stranger.unlink()
    stranger.write_text("mine")
    assert "no conversion began it" in refusal(here("convert", *line)) and stranger.read_text() == "mine"


def killed_before_its_plan(monkeypatch, checkpoint, out, settings) -> None:
    """A kill while rates are chosen, when the calibration text has been written."""

    def stop(*args):
        out.with_name("copy").mkdir()
        shutil.copy(out.with_name("out.partial") / TOKENS, out.with_name("copy"))
        raise Stopped

    with monkeypatch.context() as m, pytest.raises(Stopped):
        m.setattr(conversion, "plan_layers", stop)
        conversion.convert(checkpoint, out, settings)
    out.with_name("copy").rename(out.with_name("out.partial"))


def test_killed_between_its_text_and_its_plan(checkpoint, tmp_path, monkeypatch):
    """What is left may be of other settings: it begins anew, and does not take itself for a stranger."""
    settings = Settings(bits=3.0, calibration="self", sequences=3, sequence_tokens=32)
    whole = contents(conversion.convert(checkpoint, tmp_path / "whole" / "out", settings))
    killed_before_its_plan(monkeypatch, checkpoint, tmp_path / "out", replace(settings, sequences=2))
    assert names(tmp_path / "out.partial") == [TOKENS]
    assert contents(conversion.convert(checkpoint, tmp_path / "out", settings)) == whole


def test_other_settings_leave_a_plan_alone(checkpoint, text, tmp_path, monkeypatch):
    """Also where no layer is finished yet."""
    settings = Settings(calibration=str(text), **SETTINGS)
    directory = tmp_path / "out.partial"
    directory.mkdir()
    (directory / PLAN).write_text(json.dumps({"settings": {"bits": 2.0}, "source": {}, "calibration": {}, "made": {}}))
    with pytest.raises(FormatError, match="was begun with bits 2.0, received bits 3.0"):
        conversion.convert(checkpoint, tmp_path / "out", settings)
    assert names(directory) == [PLAN]


def test_two_conversions_of_one_output(checkpoint, text, tmp_path, here):
    with unfinished.unfinished_directory(tmp_path / "out", False) as directory:
        (directory / PLAN).write_text(json.dumps({}))
        line = ("--hf-path", checkpoint, "--mlx-path", tmp_path / "out", "--calibration", text, *LINE)
        assert "another conversion is writing it" in refusal(here("convert", *line))
        assert names(directory) == [PLAN]
        (directory / PLAN).unlink()
    assert names(tmp_path) == ["out"]
