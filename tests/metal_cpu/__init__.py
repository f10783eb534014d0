"""Metal kernels of ``mx.fast.metal_kernel`` on an x86-64 Linux CPU, without a Mac and without a GPU.

MLX generates the text of a kernel when it traces the call; ``capture`` takes that text, clang 19 compiles it as C++
against the headers in ``include/``, and the runtime in ``runtime/`` runs one fiber per GPU thread: 32-lane simdgroups,
threadgroup memory, barriers, partial groups. Four modes:

    as        address spaces and language subset; nothing runs
    run       the result
    check     every load and store goes through the checker: bounds, races, uninitialised memory, divergence, undefined
              behaviour
    profile   bytes per buffer, issue slots by a model of Apple's GPU, lane efficiency; counts, not times

What a kernel's test writes:

    import metal_cpu
    pytestmark = metal_cpu.required                       # skips with the reason where the emulator cannot run

    def launch(w, x):                                     # traced by MLX, never evaluated
        return kernel(inputs=[w, x], grid=..., threadgroup=..., output_shapes=[...], output_dtypes=[...])[0]

    y, report = metal_cpu.emulate(launch, w, x, mode="check")
    assert not report.problems, report

Whole functions with ordinary operations around their kernels, or whole models:

    with metal_cpu.emulated_kernels(mode="run") as report:     # metal_kernel objects made inside are emulated
        y = function_that_builds_and_calls_metal_kernels(x)

Counts here are a model and accepting a text does not prove that Apple's compiler does.
"""

from metal_cpu.capture import Launch, capture
from metal_cpu.emulate import emulate, emulated_kernels
from metal_cpu.kernel import Kernel
from metal_cpu.report import BufferTraffic, Profile, Report
from metal_cpu.toolchain import required, unavailable

__all__ = [
    "BufferTraffic",
    "Kernel",
    "Launch",
    "Profile",
    "Report",
    "capture",
    "emulate",
    "emulated_kernels",
    "required",
    "unavailable",
]
