"""Random and damaged records through every Metal kernel in the emulator's check mode.

    PYTHONPATH=tests python -m abuse.fuzz_kernels [--count N] [--seed N] [--kernels NAME ...]

The checker must have nothing to report: no read or write outside, no race, nothing used before it is written. Where
numpy's decoder accepts a record, the result must be what it says. Records of the trellis codec, and bytes coded by
rANS, reach a kernel only if the host's check passes them, so those that it refuses are damaged anew; where numpy then
finds a tile of coded bytes damaged, so must the kernel. Of the qmoe codec a kernel trusts the header alone. Launch n of
a kernel is the same in every run with the same seed.
"""

import argparse
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import metal_cpu
import mlx.core as mx
import numpy as np
from metal_cases import Case, activation64, make_case
from qmoe_records import CODINGS, random_record

from abuse import record
from abuse.mutation import mutate, rehash
from tiny_qmoe_mlx import metal, metal_encode, metal_qmoe, metal_rans, native
from tiny_qmoe_mlx.codecs import qmoe, rans, rotation, trellis
from tiny_qmoe_mlx.errors import FormatError

ROUNDING = 2e-5  # of a float32 sum of some hundred products, by the sizes of its terms; seen: 2e-6
OVERFLOW = 1e30  # beyond this a float32 sum may have been infinite on its way


@dataclass
class Launches:
    """What came out so far: how many launches were made, how many results were compared, and what was wrong."""

    made: int = 0
    compared: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)


def emulate(out: Launches, rng: np.random.Generator, function: Callable, *arrays: Any) -> Any:
    """Launch in check mode, lanes in order or in a random one; the result."""
    seed = None if rng.random() < 0.5 else int(rng.integers(1 << 30))
    result, report = metal_cpu.emulate(function, *arrays, mode="check", seed=seed)
    out.made += 1
    out.wrong += report.problems
    return result


def floats(result: mx.array) -> np.ndarray:
    return np.array(result.astype(mx.float32)).astype(np.float64)


def expect(out: Launches, name: str, got: mx.array, want: np.ndarray, error: np.ndarray) -> None:
    """got is want within `error`, wherever that is a number that float32 can have come to."""
    out.compared += 1
    found, fair = floats(got), np.isfinite(error) & (error < OVERFLOW * ROUNDING)
    with np.errstate(invalid="ignore"):
        bad = fair & ~(np.abs(found - want) <= error + 1e-30)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        out.wrong.append(f"{name}: {found[at]:g} at {at} should be {want[at]:g} within {error[at]:g}")


# ---- the trellis codec


@dataclass(frozen=True)
class Instance:
    """What a compiler sees of a launch: L, tokens that may share experts, and how many records there are (inputs of
    fewer than 8 elements lie in constant memory)."""

    length: int
    tokens: int
    experts: int

    @property
    def picks(self) -> int:
        return 2 if self.experts < 8 else 2 * self.tokens


INSTANCES = [Instance(16, 8, 9), Instance(12, 1, 3), Instance(14, 1, 9), Instance(12, 8, 9), Instance(16, 1, 3)]


def damaged_case(rng: np.random.Generator, out: Launches, instance: Instance, name: str = "silu") -> Case:
    """A layer whose records are damaged and pass the host's check all the same."""
    bias, gains = bool(rng.integers(2)), rng.integers(0, 2, 3).astype(bool).tolist()
    d, middle = int(rng.choice([64, 96, 200])), int(rng.choice([32, 40]))
    case = make_case(rng, d, middle, instance.experts, name, bias, instance.length, None, True, None, 0, gains)
    size = len(case.pool) // instance.experts
    case.records = []
    for unit in case.table:
        at = int(unit) * trellis.UNIT
        sound = case.pool[at : at + size]
        data, parsed = damaged_record(rng, out, sound, list(case.layer.shapes), bias, instance.length)
        case.pool[at : at + size] = data
        case.records.append(parsed)
    return case


def damaged_record(
    rng: np.random.Generator, out: Launches, sound: np.ndarray, shapes: list, bias: bool, length: int
) -> tuple[np.ndarray, trellis.Record]:
    """Damaged bytes that are still a record, and its parts; the sound ones after twenty refusals."""
    for _ in range(20):
        data = mutate(rng, sound)
        rehash(data)
        try:
            return data, trellis.parse(data, shapes, bias, "fuzz", length)
        except FormatError:
            out.refused += 1
    return sound, trellis.parse(sound, shapes, bias, "fuzz", length)


def product(case: Case, expert: int, m: int, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix times a row in float64, and how far rounding may carry a float32 sum."""
    matrix = case.records[expert].matrices[m]
    with np.errstate(over="ignore"):
        q = trellis.decode_matrix(matrix, case.records[expert].length)[: matrix.rows].astype(np.float64)
    y, reach = q @ z, np.abs(q) @ np.abs(z)
    if matrix.bias is not None:
        bias = matrix.bias[: len(y)].astype(np.float64)
        y, reach = y + bias, reach + np.abs(bias)
    return y, ROUNDING * reach


def experts_of(rng: np.random.Generator, instance: Instance) -> np.ndarray:
    """Experts of each pick; now and then one that there is not, which must stay inside the pool."""
    ids = rng.integers(0, instance.experts, instance.picks).astype(np.uint32)
    if rng.random() < 0.1:
        ids[rng.integers(len(ids))] = rng.choice([instance.experts, 2**31, 2**32 - 1])
    return ids


def gathered(out: Launches, name: str, got: mx.array, ids: np.ndarray, experts: int, each: Callable) -> None:
    """Compare the rows of picks whose expert there is."""
    rows = [i for i, e in enumerate(ids) if e < experts]
    if rows:
        want, error = zip(*(each(i, int(ids[i])) for i in rows), strict=True)
        expect(out, name, got[mx.array(rows)], np.stack(want), np.stack(error))


def qmv(rng: np.random.Generator, out: Launches, instance: Instance) -> None:
    case = damaged_case(rng, out, instance)
    m, ids = int(rng.integers(3)), experts_of(rng, instance)
    columns = rotation.padded_columns(case.layer.shapes[m][1])
    z = rng.normal(size=(instance.tokens, columns)).astype(np.float32)

    def traced(pool, table, z, ids):
        return metal.gather_qmv(z, ids, metal.Records(pool, table), case.layer, m, instance.tokens, mx.float32)

    got = emulate(out, rng, traced, case.pool, mx.array(case.table), mx.array(z), mx.array(ids))
    shared = instance.picks // instance.tokens
    gathered(
        out, "qmv", got, ids, instance.experts, lambda i, e: product(case, e, m, z[i // shared].astype(np.float64))
    )


def gate_up(rng: np.random.Generator, out: Launches, instance: Instance) -> None:
    name = list(metal.ACTIVATIONS)[INSTANCES.index(instance) % 4]
    case, ids = damaged_case(rng, out, instance, name), experts_of(rng, instance)
    z = rng.normal(size=(instance.tokens, rotation.padded_columns(case.layer.shapes[0][1]))).astype(np.float32)

    def traced(pool, table, z, ids):
        return metal.gather_gate_up(z, ids, metal.Records(pool, table), case.layer, instance.tokens)

    got = emulate(out, rng, traced, case.pool, mx.array(case.table), mx.array(z), mx.array(ids))

    def each(i: int, e: int) -> tuple[np.ndarray, np.ndarray]:
        row = z[i // (instance.picks // instance.tokens)].astype(np.float64)
        gate, gate_error = product(case, e, 0, row)
        up, up_error = (gate, gate_error) if name == "relu2" else product(case, e, 1, row)
        with np.errstate(over="ignore"):
            want = activation64(name, gate, up)
        # Slopes: of the gate's function at most 1.2 times alpha, or 2 |gate|; of the product with up, |gate|.
        error = 3 * gate_error * (1 + np.abs(up) + np.abs(gate)) + up_error * (1 + np.abs(gate))
        return want, error + ROUNDING * np.abs(want)

    gathered(out, f"gate_up {name}", got, ids, instance.experts, each)


def dequantize(rng: np.random.Generator, out: Launches, instance: Instance) -> None:
    case = damaged_case(rng, out, replace(instance, tokens=1))
    m, ids = int(rng.integers(3)), rng.integers(0, instance.experts, 2).astype(np.uint32)

    def traced(pool, table, ids):
        return metal.dequantize(ids, metal.Records(pool, table), case.layer, m, mx.float32)

    weights, _ = emulate(out, rng, traced, case.pool, mx.array(case.table), mx.array(ids))
    rows = case.layer.shapes[m][0]
    want = np.stack([trellis.decode_matrix(case.records[e].matrices[m], instance.length)[:rows] for e in ids])
    # Value and two gains may be multiplied in any order: three roundings of 2^-24.
    expect(out, "dequantize", weights, want.astype(np.float64), 2.5e-7 * np.abs(want.astype(np.float64)))


# ---- the others


def rotate(rng: np.random.Generator, out: Launches, instance: Instance) -> None:
    """Any numbers under any signs; what is finite must come out right."""
    columns = (64, 128, 512)[INSTANCES.index(instance) % 3]
    x = rng.normal(size=(int(rng.integers(1, 4)), columns - int(rng.integers(0, 60)))).astype(np.float32)
    if rng.random() < 0.3:
        x[rng.random(x.shape) < 0.1] = rng.choice(np.array([np.inf, np.nan, 1e-42, 3e38, -0.0], np.float32))
    sign = rng.choice(np.array([-1, 1], np.float32), columns)
    got = emulate(out, rng, lambda x, bits: metal.rotate(x, bits), mx.array(x), metal.sign_bits(sign))
    with np.errstate(invalid="ignore", over="ignore"):
        want = rotation.rotate(x.astype(np.float64), sign)
        error = ROUNDING * np.repeat(np.abs(x).sum(1, keepdims=True), columns, 1)
    expect(out, "rotate", got, want, error)


def viterbi(rng: np.random.Generator, out: Launches, instance: Instance) -> None:
    """Any finite targets: the codes of the C++ library."""
    rate = (1, 4, 6)[INSTANCES.index(instance) % 3]
    x = (rng.standard_normal((1, 32, 16)) * rng.choice([1e-3, 1, 4, 1e4, 1e30])).astype(np.float32)
    codes, values = emulate(out, rng, lambda x: metal_encode.search(x, rate, 12)[:2], mx.array(x))
    want = native.encode_tiles(x, rate, 12)
    expect(out, "viterbi codes", codes, want[0].astype(np.float64), np.zeros(want[0].shape))
    expect(out, "viterbi values", values, want[1].astype(np.float64), np.zeros(want[1].shape))


@dataclass(frozen=True)
class Coded:
    """A layer of one matrix in the qmoe codec, whose records may be damaged anywhere but in the header.

    values: by expert (weights, biases) as numpy decodes them, float64, None where it refuses the record.
    """

    layer: metal_qmoe.Shapes
    pool: np.ndarray
    table: np.ndarray
    values: list[tuple[np.ndarray, np.ndarray] | None]

    def of(self, ids: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(pick, weights, biases) of the picks whose expert there is and whose record is sound."""
        found = [(i, self.values[e]) for i, e in enumerate(ids) if e < len(self.values)]
        return [(i, *values) for i, values in found if values is not None]


def coded_case(rng: np.random.Generator, out: Launches, instance: Instance) -> Coded:
    coding = CODINGS[(3 * INSTANCES.index(instance) + instance.length // 2) % len(CODINGS)]
    bias, shape = instance.tokens > 1, (int(rng.integers(1, 20)), int(rng.integers(8, 100)))
    records = [random_record(rng, coding, [shape], bias, rng.random(), more=0) for _ in range(instance.experts)]
    used = max(map(len, records))
    pool = np.zeros(used * instance.experts, np.uint8)
    for e, sound in enumerate(records):
        pool[e * used : e * used + len(sound)] = mutate(rng, sound, 128, 2) if rng.random() < 0.9 else sound
    values: list[tuple[np.ndarray, np.ndarray] | None] = []
    for data in pool.reshape(-1, used):
        try:
            (m,) = qmoe.parse(data, [shape], bias, coding, "fuzz")
        except FormatError:
            out.refused += 1
            values.append(None)
            continue
        own = np.zeros(shape[0]) if m.bias is None else m.bias.astype(np.float64)
        values.append((qmoe.decode_matrix(m, coding).astype(np.float64), own))
    table = np.arange(instance.experts, dtype=np.uint32) * (used // 128)
    return Coded(metal_qmoe.Shapes(coding, shape, bias), pool, table, values)


def qmoe_qmv(rng: np.random.Generator, out: Launches, instance: Instance) -> None:
    """All but the header may be anything; where numpy still accepts the record, the product is that of its weights."""
    case, ids = coded_case(rng, out, instance), experts_of(rng, instance)
    x = rng.normal(size=(instance.tokens, case.layer.shape[1])).astype(np.float32)

    def traced(pool, table, x, ids):
        return metal_qmoe.gather_qmv(x, ids, metal.Records(pool, table), case.layer, 0, instance.tokens)

    got = emulate(out, rng, traced, case.pool, mx.array(case.table), mx.array(x), mx.array(ids))
    for i, w, own in case.of(ids):
        row = x[i // (instance.picks // instance.tokens)].astype(np.float64)
        expect(out, "qmoe", got[i], w @ row + own, ROUNDING * (np.abs(w) @ np.abs(row) + np.abs(own)))


def qmoe_dequantize(rng: np.random.Generator, out: Launches, instance: Instance) -> None:
    """The same records written out: weights and biases bit for bit."""
    case, ids = coded_case(rng, out, instance), experts_of(rng, instance)

    def traced(pool, table, ids):
        return metal_qmoe.dequantize(ids, metal.Records(pool, table), case.layer, 0, mx.float32)

    weights, biases = emulate(out, rng, traced, case.pool, mx.array(case.table), mx.array(ids))
    for i, w, own in case.of(ids):
        expect(out, "qmoe weights", weights[i], w, np.zeros(w.shape))
        expect(out, "qmoe biases", biases[i], own, np.zeros(own.shape))


# ---- rANS

COUNTS = {1: 0.1, 31: 0.15, 33: 0.15, 400: 0.3, 3000: 0.25, 65536 + 100: 0.05}  # symbols, and how often


def damaged_payload(rng: np.random.Generator, out: Launches, count: int) -> tuple[np.ndarray, rans.Coded]:
    """Coded bytes that pass `rans.parse`, more often damaged than not, and their parts."""
    spread = rng.choice([0.3, 4, 60])
    sound = rans.encode(np.clip(np.rint(rng.normal(128, spread, count)), 0, 255).astype(np.uint8)).pack()
    for _ in range(20 if rng.random() < 0.6 else 0):
        data = mutate(rng, sound)
        try:
            return data, rans.parse(data, count, "fuzz")
        except FormatError:
            out.refused += 1
    return sound, rans.parse(sound, count, "fuzz")


def rans_decode(rng: np.random.Generator, out: Launches, instance: Instance) -> None:
    """Bytes are numpy's where it accepts them; where it does not, a tile is said to be damaged."""
    count = int(rng.choice(list(COUNTS), p=list(COUNTS.values())))
    data, coded = damaged_payload(rng, out, count)
    base, at = int(rng.choice([0, 128])), int(rng.choice([0, 16, 48]))
    pool = np.concatenate([np.full(base + at, 0xA5, np.uint8), data])

    def traced(pool):
        return list(metal_rans.decode(pool, base, at, len(data), coded, count))

    got, faults = emulate(out, rng, traced, pool)
    try:
        want = rans.decode(coded, count, "fuzz")
    except FormatError:
        expect(out, "rans, a damaged tile", faults.max(), np.ones(()), np.zeros(()))
        return
    expect(out, "rans, damaged tiles", faults, np.zeros(faults.shape), np.zeros(faults.shape))
    expect(out, "rans", got, want.astype(np.float64), np.zeros(count))


@dataclass(frozen=True)
class Kernel:
    """A kernel's launch of one instance, and its share of a run."""

    launch: Callable[[np.random.Generator, Launches, Instance], None]
    share: float


KERNELS = {
    "trellis_gather_qmv": Kernel(qmv, 0.25),
    "trellis_gather_gate_up": Kernel(gate_up, 0.15),
    "trellis_dequantize": Kernel(dequantize, 0.1),
    "rotate": Kernel(rotate, 0.1),
    "trellis_viterbi": Kernel(viterbi, 0.002),
    "qmoe_gather_qmv": Kernel(qmoe_qmv, 0.198),
    "qmoe_dequantize": Kernel(qmoe_dequantize, 0.1),
    "rans_decode": Kernel(rans_decode, 0.1),
}


def fuzz(name: str, launches: int, seed: int = 0, instances: int = len(INSTANCES)) -> Launches:
    """Launch a kernel with damaged records; each of its first `instances` instances in turn."""
    out = Launches()
    for n in range(launches):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), n])
        before = len(out.wrong)
        KERNELS[name].launch(rng, out, INSTANCES[n % instances])
        out.wrong[before:] = [f"launch {n}: {problem}" for problem in out.wrong[before:]]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    arguments = parser.parse_args()
    start, total, wrong = time.monotonic(), Counter[str](), []
    figures: dict[str, int | float | str] = {}
    whole = sum(KERNELS[name].share for name in arguments.kernels)
    for name in arguments.kernels:
        found = fuzz(name, max(1, round(arguments.count * KERNELS[name].share / whole)), arguments.seed)
        print(f"{name}: {found.made} launches, {found.compared} compared, {len(found.wrong)} wrong", flush=True)
        print("\n".join(found.wrong[:20]), end="\n" * bool(found.wrong), flush=True)
        total.update(launches=found.made, compared=found.compared, refused=found.refused)
        figures[f"launches of {name}"] = found.made
        wrong += found.wrong
    record.keep(
        1,
        "fuzz_kernels",
        "No record that the host's check passes makes a kernel read or write outside, race, or compute another result.",
        "abuse.fuzz_kernels",
        time.monotonic() - start,
        {
            "launches in check mode": total["launches"],
            "results compared with numpy's decoder": total["compared"],
            "damaged records that were refused": total["refused"],
            **figures,
        },
        len(wrong),
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
