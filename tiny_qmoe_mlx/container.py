"""The files of a converted model (docs/FORMAT.md, sections 1 to 3), opened with every bound checked.

Owns the manifest and the experts files, which container_writer writes; not what a record holds (codecs/), nor the
reading of records while a model runs (streaming/store). Sizes are bytes.
"""

import json
import re
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tiny_qmoe_mlx import config_file, model_file, plain_files, safetensors_header
from tiny_qmoe_mlx.disk_errors import named
from tiny_qmoe_mlx.disk_reads import read_array
from tiny_qmoe_mlx.errors import FormatError, shown
from tiny_qmoe_mlx.spec import (
    ALIGNMENTS,
    CHECKSUM_BYTES,
    CODEC,
    CONFIG,
    FORMAT_VERSION,
    LayerSpec,
    ModelSpec,
    bits_per_weight,
    check_version,
    expert_file_name,
    file_tensors,
)
from tiny_qmoe_mlx.staging import (
    MANIFEST,
    check_space,
    check_target,
    staged_directory,
    write_json,
)

__all__ = [
    "ALIGNMENTS",
    "CHECKSUM_BYTES",
    "CODEC",
    "CONFIG",
    "FORMAT_VERSION",
    "MANIFEST",
    "Container",
    "LayerSpec",
    "ModelSpec",
    "bits_per_weight",
    "check_space",
    "check_target",
    "expert_file_name",
    "open_model",
    "record_checksums",
    "staged_directory",
    "write_json",
]

MAX_HEADER, MAX_JSON = 1 << 20, config_file.MAX_JSON
SELF = "self_xxh3_128"
_HEX = re.compile("[0-9a-f]{32}")
EXPERTS_FILE = re.compile(r"model-experts-.*\.safetensors")
LOOSE = (".md", ".png")  # a model card may be edited, and its pictures left behind
_PIECE = 1 << 20


# ---- checksums


def record_checksums(record: np.ndarray) -> np.ndarray:
    """Checksums of a record, u64 (ceil(bytes / 65536),): xxh3-64 of each 64 KiB."""
    pieces = (record[i : i + CHECKSUM_BYTES] for i in range(0, len(record), CHECKSUM_BYTES))
    return np.array([xxhash.xxh3_64_intdigest(np.ascontiguousarray(p)) for p in pieces], "<u8")


def file_hash(path: Path, header_bytes: int | None = None, layer: LayerSpec | None = None) -> str:
    """xxh3-128 of a file, 32 hex digits; of an experts file, of its header and checksums."""
    digest = xxhash.xxh3_128()
    with named(path), open(path, "rb") as file:
        if layer is not None and header_bytes is not None:
            digest.update(file.read(header_bytes))
            file.seek(header_bytes + layer.experts * layer.record_bytes)
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


# ---- open


@dataclass(frozen=True)
class Container:
    """A converted model whose manifest, config and headers were checked; layers count from 0 as in `spec.layers`."""

    directory: Path
    config: dict[str, Any]
    spec: ModelSpec
    files: dict[str, dict[str, Any]]  # the manifest's
    states: plain_files.State = field(default_factory=dict)  # of the files before they were checked

    @cached_property
    def tensors(self) -> dict[str, tuple[str, list[int]]]:
        """dtype and shape of every non-expert tensor, from the headers, which are checked as they are read.

        Raises:
            FormatError: a header is damaged, or two files hold a tensor of the same name.
        """
        found, experts = safetensors_header.Together(), {layer.file for layer in self.spec.layers}
        claim_experts(found, self.spec)
        for name in self.files:
            if name.endswith(".safetensors") and name not in experts:
                found.add(self.directory / name)
        return found.sizes

    def expert_file(self, layer_index: int) -> Path:
        """Path of a layer's experts file."""
        return self.directory / self.spec.layers[layer_index].file

    def record_offset(self, layer_index: int, expert: int) -> int:
        """Where an expert's record begins in its file: a multiple of the alignment."""
        layer = self.spec.layers[layer_index]
        if not 0 <= expert < layer.experts:
            raise ValueError(f"[record_offset] {layer.path} has experts 0 to {layer.experts - 1}, received {expert}.")
        return int(self.files[layer.file]["header_bytes"]) + expert * layer.record_bytes

    def checksums(self, layer_index: int) -> np.ndarray:
        """Checksums of a layer's records, u64 (experts, checksums of a record), themselves checked.

        Raises:
            FormatError: the file's header or checksums are damaged.
        """
        layer = self.spec.layers[layer_index]
        check_hash(self.directory, layer.file, self.files[layer.file], layer)
        offset = self.record_offset(layer_index, 0) + layer.experts * layer.record_bytes
        sums = read_array(self.expert_file(layer_index), "<u8", layer.experts * layer.checksums, offset)
        return sums.reshape(layer.experts, layer.checksums)


def open_model(path: str | Path, hash_files: bool = False) -> Container:
    """Open a converted model: its manifest, the presence and size of every file, config and headers are checked.

    Args:
        path: directory.
        hash_files: also hash every file but the records (seconds per GB of non-expert weights).

    Raises:
        FormatError: which file, what it should be, what it is, and what to do.
    """
    directory = Path(path)
    files = read_manifest(directory)
    states = plain_files.states(directory, [name for name in files if not name.endswith(LOOSE)])
    config, spec = read_config(directory)
    layers = {layer.file: layer for layer in spec.layers}
    check_names(directory, files, layers)
    for name, entry in files.items():
        if name.endswith(LOOSE):
            continue
        check_size(directory, name, entry)
        if name in layers:
            check_experts_header(directory, layers[name], spec.alignment, entry)
    container = Container(directory, config, spec, files, states)
    _ = container.tensors  # which checks the headers
    for name, entry in files.items():
        if hash_files and not name.endswith(LOOSE):
            check_hash(directory, name, entry, layers.get(name))
    model_file.check(directory, config, files)
    return container


def claim_experts(found: safetensors_header.Together, spec: ModelSpec) -> None:
    """Note the names in a model's experts files; the headers themselves are compared with the config.

    Raises:
        FormatError: another file has one of them too.
    """
    for layer in spec.layers:
        for name in file_tensors(layer):
            found.claim(name, layer.file)


def sizes(directory: str | Path) -> dict[str, Any]:
    """path, bits per expert weight and bytes on disk of a converted directory.

    Raises:
        FormatError: it is not one.
    """
    container = open_model(directory)
    return {
        "path": str(directory),
        "bits": container.spec.bits,
        "file_bytes": sum(entry["bytes"] for entry in container.files.values()),
        "expert_file_bytes": sum(container.files[layer.file]["bytes"] for layer in container.spec.layers),
        "experts": sum(layer.experts for layer in container.spec.layers),
        "expert_layers": len(container.spec.layers),
    }


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """The manifest's files, their names and fields checked, and the manifest's own hash.

    Raises:
        FormatError: no model, an unconverted or unfinished one, a damaged manifest, or another version; or the
            directory holds other things than files (plain_files).
    """
    if directory.is_dir():
        plain_files.check_directory(directory)
    if not (directory / MANIFEST).is_file():
        raise _not_converted(directory)
    raw, manifest = _read_json(directory, MANIFEST)
    own, version = str(manifest.get(SELF)), manifest.get("format_version")
    genuine = bool(_HEX.fullmatch(own)) and raw.count(own.encode()) == 1
    genuine = genuine and own == xxhash.xxh3_128_hexdigest(raw.replace(own.encode(), b"0" * 32))
    if genuine or (type(version) is int and version > FORMAT_VERSION):
        check_version(version, MANIFEST)
    if not genuine:
        raise FormatError(f"[{MANIFEST}] does not have the hash that it says; it is damaged, {_AGAIN}")
    files = manifest.get("files")
    if type(files) is not dict or not all(_entry_is_fine(n, e) for n, e in files.items()) or CONFIG not in files:
        raise FormatError(f"[{MANIFEST}] should list names, sizes and hashes of files and does not; {_AGAIN}")
    return files


_AGAIN = "copy or convert the model again."


def _entry_is_fine(name: str, entry: Any) -> bool:
    fine = type(entry) is dict and type(entry.get("bytes")) is int and type(entry.get("xxh3_128")) is str
    plain = name not in ("", ".", "..", MANIFEST) and name.isprintable() and not set("/\\") & set(name)
    return fine and plain and entry["bytes"] >= 0 and bool(_HEX.fullmatch(entry["xxh3_128"]))


def _not_converted(directory: Path) -> FormatError:
    if not directory.is_dir():
        return FormatError(f"[{directory}] is no directory; give the directory of a converted model.")
    if not (directory / CONFIG).is_file():
        return FormatError(f"[{directory}] is no model: it has no {CONFIG}; give the directory of a converted model.")
    if "tiny_qmoe" in _read_json(directory, CONFIG)[1]:
        return FormatError(f"[{directory}] has no {MANIFEST}, so it was not finished or not copied whole; {_AGAIN}")
    hub = re.search(r"models--([^/]+)--([^/]+)/snapshots/[^/]+$", str(directory))  # the hub's cache of org/name
    name = f"{hub[1]}/{hub[2]}" if hub else str(directory)
    source, out = shlex.quote(name), shlex.quote(f"{Path(name).resolve().name or 'model'}-tiny-qmoe")
    command = f"python -m tiny_qmoe_mlx.convert --hf-path {source} --mlx-path {out} --bits 2.0"
    return FormatError(f"[{directory}] is an unconverted checkpoint; convert it first: {command}")


def read_config(directory: Path) -> tuple[dict[str, Any], ModelSpec]:
    """config.json and its `tiny_qmoe` object.

    Raises:
        FormatError: it is missing, damaged, or asks for what the format does not allow.
    """
    if not (directory / CONFIG).is_file():
        raise FormatError(f"[{CONFIG}] is missing in {directory}; {_AGAIN}")
    config = _read_json(directory, CONFIG)[1]
    config_file.check(config)
    return config, ModelSpec.from_dict(config.get("tiny_qmoe"))


def _read_json(directory: Path, name: str) -> tuple[bytes, dict[str, Any]]:
    raw = plain_files.read(directory / name, MAX_JSON, name)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if type(value) is not dict:
        raise FormatError(f"[{name}] should be a JSON object and is not; it is damaged, {_AGAIN}")
    return raw, value


def check_names(directory: Path, files: dict[str, Any], layers: dict[str, LayerSpec]) -> None:
    """Manifest, config and directory should speak of the same model files.

    Raises:
        FormatError: a file that only one of them knows.
    """
    for name in layers:
        if type(files.get(name, {}).get("header_bytes")) is not int:
            raise FormatError(f"[{name}] is named by {CONFIG} but not by {MANIFEST}; {_AGAIN}")
    present = {p.name for p in directory.iterdir() if _is_loaded(p)}
    experts = {n for n in files if EXPERTS_FILE.fullmatch(n)} - set(layers)
    for name in sorted((present - set(files)) | experts):
        raise FormatError(f"[{name}] does not belong to this model, and would be loaded with it; remove it.")


def _is_loaded(path: Path) -> bool:
    """Whether mlx-lm or transformers open this in a model's directory, whoever put it there."""
    name = path.name
    if name.endswith(".safetensors"):
        return name.startswith("model")
    return name in plain_files.FOLDERS or (name != MANIFEST and plain_files.is_read(name) and not path.is_dir())


def check_size(directory: Path, name: str, entry: dict[str, Any]) -> None:
    """Presence and size of one file.

    Raises:
        FormatError: missing, truncated or grown.
    """
    path = directory / name
    if not path.is_file():
        raise FormatError(f"[{name}] is missing in {directory}; {_AGAIN}")
    found, expected = path.stat().st_size, entry["bytes"]
    if found != expected:
        how = "was cut short" if found < expected else "has grown"
        raise FormatError(f"[{name}] should have {expected} bytes, has {found}: it {how}; {_AGAIN}")


def check_hash(directory: Path, name: str, entry: dict[str, Any], layer: LayerSpec | None = None) -> None:
    """Hash of one file; of an experts file, of its header and checksums.

    Raises:
        FormatError: with both hashes.
    """
    found = file_hash(directory / name, entry.get("header_bytes"), layer)
    if found != entry["xxh3_128"]:
        part, expected = "header and checksums" if layer else "bytes", entry["xxh3_128"]
        raise FormatError(f"[{name}] its {part} should hash to {expected}, hash to {found}; it is damaged, {_AGAIN}")


def check_experts_header(directory: Path, layer: LayerSpec, alignment: int, entry: dict[str, Any]) -> None:
    """An experts file's header against the config, and its length against the manifest.

    Raises:
        FormatError: where they differ.
    """
    found = read_experts_header(directory, layer, alignment)
    if found != entry["header_bytes"]:
        raise FormatError(f"[{layer.file}] its header should end at {entry['header_bytes']}, ends at {found}; {_AGAIN}")


def read_experts_header(directory: Path, layer: LayerSpec, alignment: int) -> int:
    """Where the data of an experts file begins, after its header has been compared with the config.

    Raises:
        FormatError: names, types, shapes, offsets, padding or the file's size are not what the config asks for.
    """
    name, path = layer.file, directory / layer.file
    size = path.stat().st_size
    with named(path), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise FormatError(
                f"[{name}] a header should have 2 to {min(MAX_HEADER, size - 8)} bytes, this says {length}; {_AGAIN}"
            )
        raw = file.read(length)
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        raise FormatError(f"[{name}] its header should be JSON and is not; it is damaged, {_AGAIN}") from None
    for key, tensor in file_tensors(layer).items():
        got = found.get(key) if type(found) is dict else None
        if got != tensor or len(found) != 2:
            raise FormatError(f"[{name}] {CONFIG} asks for {key} {tensor}, the header says {shown(got, 120)}; {_AGAIN}")
    if (8 + length) % alignment or size != 8 + length + layer.data_bytes:
        raise FormatError(
            f"[{name}] should have {8 + length + layer.data_bytes} bytes and data at a multiple of {alignment}, "
            f"has {size} and data at {8 + length}; {_AGAIN}"
        )
    return 8 + length
