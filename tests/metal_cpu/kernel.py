"""A compiled kernel: load its library, launch it on buffers, turn the runtime's report into lines about its text."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metal_cpu import toolchain
from metal_cpu.capture import Launch
from metal_cpu.profile import read_profile
from metal_cpu.report import Report
from metal_cpu.source import FILE, FORBIDDEN, PRELUDE, parameters, translate
from metal_cpu.static import code, static_problems

IN_PLACE_BYTES = 64 << 20
MAX_PROBLEMS = 50
COUNTS = ("threads", "switches", "simd_ops", "barriers", "accesses", "threadgroup_bytes", "reports")


class BufferArgument(ctypes.Structure):
    """As in runtime/runtime.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("host", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_int32),
        ("initialised", ctypes.c_int32),
        ("in_place", ctypes.c_int32),
        ("skew", ctypes.c_int32),
        ("element", ctypes.c_int32),
    ]


class LaunchOptions(ctypes.Structure):
    """As in runtime/runtime.h."""

    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("first_group", ctypes.c_uint64),
        ("group_count", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("limit_s", ctypes.c_double),
        ("check", ctypes.c_int32),
        ("profile", ctypes.c_int32),
        ("strict", ctypes.c_int32),
        ("max_problems", ctypes.c_int32),
    ]


class LaunchCounts(ctypes.Structure):
    """As in runtime/runtime.h."""

    _fields_ = [(name, ctypes.c_uint64) for name in COUNTS]


@dataclass(frozen=True)
class Options:
    """How to launch, as in ``emulate``."""

    seed: int | None = None
    strict: bool = True
    limit_s: float = 60.0
    groups: tuple[int, int] | None = None
    skew: bool = False


class Kernel:
    """A launch's text compiled for one mode.

    Args:
        launch: As captured; its grid and threadgroup are the default of a call.
        mode: ``as``, ``run``, ``check`` or ``profile``.
        prelude: C++ in front of the text. Default: what MLX's own preamble gives every kernel.
        forbidden: Words that are errors in the text.

    Raises:
        LanguageError: If the text uses what Metal has not (not in mode ``as``).
        SyntaxError: If clang rejects the text (not in mode ``as``).
    """

    def __init__(self, launch: Launch, mode: str = "run", prelude: str = PRELUDE, forbidden: str = FORBIDDEN) -> None:
        if mode not in toolchain.MODES:
            raise ValueError(f"[Kernel] mode should be one of {', '.join(toolchain.MODES)}, but received {mode!r}")
        self.launch, self.mode = launch, mode
        self.problems: list[str] = []
        if mode == "as":
            self.problems = static_problems(launch, prelude, forbidden)
            return
        self.parameters = [p for p in parameters(launch) if p.attribute == "buffer"]
        self.library_path, self.llvm_path = toolchain.compile_kernel(
            "".join(translate(launch, prelude, forbidden)), mode
        )
        self.library = ctypes.CDLL(str(self.library_path))
        self.runtime = ctypes.CDLL(str(toolchain.runtime_library()))
        self.runtime.mtl_launch.restype = ctypes.c_char_p

    def __call__(
        self,
        buffers: dict[str, np.ndarray],
        outputs: tuple[str, ...],
        initialised: bool = False,
        options: Options | None = None,
    ) -> Report:
        """Launch the kernel.

        Args:
            buffers: One contiguous array for each ``[[buffer(n)]]`` parameter, by its name; bfloat16 as uint16.
            outputs: Names of those that the kernel writes; they are filled in place.
            initialised: The outputs' contents count as written; else they start as poison.
            options: Default: ``Options()``.

        Raises:
            ValueError: If a buffer is missing or not contiguous, or the launch is not one that Metal takes.
        """
        options = options or Options()
        arguments = self.bind(buffers, outputs, initialised, options)
        raw, counts = self.start(arguments, options)
        report = Report(self.mode, counts=counts)
        self.read_report(raw, report)
        return report

    def bind(
        self, buffers: dict[str, np.ndarray], outputs: tuple[str, ...], initialised: bool, options: Options
    ) -> Any:
        """The C array of buffers, in the order of their indices."""
        arguments = (BufferArgument * len(self.parameters))()
        for p in self.parameters:
            if p.name not in buffers:
                raise ValueError(f"[{self.launch.name}] should get a buffer {p.name}, received {', '.join(buffers)}")
            array, output = buffers[p.name], p.name in outputs
            if not array.flags.c_contiguous:
                raise ValueError(
                    f"[{self.launch.name}] {p.name} should be contiguous, received strides {array.strides}"
                )
            arguments[p.index] = BufferArgument(
                name=p.name.encode(),
                host=array.ctypes.data,
                bytes=array.nbytes,
                writable=output,
                initialised=output and initialised,
                in_place=not output and array.nbytes >= IN_PLACE_BYTES,
                skew=array.itemsize if options.skew and not output and array.nbytes else 0,
                element=array.itemsize,
            )
        return arguments

    def start(self, arguments: Any, options: Options) -> tuple[str, Counter[str]]:
        """Run the launch; the runtime's report and counts."""
        threads = np.prod(self.launch.threadgroup)
        if threads > 1024 or not threads or not all(self.launch.grid):
            raise ValueError(
                f"[{self.launch.name}] should have 1 to 1024 threads a threadgroup and a grid without zeros, "
                f"received threadgroup {self.launch.threadgroup}, grid {self.launch.grid}"
            )
        first, count = options.groups or (0, (1 << 64) - 1)
        entry = ctypes.cast(self.library.mtl_entry, ctypes.c_void_p)
        triple = ctypes.c_uint32 * 3
        c_options = LaunchOptions(
            entry=entry.value,
            grid=triple(*self.launch.grid),
            group=triple(*self.launch.threadgroup),
            first_group=first,
            group_count=count,
            seed=0 if options.seed is None else options.seed + 1,
            limit_s=options.limit_s,
            check=self.mode == "check",
            profile=self.mode == "profile",
            strict=options.strict,
            max_problems=MAX_PROBLEMS,
        )
        c_counts = LaunchCounts()
        raw = self.runtime.mtl_launch(arguments, len(arguments), ctypes.byref(c_options), ctypes.byref(c_counts))
        if raw is None:
            raise MemoryError(
                f"[{self.launch.name}] the address space for {len(arguments)} buffers could not be reserved"
            )
        return raw.decode(), Counter({name: getattr(c_counts, name) for name in COUNTS if name != "reports"})

    def read_report(self, raw: str, report: Report) -> None:
        """Fill the report from the runtime's tab-separated lines."""
        rows = [line.split("\t") for line in raw.splitlines()]
        report.kinds.update({row[1]: int(row[2]) for row in rows if row[0] == "KIND"})
        found = [row for row in rows if row[0] == "PROBLEM"]
        places = kernel_lines(self.library_path, [int(row[2]) for row in found])
        source = self.launch.source.split("\n")
        for _, kind, offset, message, where in found:
            place = f" {code(source, places.get(int(offset), 0))}" if int(offset) >= 0 else ""
            report.problems.append(f"{kind}{place} {message}" + (f" [{where}]" if where else ""))
        if self.mode == "profile":
            report.profile = read_profile(rows, self.llvm_path)


def kernel_lines(library: Path, offsets: list[int]) -> dict[int, int]:
    """The line of the kernel's text for offsets in its library: of the innermost inlined call that lies in the text."""
    wanted = sorted({offset for offset in offsets if offset >= 0})
    if not wanted:
        return {}
    symbolizer = [str(toolchain.tool("llvm-symbolizer")), "--inlines", "--no-demangle", "-e", str(library)]
    answer = subprocess.run([*symbolizer, *map(hex, wanted)], capture_output=True, text=True, check=True).stdout
    lines = {}
    for offset, frames in zip(wanted, answer.strip().split("\n\n"), strict=True):
        if found := re.search(rf"{re.escape(FILE)}:(\d+)", frames):
            lines[offset] = int(found.group(1))
    return lines
