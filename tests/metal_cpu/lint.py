"""Rules of Metal that C++ does not have, checked on the text. MLX's own kernels (before Metal 4) pass all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from metal_cpu.capture import SIGNATURE, Launch
from metal_cpu.source import strip_comments

SPACES = "device|constant|threadgroup|thread"
SCALARS = (
    "bool|char|uchar|short|ushort|int|uint|long|ulong|float|half|bfloat|void|size_t|u?int(?:8|16|32|64)_t|b?float16_t"
)
CONSTANT = r"\bconstant\b|\w_CONST\b|\boperator\b"  # X_CONST: MLX's macros for it
# A pointer or reference declarator after a type; group 1 is what stands before the type in the same declaration.
DECLARATOR = (
    r"((?:\b(?:const|volatile|static|inline|friend|typename|METAL_FUNC|{spaces})\b\s*)*)"
    r"\b(?:{types})\s*(?:const\s*)?((?:{spaces})\s*)?[*&](?!&|=)"
)


def lint(launch: Launch) -> Iterator[tuple[int, str]]:
    """Line numbers and messages."""
    text = strip_comments(launch.source)
    text = re.sub(r'"[^"\n]*"', '""', text)
    start = re.search(SIGNATURE % re.escape(launch.name), text)
    for rule in (spaceless_pointers, globals_outside_constant, static_outside_constant, lambdas):
        for at, message in rule(text):
            yield text.count("\n", 0, at) + 1, message
    for at, message in misplaced_arrays(text, start.start() if start else 0):
        yield text.count("\n", 0, at) + 1, message


def type_names(text: str) -> str:
    """The types that the text declares or takes as template parameters, as alternatives of a regular expression."""
    named = re.findall(r"\b(?:struct|class|enum|typename|using)\s+(\w+)", text)
    vectors = rf"(?:{SCALARS})[234]"
    return "|".join([*sorted({re.escape(n) for n in named if n not in ("metal", "namespace")}), vectors, SCALARS])


def spaceless_pointers(text: str) -> Iterator[tuple[int, str]]:
    """Pointers and references without device, constant, threadgroup or thread."""
    for match in re.finditer(DECLARATOR.format(spaces=SPACES, types=type_names(text)), text):
        before, after = match.groups()
        if (
            after
            or re.search(rf"\b(?:{SPACES})\b", before)
            or re.search(r"[\w>]\s*$", text[: match.start()].rsplit("\n", 1)[-1])
        ):
            continue
        yield match.start(), "pointers and references need an address space (device, constant, threadgroup or thread)"


def outermost(text: str) -> str:
    """The text with what is in braces or parentheses blanked, lines kept; a closed brace becomes a semicolon."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match.group(0)[:-1]) + (";" if match.group(0)[-1] == "}" else " ")

    inner = re.compile(r"\{[^{}()]*\}|\([^{}()]*\)")
    while inner.search(text):
        text = inner.sub(blank, text)
    return text


def globals_outside_constant(text: str) -> Iterator[tuple[int, str]]:
    """Variables of the whole program that are not in constant space."""
    flat = re.sub(r"(?m)^[ \t]*#.*(?:\\\n.*)*", lambda m: " " * len(m.group(0)), outermost(text))
    for match in re.finditer(r"(?m)^[ \t]*((?:static|inline|const|constexpr)\b[^;(]*?=)", flat):
        within_list = flat[: match.start()].rstrip()[-1:] in (",", "<")  # of template parameters
        if not within_list and not re.search(CONSTANT, match.group(1)):
            yield match.start(1), "variables outside functions must be in constant space: `constant constexpr`"


def static_outside_constant(text: str) -> Iterator[tuple[int, str]]:
    """Static variables of functions and structs that are not in constant space."""
    for match in re.finditer(r"\bstatic\b([^;(){}]*?)=", text):
        if not re.search(CONSTANT, text[text.rfind(";", 0, match.start()) + 1 : match.end()]):
            yield match.start(), "static variables must be in constant space: `static constant constexpr`"


def lambdas(text: str) -> Iterator[tuple[int, str]]:
    """Lambdas, which Metal's specification (1.5.4) excludes."""
    for match in re.finditer(
        r"(?<![\w\])\[])\s*\[\s*(?:[&=]|&?\w+\s*(?:,\s*&?\w+\s*)*)?\s*\]\s*(?:\([^()]*\)\s*)?(?:->\s*\w+\s*)?\{", text
    ):
        yield match.end() - 1, "lambdas are not part of Metal"


def misplaced_arrays(text: str, kernel: int) -> Iterator[tuple[int, str]]:
    """Threadgroup arrays declared outside the kernel function."""
    for match in re.finditer(
        r"(?m)(?:^|(?<=[;{}]))[ \t]*threadgroup\s+[^;{}()*&]*?\w+\s*(?:\[[^;{}]*\])?\s*;", text[:kernel]
    ):
        if "operator" not in match.group(0):
            yield match.end(), "threadgroup variables may be declared in the kernel function only"
