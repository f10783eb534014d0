"""Run a function's Metal kernels in the emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from metal_cpu.report import Report


def emulate(
    fn: Callable[..., Any],
    *arrays: Any,
    mode: str = "run",
    seed: int | None = None,
    strict: bool = True,
    limit_s: float = 60.0,
    init_value: float | None = None,
) -> tuple[Any, Report]:
    """Trace ``fn``, run its Metal kernels on the arrays and return what ``fn`` would.

    The kernels' inputs must be arguments of ``fn``, arrays made outside it, or outputs of its other kernels; for ordinary operations
    in between use ``emulated_kernels``. ``fn`` may return any of the kernels' outputs, as an array, list or tuple.

    Args:
        fn: Takes ``arrays`` as mx.arrays, returns mx.arrays; it is traced, never evaluated.
        arrays: mx.array or np.ndarray (bfloat16 as mx.array). A contiguous np.ndarray or np.memmap of 64 MiB or more is read in
            place, so a sparse one may be larger than memory.
        mode: ``as`` (outputs are None), ``run``, ``check`` or ``profile``.
        seed: Lanes and simdgroups run in a random order that it fixes. Default: in order.
        strict: Report simd operations that not all lanes of the simdgroup reach. Default: ``True``.
        limit_s: Seconds after which the launch is stopped and TIMEOUT reported.
        init_value: What outputs are filled with before the launch, as in the kernel's own call (tracing does not show it).
            Default: poison bytes 0xCD, and unwritten bytes are reported.

    Returns:
        The outputs as mx.arrays in the form of ``fn``'s result, and the Report.

    Raises:
        ValueError: If ``fn`` launches no Metal kernel, or computes a kernel's input.
        SyntaxError: If clang rejects the text (modes run, check, profile; mode ``as`` reports it as a problem instead).
    """
    raise NotImplementedError


@contextmanager
def emulated_kernels(mode: str = "run", seed: int | None = None, strict: bool = True, limit_s: float = 60.0) -> Iterator[Report]:
    """Let every ``mx.fast.metal_kernel`` made inside the block run in the emulator, on evaluated arrays.

    Kernels made before (and kept, as by functools.cache) are not touched: clear such caches first, and afterwards.
    Yields the Report that all launches add to.
    """
    yield Report(mode)
