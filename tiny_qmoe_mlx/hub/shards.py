"""A checkpoint of the hub that never lies on the disk as a whole: its shards come when their tensors are needed.

Every `model*.safetensors` stands in a directory with its true header and its true length, but as a sparse file without
data: mlx-lm builds its lazy arrays from it as from any other. `ensure` fetches the shards that hold some tensors into
those files and empties all others. The files are filled in place, because an array that was made before keeps its file
open and reads those bytes when it is evaluated. (A tensor that is read without `ensure` reads zeros.)
"""

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tiny_qmoe_mlx import safetensors_header
from tiny_qmoe_mlx.disk_reads import read_bytes
from tiny_qmoe_mlx.errors import FormatError, shown
from tiny_qmoe_mlx.hub import client as hub
from tiny_qmoe_mlx.staging import atomic_file, check_space, disk_full, write_json

SHARDS = "tiny_qmoe_shards.json"
PIECE = 16 << 20  # bytes of one request
CONNECTIONS = 4
MOST_HEADER = 100_000_000  # bytes, as the safetensors library allows
IN_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Shard:
    """One file of weights on the hub: its length, the length of its header, and its hash (sha256, or git's sha1)."""

    size: int
    header: int
    sha256: str | None
    git: str


class SourceShards:
    """A repository's checkpoint in a directory that holds the data of a few shards at a time.

    Attributes:
        directory: config, tokenizer and sparse `model*.safetensors`.
        hub_id, revision: of the repository; the revision is a commit hash.
        peak_bytes: the most that the shards have taken on the disk.
        fetched_bytes: what was fetched in all; more than the checkpoint if shards were fetched twice.
    """

    def __init__(self, model: str, directory: Path, revision: str | None = None, quiet: bool = False):
        """Fetch all but the weights, and the weights' headers; a directory begun before is gone on with.

        Raises:
            FormatError: the repository cannot be had or is damaged, or the directory was begun from another revision.
        """
        hub.require_id(model)
        self.hub_id, self.directory = model, Path(directory)
        self.peak_bytes = self.fetched_bytes = 0
        snapshot = hub.download(model, revision, hub.WORDS, quiet)
        self.revision = hub.commit_of(snapshot) or revision or "main"
        begun = self._read_notes()
        if begun is None:
            self._begin(snapshot)
        else:
            self._shards, self._whole = begun
        together = safetensors_header.Together()
        self._names = {name: together.add(self.directory / name) for name in self._shards}
        for name in set(self._shards) - self._whole:  # what a killed run left there may be half a shard
            self._empty(name)

    @property
    def located(self) -> hub.Located:
        """The directory and where it came from, for `hub.fingerprint`."""
        return hub.Located(self.directory, self.hub_id, self.revision)

    def names(self, layer: int | None) -> list[str]:
        """The checkpoint's tensors of a decoder layer, or of none (embeddings, the last norm, the head)."""
        every = (name for names in self._names.values() for name in names)
        return [name for name in every if _layer(name) == layer]

    def needs(self, names: Iterable[str]) -> list[str]:
        """The shards that hold these tensors, in order.

        Raises:
            FormatError: no shard holds one of them.
        """
        asked = set(names)
        missing = asked.difference(*self._names.values())
        if missing:
            raise FormatError(f"[{self.hub_id}] should hold the tensor {min(missing)}, no shard does.")
        return [shard for shard, held in self._names.items() if not asked.isdisjoint(held)]

    def ensure(self, names: Iterable[str], progress: Progress | None = None) -> None:
        """Have the data of these tensors on the disk, and of no shard that holds none of them.

        Args:
            names: the checkpoint's names; those of a layer with `names`.
            progress: called with (what, bytes fetched, bytes in all).

        Raises:
            FormatError: a shard cannot be had, or is not what the hub says it is.
            OSError: the disk is full.
        """
        wanted = self.needs(names)
        for name in [n for n in self._whole if n not in wanted]:
            self._empty(name)
        missing = [name for name in wanted if name not in self._whole]
        check_space(self.directory, sum(self._shards[name].size for name in missing))
        for name in missing:
            self._fetch(name, progress or (lambda what, done, total: None))

    def release(self) -> None:
        """Empty every shard; `ensure` fetches them again."""
        for name in list(self._whole):
            self._empty(name)

    def bytes_on_disk(self) -> int:
        """What the shards take on the disk now, headers included."""
        return sum((self.directory / name).stat().st_blocks * 512 for name in self._shards)

    def _read_notes(self) -> tuple[dict[str, Shard], set[str]] | None:
        file = self.directory / SHARDS
        if not file.is_file():
            return None
        try:
            notes = json.loads(read_bytes(file))
            begun = (notes["model"], notes["revision"])
            shards = {name: Shard(**facts) for name, facts in notes["shards"].items()}
            whole = set(notes["whole"])
            if not all(map(_is_shard, shards)):
                raise ValueError("a shard's name")
            sizes = {name: (self.directory / name).stat().st_size for name in shards}
        except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise FormatError(f"[{file}] is damaged; remove {self.directory} and begin anew.") from error
        if begun != (self.hub_id, self.revision):
            raise FormatError(
                f"[{self.directory}] was begun with {shown(begun[0])} at revision {shown(begun[1])}, received "
                f"{self.hub_id} at {self.revision}; ask for the same revision to go on, or remove that "
                "directory to begin anew."
            )
        if any(sizes[name] != shards[name].size for name in shards) or not whole <= set(shards):
            raise FormatError(f"[{self.directory}] holds files of other sizes than it should; remove it, begin anew.")
        return shards, whole

    def _begin(self, snapshot: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for word in [p for p in snapshot.iterdir() if p.is_file() and not p.match(hub.WEIGHTS)]:
            shutil.copyfile(word, self.directory / word.name)
        self._shards, self._whole = {}, set()
        listed = self._listed()
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            headers = list(pool.map(lambda shard: self._header(*shard[:2]), listed))
        for (name, size, sha256, git), header in zip(listed, headers, strict=True):
            with atomic_file(self.directory / name) as file:
                file.write(header)
                file.truncate(size)
            self._shards[name] = Shard(size, len(header), sha256, git)
        if not self._shards:
            raise FormatError(f"[model] {self.hub_id} should hold model*.safetensors on the hub and does not.")
        self._note()

    def _listed(self) -> list[tuple[str, int, str | None, str]]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with hub.refusals(self.hub_id, self.revision):
            tree = hub.patiently(lambda: list(HfApi().list_repo_tree(self.hub_id, revision=self.revision)))
        files = [f for f in tree if isinstance(f, RepoFile) and _is_shard(f.path)]
        return sorted((f.path, f.size, f.lfs.sha256 if f.lfs else None, f.blob_id) for f in files)

    def _header(self, name: str, size: int) -> bytes:
        """The bytes of a safetensors header, its length included."""
        start = self._read(name, 0, min(size, 1 << 16))
        length = 8 + struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else MOST_HEADER + 1
        if length > min(size, MOST_HEADER):
            raise FormatError(f"[{self.hub_id}] {name} should be a safetensors file, its header is damaged.")
        return (start + self._read(name, len(start), length))[:length]

    def _fetch(self, name: str, progress: Progress) -> None:
        shard, file = self._shards[name], self.directory / name
        starts = range(shard.header, shard.size, PIECE)
        done = 0
        with open(file, "r+b", buffering=0) as out:

            def piece(start: int) -> int:
                data = memoryview(self._read(name, start, min(start + PIECE, shard.size)))
                count = 0
                while count < len(data):
                    count += os.pwrite(out.fileno(), data[count:], start + count)
                return count

            pool = ThreadPoolExecutor(CONNECTIONS)
            try:
                for count in pool.map(piece, starts):
                    done += count
                    progress(f"fetching {name}", done, shard.size - shard.header)
                os.fsync(out.fileno())
            except OSError as error:
                raise disk_full(error, file) from error
            finally:
                pool.shutdown(cancel_futures=True)
        self.fetched_bytes += done
        self.peak_bytes = max(self.peak_bytes, self.bytes_on_disk())
        if not _is_whole(file, shard):
            self._empty(name)
            raise FormatError(f"[{self.hub_id}] {name} arrived damaged: its hash is not the hub's; run again.")
        self._whole.add(name)
        self._note()

    def _read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file on the hub."""
        if start >= stop:
            return b""
        with hub.refusals(self.hub_id, self.revision):
            return hub.patiently(lambda: _read_range(self.hub_id, name, self.revision, start, stop))

    def _empty(self, name: str) -> None:
        """Give the disk a shard's data back; header, length and inode stay."""
        if name in self._whole:
            self._whole.discard(name)
            self._note()  # before the bytes go: a run that is killed in between must not take zeros for data
        os.truncate(self.directory / name, self._shards[name].header)
        os.truncate(self.directory / name, self._shards[name].size)

    def _note(self) -> None:
        shards = {name: asdict(shard) for name, shard in self._shards.items()}
        notes = {"model": self.hub_id, "revision": self.revision, "shards": shards, "whole": sorted(self._whole)}
        write_json(self.directory / SHARDS, notes)


def _is_shard(name: str) -> bool:
    """Whether a name is a shard's in the checkpoint's own folder: what is written must not go anywhere else."""
    return bool(re.fullmatch(r"model[^/\\\0]*\.safetensors", name))


def _layer(name: str) -> int | None:
    found = IN_LAYER.search(name)
    return int(found[1]) if found else None


def _is_whole(file: Path, shard: Shard) -> bool:
    # the hub keeps large files by their sha256, small ones as git does
    digest = hashlib.sha256() if shard.sha256 else hashlib.sha1(f"blob {shard.size}\0".encode())
    with open(file, "rb") as handle:
        while data := handle.read(1 << 20):
            digest.update(data)
    return digest.hexdigest() == (shard.sha256 or shard.git)


def _read_range(model: str, name: str, revision: str, start: int, stop: int) -> bytes:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    url = hf_hub_url(model, name, revision=revision)
    response = get_session().get(url, headers={**build_hf_headers(), **wanted}, timeout=60)
    hf_raise_for_status(response)
    if response.status_code != 206 or len(response.content) != stop - start:
        raise ConnectionError(f"{name}: asked for {stop - start} bytes, received {len(response.content)}")
    return response.content
