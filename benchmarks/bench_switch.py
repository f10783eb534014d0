"""Loss on masked spans of a small Switch Transformer that is trained here, its experts compressed in several ways.

    python benchmarks/bench_switch.py [--steps 2000] [--keep DIR] [--quick] [--json]

Checkpoints of real Switch Transformers cannot be had here, and of random weights no loss says anything. So a small one
(8 experts in each of 4 sparse blocks, bytes for tokens) learns T5's task on Wikipedia, is converted as any other, with
calibration on other articles, and measured on news (texts.py). How good it is does not matter; how much of that is left
does. Bits count all bytes of the experts' files: its rows are so short that values and places of rows weigh far more
than in a large model.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import texts
from common import machine, print_json, print_table
from mlx import optimizers
from mlx.utils import tree_flatten
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # where tokenizers of bytes are made

import switch_models  # noqa: E402

from tiny_qmoe_mlx import blas, masked_spans  # noqa: E402
from tiny_qmoe_mlx.container import open_model  # noqa: E402
from tiny_qmoe_mlx.conversion.run import Settings, convert  # noqa: E402
from tiny_qmoe_mlx.evaluate import open_any  # noqa: E402
from tiny_qmoe_mlx.original import switch_transformers as switch  # noqa: E402
from tiny_qmoe_mlx.report.compare import evaluate, windows_of  # noqa: E402

CONFIG = {
    "model_type": "switch_transformers",
    "vocab_size": 384,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 192,
    "num_heads": 4,
    "num_experts": 8,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "expert_capacity": 1024,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}
LENGTH, BATCH, RATE, WARM = 128, 8, 3e-3, 100  # bytes of a text, texts of a step, of AdamW, steps until it is reached
BALANCE = 0.01  # weight of the loss that spreads tokens over experts (2101.03961, equation 4)
CASES = {
    "original": None,
    "qmoe, ternary, to nearest": Settings(bits=1.5, codec="qmoe", rest_bits=16, calibration="none"),
    "qmoe, ternary": Settings(bits=1.5, codec="qmoe", rest_bits=16),
    "qmoe, 4 levels, to nearest": Settings(
        bits=2, codec="qmoe", codewords="tunstall-8", rest_bits=16, calibration="none"
    ),
    "qmoe, 4 levels": Settings(bits=2, codec="qmoe", codewords="tunstall-8", rest_bits=16),
    "trellis 1.0": Settings(bits=1.0, rest_bits=16),
    "trellis 1.5": Settings(bits=1.5, rest_bits=16),
    "trellis 2.0": Settings(bits=2.0, rest_bits=16),
    "trellis 2.0, not calibrated": Settings(bits=2.0, rest_bits=16, calibration="none"),
    "trellis 3.0": Settings(bits=3.0, rest_bits=16),
}


def batches(ids: np.ndarray, marks: list[int], rng: np.random.Generator):
    """(encoder's tokens, decoder's) of texts at random places, without end."""
    while True:
        starts = rng.integers(0, len(ids) - LENGTH, BATCH)
        made = [masked_spans.mask(ids[s : s + LENGTH].tolist(), marks, 0, 1, rng) for s in starts]
        yield mx.array([m.inputs for m in made]), mx.array([list(m) for m in made])


def loss(model: switch.Model, inputs: mx.array, outputs: mx.array) -> tuple[mx.array, mx.array]:
    """What is minimized, and of it the loss on masked spans."""
    uneven: list[mx.array] = []
    route = switch.Mixture.route

    def noted(self, x, inside=None):
        share = mx.softmax(self.router(x), axis=-1).mean((0, 1))
        chosen, weight = route(self, x, inside)
        taken = (chosen == mx.arange(share.shape[0])).astype(mx.float32).mean((0, 1))
        uneven.append(share.shape[0] * (share * taken).sum())
        return chosen, weight

    switch.Mixture.route = noted
    try:
        logits = model(outputs[:, :-1], cache=model.make_cache(inputs))
    finally:
        switch.Mixture.route = route
    own = nn.losses.cross_entropy(logits, outputs[:, 1:], reduction="mean")
    return own + BALANCE * sum(uneven), own


def train(directory: Path, steps: int) -> None:
    """Write a checkpoint of a model that learnt for so many steps."""
    switch_models.write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    mx.random.seed(0)
    model = switch.Model(switch.ModelArgs.from_dict(CONFIG))
    text = np.frombuffer(texts.load("wiki").encode(), np.uint8)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    table = np.zeros(256, np.int64)
    for byte, name in zip(range(256), _names(), strict=True):
        table[byte] = tokenizer.token_to_id(name)
    marks = [tokenizer.token_to_id(f"<extra_id_{i}>") for i in range(masked_spans.SENTINELS)]
    source, step = batches(table[text], marks, np.random.default_rng(0)), nn.value_and_grad(model, loss)
    rate = optimizers.join_schedules(
        [optimizers.linear_schedule(0, RATE, WARM), optimizers.cosine_decay(RATE, max(1, steps - WARM))], [WARM]
    )
    optimizer, begun = optimizers.AdamW(rate), time.perf_counter()
    for number in range(steps):
        (_, own), gradient = step(model, *next(source))
        gradient, _ = optimizers.clip_grad_norm(gradient, 1.0)
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state, own)
        if number % max(1, steps // 20) == 0:
            print(f"step {number}: {own.item():.3f} after {time.perf_counter() - begun:.0f} s", flush=True)
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))


def _names() -> list[str]:
    """The character that stands for each byte in a byte-level tokenizer."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


def measure(source: Path, settings: Settings | None, calibration: Path, text: str, tokens: int) -> dict[str, float]:
    """Loss on masked spans of a text, KL and agreement with the original, and bits of the experts' files."""
    original, tokenizer = open_any(str(source), quiet=True)
    windows = windows_of(text, LENGTH, tokens, tokenizer, CONFIG)
    if settings is None:
        return {"bits": 32.0, "loss": evaluate(original, windows)["nll"], "kl": 0.0, "top1": 1.0}
    if settings.calibration != "none":
        settings = Settings(
            **{**settings.__dict__, "calibration": str(calibration), "sequences": 256, "sequence_tokens": LENGTH}
        )
    with tempfile.TemporaryDirectory() as folder:
        out = convert(source, Path(folder) / "out", settings)
        model, _ = open_any(str(out), quiet=True)
        found = evaluate(model, windows, original)
        model.close()
        return {
            "bits": open_model(out).spec.bits,
            "loss": found["nll"],
            "kl": found["kl_mean"],
            "top1": found["top1"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of the training (default 2000)")
    parser.add_argument("--keep", type=Path, help="train in this directory, or take what was trained there")
    parser.add_argument("--quick", action="store_true", help="20 steps and few tokens: whether it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    blas.install()
    steps, tokens = (20, 200) if args.quick else (args.steps, 8192)
    with tempfile.TemporaryDirectory() as folder:
        source = args.keep or Path(folder) / "hf"
        source.mkdir(parents=True, exist_ok=True)
        if not (source / "model.safetensors").exists():
            train(source, steps)
        calibration = Path(folder) / "brown.txt"
        calibration.write_text(texts.load("brown")[:200_000])
        rows = []
        for name, settings in CASES.items():
            rows.append({"method": name, **measure(source, settings, calibration, texts.load("lee"), tokens)})
            print(f"{name}: loss {rows[-1]['loss']:.4f}", flush=True)
    print_table(
        ["", "bits", "loss", "KL", "same best token"],
        [[r["method"], r["bits"], f"{r['loss']:.4f}", f"{r['kl']:.4f}", f"{100 * r['top1']:.1f} %"] for r in rows],
    )
    if args.json:
        print_json({"rows": rows, "steps": steps, "machine": machine()})


if __name__ == "__main__":
    main()
