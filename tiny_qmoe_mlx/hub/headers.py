"""A converted model of the hub without its weights: the small files as they are, every safetensors file as its header.

A skeleton opens like the model (`container.open_model` without hashes) and plans like it. Its safetensors files have
their true header and their true length, and nothing between: no byte of a record or a weight is fetched.
"""

import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tiny_qmoe_mlx import container
from tiny_qmoe_mlx.errors import FormatError, shown
from tiny_qmoe_mlx.hub import client as hub

CONNECTIONS = 8  # two small requests a file, of about a hundred files: the time is the line's latency
MOST_HEADER = 25_000_000  # bytes; the hub's own limit. Of experts files the format's, which is less
SAFETENSORS = ".safetensors"


def skeleton(model: str, revision: str | None, directory: Path, quiet: bool = False) -> Path:
    """Make the skeleton of a converted model on the hub.

    Args:
        model: hub id.
        revision: branch, tag or commit; all is read from the commit that it is at the beginning.
        directory: where; made if it is missing, should be empty.
        quiet: no progress bars.

    Returns:
        The directory.

    Raises:
        FormatError: the repository cannot be had, holds no converted model, or not the files its manifest lists.
        OSError: the directory cannot be written.
    """
    hub.require_id(model)
    snapshot = hub.download(model, revision, hub.WORDS, quiet)
    commit = hub.commit_of(snapshot) or revision or "main"
    files = container.read_manifest(snapshot)  # refuses an original checkpoint before anything else is fetched
    experts = {layer.file for layer in container.read_config(snapshot)[1].layers}
    check_listed(model, files, _listed(model, commit))
    limits = {n: container.MAX_HEADER if n in experts else MOST_HEADER for n in files if n.endswith(SAFETENSORS)}
    directory.mkdir(parents=True, exist_ok=True)
    _copy_words(snapshot, directory, files)
    for name, header in _headers(model, commit, files, limits):
        with open(directory / name, "wb") as file:
            file.write(header)
            file.truncate(files[name]["bytes"])
    return directory


def check_listed(model: str, files: dict[str, dict[str, Any]], listed: dict[str, int]) -> None:
    """Manifest and repository should speak of the same files.

    Args:
        model: hub id.
        files: the manifest's.
        listed: name -> bytes of the files on the hub.

    Raises:
        FormatError: a file is missing or of another size, or would be loaded with the model and is none of its own.
    """
    for name, entry in files.items():
        found, expected = listed.get(name), entry["bytes"]
        if found != expected and not name.endswith(container.LOOSE):
            has = "the hub does not have it" if found is None else f"has {shown(found)} on the hub"
            raise FormatError(f"[{model}] {name} should have {expected} bytes, {has}; upload the model again.")
    for name in sorted(n for n in listed if Path(n).match(hub.WEIGHTS) and n not in files):
        raise FormatError(
            f"[{model}] {shown(name)} on the hub does not belong to this model, and would be loaded with it; remove it "
            "there."
        )


def _listed(model: str, commit: str) -> dict[str, int]:
    """Name -> bytes of a repository's files, without its folders, which a converted model does not have."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with hub.refusals(model, commit):
        tree = hub.patiently(lambda: list(HfApi().list_repo_tree(model, revision=commit)))
    return {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}


def _copy_words(snapshot: Path, directory: Path, files: Iterable[str]) -> None:
    """Copy the manifest and what it lists but the weights, which may lie in the hub's cache too."""
    for name in (container.MANIFEST, *files):
        if not name.endswith(SAFETENSORS) and (snapshot / name).is_file():
            shutil.copyfile(snapshot / name, directory / name)


def _headers(
    model: str, commit: str, files: dict[str, dict[str, Any]], limits: dict[str, int]
) -> list[tuple[str, bytes]]:
    """Name and header of every safetensors file; the first that fails ends the rest."""

    def fetch(name: str) -> tuple[str, bytes]:
        with hub.refusals(model, commit):
            return name, read_header(model, name, commit, files[name]["bytes"], limits[name])

    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        return list(pool.map(fetch, limits))
    finally:
        pool.shutdown(cancel_futures=True)


def read_header(model: str, name: str, commit: str, size: int, most: int = MOST_HEADER) -> bytes:
    """The bytes of a safetensors file before its data: the length of the header (u64, little endian), and the header.

    Args:
        model, name, commit: of the file on the hub.
        size: of the file.
        most: bytes that the header may have; a length above it, or beyond the file, is never asked for.

    Raises:
        FormatError: it says an impossible length, or the hub sends something else than was asked for.
        Exception: of the hub's client, for `client.refusals`.
    """
    most = min(most, size - 8)
    length = int.from_bytes(_range(model, name, commit, 0, 8, size), "little") if size > 8 else 0
    if not 2 <= length <= most:
        raise FormatError(
            f"[{model}] {name} should begin with the length of its header, 2 to {most} bytes, it says {length}; it is "
            "damaged, upload the model again."
        )
    return length.to_bytes(8, "little") + _range(model, name, commit, 8, 8 + length, size)


def _range(model: str, name: str, commit: str, start: int, stop: int, size: int) -> bytes:
    """Bytes [start, stop) of a file on the hub, asked for again where that failed in a way that passes."""
    return hub.patiently(lambda: _ask(model, name, commit, start, stop, size))


def _ask(model: str, name: str, commit: str, start: int, stop: int, size: int) -> bytes:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    url = hf_hub_url(model, name, revision=commit)
    with _stream(url, {**build_hf_headers(), **wanted}, constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        sent = response.headers.get("Content-Range", "the whole file")
        if response.status_code != 206 or sent != f"bytes {start}-{stop - 1}/{size}":
            raise FormatError(
                f"[{model}] {name} should come in parts, bytes {start}-{stop - 1}/{size} were asked for and {sent} "
                "offered; see whether a proxy or HF_ENDPOINT changes the hub's answers, or download the model."
            )
        return _body(response, stop - start, name)


def _stream(url: str, headers: dict[str, str], timeout: float) -> Any:
    """A context manager of the answer, its body not yet read: who ignores the range may offer the whole file."""
    from huggingface_hub.utils import get_session

    session: Any = get_session()
    if callable(getattr(session, "stream", None)):  # httpx; the hub's client before version 1 has one of requests
        return session.stream("GET", url, headers=headers, timeout=timeout)
    return session.get(url, headers=headers, timeout=timeout, stream=True)


def _body(response: Any, count: int, name: str) -> bytes:
    data = bytearray()
    for piece in response.iter_bytes() if hasattr(response, "iter_bytes") else response.iter_content(1 << 16):
        data += piece
        if len(data) > count:
            break
    if len(data) != count:
        raise ConnectionError(f"{name}: {count} bytes were asked for, {len(data)} or more came")
    return bytes(data)
