"""The kernels of kernels/*.metal on NVIDIA GPUs: the same text as CUDA, for `mx.fast.cuda_kernel`.

`kernel` takes the arguments of `mx.fast.metal_kernel`, and what it returns is called in the same way, so metal.py's
launches serve both. The text becomes CUDA through kernels/cuda_prelude.h and a few replaced words.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from tiny_qmoe_mlx import kernel_text

# In this order. A declaration without `*` is of what lies in threadgroup memory; other address spaces are a pointer's.
REPLACEMENTS = (
    (re.compile(r"//[^\n]*"), ""),
    (re.compile(r"#pragma clang loop unroll\(full\)"), "#pragma unroll"),
    (re.compile(r"\bthreadgroup (?=[\w<>, ]+ \w+ ?[\[;])"), "__shared__ "),
    (re.compile(r"\b(device|threadgroup|thread|constant) "), ""),
    (re.compile(r"\bulong\b"), "uint64_t"),
    (re.compile(r"\bushort2\("), "make_ushort2("),
)


def available() -> bool:
    """Whether MLX computes on an NVIDIA GPU."""
    return mx.cuda.is_available() and mx.default_device() == mx.gpu


def translate(text: str) -> str:
    """Metal text, functions or the body of a kernel, as CUDA; needs the prelude in front. Lines stay where they are."""
    for pattern, replacement in REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return text


def kernel(
    name: str, input_names: Sequence[str], output_names: Sequence[str], header: str, source: str
) -> Callable[..., list[mx.array]]:
    """`mx.fast.metal_kernel` for CUDA; arguments are Metal text.

    Launches must have threadgroups of whole simdgroups in x and grids of whole threadgroups, at most 65535 of them in
    y and in z.

    Raises:
        RuntimeError: by MLX, where it was built without CUDA.
    """
    build: Callable[..., Any] = mx.fast.cuda_kernel  # declared by MLX as returning an object
    return build(
        name=name,
        input_names=input_names,
        output_names=output_names,
        header=kernel_text.read("cuda_prelude.h") + translate(header),
        source=translate(source),
    )
