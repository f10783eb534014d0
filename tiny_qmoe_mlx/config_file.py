"""config.json of any model: read with a bound, and refused where a number in it is one that no model has.

mlx-lm builds every module that a config asks for before it looks at the weights: a billion layers, if it says so.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny_qmoe_mlx import plain_files
from tiny_qmoe_mlx.errors import FormatError, shown
from tiny_qmoe_mlx.spec import CONFIG, MAX_EXPERTS, MAX_LAYERS

MAX_JSON = 1 << 26  # bytes
MOST_VALUES = 1 << 20
MOST_DEPTH = 64  # of objects and lists within one another
MOST_SIZE = 1 << 24  # of a dimension, a vocabulary, a number of heads: the largest known is a vocabulary of 2^18
LAYERS = re.compile(r"(n|num)_(\w+_)?(layers?|blocks)|layers|depth")
EXPERTS = re.compile(r"(\w+_)?(n|num)_(\w+_)?experts(_\w+)?|experts")
SIZES = re.compile(r"(\w+_)?(size|dim|dims|heads?|groups|rank|width|d_model|n_embd|channels|state)")


def read(file: Path, where: str) -> dict[str, Any]:
    """The object in a config.json.

    Raises:
        FormatError: it is too large, no JSON object, or a number in it is out of all bounds; `where` is named.
        OSError: it cannot be read.
    """
    raw = plain_files.read(file, MAX_JSON, where)
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise FormatError(f"[{where}] should be JSON and is not: {reason}; copy or download it again.") from None
    if type(found) is not dict:
        raise FormatError(f"[{where}] should be a JSON object, it is another value; copy or download it again.")
    check(found, where)
    return found


def check(config: dict[str, Any], where: str = CONFIG) -> None:
    """Refuse counts and sizes that no model has, wherever in the config they stand, and a `text_config` that is no
    object; `tiny_qmoe` has its own checks.

    Raises:
        FormatError: with the key and what was received.
    """
    text = config.get("text_config")
    if text is not None and type(text) is not dict:
        raise FormatError(
            f"[{where}] text_config should be a JSON object or absent, received {shown(text)}; copy or download it "
            "again."
        )
    for key, value in _numbers(config, where):
        most = _most(key)
        if most is not None and value > most:
            given = repr(value) if value < 1 << 64 else "a larger one"
            raise FormatError(f"[{where}] {shown(key)} should be a number of at most {most}, received {given}.")


def _most(key: str) -> int | None:
    """The largest number that a key of this name may have; None where it may have any."""
    for pattern, most in ((LAYERS, MAX_LAYERS), (EXPERTS, MAX_EXPERTS), (SIZES, MOST_SIZE)):
        if pattern.fullmatch(key):
            return most
    return None


def _numbers(config: dict[str, Any], where: str) -> Iterator[tuple[str, int | float]]:
    """Every number below an object, with the key that it stands under."""
    waiting: list[tuple[str, Any, int]] = [("", {k: v for k, v in config.items() if k != "tiny_qmoe"}, 0)]
    seen = 0
    while waiting:
        key, value, depth = waiting.pop()
        if type(value) in (int, float):
            yield key, value
        if type(value) not in (dict, list):
            continue
        seen += len(value)
        if depth >= MOST_DEPTH or seen > MOST_VALUES:
            rule = f"at most {MOST_VALUES} values, and {MOST_DEPTH} objects within one another"
            raise FormatError(f"[{where}] should have {rule}, it has more.")
        parts = value.items() if isinstance(value, dict) else ((key, part) for part in value)
        waiting += [(name, part, depth + 1) for name, part in parts]
