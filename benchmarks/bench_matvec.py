"""Fused C++ products straight from trellis records, beside MLX's quantized and float16 products, one token, on the CPU.

    python benchmarks/bench_matvec.py [--quick] [--json]

Shapes of Qwen3-30B-A3B: gate and up 768 x 2048, down 2048 x 768, 8 experts a token. A `gate` or `down` row multiplies
one matrix of each of 8 experts with a token: ours with one gather_qmv of 8 picks, MLX with one product of the 8
matrices stacked, which spares it the gathering. A `moe` row is the whole expert layer: gather_moe; mx.gather_qmm with
SwiGLU; plain float16 products. Activations are float32 (float16 beside float16 weights).
All cases take turns in one process. MLX's CPU backend has no setting for its threads: `cores` is CPU time over wall
time, and shows that its products run on one; `threads` is the number that ours were given. On a machine with other work
compare `cpu_vs_mlx_4bit`, the ratio of CPU times, in which waiting for a core does not count.
"""

import argparse

import common
import numpy as np

import tiny_qmoe_mlx  # noqa: F401 (before mlx: it may give MLX a faster BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn

from tiny_qmoe_mlx import native
from tiny_qmoe_mlx.codecs import rotation, trellis

HIDDEN, MIDDLE, EXPERTS, STORED = 2048, 768, 8, 32
SHAPES = [(MIDDLE, HIDDEN), (MIDDLE, HIDDEN), (HIDDEN, MIDDLE)]
RATES = (2, 3, 4)
GROUP = 64


def noise_matrix(rng: np.random.Generator, rows: int, columns: int, rate: int) -> trellis.Matrix:
    """One rate in all blocks; a payload of noise decodes as fast as any other."""
    blocks = columns // 64
    return trellis.Matrix(
        rows=rows,
        columns=columns,
        rates=np.full(blocks, rate, np.uint8),
        order=rng.permutation(blocks),
        block_gain=(0.02 * rng.standard_normal(4 * blocks)).astype(np.float16),
        row_gain=(1 + 0.1 * rng.standard_normal(rows)).astype(np.float16),
        bias=None,
        payload=rng.integers(0, 2**32, (rows // 32, 32 * int(trellis.PLANES[rate]) * blocks), np.uint32),
    )


class Ours:
    """A pool of experts at one rate, and this benchmark's calls on it."""

    def __init__(self, rng: np.random.Generator, rate: int, x: np.ndarray, experts: np.ndarray):
        self.records = [trellis.Record(12, [noise_matrix(rng, *s, rate) for s in SHAPES]) for _ in range(STORED)]
        size = 128 + sum(trellis.side_bytes(*s, True, False) + 4 * m.payload.size for s, m in self._parts())
        self.pool = np.concatenate([trellis.pack(r, size) for r in self.records])
        self.bits = 8 * size / sum(rows * columns for rows, columns in SHAPES)
        self.x, self.experts, self.offsets = x, experts, experts * size
        self.rows_of = np.zeros(len(experts), np.int32)
        self.signs = [rotation.signs(0, 0, side, n) for side, n in enumerate((HIDDEN, MIDDLE))]

    def _parts(self):
        return zip(SHAPES, self.records[0].matrices, strict=True)

    def matvec(self, index: int) -> np.ndarray:
        rows, columns = SHAPES[index]
        sign = self.signs[index == 2]
        return native.gather_qmv(self.pool, self.offsets, index, self.x[:, :columns], self.rows_of, sign)

    def moe(self) -> np.ndarray:
        return native.gather_moe(self.pool, self.offsets, self.x, self.rows_of, *self.signs, native.SILU)

    def dense(self, expert: int, index: int) -> np.ndarray:
        """The matrix in the model's space, by the numpy specification."""
        q = trellis.decode_matrix(self.records[expert].matrices[index], 12)
        return rotation.unrotate(q, self.signs[index == 2])

    def check(self) -> None:
        """Compare one expert with float64; a wrong kernel is not timed."""
        expert = int(self.experts[3])
        gate, up, down = (self.dense(expert, i).astype(np.float64) for i in range(3))
        x = self.x[0].astype(np.float64)
        g, u = gate @ x, up @ x
        for got, want in ((self.matvec(0)[3], g), (self.moe()[3], down @ (g / (1 + np.exp(-g)) * u))):
            error = np.abs(got - want).max() / np.abs(want).max()
            if not error < 1e-4:
                raise SystemExit(f"error: the result is off by {error:.1e} of its largest entry")


class Mlx:
    """The same experts' shapes in MLX, at some bits or in float16."""

    def __init__(self, rng: np.random.Generator, bits: int, x: np.ndarray, experts: np.ndarray):
        self.bits, self.picks = bits, mx.array(experts[None].astype(np.uint32))
        dtype = mx.float16 if bits == 16 else mx.float32
        self.x = mx.array(x).astype(dtype)
        self.stacks = []
        for rows, columns in SHAPES:
            w = mx.array(0.02 * rng.standard_normal((STORED, rows, columns)).astype(np.float16)).astype(dtype)
            self.stacks.append((w,) if bits == 16 else mx.quantize(w, GROUP, bits))
        mx.eval(self.stacks)
        # For the plain product the picked experts' matrices lie one after the other, as one tall matrix.
        self.tall = [[mx.contiguous(p[self.picks[0]].reshape(-1, p.shape[-1])) for p in s] for s in self.stacks]
        mx.eval(self.tall)
        # mx.gather_mm takes float32 only on the CPU, so the float16 experts are multiplied one by one.
        self.float_experts = [[s[0][int(e)] for e in experts] for s in self.stacks] if bits == 16 else None

    def matvec(self, index: int) -> None:
        x, parts = self.x[:, : SHAPES[index][1]], self.tall[index]
        if self.bits == 16:
            mx.eval(x @ parts[0].T)
        else:
            mx.eval(mx.quantized_matmul(x, *parts, transpose=True, group_size=GROUP, bits=self.bits))

    def moe(self) -> None:
        if self.float_experts:
            mx.eval([self._float_expert(*matrices) for matrices in zip(*self.float_experts, strict=True)])
            return
        x = self.x[:, None, None]
        gate, up = (self._gather(x, i) for i in (0, 1))
        mx.eval(self._gather(nn.silu(gate) * up, 2))

    def _float_expert(self, gate: mx.array, up: mx.array, down: mx.array) -> mx.array:
        return (nn.silu(self.x @ gate.T) * (self.x @ up.T)) @ down.T

    def _gather(self, x: mx.array, index: int) -> mx.array:
        stack = self.stacks[index]
        return mx.gather_qmm(x, *stack, rhs_indices=self.picks, transpose=True, group_size=GROUP, bits=self.bits)


def case_calls(ours: dict[int, Ours], theirs: dict[int, Mlx], part: str) -> dict[str, tuple[float, object]]:
    """Bits and call of every case of a part: "gate", "down" or "moe"."""
    index = {"gate": 0, "down": 2}.get(part)
    cases = {}
    for rate, o in ours.items():
        cases[f"trellis rate {rate}"] = (o.bits, o.moe if index is None else lambda o=o: o.matvec(index))
    for bits, m in theirs.items():
        name = "mlx float16" if bits == 16 else f"mlx {bits}-bit"
        total = bits if bits == 16 else bits + 64 / GROUP  # float32 scale and bias a group
        cases[name] = (total, m.moe if index is None else lambda m=m: m.matvec(index))
    return cases


Row = dict[str, object]
COLUMNS = "threads bits median_us gweights_per_s best_gweights_per_s cores vs_mlx_4bit cpu_vs_mlx_4bit".split()


def measure(ours: dict[int, Ours], theirs: dict[int, Mlx], part: str, threads: int, rounds: int) -> list[Row]:
    """Rows of one part with one number of threads."""
    native.set_threads(threads)
    weights = EXPERTS * HIDDEN * MIDDLE * (3 if part == "moe" else 1)
    cases = case_calls(ours, theirs, part)
    seen = common.interleaved({name: call for name, (_, call) in cases.items()}, rounds)
    base = seen["mlx 4-bit"]
    return [
        {
            "part": part,
            "case": name,
            "threads": threads if name.startswith("trellis") else None,
            "bits": round(bits, 3),
            "median_us": round(1e6 * seen[name]["median_s"], 1),
            "best_us": round(1e6 * seen[name]["best_s"], 1),
            "gweights_per_s": round(weights / seen[name]["median_s"] / 1e9, 2),
            "best_gweights_per_s": round(weights / seen[name]["best_s"] / 1e9, 2),
            "cores": round(seen[name]["cores"], 2),
            "vs_mlx_4bit": round(base["median_s"] / seen[name]["median_s"], 2),
            "cpu_vs_mlx_4bit": round(base["cpu_s"] / seen[name]["cpu_s"], 2),
        }
        for name, (bits, _) in cases.items()
    ]


def main() -> None:
    """Print a table, and with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if not native.available():
        raise SystemExit("error: the C++ library is not built; run `pip install .` where a C++ compiler exists")
    mx.set_default_device(mx.cpu)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, HIDDEN)).astype(np.float32)
    experts = rng.permutation(STORED)[:EXPERTS].astype(np.int64)
    ours = {rate: Ours(rng, rate, x, experts) for rate in RATES}
    for o in ours.values():
        o.check()
    theirs = {bits: Mlx(rng, bits, x, experts) for bits in (4, 2, 16)}
    rows = []
    for part in ("gate", "down", "moe"):
        for threads in (1, 2):
            rows += measure(ours, theirs, part, threads, 7 if args.quick else 41)
    table = [[f"{r['part']}, {r['case']}", *(r[c] or "-" for c in COLUMNS)] for r in rows]
    common.print_table(["part, case", *COLUMNS], table)
    if args.json:
        common.print_json({"benchmark": "matvec", "isa": native.isa(), "machine": common.machine(), "rows": rows})


if __name__ == "__main__":
    main()
