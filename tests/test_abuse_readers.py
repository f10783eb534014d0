"""Readers of strangers' files: inputs that broke them once, and a short run of the fuzzer (abuse/fuzz_readers.py)."""

import pytest
from abuse import fuzz_readers, reader_targets

KEPT = sorted(fuzz_readers.CRASHES.glob("*"))
COUNT = 150  # inputs of each reader


@pytest.mark.parametrize("path", KEPT, ids=[path.name for path in KEPT])
def test_what_broke_a_reader_once_is_read_or_refused(path, tmp_path):
    assert fuzz_readers.replay(path.name.split("-")[0], path.read_bytes(), tmp_path) == ""


@pytest.mark.parametrize("name", reader_targets.MAKERS)
def test_mutated_files_are_read_or_refused(name, tmp_path):
    watch = fuzz_readers.Watch(name, reader_targets.make(name, tmp_path))
    assert all(fuzz_readers.judge(watch.target, seed) == "" for seed in watch.target.seeds)
    fuzz_readers.mutate_only(watch, COUNT, seed=1)
    assert watch.count >= COUNT and not watch.broken


def test_seeds_are_taken_or_refused_for_what_they_are(tmp_path):
    """A reader that refuses all of its seeds would be fuzzed in vain."""
    for name in reader_targets.MAKERS:
        target = reader_targets.make(name, tmp_path / name)
        taken = 0
        for seed in target.seeds:
            try:
                target.read(seed)
                taken += 1
            except Exception as error:
                assert fuzz_readers.is_own(error)
        assert taken, name


def broken_reader(error: BaseException):
    def read(data: bytes) -> None:
        raise error

    return reader_targets.Target([b"x"], read)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("a"), "KeyError at"),
        (RecursionError("too deep"), "RecursionError at"),
        (MemoryError(), "MemoryError at"),
        (ValueError("no place named"), "ValueError at"),
        (ValueError("[x] two\nlines"), "ValueError at"),
        (ValueError("[x] " + "long " * 400), "ValueError at"),
        (DeprecationWarning("old"), "DeprecationWarning at"),
    ],
)
def test_the_judge_sees_what_breaks_the_promise(error, said):
    assert fuzz_readers.judge(broken_reader(error), b"x").startswith(said)


def test_the_judge_takes_a_sentence():
    assert fuzz_readers.judge(broken_reader(ValueError("[x] should be y, received z.")), b"x") == ""


def test_the_judge_sees_a_reader_that_hangs(monkeypatch):
    clock = iter((0.0, 2.5))
    monkeypatch.setattr(fuzz_readers.time, "process_time", lambda: next(clock))
    said = fuzz_readers.judge(reader_targets.Target([b""], lambda data: None), b"")
    assert said == "took 2.5 s of processor time"
