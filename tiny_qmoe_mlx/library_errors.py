"""What libraries raise over a model's files, made one sentence: mlx-lm, transformers, and tokenizers.

The last is written in Rust, which panics: an exception that passes every `except Exception`, and a report that Rust
itself writes to stderr.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from tiny_qmoe_mlx.errors import FormatError, shown

AGAIN = "download or convert the model again"
STDERR = 2  # its file descriptor
TRIPPED = (  # what Python raises where a value is not of the kind that a program counts on
    TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, NameError, NotImplementedError,
    RecursionError,
)  # fmt: skip
_holding, _ours = threading.RLock(), list[bool]()
_kept = list[int]()  # descriptors of the stderr that `quiet_panics` holds back, outermost first


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust panicked: pyo3 makes it a BaseException, of a class that no module exports."""
    return type(error).__name__ == "PanicException"


def is_compiler(error: BaseException) -> bool:
    """Whether MLX's compiler on the CPU failed, for which no file of a model is to blame (compiled.py)."""
    words = ("[Compile::eval_cpu]", "Could not load C++ shared library", "filesystem error")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def reason(error: BaseException, most: int = 300) -> str:
    """Kind and text of an error, on one line."""
    return shown(f"{type(error).__name__} {' '.join(str(error).split())}".strip(), most)


@contextlib.contextmanager
def panics(where: str, what: str, advice: str = AGAIN) -> Iterator[None]:
    """A panic becomes a FormatError, `[where] what: reason; advice`; other errors stay as they are."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise FormatError(f"[{where}] {what}: {reason(error)}; {advice}.") from error


@contextlib.contextmanager
def refused(where: str, what: str, advice: str = AGAIN) -> Iterator[None]:
    """Every error of a library's becomes a FormatError, as in `panics`; our own and the memory's stay."""
    with panics(where, what, advice):
        try:
            yield
        except (FormatError, MemoryError):
            raise
        except Exception as error:
            raise FormatError(f"[{where}] {what}: {reason(error)}; {advice}.") from error


@contextlib.contextmanager
def computing(model: object) -> Iterator[None]:
    """A model's forward pass, in which mlx-lm may trip over a config that it has taken; errors that say in their own
    words what is wrong stay as they are.

    Raises:
        FormatError: with the model's name as given.
    """
    what = f"{model} should have a config and weights that mlx-lm can compute with, it cannot"
    try:
        with panics("model", what):
            yield
    except TRIPPED as error:
        raise FormatError(f"[model] {what}: {reason(error)}; {AGAIN} (--debug shows where).") from error


def take_stderr() -> None:
    """This process is a command of ours: `quiet_panics` may hold back what is written to its stderr. A program that
    imports the package keeps its own."""
    _ours.append(True)


def stderr() -> int:
    """The descriptor by which a line reaches the person at once, also where `quiet_panics` holds others back."""
    return _kept[0] if _kept else STDERR


@contextlib.contextmanager
def quiet_panics() -> Iterator[None]:
    """In a command: what is written to stderr waits until the end, and is dropped where the end was a panic: its
    sentence is ours to say. Lines of other threads are held up as well."""
    if not _ours:
        yield
        return
    import tempfile  # needed by few

    with _holding, contextlib.ExitStack() as ends:
        try:
            held = ends.enter_context(tempfile.TemporaryFile())
            before = os.dup(STDERR)
        except OSError:  # no disk to hold it on, or no stderr
            yield
            return
        ends.callback(os.close, before)
        _kept.append(before)
        ends.callback(_kept.pop)
        panicked = False
        _flush()
        os.dup2(held.fileno(), STDERR)
        try:
            yield
        except BaseException as error:
            panicked = is_panic(error)
            raise
        finally:
            _flush()
            os.dup2(before, STDERR)
            held.seek(0)
            with contextlib.suppress(OSError):
                os.write(STDERR, b"" if panicked else held.read())


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings of transformers', which quote a model's files at any length."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _flush() -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
