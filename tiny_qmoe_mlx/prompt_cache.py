"""A KV cache that `mlx_lm.cache_prompt` saved, as --prompt-cache-file names it, checked before it is used.

mlx-lm takes a file's word for how many tokens are in its arrays. A stranger's may hold other arrays than it says, or so
many that no budget has room for them.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import CacheList, QuantizedKVCache, RotatingKVCache, load_prompt_cache

from tiny_qmoe_mlx import paths, safetensors_header
from tiny_qmoe_mlx.budget import parse_memory, show
from tiny_qmoe_mlx.errors import shown


def open_prompt_cache(directory: Path, args: argparse.Namespace) -> list[Any] | None:
    """The cache of --prompt-cache-file, in memory, as long as its tokens.

    Raises:
        ValueError: it is none that mlx_lm.cache_prompt wrote with this model and these options.
    """
    file = args.prompt_cache_file
    if file is None:
        return None
    if not Path(file).is_file():
        raise ValueError(f"[options] --prompt-cache-file should be a file, there is none at {file}.")
    size, room = Path(file).stat().st_size, parse_memory(args.memory)
    if size > room:
        raise ValueError(f"[options] --prompt-cache-file {file} has {show(size)}, --memory is {show(room)}; raise it.")
    try:
        safetensors_header.check(Path(file))  # which no other kind of file passes, that MLX would read by its name
        cache, metadata = load_prompt_cache(file, return_metadata=True)
        for entry in entries(cache):
            settle(entry)
        model = str(metadata["model"])
        own = model == args.model or paths.real(model) == paths.real(directory)
    except Exception as error:  # any file may be given
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise ValueError(
            f"[options] --prompt-cache-file should be what mlx_lm.cache_prompt wrote, {file} is not: {reason}"
        ) from error
    if not own:
        raise ValueError(
            f"[options] --prompt-cache-file {file} was made with {shown(model, 200)}, not with {args.model}; give that "
            "model, or make a cache with this one."
        )
    first = cache[0]
    if isinstance(first, QuantizedKVCache):
        given = (args.kv_bits or first.bits, args.kv_group_size if args.kv_bits else first.group_size)
        if given != (first.bits, first.group_size):
            raise ValueError(
                f"[options] --kv-bits and --kv-group-size should be {first.bits} and {first.group_size} as in {file}, "
                f"received {given[0]} and {given[1]}."
            )
    return cache


def entries(cache: Iterable[Any]) -> Iterator[Any]:
    """Each layer's, those of a layer with several one by one."""
    for entry in cache:
        yield from entries(entry.caches) if isinstance(entry, CacheList) else (entry,)


def settle(entry: Any) -> None:
    """Cut a layer's cache to the tokens that it says, and compute it.

    Raises:
        ValueError: its arrays are not floating point, or not finite, or do not hold as many.
    """
    if getattr(entry, "keys", None) is not None:
        held = _tokens(entry)
        entry.keys, entry.values = tree_map(
            lambda array: mx.contiguous(array[..., :held, :]), (entry.keys, entry.values)
        )
    quantized = isinstance(entry, QuantizedKVCache)
    for array in _arrays(entry.state):
        if mx.issubdtype(array.dtype, mx.floating):
            fine = mx.isfinite(array).all().item()
        else:
            fine = quantized and array.dtype == mx.uint32
        if not fine:
            raise ValueError(f"its arrays should be finite numbers of floating point, one is not ({array.dtype})")


def _tokens(entry: Any) -> int:
    """How many tokens the arrays of keys and values are to have.

    Raises:
        ValueError: they have fewer than the entry says, or it says no whole number.
    """
    lengths = {array.shape[-2] for array in _arrays((entry.keys, entry.values))}
    length, offset = min(lengths), getattr(entry, "offset", min(lengths))
    if type(offset) is not int or offset < 0 or len(lengths) > 1:
        raise ValueError(f"it should say how many tokens it holds, in arrays of one length; it says {offset}")
    if not isinstance(entry, RotatingKVCache):
        start = getattr(entry, "start_position", 0)
        held = offset - start if type(start) is int else -1
        if not 0 <= held <= length:
            raise ValueError(f"its arrays should hold the {held} tokens that it says, they hold {length}")
        return held
    numbers = entry.keep, entry.max_size, entry._idx
    if not all(type(n) is int for n in numbers) or not 0 <= entry.keep <= entry.max_size:
        raise ValueError(f"its window should be given in whole numbers, it says {numbers}")
    if not (entry._idx <= length and min(offset, entry.max_size) <= length and entry._idx >= 0):
        raise ValueError(f"its arrays should hold a window of {entry.max_size} of {offset} tokens, they hold {length}")
    return length


def _arrays(state: Any) -> list[mx.array]:
    return [value for _, value in tree_flatten(state) if isinstance(value, mx.array)]  # type: ignore[str-unpack]


def cached_tokens(cache: list[Any] | None) -> int:
    """Tokens that a saved cache holds."""
    return max((int(getattr(entry, "offset", 0)) for entry in cache or []), default=0)
