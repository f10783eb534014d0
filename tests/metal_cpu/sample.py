"""A clean kernel for the emulator's own tests: y = dequantized(w) @ x, 2-bit codes with a scale for each 64 columns.

One threadgroup of SIMDGROUPS simdgroups makes one row; it uses whatever the planted defects need: a bound check,
threadgroup memory, a barrier, simd reductions, bit fields.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

import metal_cpu

HEADER = """
// The dot product of the 16 codes in `word` with x.
template <typename T>
METAL_FUNC float dot16(uint word, const device T* x) {
  float sum = 0.0f;
  for (uint i = 0; i < 16; i++) sum += float(x[i]) * (float((word >> (2 * i)) & 3u) - 1.5f);
  return sum;
}
"""
SOURCE = """
  threadgroup float partial[SIMDGROUPS];
  threadgroup half spare[4];
  uint lane = thread_index_in_simdgroup;
  uint simdgroup = simdgroup_index_in_threadgroup;
  uint row = threadgroup_position_in_grid.x;
  uint rows = uint(w_shape[0]), words = uint(w_shape[1]);
  if (row >= rows) return;
  float acc = 0.0f;
  for (uint j = simdgroup * 32 + lane; j < words; j += SIMDGROUPS * 32) {
    uint word = w[row * words + j];
    acc += float(scales[row * (words / 4) + j / 4]) * dot16(word, x + j * 16);
  }
  acc = simd_sum(acc);
  if (lane == 0) partial[simdgroup] = acc;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = simd_sum(lane < SIMDGROUPS ? partial[lane] : 0.0f);
  if (simdgroup == 0 && lane == 0) y[row] = T(total);
"""
ROWS, COLUMNS, SIMDGROUPS = 13, 1024, 4


def edited(old: str, new: str, text: str = SOURCE) -> str:
    """The text with one place changed; the place must be there."""
    assert text.count(old) == 1, old
    return text.replace(old, new)


def make(source: str = SOURCE, header: str = HEADER, grid_rows: int = ROWS, dtype: mx.Dtype = mx.float16) -> Any:
    """A function (w, scales, x) -> y that launches the kernel with this text."""
    names = ["w", "scales", "x"]
    kernel = mx.fast.metal_kernel(name="sample", input_names=names, output_names=["y"], source=source, header=header)

    def launch(w: mx.array, scales: mx.array, x: mx.array) -> mx.array:
        return kernel(
            inputs=[w, scales, x],
            template=[("T", dtype), ("SIMDGROUPS", SIMDGROUPS)],
            grid=(grid_rows * SIMDGROUPS * 32, 1, 1),
            threadgroup=(SIMDGROUPS * 32, 1, 1),
            output_shapes=[(w.shape[0],)],
            output_dtypes=[dtype],
        )[0]

    return launch


def inputs(
    rows: int = ROWS, columns: int = COLUMNS, dtype: mx.Dtype = mx.float16
) -> tuple[mx.array, mx.array, mx.array]:
    """Random codes, scales and activations."""
    rng = np.random.default_rng(0)
    w = rng.integers(0, 2**32, (rows, columns // 16), np.uint32)
    scales, x = rng.normal(size=(rows, columns // 64)), rng.normal(size=columns)
    return mx.array(w), mx.array(scales).astype(dtype), mx.array(x).astype(dtype)


def reference(w: mx.array, scales: mx.array, x: mx.array) -> np.ndarray:
    """The product in float64."""
    codes = (np.array(w)[:, :, None] >> (2 * np.arange(16, dtype=np.uint32))) & 3
    weights = (codes.reshape(w.shape[0], -1) - 1.5) * np.repeat(np.array(scales.astype(mx.float32), np.float64), 64, 1)
    return weights @ np.array(x.astype(mx.float32), np.float64)


def check(
    source: str = SOURCE, header: str = HEADER, mode: str = "check", **options: Any
) -> tuple[np.ndarray, metal_cpu.Report]:
    """Emulate the kernel with this text on the inputs."""
    grid_rows = options.pop("grid_rows", ROWS)
    columns = options.pop("columns", COLUMNS)
    y, report = metal_cpu.emulate(make(source, header, grid_rows), *inputs(columns=columns), mode=mode, **options)
    return (np.array(y.astype(mx.float32)) if y is not None else np.array([])), report
