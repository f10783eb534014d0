"""Tensors of a few experts, read now: what lets a checkpoint larger than memory be converted.

mlx-lm renames, splits, stacks and dequantizes the tensors of every family in its `sanitize`, on lazy arrays. A slice of
such a lazy stack would read the whole layer, and an array that was read keeps its bytes for as long as anything refers
to it. So every reading opens the files anew, runs `sanitize` over them with all but the wanted experts left out, and
keeps nothing but its result:

- a tensor per expert: the stack that `sanitize` makes of a layer is made of the wanted experts' tensors only;
- one tensor for all experts of a layer: its rows of the wanted experts are read from the file in its place;
- a family that builds its experts in some other way: the whole matrix is read, and the wanted experts are cut from it.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tiny_qmoe_mlx.disk_errors import is_disk
from tiny_qmoe_mlx.disk_reads import Tensor, read_array, read_header

# names of routed experts' tensors, in checkpoints and in mlx-lm; the second kind belongs to one expert only
ROUTED = re.compile(r"\.(experts|switch_mlp|switch_glu)\.")
ONE_EXPERT = re.compile(r"\.experts\.(expert_)?\d+\.")
NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U16": "<u2", "U8": "u1", "F8_E4M3": "u1"}
NUMPY["F8_E8M0"] = "u1"  # MLX too takes the 8-bit floats as bytes


def computed(array: mx.array) -> np.ndarray:
    """An array's values in numpy, in C order (a sum over another order differs in its last bit).

    Computed first: where a file behind a lazy array cannot be read, `mx.eval` says so, but numpy asks again in other
    ways, and now and then takes what the memory holds (MLX 0.32).

    Raises:
        RuntimeError: a file could not be read.
    """
    mx.eval(array)
    return np.array(array, order="C")


@dataclass(frozen=True)
class Source:
    """A checkpoint's files.

    build: makes a model of the checkpoint's family and config, for its `sanitize`; weights are not loaded into it.
    """

    directory: Path
    build: Callable[[], nn.Module]

    @cached_property
    def _sanitize(self) -> Callable[[dict[str, mx.array]], dict[str, mx.array]]:
        model = self.build()
        return model.sanitize if hasattr(model, "sanitize") else lambda weights: weights

    @cached_property
    def _files(self) -> list[Path]:
        return sorted(self.directory.glob("model*.safetensors"))

    def arrays(self, path: str, layer: int, experts: range, count: int) -> dict[str, mx.array]:
        """Lazy arrays (len(experts), ...) of an expert layer, that refer to no other expert's bytes.

        Args:
            path: of the expert layer's module.
            layer: index of its decoder layer.
            experts: which.
            count: how many experts the layer has.

        Returns:
            Name below the path ("gate_proj.weight", "down_proj.scales", ...) -> array. Pop each, so that it is freed.
        """
        try:
            with _stacking(experts, count):
                found = self._sanitize(self._tensors(layer, experts, count))
        except Exception as error:  # a sanitize that needs all experts; it ran without error when the model was loaded
            if is_disk(error):
                raise
            found = self._sanitize(self._tensors(layer, range(count), count))
        prefix = f"{path}."
        own = {name.removeprefix(prefix): array for name, array in found.items() if name.startswith(prefix)}
        return {name: a if len(a) == len(experts) else a[experts.start : experts.stop] for name, a in own.items()}

    def _tensors(self, layer: int, experts: range, count: int) -> dict[str, mx.array]:
        """Every tensor of the checkpoint, lazily, those that hold all experts of the layer cut to the wanted ones."""
        tensors: dict[str, mx.array] = {}
        for file in self._files:
            tensors.update(cast(dict[str, mx.array], mx.load(str(file))))
        if len(experts) == count:
            return tensors
        stacked = [n for n, a in tensors.items() if f".{layer}." in n and _holds_experts(n, a, count)]
        for file in self._files:
            own = read_header(file)[0] if stacked else {}
            for name in set(own).intersection(stacked):
                tensors[name] = _read_rows(file, own[name], experts, tensors[name])
        return tensors


def _holds_experts(name: str, array: mx.array, count: int) -> bool:
    """Whether a tensor of a decoder layer holds all its routed experts, one after the other."""
    routed = bool(ROUTED.search(name)) and not ONE_EXPERT.search(name)
    return array.ndim > 0 and len(array) == count and (routed or array.ndim > 2)


def _read_rows(file: Path, tensor: Tensor, experts: range, like: mx.array) -> mx.array:
    """Rows of a tensor along its first dimension, read now; the lazy whole where the type is none of those known."""
    kind = NUMPY.get(tensor.dtype)
    if kind is None:
        return like
    shape = (len(experts), *tensor.shape[1:])
    each = int(np.prod(shape[1:]))
    start = tensor.offset + experts.start * each * np.dtype(kind).itemsize
    values = read_array(file, kind, len(experts) * each, start)
    array = mx.array(values.reshape(shape))
    return array.view(mx.bfloat16) if tensor.dtype == "BF16" else array


@contextmanager
def _stacking(experts: range, count: int) -> Iterator[None]:
    """While a `sanitize` runs: of every list of `count` arrays that it stacks, only the wanted are."""
    original = mx.stack

    def stack(arrays: list[mx.array], *args: Any, **options: Any) -> mx.array:
        chosen = list(arrays)
        return original(chosen[experts.start : experts.stop] if len(chosen) == count else chosen, *args, **options)

    mx.stack = stack
    try:
        yield
    finally:
        mx.stack = original
