"""The C++ library's thread pool: more threads than cores, none to be had, and all under ThreadSanitizer."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from abuse import races

SOURCES = Path(__file__).resolve().parents[1] / "kernels" / "cpu"
COMPILER = shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def output_of(folder: Path, name: str, *given: str, pool: Path = SOURCES / "threads.cpp") -> str:
    """What a program of this directory prints, compiled with the pool."""
    program = folder / name
    files = [Path(__file__).with_name(f"{name}.cpp"), pool]
    subprocess.run([COMPILER, "-std=c++17", "-O2", "-pthread", f"-I{SOURCES}", *files, "-o", program], check=True)
    return subprocess.run([program, *given], capture_output=True, text=True, check=True, timeout=300).stdout.strip()


@pytest.mark.slow
@needs_compiler
def test_every_item_runs_exactly_once(tmp_path):
    bad = output_of(tmp_path, "native_threads")
    assert bad == "0", f"{bad} of 400000 jobs ran an item twice or not at all; before it was mended it was about 6"


@needs_compiler
def test_a_worker_that_is_late_for_the_end_leaves(tmp_path):
    """One that had looked whether the pool ends, and then took its end for a job, ran item 0 of the last one once more,
    whose memory had gone, and slept for ever: ThreadSanitizer saw it once in five minutes of changing numbers of
    threads. Here each worker is late."""
    late, text = "std::this_thread::sleep_for(std::chrono::microseconds(300));", (SOURCES / "threads.cpp").read_text()
    assert text.count("seen = current();") == 1
    (tmp_path / "threads.cpp").write_text(text.replace("seen = current();", f"{late} seen = current(); {late}"))
    assert output_of(tmp_path, "native_resizes", "1000", pool=tmp_path / "threads.cpp") == "0"


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="a limit on address space stands for one on threads")
def test_a_system_without_threads_refuses_the_call_and_no_more(tmp_path):
    """It ended the process: workers that had started went down with their vector."""
    assert output_of(tmp_path, "native_no_threads") == "refused done"


@pytest.mark.slow
@pytest.mark.skipif(races.COMPILER is None, reason="needs clang 19")
def test_readers_and_products_have_no_data_race(tmp_path):
    counts, said = races.native(tmp_path, 15)
    assert counts.pop("wrong") == 0 and not said, said
    assert min(counts.values()) > 0, counts


@pytest.mark.slow
@pytest.mark.skipif(races.COMPILER is None, reason="needs clang 19")
def test_the_sanitizer_sees_a_planted_race(tmp_path):
    """A pool that opens a job before its fields are written."""
    text = (SOURCES / "threads.cpp").read_text()
    planted = text.replace("std::atomic<uint32_t> count_{0}", "uint32_t count_{0}; std::atomic<uint32_t> unused_{0}")
    planted = planted.replace("count_.load()", "count_")
    assert planted != text
    (tmp_path / "threads.cpp").write_text(planted)
    files = [Path(__file__).with_name("native_threads.cpp"), tmp_path / "threads.cpp"]
    subprocess.run([races.COMPILER, *races.SANITIZE, *files, "-o", tmp_path / "program"], check=True)
    done = subprocess.run(
        [tmp_path / "program"], capture_output=True, text=True, env={"TSAN_OPTIONS": "halt_on_error=1"}
    )
    assert done.returncode != 0 and "data race" in done.stderr
