"""What `--model` names: a directory, a hub id, or `demo`, which is built and converted on first use.

`python -m tiny_qmoe_mlx.locate demo` prints the directory. Imports nothing heavy, as `terminal` does not.
"""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

from tiny_qmoe_mlx import terminal
from tiny_qmoe_mlx.staging import MANIFEST

DEMO = "demo"
DEMO_BITS = 2.0
DEMO_SEQUENCES = 32  # of 256 tokens: the demo should be ready soon
CONVERTER = 5  # raise it whenever the same settings give another file: old demo models are then converted anew


def model_directory(name: str, quiet: bool = False) -> Path:
    """The directory of a model given on a command line.

    The demo is built in a child process, so that building it does not count in the memory of this one.

    Raises:
        FormatError: there is no such model.
        SystemExit: the demo could not be built; the reason has been printed.
    """
    if name != DEMO:
        from tiny_qmoe_mlx.original import checkpoint

        return checkpoint.find_directory(name, quiet=quiet)
    target = demo_directory()
    if not (target / MANIFEST).is_file():
        _build_in_child(quiet)
    return target


def demo_directory() -> Path:
    """Where the converted demo model lies, or will."""
    from tiny_qmoe_mlx import demo
    from tiny_qmoe_mlx.spec import FORMAT_VERSION

    return demo.cache_directory() / f"demo-{DEMO_BITS:g}bit-v{FORMAT_VERSION}.{demo.RECIPE}.{CONVERTER}"


def build_demo(quiet: bool = False) -> None:
    """Build the demo's original and convert it; of several processes that do so at once one converts, others wait."""
    from tiny_qmoe_mlx import demo
    from tiny_qmoe_mlx.convert import convert

    text, target = str(demo.calibration_text_path()), demo_directory()
    with terminal.Bars(quiet) as bars:
        source = demo.source_directory(progress=lambda done, total: bars("building the demo model", done, total))
        while not (target / MANIFEST).is_file():
            try:
                convert(source, target, bits=DEMO_BITS, calibration=text, sequences=DEMO_SEQUENCES, progress=bars)
            except OSError as error:
                if error.errno != errno.EBUSY and not (target / MANIFEST).is_file():
                    raise
                time.sleep(1)


def _build_in_child(quiet: bool) -> None:
    command = [sys.executable, "-m", "tiny_qmoe_mlx.locate", DEMO, *(["--quiet"] if quiet else [])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")) if p),
    }
    child = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=None, env=environment)
    if child.returncode < 0 or child.returncode == terminal.INTERRUPTED:
        raise KeyboardInterrupt
    if child.returncode:
        raise SystemExit(child.returncode)  # the child has said why


def main(argv: list[str]) -> int:
    """Run the command."""
    p = terminal.parser("locate", "Print the directory of a model; `demo` is built and converted on first use.")
    p.add_argument("model", metavar="DIR|HUB_ID|demo")
    terminal.add_quiet(p)
    args = p.parse_args(argv)
    if args.model == DEMO and not (demo_directory() / MANIFEST).is_file():
        build_demo(args.quiet)
        print(demo_directory())
    else:
        print(model_directory(args.model, args.quiet))
    return 0


if __name__ == "__main__":
    sys.exit(terminal.run(main))
