"""The CUDA text of the package's kernels as MLX's CUDA build would compile it, and its compilation without a GPU.

`recorded()` stands in for `mx.fast.cuda_kernel`: inside it metal.py's functions build and call the kernels as on a machine
with an NVIDIA GPU, but a call notes its text and returns zeros. The text follows the rules by which MLX's cuda_kernel
generates a kernel; MLX's own device headers are not in its CPU wheel, and a stand-in takes their place.
"""

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import mlx.core as mx

from tiny_qmoe_mlx import cuda, metal

TYPES = {
    mx.uint8: "uint8_t",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}
DEVICE_HEADER = "mlx/backend/cuda/device/utils.cuh"
STAND_IN = "#pragma once\n#include <cuda/std/cstdint>\n#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n"
ARCHITECTURE = "sm_90"
MAX_GRID_YZ = 65535


@dataclass(frozen=True)
class CudaLaunch:
    """One launch: the kernel's name, complete text, and sizes in threads."""

    name: str
    source: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]


def cuda_type(value) -> str:
    """How a template argument of `mx.fast.cuda_kernel` is declared in the kernel, up to its name."""
    return "using {} = " + TYPES[value] + ";" if isinstance(value, mx.Dtype) else "constexpr int {} = " + f"{value};"


def kernel_text(name, header, source, inputs, outputs, template) -> str:
    """The text of a kernel.

    Args:
        inputs, outputs: (name, dtype) of each.
        template: (name, value) of each.
    """
    parameters = [f"    const {TYPES[dtype]}* {n}" for n, dtype in inputs] + [f"    {TYPES[d]}* {n}" for n, d in outputs]
    constants = [f"  {cuda_type(value).format(n)}\n" for n, value in template]
    return "".join(
        [
            f'#include "{DEVICE_HEADER}"\n#include <cooperative_groups.h>\n{header}',
            "namespace mlx::core::cu {\nnamespace cg = cooperative_groups;\n",
            f"__global__ void {name}(\n" + ",\n".join(parameters) + ") {\n",
            *constants,
            f"{source}\n}}\n}}\n",
        ]
    )


@contextmanager
def recorded() -> Iterator[list[CudaLaunch]]:
    """Launches made inside, in order."""
    found: list[CudaLaunch] = []

    def cuda_kernel(name, input_names, output_names, source, header="", ensure_row_contiguous=True, shared_memory=0):
        def call(inputs, output_shapes, output_dtypes, grid, threadgroup, template=()):
            assert len(inputs) == len(input_names), name
            full = "custom_kernel_" + re.sub(r"\W", "_", "_".join([name, *(str(value) for _, value in template)]))
            taken = [(n, x.dtype) for n, x in zip(input_names, inputs, strict=True)]
            made = list(zip(output_names, output_dtypes, strict=True))
            found.append(CudaLaunch(full, kernel_text(full, header, source, taken, made, template), grid, threadgroup))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        return call

    builders = [metal._rotate_kernel, metal._qmv_kernel, metal._gate_up_kernel, metal._dequantize_kernel]
    for builder in builders:
        builder.cache_clear()
    with mock.patch.object(mx.fast, "cuda_kernel", cuda_kernel), mock.patch.object(cuda, "available", lambda: True):
        yield found
    for builder in builders:
        builder.cache_clear()


def include_folders(headers: Path) -> list[Path]:
    """Where cuda_fp16.h and cuda/std lie: a toolkit, or the packages nvidia-cuda-runtime and nvidia-cuda-cccl."""
    return [folder for folder in (headers, headers / "cccl") if folder.is_dir()]


@cache
def nvcc() -> str | None:
    """Path of nvcc."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@cache
def nvrtc() -> tuple[ctypes.CDLL, tuple[Path, ...]] | None:
    """NVRTC and the folders of its headers, from the packages nvidia-cuda-nvrtc, -runtime and -cccl or a toolkit."""
    roots = [Path(p) / "nvidia" for p in sys.path]
    libraries = [f for root in roots for f in sorted(root.glob("*/lib/libnvrtc.so.*"))]
    libraries += sorted(Path("/usr/local/cuda/lib64").glob("libnvrtc.so.*"))
    candidates = [h for root in roots for h in sorted(root.glob("*/include"))] + [Path("/usr/local/cuda/include")]
    headers = [h for h in candidates if (h / "cuda_fp16.h").is_file()]
    if not libraries or not headers:
        return None
    return ctypes.CDLL(str(libraries[0])), (headers[0], headers[0] / "cccl")


def unavailable() -> str:
    """Why CUDA text cannot be compiled here; empty if it can."""
    return "" if nvcc() or nvrtc() else "needs nvcc or NVRTC (the packages nvidia-cuda-nvrtc, -runtime and -cccl)"


def compile_text(launch: CudaLaunch, folder: Path) -> str:
    """PTX of a launch's kernel, by NVRTC with MLX's options where it is found, else by nvcc.

    Raises:
        SyntaxError: with the compiler's messages, if it rejects the text.
    """
    return by_nvrtc(launch) if nvrtc() else by_nvcc(launch, folder)


def by_nvcc(launch: CudaLaunch, folder: Path) -> str:
    header = folder / DEVICE_HEADER
    header.parent.mkdir(parents=True, exist_ok=True)
    header.write_text(STAND_IN)
    source, ptx = folder / f"{launch.name}.cu", folder / f"{launch.name}.ptx"
    source.write_text(launch.source)
    flags = ["-ptx", "-std=c++17", f"-arch={ARCHITECTURE}", "-Werror", "all-warnings", f"-I{folder}"]
    result = subprocess.run([str(nvcc()), *flags, str(source), "-o", str(ptx)], capture_output=True, text=True)
    if result.returncode:
        raise SyntaxError(result.stderr)
    return ptx.read_text()


def by_nvrtc(launch: CudaLaunch) -> str:
    found = nvrtc()
    assert found
    library, folders = found
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = launch.source.encode()
    strings = ctypes.c_char_p * 1
    options = [b"--device-as-default-execution-space", f"--gpu-architecture=compute_{ARCHITECTURE[3:]}".encode()]
    options += [f"--include-path={folder}".encode() for folder in folders]
    headers = strings(STAND_IN.encode()), strings(DEVICE_HEADER.encode())
    library.nvrtcCreateProgram(ctypes.byref(program), text, launch.name.encode() + b".cu", 1, *headers)
    failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    what = "ProgramLog" if failed else "PTX"
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    out = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, out)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise SyntaxError(out.value.decode())
    return out.value.decode()
