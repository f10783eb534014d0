"""Damaged records of every codec through the decoder that is the specification and a second one.

    PYTHONPATH=tests python -m abuse.fuzz_decoders [--count N] [--seed N] [--codecs NAME ...]

Either both refuse a record, with a FormatError of one sentence and never with another exception, or both decode it to
the same weights. The second decoder is the C++ library, or where that has none, MLX (affine) or docs/FORMAT.md read
once more (tuples). Inputs that broke the promise are written to crashes/, where the tests decode them for ever.
"""

import argparse
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from qmoe_records import CODINGS
from qmoe_records import random_record as qmoe_record
from records import pool_of, random_record, stored

from abuse import record
from abuse.mutation import mutate, rehash, resize
from tiny_qmoe_mlx import native, native_qmoe, native_rans
from tiny_qmoe_mlx.codecs import affine, levels, packed, qmoe, rans, trellis, tuples
from tiny_qmoe_mlx.errors import FormatError

CRASHES = Path(__file__).resolve().parent / "crashes"
Shapes = list[tuple[int, int]]
Values = list[np.ndarray] | None  # of the matrices; None where the record is refused


@dataclass
class Codec:
    """One kind of record: sound bytes, its two decoders, and a repair of what a check would only see the hash of."""

    name: str
    sound: np.ndarray
    first: Callable[[np.ndarray], list[np.ndarray]]
    second: Callable[[np.ndarray], Values]
    repair: Callable[[np.ndarray], None] = rehash


@dataclass
class Found:
    """What came out: inputs, those that both decoders took, and what was wrong, with the inputs that were kept."""

    inputs: int = 0
    decoded: int = 0
    wrong: dict[str, list[Path]] = field(default_factory=dict)


def refused_by(decode: Callable[[np.ndarray], Values], data: np.ndarray) -> tuple[Values, str]:
    """What a decoder gives; or None, and why that was no way to refuse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # which a reader of the one sentence would see before it
            return decode(data), ""
    except FormatError as error:
        text = str(error)
        return None, "" if text.startswith("[") and "\n" not in text else f"no sentence: {text!r}"
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def check(codec: Codec, data: np.ndarray) -> tuple[bool, str]:
    """Whether both decoders took the bytes, and what was wrong."""
    first, problem = refused_by(codec.first, data)
    if problem:
        return False, f"the specification: {problem}"
    second, problem = refused_by(codec.second, data)
    if problem:
        return False, f"the second decoder: {problem}"
    if (first is None) != (second is None):
        return False, "refused by the " + ("first alone" if first is None else "second alone")
    if first is None or second is None:
        return False, ""
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if a.shape != b.shape or not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
            return True, f"matrix {i} differs"
    return True, ""


def damaged(rng: np.random.Generator, codec: Codec) -> np.ndarray:
    """Bytes near those of a sound record, at any address."""
    data = codec.sound
    if rng.random() < 0.97:
        half = min(len(data), 160)
        data = mutate(rng, data[:half]) if rng.random() < 0.3 else mutate(rng, data)
        data = np.append(data, codec.sound[half:]) if len(data) < len(codec.sound) else data
    if rng.random() < 0.1:
        data = resize(rng, data)
    if rng.random() < 0.9:
        codec.repair(data)
    shift = int(rng.integers(4)) if rng.random() < 0.3 else 0
    moved = np.empty(len(data) + shift, np.uint8)[shift:]
    moved[:] = data
    return moved


# ---- each codec


def trellis_codec(rng: np.random.Generator) -> Codec:
    shapes: Shapes = [[(40, 70)], [(3, 130), (64, 5)], [(5, 64), (5, 64), (32, 5)]][rng.integers(3)]
    bias, length = bool(rng.integers(2)), int(rng.choice(trellis.LENGTHS))
    sound, _ = pool_of([random_record(rng, shapes, bias, length, row_gain=bool(rng.integers(2)))])
    isas = native.supported_isas()

    def first(data: np.ndarray) -> list[np.ndarray]:
        parsed = trellis.parse(data, shapes, bias, "fuzz")
        return [trellis.decode_matrix(m, parsed.length) for m in parsed.matrices]

    def second(data: np.ndarray) -> Values:
        native.use_isa(isas[data.size // 128 % len(isas)])
        if not native.check_record(data, shapes, bias):
            return None
        padded = [trellis.padded_rows(rows) for rows, _ in shapes]
        return [native.dequantize(data, i, 0, rows) for i, rows in enumerate(padded)]

    return Codec(f"trellis L {length}", sound, first, second)


def qmoe_codec(rng: np.random.Generator) -> Codec:
    coding, bias = CODINGS[rng.integers(len(CODINGS))], bool(rng.integers(2))
    shapes: Shapes = [[(9, 40)], [(3, 17), (17, 3)]][rng.integers(2)]
    sound = qmoe_record(rng, coding, shapes, bias, rng.random(), more=0)

    def first(data: np.ndarray) -> list[np.ndarray]:
        return [qmoe.decode_matrix(m, coding) for m in qmoe.parse(data, shapes, bias, coding, "fuzz")]

    def second(data: np.ndarray) -> Values:
        matrices = qmoe.views(data, shapes, bias, coding, "fuzz")
        if not all(native_qmoe.is_sound(m, coding) for m in matrices):
            return None
        return [native_qmoe.dequantize(m, coding, 0, m.rows) for m in matrices]

    return Codec(f"qmoe {coding.grid} {coding.code} {coding.bits}", sound, first, second)


AFFINE = [("affine", b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
AFFINE += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


def quantized(rng: np.random.Generator, rows: int, mode: str, count: int, group: int, dtype: str) -> dict:
    """A random matrix of 128 columns as mx.quantize packs it."""
    w = mx.array(rng.standard_normal((rows, 128)).astype(np.float32)).astype(getattr(mx, dtype))
    parts = zip(("weight", "scales", "biases"), mx.quantize(w, group, count, mode), strict=False)
    return stored(dict(parts))


def affine_codec(rng: np.random.Generator) -> Codec:
    """MLX dequantizes in the type of the scales, so its numbers are compared in float32 alone."""
    mode, count, group = AFFINE[rng.integers(len(AFFINE))]
    dtype = "uint8" if mode != "affine" else "float32"
    own = affine.Packing(mode, count, group, dtype, "float32" if rng.random() < 0.5 else None)
    shapes: Shapes = [(6, 128), (3, 128)]
    arrays = [quantized(rng, rows, mode, count, group, "float32") for rows, _ in shapes]
    for each, (rows, _) in zip(arrays, shapes, strict=True):
        each |= {"bias": rng.standard_normal(rows).astype(np.float32)} if own.bias else {}
    _, used = affine.layout(tuple(shapes), (own, own))
    sound = affine.pack(arrays, shapes, (own, own), used)

    def first(data: np.ndarray) -> list[np.ndarray]:
        return [affine.decode_matrix(m) for m in affine.parse(data, shapes, (own, own), "fuzz")]

    def second(data: np.ndarray) -> Values:
        return [_by_mlx_or_library(m) for m in affine.parse(data, shapes, (own, own), "fuzz")]

    return Codec(f"affine {mode} {count} {group}", sound, first, second)


def _by_mlx_or_library(m: affine.Matrix) -> np.ndarray:
    """Weights by the C++ library, columns as products with unit vectors, where it takes the matrix; else by MLX."""
    own, parts = m.packing, m.arrays
    if own.mode == "affine" and own.bits in (4, 8) and own.group_size == 64:
        unit = np.eye(128, dtype=np.float32)
        scales, biases = parts["scales"].astype(np.float32), parts["biases"].astype(np.float32)
        products = [
            native.affine_qmv(parts["weight"], scales, biases, own.bits, unit[i : i + 8]) for i in range(0, 128, 8)
        ]
        return np.ascontiguousarray(np.concatenate(products).T)
    rest = [mx.array(parts["scales"]), mx.array(parts["biases"]) if "biases" in parts else None]
    return np.array(
        mx.dequantize(mx.array(parts["weight"]), *rest, own.group_size, own.bits, own.mode, dtype=mx.float32)
    )


def rans_codec(rng: np.random.Generator) -> Codec:
    count, sigma = int(rng.choice([1, 31, 33, 400, 65_600], p=[0.1, 0.2, 0.3, 0.39, 0.01])), rng.choice([0.3, 4, 60])
    sound = rans.encode(np.clip(rng.normal(128, sigma, count), 0, 255).astype(np.uint8)).pack()

    def first(data: np.ndarray) -> list[np.ndarray]:
        return [rans.decode(rans.parse(data, count, "fuzz"), count, "fuzz")]

    def second(data: np.ndarray) -> Values:
        c = rans.parse(data, count, "fuzz")
        found = native_rans.by_library(c.frequencies, c.ends, c.states, c.words, count)
        return None if found is None else [found]

    return Codec("rans", sound, first, second, lambda data: None)


def tuples_codec(rng: np.random.Generator) -> Codec:
    count = int(rng.integers(1, 60))
    symbols = rng.integers(0, 3, count).astype(np.uint8)
    table = np.unique(rng.integers(0, 3, (int(rng.integers(1, 30)), 4)).astype(np.uint8), axis=0)
    sound = tuples.encode(symbols, table).astype("<u2").view(np.uint8)

    def first(data: np.ndarray) -> list[np.ndarray]:
        return [tuples.decode(data[: len(data) // 2 * 2].view("<u2"), count, table, "fuzz")]

    def second(data: np.ndarray) -> Values:
        words = [int(data[i]) + 256 * int(data[i + 1]) for i in range(0, len(data) // 2 * 2, 2)]
        return _tuples_by_the_text(words, count, table.tolist())

    return Codec("tuples", sound, first, second, lambda data: None)


def _tuples_by_the_text(words: list[int], count: int, table: list[list[int]]) -> Values:
    """docs/FORMAT.md, section 8.2, a word at a time."""
    out: list[int] = []
    at = 0
    while at < len(words):
        word, at = words[at], at + 1
        if word != 65535:
            if not 1 <= word <= len(table) or len(out) + 4 > count:
                return None
            out += table[word - 1]
            continue
        size = min(4, count - len(out))
        following = words[at : at + size]
        if size < 1 or len(following) < size or any(w > 255 for w in following):
            return None
        out, at = out + following, at + size
    return [np.array(out, np.uint8)] if len(out) == count else None


PACKINGS = (
    affine.Packing("levels", 8, 128, "float16"),
    affine.Packing("levels", 8, 0, "float32"),
    affine.Packing("plain", 16, 0, "bfloat16"),
    affine.Packing("plain", 32, 0, "float32"),
    affine.Packing("affine", 3, 32, "bfloat16"),
    affine.Packing("affine", 4, 64, "float16"),
)


def _packed_arrays(rng: np.random.Generator, own: affine.Packing, rows: int, columns: int) -> dict[str, np.ndarray]:
    w = rng.standard_normal((rows, columns)).astype(np.float32)
    if own.mode == "levels":
        return levels.quantize(w, own.group_size)
    if own.mode == "plain":
        return {"weight": (w.view(np.uint32) >> 16).astype(np.uint16) if own.scales == "bfloat16" else w}
    return quantized(rng, rows, "affine", own.bits, own.group_size, own.scales)


def packed_codec(rng: np.random.Generator) -> Codec:
    """Records of tiny-qmoe and lossless; of tuples and raw planes there is one decoder, so these must only be sane."""
    packing = tuple(PACKINGS[i] for i in rng.integers(0, len(PACKINGS), 2))
    shapes: Shapes = [(4, 128), (2, 128)]
    arrays = [_packed_arrays(rng, own, *shape) for own, shape in zip(packing, shapes, strict=True)]
    table = tuples.make_table([rng.integers(100, 140, 900).astype(np.uint8)])
    sound = packed.pack(arrays, shapes, packing, str(rng.choice(packed.CODERS)), table)

    def expanded(data: np.ndarray, decode: Any) -> list[np.ndarray]:
        out = []
        for m in packed.expand(data, shapes, packing, "fuzz", table, decode):
            packed.check_values(m, "fuzz")
            out += [np.ascontiguousarray(packed.values(m)), *map(np.ascontiguousarray, m.arrays.values())]
        return out

    def repair(data: np.ndarray) -> None:
        if len(data) >= packed.HEADER and len(data) >= packed.HEADER + packed.ENTRY * int(data[12]):
            data[16:24] = np.frombuffer(np.array([packed._hash(data, int(data[12]))], "<u8").tobytes(), np.uint8)

    first, second = (lambda data: expanded(data, rans.decode)), (lambda data: expanded(data, native_rans.decode))
    return Codec("packed", sound, first, second, repair)


CODECS: dict[str, Callable[[np.random.Generator], Codec]] = {
    "trellis": trellis_codec,
    "affine": affine_codec,
    "qmoe": qmoe_codec,
    "rans": rans_codec,
    "tuples": tuples_codec,
    "packed": packed_codec,
}
DAMAGES = 50  # of each sound record


def sound_record(name: str, seed: int, number: int) -> tuple[np.random.Generator, Codec]:
    """The `number`-th sound record of a codec, and the randomness of its damages."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
    return rng, CODECS[name](rng)


def keep(name: str, seed: int, number: int, data: np.ndarray) -> Path:
    """Write an input to crashes/, from where `replay` reads it."""
    CRASHES.mkdir(exist_ok=True)
    path = CRASHES / f"decoder_{name}_{seed}_{number}_{zlib.crc32(data.tobytes()):08x}"
    path.write_bytes(data.tobytes())
    return path


def replay(path: Path) -> str:
    """Decode a kept input once more; what is wrong, or nothing."""
    _, name, seed, number, _ = path.name.split("_")
    _, codec = sound_record(name, int(seed), int(number))
    return check(codec, np.frombuffer(path.read_bytes(), np.uint8))[1]


def fuzz(name: str, count: int, seed: int = 0) -> Found:
    """Decode `count` damaged records of a codec."""
    found, threads = Found(), native.threads()
    native.set_threads(1)
    for number in range(-(-count // DAMAGES)):
        rng, codec = sound_record(name, seed, number)
        for _ in range(min(DAMAGES, count - found.inputs)):
            data = damaged(rng, codec)
            decoded, problem = check(codec, data)
            found.inputs += 1
            found.decoded += decoded
            if problem:
                found.wrong.setdefault(f"{codec.name}: {problem}", []).append(keep(name, seed, number, data))
    native.set_threads(threads)
    native.use_isa(native.supported_isas()[0])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codecs", nargs="+", choices=list(CODECS), default=list(CODECS))
    arguments = parser.parse_args()
    start, wrong, inputs, decoded = time.monotonic(), 0, 0, 0
    figures: dict[str, int | float | str] = {}
    for name in arguments.codecs:
        found = fuzz(name, -(-arguments.count // len(arguments.codecs)), arguments.seed)
        print(
            f"{name}: {found.inputs} inputs, {found.decoded} decoded by both, {len(found.wrong)} problems", flush=True
        )
        for text, paths in found.wrong.items():
            print(f"  {len(paths)} times, as {paths[0].name}: {text}", flush=True)
        inputs, decoded = inputs + found.inputs, decoded + found.decoded
        wrong += sum(map(len, found.wrong.values()))
        figures[f"{name}: decoded of"] = f"{found.decoded} of {found.inputs}"
    record.keep(
        1,
        "fuzz_decoders",
        "Two decoders of every codec refuse the same damaged records, with a sentence, and agree on all others.",
        "abuse.fuzz_decoders",
        time.monotonic() - start,
        {"damaged records": inputs, "decoded by both": decoded, **figures},
        wrong,
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
