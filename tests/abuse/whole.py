"""Everything that tries to break a promise, whole, one after the other (hours); then the page of what was found.

PYTHONPATH=tests python -m abuse.whole [MODULE ...]     only the modules named
"""

import subprocess
import sys

from abuse import report

RUNS = (
    "fuzz_native --count 20000000",
    "fuzz_decoders --count 200000",
    "fuzz_kernels --count 10000",
    "fuzz_readers --count 1000000",
    "hostile_models",
    "faults_reading --count 200",
    "faults_writing --count 200",
    "power_cut --count 500",
    "bit_flips --count 10000",
    "soak --model tiny --tokens 100000",
    "soak --model demo --tokens 5000",
    "hog",
    "server_load --clients 64 --seconds 600",
    "server_schema",
    "threads --seconds 600",
    "interrupts --count 200",
    "races --seconds 600",
    "numbers --count 600",
)


def chosen(names: list[str]) -> list[list[str]]:
    """The runs of these modules; of all, where none is named.

    Raises:
        SystemExit: a name is no module of ours.
    """
    runs = [run.split() for run in RUNS]
    unknown = sorted(set(names) - {run[0] for run in runs})
    if unknown:
        raise SystemExit(f"[abuse] should be one of {', '.join(sorted({r[0] for r in runs}))}, received {unknown[0]}.")
    return [run for run in runs if not names or run[0] in names]


def main(names: list[str]) -> int:
    """Run them; a run that fails leaves its record of before, so it is named at the end."""
    failed = [
        " ".join(run)
        for run in chosen(names)
        if subprocess.run([sys.executable, "-m", f"abuse.{run[0]}", *run[1:]]).returncode
    ]
    report.write()
    print("\n".join(["failed:", *failed]) if failed else "all of them held")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
