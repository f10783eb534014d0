"""A usage profile: how often each expert of a model was demanded, so that the next run starts with the warmest ones.

A file of JSON: `{"tiny_qmoe_profile": 1, "model": identity, "use": [[counts of experts] per MoE layer],
"decisions": n}`. Files converted at other rates from one checkpoint share profiles, since their routers are the same.
"""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tiny_qmoe_mlx import plain_files
from tiny_qmoe_mlx.container import Container
from tiny_qmoe_mlx.errors import FormatError, shown
from tiny_qmoe_mlx.staging import atomic_file

VERSION = 1
KEY = "tiny_qmoe_profile"
MAX_FILE = 1 << 28  # bytes; a count takes at most 18
MAX_COUNT = 1 << 53  # what every reader of JSON holds exactly
CONVERTED = ("tiny_qmoe", "quantization", "quantization_config")  # of config.json, what a conversion writes
_AGAIN = "remove it, or name another file with --profile"


def identity(container: Container) -> dict[str, Any]:
    """What tells a model's routing from another's, as plain JSON values; the rate of its experts does not matter."""
    config = {key: value for key, value in container.config.items() if key not in CONVERTED}
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return {
        "model": container.spec.source.get("model"),
        "experts": [layer.experts for layer in container.spec.layers],
        "config": xxhash.xxh3_64_hexdigest(text.encode()),
    }


def save_profile(path: str | Path, container: Container, use: Sequence[np.ndarray], decisions: int) -> None:
    """Write a profile; one that is there counts half, so that what a model is used for now weighs more.

    Args:
        path: the file; it is replaced when the new one is whole.
        container: the model.
        use: int64 (experts,) for each MoE layer, or one array (layers, experts) padded on the right.
        decisions: calls of MoE layers, each of which counts an expert once.

    Raises:
        FormatError: the file is another model's profile, or no profile; it stays as it is.
        OSError: it cannot be written.
    """
    layers = container.spec.layers
    counts = [np.asarray(row, np.int64)[: spec.experts] for row, spec in zip(use, layers, strict=True)]
    if os.path.lexists(path):
        old, before = _read(Path(path), container)
        counts = [new + then // 2 for new, then in zip(counts, old, strict=True)]
        decisions += before // 2
    rows = [np.clip(row, 0, MAX_COUNT).tolist() for row in counts]
    found = {KEY: VERSION, "model": identity(container), "use": rows, "decisions": min(int(decisions), MAX_COUNT)}
    with atomic_file(Path(os.path.realpath(path))) as file:  # through links, as the person who names it means
        file.write((json.dumps(found, separators=(",", ":")) + "\n").encode())


def load_profile(path: str | Path, container: Container) -> list[np.ndarray]:
    """How often each expert was demanded: int64 (experts,) for each MoE layer.

    Raises:
        FormatError: it is no profile, is damaged, or belongs to another model.
        OSError: it cannot be read.
    """
    return _read(Path(path), container)[0]


def warmest(
    use: Sequence[np.ndarray], container: Container, slots: Mapping[int, int], unused: bool = False
) -> list[tuple[int, int]]:
    """The experts demanded most that fit the pools, as (layer, expert) in file order.

    Args:
        use: as `load_profile` gives them.
        slots: record size -> slots of its pool.
        unused: fill the pools with experts that were never demanded too.
    """
    chosen: list[tuple[int, int]] = []
    for size, count in slots.items():
        layers = [i for i, layer in enumerate(container.spec.layers) if layer.slot == size]
        ranked = [(-int(n), layer, e) for layer in layers for e, n in enumerate(use[layer]) if n > 0 or unused]
        chosen += [(layer, expert) for _, layer, expert in sorted(ranked)[:count]]
    return sorted(chosen)


def _read(path: Path, container: Container) -> tuple[list[np.ndarray], int]:
    found = _parse(path)
    mine, other = identity(container), found.get("model")
    if other != mine:
        name = shown(other.get("model") if isinstance(other, dict) else other)
        raise FormatError(
            f"[{path}] should be a profile of {mine['model']}, it is one of another model ({name}); {_AGAIN}."
        )
    use, decisions = found.get("use"), found.get("decisions")
    _require(path, _is_count(decisions), "decisions should be a number of at least 0", decisions)
    _require(path, isinstance(use, list) and len(use) == len(mine["experts"]), "use should have a list per layer", use)
    assert isinstance(use, list) and isinstance(decisions, int)
    for layer, (row, experts) in enumerate(zip(use, mine["experts"], strict=True)):
        fine = isinstance(row, list) and len(row) == experts and all(map(_is_count, row))
        _require(path, fine, f"layer {layer} should have {experts} counts of at least 0", row)
    return [np.array(row, np.int64) for row in use], decisions


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        if path.exists():
            raise FormatError(f"[{path}] should be a file with a usage profile, it is no plain file; {_AGAIN}.")
        raise FileNotFoundError(errno.ENOENT, "there is no such profile; a run with --profile writes one", str(path))
    try:
        found = json.loads(plain_files.read(path, MAX_FILE))
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"[{path}] should be a usage profile and is no JSON: {str(error)[:100]}; {_AGAIN}."
        ) from error
    _require(path, isinstance(found, dict) and KEY in found, "should be a usage profile", found)
    version = found[KEY]
    _require(path, type(version) is int and version == VERSION, f"{KEY} should be {VERSION}", version)
    return found


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _require(path: Path, fine: bool, should: str, received: Any) -> None:
    if not fine:
        raise FormatError(f"[{path}] {should}, received {shown(received)}; {_AGAIN}.")
