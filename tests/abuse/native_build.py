"""The fuzz targets of cpp/, compiled by clang with libFuzzer and the address and undefined-behaviour sanitizers.

Objects and programs are kept below the temporary folder, named by what they are made of.
"""

import hashlib
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from metal_cpu import toolchain

HERE = Path(__file__).resolve().parent / "cpp"
LIBRARY = HERE.parents[2] / "kernels" / "cpu"
CHECKS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
COMPILE = ["-std=c++17", "-O1", "-g1", "-Wno-deprecated-declarations"]
# Of the decoders of an instruction set, which are all templates, a check of each pointer would be most of the text and
# of the time to compile it; what they read outside the address sanitizer sees.
FAST = ["-fno-math-errno", "-ffp-contract=fast"]
FAST += ["-fno-sanitize=null,alignment,object-size,pointer-overflow,vptr,function"]
ISA = {
    "isa_portable.cpp": [],
    "isa_neon.cpp": [],
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
COUNTED = ["-fprofile-instr-generate", "-fcoverage-mapping"]
LEFT_OUT = ("blas_shim.cpp",)  # calls numpy's BLAS, reads no file


@dataclass(frozen=True)
class Target:
    """A fuzz target: its source, the threads of the library, the largest input in bytes, and its share of a run."""

    source: str
    largest: int
    share: float
    threads: int = 1


TARGETS = {
    "trellis": Target("trellis", 8192, 0.575),
    "products": Target("products", 8192, 0.13),
    "products_threads": Target("products", 2048, 0.0049, threads=3),
    "qmoe": Target("qmoe", 1024, 0.05),
    "rans": Target("rans", 1024, 0.04),
    "affine": Target("affine", 1024, 0.2),
    "encoder": Target("encoder", 2052, 0.0001),
}


def unavailable() -> str:
    """Why the fuzzers cannot be built here; empty if they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the fuzzers need x86-64 Linux, this is {platform.machine()} {sys.platform}"
    clang = toolchain.tool("clang++")
    if not clang:
        return f"the fuzzers need clang++-{toolchain.VERSION}: apt-get install clang-{toolchain.VERSION}"
    found = subprocess.run([clang, "-print-resource-dir"], capture_output=True, text=True).stdout.strip()
    if not any(Path(found).glob("lib/*/libclang_rt.fuzzer*")):
        return f"the fuzzers need libFuzzer: apt-get install libclang-rt-{toolchain.VERSION}-dev"
    return ""


def _flags(name: str, coverage: bool) -> list[str]:
    guided = [*CHECKS, "-fsanitize=fuzzer-no-link", *(COUNTED if coverage else [])]
    return [*COMPILE, *guided, *(FAST + ISA[name] if name in ISA else [])]


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(toolchain.stamp() + b"".join(parts)).hexdigest()[:16]


def _compiled(source: Path, flags: list[str], library: Path) -> Path:
    """An object file, named by the source, all headers and the flags."""
    headers = [f.read_bytes() for f in sorted([*HERE.glob("*.h"), *library.glob("*.h")])]
    made = toolchain.cache_folder() / f"fuzz_{_digest(*headers, source.read_bytes(), repr(flags).encode())}.o"
    if not made.exists():
        unfinished = made.with_suffix(f".{os.getpid()}.o")
        command = [str(toolchain.tool("clang++")), *flags, f"-I{library}", "-c", str(source), "-o", str(unfinished)]
        toolchain.checked(command)
        unfinished.replace(made)
    return made


def build(name: str, coverage: bool = False, library: Path = LIBRARY) -> Path:
    """A target's program, compiled where it has not been yet.

    Args:
        name: of TARGETS.
        coverage: count the lines that run, for llvm-cov.
        library: the C++ library's sources.

    Raises:
        RuntimeError: the compiler's messages.
    """
    target = TARGETS[name]
    sources = [(f, _flags(f.name, coverage), library) for f in sorted(library.glob("*.cpp")) if f.name not in LEFT_OUT]
    sources.sort(key=lambda item: item[0].name not in ISA)  # those that take longest first
    # The target's own loops would be most of what a fuzzer follows.
    own = [*COMPILE, "-O2", "-Wall", "-Wextra", "-Werror", "-fsanitize=address", f"-DTHREADS={target.threads}"]
    sources.append((HERE / f"{target.source}.cpp", own, library))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda item: _compiled(*item), sources))
    program = toolchain.cache_folder() / f"fuzz_{name}_{_digest(*(o.name.encode() for o in objects))}"
    if not program.exists():
        unfinished = program.with_suffix(f".{os.getpid()}")
        link = [*CHECKS, "-fsanitize=fuzzer", *(COUNTED if coverage else []), "-o", str(unfinished), *map(str, objects)]
        toolchain.checked([str(toolchain.tool("clang++")), *link])
        unfinished.replace(program)
    return program
