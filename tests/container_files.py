"""A small converted model for the tests of its files, and ways to edit one."""

import json
from pathlib import Path

import xxhash

from tiny_qmoe_mlx.container import MANIFEST

EXPERTS = "model-experts-00001.safetensors"


def layer_spec(**changes) -> dict:
    spec = {
        "path": "model.layers.3.mlp",
        "layer": 3,
        "file": "model-experts-00003.safetensors",
        "experts": 2,
        "record_bytes": 4096,
        "matrices": [["fc1", 64, 32], ["fc2", 32, 64]],
        "bias": False,
    }
    return {**spec, **changes}


def model_spec(**changes) -> dict:
    spec = {
        "format_version": 1,
        "codec": "trellis",
        "bits": 2.5,
        "alignment": 128,
        "length": 12,
        "seed": 7,
        "layers": [layer_spec()],
        "source": {"model": "org/name", "revision": None},
        "calibration": {"source": "text.txt", "tokens": 5},
    }
    return {**spec, **changes}


def edit_config(directory: Path, change) -> None:
    """Change config.json and make the manifest agree again, so that only the content is wrong."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["tiny_qmoe"])
    path.write_text(json.dumps(config))
    edit_manifest(directory, lambda m: m["files"].update({"config.json": entry_of(path)}))


def entry_of(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "xxh3_128": xxhash.xxh3_128_hexdigest(path.read_bytes())}


def edit_manifest(directory: Path, change) -> None:
    """Change the manifest and give it its right hash, by the rule of FORMAT.md."""
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest)
    manifest["self_xxh3_128"] = "0" * 32
    text = json.dumps(manifest)
    digest = xxhash.xxh3_128_hexdigest(text.encode())
    (directory / MANIFEST).write_text(text.replace('"self_xxh3_128": "' + "0" * 32, f'"self_xxh3_128": "{digest}'))


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert text.startswith("[") and "\n" not in text and len(text) < 600
    return text
