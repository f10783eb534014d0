"""Which of our rates has the weight error of llama.cpp's Q3_K and IQ3_S on Gaussian matrices.

    python benchmarks/equal_quality.py [--lengths 12,16] [--types Q3_K,IQ3_S] [--quick] [--json]

The matrices have the shapes of Qwen3-30B-A3B's experts. llama.cpp's own quantizer rounds them: Q3_K twice, without an
importance matrix and with one of all ones (which makes it search better), IQ3_S with the latter, which it wants. Ours:
the error of the code at its whole rates (2, 2.5, 3, 4 bits), measured on Gaussian tiles; any bits between mix two of
them by 64-column blocks, so the error is their mean and a table follows. The rate of equal error is read off it and
then checked: an expert is converted at that rate into a real record, decoded, and compared. Bits count all bytes.
"""

import argparse
import ctypes
from collections.abc import Iterator

import numpy as np
from common import machine, print_json, print_table
from rivals_llama_cpp import library

from tiny_qmoe_mlx import native
from tiny_qmoe_mlx.codecs import trellis
from tiny_qmoe_mlx.codecs.rotation import COLUMN_BLOCK, signs, unrotate
from tiny_qmoe_mlx.codecs.trellis_scale import GAUSSIAN
from tiny_qmoe_mlx.conversion.quantize import ExpertInputs, quantize_layer, record_bytes_for
from tiny_qmoe_mlx.conversion.rates import file_bytes, fixed_bytes

SHAPES = [(768, 2048), (768, 2048), (2048, 768)]  # gate, up, down of an expert of Qwen3-30B-A3B
QUICK_SHAPES = [(64, 512), (64, 512), (512, 256)]
EXPERTS = 128
HEADER = 512
RATES = (4, 5, 6, 7)  # of the trellis code: 2, 2.5, 3 and 4 bits
GRID = (2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0)
CLOSE_DB = 0.1
TILES = {12: 1024, 14: 256, 16: 64}  # that the code's error is measured on: half a million weights at L 12


def gaussian(shapes: list[tuple[int, int]], seed: int = 0) -> list[np.ndarray]:
    """Float32 matrices of a unit Gaussian."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def decibels(power: float) -> float:
    return 10 * float(np.log10(power))


def relative_error(weights: list[np.ndarray], rounded: list[np.ndarray]) -> float:
    """Power of the error over the power of the weights, of all matrices together."""
    error = sum(float(np.square(w - r, dtype=np.float64).sum()) for w, r in zip(weights, rounded, strict=True))
    return error / sum(float(np.square(w, dtype=np.float64).sum()) for w in weights)


def rounded_by_llama_cpp(w: np.ndarray, name: str, importance: bool) -> tuple[np.ndarray, int]:
    """A matrix after a trip through a ggml type, float32, and its bytes; importance: a matrix of all ones, or none."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[kind]
    data = np.zeros((len(w), w.shape[1] // block * size), np.uint8)
    base, ones = library(), np.ones(w.shape[1], np.float32)
    base.ggml_quantize_init.argtypes = [ctypes.c_int]
    base.ggml_quantize_init(kind.value)
    weight = ones.ctypes.data if importance else None
    base.ggml_quantize_chunk(kind.value, w.ctypes.data, data.ctypes.data, 0, *w.shape, weight)
    return dequantize(data, kind).astype(np.float32), data.nbytes


def llama_cpp_rows(weights: list[np.ndarray], types: list[str]) -> Iterator[dict]:
    """Bits and error of each ggml type, with and without an importance matrix of ones."""
    for name in types:
        for importance in (True, False) if name.endswith("_K") else (True,):
            parts = [rounded_by_llama_cpp(w, name, importance) for w in weights]
            bits = 8 * sum(size for _, size in parts) / sum(w.size for w in weights)
            error = relative_error(weights, [values for values, _ in parts])
            yield {"type": name, "importance": importance, "bits": bits, "db": decibels(error)}


def code_errors(length: int, tiles: int, seed: int = 1) -> dict[float, float]:
    """Mean squared error of the code on a unit Gaussian, measured: payload bits -> error."""
    x = np.random.default_rng(seed).standard_normal((tiles, 32, 16), dtype=np.float32)
    out = {}
    for rate in RATES:
        scale = np.float32(GAUSSIAN[length, rate][0])
        _, values = native.encode_tiles(x / scale, rate, length)
        out[float(trellis.BITS[rate])] = relative_error([x], [values * scale])
    return out


def side_bits(shapes: list[tuple[int, int]]) -> float:
    """Bits per weight of an experts file that are not payload: gains, order, rates, headers, checksums."""
    weights = sum(rows * columns for rows, columns in shapes)
    record = weights * 3 // 8 // 4096 * 4096
    fixed = fixed_bytes(shapes, [False] * len(shapes), False)  # rows of like power keep no gains
    return 8 * (fixed + file_bytes(record, EXPERTS, 4096, HEADER) / EXPERTS - record) / weights


def curve(errors: dict[float, float], side: float) -> tuple[np.ndarray, np.ndarray]:
    """All bits, and the error there: straight lines between the whole rates, whose blocks are mixed."""
    bits = np.array(sorted(errors))
    return bits + side, np.array([errors[b] for b in bits])


def bits_at(db: float, bits: np.ndarray, error: np.ndarray) -> float:
    """The bits whose error is this many dB, on the curve's lines."""
    return float(np.interp(10 ** (db / 10), error[::-1], bits[::-1]))


def converted(weights: list[np.ndarray], bits: float, length: int) -> tuple[float, float]:
    """An expert converted at these bits into a record and decoded again: bits of all bytes, error in dB."""
    shapes = [w.shape for w in weights]
    record_bytes, alignment = record_bytes_for(bits, shapes, EXPERTS)
    sides = [signs(0, 0, side, w.shape[1]) for side, w in ((0, weights[0]), (1, weights[-1]))]
    inputs = ExpertInputs(weights, *(np.eye(w.shape[1], dtype=np.float32) for w in (weights[0], weights[-1])))
    (record,) = quantize_layer([inputs], *sides, record_bytes, length)
    data = trellis.pack(record, record_bytes)
    rounded = [_decoded(data, i, record.matrices[i].order, w.shape, sides[i == 2]) for i, w in enumerate(weights)]
    total = file_bytes(record_bytes, EXPERTS, alignment, HEADER) / EXPERTS
    return 8 * total / sum(w.size for w in weights), decibels(relative_error(weights, rounded))


def _decoded(data: np.ndarray, i: int, order: np.ndarray, shape: tuple[int, int], sign: np.ndarray) -> np.ndarray:
    stored = native.dequantize(data, i, 0, trellis.padded_rows(shape[0]))
    natural = np.empty_like(stored)
    columns = (np.asarray(order, np.int64)[:, None] * COLUMN_BLOCK + np.arange(COLUMN_BLOCK)).ravel()
    natural[:, columns] = stored
    return unrotate(natural, sign)[: shape[0], : shape[1]]


def equal_rates(weights: list[np.ndarray], theirs: list[dict], length: int, curve_of: tuple) -> Iterator[dict]:
    """For each of their types: our rate of equal error, found on the curve and checked on a record."""
    for row in theirs:
        wanted = bits_at(row["db"], *curve_of)
        bits, db = converted(weights, wanted, length)
        # A record holds whole blocks of 64 columns: one correction by the curve's slope where it fell short
        if abs(db - row["db"]) > CLOSE_DB / 2:
            wanted += bits_at(row["db"], *curve_of) - bits_at(db, *curve_of)
            bits, db = converted(weights, wanted, length)
        equal = {"type": row["type"], "importance": row["importance"], "length": length, "asked": wanted}
        close = abs(db - row["db"]) <= CLOSE_DB
        yield {**equal, "bits": bits, "db": db, "their_db": row["db"], "close": close, "ratio": bits / row["bits"]}


def report(theirs: list[dict], curves: dict[int, tuple], equal: list[dict]) -> None:
    """Three tables: their types, our rates, the rates of equal error."""
    word = {True: "ones", False: "none"}
    print_table(
        ["llama.cpp", "importance", "bits", "dB"],
        [[r["type"], word[r["importance"]], f"{r['bits']:.4f}", r["db"]] for r in theirs],
    )
    print()
    grid = [
        [f"{b:.2f}", *(decibels(float(np.interp(b, *curves[length]))) for length in curves)]
        for b in GRID
        if all(curves[length][0][0] <= b <= curves[length][0][-1] for length in curves)
    ]
    print_table(["ours, all bits", *(f"L {length} dB" for length in curves)], grid)
    print()
    print_table(
        ["equal to", "importance", "L", "ours dB", "theirs dB", "ours bits", "ours / theirs"],
        [
            [r["type"], word[r["importance"]], r["length"], r["db"], r["their_db"], f"{r['bits']:.4f}", r["ratio"]]
            for r in equal
        ],
    )


def measure(lengths: list[int], types: list[str], shapes: list[tuple[int, int]], fewer: int = 1) -> dict:
    """Everything that the tables show; fewer: divides the tiles that the code is measured on."""
    weights = gaussian(shapes)
    theirs = list(llama_cpp_rows(weights, types))
    side = side_bits(shapes)
    errors = {length: code_errors(length, max(TILES[length] // fewer, 4)) for length in lengths}
    curves = {length: curve(errors[length], side) for length in lengths}
    equal = [row for length in lengths for row in equal_rates(weights, theirs, length, curves[length])]
    return {"llama_cpp": theirs, "curves": curves, "equal": equal, "side_bits": side}


def main() -> None:
    """Print the tables, and with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="12,16", help="of the trellis, L (default 12,16)")
    parser.add_argument("--types", default="Q3_K,IQ3_S", help="ggml types (default Q3_K,IQ3_S)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small matrices and few tiles: seconds, and less exact")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    native.set_threads(args.threads)
    lengths = [int(n) for n in args.lengths.split(",")]
    shapes, fewer = (QUICK_SHAPES, 16) if args.quick else (SHAPES, 1)
    found = measure(lengths, args.types.split(","), shapes, fewer)
    report(found["llama_cpp"], found["curves"], found["equal"])
    if args.json:
        found["curves"] = {
            length: [list(map(float, axis)) for axis in axes] for length, axes in found["curves"].items()
        }
        print_json({**found, "machine": machine()})


if __name__ == "__main__":
    main()
