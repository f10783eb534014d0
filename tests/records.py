"""Random but valid records and converted models for tests; the payload is noise, the rest as a converter writes it."""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors.numpy import save_file

from tiny_qmoe_mlx import container, container_writer
from tiny_qmoe_mlx.codecs import trellis
from tiny_qmoe_mlx.codecs.rotation import padded_columns

NAMES = {3: ("gate_proj", "up_proj", "down_proj"), 2: ("fc1", "fc2")}


def random_matrix(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    bias: bool = False,
    row_gain: bool = True,
    rates: Sequence[int] | None = None,
) -> trellis.Matrix:
    """A matrix of noise; rates are random where they are not given (one for each 64 columns)."""
    padded, blocks = trellis.padded_rows(rows), padded_columns(columns) // 64
    rate = rng.integers(0, 8, blocks).astype(np.uint8) if rates is None else np.array(rates, np.uint8)
    words = 32 * int(trellis.PLANES[rate].sum())
    return trellis.Matrix(
        rows=rows,
        columns=columns,
        rates=rate,
        order=rng.permutation(blocks),
        block_gain=rng.normal(size=4 * blocks).astype(np.float16),
        row_gain=rng.normal(size=padded).astype(np.float16) if row_gain else None,
        bias=rng.normal(size=padded).astype(np.float16) if bias else None,
        payload=rng.integers(0, 2**32, (padded // 32, words), np.uint32),
    )


def random_record(
    rng: np.random.Generator, shapes: Sequence[tuple[int, int]], bias: bool = False, length: int = 12, **options
) -> trellis.Record:
    """A record of noise with the matrices' shapes."""
    return trellis.Record(length, [random_matrix(rng, r, c, bias, **options) for r, c in shapes])


def record_size(record: trellis.Record, alignment: int = 128) -> int:
    """Bytes that a record needs, rounded up to the alignment."""
    size = 128
    for m in record.matrices:
        size += trellis.side_bytes(m.rows, m.columns, m.row_gain is not None, m.bias is not None) + m.payload.nbytes
    return -(-size // alignment) * alignment


def write_model(
    directory: Path,
    hidden: int = 64,
    width: int = 96,
    experts: int = 3,
    layers: int = 2,
    alignment: int = 1024,
    bias: bool = False,
    matrices: int = 3,
    seed: int = 0,
    **options,
) -> container.ModelSpec:
    """Write a whole converted model of noise (no mlx-lm model fits its config) and return its description."""
    rng = np.random.default_rng(seed)
    shapes = [(width, hidden)] * (matrices - 1) + [(hidden, width)]
    specs = []
    with container.staged_directory(directory, overwrite=True) as staged:
        for index in range(layers):
            records = [random_record(rng, shapes, bias, **options) for _ in range(experts)]
            size = max(record_size(r, alignment) for r in records)
            layer = container.LayerSpec(
                path=f"model.layers.{index}.mlp.switch_mlp",
                layer=index,
                file=container.expert_file_name(index),
                experts=experts,
                record_bytes=size,
                matrices=tuple((n, *s) for n, s in zip(NAMES[matrices], shapes, strict=True)),
                bias=bias,
            )
            container_writer.write_experts_file(staged, layer, alignment, (trellis.pack(r, size) for r in records))
            specs.append(layer)
        spec = container.ModelSpec(
            format_version=1,
            codec="trellis",
            bits=round(container.bits_per_weight(specs, alignment), 6),
            alignment=alignment,
            length=options.get("length", 12),
            seed=seed,
            layers=tuple(specs),
            source={"model": "noise", "revision": None},
            calibration={"source": "none", "tokens": 0},
        )
        config = {"model_type": "noise", "hidden_size": hidden, "tiny_qmoe": spec.to_dict()}
        container.write_json(staged / "config.json", config)
        container.write_json(staged / "tokenizer.json", {"version": "1.0"})
        save_file({"model.norm.weight": rng.normal(size=hidden).astype(np.float32)}, staged / "model.safetensors")
        container_writer.write_manifest(staged)
    return spec


def pool_of(records: list[trellis.Record]) -> tuple[np.ndarray, int]:
    """Records one after the other, and their distance."""
    size = max(map(record_size, records))
    return np.concatenate([trellis.pack(r, size) for r in records]), size


def stored(arrays: dict[str, mx.array]) -> dict[str, np.ndarray]:
    """MLX arrays as numpy holds them, bfloat16 as its bits."""
    return {n: np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a) for n, a in arrays.items()}
