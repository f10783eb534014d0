"""Mode ``as``: what Metal refuses. Address spaces by clang's own, casts and recursion in its LLVM text, and lint.py."""

from __future__ import annotations

import os
import re
from collections import defaultdict

from metal_cpu import toolchain
from metal_cpu.capture import Launch
from metal_cpu.lint import lint
from metal_cpu.source import FILE, FORBIDDEN, PRELUDE, LanguageError, translate

# Warnings of clang about what Metal's compiler refuses or reads in another way.
REFUSED_WARNINGS = re.compile(
    r"loses floating-point precision: .* to '(?:bfloat|__bf16)|increases floating-point precision: .* to 'double'"
    r"|-Wvla|-Wuninitialized|-Wsometimes-uninitialized"
)
SPACES = re.compile(r"address.space|'[^']*\b(?:device|threadgroup|constant)\b")
DIAGNOSTIC = re.compile(rf"(?:{re.escape(FILE)}:(\d+):\d+|\S+:\d+:\d+): (?:fatal )?(error|warning): (.*)")


def static_problems(launch: Launch, prelude: str = PRELUDE, forbidden: str = FORBIDDEN) -> list[str]:
    """Problems of the launch's text, one line each; none if Metal should accept it."""
    lines = launch.source.split("\n")
    try:
        text, _ = translate(launch, prelude, forbidden)
    except LanguageError as error:
        return [f"LANGUAGE {error}"]
    source = toolchain.cache_folder() / f"{toolchain.content_name(text, 'as')}.{os.getpid()}.cpp"
    source.write_text(text)
    try:
        found = compile_problems(toolchain.clang(toolchain.MODES["as"], source).stderr, lines)
        found += [f"LANGUAGE {code(lines, number)} {message}" for number, message in lint(launch)]
        if not found:
            llvm = ["-DMTL_ADDRESS_SPACES", "-O0", "-g1", "-S", "-emit-llvm", "-o", "-"]
            ir = toolchain.clang(llvm, source).stdout
            found = cast_problems(ir, lines) + recursion_problems(ir)
    finally:
        source.unlink()
    return found


def code(lines: list[str], number: int) -> str:
    """``kernel.metal:N `text``` of a line, or nothing for the emulator's own lines."""
    return (
        f"{FILE}:{number} `{lines[number - 1].strip()}`" if 0 < number <= len(lines) else "(not in the kernel's text)"
    )


def compile_problems(messages: str, lines: list[str]) -> list[str]:
    """clang's errors, and those warnings that are errors in Metal."""
    found = []
    for number, severity, text in DIAGNOSTIC.findall(messages):
        if severity == "warning" and not REFUSED_WARNINGS.search(text):
            continue
        kind = "ADDRESS-SPACE" if SPACES.search(text) else "COMPILE"
        found.append(f"{kind} {code(lines, int(number or 0))} {text}")
    return found


def cast_problems(ir: str, lines: list[str]) -> list[str]:
    """C-style casts from one address space to another, which C++ allows and Metal does not."""
    found = set()
    for line in ir.split("\n"):
        if "addrspacecast" not in line or "null" in line:
            continue
        place = re.search(r"!dbg (!\d+)", line)
        at = place and re.search(rf"{place.group(1)} = (?:distinct )?!DILocation\(line: (\d+)", ir)
        found.add(f"ADDRESS-SPACE {code(lines, int(at.group(1)) if at else 0)} cast to another address space")
    return sorted(found)


def recursion_problems(ir: str) -> list[str]:
    """Functions that call themselves, directly or through others."""
    calls: dict[str, set[str]] = defaultdict(set)
    function = ""
    for line in ir.split("\n"):
        if defined := re.match(r'define .*?@"?([\w.$]+)"?\(', line):
            function = defined.group(1)
        elif function and (called := re.search(r'\b(?:call|invoke)\b.*?@"?([\w.$]+)"?\(', line)):
            calls[function].add(called.group(1))
    return [f"RECURSION {name} calls itself" for name in list(calls) if name in reachable(calls, name)]


def reachable(calls: dict[str, set[str]], start: str) -> set[str]:
    """Everything that ``start`` calls, at any depth."""
    seen: set[str] = set()
    rest = [start]
    while rest:
        for name in calls.get(rest.pop(), ()):
            if name not in seen:
                seen.add(name)
                rest.append(name)
    return seen
