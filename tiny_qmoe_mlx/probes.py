"""What `doctor` measures: the machine, the disk, a round trip of MLX, and every kernel against the numpy specification.

Nothing here changes a setting of the machine. Times are seconds, sizes bytes; a timing is the median of several runs.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import SwiGLU

from tiny_qmoe_mlx import budget, native, ops
from tiny_qmoe_mlx.codecs import rotation, trellis
from tiny_qmoe_mlx.expert_kind import ExpertKind, check_record
from tiny_qmoe_mlx.streaming.pool import Pool

MODELS = {  # hidden, width of an expert, experts a token takes
    "OLMoE-1B-7B": (2048, 1024, 8),
    "Qwen3-30B-A3B": (2048, 768, 8),
    "gpt-oss-120b": (2880, 2880, 4),
    "Mixtral-8x7B": (4096, 14336, 2),
    "DeepSeek-V3": (7168, 2048, 8),
}
PACKAGES = ("tiny-qmoe-mlx", "mlx", "mlx-lm", "numpy", "safetensors", "huggingface_hub")
TOLERANCE = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}  # of the largest output
SEED = 12345


def machine() -> dict[str, Any]:
    """Chip, cores, memory, system, versions, and the limit on wired memory where the system has one (only read)."""
    return {
        "system": platform.platform(),
        "chip": _chip(),
        "cores": os.cpu_count(),
        "memory_bytes": budget.machine_memory(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": str(mx.default_device()),
        "cpu_kernels": native.isa() if native.available() else None,
        "wired_limit_mb": _sysctl("iogpu.wired_limit_mb"),
        **({"gpu": mx.device_info()} if ops.on_gpu() else {}),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _sysctl(key: str) -> str | None:
    if sys.platform != "darwin":
        return None
    found = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True)
    return found.stdout.strip() or None


def _chip() -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def seconds(work: Callable[[], object], runs: int = 15, warmup: int = 3) -> float:
    """Median time of a call."""
    for _ in range(warmup):
        work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def round_trip() -> float:
    """Seconds of one `mx.eval` of a tiny result: what a host round trip costs."""
    x = mx.zeros(8)
    return seconds(lambda: mx.eval(x + 1), runs=200, warmup=20)


# ---- kernels


@dataclass(frozen=True)
class Layer:
    """A layer of noise: records in a pool, what its experts have in common, and their parsed parts."""

    kind: ExpertKind
    pool: Pool
    parsed: list[trellis.Record]


def noise_layer(hidden: int, width: int, experts: int, rate: int | None, length: int = 12, bias: bool = False) -> Layer:
    """Experts whose codes are random bytes, all blocks at one rate, or at every rate in turn where it is None."""
    rng = np.random.default_rng(SEED)
    matrices = (("gate_proj", width, hidden), ("up_proj", width, hidden), ("down_proj", hidden, width))
    kind = ExpertKind(matrices, bias, length, seed=0, layer=0, activation=SwiGLU())
    records = [trellis.Record(length, [_noise(rng, r, c, rate, bias) for _, r, c in matrices]) for _ in range(experts)]
    size = max(_record_bytes(record) for record in records)
    pool = Pool(size, experts)
    for i, record in enumerate(records):
        pool.slot(i)[:] = trellis.pack(record, size)
        check_record(pool.slot(i), kind, f"noise {i}")
    return Layer(kind, pool, records)


def _noise(rng: np.random.Generator, rows: int, columns: int, rate: int | None, bias: bool) -> trellis.Matrix:
    blocks, padded = rotation.padded_columns(columns) // 64, trellis.padded_rows(rows)
    rates = np.full(blocks, rate, np.uint8) if rate is not None else (np.arange(blocks) % 8).astype(np.uint8)
    gain = np.float16(columns**-0.5)
    return trellis.Matrix(
        rows=rows,
        columns=columns,
        rates=rates,
        order=rng.permutation(blocks),
        block_gain=(gain * rng.uniform(0.5, 1.5, 4 * blocks)).astype(np.float16),
        row_gain=rng.uniform(0.5, 1.5, padded).astype(np.float16),
        bias=rng.normal(size=padded).astype(np.float16) if bias else None,
        payload=rng.integers(0, 2**32, (padded // 32, 32 * int(trellis.PLANES[rates].sum())), np.uint32),
    )


def _record_bytes(record: trellis.Record) -> int:
    sides = (
        trellis.side_bytes(m.rows, m.columns, True, m.bias is not None) + m.payload.nbytes for m in record.matrices
    )
    return -(-(trellis.UNIT + sum(sides)) // 4096) * 4096


def reference(layer: Layer, x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The layer's output in float64 from the numpy decoder: (tokens, k, d)."""
    kind = layer.kind
    dense = [[trellis.decode_matrix(m, r.length).astype(np.float64) for m in r.matrices] for r in layer.parsed]
    z = rotation.rotate(x.astype(np.float64), kind.sign_in)
    out = np.empty((*chosen.shape, kind.matrices[-1][1]))
    for (t, k), e in np.ndenumerate(chosen):
        parts = []
        for m, row in zip(layer.parsed[e].matrices[:-1], dense[e][:-1], strict=True):
            parts.append((row @ z[t])[: m.rows] + (m.bias[: m.rows] if m.bias is not None else 0))
        hidden = parts[0] / (1 + np.exp(-parts[0])) * parts[1]
        last = layer.parsed[e].matrices[-1]
        y = dense[e][-1] @ rotation.rotate(hidden, kind.sign_mid)
        out[t, k] = y[: last.rows] + (last.bias[: last.rows] if last.bias is not None else 0)
    return out


def kernel_error(rate: int | None, length: int, tokens: int, dtype: mx.Dtype, bias: bool) -> float:
    """Largest error of this machine's path on a small layer of noise, as a share of the largest output."""
    layer = noise_layer(192, 96, 4, rate, length, bias)
    rng = np.random.default_rng(SEED + tokens)
    x = mx.array(rng.normal(size=(tokens, 192)).astype(np.float32)).astype(dtype)
    chosen = np.stack([rng.permutation(4)[:2] for _ in range(tokens)])
    want = reference(layer, np.array(x.astype(mx.float32)), chosen)
    got = np.array(layer_output(layer, x, chosen).astype(mx.float32))
    return float(np.abs(got - want).max() / np.abs(want).max())


def layer_output(layer: Layer, x: mx.array, chosen: np.ndarray) -> mx.array:
    """What this machine's path computes for a few tokens or many: (tokens, k, d)."""
    rows = np.repeat(np.arange(len(chosen), dtype=np.int32), chosen.shape[1])
    if ops.on_gpu():
        return _on_gpu(layer, x, chosen, rows)
    y = _on_cpu(layer, np.array(x.astype(mx.float32)), chosen.reshape(-1), rows, len(chosen))
    return mx.array(y).reshape(*chosen.shape, -1).astype(x.dtype)


def _on_gpu(layer: Layer, x: mx.array, chosen: np.ndarray, rows: np.ndarray) -> mx.array:
    slots, dispatch, pool = np.arange(len(layer.parsed)), ops.Dispatch(), layer.pool
    records = ops.gpu_records(pool.array, pool.base, pool.record_bytes, slots)
    if len(chosen) <= ops.DECODE_TOKENS:
        return ops.gpu_few(x, mx.array(chosen.astype(np.uint32)), records, layer.kind, dispatch)
    order = np.argsort(chosen.reshape(-1), kind="stable")
    z, of = ops.gpu_rotate(x, layer.kind), chosen.reshape(-1)[order]
    y = ops.gpu_many(z, slots, of, rows[order], records, layer.kind, dispatch, x.dtype)
    return y[mx.array(np.argsort(order))].reshape(*chosen.shape, -1)


def _on_cpu(layer: Layer, x: np.ndarray, chosen: np.ndarray, rows: np.ndarray, tokens: int) -> np.ndarray:
    size, dispatch = layer.pool.record_bytes, ops.Dispatch()
    if tokens <= ops.DECODE_TOKENS:
        picks = ops.Picks(chosen * np.int64(size), rows)
        return ops.decode_product(layer.pool.data, picks, x, layer.kind, size, dispatch)
    z, y = rotation.rotate(x, layer.kind.sign_in), np.empty((len(chosen), layer.kind.matrices[-1][1]), np.float32)
    for e in np.unique(chosen):
        mine = np.flatnonzero(chosen == e)
        y[mine] = ops.expert_product(layer.pool.slot(int(e)), z[rows[mine]], layer.kind, dispatch)
    return y


def preadv_reaches_the_gpu(folder: Path) -> bool:
    """Whether bytes that `preadv` wrote into a pool are what an MLX operation on the device then reads."""
    rng = np.random.default_rng(SEED)
    content = rng.integers(0, 256, 1 << 20, np.uint8)
    file = folder / "probe.bin"
    file.write_bytes(content.tobytes())
    pool = Pool(1 << 20, 2)
    before = mx.sum(pool.array.astype(mx.uint32))
    mx.eval(before)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        done = os.preadv(descriptor, [memoryview(pool.slot(1))], 0)
    finally:
        os.close(descriptor)
    return done == len(content) and mx.sum(pool.array.astype(mx.uint32)).item() == int(content.sum(dtype=np.uint64))


# ---- speed


def speed(name: str, experts: int = 16, runs: int = 15) -> dict[str, float]:
    """One token through one layer of a real model's shape: seconds of ours at 2 bits, of MLX at 4 bits and unquantized.

    Each is the median of calls that take turns over different experts, so that no cache keeps a layer.
    """
    hidden, width, k = MODELS[name]
    layer = noise_layer(hidden, width, experts, 4)
    rng = np.random.default_rng(SEED)
    dtype = mx.float16 if ops.on_gpu() else mx.float32  # MLX's CPU backend gathers float32 only
    x = mx.array(rng.normal(size=(1, hidden)).astype(np.float32)).astype(dtype)
    choices = [rng.permutation(experts)[None, :k] for _ in range(8)]
    turn = iter(range(1 << 30))

    def take(run: Callable[[np.ndarray], mx.array]) -> Callable[[], object]:
        return lambda: mx.eval(run(choices[next(turn) % len(choices)]))

    dense = [mx.array(rng.normal(size=(experts, r, c)).astype(np.float16)) for _, r, c in layer.kind.matrices]
    packed = [mx.quantize(w, 64, 4) for w in dense]
    mx.eval(packed)
    dense = [w.astype(dtype) for w in dense]
    mx.eval(dense)
    return {
        "ours_2bit": seconds(take(lambda c: layer_output(layer, x, c)), runs),
        "mlx_4bit": seconds(take(lambda c: glu(x, c, packed)), runs),
        f"mlx_{'f16' if dtype == mx.float16 else 'f32'}": seconds(take(lambda c: glu(x, c, dense)), runs),
    }


def glu(x: mx.array, chosen: np.ndarray, weights: list, bits: int = 4) -> mx.array:
    """SwiGLU experts by MLX's own gathered products of gate, up, down: matrices, or what mx.quantize made of them."""
    indices = mx.array(chosen)

    def product(h: mx.array, w: Any) -> mx.array:
        if isinstance(w, mx.array):
            return mx.gather_mm(h, w.swapaxes(-1, -2), rhs_indices=indices)
        q, scales, biases = w
        return mx.gather_qmm(h, q, scales, biases, rhs_indices=indices, transpose=True, group_size=64, bits=bits)

    rows = mx.expand_dims(x, (-2, -3))
    gate, up, down = weights
    return product(SwiGLU()(product(rows, up), product(rows, gate)), down).squeeze(-2)


# ---- disk


def disk(
    folder: Path,
    record_bytes: int,
    file_bytes: int = 1 << 30,
    reads: int = 256,
    outstanding: Sequence[int] = (1, 2, 4, 8, 16, 32),
) -> list[dict[str, float]]:
    """Random reads of record size with so many outstanding, bytes per second of each; a file of noise is written first.

    The page cache is passed by (F_NOCACHE on macOS, O_DIRECT on Linux) where the system and the file system allow it.
    """
    file = folder / "probe.bin"
    chunk = np.random.default_rng(SEED).integers(0, 256, 1 << 24, np.uint8).tobytes()
    with open(file, "wb") as out:
        for _ in range(file_bytes // len(chunk)):
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    descriptor, direct = open_uncached(file)
    places = np.random.default_rng(SEED).integers(0, file_bytes // record_bytes, reads) * record_bytes
    try:
        rates = [_read_rate(descriptor, places, record_bytes, n) for n in outstanding]
    finally:
        os.close(descriptor)
    return [{"outstanding": n, "bytes_per_s": rate, "uncached": direct} for n, rate in rates]


def open_uncached(file: Path) -> tuple[int, bool]:
    """A descriptor for reading past the page cache, and whether that was granted."""
    if sys.platform == "darwin":
        import fcntl

        descriptor = os.open(file, os.O_RDONLY)
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        return descriptor, True
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT), True
    except OSError:
        return os.open(file, os.O_RDONLY), False


def _read_rate(descriptor: int, places: np.ndarray, size: int, outstanding: int) -> tuple[int, float]:
    pool = Pool(size, outstanding)

    def work(lane: int) -> None:
        for place in places[lane::outstanding]:
            os.preadv(descriptor, [memoryview(pool.slot(lane))], int(place))

    start = time.perf_counter()
    with ThreadPoolExecutor(outstanding) as threads:
        list(threads.map(work, range(outstanding)))
    return outstanding, len(places) * size / (time.perf_counter() - start)
