"""Run a function's Metal kernels in the emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from metal_cpu.capture import Launch, Trace, capture, trace
from metal_cpu.kernel import Kernel, Options
from metal_cpu.report import Report


def emulate(
    fn: Callable[..., Any],
    *arrays: Any,
    mode: str = "run",
    seed: int | None = None,
    strict: bool = True,
    limit_s: float = 60.0,
    init_value: float | None = None,
    groups: tuple[int, int] | None = None,
    skew: bool = False,
) -> tuple[Any, Report]:
    """Trace ``fn``, run its Metal kernels on the arrays and return what ``fn`` would.

    The kernels' inputs must be arguments of ``fn``, arrays made outside it, or outputs of its other kernels; for
    ordinary operations in between use ``emulated_kernels``. ``fn`` may return any of the kernels' outputs.

    Args:
        fn: Takes ``arrays`` as mx.arrays, returns mx.arrays; it is traced, never evaluated.
        arrays: mx.array or np.ndarray (bfloat16 as mx.array). A contiguous np.ndarray or np.memmap of 64 MiB or more is
            read in place, so a sparse one may be larger than memory.
        mode: ``as`` (the outputs are None), ``run``, ``check`` or ``profile``.
        seed: Lanes and simdgroups run in a random order that it fixes. Default: in order.
        strict: Report simd operations that not all lanes of the simdgroup reach. Default: ``True``.
        limit_s: Seconds of CPU time after which a launch is stopped and TIMEOUT reported.
        init_value: What outputs are filled with before the launch, as in the kernel's own call (tracing does not show
            it). Default: poison bytes 0xCD, and unwritten bytes are reported.
        groups: First threadgroup and number of threadgroups to run, of each launch. Default: all; unwritten bytes are
            only reported then.
        skew: Inputs start one element after an aligned address, as a slice does on a GPU: loads wider than an element
            are then MISALIGNED. Default: ``False``, 256-byte alignment.

    Returns:
        The outputs as mx.arrays in the form of ``fn``'s result (one array, or a list), and the Report.

    Raises:
        ValueError: If ``fn`` launches no Metal kernel or computes a kernel's input or its result itself.
        SyntaxError: If clang rejects the text (modes run, check, profile; mode ``as`` reports it as a problem instead).
        LanguageError: If the text uses what Metal has not (likewise).
    """
    traced = trace(fn, *arrays)
    if not traced.launches:
        raise ValueError("[emulate] fn should launch a Metal kernel, but its trace has none")
    report = Report(mode)
    values: dict[str, Any] = {**traced.constants, **dict(zip(traced.arguments, arrays, strict=True))}
    options = Options(seed, strict, limit_s, groups, skew)
    for launch in traced.launches:
        inputs = [] if mode == "as" else [value_of(values, traced, a.name) for a in launch.inputs]
        made = run_launch(launch, inputs, mode, options, init_value, report)
        values.update(zip([a.name for a in launch.outputs], made, strict=True))
    results = [value_of(values, traced, name) for name in traced.results]
    return results[0] if len(results) == 1 else results, report


def value_of(values: dict[str, Any], traced: Trace, name: str) -> Any:
    """The array of that name in the trace."""
    if name not in values:
        operation = traced.operations.get(name, "an operation")
        raise ValueError(
            f"[emulate] kernels should be fed by arguments and kernels only, but {operation} is in between"
        )
    return values[name]


@lru_cache(maxsize=256)
def compiled(launch: Launch, mode: str) -> Kernel:
    """A kernel is compiled once for each text, grid and mode of a process."""
    return Kernel(launch, mode)


def run_launch(
    launch: Launch, inputs: list[Any], mode: str, options: Options, init_value: float | None, report: Report
) -> list[mx.array | None]:
    """Run one launch, add to the report, return its outputs (None in mode ``as``)."""
    kernel = compiled(launch, mode)
    if mode == "as":
        report.problems += [line for line in kernel.problems if line not in report.problems]
        report.kinds.update(line.split(" ", 1)[0] for line in kernel.problems)
        return [None] * len(launch.outputs)
    outputs = [np.zeros(a.shape, numpy_type(a.dtype)) for a in launch.outputs]
    if init_value is not None:
        outputs = [bytes_of(mx.full(a.shape, init_value, a.dtype)).copy() for a in launch.outputs]
    buffers, names = bind(kernel, launch, inputs, outputs)
    report.add(kernel(buffers, names, init_value is not None, options))
    return [array_of(array, a.dtype) for array, a in zip(outputs, launch.outputs, strict=True)]


def bind(
    kernel: Kernel, launch: Launch, inputs: list[Any], outputs: list[np.ndarray]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Buffers by name, in the signature's order: each input, with its shape, strides and rank if asked for; outputs."""
    names = [p.name for p in sorted(kernel.parameters, key=lambda p: p.index)]
    count = len(names) - len(outputs)
    buffers: dict[str, np.ndarray] = {}
    rest = names[:count]
    for value in inputs:
        name, array = rest.pop(0), bytes_of(value)
        buffers[name] = array
        shape = np.array(array.shape or (1,), np.int32)
        strides = np.array([s // array.itemsize for s in array.strides] or [1], np.int64)
        extras: dict[str, np.ndarray] = {
            f"{name}_shape": shape,
            f"{name}_strides": strides,
            f"{name}_ndim": np.array([array.ndim], np.int32),
        }
        while rest and rest[0] in extras:
            extra = rest.pop(0)
            buffers[extra] = extras[extra]
    buffers.update(zip(names[count:], outputs, strict=True))
    return buffers, tuple(names[count:])


def numpy_type(dtype: mx.Dtype) -> np.dtype:
    """The dtype that carries an mx dtype's bytes; bfloat16 as uint16."""
    return np.dtype(np.uint16) if dtype == mx.bfloat16 else np.array(mx.zeros((1,), dtype)).dtype


def bytes_of(value: Any) -> np.ndarray:
    """An array's contents as numpy, row-contiguous as MLX makes a kernel's inputs."""
    if isinstance(value, mx.array) and value.dtype == mx.bfloat16:
        return np.array(value.reshape(-1).view(mx.uint16)).reshape(value.shape)
    return np.asarray(value, order="C")


def array_of(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The mx.array with these bytes."""
    return mx.array(array).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(array)


class EmulatedKernel:
    """Stands for one object of ``mx.fast.metal_kernel``; called like it, on arrays that it evaluates."""

    def __init__(self, real: Callable[..., Any], mode: str, options: Options, report: Report) -> None:
        self.real, self.mode, self.options, self.report = real, mode, options, report

    def __call__(self, *, inputs: list[Any], init_value: float | None = None, **launch: Any) -> list[mx.array]:
        """As the real kernel; ``stream`` is ignored."""
        launch.pop("stream", None)
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        mx.eval(arrays)
        (captured,) = capture(lambda *traced: self.real(inputs=list(traced), **launch), *arrays)
        return run_launch(captured, arrays, self.mode, self.options, init_value, self.report)  # type: ignore[return-value]


@contextmanager
def emulated_kernels(
    mode: str = "run", seed: int | None = None, strict: bool = True, limit_s: float = 60.0
) -> Iterator[Report]:
    """Let every ``mx.fast.metal_kernel`` made inside the block run in the emulator, on evaluated arrays.

    Kernels made before (and kept, as by functools.cache) are not touched: clear such caches first, and after. Calls
    inside ``mx.compile`` fail, as arrays cannot be evaluated there. Yields the Report that all launches add to.

    Args:
        mode: ``run``, ``check`` or ``profile``.
        seed: As in ``emulate``; also strict and limit_s.

    Raises:
        ValueError: If the mode is ``as``, which gives no outputs.
    """
    if mode == "as":
        raise ValueError("[emulated_kernels] mode should be run, check or profile, but received 'as'; use emulate")
    real: Any = mx.fast.metal_kernel
    report, options = Report(mode), Options(seed, strict, limit_s)
    mx.fast.metal_kernel = lambda *args, **kwargs: EmulatedKernel(real(*args, **kwargs), mode, options, report)
    try:
        yield report
    finally:
        mx.fast.metal_kernel = real
