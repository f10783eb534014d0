"""clang, its flags, and the folder of compiled kernels (named by content, under the temporary folder)."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

HERE = Path(__file__).resolve().parent
VERSION = 19
PACKAGES = f"clang-{VERSION} lld-{VERSION} llvm-{VERSION}"

# Rounding must be MLX's: each operation on half and bfloat rounds once, nothing is fused.
LANGUAGE = """-x c++ -std=c++17 -march=x86-64-v3 -fno-exceptions -fno-rtti -fno-vectorize -fno-slp-vectorize
    -fstack-clash-protection     -Xclang -ffloat16-excess-precision=none -Xclang -fbfloat16-excess-precision=none
    -Wno-unknown-attributes -Wno-user-defined-literals -Wno-reserved-user-defined-literal -Wno-duplicate-decl-specifier
    -Wno-unused-value -Wno-psabi -Wno-pass-failed -Wno-ignored-attributes""".split()
EVERY_ACCESS = """-fsanitize=thread -mllvm -tsan-instrument-func-entry-exit=0 -mllvm -tsan-instrument-atomics=0
    -mllvm -tsan-instrument-read-before-write=1""".split()
MODES = {
    "as": """-ffp-contract=off -fsyntax-only -DMTL_ADDRESS_SPACES
        -Wimplicit-float-conversion -Wdouble-promotion -Wvla -Wuninitialized -Wsometimes-uninitialized""".split(),
    "run": "-ffp-contract=off -O2 -g1 -ftrivial-auto-var-init=pattern".split(),
    "check": [
        *"-ffp-contract=off -O1 -g1 -ftrivial-auto-var-init=pattern".split(),
        *"-fsanitize=undefined,float-cast-overflow -fno-sanitize=vptr,function".split(),
        *EVERY_ACCESS,
    ],
    "profile": [*"-ffp-contract=fast -O2 -g1 -fsanitize-coverage=bb,no-prune,trace-pc-guard".split(), *EVERY_ACCESS],
}


def tool(name: str) -> str | None:
    """Path of an LLVM tool of the version that is asked for."""
    return shutil.which(f"{name}-{VERSION}")


@cache
def unavailable() -> str:
    """Why the emulator cannot run here; empty if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the Metal emulator needs x86-64 Linux, this is {platform.machine()} {sys.platform}"
    missing = [name for name in ("clang++", "lld", "llvm-symbolizer") if not tool(name)]
    if missing:
        return f"the Metal emulator needs {', '.join(missing)} of LLVM {VERSION}: apt-get install {PACKAGES}"
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    lacking = [flag for flag in ("avx2", "f16c", "fma") if flag not in flags]
    if lacking:
        return f"the Metal emulator needs a CPU with {', '.join(lacking)}"
    if not mlx_traces_kernels():
        return f"the Metal emulator needs an mlx that traces Metal kernels without Metal, this is {version('mlx')}"
    return ""


def mlx_traces_kernels() -> bool:
    """Whether this mlx can make a Metal kernel on Linux and trace a call of it."""
    events: list[str] = []
    try:
        kernel: Any = mx.fast.metal_kernel(name="probe", input_names=["x"], output_names=["y"], source="y[0] = x[0];")
        size = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [(1,)], "output_dtypes": [mx.float32]}
        mx.export_function(
            lambda event: events.append(event.get("name", "")), lambda x: kernel(inputs=[x], **size), mx.zeros(1)
        )
    except (RuntimeError, TypeError):
        return False
    return "CustomKernel" in events


required = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "the Metal emulator can run")


@cache
def cache_folder() -> Path:
    """The folder of compiled kernels: this user's alone, safe to delete."""
    folder = Path(tempfile.gettempdir()) / f"metal_cpu_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"[metal_cpu] {folder} should belong to this user; remove it")
    return folder


@cache
def stamp() -> bytes:
    """What a compiled kernel depends on besides its text and flags."""
    files = sorted([*HERE.glob("include/*"), *HERE.glob("runtime/*")])
    compiler = subprocess.run([str(tool("clang++")), "--version"], capture_output=True, check=True).stdout
    return compiler + b"".join(f.name.encode() + f.read_bytes() for f in files if f.is_file())


def content_name(*parts: str) -> str:
    """A name for what is compiled from these texts."""
    return hashlib.sha256(stamp() + "\0".join(parts).encode()).hexdigest()[:24]


def clang(flags: list[str], source: Path) -> subprocess.CompletedProcess[str]:
    """Run clang on a kernel's C++ text."""
    command = [str(tool("clang++")), *LANGUAGE, f"-I{HERE / 'include'}", *flags, str(source)]
    return subprocess.run(command, capture_output=True, text=True)


def checked(command: list[str]) -> None:
    """Run a command that must succeed whatever the kernel is."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"[metal_cpu] {' '.join(command)}\n{result.stderr}")


@cache
def runtime_library() -> Path:
    """The runtime, compiled on first use."""
    library = cache_folder() / f"{content_name('runtime')}_runtime.so"
    if not library.exists():
        sources = [f"-include{f}" for f in sorted(HERE.glob("runtime/*.cpp"))]  # as one text: compiles in a third
        made = library.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", "-O2", "-g1", "-fPIC", "-shared", "-fuse-ld=lld", f"-Wl,-soname,{library}"]
        checked([str(tool("clang++")), *flags, *sources, "-x", "c++", os.devnull, "-o", str(made)])
        made.replace(library)
    return library


def compile_kernel(text: str, mode: str) -> tuple[Path, Path]:
    """A kernel's library, and in mode ``profile`` its LLVM text (else a path that does not exist).

    Raises:
        SyntaxError: With clang's messages, if it rejects the text.
    """
    name = content_name(text, *LANGUAGE, *MODES[mode])
    source, library, llvm = (cache_folder() / f"{name}{suffix}" for suffix in (".cpp", ".so", ".ll"))
    if library.exists() and (mode != "profile" or llvm.exists()):
        return library, llvm
    made = {path: path.with_suffix(f".{os.getpid()}{path.suffix}") for path in (source, library, llvm)}
    made[source].write_text(text)
    flags = [*MODES[mode], "-fPIC", "-fuse-ld=lld"]
    if mode == "profile":
        clang([*flags, "-S", "-emit-llvm", "-o", str(made[llvm])], made[source])
    link = [
        "-shared",
        f"-Wl,-Bsymbolic,{runtime_library()}",
        "-fno-sanitize-link-runtime",
        "-lm",
        "-o",
        str(made[library]),
    ]
    result = clang([*flags, *link], made[source])
    if result.returncode:
        made[source].unlink()
        raise SyntaxError(result.stderr)
    for path, temporary in made.items():
        if temporary.exists():
            temporary.replace(path)
    return library, llvm
