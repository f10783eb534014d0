"""Whole or nothing on disk: files and directories under temporary names that are renamed once they are complete.

Owns the names of unfinished things. Knows nothing of what the files hold, but for the name of the manifest, by which
it tells a directory of ours from a stranger's.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tiny_qmoe_mlx import paths
from tiny_qmoe_mlx.disk_errors import named

MANIFEST = "tiny_qmoe_manifest.json"
PLAN, STATE, TOKENS = "conversion.json", "state.safetensors", "calibration.npy"
LONGEST_S = 10.0  # that another process is waited for, which writes the same file
UNFINISHED = {PLAN, STATE, TOKENS}  # of a conversion under way; no part of the model
HARMLESS = {".DS_Store", ".cache", ".gitattributes", ".gitignore"}  # that systems and the hub put beside a model


def sync_directory(directory: Path) -> None:
    """Make the renames in a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with named(directory):
            os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    with named(path), open(path, "rb") as file:
        os.fsync(file.fileno())


def disk_full(error: OSError, path: Path) -> OSError:
    """The same error, with a sentence that names the file where the disk (or the quota) ran out."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    sentence = f"[{path}] the disk is full; free some space or choose another directory, nothing half-written is kept"
    return OSError(error.errno, sentence)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file for writing that appears under its name only when it is whole and on the disk. Of several
    processes that write it one does at a time.

    Args:
        path: the final name; the temporary one adds ``.partial``, which no pattern of mlx-lm takes for a model's file.

    Raises:
        OSError: as the system says; a full disk with a sentence that names the file.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        held = _new_file(temporary)
    except OSError as error:
        raise disk_full(error, path) from error
    try:
        with replaced_file(path, temporary), open(os.dup(held), "wb") as file:
            yield file
    finally:
        os.close(held)


def _new_file(path: Path) -> int:
    """A handle of an empty file that is locked until it is closed, in the place of what a killed process left there.

    Raises:
        OSError: another process has been writing it for LONGEST_S, or as the system says.
    """
    until = time.monotonic() + LONGEST_S
    while True:
        if path.is_symlink():  # never ours, and whoever writes would follow it
            path.unlink()
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        held = _is_held(handle) and _is_at(path, handle)  # else another process has given it its own name meanwhile
        if held and not os.fstat(handle).st_size:
            return handle
        if held:  # a process that has died wrote it
            path.unlink()
        os.close(handle)
        if time.monotonic() > until:
            sentence = f"[{path}] another process is writing it; wait for it, or name another file"
            raise OSError(errno.EBUSY, sentence)
        if not held:
            time.sleep(0.01)


def _is_at(path: Path, handle: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _is_held(handle: int) -> bool:
    """Whether this handle has the file's lock now; where a file system has no locks, none is needed."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def replaced_file(path: Path, temporary: Path) -> Iterator[Path]:
    """The temporary name of a file that somebody else writes; it gets its own name once it is on the disk.

    Args:
        path: the final name.
        temporary: beside it.

    Raises:
        OSError: as the system says; a full disk with a sentence that names the file.
    """
    if temporary.is_symlink():  # never ours, and whoever writes would follow it
        temporary.unlink()
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and (better := disk_full(error, path)) is not error:
            raise better from error
        with named(path):
            raise


def finite(value: Any) -> Any:
    """The same, with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode())


def write_named(path: Path, value: Any) -> None:
    """The same into a file that a person names: through links, and into a device or a pipe as it is."""
    if path.exists() and not path.is_file():
        with named(path), open(path, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
    else:
        write_json(Path(os.path.realpath(path)), value)


def check_space(directory: str | Path, needed: int) -> None:
    """Refuse early where a directory's disk has fewer than `needed` bytes free.

    Args:
        directory: need not exist yet.
        needed: bytes.

    Raises:
        OSError: ENOSPC, with both numbers.
    """
    existing = Path(directory).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        sentence = f"[{directory}] needs {needed} bytes on its disk, {free} are free; make room or write elsewhere"
        raise OSError(errno.ENOSPC, sentence)


@contextlib.contextmanager
def staged_directory(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Fill a temporary directory beside `out` that becomes `out` when the block ends well, and vanishes otherwise.

    Args:
        out: the directory to make. It may exist when it is empty, or with `overwrite` when it is a converted model.
        overwrite: replace a converted model; never anything else.

    Yields:
        The temporary directory, on the same disk.

    Raises:
        FileExistsError: `out` is in the way, and what to do about it.
        OSError: it cannot be made or renamed.
    """
    target = paths.real(out)
    clear_leftovers(target)
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.partial-{os.getpid()}")
    temporary.mkdir()
    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
        check_target(target, overwrite)
        sync_directory(temporary)
        move_into_place(temporary, target)
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(out: str | Path, overwrite: bool = False) -> None:
    """Refuse an output path that cannot become a converted model, before any work is done.

    Raises:
        FileExistsError: what is there, and what to do.
        FormatError: its name is no text.
    """
    out = paths.real(out)
    if out.is_symlink():
        raise FileExistsError(
            errno.EEXIST, f"[{out}] is a link that leads in a circle; remove it or choose another name"
        )
    paths.require_text(out, "--mlx-path")
    if not out.exists():
        return
    if not out.is_dir() or out.is_mount():
        kind = "is the root of a file system" if out.is_dir() else "exists and is no directory"
        raise FileExistsError(errno.EEXIST, f"[{out}] {kind}; choose the name of a new directory")
    names = {entry.name for entry in out.iterdir()}
    if not names:
        return
    if MANIFEST not in names:
        sentence = f"[{out}] exists, is not empty and is no converted model; choose another directory"
        raise FileExistsError(errno.EEXIST, sentence)
    if not overwrite:
        raise FileExistsError(errno.EEXIST, f"[{out}] is a converted model already; --overwrite replaces it")
    foreign = sorted(n for n in names - _listed(out) - UNFINISHED - HARMLESS if not n.startswith((".partial-", "._")))
    if foreign:
        sentence = f"[{out}] holds {foreign[0]}, which no conversion wrote; move it away or choose another directory"
        raise FileExistsError(errno.EEXIST, sentence)


def _listed(out: Path) -> set[str]:
    """Names that a manifest lists, and its own; a damaged one lists nothing but itself."""
    try:
        return {MANIFEST, *json.loads((out / MANIFEST).read_bytes())["files"]}
    except (ValueError, LookupError, TypeError, RecursionError):
        return {MANIFEST}


def clear_leftovers(out: str | Path) -> None:
    """Clear what killed processes left beside an output, and bring back a model that one had set aside."""
    target = paths.real(out)
    if not target.parent.is_dir():
        return
    pattern = re.compile(re.escape(target.name) + r"\.(partial|replaced)-(\d+)")
    for entry in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if not match or entry.is_symlink() or not entry.is_dir() or _in_use(entry, int(match[2])):
            continue
        if match[1] == "replaced" and not target.exists():
            os.rename(entry, target)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def _in_use(directory: Path, pid: int) -> bool:
    """Whether another process of this number lives, or anyone (in another container, say) holds the lock."""
    try:
        os.kill(pid, 0)
        if pid != os.getpid():
            return True
    except ProcessLookupError:
        pass
    except (PermissionError, OverflowError):
        return True
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def move_into_place(temporary: Path, target: Path) -> None:
    """Rename; a converted model in the way is set aside first and comes back if the rename fails."""
    aside = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    replaced = target.exists() and any(target.iterdir())
    if replaced:
        os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        if replaced:
            os.rename(aside, target)
        raise
    sync_directory(target.parent)
    if replaced:
        shutil.rmtree(aside, ignore_errors=True)
