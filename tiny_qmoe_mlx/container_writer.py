"""The files of a converted model (docs/FORMAT.md, sections 1 to 3), whole or not at all; container opens them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tiny_qmoe_mlx.container import EXPERTS_FILE, SELF, file_hash, read_config, read_experts_header, record_checksums
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.spec import CONFIG, FORMAT_VERSION, LayerSpec, file_header
from tiny_qmoe_mlx.staging import MANIFEST, UNFINISHED, atomic_file, sync_file


def write_experts_file(directory: str | Path, layer: LayerSpec, alignment: int, records: Iterable[np.ndarray]) -> int:
    """Write one layer's experts file; it appears under its name when it is whole.

    Args:
        directory: where.
        layer: what the file holds.
        alignment: of the records.
        records: u8 arrays (record_bytes,), expert 0 first; may be a generator, one record is held at a time.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: a record of another size or type, or another number of records.
        OSError: the disk is full, or as the system says. Nothing is left behind.
    """
    header = file_header(layer, alignment)
    sums: list[np.ndarray] = []
    with atomic_file(Path(directory) / layer.file) as file:
        file.write(header)
        for record in records:
            if record.dtype != np.uint8 or record.shape != (layer.record_bytes,):
                raise ValueError(
                    f"[write_experts_file] record {len(sums)} of {layer.path} should be uint8 of {layer.record_bytes}, "
                    f"received {record.dtype} of {record.shape}."
                )
            file.write(np.ascontiguousarray(record).data)
            sums.append(record_checksums(record))
        if len(sums) != layer.experts:
            raise ValueError(
                f"[write_experts_file] {layer.path} should have {layer.experts} records, received {len(sums)}."
            )
        file.write(np.stack(sums).tobytes())
    return len(header) + layer.data_bytes


def write_manifest(directory: str | Path) -> None:
    """Write the manifest over the files of a finished directory, last, with everything on the disk before it.

    Raises:
        FormatError: config.json or an experts file is not what the format asks for.
    """
    directory = Path(directory)
    spec = read_config(directory)[1]
    files: dict[str, dict[str, Any]] = {}
    layers = {layer.file: layer for layer in spec.layers}
    for path in sorted(p for p in directory.iterdir() if p.name not in {MANIFEST, *UNFINISHED}):
        if not path.is_file():
            raise FormatError(f"[{path.name}] a converted model holds plain files only; move it out of {directory}.")
        if EXPERTS_FILE.fullmatch(path.name) and path.name not in layers:
            raise FormatError(f"[{path.name}] is an experts file that {CONFIG} does not name; remove it.")
        files[path.name] = {"bytes": path.stat().st_size}
        layer = layers.pop(path.name, None)
        if layer:
            files[path.name]["header_bytes"] = read_experts_header(directory, layer, spec.alignment)
        files[path.name]["xxh3_128"] = file_hash(path, files[path.name].get("header_bytes"), layer)
        sync_file(path)
    if layers:
        raise FormatError(f"[{next(iter(layers))}] is named by {CONFIG} and missing in {directory}.")
    manifest = {"format_version": FORMAT_VERSION, "files": files, SELF: "0" * 32}
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    digest = xxhash.xxh3_128_hexdigest(text.encode())
    with atomic_file(directory / MANIFEST) as file:
        file.write((text[: text.rindex("0" * 32)] + digest + text[text.rindex("0" * 32) + 32 :]).encode())
