"""Readers of a model: seeds for each file of a converted one, of an original and of the hub, and how they are called.

A reader gets bytes. It may return anything, or raise the package's own error with a sentence; the fuzzer judges.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import records
import xxhash
from safetensors.numpy import save, save_file

from abuse import mutate
from tiny_qmoe_mlx import (
    container,
    footprint,
    model_file,
    safetensors_header,
    spec,
)
from tiny_qmoe_mlx.codecs import affine, qmoe, trellis, tuples
from tiny_qmoe_mlx.hub import headers, shards
from tiny_qmoe_mlx.original import checkpoint, shipped

HERE = Path(__file__).parents[1]
SELF = b'"self_xxh3_128": "'
EXPERTS = "model-experts-00001.safetensors"


@dataclass(frozen=True)
class Target:
    """seeds: inputs that a fuzzer begins with; read: takes one; change: mutations that keep what the reader expects."""

    seeds: list[bytes]
    read: Callable[[bytes], Any]
    change: tuple[mutate.Mutation, ...] = (mutate.jsons, mutate.jsons, mutate.byte)


# ---- a converted model


def sealed(raw: bytes) -> bytes:
    """A manifest with the hash that it should say, where it says one at all."""
    at = raw.rfind(SELF)
    if at < 0:
        return raw
    start = at + len(SELF)
    empty = raw[:start] + b"0" * 32 + raw[start + 32 :]
    return empty[:start] + xxhash.xxh3_128_hexdigest(empty).encode() + empty[start + 32 :]


def manifest(root: Path) -> Target:
    model = root / "model"
    seed = (model / container.MANIFEST).read_bytes()

    def read(data: bytes) -> None:
        (model / container.MANIFEST).write_bytes(data if data[:1] == b" " else sealed(data))
        container.open_model(model)

    return Target([seed, b" " + seed], read)


def config(root: Path) -> Target:
    """config.json of a converted model, with a manifest that agrees with it."""
    model = root / "model"
    names, own = json.loads((model / container.MANIFEST).read_bytes()), (model / "config.json").read_bytes()

    def read(data: bytes) -> None:
        (model / "config.json").write_bytes(data)
        names["files"]["config.json"] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
        (model / container.MANIFEST).write_bytes(sealed(json.dumps({**names, "self_xxh3_128": "0" * 32}).encode()))
        opened = container.open_model(model)
        footprint.kv_bytes(opened.config, 512, True)
        footprint.longest_context(opened.config)
        footprint.picks(opened)

    return Target([own, *[json.dumps({"model_type": "x", "tiny_qmoe": s}).encode() for s in specs()]], read)


def specs() -> Iterator[dict]:
    """`tiny_qmoe` objects of every codec."""
    layer = json.loads(json.dumps(spec.LayerSpec(
        "model.layers.0.mlp", 0, spec.expert_file_name(0), 2, 4096, (("fc1", 64, 32), ("fc2", 32, 64)), False
    ).to_dict()))  # fmt: skip
    words = {
        "format_version": 1, "codec": "trellis", "bits": 2.5, "alignment": 128, "length": 12, "seed": 7,
        "layers": [layer], "source": {"model": "org/name", "revision": None},
        "calibration": {"source": "text.txt", "tokens": 5},
    }  # fmt: skip
    yield words
    plain = {**words, "length": 0, "seed": 0}
    yield {
        **plain,
        "codec": "qmoe",
        "layers": [{**layer, "coding": {"grid": "ternary", "code": "tunstall", "bits": 8}}],
    }
    pack = {"mode": "affine", "bits": 4, "group_size": 32, "scales": "float16", "bias": None}
    yield {**plain, "codec": "affine", "layers": [{**layer, "packing": [pack, pack]}]}
    yield {**plain, "codec": "lossless", "layers": [{**layer, "packing": [pack, pack], "slot_bytes": 4096}]}


def experts_header(root: Path) -> Target:
    opened = container.open_model(root / "model")
    layer, file = opened.spec.layers[1], root / "model" / EXPERTS
    data = file.read_bytes()

    def read(data: bytes) -> None:
        file.write_bytes(data)
        container.read_experts_header(root / "model", layer, opened.spec.alignment)

    return Target([data], read, (mutate.safetensors,))


def model_py(root: Path) -> Target:
    def read(data: bytes) -> None:
        (root / model_file.NAME).write_bytes(data)
        model_file.check(root, {"model_file": model_file.NAME}, {model_file.NAME: {}})

    return Target([model_file.TEXT], read, (mutate.byte,))


def tuple_table(root: Path) -> Target:
    file = root / tuples.FILE
    seed = save({tuples.TENSOR: np.arange(64, dtype=np.uint8).reshape(16, 4)})

    def read(data: bytes) -> None:
        file.write_bytes(data)
        safetensors_header.check(file)
        tuples.read_table(root)

    return Target([seed, save({tuples.TENSOR: np.zeros((3, 4), np.float16)})], read, (mutate.safetensors,))


def record_of(codec: str) -> Callable[[Path], Target]:
    """Records in numpy's decoders."""

    def make(root: Path) -> Target:
        import qmoe_records

        rng = np.random.default_rng(0)
        shapes = [(32, 64), (32, 64), (64, 32)]
        if codec == "trellis":
            record = records.random_record(rng, shapes, True, 12)
            seeds = [trellis.pack(record, records.record_size(record)).tobytes()]
            return Target(seeds, lambda data: trellis.parse(whole(data), shapes, True, "record", 12), RECORD)
        if codec == "qmoe":
            codings = qmoe_records.CODINGS[:2]
            small = [(8, 20), (8, 20), (20, 8)]
            seeds = [bytes([i]) + bytes(qmoe_records.random_record(rng, c, small)) for i, c in enumerate(codings)]
            return Target(
                seeds,
                lambda data: qmoe.parse(whole(data[1:]), small, False, codings[data[:1] == b"\1"], "record"),
                (mutate.byte, lambda data, pick: data[:1] + signed(data[1:], pick)),
            )
        packing = tuple(affine.Packing("affine", 4, 32, "float16") for _ in shapes)
        places, size = affine.layout(tuple(shapes), packing)
        arrays = [{part.name: np.ones(part.shape, affine.storage(part.dtype)) for part in parts} for parts in places]
        seeds = [affine.pack(arrays, shapes, packing, size).tobytes()]
        return Target(seeds, lambda data: affine.parse(whole(data), shapes, packing, "record"), RECORD)

    return make


def signed(data: bytes, pick: random.Random) -> bytes:
    """A record whose first bytes are changed, and have their hash again."""
    head = mutate.byte(data[:56], pick)[:56].ljust(56, b"\0")
    return head + xxhash.xxh3_64_intdigest(head).to_bytes(8, "little") + data[64:]


RECORD: tuple[mutate.Mutation, ...] = (mutate.byte, signed)


def whole(data: bytes) -> np.ndarray:
    """Bytes as a record; a container's are never shorter than the header that all codecs have."""
    return np.frombuffer(data.ljust(128, b"\0"), np.uint8)


# ---- originals and the hub


def original(root: Path) -> Target:
    """config.json of a checkpoint."""
    file = root / "config.json"
    known = json.loads((HERE / "public_models.json").read_text())
    seeds = [json.dumps(c).encode() for c in configs(known)][:80]

    def read(data: bytes) -> None:
        file.write_bytes(data)
        found = checkpoint.read_config(root)
        shipped.describe_source(found)
        for ask in (footprint.longest_context, footprint.top_k, lambda c: footprint.kv_bytes(c, 512, True)):
            ask(found)

    return Target(seeds, read)


def configs(value: Any) -> Iterator[dict]:
    """Objects with a model_type, wherever they stand."""
    if isinstance(value, dict) and isinstance(value.get("model_type"), str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from configs(part)


def weights(root: Path) -> Target:
    """Headers of an original's safetensors, by our reader and, where that lets them pass, the hub's shards."""
    file = root / "model-00001.safetensors"
    arrays = {"model.norm.weight": np.ones(8, np.float32), "a.b": np.zeros((2, 3), np.float16)}
    seeds = [save(arrays), save(arrays, {"format": "pt"}), save({"x": np.zeros((0, 4), np.int8)})]

    def read(data: bytes) -> None:
        file.write_bytes(data)
        safetensors_header.check(file)

    return Target(seeds, read, (mutate.safetensors,))


def hub_header(root: Path) -> Target:
    """A header that comes from the hub in ranges."""
    seeds = [save({"model.norm.weight": np.ones(8, np.float32)})]

    def read(data: bytes) -> None:
        def ranged(model: str, name: str, commit: str, start: int, stop: int, size: int) -> bytes:
            return data[start:stop]

        with mock.patch.object(headers, "_range", ranged):
            found = headers.read_header("org/name", "model.safetensors", "main", len(data))
        safetensors_header.parse(found[8:], "model.safetensors")

    return Target(seeds, read, (mutate.safetensors,))


def hub_listing(root: Path) -> Target:
    """What the hub lists, beside a manifest."""
    files = json.loads((root / "model" / container.MANIFEST).read_bytes())["files"]
    seed = json.dumps({name: entry["bytes"] for name, entry in files.items()}).encode()

    def read(data: bytes) -> None:
        listed = json.loads(data)
        if isinstance(listed, dict):
            headers.check_listed("org/name", files, listed)

    return Target([seed], lambda data: read(data) if is_json(data) else None, (mutate.jsons,))


def is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def shard_notes(root: Path) -> Target:
    place = root / "shards"
    place.mkdir()
    save_file({"a": np.zeros(4, np.float32)}, place / "model-1.safetensors")
    size = (place / "model-1.safetensors").stat().st_size
    facts = {"size": size, "header": size - 16, "sha256": None, "git": "00"}
    notes = {"model": "org/name", "revision": "main", "shards": {"model-1.safetensors": facts}, "whole": []}

    def read(data: bytes) -> None:
        (place / shards.SHARDS).write_bytes(data)
        reader = shards.SourceShards.__new__(shards.SourceShards)
        reader.directory, reader.hub_id, reader.revision = place, "org/name", "main"
        reader._read_notes()

    return Target([json.dumps(notes).encode()], read)
