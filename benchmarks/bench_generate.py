"""Decode speed of the demo model: compressed and resident, beside plain mlx-lm at 4 bits on the same mixture of
experts.

    python benchmarks/bench_generate.py [--quick] [--json]

Both models run in one process and take turns; each turn writes the same number of greedy tokens after the same prompt.
The share of the dense layers is measured by running ours once more with the experts' work left out.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import tiny_qmoe_mlx  # noqa: F401 (before mlx: it may give MLX a faster BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from tiny_qmoe_mlx import blas, demo, layers, locate, models
from tiny_qmoe_mlx.original import checkpoint

PROMPT_TOKENS = 16


def four_bit(directory: Path) -> nn.Module:
    """The demo's original at MLX's 4 bits (group 64), written and loaded as mlx_lm.convert does, float32
    activations.
    """
    source, config = checkpoint.load_lazy(demo.source_directory())
    source.set_dtype(mx.float32)
    quantized, config = quantize_model(source, config, 64, 4)
    save_model(directory, quantized)
    save_config(config, directory / "config.json")
    return load_model(directory)[0]


def tokens_per_second(model: nn.Module, prompt: mx.array, count: int) -> float:
    """Greedy decode speed, the prompt not counted."""
    steps = generate_step(prompt, model, max_tokens=count)
    next(steps)
    start = time.perf_counter()
    produced = sum(1 for _ in steps)
    return produced / (time.perf_counter() - start)


def without_experts(model: nn.Module, prompt: mx.array, count: int) -> float:
    """The same with expert layers that return zeros."""
    kept = layers.RecordExperts.__call__
    layers.RecordExperts.__call__ = lambda self, x, i: mx.zeros((*i.shape, x.shape[-1]), x.dtype)
    try:
        return tokens_per_second(model, prompt, count)
    finally:
        layers.RecordExperts.__call__ = kept


def main() -> None:
    """Print a table, and with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns and tokens")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    turns, count = (3, 32) if args.quick else (7, 100)
    model, tokenizer = models.load(locate.model_directory("demo"))
    prompt = mx.array(tokenizer.encode(demo.calibration_text_path().read_text()[:400])[:PROMPT_TOKENS])
    with tempfile.TemporaryDirectory() as folder:
        plain = four_bit(Path(folder))
    speeds: dict[str, list[float]] = {"ours": [], "mlx-lm 4-bit": [], "ours without experts": []}
    for _ in range(turns):
        speeds["ours"].append(tokens_per_second(model, prompt, count))
        speeds["mlx-lm 4-bit"].append(tokens_per_second(plain, prompt, count))
        speeds["ours without experts"].append(without_experts(model, prompt, count))
    median = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["mlx-lm 4-bit"], strict=True)]
    share = median["ours"] / median["ours without experts"]
    for name, value in median.items():
        print(
            f"{name:22} {value:7.1f} tokens/s (median of {turns}, {min(speeds[name]):.1f} to {max(speeds[name]):.1f})"
        )
    print(
        f"ours / mlx-lm 4-bit    {statistics.median(ratios):7.2f}x (median of pairs, {min(ratios):.2f} to "
        f"{max(ratios):.2f})"
    )
    print(f"dense layers take {100 * share:.0f} % of our time; dense float32 products by {blas.install()}")
    if args.json:
        print(
            json.dumps(
                {
                    **{k.replace(" ", "_"): v for k, v in median.items()},
                    "ratio": statistics.median(ratios),
                    "dense_share": share,
                }
            )
        )


if __name__ == "__main__":
    main()
