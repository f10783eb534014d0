"""CUDA text to PTX by NVRTC or nvcc, and to a program for the CPU by g++; none of them needs a GPU."""

import atexit
import ctypes
import hashlib
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
from cuda_text import DEVICE_HEADER, CudaLaunch

HERE = Path(__file__).resolve().parent
STAND_IN = "#pragma once\n#include <cuda/std/cstdint>\n#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n"
ARCHITECTURE = 90
TOOLKIT = Path("/usr/local/cuda")
ENTRY = """
static void** buffers;
static void one_thread() {{
  mlx::core::cu::{name}({arguments});
  host::fibers[host::current].done = true;
}}
extern "C" int run(void** given, const unsigned* grid, const unsigned* size) {{
  buffers = given;
  return host::launch(dim3(grid[0], grid[1], grid[2]), dim3(size[0], size[1], size[2]), one_thread);
}}
"""


@cache
def nvcc() -> str | None:
    """Path of nvcc."""
    return shutil.which("nvcc") or shutil.which(TOOLKIT / "bin" / "nvcc")


@cache
def headers() -> Path | None:
    """The folder of cuda_fp16.h: of the packages nvidia-cuda-runtime and -cccl, or of a toolkit."""
    folders = [f for p in sys.path for f in sorted(Path(p).glob("nvidia/*/include"))] + [TOOLKIT / "include"]
    return next((f for f in folders if (f / "cuda_fp16.h").is_file()), None)


@cache
def nvrtc() -> ctypes.CDLL | None:
    """The library NVRTC, of the package nvidia-cuda-nvrtc or of a toolkit."""
    folders = [f for p in sys.path for f in sorted(Path(p).glob("nvidia/*/lib"))] + [TOOLKIT / "lib64"]
    for folder in folders:
        libraries = sorted(folder.glob("libnvrtc-builtins.so.[0-9]*")) + sorted(folder.glob("libnvrtc.so.[0-9]*"))
        if len(libraries) >= 2:
            return [ctypes.CDLL(str(f)) for f in libraries][-1]  # which then finds the builtins loaded
    return None


def no_compiler() -> str:
    """Why CUDA text cannot be compiled here; empty if it can."""
    found = nvcc() or (nvrtc() and headers())
    return "" if found else "needs nvcc, or the packages nvidia-cuda-nvrtc, nvidia-cuda-runtime and nvidia-cuda-cccl"


def no_host() -> str:
    """Why CUDA text cannot be run on the CPU here; empty if it can."""
    if sys.platform == "linux" and shutil.which("g++") and headers():
        return ""
    return "needs Linux, g++ and the headers of the CUDA toolkit"


@cache
def scratch() -> Path:
    """A folder with stand-ins for headers, kept while Python runs."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-qmoe-cuda-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / DEVICE_HEADER).parent.mkdir(parents=True)
    (folder / DEVICE_HEADER).write_text(STAND_IN)
    return folder


def checked(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SyntaxError(result.stderr)


def ptx(launch: CudaLaunch) -> str:
    """PTX of a launch's kernel, by NVRTC with MLX's options where it is found, else by nvcc.

    Raises:
        SyntaxError: with the compiler's messages, if it rejects the text.
    """
    return ptx_by_nvrtc(launch) if nvrtc() and headers() else ptx_by_nvcc(launch)


def ptx_by_nvcc(launch: CudaLaunch) -> str:
    source, made = scratch() / f"{launch.name}.cu", scratch() / f"{launch.name}.ptx"
    source.write_text(launch.source)
    flags = ["-ptx", "-std=c++17", f"-arch=sm_{ARCHITECTURE}", f"-I{scratch()}"]
    checked([str(nvcc()), *flags, str(source), "-o", str(made)])
    return made.read_text()


def ptx_by_nvrtc(launch: CudaLaunch) -> str:
    library, folder = nvrtc(), headers()
    assert library and folder
    program, size, strings = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_char_p * 1
    options = ["--device-as-default-execution-space", f"--gpu-architecture=compute_{ARCHITECTURE}"]
    options += [f"--include-path={f}" for f in (folder, folder / "cccl")]
    included = strings(STAND_IN.encode()), strings(DEVICE_HEADER.encode())
    library.nvrtcCreateProgram(ctypes.byref(program), launch.source.encode(), b"kernel.cu", 1, *included)
    encoded = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    failed = library.nvrtcCompileProgram(program, len(options), encoded)
    what = "ProgramLog" if failed else "PTX"
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    out = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, out)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise SyntaxError(out.value.decode())
    return out.value.decode()


@cache
def host_program(name: str, parameters: tuple[str, ...], text: str) -> ctypes.CDLL:
    """A launch's kernel for the CPU."""
    folder = scratch() / "host"
    stand_ins = {DEVICE_HEADER: '#include "cuda_host.h"\n', "cooperative_groups.h": "namespace cooperative_groups {}\n"}
    for header, contents in stand_ins.items():
        (folder / header).parent.mkdir(parents=True, exist_ok=True)
        (folder / header).write_text(contents)
    arguments = [f"({p.rpartition('*')[0]}*)buffers[{i}]" for i, p in enumerate(parameters)]
    file = hashlib.sha256(text.encode()).hexdigest()[:16]
    source, library = folder / f"{file}.cpp", folder / f"{file}.so"
    source.write_text(text + ENTRY.format(name=name, arguments=", ".join(arguments)))
    flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{folder}", f"-I{HERE}", f"-isystem{headers()}"]
    checked(["g++", *flags, str(source), "-o", str(library)])
    return ctypes.CDLL(str(library))


def run_on_host(launch: CudaLaunch, inputs: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
    """Results of a launch, computed on the CPU; what a kernel does not write is left zero.

    Raises:
        RuntimeError: if threads wait at a barrier or in a simd operation that others do not reach.
    """
    mx.eval(inputs, outputs)
    arrays = [np.ascontiguousarray(np.asarray(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)) for x in inputs]
    made = [np.array(y.view(mx.uint16) if y.dtype == mx.bfloat16 else y) for y in outputs]
    pointers = (ctypes.c_void_p * (len(arrays) + len(made)))(*[a.ctypes.data for a in (*arrays, *made)])
    blocks = [-(-threads // size) for threads, size in zip(launch.grid, launch.threadgroup, strict=True)]
    sizes = [(ctypes.c_uint * 3)(*blocks), (ctypes.c_uint * 3)(*launch.threadgroup)]
    if not host_program(launch.name, launch.parameters, launch.source).run(pointers, *sizes):
        raise RuntimeError(f"[cuda_host] {launch.name}: threads wait for others that never come")
    return [
        mx.array(a).view(mx.bfloat16) if y.dtype == mx.bfloat16 else mx.array(a)
        for a, y in zip(made, outputs, strict=True)
    ]
