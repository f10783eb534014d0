"""The Metal text that MLX generates for each kernel of a function, taken from the trace; nothing is evaluated."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

SIGNATURE = r"\b(?:\[\[\s*kernel\s*\]\]|kernel)?\s*void\s+%s\s*\("


@dataclass(frozen=True)
class ArrayType:
    """Shape and dtype of an array in the trace; ``name`` is the trace's own."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype


@dataclass(frozen=True)
class Launch:
    """One launch of a Metal kernel as MLX would make it.

    Args:
        name: The kernel's function in ``source``.
        source: The complete Metal text (after MLX's own preamble), as Apple's compiler would get it.
        grid: Threads in x, y, z.
        threadgroup: Threads of a threadgroup in x, y, z.
        inputs: In the order of ``inputs=``.
        outputs: In the order of ``output_shapes=``.
    """

    name: str
    source: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    inputs: tuple[ArrayType, ...]
    outputs: tuple[ArrayType, ...]


@dataclass
class Trace:
    """A traced function: names of arguments and results, arrays made outside it, its launches and other operations."""

    arguments: list[str]
    results: list[str]
    constants: dict[str, mx.array]
    launches: list[Launch]
    operations: dict[str, str]  # output name -> operation


def example(array: Any) -> mx.array:
    """An array with the shape and dtype of ``array``; zeros, never evaluated, so that it takes no memory."""
    if isinstance(array, np.ndarray):
        return mx.zeros(array.shape, getattr(mx, array.dtype.name.replace("bool", "bool_")))
    return array


def trace(fn: Callable[..., Any], *arrays: Any) -> Trace:
    """Trace ``fn`` on arrays like the given ones."""
    found = Trace([], [], {}, [], {})

    def visit(event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "inputs":
            found.arguments = [name for name, *_ in event["inputs"]]
        elif kind == "outputs":
            found.results = [name for name, *_ in event["outputs"]]
        elif kind == "constants":
            found.constants = dict(event["constants"])
        elif kind == "primitive" and event["name"] == "CustomKernel":
            found.launches.append(launch_of(event))
        elif kind == "primitive":
            found.operations.update((name, event["name"]) for name, *_ in event["outputs"])

    mx.export_function(visit, fn, *map(example, arrays))
    return found


def launch_of(event: dict[str, Any]) -> Launch:
    """The launch in a CustomKernel event: name, source, grid (3), threadgroup (3), and what is not needed here."""
    name, source, *sizes = event["arguments"][:8]
    if not re.search(SIGNATURE % re.escape(name), source):
        raise ValueError(f"[capture] the source of {name} should define it, but MLX's trace gave:\n{source}")
    inputs, outputs = (tuple(ArrayType(*a) for a in event[key]) for key in ("inputs", "outputs"))
    return Launch(name, source, tuple(sizes[:3]), tuple(sizes[3:]), inputs, outputs)


def capture(fn: Callable[..., Any], *arrays: Any) -> list[Launch]:
    """The launches of all Metal kernels in ``fn``, in the order of the trace.

    Args:
        fn: A function of mx.arrays that calls objects made by ``mx.fast.metal_kernel``.
        arrays: Examples of its arguments (mx.array or np.ndarray); only shapes and dtypes count.
    """
    return trace(fn, *arrays).launches
