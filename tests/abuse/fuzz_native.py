"""Coverage-guided fuzzing of the C++ library with sanitizers; what it decodes is compared with slow decoders.

    PYTHONPATH=tests python -m abuse.fuzz_native [--count N] [--targets NAME ...] [--jobs N] [--keep] [--coverage]

`--count` executions are shared among the targets of cpp/. An input that breaks a promise is written to crashes/, where
the tests replay it for ever. `--keep` keeps in corpus/ what of the inputs found reaches something new; `--coverage`
fuzzes nothing and says which share of the lines of kernels/cpu the first inputs and corpus/ run.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from metal_cpu import toolchain

from abuse import native_build, native_corpus, record

HERE = Path(__file__).resolve().parent
CRASHES, CORPUS = HERE / "crashes", HERE / "corpus"
INPUT_SECONDS = 60  # after which an input counts as a hang; the slowest take some milliseconds
MOST_MIB = 4096  # resident, with the sanitizer's shadow


@dataclass(frozen=True)
class Found:
    """What came out of a target: executions, comparisons with the slow reading, branches and features reached, and the
    inputs that broke it."""

    executions: int
    compared: int
    branches: int
    features: int
    crashes: list[Path]
    output: str


def inputs(name: str, folder: Path) -> Path:
    """A folder with all that is there to begin with: seeds, the kept corpus and earlier crashes."""
    target = native_build.TARGETS[name]
    native_corpus.write(target.source, folder)
    kept = CORPUS / f"{target.source}.zip"
    if kept.exists():
        with zipfile.ZipFile(kept) as archive:
            archive.extractall(folder)
    for crash in earlier_crashes(target.source):
        (folder / crash.name).write_bytes(crash.read_bytes())
    return folder


def earlier_crashes(source: str) -> list[Path]:
    return sorted(CRASHES.glob(f"native_{source}_*"))


def run(name: str, folder: Path, executions: int, seed: int = 1, program: Path | None = None) -> Found:
    """Fuzz one target.

    Args:
        name: of native_build.TARGETS.
        folder: of inputs; what reaches something new is added to it.
        executions: at most; 0 only replays the folder.
        seed: of the mutations.
        program: what native_build.build made; None builds it.
    """
    target = native_build.TARGETS[name]
    prefix = CRASHES / f"native_{target.source}_"
    CRASHES.mkdir(exist_ok=True)
    before = set(CRASHES.glob(f"{prefix.name}*"))
    options = {
        "runs": executions,
        "seed": seed,
        "max_len": target.largest,
        "timeout": INPUT_SECONDS,
        "rss_limit_mb": MOST_MIB,
        "artifact_prefix": prefix,
        "print_final_stats": 1,
        "verbosity": 1,
    }
    command = [
        str(program or native_build.build(name)),
        *(f"-{option}={value}" for option, value in options.items()),
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    crashes = sorted(set(CRASHES.glob(f"{prefix.name}*")) - before)
    if done.returncode and not crashes:
        raise RuntimeError(f"[fuzz_native] {name} should run, and ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return _read(done.stderr, crashes)


def _read(output: str, crashes: list[Path]) -> Found:
    def last(pattern: str) -> int:
        found = re.findall(pattern, output)
        return int(found[-1]) if found else 0

    return Found(
        last(r"number_of_executed_units: (\d+)"),
        last(r"compared: (\d+)"),
        last(r" cov: (\d+)"),
        last(r" ft: (\d+)"),
        crashes,
        output,
    )


def keep(name: str, folder: Path) -> None:
    """Write the fewest inputs of a folder that reach all of what it reaches to corpus/."""
    source = native_build.TARGETS[name].source
    with tempfile.TemporaryDirectory() as least:
        program = str(native_build.build(name))
        subprocess.run(
            [program, "-merge=1", f"-rss_limit_mb={MOST_MIB}", least, str(folder)], check=True, capture_output=True
        )
        CORPUS.mkdir(exist_ok=True)
        with zipfile.ZipFile(CORPUS / f"{source}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(Path(least).iterdir()):
                archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes(), zipfile.ZIP_DEFLATED)


def covered(names: list[str]) -> dict[str, float]:
    """Share of the lines of each of the library's files that the corpora of some targets run, in percent."""
    with tempfile.TemporaryDirectory() as work:
        programs = []
        for name in names:
            programs.append(str(native_build.build(name, coverage=True)))
            folder = inputs(name, Path(work) / name)
            command = [programs[-1], "-runs=0", f"-rss_limit_mb={MOST_MIB}", str(folder)]
            environment = {**os.environ, "LLVM_PROFILE_FILE": f"{work}/{name}.profraw"}
            subprocess.run(command, env=environment, check=True, capture_output=True)
        merge = ["merge", "-o", f"{work}/all", *map(str, Path(work).glob("*.profraw"))]
        toolchain.checked([str(toolchain.tool("llvm-profdata")), *merge])
        objects = [programs[0], *(f"-object={program}" for program in programs[1:])]
        command = [str(toolchain.tool("llvm-cov")), "export", "-summary-only", f"-instr-profile={work}/all", *objects]
        command.append(str(native_build.LIBRARY))
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["data"][0]
    figures = {Path(f["filename"]).name: f["summary"]["lines"]["percent"] for f in found["files"]}
    return {"all": found["totals"]["lines"]["percent"], **figures}


def fuzz(name: str, executions: int, seed: int, kept: bool) -> Found:
    """A whole run of a target, from a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        found = run(name, inputs(name, Path(folder)), executions, seed=seed)
        if kept and not found.crashes:
            keep(name, Path(folder))
    print(
        f"{name}: {found.executions:,} executions, {found.compared:,} compared, {found.branches} branches, "
        f"{found.features} features, crashes: {', '.join(c.name for c in found.crashes) or 'none'}",
        flush=True,
    )
    if found.crashes:
        print(found.output[-6000:], flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000_000)
    parser.add_argument(
        "--targets", nargs="+", choices=sorted(native_build.TARGETS), default=list(native_build.TARGETS)
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--coverage", action="store_true")
    arguments = parser.parse_args()
    if problem := native_build.unavailable():
        sys.exit(f"error: {problem}")
    if arguments.coverage:
        for name, percent in covered(arguments.targets).items():
            print(f"{name}: {percent:.1f} % of lines")
        return 0
    start, shares = time.monotonic(), {name: native_build.TARGETS[name].share for name in arguments.targets}
    parts = {name: max(1, round(arguments.count * share / sum(shares.values()))) for name, share in shares.items()}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(lambda name: fuzz(name, parts[name], arguments.seed, arguments.keep), parts))
    crashes = [crash.name for each in found for crash in each.crashes]
    figures: dict[str, int | float | str] = {
        "executions": sum(each.executions for each in found),
        "compared with a slow reading": sum(each.compared for each in found),
    }
    figures |= {
        f"{name}: branches, features": f"{f.branches}, {f.features}" for name, f in zip(parts, found, strict=True)
    }
    every = len(parts) == len(native_build.TARGETS)
    record.keep(
        1,
        "fuzz_native" if every else "_".join(["fuzz_native", *parts]),
        "No bytes make the C++ library read or write outside, or decode a wrong weight.",
        "abuse.fuzz_native",
        time.monotonic() - start,
        figures | {"crashes": len(crashes)},
        len(crashes),
    )
    return int(bool(crashes))


if __name__ == "__main__":
    sys.exit(main())
