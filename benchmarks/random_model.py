"""A converted model of random bytes in Qwen3-30B-A3B's exact shape: the cost of streaming does not depend on weights.

    python benchmarks/random_model.py --dir DIR [--bits 2.0] [--layers 48]

About 7 GB of experts at 2 bits and 1.7 GB of dense weights at 8 bits. Codes are noise; headers, gains, checksums and
manifest are what the converter writes, so every check of the package passes. Gains keep a layer's output about as large
as its input. A directory that holds the same model already is left alone.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from bench_convert import SHAPE, write_tokenizer

from tiny_qmoe_mlx import container, container_writer
from tiny_qmoe_mlx.codecs import trellis
from tiny_qmoe_mlx.codecs.rotation import padded_columns
from tiny_qmoe_mlx.conversion.rates import record_bytes_for
from tiny_qmoe_mlx.conversion.rest import GROUP, TOP, shard_name, write_shard
from tiny_qmoe_mlx.demo import cache_directory
from tiny_qmoe_mlx.errors import FormatError

LENGTH, SEED = 12, 0
SILU_RMS = 0.6  # rms of silu(a) * b for standard normal a and b: what down reads
NAMES = ("gate_proj", "up_proj", "down_proj")
LAYERS = 48
PAGE = 4096  # records that are read past the page cache on Linux are multiples of it
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


# ---- experts


def pick_rates(shapes: list[tuple[int, int]], record_bytes: int) -> list[np.ndarray]:
    """Rates of each matrix's blocks, u8, that fill a record: all blocks a step up, then the next, while it fits."""
    blocks = [padded_columns(columns) // 64 for _, columns in shapes]
    room = record_bytes - trellis.UNIT
    room -= sum(trellis.side_bytes(rows, columns, True, False) for rows, columns in shapes)
    rates = [np.zeros(n, np.uint8) for n in blocks]
    places = [(m, b) for m, n in enumerate(blocks) for b in range(n)]
    for rate in range(1, len(trellis.PLANES)):
        for m, b in places:
            step = trellis.block_bytes(shapes[m][0], rate) - trellis.block_bytes(shapes[m][0], rate - 1)
            if step <= room and rates[m][b] == rate - 1:
                rates[m][b], room = rate, room - step
    return rates


def template(shapes: list[tuple[int, int]], record_bytes: int) -> tuple[np.ndarray, list[slice]]:
    """A record without its codes, u8 (record_bytes,), and where each matrix's codes belong."""
    matrices = []
    for m, (rates, (rows, columns)) in enumerate(zip(pick_rates(shapes, record_bytes), shapes, strict=True)):
        inputs = SILU_RMS if m == len(shapes) - 1 else 1.0
        matrices.append(_matrix(rows, columns, rates, inputs))
    record = trellis.pack(trellis.Record(LENGTH, matrices), record_bytes)
    words, places = record[: trellis.HEADER_BYTES].view("<u4"), []
    for i, m in enumerate(matrices):
        start = int(words[6 + 3 * i]) * trellis.UNIT + trellis.side_bytes(m.rows, m.columns, True, False)
        places.append(slice(start, start + m.payload.nbytes))
    return record, places


def _matrix(rows: int, columns: int, rates: np.ndarray, input_rms: float) -> trellis.Matrix:
    """Gains such that outputs have rms 1 where inputs have the given one."""
    value_rms = np.array([_value_rms(int(rate)) for rate in rates])
    gain = 1 / (input_rms * np.sqrt(64 * np.sum(value_rms**2)))
    padded, words = trellis.padded_rows(rows), 32 * int(trellis.PLANES[rates].sum())
    return trellis.Matrix(
        rows=rows,
        columns=columns,
        rates=rates,
        order=np.arange(len(rates)),
        block_gain=np.full(4 * len(rates), gain, np.float16),
        row_gain=np.ones(padded, np.float16),
        bias=None,
        payload=np.zeros((padded // trellis.ROW_TILE, words), np.uint32),
    )


def _value_rms(rate: int) -> float:
    table = trellis.code_table(LENGTH, rate in trellis.INST3_RATES)
    return float(np.sqrt(np.mean(table**2))) if rate else 0.0


def noise_records(
    record: np.ndarray, places: list[slice], count: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Records of the template with fresh codes; one array, filled again for each."""
    for _ in range(count):
        for place in places:
            words = rng.integers(0, 1 << 64, -(-(place.stop - place.start) // 8), np.uint64)
            record[place] = words.view(np.uint8)[: place.stop - place.start]
        yield record


# ---- dense weights


def quantized(name: str, rows: int, columns: int, std: float, rng: np.random.Generator) -> dict[str, mx.array]:
    """A weight as MLX quantizes it to 8 bits in groups of 64, its values uniform with the given deviation."""
    words = np.frombuffer(rng.bytes(rows * columns), np.uint32).reshape(rows, columns // 4)
    scale = std * 12**0.5 / 256
    scales = mx.full((rows, columns // GROUP), scale, mx.bfloat16)
    return {f"{name}.weight": mx.array(words), f"{name}.scales": scales, f"{name}.biases": scales * -127.5}


def dense_layer(config: dict[str, Any], layer: int, rng: np.random.Generator) -> dict[str, mx.array]:
    """Attention, norms and router of one decoder layer."""
    d, size, at = config["hidden_size"], config["head_dim"], f"model.layers.{layer}"
    heads, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    arrays = {}
    for name, rows, columns in (("q", heads, d), ("k", kv, d), ("v", kv, d), ("o", d, heads)):
        arrays |= quantized(f"{at}.self_attn.{name}_proj", rows, columns, columns**-0.5, rng)
    router = rng.standard_normal((config["num_experts"], d), np.float32) * np.float32(d**-0.5)
    arrays[f"{at}.mlp.gate.weight"] = mx.array(router).astype(mx.bfloat16)
    for name, width in (("input_layernorm", d), ("post_attention_layernorm", d)):
        arrays[f"{at}.{name}.weight"] = mx.ones((width,), mx.bfloat16)
    for name in ("q_norm", "k_norm"):
        arrays[f"{at}.self_attn.{name}.weight"] = mx.ones((size,), mx.bfloat16)
    return arrays


def top(config: dict[str, Any], rng: np.random.Generator) -> dict[str, mx.array]:
    """Embeddings, the last norm and the output layer."""
    vocabulary, d = config["vocab_size"], config["hidden_size"]
    arrays = quantized("model.embed_tokens", vocabulary, d, 1.0, rng) | quantized(
        "lm_head", vocabulary, d, d**-0.5, rng
    )
    return {**arrays, "model.norm.weight": mx.ones((d,), mx.bfloat16)}


# ---- the model


def layer_spec(config: dict[str, Any], layer: int, record_bytes: int) -> container.LayerSpec:
    shapes = expert_shapes(config)
    return container.LayerSpec(
        path=f"model.layers.{layer}.mlp.switch_mlp",
        layer=layer,
        file=container.expert_file_name(layer),
        experts=config["num_experts"],
        record_bytes=record_bytes,
        matrices=tuple((name, *shape) for name, shape in zip(NAMES, shapes, strict=True)),
        bias=False,
    )


def expert_shapes(config: dict[str, Any]) -> list[tuple[int, int]]:
    d, width = config["hidden_size"], config["moe_intermediate_size"]
    return [(width, d), (width, d), (d, width)]


def model_config(config: dict[str, Any], layers: int, bits: float, name: str, page: int = PAGE) -> dict[str, Any]:
    """The whole config.json of the model; its records are multiples of `page` at least (128: as the converter does)."""
    size, alignment = record_bytes_for(bits, expert_shapes(config), config["num_experts"])
    if alignment < page:
        size, alignment = size // page * page, page
    specs = [layer_spec(config, layer, size) for layer in range(layers)]
    spec = container.ModelSpec(
        format_version=container.FORMAT_VERSION,
        codec=container.CODEC,
        bits=round(container.bits_per_weight(specs, alignment), 4),
        alignment=alignment,
        length=LENGTH,
        seed=SEED,
        layers=tuple(specs),
        source={"model": name, "revision": None},
        calibration={"source": "none", "tokens": 0},
    )
    quantization = {"group_size": GROUP, "bits": 8, "mode": "affine"}
    return {**config, "num_hidden_layers": layers, "quantization": quantization, "tiny_qmoe": spec.to_dict()}


def is_there(directory: Path, wanted: dict[str, Any]) -> bool:
    """Whether the directory holds this very model, whole."""
    try:
        return container.open_model(directory).config == json.loads(json.dumps(wanted))
    except (FormatError, OSError):
        return False


def make(
    directory: Path,
    bits: float = 2.0,
    layers: int = LAYERS,
    config: dict[str, Any] | None = None,
    name: str = "noise in the shape of Qwen3-30B-A3B",
    page: int = PAGE,
) -> Path:
    """Write the model unless it is there; returns the directory.

    Raises:
        OSError: the disk is full; FileExistsError: something else is in the way.
    """
    wanted = model_config(config or SHAPE, layers, bits, name, page)
    spec = container.ModelSpec.from_dict(json.loads(json.dumps(wanted))["tiny_qmoe"])
    if is_there(directory, wanted):
        return directory
    container.check_space(directory, sum(layer.data_bytes for layer in spec.layers))
    directory.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.SFC64(SEED))
    with container.staged_directory(directory, overwrite=True) as staged:
        record, places = template(spec.layers[0].shapes, spec.layers[0].record_bytes)
        for layer in spec.layers:
            records = noise_records(record, places, layer.experts, rng)
            container_writer.write_experts_file(staged, layer, spec.alignment, records)
            write_shard(staged / shard_name(layer.layer), dense_layer(wanted, layer.layer, rng))
        write_shard(staged / TOP, top(wanted, rng))
        write_words(staged, wanted)
        container_writer.write_manifest(staged)
    return directory


def write_words(directory: Path, config: dict[str, Any]) -> None:
    """config.json and a tokenizer: the demo's where it has been made and fits, else one of made-up words."""
    container.write_json(directory / "config.json", config)
    for demo in sorted(cache_directory().glob("demo-*/tokenizer.json"), reverse=True):
        words = json.loads(demo.read_text())["model"]["vocab"]
        if len(words) <= config["vocab_size"]:
            for name in TOKENIZER:
                shutil.copyfile(demo.with_name(name), directory / name)
            return
    write_tokenizer(directory, config["vocab_size"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="directory of the model")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument(
        "--page", type=int, default=PAGE, help="records are multiples of it (128: as the converter does)"
    )
    args = parser.parse_args()
    start = time.perf_counter()
    made = container.sizes(make(args.dir, args.bits, args.layers, page=args.page))
    print(
        f"{args.dir}: {made['file_bytes'] / 1e9:.2f} GB, experts {made['expert_file_bytes'] / 1e9:.2f} GB at "
        f"{made['bits']:.4f} bits, {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
