"""Whole dense models converted by the package's own `convert`: what bench_ancestors.py runs and measures.

Calibration and held-out text are the passages of bench_quality.py (by default 24 stretches of 512 tokens of each of two
sources, and 8 others of each), so that figures agree with docs/QUALITY.md. What is not coded stays bfloat16 in every
directory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_quality
import dense_checkpoint
import dense_gemma
import dense_gemma_checkpoint
import dense_llama
from bench_quality import Sample
from dense_llama import Dense

from tiny_qmoe_mlx.codecs import tuples
from tiny_qmoe_mlx.container import open_model, sizes
from tiny_qmoe_mlx.convert import convert

TRELLIS = (1.0, 2.0, 3.0, 4.0)
LOADERS: dict[str, tuple[Callable[[], Dense], Callable[[Path], Path]]] = {
    "SmolLM2-135M": (dense_llama.load, dense_checkpoint.write),
    "Gemma-3-270m": (dense_gemma.load, dense_gemma_checkpoint.write),
}


@dataclass(frozen=True)
class Extent:
    """How much is measured. folder: where converted models are kept, None for a temporary one; calibration, held_out:
    stretches of each of the two texts; rates, models: of the part on dense models; quick: fewer turns, one trellis.
    """

    folder: Path | None = None
    calibration: int = bench_quality.CALIBRATION
    held_out: int = 8
    rates: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0)
    models: tuple[str, ...] = ("SmolLM2-135M", "Gemma-3-270m")
    quick: bool = False


@dataclass
class Original:
    """A checkpoint that `convert` reads; its model for numpy; calibration and held-out text as files and tokens."""

    directory: Path
    model: Dense
    sample: Sample
    calibration: Path
    held_out: Path


def original(name: str, folder: Path, extent: Extent) -> Original:
    """A real model, written into a folder unless it is there already, and the texts for it."""
    load, write = LOADERS[name]
    model, directory = load(), write(folder / name)
    sample = bench_quality.passages(model, extent.calibration, extent.held_out)
    parts = {"calibration": sample.calibration, "held-out": sample.held_out}
    files = [folder / f"{name}-{what}-{len(windows)}.txt" for what, windows in parts.items()]
    for file, windows in zip(files, parts.values(), strict=True):
        file.write_text("".join(model.tokenizer.decode(ids.tolist()) for ids in windows))
    return Original(directory, model, sample, *files)


def converted(source: Original, name: str, options: dict[str, Any]) -> Path:
    """The directory of a conversion, made unless it is there already."""
    count, length = source.sample.calibration.shape
    words, text = name.replace(",", "").replace(" ", "-").lower(), {}
    if options.get("codec", "trellis") in ("trellis", "qmoe"):
        text = {"calibration": str(source.calibration), "sequences": count, "sequence_tokens": length}
        words += f"-{count}"
    out = source.directory.with_name(f"{source.directory.name}-{words}")
    return out if out.exists() else Path(convert(source.directory, out, rest_bits=16, **text, **options))


def measured_bytes(directory: Path) -> dict[str, float]:
    """Bits a weight of what is coded, all bytes of its files and of a table that they need counted; and megabytes of
    these, and of all weight files of the model.
    """
    weights = sum(layer.weights for layer in open_model(directory).spec.layers)
    table = directory / tuples.FILE
    coded = sizes(directory)["expert_file_bytes"] + (table.stat().st_size if table.is_file() else 0)
    whole = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return {"bits": 8 * coded / weights, "coded_mb": coded / 1e6, "model_mb": whole / 1e6}
