"""Files of a stranger's directory: plain ones alone, links only as far as they stay inside, and no more bytes than fit.

A link that leaves its directory would let a model read, copy or upload any file of whoever opens it. Links into the
hub's cache are followed: a snapshot there is made of links to blobs. Sizes are bytes.
"""

import errno
import os
import stat
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from tiny_qmoe_mlx.disk_errors import named
from tiny_qmoe_mlx.errors import FormatError

MOST_WORDS = 1 << 27  # of a file that is read whole (tokenizers, templates, configs); the largest known has 33 MB
WORDS = (  # names that transformers and mlx-lm look for beside the weights
    "tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "*.jinja", "chat_template*", "config.json",
    "special_tokens_map.json", "added_tokens.json", "generation_config.json", "*processor_config.json",
    "hf_quant_config.json", "tekken.json", "adapter_config.json",
)  # fmt: skip
WEIGHTS = "*.safetensors"
FOLDERS = ("additional_chat_templates",)  # that transformers looks into
MOST_ENTRIES = 100_000
State = dict[str, tuple[int, ...]]


def check_directory(directory: Path) -> None:
    """Refuse a model directory that holds more, or other things, than files.

    Raises:
        FormatError: a link that leaves it, a pipe, socket or device, a folder where a file is read, a text too large.
        OSError: it cannot be listed.
    """
    root = Path(os.path.realpath(directory))
    allowed = [str(root), *_own_blobs(root)]
    for folder in (root, *(root / name for name in FOLDERS)):
        if folder == root or os.path.lexists(folder):
            _check_entries(folder, allowed, directory)


def _check_entries(folder: Path, allowed: list[str], directory: Path) -> None:
    if not _is_inside(os.path.realpath(folder), allowed):
        raise _leaves(directory, folder.name)
    if not folder.is_dir():  # FOLDERS by name only: transformers looks into directories
        return
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            if count >= MOST_ENTRIES:
                raise FormatError(f"[{directory}] should hold at most {MOST_ENTRIES} files, it holds more.")
            _check_entry(entry, allowed, directory)


def _check_entry(entry: "os.DirEntry[str]", allowed: list[str], directory: Path) -> None:
    if entry.is_symlink():
        target = os.path.realpath(entry.path)
        if not _is_inside(target, allowed) and not _in_hub_cache(target):
            raise _leaves(directory, entry.name)
    try:
        found = entry.stat()
    except OSError as error:
        if error.errno == errno.ENOENT:  # a link to nothing: whoever needs the file says that it is missing
            return
        raise FormatError(f"[{directory}] {entry.name[:200]!r} cannot be looked at: {error.strerror}.") from error
    read = is_read(entry.name)
    if stat.S_ISDIR(found.st_mode) and not (read and "." in entry.name):  # some checkpoints have a folder `tokenizer`
        return
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(
            f"[{directory}] {entry.name[:200]!r} should be a file, it is {_kind(found.st_mode)}; move it out of the "
            "model's directory."
        )
    if read and found.st_size > MOST_WORDS and not fnmatchcase(entry.name, WEIGHTS):
        raise FormatError(
            f"[{directory}] {entry.name[:200]!r} should have at most {MOST_WORDS} bytes, it has {found.st_size}."
        )


def is_read(name: str) -> bool:
    """Whether a loader opens a file of this name without being told to."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in (*WORDS, WEIGHTS))


def _leaves(directory: Path, name: str) -> FormatError:
    return FormatError(
        f"[{directory}] {name[:200]!r} is a link that leaves the model's directory, it could be any file of this "
        "machine; put the file itself there."
    )


def _own_blobs(root: Path) -> list[str]:
    """The blobs of a snapshot's repository in a cache of the hub, wherever that lies."""
    snapshot = root.parent.name == "snapshots" and root.parents[1].name.startswith("models--")
    return [str(root.parents[1] / "blobs")] if snapshot else []


def _in_hub_cache(path: str) -> bool:
    """Whether a path without links is a blob of this machine's cache of the hub."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache, file = os.path.realpath(HF_HUB_CACHE), Path(path)
    return file.parent.name == "blobs" and str(file.parents[2]) == cache and file.parents[1].name.startswith("models--")


def _is_inside(path: str, allowed: list[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in allowed)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


# ---- reading


def read(path: str | Path, most: int, where: str | None = None) -> bytes:
    """The bytes of a file that is read whole; what is none is refused at once, and a pipe does not hold us up.

    Args:
        path: of the file.
        most: bytes that it may have.
        where: how errors name it; the path where None.

    Raises:
        FormatError: it is no file, or has more bytes.
        OSError: as the system says.
    """
    where = str(path) if where is None else where
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    with named(path), open(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise FormatError(f"[{where}] should be a file, it is {_kind(found.st_mode)}.")
        raw = file.read(most + 1) if found.st_size <= most else b""
    if found.st_size > most or len(raw) > most:
        raise FormatError(f"[{where}] should have at most {most} bytes, has {max(found.st_size, len(raw))}.")
    return raw


# ---- between check and use


def states(directory: Path, names: Iterable[str]) -> State:
    """What changes when somebody writes into one of the files: size and time of each that is there.

    No inode: some file systems of networks number a file anew each time.
    """
    found: State = {}
    for name in names:
        try:
            facts = os.stat(directory / name)
        except OSError:
            continue
        found[name] = (facts.st_size, facts.st_mtime_ns)
    return found


def require_unchanged(directory: Path, before: State) -> None:
    """Refuse files that changed while they were read: what was checked may not be what was read.

    Raises:
        FormatError: with the name of the first.
    """
    now = states(directory, before)
    for name, state in before.items():
        if now.get(name) != state:
            raise FormatError(
                f"[{name}] should stay as it was while it is read, it has been written to or replaced; load the model "
                "again."
            )
