"""MLX's own kernels, from the installed wheel: what works on Macs must be right here, and without problems."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from metal_cpu import Kernel, Launch, required

pytestmark = required

HEADERS = Path(list(mx.__path__)[0] if hasattr(mx, "__path__") else Path(mx.__file__).parent) / "include"
KERNELS = "mlx/backend/metal/kernels/"
GROUP_SIZE = 64
# What MLX's text includes and the emulator's headers have already, or what no quantized kernel needs.
SKIPPED = ("bf16_math.h", "logging.h", "complex.h", "nax")
COMPLEX = "struct complex64_t { float real, imag; template <class... A> constexpr complex64_t(A...) : real(0) {} };\n"
PRELUDE = f'#include "metal_cpu.h"\nusing namespace metal;\n{COMPLEX}'


def flattened(path: str, seen: set[str]) -> str:
    """A header of MLX with those it includes, each once."""
    if path in seen or any(name in path for name in SKIPPED):
        return ""
    seen.add(path)
    lines = (HEADERS / path).read_text().replace("#pragma once", "").split("\n")
    included = (re.match(r'#include "(mlx/[^"]*)"', line) for line in lines)
    return "\n".join(flattened(m.group(1), seen) if m else line for m, line in zip(included, lines, strict=True))


def quantized_source() -> str:
    """The text of MLX's quantized kernels, without complex numbers and with function constants set."""
    seen: set[str] = set()
    paths = ("utils.h", "steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
    text = "".join(flattened(KERNELS + path, seen) for path in paths)
    text = re.sub(r"(?s)template <typename T>\nstruct Limits<complex_t<T>> \{.*?\n\};\n", "", text)
    text = re.sub(r"(?s)inline complex64_t \w+\(.*?\n\}\n", "", text)
    text = re.sub(r"(?s)template <>\ninline bool cast_to<bool, complex64_t>.*?\n\}\n", "", text)
    for space in (
        "device",
        "threadgroup",
        "constant",
    ):  # one type without address spaces, so one specialisation too many
        text = re.sub(rf"(?s)template <typename T>\nstruct pointer_element<{space} T\*> \{{.*?\n\}};\n", "", text)
    return re.sub(r"\[\[function_constant\(\d+\)\]\]", "= true", text)


@pytest.fixture(scope="module")
def source() -> str:
    if not (HEADERS / KERNELS / "quantized.h").exists():
        pytest.skip("this mlx wheel has no kernel headers")
    return quantized_source()


def quantized(
    bits: int, rows: int, columns: int, tokens: int, dtype: mx.Dtype
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Buffers of MLX's quantized kernels by name, and mx.quantized_matmul of the same in float32."""
    rng = np.random.default_rng(1)
    weights = mx.array(rng.normal(size=(rows, columns)).astype(np.float32) * 0.1).astype(dtype)
    x = mx.array(rng.normal(size=(tokens, columns)).astype(np.float32)).astype(dtype)
    w, scales, biases = mx.quantize(weights, group_size=GROUP_SIZE, bits=bits)
    exact = [a.astype(mx.float32) for a in (x, scales, biases)]
    want = mx.quantized_matmul(exact[0], w, exact[1], exact[2], transpose=True, group_size=GROUP_SIZE, bits=bits)

    def bits_of(a: mx.array) -> np.ndarray:
        return np.array(a if a.dtype == mx.uint32 else a.view(mx.uint16))

    buffers = {"w": bits_of(w), "scales": bits_of(scales), "biases": bits_of(biases), "x": bits_of(x)}
    sizes = {
        "in_vec_size": columns,
        "out_vec_size": rows,
        "K": columns,
        "N": rows,
        "M": tokens,
        "x_batch_ndims": 0,
        "w_batch_ndims": 0,
    }
    buffers |= {name: np.array([size], np.int32) for name, size in sizes.items()}
    buffers |= {
        name: np.array(shape, np.int32)
        for name, shape in {"x_shape": (tokens, columns), "w_shape": (rows, columns)}.items()
    }
    buffers |= {name: np.array([1, 1], np.int64) for name in ("x_strides", "w_strides", "s_strides", "b_strides")}
    buffers["y"] = np.zeros((tokens, rows), np.uint16)
    return buffers, np.array(want)


def instance(
    source: str, name: str, template: str, grid: tuple[int, int, int], threadgroup: tuple[int, int, int]
) -> Launch:
    """A launch of one of MLX's kernels; the line at the end is how MLX instantiates templates."""
    return Launch(
        name, f"{source}\ntemplate decltype({name}<{template}>) {name}<{template}>;\n", grid, threadgroup, (), ()
    )


CASES = [
    ("affine_qmv_fast", bits, dtype, mode)
    for bits in (2, 3, 4)
    for dtype in ("float16", "bfloat16")
    for mode in ("run", "check")
] + [("affine_qmm_t", 2, dtype, mode) for dtype in ("float16", "bfloat16") for mode in ("run", "check")]
SLOW = [case for case in CASES if case[1] == 3 or (case[0] == "affine_qmm_t" and case[2] == "bfloat16")]


@pytest.mark.parametrize(
    ("name", "bits", "dtype", "mode"),
    [pytest.param(*case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES],
)
def test_mlx_kernel_is_right_and_clean(source, name, bits, dtype, mode):
    element = {"float16": "half", "bfloat16": "bfloat16_t"}[dtype]
    if name == "affine_qmv_fast":
        rows, columns, tokens, flags = 64, 1024, 1, "false"
        grid, threadgroup = (32 * tokens, rows // 8 * 2, 1), (32, 2, 1)
    else:
        rows, columns, tokens, flags = 64, 256, 40, "true, false"
        grid, threadgroup = (rows // 32 * 32, (tokens + 31) // 32 * 2, 2), (32, 2, 2)
    buffers, want = quantized(bits, rows, columns, tokens, getattr(mx, dtype))
    launch = instance(source, name, f"{element}, {GROUP_SIZE}, {bits}, {flags}", grid, threadgroup)
    report = Kernel(launch, mode, PRELUDE, forbidden="")(buffers, ("y",))
    assert not report.problems, report
    got = np.array(mx.array(buffers["y"]).view(getattr(mx, dtype)).astype(mx.float32))
    # One rounding of the result: 2^-11 for half, 2^-8 for bfloat16, and the float32 sums before it.
    assert np.abs(got - want).max() <= {"float16": 6e-4, "bfloat16": 5e-3}[dtype] * np.abs(want).max()


def without_barrier(source: str, function: str, number: int) -> str:
    """The text without one threadgroup_barrier of a function; empty when it has no more."""
    start = source.index(f"METAL_FUNC void {function}(")
    end = source.index("\n}\n", start)
    barriers = list(re.finditer(r"threadgroup_barrier\([^)]*\);", source[start:end]))
    if number >= len(barriers):
        return ""
    at = barriers[number]
    return source[: start + at.start()] + source[start + at.end() :]


@pytest.mark.slow
def test_removed_barriers_are_reported_as_races(source):
    """Of the nine barriers of qmm_t_impl, four guard memory on the paths that this size takes."""
    rows, columns, tokens = 64, 256, 40
    grid, threadgroup = (rows // 32 * 32, (tokens + 31) // 32 * 2, 2), (32, 2, 2)
    buffers, _ = quantized(2, rows, columns, tokens, mx.float16)
    found = []
    while text := without_barrier(source, "qmm_t_impl", len(found)):
        launch = instance(text, "affine_qmm_t", f"half, {GROUP_SIZE}, 2, true, false", grid, threadgroup)
        found.append(Kernel(launch, "check", PRELUDE, forbidden="")(buffers, ("y",)).kinds)
    assert sum(bool(kinds["RACE"]) for kinds in found) == 4, found
