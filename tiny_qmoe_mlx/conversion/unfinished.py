"""A conversion under way on disk: a directory beside the output that a second run goes on with, until it is whole.

`OUT.partial` holds finished files of the model, `conversion.json` (what was asked, of which source, and the sizes that
follow from both), `state.safetensors` (the last finished layer, and what flows on from it) and, where the model wrote
its own text, `calibration.npy`. It becomes `OUT` by one rename. Every file is whole or absent, so the process may be
killed at any moment.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from tiny_qmoe_mlx import paths, plain_files
from tiny_qmoe_mlx.disk_reads import read_header, read_tensor
from tiny_qmoe_mlx.errors import FormatError, shown
from tiny_qmoe_mlx.staging import (
    PLAN,
    STATE,
    TOKENS,
    atomic_file,
    check_target,
    move_into_place,
    sync_directory,
    write_json,
)


class CannotGoOn(FormatError):
    """An unfinished directory that this run may not touch."""


FIRST = {TOKENS, f"{TOKENS}.partial", f"{PLAN}.partial"}  # all that is written before there is a plan
MOST_PLAN, MOST_TOKENS = 1 << 26, 1 << 30  # bytes
BEGIN_ANEW = "or remove that directory to begin anew"


@contextlib.contextmanager
def unfinished_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """Lock the unfinished directory of an output, made if there is none, and rename it to `out` when the block ends
    well. When the block is stopped, or the disk or the hub fails, it stays for the next run once anything in it is
    finished; when weights or settings do not serve (ValueError itself), it vanishes, unless an earlier run left it.

    Raises:
        FileExistsError: `out` is in the way, or the unfinished directory is a stranger's.
        OSError: another conversion writes the same output, or the system says no.
    """
    target = paths.real(out)
    check_target(target, overwrite)
    directory = target.with_name(target.name + ".partial")
    lock = _lock(directory)
    ours, earlier = False, (directory / STATE).exists()
    try:
        _refuse_strangers(directory)
        ours = True
        yield directory
        check_target(target, overwrite)
        sync_directory(directory)
        move_into_place(directory, target)
        for name in (TOKENS, STATE, PLAN):  # last, so that no moment is lost; where they stay they do no harm
            (target / name).unlink(missing_ok=True)
    except BaseException as error:
        useless = type(error) is ValueError  # not FormatError: a hub that cannot be reached may be there tomorrow
        begun = earlier or isinstance(error, CannotGoOn)
        if ours and not begun and (useless or not (directory / STATE).exists()):
            shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _lock(directory: Path) -> int:
    """A handle that locks the directory, made if need be; another process may rename or remove it at any moment."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise _strangers(directory)
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(directory, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                sentence = f"[{directory}] another conversion is writing it; wait for it, or choose another --mlx-path"
                raise OSError(errno.EBUSY, sentence) from None
            if directory.exists() and os.path.samestat(os.fstat(lock), directory.stat()):
                return lock
            os.close(lock)


def _refuse_strangers(directory: Path) -> None:
    """A directory that another program filled is not touched; what a killed run left half-written is removed, and what
    it left before it had a plan, since nobody knows what that was for.
    """
    names = [entry.name for entry in directory.iterdir()]
    begun = PLAN in names
    if not begun and not FIRST.issuperset(names):
        raise _strangers(directory)
    for name in names:
        if not begun or name.startswith(".partial-") or name.endswith(".partial"):
            (directory / name).unlink()
    plain_files.check_directory(directory)


def _strangers(directory: Path) -> FileExistsError:
    sentence = f"[{directory}] exists and no conversion began it; move it away, or choose another --mlx-path"
    return FileExistsError(errno.EEXIST, sentence)


def agree(directory: Path, asked: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The plan of an unfinished conversion: what `make` gives, written down the first time and read back later.

    Args:
        directory: unfinished.
        asked: what this run was asked to do, plain JSON values in groups of settings: {"settings": {...}, ...}.
        make: gives the rest of the plan; slow, and called the first time only.

    Raises:
        FormatError: the directory was begun with another setting or from another source, which is named; or its plan
            is damaged.
    """
    path = directory / PLAN
    if not path.exists():
        plan = {**asked, "made": make()}
        write_json(path, plan)
        return plan["made"]
    try:
        plan = json.loads(plain_files.read(path, MOST_PLAN))
        groups = {group: dict(plan[group]) for group in asked}
        made = dict(plan["made"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CannotGoOn(f"[{path}] is damaged; remove {directory} and convert again.") from error
    for group, values in asked.items():
        for name in sorted({*values, *groups[group]}):
            begun, now = groups[group].get(name), values.get(name)
            if begun != now:
                raise CannotGoOn(
                    f"[{directory}] was begun with {_words(group, name, begun)}, received {_words(group, name, now)}; "
                    f"ask for the same to go on, {BEGIN_ANEW}."
                )
    return made


def _words(group: str, name: str, value: Any) -> str:
    name, value = shown(name.replace("_", " ")), shown(value)
    return f"{name} {value}" if group == "settings" else f"a {group} whose {name} is {value}"


def kept_tokens(directory: Path, make: Callable[[], np.ndarray | None]) -> np.ndarray | None:
    """Calibration tokens: what `make` gives, written down the first time and read back later (a model's own text may
    come out differently, and takes long).

    Raises:
        CannotGoOn: the file is damaged.
    """
    path = directory / TOKENS
    if path.exists():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of a header that Python 2 wrote, and we never do
                found = np.load(io.BytesIO(plain_files.read(path, MOST_TOKENS)), allow_pickle=False)
            if found.dtype != np.int32 or found.ndim != 2 or (found < 0).any():
                raise ValueError("no tokens")
            return found
        except OSError:
            raise
        except Exception as error:  # numpy reads the header as Python's tokenizer does, which fails in ways of its own
            raise CannotGoOn(f"[{path}] is damaged; remove {directory} and convert again.") from error
    tokens = make()
    if tokens is not None:
        with atomic_file(path) as file:
            np.save(file, tokens)
    return tokens


def save_state(directory: Path, layer: int, facts: list[dict], arrays: dict[str, np.ndarray]) -> None:
    """Write down that everything up to a layer is finished (-1: all that is no layer), and what flows on from it.

    Args:
        facts: one plain object per finished layer, for the report.
        arrays: what the next layer needs.
    """
    words = {"layer": str(layer), "facts": json.dumps(facts), "files": json.dumps(_file_sizes(directory))}
    with atomic_file(directory / STATE) as file:
        file.write(save(arrays or {"nothing": np.zeros(1, np.float32)}, words))


def load_state(directory: Path) -> tuple[int, list[dict], dict[str, np.ndarray]] | None:
    """What `save_state` wrote last; None where nothing is finished.

    Raises:
        CannotGoOn: the state is damaged, or a finished file has gone.
    """
    path = directory / STATE
    if not path.exists():
        return None
    try:
        tensors, words = read_header(path)
        arrays = {name: read_tensor(path, tensor) for name, tensor in tensors.items() if name != "nothing"}
        missing = [n for n, size in json.loads(words["files"]).items() if _file_sizes(directory).get(n) != size]
        state = int(words["layer"]), json.loads(words["facts"]), arrays
        if type(state[1]) is not list or not all(type(fact) is dict for fact in state[1]):
            raise ValueError("facts should be objects")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CannotGoOn(f"[{path}] is damaged; remove {directory} and convert again.") from error
    if missing:
        raise CannotGoOn(
            f"[{directory}] {missing[0]} was finished by an earlier run, and is missing or of another size now; remove "
            "that directory and convert again."
        )
    return state


def _file_sizes(directory: Path) -> dict[str, int]:
    """Bytes of the model's files that are there."""
    return {path.name: path.stat().st_size for path in directory.glob("model*.safetensors")}
