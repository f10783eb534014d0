"""Fuzzes every Python reader of a stranger's file: it reads, or raises the package's own error with a sentence.

    PYTHONPATH=tests python -m abuse.fuzz_readers --count 1000000

Each target runs in a process of its own: guided by coverage where the package atheris is installed, else by mutation
alone. What breaks the promise is kept in crashes_readers/, and read again by the tests.
"""

import argparse
import gc
import hashlib
import importlib.util
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abuse.reader_targets import Target

PROMISE = "No file makes a reader crash, hang, warn, or hold more memory than the file is worth."
ROOT = Path(__file__).resolve().parents[2]
CRASHES = Path(__file__).parent / "crashes_readers"
SENTENCE = re.compile(r"\[[^\]\n]+\] [^\n]+|error: [^\n]+", re.DOTALL)
SLOW_S = 1.0  # of processor time
GROWTH = 256 << 20  # bytes that a process may take beyond what it had after the first inputs
STEP = 2000  # inputs between two looks at the memory
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a file is written for each input
MOST_KEPT = 5  # crashes of one target


def is_own(error: BaseException) -> bool:
    """Whether an error is the package's own, of one sentence."""
    from tiny_qmoe_mlx.serving.refusal import Refused

    if isinstance(error, Refused):
        return "\n" not in error.message and len(error.message) < 700
    return isinstance(error, ValueError) and bool(SENTENCE.fullmatch(str(error).strip())) and len(str(error)) < 1500


def judge(target: "Target", data: bytes) -> str:
    """What is wrong with how a reader took an input; nothing where it read it, or refused it with a sentence."""
    begun = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            target.read(data)
    except Exception as error:
        if not is_own(error):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {str(error)[:200]!r}"
    took = time.process_time() - begun
    return f"took {took:.1f} s of processor time" if took > SLOW_S else ""


def resident() -> int:
    """Bytes that the process holds."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Watch:
    """Inputs of one target: counted, judged, and those that broke the promise kept."""

    def __init__(self, name: str, target: "Target"):
        self.name, self.target = name, target
        self.count = 0
        self.broken: dict[str, bytes] = {}
        self.start = self.most = 0

    def take(self, data: bytes) -> None:
        self.count += 1
        problem = judge(self.target, data)
        if problem and len(self.broken) < MOST_KEPT:
            self.broken.setdefault(re.sub(r"\d+\.\d s", "long", problem), data)
        if self.count % STEP == 0:
            self._look()

    def _look(self) -> None:
        gc.collect()
        now = resident()
        self.start = self.start or now
        self.most = max(self.most, now)
        if self.most - self.start > GROWTH:
            self.broken.setdefault("memory grew without an end", b"")

    def summary(self) -> dict[str, Any]:
        """For the process that started this one."""
        for problem, data in self.broken.items():
            if data:
                keep_crash(self.name, data)
            print(f"{self.name}: {problem}", file=sys.stderr)
        return {"count": self.count, "broken": len(self.broken), "growth": self.most - self.start}


def keep_crash(name: str, data: bytes) -> Path:
    """An input that broke the promise, under a name that says of which target."""
    CRASHES.mkdir(exist_ok=True)
    path = CRASHES / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return path


def mutate_only(watch: Watch, count: int, seed: int) -> None:
    """Seeds as they are, then `count` mutations of them; an input that a reader took serves as a seed too."""
    from abuse import reader_targets

    pick, seeds = random.Random(seed), list(watch.target.seeds)
    for data in seeds:
        watch.take(data)
    while watch.count < count:
        watch.take(reader_targets.draw(watch.target, pick, seeds))


def guided(watch: Watch, count: int, seed: int, corpus: Path, report: Path) -> None:
    """atheris (libFuzzer) with our mutations and its own; it ends the process, so the report is written before."""
    import atheris

    from abuse import reader_targets

    for number, data in enumerate(watch.target.seeds):
        (corpus / f"seed-{number}").write_bytes(data)

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        pick = random.Random(seed)
        if pick.random() < 0.2:
            return atheris.Mutate(data, most)
        return reader_targets.draw(watch.target, pick, [data, *watch.target.seeds] if not data else [data])[:most]

    def take(data: bytes) -> None:
        watch.take(data)
        if watch.count == count:
            report.write_text(json.dumps(watch.summary()))

    options = [f"-atheris_runs={count}", f"-seed={seed + 1}", "-max_len=65536", "-timeout=120", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, "-rss_limit_mb=4096", str(corpus)], take, custom_mutator=mutated)
    atheris.Fuzz()


def run_target(name: str, count: int, seed: int, report: Path, by_coverage: bool) -> None:
    """One target in this process."""
    if by_coverage:
        import atheris

        # what an editable install puts here loads modules past atheris, which would see no coverage
        sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
        sys.path.insert(0, str(ROOT))
        with atheris.instrument_imports(include=["tiny_qmoe_mlx"]):
            from abuse import reader_targets
    else:
        from abuse import reader_targets
    with tempfile.TemporaryDirectory(dir=MEMORY) as root, tempfile.TemporaryDirectory(dir=MEMORY) as corpus:
        watch = Watch(name, reader_targets.make(name, Path(root)))
        if by_coverage:
            guided(watch, count, seed, Path(corpus), report)
        mutate_only(watch, count, seed)
        report.write_text(json.dumps(watch.summary()))


def replay(name: str, data: bytes, root: Path) -> str:
    """What is wrong with one input of a target, as `judge` says it."""
    from abuse import reader_targets

    return judge(reader_targets.make(name, root), data)


def start(name: str, count: int, seed: int, by_coverage: bool, keep: Path | None = None) -> dict[str, Any]:
    """A target in a process of its own; what it reports, or what it reported to `keep` before."""
    kept = keep / f"{name}-{count}-{seed}.json" if keep else None
    if kept and kept.exists():
        return json.loads(kept.read_text())
    begun = time.monotonic()
    found = {**ask(name, count, seed, by_coverage), "seconds": time.monotonic() - begun}
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    return found


def ask(name: str, count: int, seed: int, by_coverage: bool) -> dict[str, Any]:
    """Start the process, and wait for its report."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.json"
        command = [sys.executable, "-m", "abuse.fuzz_readers", "--target", name, "--count", str(count)]
        command += ["--seed", str(seed), "--report", str(report), *([] if by_coverage else ["--no-coverage"])]
        done = subprocess.run(command, capture_output=True, text=True)
        said = [line for line in done.stderr.splitlines() if line.startswith(f"{name}: ")]
        print("\n".join(said), file=sys.stderr, end="\n" if said else "")
        if not report.exists():
            print(f"{name}: the process died with status {done.returncode}: {done.stderr[-1500:]}", file=sys.stderr)
            return {"count": 0, "broken": 1, "growth": 0}
        return json.loads(report.read_text())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="inputs in all (default 1000000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="one target alone, in this process, with all of --count")
    parser.add_argument("--report", type=Path, default=Path("report.json"), help=argparse.SUPPRESS)
    parser.add_argument("--no-coverage", action="store_true", help="by mutation alone, also where atheris is installed")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="go on with a run that was stopped: reports lie here")
    args = parser.parse_args(argv)
    by_coverage = importlib.util.find_spec("atheris") is not None and not args.no_coverage
    if args.target:
        run_target(args.target, args.count, args.seed, args.report, by_coverage)
        return 0
    return run_all(args.count, args.seed, by_coverage, args.keep)


def run_all(count: int, seed: int, by_coverage: bool, keep: Path | None) -> int:
    """Every target, its share of the inputs each; a record of it."""
    from abuse import reader_targets, record

    each = -(-count // len(reader_targets.MAKERS))
    found = {name: start(name, each, seed, by_coverage, keep) for name in reader_targets.MAKERS}
    broken = sum(f["broken"] for f in found.values())
    shown = {
        "inputs": sum(f["count"] for f in found.values()),
        "readers": len(found),
        "guided by": "coverage (atheris) and mutation" if by_coverage else "mutation",
        "largest growth of memory, MB": max(f["growth"] for f in found.values()) >> 20,
        "inputs that broke the promise": broken,
        "kept from earlier runs, and read by the tests": len(list(CRASHES.glob("*"))) if CRASHES.exists() else 0,
    }
    record.keep(
        1, "fuzz_readers", PROMISE, "abuse.fuzz_readers", sum(f["seconds"] for f in found.values()), shown, broken
    )
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
