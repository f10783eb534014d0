"""Numbers at the ends of their range: gains and activations over all of float16's, outliers, NaN and infinity.

    PYTHONPATH=tests python -m abuse.numbers --count 2000

Experts of noise whose gains are zero, subnormal, ordinary or the largest, on rows that are tiny, ordinary or have
outliers up to 1e4, in float16, bfloat16 and float32, through every path that computes them: C++ of every instruction
set, numpy, and the Metal kernels in the emulator. Where mlx-lm on the same dequantized weights gives a finite number,
so must we, and within the type's rounding of float64; a row that is not finite spoils no other.
"""

import argparse
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import metal_cpu
import mlx.core as mx
import numpy as np
from metal_cases import ALPHA, LIMIT, TOLERANCE, Case, activation64, float64, make_case, module_of

from abuse import record
from tiny_qmoe_mlx import metal, metal_qmoe, native
from tiny_qmoe_mlx.codecs import rotation

PROMISE = "Where mlx-lm on the same dequantized weights gives a finite number, so do all paths, close to float64."
GAINS = {"zero": 0.0, "subnormal": 6e-8, "small": 1e-4, "ordinary": 1.0, "large": 3e3, "largest": 65504.0}
ROWS = ("zeros", "tiny", "ordinary", "outlier", "outliers", "largest", "aligned")
EXPERTS, TOKENS, TOP_K = 3, 4, 2
# bfloat16 rounds hidden values, and float16 weights in prefill, besides results: 4 roundings, of max |y|
ROUNDINGS = 4


@dataclass(frozen=True)
class Trial:
    """One layer with its input: x (TOKENS, d) of a type, and the experts of each token."""

    case: Case
    x: mx.array
    ids: np.ndarray
    words: str


def draw_gains(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Float16 gains of a kind, signs random; the values of a kind are within a factor of 4, or exactly it."""
    spread = 1.0 if kind in ("zero", "subnormal", "largest") else rng.uniform(0.25, 1.0, shape)
    return (GAINS[kind] * spread * rng.choice([-1.0, 1.0], shape)).astype(np.float16)


def draw_rows(rng: np.random.Generator, columns: int, kind: str, sign: np.ndarray) -> np.ndarray:
    """float32 (TOKENS, columns); "aligned": 1e4 with the signs that the rotation gathers in one entry."""
    if kind == "aligned":
        one = np.eye(len(sign))[rng.integers(0, columns, TOKENS)]
        return (1e4 * np.sign(rotation.unrotate(one, sign))[:, :columns]).astype(np.float32)
    x = rng.normal(size=(TOKENS, columns))
    if kind == "zeros":
        x[:] = 0
    if kind == "tiny":
        x *= 1e-6
    if kind == "largest":
        x = np.sign(x) * 1e4
    if kind.startswith("outlier"):
        for row in x:
            row[rng.integers(0, columns, 1 if kind == "outlier" else columns // 4)] = 1e4 * rng.choice([-1, 1])
    return x.astype(np.float32)


def draw_trial(seed: int) -> Trial:
    """Gains of each matrix of a kind of its own; mostly ordinary, so that what comes out is seldom nothing at all."""
    rng, draw = np.random.default_rng(seed), random.Random(seed)
    name = draw.choice(list(metal.ACTIVATIONS))
    d, middle = draw.choice([(64, 64), (136, 104), (256, 192)])
    case = make_case(rng, d, middle, EXPERTS, name, bias=draw.random() < 0.3, length=12, fused=draw.random() < 0.7)
    kinds = []
    for one in case.records:
        for m in one.matrices:
            kind = draw.choice([*GAINS, *["ordinary"] * 6])
            if m.row_gain is not None and kind != "ordinary":
                m.row_gain[:] = draw_gains(rng, m.row_gain.shape, kind)
            kinds.append(kind)
    dtype, rows = draw.choice([mx.float16, mx.bfloat16, mx.float32]), draw.choice(ROWS)
    x = mx.array(draw_rows(rng, d, rows, case.layer.sign_in)).astype(dtype)
    ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)]).astype(np.uint32)
    return Trial(repacked(case), x, ids, f"{name}, {dtype}, {rows}, gains {kinds}")


def repacked(case: Case) -> Case:
    """The pool of a case whose records have been changed."""
    from tiny_qmoe_mlx.codecs import trellis

    size = len(case.pool) // EXPERTS
    table = np.arange(EXPERTS, dtype=np.uint32) * (size // trellis.UNIT)
    pool = np.concatenate([trellis.pack(one, size) for one in case.records])
    return Case(case.layer, case.records, pool, table, 0, case.name)


# ---- what is right


def rounded(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """To the nearest of a type, as float64; beyond its range infinity."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    return np.array(mx.array(single).astype(dtype).astype(mx.float32)).astype(np.float64)


def dense(case: Case, expert: int, m: int) -> np.ndarray:
    """An expert's matrix in the model's own columns, float64 (rows, columns): what dequantizing gives."""
    sign = case.layer.sign_mid if m == len(case.layer.shapes) - 1 else case.layer.sign_in
    return rotation.unrotate(case.matrix(expert, m), sign)[:, : case.layer.shapes[m][1]]


def product(case: Case, expert: int, m: int, x: np.ndarray, dtype: mx.Dtype | None) -> np.ndarray:
    """A row times a matrix and its bias; with a type as mlx-lm computes it, without one in float64."""
    w, bias = dense(case, expert, m), case.records[expert].matrices[m].bias
    bias = 0.0 if bias is None else bias[: len(w)].astype(np.float64)
    if dtype is None:
        return w @ x + bias
    return rounded(rounded(rounded(w, dtype) @ x, dtype) + bias, dtype)


def expert_of(case: Case, expert: int, x: np.ndarray, dtype: mx.Dtype | None) -> np.ndarray:
    """A whole expert on one row, as mlx-lm or in float64; activations of a type are MLX's own."""
    parts = [product(case, expert, m, x, dtype) for m in range(len(case.layer.shapes) - 1)]
    if dtype is None:
        hidden = activation64(case.name, parts[0], parts[-1])
    else:
        own = [mx.array(part.astype(np.float32)).astype(dtype) for part in reversed(parts)]
        hidden = float64(module_of(case.name)(*own))
    return product(case, expert, len(case.layer.shapes) - 1, hidden, dtype)


def of_all(trial: Trial, dtype: mx.Dtype | None) -> np.ndarray:
    """float64 (tokens, k, d)."""
    rows = float64(trial.x)
    with np.errstate(all="ignore"):
        y = [[expert_of(trial.case, int(e), row, dtype) for e in of] for row, of in zip(rows, trial.ids, strict=True)]
    return np.array(y)


# ---- what is computed


def by_cpp(trial: Trial, isa: str) -> mx.array:
    case, layer = trial.case, trial.case.layer
    native.use_isa(isa)
    offsets = (case.table.astype(np.int64) * 128)[trial.ids.reshape(-1)]
    rows = np.repeat(np.arange(TOKENS, dtype=np.int32), TOP_K)
    x = np.array(trial.x.astype(mx.float32))
    signs = layer.sign_in.astype(np.float32), layer.sign_mid.astype(np.float32)
    y = native.gather_moe(case.pool, offsets, x, rows, *signs, case.name, ALPHA, LIMIT)
    return mx.array(y).reshape(*trial.ids.shape, -1).astype(trial.x.dtype)


def by_metal(trial: Trial) -> mx.array:
    records = metal.Records(mx.array(trial.case.pool), mx.array(trial.case.table))
    return metal.experts(trial.x, mx.array(trial.ids), records, trial.case.layer)


def by_metal_prefill(trial: Trial) -> mx.array:
    """As `layers` does for many tokens: each expert decoded, in the model's type."""
    case, flat = trial.case, trial.ids.reshape(-1)
    records = metal.Records(mx.array(case.pool), mx.array(case.table))
    order = np.argsort(flat, kind="stable")
    z = metal.rotate(trial.x, case.layer.bits_in, metal.rotated_dtype(trial.x.dtype))
    rows, place = mx.array((order // TOP_K).astype(np.int32)), mx.array(flat[order])
    ids = mx.array(np.arange(EXPERTS, dtype=np.uint32))
    y = metal.expert_group(z, rows, place, ids, records, case.layer, trial.x.dtype)
    back = mx.array(np.argsort(order).astype(np.int32))
    return y[back].reshape(*trial.ids.shape, -1)


@contextmanager
def emulated() -> Iterator[None]:
    """Metal kernels made inside run in the emulator; gather_mm, which MLX's CPU backend has in float32 alone, rounds
    its float32 sums as a GPU does."""
    named = [item for module in (metal, metal_qmoe) for item in vars(module).items()]
    builders, plain = [made for name, made in named if name.endswith("_kernel")], mx.gather_mm

    def gather_mm(a: mx.array, b: mx.array, **options: object) -> mx.array:
        return plain(a.astype(mx.float32), b.astype(mx.float32), **options).astype(a.dtype)

    for build in builders:
        build.cache_clear()
    mx.gather_mm = gather_mm
    try:
        with metal_cpu.emulated_kernels(mode="run"):
            yield
    finally:
        mx.gather_mm = plain
        for build in builders:
            build.cache_clear()


def paths() -> dict[str, Callable[[Trial], mx.array]]:
    """Those that this machine has."""
    found: dict[str, Callable[[Trial], mx.array]] = {}
    if native.available():
        found |= {f"C++ {isa}": lambda trial, isa=isa: by_cpp(trial, isa) for isa in native.supported_isas()}
    if not metal_cpu.unavailable():
        found |= {"Metal, from records": by_metal, "Metal, prefill": by_metal_prefill}
    return found


def prefill_of(trial: Trial) -> np.ndarray:
    """float64 (tokens, k, d) with what a dense product in the rotated space rounds, and nothing else."""
    case, dtype = trial.case, trial.x.dtype

    def multiply(expert: int, m: int, x: np.ndarray, sign: np.ndarray) -> np.ndarray:
        z = rotation.rotate(x, sign)
        factor = max(1.0, np.abs(z).max() / 32768) if dtype == mx.float16 else 1.0
        bias = case.records[expert].matrices[m].bias
        w = rounded(case.matrix(expert, m), dtype)
        return w @ (rounded(z / factor, dtype) * factor) + (0 if bias is None else bias[: len(w)].astype(np.float64))

    def one(expert: int, row: np.ndarray) -> np.ndarray:
        last = len(case.layer.shapes) - 1
        parts = [rounded(multiply(expert, m, row, case.layer.sign_in), dtype) for m in range(last)]
        hidden = rounded(activation64(case.name, parts[0], parts[-1]), dtype)
        return multiply(expert, last, hidden, case.layer.sign_mid)

    with np.errstate(all="ignore"):
        y = [[one(int(e), row) for e in of] for row, of in zip(float64(trial.x), trial.ids, strict=True)]
    return np.array(y)


def check(trial: Trial, compute: Callable[[Trial], mx.array]) -> None:
    """Raises AssertionError with the place. Errors may be those of mlx-lm, and in prefill those of a rotated row's own
    rounding, twice; a row's largest value is what roundings are counted in. What is right may be so close to the type's
    largest number that such an error takes it beyond."""
    got, dtype = float64(compute(trial)), trial.x.dtype
    theirs, exact = of_all(trial, dtype), of_all(trial, None)
    finite = np.isfinite(theirs) & np.isfinite(exact) & np.isfinite(rounded(exact, dtype))
    known = [theirs, prefill_of(trial)] if compute is by_metal_prefill else [theirs]
    allowed = allowed_errors(trial, exact, finite, known)
    lost = np.argwhere(finite & np.isfinite(rounded(np.abs(exact) + allowed, dtype)) & ~np.isfinite(got))
    assert not len(lost), f"{len(lost)} not finite, the first at {lost[0]}: {exact[tuple(lost[0])]:.4g} is right"
    error = np.where(finite & np.isfinite(got), np.abs(got - exact), 0)
    worst = np.unravel_index(np.argmax(error - allowed), error.shape)
    assert (error <= allowed).all(), f"error {error[worst]:.3g} at {worst} of {exact[worst]:.4g}"


def allowed_errors(trial: Trial, exact: np.ndarray, finite: np.ndarray, known: list[np.ndarray]) -> np.ndarray:
    """float64 (tokens, k, 1): a row's roundings, and twice the errors of other ways to compute it."""
    dtype = trial.x.dtype
    scale = np.abs(np.where(np.isfinite(exact), exact, 0)).max(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        errors = [np.where(finite & np.isfinite(other), np.abs(other - exact), 0) for other in known]
    # subnormals of float16 have an absolute step
    return (
        ROUNDINGS * TOLERANCE[dtype] * scale
        + 2 * sum(e.max(-1, keepdims=True) for e in errors)
        + (6e-8 if dtype == mx.float16 else 1e-37)
    )


# ---- the search


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="layers, each through every path")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start, broken, found = time.monotonic(), 0, Counter()
    with emulated():
        for seed in itertools.islice(itertools.count(args.seed), args.count):
            trial = draw_trial(seed)
            for name, compute in paths().items():
                if name.startswith("C++") and trial.case.layer.fused is None:
                    continue
                try:
                    check(trial, compute)
                except AssertionError as error:
                    broken += 1
                    print(f"seed {seed}, {name}: {trial.words}: {error}", flush=True)
                found[name] += 1
            if broken > 20:
                break
    record.keep(8, "numbers", PROMISE, "abuse.numbers", time.monotonic() - start, found, broken)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
