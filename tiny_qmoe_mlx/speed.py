"""What one token costs this machine, in seconds, before a model is loaded: its disk, its experts, everything else.

Experts and dense layers are noise of the model's own shapes, so that headers suffice; the disk is read where the
model's records lie. Times are medians; sizes are bytes.
"""

import math
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tiny_qmoe_mlx import coded_probe, footprint, ops, probes, qmoe_probe
from tiny_qmoe_mlx.codecs import trellis
from tiny_qmoe_mlx.container import Container
from tiny_qmoe_mlx.footprint import Matrix
from tiny_qmoe_mlx.layers import use_cpu_kernels
from tiny_qmoe_mlx.masked_spans import is_encoder_decoder
from tiny_qmoe_mlx.spec import CODEC
from tiny_qmoe_mlx.streaming.pool import Pool
from tiny_qmoe_mlx.streaming.store import SECTOR, ExpertStore

READERS = 8
PROBED_BYTES = 256 << 20  # of a file that is written where the model's own is not at hand
CACHE_BYTES = 64 << 20  # more than processors keep of what they have just read
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
ENCODED = re.compile(r"^encoder\.|\.cross_attn\.[kv]_proj\.")  # of an encoder-decoder, once a text
SMALL_OPS = 24  # norms, rotary embeddings, additions, the router's choice: what a layer computes beside its products


def disk(container: Container, seconds: float = 0.5, readers: int = READERS) -> float:
    """Bytes per second of random reads of the model's records, by as many threads as the engine reads with."""
    store = ExpertStore(container, [], "never")
    layers = container.spec.layers
    pool = Pool(max(layer.record_bytes for layer in layers), readers)
    stop = time.perf_counter() + seconds

    def work(lane: int) -> None:
        rng = np.random.default_rng(lane)
        while time.perf_counter() < stop:
            layer = int(rng.integers(len(layers)))
            buffer = pool.slot(lane)[: layers[layer].record_bytes]
            store.read(layer, [int(rng.integers(layers[layer].experts))], [buffer])

    start = time.perf_counter()
    try:
        with ThreadPoolExecutor(readers) as threads:
            list(threads.map(work, range(readers)))
        return store.bytes_read / (time.perf_counter() - start)
    finally:
        store.close()


def disk_of(folder: Path, record_bytes: int) -> float:
    """The same on a file of noise in a folder, where the model itself is not on this machine."""
    size = -(-record_bytes // SECTOR) * SECTOR
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        (found,) = probes.disk(Path(scratch), size, max(PROBED_BYTES, 2 * size), 128, (READERS,))
    return found["bytes_per_s"]


def experts(container: Container, top_k: int) -> float:
    """Seconds of the routed experts of all layers for one token, every expert in memory; of coded decoder layers, those
    of the whole layers.
    """
    layers = footprint.decoding_layers(container)
    if layers[0].whole:
        return coded_probe.layer_seconds(container)
    hidden, width = layers[0].shapes[-1][0], layers[0].shapes[0][0]
    rate = int(np.abs(trellis.BITS[1:] - container.spec.bits).argmin()) + 1
    record = 3 * hidden * width * trellis.BITS[rate] / 8
    chosen = min(top_k, max(layer.experts for layer in layers))
    count = min(chosen + math.ceil(CACHE_BYTES / record), max(chosen, sum(layer.experts for layer in layers)))
    x = mx.random.normal((1, hidden)).astype(mx.float16 if ops.on_gpu() else mx.float32)
    rng, call = np.random.default_rng(0), _call(container, (hidden, width, count), rate, x)
    taken = probes.seconds(lambda: mx.eval(call(rng.permutation(count)[None, :chosen])))
    weights = sum(rows * columns for layer in layers for rows, columns in layer.shapes)
    return taken * weights / (3 * hidden * width)


def _call(container: Container, size: tuple[int, int, int], rate: int, x: mx.array) -> Callable[[np.ndarray], mx.array]:
    """One layer of experts of the model's codec; size: hidden, width and number of the experts."""
    coding = container.spec.layers[0].coding
    if coding is not None:
        coded = qmoe_probe.noise_layer(coding, *size)
        return lambda chosen: qmoe_probe.output(coded, x, chosen)
    if container.spec.codec == CODEC:
        layer = probes.noise_layer(*size, rate)
        return lambda chosen: probes.layer_output(layer, x, chosen)
    own = container.spec.layers[0].packing[0]
    bits, (hidden, width, count) = own.bits if own.bits in AFFINE_BITS else 8, size
    shapes = [(count, width, hidden), (count, width, hidden), (count, hidden, width)]
    packed = [mx.quantize(mx.random.normal(shape), 64, bits) for shape in shapes]
    mx.eval(packed)
    return lambda chosen: probes.glu(x, chosen, packed, bits)


# ---- everything else


def dense(container: Container) -> float:
    """Seconds of everything but the routed experts for one token at a short context."""
    tensors = footprint.matrices(container)
    if is_encoder_decoder(container.config):  # a written token passes the decoder, and keys of the text are kept
        tensors = {n: m for n, m in tensors.items() if not ENCODED.search(n)}
    layers = _by_layer(tensors)
    middle = layers[sorted(layers)[len(layers) // 2]] if layers else []
    weights = sum(_weights(name, tensors) for name in middle)
    total = sum(_weights(name, tensors) for names in layers.values() for name in names)
    of_layers = _seconds_of(middle, tensors, SMALL_OPS) * (total / weights if weights else 0)
    return of_layers + _seconds_of(_output_layer(tensors), tensors, 2)


def _by_layer(tensors: dict[str, Matrix]) -> dict[int, list[str]]:
    """Names of the matrices of each layer."""
    found: dict[int, list[str]] = {}
    for name in tensors:
        at = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
        if at:
            found.setdefault(int(at[1]), []).append(name)
    return found


def _output_layer(tensors: dict[str, Matrix]) -> list[str]:
    """The matrix that makes logits: a layer of its own, or the embedding once more."""
    for part in ("lm_head.weight", "output.weight", "embed_tokens.weight", "wte.weight", "shared.weight"):
        found = [name for name in tensors if name.endswith(part)]
        if found:
            return found[:1]
    return []


def _weights(name: str, tensors: dict[str, Matrix]) -> int:
    return tensors[name][0] * tensors[name][1]


def _seconds_of(names: list[str], tensors: dict[str, Matrix], small_ops: int) -> float:
    """Seconds of one pass: each matrix times a vector, and small operations between them, evaluated once.

    As many copies as no cache holds take turns.
    """
    modules = [_module(*tensors[name]) for name in names]
    size = sum(p.nbytes for m in modules for p in m.parameters().values() if isinstance(p, mx.array))
    if not size:
        return 0.0
    copies = [modules, *([_module(*tensors[name]) for name in names] for _ in range(min(8, CACHE_BYTES // size)))]
    turn = iter(range(1 << 30))
    dtype = mx.float16 if ops.on_gpu() else mx.float32
    inputs = {columns: mx.random.normal((1, 1, columns)).astype(dtype) for columns in {_columns(m) for m in modules}}
    mx.eval(inputs, [m.parameters() for c in copies for m in c])
    return probes.seconds(lambda: _pass(copies[next(turn) % len(copies)], inputs, small_ops))


def _pass(modules: list[nn.Module], inputs: dict[int, mx.array], small_ops: int) -> None:
    outputs = [module(inputs[_columns(module)]) for module in modules]
    small = next(iter(inputs.values()))
    for _ in range(small_ops):
        small = mx.fast.rms_norm(small, None, 1e-5)
    mx.eval(outputs, small)


def _columns(module: nn.Module) -> int:
    weight = module.weight
    return weight.shape[1] * 32 // module.bits if isinstance(module, nn.QuantizedLinear) else weight.shape[1]


def _module(rows: int, columns: int, bits: int) -> nn.Module:
    """A layer of noise of a shape, quantized in groups of 64 or, where they do not fit, 32; what MLX's affine mode does
    not have is timed as 8 bits of it.
    """
    dtype = mx.float16 if ops.on_gpu() else mx.float32
    group = next((g for g in (64, 32) if columns % g == 0), 0)
    if not bits or not group:
        linear = nn.Linear(columns, rows, bias=False)
        linear.weight = mx.random.normal((rows, columns)).astype(dtype)
        return linear
    bits = bits if bits in AFFINE_BITS else 8
    layer = nn.QuantizedLinear(group, 1, False, group, bits)  # of any size: what it holds is replaced
    layer.weight = mx.random.randint(0, 1 << 31, (rows, columns * bits // 32)).astype(mx.uint32)
    layer.scales = layer.biases = mx.full((rows, columns // group), 0.01, dtype)
    holder = nn.Sequential(layer)
    use_cpu_kernels(holder)
    return layer


def memory_bandwidth(seconds: float = 0.2) -> float:
    """Bytes per second that this machine reads from memory: of the GPU, or of all cores."""
    if ops.on_gpu():
        x = mx.zeros((1 << 28,), mx.uint8)
        mx.eval(x)
        return x.nbytes / probes.seconds(lambda: mx.eval(mx.max(x.view(mx.uint32))), runs=5)
    parts = np.array_split(np.zeros(1 << 25), 8)
    with ThreadPoolExecutor(8) as threads:
        return sum(p.nbytes for p in parts) / probes.seconds(lambda: list(threads.map(np.sum, parts)), runs=5)
