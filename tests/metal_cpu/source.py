"""From Metal's text to C++: the few edits that headers cannot make, and the call of the kernel's entry point.

The edits keep every line where it was, so that clang's line numbers are those of MLX's text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from metal_cpu.capture import SIGNATURE, Launch

FILE = "kernel.metal"  # the name of the kernel's text in clang's messages
PRELUDE = '#include "metal_cpu.h"\nusing namespace metal;\ntypedef bfloat bfloat16_t;\ntypedef half float16_t;\n'
# Words that Metal lacks; after the emulator's headers they are errors.
FORBIDDEN = (
    "double throw virtual new delete goto std dynamic_cast typeid thread_local noexcept try catch printf malloc "
    "__int128 register asm"
)

ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "t->full_simdgroups * 8",
    "dispatch_simdgroups_per_threadgroup": "t->full_simdgroups",
    "dispatch_threads_per_threadgroup": "mtl_uint3(t->full_group)",
    "grid_origin": "uint3(0u)",
    "grid_size": "mtl_uint3(t->grid)",
    "quadgroup_index_in_threadgroup": "t->index_in_group / 4",
    "quadgroups_per_threadgroup": "t->simdgroups * 8",
    "simdgroup_index_in_threadgroup": "t->simdgroup",
    "simdgroups_per_threadgroup": "t->simdgroups",
    "thread_execution_width": "32",
    "thread_index_in_quadgroup": "t->lane % 4",
    "thread_index_in_simdgroup": "t->lane",
    "thread_index_in_threadgroup": "t->index_in_group",
    "thread_position_in_grid": "mtl_uint3(t->position_in_grid)",
    "thread_position_in_threadgroup": "mtl_uint3(t->position_in_group)",
    "threadgroup_position_in_grid": "mtl_uint3(t->group_position)",
    "threadgroups_per_grid": "mtl_uint3(t->groups_in_grid)",
    "threads_per_grid": "mtl_uint3(t->grid)",
    "threads_per_simdgroup": "32",
    "threads_per_threadgroup": "mtl_uint3(t->group)",
}

ENTRY = """
#line 1 "entry"
#undef MTL_THREADGROUP_ARRAY
template <class F> struct mtl_parameters;
template <class... P> struct mtl_parameters<void(P...)> {{ template <int I> using at = __type_pack_element<I, P...>; }};
template <int I> using mtl_parameter = typename mtl_parameters<decltype({kernel})>::template at<I>;
template <class T> MTL_HIDDEN static inline T mtl_bind(void* p) {{
  if constexpr (__is_pointer(T)) return (T)p;
  else return *(__remove_reference_t(T)*)p;
}}
MTL_HIDDEN static inline uint3 mtl_uint3(const uint32_t* p) {{ return (uint3){{p[0], p[1], p[2]}}; }}
extern "C" MTL_HIDDEN void mtl_entry(void** buffers, const MtlThread* t) {{
  {kernel}({arguments});
}}
"""

THREADGROUP_DECLARATION = re.compile(
    r"(?m)((?:^|(?<=[;{}]))[ \t]*)threadgroup\s+(?!_)((?:[^;{}()]|\([^;{}()]*\)|=\s*\{[^;{}]*\})*);"
)
INSTANTIATION = re.compile(r"\btemplate \[\[host_name\([^)\n]*\)\]\] \[\[kernel\]\] decltype")


class LanguageError(ValueError):
    """The text is not Metal, for a reason that clang cannot see."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of the kernel: ``attribute`` is ``buffer`` (with its index) or the name of a position."""

    name: str
    attribute: str
    index: int


def strip_comments(source: str) -> str:
    """The text without comments, line breaks kept."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: "\n" * m.group(0).count("\n"), source, flags=re.S)


def parameters(launch: Launch) -> list[Parameter]:
    """The parameters of the launch's kernel, from its signature in the text."""
    text = strip_comments(launch.source)
    head = re.search(SIGNATURE % re.escape(launch.name), text)
    if not head:
        raise ValueError(f"[source] the text should define {launch.name}, but it does not")
    signature = text[head.end() : text.index("{", head.end())]
    found = []
    for declaration, attribute, index in re.findall(r"([^,]*)\[\[\s*(\w+)\s*(?:\(\s*(\d+)\s*\))?\s*\]\]", signature):
        if attribute != "buffer" and attribute not in ATTRIBUTES:
            raise LanguageError(f"[[{attribute}]] should be an attribute of Metal, but it is not known")
        found.append(Parameter(re.findall(r"\w+", declaration)[-1], attribute, int(index or 0)))
    return found


def instance(launch: Launch) -> str:
    """The kernel's name with its template arguments, as MLX instantiates it."""
    found = re.search(r"decltype\((" + re.escape(launch.name) + r"<[^;]*>)\) ", launch.source)
    return found.group(1) if found else launch.name


def declare_arrays(match: re.Match[str]) -> str:
    """``threadgroup T a[2], b[3];`` as one MTL_THREADGROUP_ARRAY each; pointers and references stay as they are."""
    indent, body = match.groups()
    if re.search(r"[*&(]", re.split(r"[\[=,;]", body)[0]):
        return match.group(0)
    if "=" in body:
        raise LanguageError(
            f"a threadgroup variable should have no initialiser, but received: threadgroup {body.strip()}"
        )
    first, *others = re.split(r",(?![^<\[]*[>\]])", re.sub(r"\s+", " ", body))
    head = re.fullmatch(r"\s*(.*?)(\w+)\s*((?:\[.*\])*)\s*", first, re.S)
    assert head, body
    element = head.group(1).strip()
    arrays = [(head.group(2), head.group(3))]
    arrays += re.findall(r"(\w+)\s*((?:\[.*\])*)\s*$", "\n".join(others), re.M)
    declared = " ".join(f"MTL_THREADGROUP_ARRAY(MTL_TYPE({element}), {name}, {dims})" for name, dims in arrays)
    return indent + declared + "\n" * (match.group(0).count("\n") - indent.count("\n"))


def rewrite(source: str) -> str:
    """The C++ twin of a Metal text."""
    text = INSTANTIATION.sub("template decltype", strip_comments(source))
    text = THREADGROUP_DECLARATION.sub(declare_arrays, text)
    text = re.sub(r"#include\s*<metal_\w+>", "", text)  # metal_cpu.h has them all
    text = re.sub(r"\[\[\s*threadgroup\s*\(\d+\)\s*\]\]", "", text)  # spaces.h makes the word a macro
    return f'#define MTL_TYPE(...) __VA_ARGS__\n#line 1 "{FILE}"\n{text}'


def translate(launch: Launch, prelude: str = PRELUDE, forbidden: str = FORBIDDEN) -> tuple[str, str]:
    """The launch's text as C++, and the entry point that calls its kernel for one thread.

    Args:
        launch: As captured.
        prelude: What MLX and the project may take for granted in front of the text.
        forbidden: Words that are errors in the text.

    Raises:
        LanguageError: If the text uses what Metal has not.
    """
    arguments = []
    for i, parameter in enumerate(parameters(launch)):
        if parameter.attribute == "buffer":
            arguments.append(f"mtl_bind<mtl_parameter<{i}>>(buffers[{parameter.index}])")
        else:
            arguments.append(f"(mtl_parameter<{i}>)({ATTRIBUTES[parameter.attribute]})")
    entry = ENTRY.format(kernel=instance(launch), arguments=", ".join(arguments))
    poison = f"#pragma GCC poison {forbidden}\n" if forbidden else ""
    return prelude + poison + rewrite(launch.source), entry
