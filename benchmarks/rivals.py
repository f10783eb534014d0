"""What others do to the same weights: the rows beside bench_quality.py's, same text, same scores, every byte counted.

    python benchmarks/rivals.py [--model smollm2|gemma] [--ggml PATH] [--quick] [--json] ["gptq 3" "awq 3" ...]

`METHODS` maps "method asked" to a function (model, calibration tokens) -> (per layer gate, up and down as float32, bits
per weight). Only the feed-forward weights are rounded. Here: GPTQ on MLX's affine grid and QMoE's ternary, layer by
layer through the layers rounded so far, as `convert` goes. rivals_llama_cpp.py: llama.cpp's own quantizer.
rivals_mlx_lm.py: mlx-lm's AWQ and DWQ. A method whose package is not installed raises ModuleNotFoundError, a sentence.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import rivals_llama_cpp
import rivals_mlx_lm
from bench_quality import CALIBRATION, LOADERS, Scorer, passages, report
from dense_llama import Dense, Matrices

from tiny_qmoe_mlx import blas
from tiny_qmoe_mlx.codecs import qmoe_tables

GROUP_SIZE = 64
GPTQ_DAMPING = 0.01  # of the mean of diag(H), as published
RANGES = np.linspace(1.0, 0.5, 11)  # shares of a group's range to try
QMOE_DAMPING, QMOE_BLOCK = 0.1, 128  # QMoE's code

Rounded = tuple[list[Matrices], float]
Method = Callable[[Dense, np.ndarray], Rounded]
RoundMatrix = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (w, sum of x x^T) -> w rounded
# A block of columns, (columns, rows), and what a squared error in each costs -> the rounding of one column, (rows,)
Grid = Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]


def through_layers(model: Dense, tokens: np.ndarray, rounded: RoundMatrix) -> list[Matrices]:
    """Round each layer on what the layers rounded before it give, and down on what the rounded gate and up give.

    Args:
        model: any with the methods of Dense.
        tokens: int (sequences, tokens).
        rounded: gets gate and up as one matrix, then down.
    """
    x = model.embed(tokens)
    out = []
    for i in range(len(model.layers)):
        x = model.attend(i, x)
        z = model.ffn_input(i, x).reshape(-1, x.shape[-1])
        weights = model.feed_forward(i)
        gate, up = np.split(rounded(np.concatenate(weights[:2]), z.T @ z), 2)
        mid = model.ffn_hidden(i, gate, up, z)
        down = rounded(weights[2], mid.T @ mid)
        out.append([gate, up, down])
        x = model.join(i, x, (mid @ down.T).reshape(x.shape))
    return out


def feedback(w: np.ndarray, h: np.ndarray, damping: float, width: int, grid: Grid) -> np.ndarray:
    """Round a matrix column by column; the columns to come make up for each error (GPTQ, arXiv 2210.17323).

    Args:
        w: float32 (rows, columns); columns go in their own order, so groups of them can be stored as they are.
        h: float (columns, columns), sum or mean of x x^T.
        damping: share of the mean of diag(h) that is added to it.
        width: columns of a block; `grid` is called at its start and sees its weights as corrected until then.
    """
    h = h.astype(np.float64)
    h[np.diag_indices_from(h)] += max(damping * np.diag(h).mean(), 1e-6)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32)
    rest, out = np.ascontiguousarray(w.T, dtype=np.float32), np.empty(w.T.shape, np.float32)
    for start in range(0, len(rest), width):
        stop = min(start + width, len(rest))
        rounding = grid(rest[start:stop], np.diag(upper)[start:stop] ** -2.0)
        errors = np.empty((stop - start, rest.shape[1]), np.float32)
        for i in range(start, stop):
            out[i] = rounding(rest[i])
            errors[i - start] = (rest[i] - out[i]) / upper[i, i]
            rest[i + 1 : stop] -= np.outer(upper[i, i + 1 : stop], errors[i - start])
        rest[stop:] -= upper[start:stop, stop:].T @ errors
    return np.ascontiguousarray(out.T)


@dataclass
class Affine:
    """A matrix in MLX's affine format: value = scale * code + bias, a scale and a bias for 64 columns of a row.

    codes: u8 (rows, columns). scales, biases: float16 (rows, columns / 64).
    """

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray

    def values(self) -> np.ndarray:
        scales, biases = (np.repeat(a.astype(np.float32), GROUP_SIZE, 1) for a in (self.scales, self.biases))
        return scales * self.codes + biases

    def bits(self, bits: int) -> int:
        return self.codes.size * bits + 16 * (self.scales.size + self.biases.size)


def gptq_affine(w: np.ndarray, h: np.ndarray, bits: int) -> Affine:
    """GPTQ with the columns in their own order: mlx-lm runs the result as it is."""
    scales, biases = [], []

    def grid(block: np.ndarray, weight: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        scale, bias = best_range(block, weight, bits)
        scales.append(scale.astype(np.float16))
        biases.append(bias.astype(np.float16))
        return lambda column: scale * levels(column, scale, bias, bits) + bias

    rounded = feedback(w, h, GPTQ_DAMPING, GROUP_SIZE, grid)
    narrow = np.stack(scales, 1), np.stack(biases, 1)
    scale, bias = (np.repeat(part.astype(np.float32), GROUP_SIZE, 1) for part in narrow)
    return Affine(levels(rounded, scale, bias, bits).astype(np.uint8), *narrow)


def best_range(block: np.ndarray, weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of each row, float32 of float16 values, with the least weighted error over a few ranges."""
    low, high = np.minimum(block.min(0), 0), np.maximum(block.max(0), 0)
    least, found = np.full(len(low), np.inf, np.float32), np.zeros((2, len(low)), np.float32)
    for share in RANGES.astype(np.float32):
        scale = np.maximum(share * (high - low) / (2**bits - 1), 1e-7).astype(np.float16).astype(np.float32)
        bias = (share * low).astype(np.float16).astype(np.float32)
        error = weight @ (scale * levels(block, scale, bias, bits) + bias - block) ** 2
        better = error < least
        least[better] = error[better]
        found[:, better] = scale[better], bias[better]
    return found[0], found[1]


def levels(w: np.ndarray, scale: np.ndarray, bias: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(np.rint((w - bias) / scale), 0, 2**bits - 1)


def gptq(model: Dense, tokens: np.ndarray, bits: int) -> Rounded:
    """GPTQ on MLX's affine grid, groups of 64."""
    spent: list[int] = []

    def rounded(w: np.ndarray, h: np.ndarray) -> np.ndarray:
        affine = gptq_affine(w, h, bits)
        spent.append(affine.bits(bits))
        return affine.values()

    weights = through_layers(model, tokens, rounded)
    return weights, sum(spent) / _count(model)


def qmoe(model: Dense, tokens: np.ndarray) -> Rounded:
    """QMoE (arXiv 2310.16795): ternary by GPTQ on a grid per row, stored with its dictionary code."""
    spent: list[int] = []

    def rounded(w: np.ndarray, h: np.ndarray) -> np.ndarray:
        values = ternary(w, h)
        spent.append(qmoe_bits(values))
        return values

    weights = through_layers(model, tokens, rounded)
    return weights, sum(spent) / _count(model)


def _count(model: Dense) -> int:
    return sum(w.size for i in range(len(model.layers)) for w in model.feed_forward(i))


def ternary(w: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Each row on {its smallest weight, 0, its largest}, kept as bfloat16, found before any rounding."""
    low, high = bfloat16(np.minimum(w.min(1), 0)), bfloat16(np.maximum(w.max(1), 0))

    def rounding(column: np.ndarray) -> np.ndarray:
        return np.where(column > high / 2, high, np.where(column < low / 2, low, np.float32(0)))

    return feedback(w, h, QMOE_DAMPING, QMOE_BLOCK, lambda block, weight: rounding)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 values (ties to even), float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def codewords(symbols: np.ndarray) -> int:
    """How many codewords of QMoE's dictionary rows of symbols 0, 1, 2 take, int (rows, even columns)."""
    return len(qmoe_tables.encode(symbols.astype(np.uint8), qmoe_tables.dictionary(), paired=True)[0])


def qmoe_bits(values: np.ndarray) -> int:
    """Bits of a ternary matrix as QMoE stores it: codewords of 16; 64 a row for its place and two bfloat16 values."""
    symbols = (values < 0) + 2 * (values > 0)
    return 16 * codewords(symbols) + 64 * (len(values) + 1)


METHODS: dict[str, Method] = {
    **{f"gptq {bits}": partial(gptq, bits=bits) for bits in (2, 3, 4)},
    "qmoe 1.5": qmoe,
    **{f"awq {bits}": partial(rivals_mlx_lm.awq, bits=bits) for bits in (2, 3, 4)},
    **{f"dwq {bits}": partial(rivals_mlx_lm.dwq, bits=bits) for bits in (2, 3, 4)},
    **{f"llama.cpp {name}": partial(rivals_llama_cpp.file_type, name=name) for name in rivals_llama_cpp.FILES},
    **{f"llama.cpp-joined {name}": partial(rivals_llama_cpp.joined, name=name) for name in rivals_llama_cpp.JOINED},
}


def rows(model: Dense, names: list[str], quick: bool) -> list[dict]:
    """A row per method; where a method's package is not installed, one sentence instead."""
    sample = passages(model, *((4, 1) if quick else (CALIBRATION, 8)))
    score, out = Scorer(model, sample), []
    for name in names:
        start = time.perf_counter()
        try:
            weights, bits = METHODS[name](model, sample.calibration)
        except ModuleNotFoundError as error:
            print(f"{name}: {error}")
            continue
        seconds = time.perf_counter() - start
        method, asked = name.split()
        row = {"method": method, "asked": float(asked) if asked[0].isdigit() else asked, "bits": bits}
        out.append(report({**row, **score(weights), "seconds": seconds}))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"of: {', '.join(METHODS)} (default: all)")
    parser.add_argument("--model", default="smollm2", choices=LOADERS, help="the dense model (default: smollm2)")
    parser.add_argument("--ggml", help="a libggml-base for llama.cpp's rows, where llama-cpp-python is not installed")
    parser.add_argument("--quick", action="store_true", help="fewer tokens")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown:
        parser.error(f"methods should be of {', '.join(METHODS)}; received {unknown[0]!r}")
    try:
        rivals_llama_cpp.use(args.ggml)
    except OSError as error:
        parser.error(f"--ggml should be the path of a libggml-base, received {args.ggml!r}: {error}")
    blas.install()
    with blas.shared_machine():
        found = rows(LOADERS[args.model](), args.methods or list(METHODS), args.quick)
    if args.json:
        print(json.dumps({"rivals": found}))


if __name__ == "__main__":
    main()
