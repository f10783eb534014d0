"""What all commands share at the terminal: options, progress bars, and errors that are one sentence.

Results go to stdout; progress and errors to stderr. Imports nothing heavy: `--help` answers at once.
"""

import argparse
import codecs
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, NoReturn

from tiny_qmoe_mlx.errors import shown
from tiny_qmoe_mlx.library_errors import is_compiler, stderr, take_stderr

FAILED, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
LONGEST = 4000  # characters of an error; a path may have most of them
MANY = 1_000_000  # what a bar counts beyond are bytes: no model has so many experts or layers


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence, like every other error here."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong with the arguments, and leave with status 2."""
        self.exit(USAGE, f"error: {shown(message, 500)}; --help lists all options\n")


def parser(command: str, description: str, examples: str = "") -> Parser:
    """An argument parser for `python -m tiny_qmoe_mlx.<command>`.

    Args:
        command: the module's name.
        description: what it does, a few sentences.
        examples: command lines with comments, printed as they are below the options.
    """
    epilog = f"examples:\n{examples.strip(chr(10))}" if examples else None
    out = Parser(
        prog=f"python -m tiny_qmoe_mlx.{command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    out.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return out


def add_model(to: argparse.ArgumentParser, help: str = "directory of a converted model, hub id, or `demo`") -> None:
    """Add the required option `--model`."""
    to.add_argument("--model", required=True, metavar="DIR|HUB_ID|demo", help=help)


def add_json(to: argparse.ArgumentParser) -> None:
    """Add `--json`: the result as JSON, and nothing else, on stdout."""
    to.add_argument("--json", action="store_true", help="print the result as JSON, nothing else on stdout")


def add_quiet(to: argparse.ArgumentParser) -> None:
    """Add `--quiet`."""
    to.add_argument("--quiet", action="store_true", help="no progress bars")


def print_json(value: Any) -> None:
    """One JSON value on one line of stdout, in ASCII where it has no sign for one of the letters."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeError:
        text = json.dumps(value)
    print(text, flush=True)


def progress(
    iterable: Iterable[Any] | None = None,
    total: float | None = None,
    description: str = "",
    quiet: bool = False,
    unit: str = "it",
    unit_scale: bool = False,
    done: float = 0,
) -> Any:
    """A tqdm bar on stderr; silent with `quiet` (pass --json or --quiet) and where stderr is no terminal.

    Args:
        iterable: iterated over by the bar; or None, then call `update`.
        total: its length where that is not known.
        description: printed before the bar.
        quiet: no bar.
        unit: of one step; "B" with unit_scale for bytes.
        unit_scale: whether to count in k, M, G.
        done: of the total, before the bar began: the time left is told by what came since.
    """
    from tqdm import tqdm

    hidden = quiet or not sys.stderr.isatty()
    return tqdm(
        iterable,
        total=total,
        desc=description,
        disable=hidden,
        unit=unit,
        unit_scale=unit_scale,
        dynamic_ncols=True,
        initial=done,
    )


def sentence(error: BaseException) -> str:
    """An error as one line of printable characters: its own text, with the file's name where only the system spoke."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MemoryError):
        return "the machine's memory is used up; give a smaller --memory or close other programs"
    text = str(error)
    if isinstance(error, RuntimeError) and "[read]" in text:
        return f"[weights] MLX could not read a file ({' '.join(text.split())}); check the disk"
    if is_compiler(error):
        return f"[MLX] its compiler failed ({shown(' '.join(text.split()), 400)}); try again with MLX_DISABLE_COMPILE=1"
    if isinstance(error, OSError) and error.strerror:
        text = f"[{error.filename}] {error.strerror}" if error.filename is not None else error.strerror
    return shown(" ".join(text.split()), LONGEST) or type(error).__name__


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run a command and turn what a person can mend into one sentence on stderr.

    Args:
        main: takes the arguments, returns an exit status (None means 0).
        argv: arguments; those of the process where None.

    Returns:
        The exit status: 1 for errors, 130 after Ctrl-C. With `--debug` the error is raised instead.
    """
    own = argv is None
    argv = sys.argv[1:] if argv is None else argv
    open_closed()
    take_stderr()
    if own:
        _print_anything()
    before = _hear_signals()
    try:
        _require_place()
        status = _work(main, argv)
        if sys.stdout is not None:  # it is where the caller closed it
            sys.stdout.flush()
        return status or 0
    except BrokenPipeError:  # the reader (head, say) has enough
        _drop_output()
        return FAILED
    except SystemExit as end:
        if end.code or not _is_stuck():
            raise
        _say("error: [standard output] cannot be written")  # --help
        return FAILED
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        unknown = isinstance(error, RuntimeError) and "[read]" not in str(error) and not is_compiler(error)
        if "--debug" in argv or unknown:
            raise
        if _stopped == TERMINATED:
            return TERMINATED
        error = KeyboardInterrupt() if _stopped else error
        if _is_stuck() and isinstance(error, OSError) and error.filename is None:
            error.filename = "standard output"
        _say(f"error: {sentence(error)}")
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
    finally:
        _let_leave() if own else _hear_no_more(before)


def open_closed() -> None:
    """Streams that were closed lead nowhere: else the next file that is opened is one of them. MLX takes number 0 for a
    failure, and what a library writes to stderr would stand in that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free


def _print_anything() -> None:
    """What stdout has no sign for becomes a question mark, and a name that is no text is printed as it is: nobody loses
    an answer by either."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        is_utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
        sys.stdout.reconfigure(errors="surrogateescape" if is_utf8 else "replace")


def _require_place() -> None:
    """Refuse a current directory that has been removed, which libraries trip over, each in its own way."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        sentence = "[current directory] should be there, it has been removed; go to another one"
        raise OSError(error.errno, sentence) from error


def _is_stuck() -> bool:
    """Whether stdout cannot take what was printed, which is then dropped."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
        return True
    except (AttributeError, ValueError):  # none, or closed
        return False
    return False


def _drop_output() -> None:
    """What stdout still holds; Python would flush it again at exit and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_stopped = 0  # the exit status that a signal asked for
_working = False  # main runs: a signal may unwind it
_saying = False  # the last line is being printed, after which the process ends


def _hear_signals() -> dict[int, Any]:
    """`stop` for Ctrl-C and a polite kill from now on; what it was before."""
    global _stopped, _working, _saying
    _stopped, _working, _saying = 0, True, False
    before: dict[int, Any] = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    # not where a shell runs this in the background; the system's own since the package was imported (__init__.py)
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL):
        before[signal.SIGINT] = signal.signal(signal.SIGINT, stop)
    return before


def _hear_no_more(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def _work(main: Callable[[list[str]], int | None], argv: list[str]) -> int | None:
    """main's status. A signal may still raise out of here; none does later, whatever handlers main has put in place."""
    global _working
    try:
        return main(argv)
    finally:
        _working = False
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(number)):
                signal.signal(number, stop)


def _say(text: str) -> None:
    """The last line; a signal does not break into it."""
    global _saying
    _saying = True
    print(text, file=sys.stderr, flush=True)


def _let_leave() -> None:
    """All has been said: from now on a signal ends the process at once, where Python would print what it broke into."""
    for number, status in ((signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)):
        if signal.getsignal(number) is stop:
            signal.signal(number, lambda *_, status=status: os._exit(status))


def stop(signal_number: int, frame: FrameType | None) -> None:
    """Let Ctrl-C or a polite kill unwind, so that nothing half-written stays; a second one ends the process at once, as
    a kill does, which loses nothing either (staging.py). One that comes while the last line is printed changes nothing.

    Which it was is kept: a library that loads just then may make an ImportError of it.
    """
    global _stopped
    if _saying:
        return
    again, _stopped = _stopped or not _working, INTERRUPTED if signal_number == signal.SIGINT else TERMINATED
    if again:
        _leave(_stopped)
    raise KeyboardInterrupt if signal_number == signal.SIGINT else SystemExit(TERMINATED)


def _leave(status: int) -> NoReturn:
    """End the process with its one sentence, whatever Python is doing just now."""
    with contextlib.suppress(OSError):
        os.write(stderr(), b"" if status == TERMINATED else b"error: interrupted\n")
    os._exit(status)


def check_stopped() -> None:
    """Raise a Ctrl-C or a polite kill again that a library swallowed, as some do while they load.

    Raises:
        KeyboardInterrupt, SystemExit: the one that came.
    """
    if _stopped == INTERRUPTED:
        raise KeyboardInterrupt
    if _stopped:
        raise SystemExit(_stopped)


class Bars:
    """Progress bars by callback: called with (what, done, total), one bar at a time; a context manager."""

    def __init__(self, quiet: bool = False):
        self._quiet, self._what = quiet, ""
        self._bar: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        check_stopped()
        if what != self._what:
            self._close()
            many = total >= MANY
            self._bar = progress(None, total, what, self._quiet, "B" if many else "it", many, done)
            self._what = what
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()
        if error[0] is None:
            check_stopped()
