"""The Hugging Face hub: models by their id, and its many errors as one sentence each.

Downloads only the files that are used. `hub_shards` reads a checkpoint shard by shard, `hub_upload` sends a model.
"""

import contextlib
import errno
import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tiny_qmoe_mlx import paths, plain_files
from tiny_qmoe_mlx.disk_reads import read_bytes
from tiny_qmoe_mlx.errors import FormatError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_PATH = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[^/]+/?$")  # of the hub's cache
COMMIT = re.compile(r"[0-9a-f]{40}")
WORDS = ["*.json", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.jsonl"]  # all that is used but weights
WORDS += ["README.md", "tiny_qmoe_*"]  # a converted model's manifest may list these
WEIGHTS = "model*.safetensors"
WAITS: tuple[float, ...] = (1, 2, 4, 8, 16)  # seconds between attempts
PASSING = (408, 429, 500, 502, 503, 504)  # status codes of the hub that may be gone a moment later

T = TypeVar("T")


class HubError(OSError):
    """The hub refuses, or cannot be reached; the sentence says what to do."""


@dataclass(frozen=True)
class Located:
    """A model's directory; for one of the hub also its id and the commit hash of the revision."""

    directory: Path
    hub_id: str | None = None
    revision: str | None = None


def locate(model: str, revision: str | None = None, quiet: bool = False) -> Located:
    """Find a model: a directory, or a repository of the hub, which is downloaded (only the files that are used).

    Args:
        model: directory or hub id; what exists on the disk is never asked for on the hub.
        revision: branch, tag or commit on the hub.
        quiet: no progress bars; without a terminal there are none anyway.

    Raises:
        FormatError: neither a directory nor a repository that can be had, or one that holds other things than files.
        ValueError: a revision of a directory.
    """
    path = paths.expanded(model)
    if path.is_dir():
        require_no_revision(model, revision)
        paths.require_text(path, "model")
        plain_files.check_directory(path)
        return Located(path)
    require_id(model)
    directory = download(model, revision, [*WORDS, WEIGHTS], quiet)
    plain_files.check_directory(directory)
    return Located(directory, model, commit_of(directory))


def require_no_revision(model: str, revision: str | None) -> None:
    """Refuse a revision of what lies on this disk: it would change nothing.

    Raises:
        ValueError: one was asked for.
    """
    if revision is not None:
        raise ValueError(
            f"[model] a revision is that of a repository on the hub, {model} is on this disk; leave --revision out."
        )


def require_id(model: str) -> None:
    """Refuse what cannot be a repository's id.

    Raises:
        FormatError: what it should be.
    """
    if paths.expanded(model).exists():
        raise FormatError(
            f"[model] {model} should be a directory, it is a file; name the directory that holds config.json."
        )
    if not HUB_ID.fullmatch(model):
        raise FormatError(
            f"[model] {model} should be a directory with config.json, or a hub id such as org/name; no such directory."
        )


def download(model: str, revision: str | None, patterns: list[str], quiet: bool = False) -> Path:
    """Files of a repository, in the hub's own cache, where they lie once however often they are asked for.

    Raises:
        FormatError: in one sentence, why they cannot be had.
    """
    from huggingface_hub import snapshot_download

    with refusals(model, revision), bars(quiet):
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))


def commit_of(snapshot: Path) -> str | None:
    """The commit hash of a snapshot in the hub's cache, which is named after it."""
    return snapshot.name if COMMIT.fullmatch(snapshot.name) else None


def fingerprint(found: Located) -> dict[str, Any]:
    """What changes when a checkpoint does, as plain JSON values: of the hub its commit, of a directory its files.

    A directory may be moved, or copied with its times. Weights are told by size and time: they are too large to hash.
    """
    if found.hub_id is not None:
        return {"model": found.hub_id, "revision": found.revision}
    config = found.directory / "config.json"
    facts: dict[str, Any] = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in _weights(found.directory)}
    if config.is_file():
        facts["config.json"] = hashlib.sha256(read_bytes(config)).hexdigest()
    return facts


def _weights(directory: Path) -> list[Path]:
    return sorted(directory.glob(WEIGHTS))


@contextlib.contextmanager
def bars(quiet: bool) -> Iterator[None]:
    """The hub's own progress bars: on a terminal only, and not with `quiet`."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = quiet or not sys.stderr or not sys.stderr.isatty()
    silenced = quiet and not are_progress_bars_disabled()
    if silenced:
        disable_progress_bars()
    try:
        yield
    finally:
        if silenced:
            enable_progress_bars()


@contextlib.contextmanager
def refusals(model: str, revision: str | None) -> Iterator[None]:
    """Turn what goes wrong while a repository is read into a FormatError of one sentence."""
    from huggingface_hub import errors

    try:
        yield
    except FormatError:
        raise
    except errors.GatedRepoError as error:
        raise FormatError(
            f"[model] {model} needs a login and accepted terms on the hub; log in with `hf auth login`."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FormatError(
            f"[model] {model} (revision {revision or 'main'}) is no directory here and not on the hub."
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            where = f" ({error.filename})" if error.filename else ""
            raise FormatError(
                f"[model] {model} cannot be kept on this disk{where}: {error.strerror}; make room, or set HF_HOME to a "
                "directory on another disk."
            ) from error
        raise _unreachable(model, error) from error
    except Exception as error:  # the hub's own and those of the HTTP library, of which it has had several
        raise _unreachable(model, error) from error


def _unreachable(model: str, error: BaseException) -> FormatError:
    return FormatError(f"[model] {model} is no directory here, and the hub could not be asked: {reason(error)}")


def reason(error: BaseException, lines: int = 1) -> str:
    """The first lines of an error that say something."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(said[:lines] or [type(error).__name__])[:300]


def status_of(error: BaseException) -> int | None:
    """The hub's status code behind an error, or behind what it came from."""
    seen: BaseException | None = error
    while seen is not None:
        status = getattr(getattr(seen, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        seen = seen.__cause__
    return None


def is_passing(error: BaseException) -> bool:
    """Whether the same request may go well a moment later: the hub is overloaded, or the line broke."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    status = status_of(error)
    if status is not None:
        return status in PASSING
    seen: BaseException | None = error
    while seen is not None:  # names, because the HTTP library under the hub's client has changed more than once
        if any(kind.__name__ in _BROKEN_LINE for kind in type(seen).__mro__):
            return True
        seen = seen.__cause__
    return False


_BROKEN_LINE = {"TransportError", "ConnectionError", "Timeout", "ChunkedEncodingError", "IncompleteRead"}


def patiently(ask: Callable[[], T], waits: tuple[float, ...] | None = None) -> T:
    """Ask the hub something again where it failed in a way that passes; five times, half a minute in all.

    Args:
        ask: the request.
        waits: other pauses between the attempts, in seconds.
    """
    for wait in WAITS if waits is None else waits:
        try:
            return ask()
        except Exception as error:
            if not is_passing(error):
                raise
            time.sleep(wait)
    return ask()


def original_name(given: str) -> str:
    """The hub id of what a conversion was given, or the last part of a path: what is published names no directories."""
    hub = HUB_PATH.search(given)
    if hub:
        return f"{hub[1]}/{hub[2]}"
    return given if HUB_ID.fullmatch(given) and not Path(given).exists() else Path(given).name
