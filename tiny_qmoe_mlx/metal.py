"""Metal kernels: their text from kernels/*.metal, each built once, and a function per operation.

All functions take and return lazy `mx.array`s and never evaluate, so a decode step of a resident model stays one graph;
they can be traced by `mx.export_function` where there is no GPU. Records must have passed the host's check: a kernel
trusts their headers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from tiny_qmoe_mlx import cuda, kernel_text
from tiny_qmoe_mlx.codecs import rotation, trellis

Kernel = Callable[..., list[mx.array]]
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "swiglu_oai": 2, "relu2": 3}  # TQ_* of trellis_gather_qmv.metal
MAX_TOKENS = 64  # of one product straight from records
WIDTH = 8  # picks of one expert that share a decoding
RECORD_PICKS = 12  # of one expert; see `takes_records`
TARGET_SIMDGROUPS = 768  # of a launch: some 19 for each of 40 cores
DEQUANTIZE_SIMDGROUPS = 4
THREADS = 32  # of a simdgroup
HALF_FITS = 32768.0  # float16 ends at 65504


@dataclass(frozen=True)
class ExpertShapes:
    """What the kernels of one layer of experts need to know.

    shapes: (rows, columns) of gate, up, down, or fc1, fc2; bias: whether they have biases; length: L of all records;
    sign_in, sign_mid: signs of the two rotations, float32 (padded columns,); activation: the module's own, called with
    (up, gate) or (hidden); fused: one of ACTIVATIONS that equals it, with alpha and limit, or None.
    """

    shapes: tuple[tuple[int, int], ...]
    bias: bool
    length: int
    sign_in: np.ndarray
    sign_mid: np.ndarray
    activation: Callable[..., mx.array]
    fused: tuple[str, float, float] | None = None

    @cached_property
    def bits_in(self) -> mx.array:
        return sign_bits(self.sign_in)

    @cached_property
    def bits_mid(self) -> mx.array:
        return sign_bits(self.sign_mid)


@dataclass(frozen=True)
class Records:
    """Where records lie.

    pool: u8, of any shape, contiguous; base: bytes before its first record, such that its address is a multiple of 128;
    table: u32 (experts,): expert e of the layer is 128 * table[e] bytes after base.
    """

    pool: mx.array
    table: mx.array
    base: int = 0


def available() -> bool:
    """Whether MLX would run these kernels: on an Apple GPU, or on an NVIDIA one through cuda.py."""
    return cuda.available() or (mx.metal.is_available() and mx.default_device() == mx.gpu)


def build(**arguments: Any) -> Kernel:
    """A kernel for this machine's GPU; arguments of `mx.fast.metal_kernel`."""
    make: Callable[..., Any] = cuda.kernel if cuda.available() else mx.fast.metal_kernel
    return make(**arguments)


@cache
def source(*names: str) -> str:
    """Text of kernels/<name>.metal, one after the other."""
    return "\n".join(kernel_text.read(f"{name}.metal") for name in names)


_POSITION = "threadgroup_position_in_grid, simdgroup_index_in_threadgroup"
_LANE = "thread_index_in_simdgroup"


@cache
def _rotate_kernel() -> Kernel:
    return build(
        name="rotate",
        input_names=["x", "signs", "params"],
        output_names=["z"],
        header=source("rotate"),
        source=f"threadgroup float shared[H]; rotate_rows<H>(x, signs, params, z, shared, {_POSITION}, {_LANE});",
    )


@cache
def _qmv_kernel() -> Kernel:
    return build(
        name="trellis_gather_qmv",
        input_names=["pool", "ids", "table", "z", "params"],
        output_names=["y"],
        header=source("trellis_decode", "trellis_gather_qmv"),
        source="threadgroup float sums[SG * W * 32]; trellis_gather_qmv<L, W>(pool, ids, table, z, params, y, sums, "
        f"{_POSITION}, simdgroups_per_threadgroup, {_LANE});",
    )


@cache
def _gate_up_kernel() -> Kernel:
    return build(
        name="trellis_gather_gate_up",
        input_names=["pool", "ids", "table", "z", "params", "shape"],
        output_names=["hidden"],
        header=source("trellis_decode", "trellis_gather_qmv"),
        source="threadgroup float sums[2 * SG * W * 32]; "
        "trellis_gather_gate_up<L, W, ACT>(pool, ids, table, z, params, "
        f"shape, hidden, sums, {_POSITION}, simdgroups_per_threadgroup, {_LANE});",
    )


@cache
def _dequantize_kernel() -> Kernel:
    return build(
        name="trellis_dequantize",
        input_names=["pool", "ids", "table", "params"],
        output_names=["w", "bias"],
        header=source("trellis_decode", "trellis_dequantize"),
        source="threadgroup vec<T, 2> staged[SG * 32 * 17]; "
        "trellis_dequantize<L, SG>(pool, ids, table, params, w, bias, staged, "
        f"{_POSITION}, {_LANE});",
    )


@lru_cache(maxsize=4096)
def numbers(dtype: mx.Dtype, *values: float) -> mx.array:
    """A small constant input; kept, so that a call makes no new array."""
    return mx.array(values, dtype=dtype)


def sign_bits(sign: np.ndarray) -> mx.array:
    """Signs as u32 words, bit i of word w set where sign[32 w + i] is negative: what `rotate` takes."""
    return mx.array(np.packbits(sign < 0, bitorder="little").view("<u4"))


def rotate(x: mx.array, signs: mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Rotate rows for a product with stored matrices.

    Args:
        x: (rows, columns), float16, bfloat16 or float32.
        signs: u32 (C / 32,), from `sign_bits`; C is columns rounded up to 64.
        dtype: of the result; computed in float32.

    Returns:
        (rows, C).
    """
    rows, columns = x.shape
    padded = 32 * signs.size
    size = rotation.hadamard_size(padded)
    threads = max(THREADS, size // 8)
    return _rotate_kernel()(
        inputs=[x, signs, numbers(mx.uint32, columns, padded)],
        template=[("H", size), ("Z", dtype)],
        grid=(rows * threads, padded // size, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, padded)],
        output_dtypes=[dtype],
    )[0]


def _width(tokens: int) -> int:
    """Picks of one expert that a threadgroup serves at once; more than one only where tokens may share experts."""
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(
            f"[metal.experts] records are multiplied with 1 to {MAX_TOKENS} tokens but {tokens} were given."
        )
    return 1 if tokens == 1 else WIDTH


def takes_records(picks: int, experts: int) -> bool:
    """Whether `experts` costs less than `expert_group`, for a router that favours no expert.

    By the issue slots that the emulator counts for a weight at 2 bits and 16 state bits: products from records take 5.2
    for each decoding (of up to 8 picks) and 1.7 a pick; the dense decoder takes 14, and MLX's gather_mm about 1.1 (an
    assumption, nothing was timed) for each row of a tile of at least 16. They meet at 12 picks of one expert.
    """
    chosen = experts * (1 - (1 - 1 / experts) ** picks)
    return picks <= RECORD_PICKS * chosen


def _simdgroups(tiles: int, picks: int, blocks: int, width: int) -> int:
    """Simdgroups that share one row tile: enough for the GPU, no more than keep two blocks each. A power of two."""
    most = 8 if width == 1 else 4
    count = 1
    while count < most and tiles * picks * count < TARGET_SIMDGROUPS and 4 * count <= blocks:
        count *= 2
    return count


def _launch(rows: int, z: mx.array, picks: int, width: int) -> dict:
    tiles = trellis.padded_rows(rows) // trellis.ROW_TILE
    count = _simdgroups(tiles, picks, z.shape[1] // rotation.COLUMN_BLOCK, width)
    return {
        "grid": (tiles * count * THREADS, picks // z.shape[0], z.shape[0]),
        "threadgroup": (count * THREADS, 1, 1),
        "output_shapes": [(picks, rows)],
    }


def gather_qmv(
    z: mx.array, ids: mx.array, records: Records, layer: ExpertShapes, matrix: int, tokens: int, dtype: mx.Dtype
) -> mx.array:
    """Product of each pick's matrix with its row of z, bias included.

    Args:
        z: float32 (tokens or picks, C), rotated.
        ids: u32 or i32 (picks,), experts; picks is a multiple of z's rows.
        matrix: 0, 1, ... in the record.
        tokens: 1 to 64; with more than one, picks of the same expert share a decoding.

    Returns:
        (picks, rows) of `dtype`.
    """
    rows, picks, width = layer.shapes[matrix][0], ids.size, _width(tokens)
    params = (records.base, records.table.size, z.shape[0], picks // z.shape[0], z.shape[1], rows, matrix)
    return _qmv_kernel()(
        inputs=[records.pool, ids, records.table, z, numbers(mx.uint32, *params)],
        template=[("T", dtype), ("L", layer.length), ("W", width), ("SG", 8 if width == 1 else 4)],
        output_dtypes=[dtype],
        **_launch(rows, z, picks, width),
    )[0]


def gather_gate_up(z: mx.array, ids: mx.array, records: Records, layer: ExpertShapes, tokens: int) -> mx.array:
    """Gate, up and the fused activation (or fc1 and its activation) of each pick; arguments as in `gather_qmv`.

    Returns:
        float32 (picks, rows of gate).
    """
    if layer.fused is None:
        raise ValueError("[metal.gather_gate_up] needs one of the fused activations; use gather_qmv for each matrix.")
    name, alpha, limit = layer.fused
    rows, picks, width = layer.shapes[0][0], ids.size, _width(tokens)
    params = (records.base, records.table.size, z.shape[0], picks // z.shape[0], z.shape[1], rows, 0)
    shape = numbers(mx.float32, alpha, limit)
    return _gate_up_kernel()(
        inputs=[records.pool, ids, records.table, z, numbers(mx.uint32, *params), shape],
        template=[("L", layer.length), ("W", width), ("ACT", ACTIVATIONS[name]), ("SG", 8 if width == 1 else 4)],
        output_dtypes=[mx.float32],
        **_launch(rows, z, picks, width),
    )[0]


def experts(x: mx.array, indices: mx.array, records: Records, layer: ExpertShapes) -> mx.array:
    """Whole experts for a few tokens, four launches: rotation, gate and up, rotation, down.

    Args:
        x: (..., d), float16, bfloat16 or float32; 1 to 64 tokens.
        indices: u32 or i32 (..., k), as the router gives them.

    Returns:
        (..., k, d) in x's dtype: each pick's output, biases included, router weights not.

    Raises:
        ValueError: more than 64 tokens.
    """
    tokens = x.reshape(-1, x.shape[-1])
    ids, count, last = indices.reshape(-1), tokens.shape[0], len(layer.shapes) - 1
    z = rotate(tokens, layer.bits_in)
    if layer.fused:
        hidden = gather_gate_up(z, ids, records, layer, count)
    else:
        parts = [gather_qmv(z, ids, records, layer, m, count, x.dtype) for m in range(last)]
        hidden = layer.activation(*reversed(parts))
    y = gather_qmv(rotate(hidden, layer.bits_mid), ids, records, layer, last, count, x.dtype)
    return y.reshape(*indices.shape, y.shape[-1])


def dequantize(
    ids: mx.array, records: Records, layer: ExpertShapes, matrix: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """One matrix of each listed expert, dense, in the rotated space.

    Args:
        ids: u32 or i32 (n,), experts.

    Returns:
        weights (n, rows, C) of `dtype`, biases float32 (n, rows), zeros where the records have none.
    """
    rows, columns = layer.shapes[matrix]
    padded = rotation.padded_columns(columns)
    tiles = trellis.padded_rows(rows) // trellis.ROW_TILE
    count = DEQUANTIZE_SIMDGROUPS
    weights, bias = _dequantize_kernel()(
        inputs=[
            records.pool,
            ids,
            records.table,
            numbers(mx.uint32, records.base, records.table.size, rows, padded, matrix),
        ],
        template=[("T", dtype), ("L", layer.length), ("SG", count)],
        grid=(tiles * count * THREADS, ids.size, 1),
        threadgroup=(count * THREADS, 1, 1),
        output_shapes=[(ids.size, rows, padded), (ids.size, rows)],
        output_dtypes=[dtype, mx.float32],
    )
    return weights, bias


def rotated_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """The type of rotated rows before a dense product in `dtype`: a rotation can gather a row of 1e4s in one entry of
    up to 45 times as much, beyond float16."""
    return mx.float32 if dtype == mx.float16 else dtype


def expert_group(
    z: mx.array,
    rows: mx.array,
    place: mx.array,
    ids: mx.array,
    records: Records,
    layer: ExpertShapes,
    dtype: mx.Dtype | None = None,
) -> mx.array:
    """Prefill: the picks of a group of experts, each decoded once and multiplied by MLX's gather_mm.

    Args:
        z: (tokens, C), rotated inputs, of type `rotated_dtype(dtype)`.
        rows: int (picks,), token of each pick; picks sorted by expert.
        place: u32 (picks,), which of `ids` each pick takes; ascending.
        ids: u32 or i32 (n,), experts.
        dtype: the model's; z's where it is not given.

    Returns:
        (picks, d) of `dtype`, biases included, in the order of `rows`.
    """
    last, dtype = len(layer.shapes) - 1, dtype or z.dtype
    parts = [_dense_product(z[rows], m, place, ids, records, layer, dtype) for m in range(last)]
    hidden = rotate(layer.activation(*reversed(parts)), layer.bits_mid, rotated_dtype(dtype))
    return _dense_product(hidden, last, place, ids, records, layer, dtype)


def _dense_product(
    z: mx.array, matrix: int, place: mx.array, ids: mx.array, records: Records, layer: ExpertShapes, dtype: mx.Dtype
) -> mx.array:
    weights, bias = dequantize(ids, records, layer, matrix, dtype)
    biases = bias if layer.bias else None
    if z.dtype == dtype:
        return gathered(z, weights, biases, place)
    scale = _scale(z)
    y = gathered((z / scale).astype(dtype), weights, None, place).astype(mx.float32) * scale
    return (y if biases is None else y + biases[place]).astype(dtype)


def _scale(z: mx.array) -> mx.array:
    """Powers of two (rows, 1), 1 but for rows that would leave float16 or come near it."""
    largest = mx.abs(z).max(axis=-1, keepdims=True)
    return mx.power(2.0, mx.maximum(0.0, mx.ceil(mx.log2(largest / HALF_FITS))))


def gathered(z: mx.array, weights: mx.array, bias: mx.array | None, place: mx.array) -> mx.array:
    """Rows z (picks, C) times dense matrices (n, rows, C), each with the one at its `place`, ascending; with biases
    (n, rows) where there are any.
    """
    y = mx.gather_mm(z[:, None, :], weights.swapaxes(-1, -2), rhs_indices=place, sorted_indices=True)[:, 0, :]
    return y if bias is None else (y + bias[place]).astype(z.dtype)
