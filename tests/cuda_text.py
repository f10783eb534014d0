"""The CUDA text of the package's kernels, as MLX's CUDA build would compile it; no GPU is needed.

`recorded()` stands in for `mx.fast.cuda_kernel`: inside it metal.py's functions build and call the kernels as on a
machine with an NVIDIA GPU. The text follows the rules by which MLX's cuda_kernel generates a kernel; MLX's own device
headers are not in its CPU wheel, and a stand-in takes their place.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import mlx.core as mx

from tiny_qmoe_mlx import cuda, metal, metal_encode, metal_qmoe, metal_rans

TYPES = {
    mx.uint8: "uint8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}
DEVICE_HEADER = "mlx/backend/cuda/device/utils.cuh"


@dataclass(frozen=True)
class CudaLaunch:
    """One launch: the kernel's name, parameters and complete text; threads of the grid and of a block."""

    name: str
    parameters: tuple[str, ...]
    source: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]


def constant(name: str, value: mx.Dtype | int) -> str:
    """A template argument of `mx.fast.cuda_kernel` in the kernel's body."""
    if isinstance(value, mx.Dtype):
        return f"  using {name} = {TYPES[value]};\n"
    return f"  constexpr int {name} = {value};\n"


def launch_of(name, header, source, inputs, outputs, template, grid, threadgroup) -> CudaLaunch:
    """The launch of a call; inputs, outputs: (name, dtype) of each; template: (name, value) of each."""
    full = "custom_kernel_" + re.sub(r"\W", "_", "_".join([name, *(str(value) for _, value in template)]))
    parameters = [f"const {TYPES[dtype]}* {n}" for n, dtype in inputs] + [f"{TYPES[d]}* {n}" for n, d in outputs]
    text = [
        f'#include "{DEVICE_HEADER}"\n#include <cooperative_groups.h>\n{header}',
        "namespace mlx::core::cu {\nnamespace cg = cooperative_groups;\n",
        f"__global__ void {full}(\n    " + ",\n    ".join(parameters) + ") {\n",
        *[constant(n, value) for n, value in template],
        f"{source}\n}}\n}} // namespace mlx::core::cu\n",
    ]
    return CudaLaunch(full, tuple(parameters), "".join(text), grid, threadgroup)


Runner = Callable[[CudaLaunch, list[mx.array], list[mx.array]], list[mx.array]]


@contextmanager
def recorded(run: Runner = lambda launch, inputs, outputs: outputs) -> Iterator[list[CudaLaunch]]:
    """Launches made inside, in order; `run` makes their results, from inputs and outputs that are all zeros."""
    found: list[CudaLaunch] = []

    def cuda_kernel(name, input_names, output_names, source, header="", ensure_row_contiguous=True, shared_memory=0):
        def call(inputs, output_shapes, output_dtypes, grid, threadgroup, template=()):
            taken = [(n, x.dtype) for n, x in zip(input_names, inputs, strict=True)]
            made = list(zip(output_names, output_dtypes, strict=True))
            found.append(launch_of(name, header, source, taken, made, template, grid, threadgroup))
            outputs = [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
            return run(found[-1], inputs, outputs)

        return call

    modules = (metal, metal_encode, metal_qmoe, metal_rans)
    builders = [f for module in modules for n, f in vars(module).items() if n.endswith("_kernel")]
    for build in builders:
        build.cache_clear()
    try:
        with (
            mock.patch.object(mx.fast, "cuda_kernel", cuda_kernel),
            mock.patch.object(cuda, "available", lambda: True),
        ):
            yield found
    finally:
        for build in builders:
            build.cache_clear()
