"""Send a model to the Hugging Face hub file by file while it is being made.

A repository is whole once it holds the manifest, which is sent last, together with everything that is no weights. Until
then a marker says that the model is not finished, and by whom it was begun. What is there already is not sent again, so
an upload that broke off goes on by being started again.
"""

import hashlib
import json
import queue
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from tiny_qmoe_mlx import plain_files
from tiny_qmoe_mlx.hub import client as hub
from tiny_qmoe_mlx.hub.client import HubError
from tiny_qmoe_mlx.staging import MANIFEST, PLAN, STATE

MARKER = "tiny_qmoe_upload.json"
HARMLESS = {".gitattributes", ".gitignore", "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md"}
FILES_A_COMMIT = 16  # the hub allows about a hundred commits an hour
KEPT = "nothing on this disk is lost, run the same command again to go on"

T = TypeVar("T")


class Uploader:
    """One repository that a model is sent to. `check`, then `push` each finished file, then `wait` and `finish`.

    The files go out in one background thread; what fails there is raised by the next call. The login is that of the
    hub's own client (`hf auth login`, or HF_TOKEN).
    """

    def __init__(self, repo: str, private: bool | None = None, revision: str | None = None, overwrite: bool = False):
        """Nothing is asked of the hub yet.

        Args:
            repo: ORG/NAME.
            private: for a repository that is made now; None: as the organization has it.
            revision: branch, made if need be.
            overwrite: replace a whole converted model that the repository holds.

        Raises:
            HubError: that is no id of a repository.
        """
        if not hub.HUB_ID.fullmatch(repo):
            raise HubError(f"[upload] the repository should be ORG/NAME, received {repo}.")
        self.repo, self.private, self.revision, self.overwrite = repo, private, revision, overwrite
        self.sent_bytes = 0
        self._there: dict[str, tuple[int, str]] = {}  # path -> size, sha256 or git's sha1
        self._ready: list[Any] = []  # sent, and in no commit yet
        self._files: queue.Queue[Path] = queue.Queue()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def check(self, finished: Path | None = None) -> None:
        """Make the repository if there is none, and show that it may be written, before hours of work.

        Args:
            finished: directory of a model that is whole already, and to which a whole model on the hub may be equal.

        Raises:
            HubError: no login, no permission, no connection, or the repository holds something else.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

        if not get_token():
            raise HubError("[upload] the hub wants a login; log in with `hf auth login`, or set HF_TOKEN.")
        self._api = HfApi()
        self._early(self._api.whoami)
        self._early(lambda: self._api.create_repo(self.repo, private=self.private, exist_ok=True))
        if self.revision is not None:
            self._early(lambda: self._api.create_branch(self.repo, branch=str(self.revision), exist_ok=True))
        self._there = self._early(self._list)
        whole = MANIFEST in self._there
        if whole and finished is not None and self._is_there(finished / MANIFEST):
            return
        self._refuse_strangers()
        if MARKER not in self._there:
            note = json.dumps({"unfinished": "this model is being uploaded"}).encode() + b"\n"
            begin: list[Any] = [CommitOperationAdd(MARKER, note)]
            begin += [CommitOperationDelete(MANIFEST)] if whole else []
            self._early(lambda: self._commit(begin, "Begin an upload"))
            self._there.pop(MANIFEST, None)
            self._there[MARKER] = (len(note), "")

    def push(self, path: Path) -> None:
        """Send a finished file in the background.

        Raises:
            HubError: an earlier file could not be sent.
        """
        self._raise()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, daemon=True)  # Ctrl-C need not wait for a large file
            self._thread.start()
        self._files.put(Path(path))

    def wait(self) -> None:
        """Return when every file that was pushed is on the hub. Call it before the files get other names.

        Raises:
            HubError: one could not be sent.
        """
        self._files.join()
        self._raise()
        self._guarded(self._commit_ready)

    def finish(self, directory: Path, progress: Callable[[str, int, int], None] | None = None) -> str:
        """Send what is missing of a whole model, the manifest last, and take away what does not belong to it.

        Args:
            directory: the model; all its files are sent but hidden ones.
            progress: called with (what, files done, files in all).

        Returns:
            The repository's address.

        Raises:
            HubError: something could not be sent.
            FormatError: a link in the directory leaves it: what it leads to is not the model's to publish.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        plain_files.check_directory(Path(directory))
        self.wait()
        files = sorted(p for p in Path(directory).iterdir() if p.is_file() and _belongs(p.name))
        weights = [p for p in files if p.suffix == ".safetensors"]
        for done, path in enumerate(weights, 1):
            self._guarded(lambda path=path: self._send(path))  # type: ignore[misc]
            if progress is not None:
                progress("uploading", done, len(weights))
        self._guarded(self._commit_ready)
        words = [p for p in files if p not in weights and not self._is_there(p)]
        names = {p.name for p in files}
        stale = [n for n in self._there if n == MARKER or (n not in names and _is_ours(n))]
        last = [CommitOperationAdd(p.name, p) for p in words] + [CommitOperationDelete(n) for n in stale]
        if last:
            self._guarded(lambda: self._commit(last, "Upload config, tokenizer, card and manifest"))
            self._there = self._guarded(self._list)
        missing = [p.name for p in files if not self._is_there(p)]
        if missing:
            raise HubError(f"[upload] {self.repo} should now hold {missing[0]} as it is here and does not; {KEPT}.")
        return f"{self._api.endpoint}/{self.repo}"

    def _work(self) -> None:
        while True:
            path = self._files.get()
            try:
                if self._error is None:
                    self._guarded(lambda: self._send(path))  # noqa: B023 (called at once)
            except BaseException as error:
                self._error = error
            finally:
                self._files.task_done()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _send(self, path: Path) -> None:
        """Put a file's bytes on the hub; the commit that names it follows with those of other files."""
        from huggingface_hub import CommitOperationAdd

        if self._is_there(path) or any(add.path_in_repo == path.name for add in self._ready):
            return
        add = CommitOperationAdd(path.name, path)
        with hub.bars(quiet=True):
            self._api.preupload_lfs_files(self.repo, [add], revision=self.revision, free_memory=False)
        self.sent_bytes += path.stat().st_size
        self._ready.append(add)
        if len(self._ready) >= FILES_A_COMMIT:
            self._commit_ready()

    def _commit_ready(self) -> None:
        if not self._ready:
            return
        ready = list(self._ready)
        self._commit(ready, f"Upload {ready[0].path_in_repo} and {len(ready) - 1} more")
        for add in ready:
            self._there[add.path_in_repo] = (add.upload_info.size, add.upload_info.sha256.hex())
            self._ready.remove(add)

    def _commit(self, operations: list[Any], message: str) -> None:
        with hub.bars(quiet=True):
            self._api.create_commit(self.repo, operations, commit_message=message, revision=self.revision)

    def _list(self) -> dict[str, tuple[int, str]]:
        from huggingface_hub.hf_api import RepoFile

        tree = self._api.list_repo_tree(self.repo, revision=self.revision, recursive=True)
        return {f.path: (f.size, f.lfs.sha256 if f.lfs else f.blob_id) for f in tree if isinstance(f, RepoFile)}

    def _is_there(self, path: Path) -> bool:
        size, digest = self._there.get(path.name, (-1, ""))
        if not path.is_file() or path.stat().st_size != size:
            return False
        return digest in _digests(path, size, path.stat().st_mtime_ns)

    def _refuse_strangers(self) -> None:
        foreign = sorted(name for name in self._there if name not in HARMLESS)
        if not foreign or MARKER in foreign:
            return
        if MANIFEST not in foreign:
            raise HubError(
                f"[upload] {self.repo} should be new, or hold a model that was converted here; it holds {foreign[0]}; "
                "choose another name."
            )
        if not self.overwrite:
            raise HubError(f"[upload] {self.repo} holds a converted model already; --overwrite replaces it.")

    def _early(self, ask: Callable[[], T]) -> T:
        """Ask while a person is still looking: where the hub cannot be reached, say so within seconds."""
        return self._ask(ask, hub.WAITS[:2])

    def _guarded(self, ask: Callable[[], T]) -> T:
        return self._ask(ask, hub.WAITS, KEPT)

    def _ask(self, ask: Callable[[], T], waits: tuple[float, ...], advice: str = "") -> T:
        """Ask the hub something; what it refuses is one sentence."""
        try:
            return hub.patiently(ask, waits)
        except HubError:
            raise
        except Exception as error:  # the hub's own, the disk's, and those of the HTTP library
            after = f"; {advice}" if advice else ""
            raise HubError(f"[upload] {self._why(error)}{after}.") from error

    def _why(self, error: BaseException) -> str:
        status = hub.status_of(error)
        words = hub.reason(error, lines=2).rstrip(".")
        if status == 401 and "oken" in words:
            return f"the hub does not know this login ({words}); log in again with `hf auth login`"
        if status in (401, 403):
            return f"this login may not write to {self.repo} ({words}); use a token with write access to it"
        if status == 404:
            return f"{self.repo} is not on the hub, or this login may not see it ({words})"
        if status is None and isinstance(error, FileNotFoundError):
            return f"{words}: a file vanished before it was sent"
        return f"the hub could not take {self.repo}: {words}"


def _belongs(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(".partial") and name not in (PLAN, STATE)


def _is_ours(name: str) -> bool:
    """Whether a file of this name would be read as a part of the model."""
    return Path(name).match(hub.WEIGHTS) or name == "model.safetensors.index.json"


@lru_cache(maxsize=4096)
def _digests(path: Path, size: int, time: int) -> tuple[str, str]:
    """A file's sha256, by which the hub knows large files, and git's sha1, by which it knows small ones.

    Args:
        size: in bytes.
        time: of the last change, so that a file that was read once is read again only if it changed.
    """
    large, small = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode())
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            large.update(data)
            small.update(data)
    return large.hexdigest(), small.hexdigest()
