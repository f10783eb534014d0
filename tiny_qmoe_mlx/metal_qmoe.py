"""The Metal kernels of the qmoe codec, and its tables as one buffer; else as in `metal`.

Records must have passed the host's check; but for their headers the kernels bound whatever they read.
"""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from tiny_qmoe_mlx import metal
from tiny_qmoe_mlx.codecs.qmoe import Coding

ROWS = 8  # of a threadgroup, a simdgroup each
ENTRY = 3  # words of a table's entry in the directory


@dataclass(frozen=True)
class Shapes:
    """What the kernel needs to know of a matrix: coding, (rows, columns), and whether experts have biases."""

    coding: Coding
    shape: tuple[int, int]
    bias: bool


@cache
def tables(coding: Coding) -> mx.array:
    """All tables of a coding, u32: for each the places of its starts and of its symbols, and the number of codewords;
    then these, one table after the other.
    """
    directory, parts, at = [], [], ENTRY * coding.tables
    for index in range(coding.tables):
        table = coding.table(index)
        directory += [at, at + len(table.starts32), len(table.lengths)]
        parts += [table.starts32, table.words]
        at += len(table.starts32) + len(table.words)
    return mx.array(np.concatenate([np.array(directory, np.uint32), *parts]))


@cache
def _dense_kernel() -> metal.Kernel:
    return metal.build(
        name="qmoe_dequantize",
        input_names=["pool", "ids", "table", "tables", "params"],
        output_names=["w", "bias"],
        header=metal.source("trellis_decode", "trellis_gather_qmv", "qmoe_gather_qmv", "qmoe_dequantize"),
        source="qmoe_dequantize<LEVELS, BITS, BIAS>(pool, ids, table, tables, params, w, bias, "
        f"{metal._POSITION}, simdgroups_per_threadgroup, {metal._LANE});",
    )


@cache
def _kernel() -> metal.Kernel:
    return metal.build(
        name="qmoe_gather_qmv",
        input_names=["pool", "ids", "table", "x", "tables", "params"],
        output_names=["y"],
        header=metal.source("trellis_decode", "trellis_gather_qmv", "qmoe_gather_qmv"),
        source="qmoe_gather_qmv<LEVELS, BITS, BIAS, W>(pool, ids, table, x, tables, params, y, "
        f"{metal._POSITION}, simdgroups_per_threadgroup, {metal._LANE});",
    )


def gather_qmv(x: mx.array, ids: mx.array, records: metal.Records, layer: Shapes, matrix: int, tokens: int) -> mx.array:
    """Product of each pick's matrix with its row of x, bias included.

    Args:
        x: (tokens or picks, columns), float16, bfloat16 or float32.
        ids: u32 or i32 (picks,), experts; picks is a multiple of x's rows.
        layer: of this matrix.
        matrix: 0, 1, ... in the record.
        tokens: 1 to 64; with more than one, picks of the same expert share a decoding.

    Returns:
        (picks, rows) of x's dtype.

    Raises:
        ValueError: more tokens.
    """
    (rows, columns), picks, width = layer.shape, ids.size, metal._width(tokens)
    shared = picks // x.shape[0]
    params = (records.base, records.table.size, x.shape[0], shared, columns, rows, matrix, layer.coding.tables)
    return _kernel()(
        inputs=[records.pool, ids, records.table, x, tables(layer.coding), metal.numbers(mx.uint32, *params)],
        template=[
            ("LEVELS", layer.coding.levels),
            ("BITS", layer.coding.bits),
            ("BIAS", int(layer.bias)),
            ("W", width),
        ],
        grid=(-(-rows // ROWS) * ROWS * metal.THREADS, shared, x.shape[0]),
        threadgroup=(ROWS * metal.THREADS, 1, 1),
        output_shapes=[(picks, rows)],
        output_dtypes=[x.dtype],
    )[0]


def dequantize(
    ids: mx.array, records: metal.Records, layer: Shapes, matrix: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """One matrix of each listed expert, dense.

    Args:
        ids: u32 or i32 (n,), experts.
        layer, matrix: as `gather_qmv` takes them.

    Returns:
        weights (n, rows, columns) of `dtype`, biases float32 (n, rows), zeros where the records have none.
    """
    rows, columns = layer.shape
    params = (records.base, records.table.size, 0, 0, columns, rows, matrix, layer.coding.tables)
    weights, bias = _dense_kernel()(
        inputs=[records.pool, ids, records.table, tables(layer.coding), metal.numbers(mx.uint32, *params)],
        template=[
            ("T", dtype),
            ("LEVELS", layer.coding.levels),
            ("BITS", layer.coding.bits),
            ("BIAS", int(layer.bias)),
        ],
        grid=(-(-rows // ROWS) * ROWS * metal.THREADS, ids.size, 1),
        threadgroup=(ROWS * metal.THREADS, 1, 1),
        output_shapes=[(ids.size, rows, columns), (ids.size, rows)],
        output_dtypes=[dtype, mx.float32],
    )
    return weights, bias
