"""Quality of compressed experts on held-out text: perplexity, KL divergence and top-1 agreement with the original.

    python benchmarks/bench_quality.py [--quick] [--json] [--bits 1.5 2.0 3.0] [--seed 0 1 2] [--ablate] [--models ...]
                                       [--model smollm2|gemma]
                                       [--add rivals.json] [--plot FILE.png]

`rows`: SmolLM2-135M (or Gemma-3-270m), each layer's feed-forward as one expert, ours beside MLX's affine quantization
(group size 64), every byte counted; with several seeds (calibration passages and rotation signs) each seed's row and
`medians`.
`ablation`: at 2 bits, one ingredient left out or changed per row. `moe_rows`: the demo model, by `convert`, and
the unconverted. Text for calibration and for evaluation come from other passages of the same two sources;
`kl_other` is the KL divergence on a source that calibration never sees (texts.py).
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dense_gemma
import dense_llama
import numpy as np
import texts
from ablations import ABLATIONS
from common import plot_rates
from dense_llama import CONTEXT, Dense, forward

from tiny_qmoe_mlx import blas
from tiny_qmoe_mlx.codecs import rotation, trellis
from tiny_qmoe_mlx.conversion.drift import corrected_down
from tiny_qmoe_mlx.conversion.quantize import ExpertInputs, quantize_layer, token_weights
from tiny_qmoe_mlx.conversion.rates import file_bytes, layer_bits, record_bytes_for

SEED = 0
CALIBRATION = 24  # sequences of each text
SHIFT = 3  # windows by which another seed's calibration passages lie further on
TEXT = 1_500_000  # characters of a source
NOISE = np.float32(0.1)  # relative size of the noise that sensitivities are measured with
LAYER_BOUNDS = (0.75, 4.0)  # bits of a layer
SENSED = 256  # tokens of each sequence in that measurement
ABLATION_BITS = 2.0
HEADER_BYTES = 512
GROUP_SIZE = 64
LOADERS = {"smollm2": dense_llama.load, "gemma": dense_gemma.load}
CHUNK = 64  # tokens whose logits are in memory at once: they should fit the cache


@dataclass
class Sample:
    """Token ids, int (sequences, 512) each; `other` is of sources that are not calibrated on."""

    calibration: np.ndarray
    held_out: np.ndarray
    other: np.ndarray


def passages(model: Dense, calibration: int, evaluation: int, seed: int = SEED) -> Sample:
    """From each text, sequences for calibration, spread over it, and its first ones for evaluation.

    Another seed takes other sequences for calibration; those for evaluation stay.
    """
    learn, held_out = [], []
    for name in texts.NAMES:
        windows = model.windows(texts.load(name)[:TEXT])
        held_out.append(windows[:evaluation])
        rest = windows[2 * evaluation :]
        spread = np.linspace(0, len(rest) - 1, calibration).astype(int)
        learn.append(rest[(spread + SHIFT * seed) % len(rest)])
    other = np.concatenate([model.windows(texts.load(name)[:TEXT])[:evaluation] for name in texts.UNSEEN])
    return Sample(np.concatenate(learn), np.concatenate(held_out), other)


def compress(
    model: Dense,
    tokens: np.ndarray,
    bits: float,
    length: int,
    seed: int = SEED,
    drift: bool = True,
    sensitivity: np.ndarray | None = None,
) -> tuple[list[list[np.ndarray]], float]:
    """Feed-forward weights after a trip through records, and the bits that their files would spend.

    Calibration goes layer by layer, beside the original model's states, as `convert` does.

    Args:
        seed: of the rotation's signs.
        drift: correct down for what the layers before and gate and up lost.
        sensitivity: of the layers (`sensitivities`); None for the same bits in all.
    """
    shapes = [w.shape for w in model.feed_forward(0)]
    layers, weights = len(model.layers), sum(rows * columns for rows, columns in shapes)
    shares = np.full(layers, bits)
    if sensitivity is not None:
        shares = layer_bits(sensitivity, np.full(layers, weights), bits, *LAYER_BOUNDS)
    original = x = model.embed(tokens)
    out, spent = [], 0
    for i in range(layers):
        record_bytes, alignment = record_bytes_for(shares[i], shapes, experts=1, header_bytes=HEADER_BYTES)
        spent += file_bytes(record_bytes, 1, alignment, HEADER_BYTES)
        x = model.attend(i, x)
        if drift:
            original = after_layer(model, i, model.attend(i, original))
        z = model.ffn_input(i, x).reshape(-1, x.shape[-1])
        expert = expert_inputs(model, i, x, z, original if drift else None)
        signs = [rotation.signs(seed, i, side, w.shape[1]) for side, w in enumerate(expert.weights[1:])]
        (record,) = quantize_layer([expert], *signs, record_bytes, length)
        gate, up, down = decoded(trellis.pack(record, record_bytes), shapes, signs)
        out.append([gate, up, down])
        x = model.join(i, x, (model.ffn_hidden(i, gate, up, z) @ down.T).reshape(x.shape))
    return out, 8 * spent / (layers * weights)


def after_layer(model: Dense, layer: int, x: np.ndarray) -> np.ndarray:
    """States after the layer's own feed-forward."""
    gate, up, down = model.feed_forward(layer)
    return model.join(layer, x, model.ffn_hidden(layer, gate, up, model.ffn_input(layer, x)) @ down.T)


def expert_inputs(model: Dense, layer: int, x: np.ndarray, z: np.ndarray, original: np.ndarray | None) -> ExpertInputs:
    """The feed-forward as the quantizer takes it.

    Args:
        x: states after attention, compressed. z: what gate and up read of them, (tokens, d).
        original: the original model's states after the layer; None for no correction of down.
    """
    gate, up, down = weights = model.feed_forward(layer)
    mid = model.ffn_hidden(layer, gate, up, z)
    weighted = z * token_weights(mid, down)[:, None]
    expert = ExpertInputs(weights, z.T @ weighted / len(z), mid.T @ mid / len(z))
    if original is not None:
        missing = None
        if type(model).join is Dense.join:  # else down's output passes a norm, and what is missing is no linear matter
            missing = (original - model.join(layer, x, (mid @ down.T).reshape(x.shape))).reshape(z.shape)

        def down_inputs(rounded: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
            new, moment = corrected_down(down, mid, model.ffn_hidden(layer, *rounded, z), missing)
            return new, moment / np.float32(len(z))

        expert.down_inputs = down_inputs
    return expert


def sensitivities(model: Dense, tokens: np.ndarray, seed: int = SEED) -> np.ndarray:
    """KL divergence per relative squared error of each layer's feed-forward output, float64 (layers,).

    One pass of the original model and one in which every sequence gets noise in one layer only: white, a tenth of the
    size of the token's output, or of the median token's if that is smaller.
    """
    rng = np.random.default_rng(seed)
    layers = len(model.layers)
    tokens = tokens[np.arange(max(len(tokens), layers)) % len(tokens)]  # at least one for each layer
    own = np.arange(len(tokens)) % layers
    x = model.embed(tokens)
    for i in range(layers):
        x = model.attend(i, x)
        gate, up, down = model.feed_forward(i)
        y = model.ffn_hidden(i, gate, up, model.ffn_input(i, x)) @ down.T
        noise = rng.standard_normal(y[own == i].shape, np.float32)
        size = np.linalg.norm(y[own == i], axis=-1, keepdims=True)
        size = np.minimum(size, np.median(size))  # tokens of massive activations stay all but exact in the Hessians
        y[own == i] += NOISE * noise * size / np.float32(y.shape[-1] ** 0.5)
        x = model.join(i, x, y)
    noisy, clean = model.finish(x), forward(model, tokens)
    kl = [compare(model, clean[[j]], noisy[[j]], tokens[[j]])["kl"] for j in range(len(tokens))]
    return np.array([np.mean([kl[j] for j in np.flatnonzero(own == i)]) for i in range(layers)]) / NOISE**2


def decoded(data: np.ndarray, shapes: list[tuple[int, int]], signs: list[np.ndarray]) -> list[np.ndarray]:
    """An expert's matrices in model space, out of its record's bytes, by the numpy specification."""
    record = trellis.parse(data, shapes, False, "bench_quality")
    sides = [signs[0]] * (len(shapes) - 1) + [signs[1]]
    return [
        rotation.unrotate(trellis.decode_matrix(m, record.length), sign)[:rows, :columns]
        for m, sign, (rows, columns) in zip(record.matrices, sides, shapes, strict=True)
    ]


def affine(model: Dense, bits: int) -> tuple[list[list[np.ndarray]], float]:
    """Feed-forward weights after mx.quantize, float16 scales and biases, and their bits."""
    import mlx.core as mx

    out, size, count = [], 0, 0
    for i in range(len(model.layers)):
        out.append([])
        for w in model.feed_forward(i):
            parts = mx.quantize(mx.array(w, dtype=mx.float16), GROUP_SIZE, bits)
            out[-1].append(np.array(mx.dequantize(*parts, GROUP_SIZE, bits).astype(mx.float32)))
            size += sum(part.nbytes for part in parts)
            count += w.size
    return out, 8 * size / count


def compare(model: Dense, reference: np.ndarray, other: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Perplexity, mean KL divergence (nats) and top-1 agreement from final hidden states (sequences, 512, d)."""
    loss, divergence, agree = [], [], []
    for ours, theirs, ids in zip(other, reference, tokens, strict=True):
        for start in range(0, len(ids), CHUNK):
            part = slice(start, start + CHUNK)
            following = ids[start + 1 : start + CHUNK + 1]
            p, q = theirs[part] @ model.embedding.T, ours[part] @ model.embedding.T
            agree.append(p.argmax(-1) == q.argmax(-1))
            (mass, p_sum), (_, q_sum) = _softmax(p), _softmax(q)
            loss.append(np.log(q_sum[: len(following)]) - q[np.arange(len(following)), following])
            p -= q
            divergence.append(np.einsum("ij,ij->i", mass, p) / p_sum - np.log(p_sum) + np.log(q_sum))
    return {
        "ppl": float(np.exp(np.mean(np.concatenate(loss)))),
        "kl": float(np.mean(np.concatenate(divergence))),
        "top1": float(np.mean(np.concatenate(agree))),
    }


def _softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exponentials and their sums, of logits that are shifted in place so that the largest of a row is 0."""
    logits -= logits.max(-1, keepdims=True)
    mass = np.exp(logits)
    return mass, mass.sum(-1)


class Scorer:
    """Scores of feed-forward weights on the held-out text, and the KL divergence on the other."""

    def __init__(self, model: Dense, sample: Sample):
        self.model, self.sample = model, sample
        self.held_out, self.other = forward(model, sample.held_out), forward(model, sample.other)

    def __call__(self, weights: list[list[np.ndarray]] | None) -> dict[str, float]:
        model, sample = self.model, self.sample
        scores = compare(model, self.held_out, forward(model, sample.held_out, weights), sample.held_out)
        other = compare(model, self.other, forward(model, sample.other, weights), sample.other)
        return {**scores, "kl_other": other["kl"]}


def dense_rows(
    model: Dense, samples: dict[int, Sample], asked: list[float], affine_bits: list[int], length: int
) -> list[dict]:
    """The dense model: original, MLX affine, ours with the samples of each seed."""
    score = Scorer(model, next(iter(samples.values())))
    rows = [report({"method": "original", "asked": 32, "bits": 32.0, **score(None)})]
    for bits in affine_bits:
        weights, spent = affine(model, bits)
        rows.append(report({"method": "affine", "asked": bits, "bits": spent, **score(weights)}))
    for seed, sample in samples.items():
        sensitivity = sensitivities(model, sample.calibration[:, :SENSED], seed)
        for target in asked:
            start = time.perf_counter()
            weights, spent = compress(model, sample.calibration, target, length, seed, True, sensitivity)
            seconds = time.perf_counter() - start
            row = {"method": "trellis", "asked": target, "bits": spent, "seed": seed, **score(weights)}
            rows.append(report({**row, "seconds": seconds}))
    return rows


def medians(rows: list[dict]) -> list[dict]:
    """Of our rows over the seeds, with the lowest and highest KL divergence."""
    out = []
    for target in dict.fromkeys(row["asked"] for row in rows if "seed" in row):
        same = [row for row in rows if "seed" in row and row["asked"] == target]
        middle = {name: float(np.median([row[name] for row in same])) for name in ("ppl", "kl", "top1", "kl_other")}
        kl = [row["kl"] for row in same]
        out.append({"asked": target, "seeds": len(same), **middle, "kl_least": min(kl), "kl_most": max(kl)})
    return out


def ablation(model: Dense, sample: Sample, only: list[str] | None = None) -> list[dict]:
    """At 2 bits: everything, and everything but one ingredient."""
    score, sensitivity = Scorer(model, sample), sensitivities(model, sample.calibration[:, :SENSED])
    rows = []
    for name, (length, drift, by_layer, without) in ABLATIONS.items():
        if only and name not in only:
            continue
        with without():
            weights, spent = compress(
                model, sample.calibration, ABLATION_BITS, length, SEED, drift, sensitivity if by_layer else None
            )
        rows.append(report({"method": name, "asked": ABLATION_BITS, "bits": spent, **score(weights)}))
    return rows


def moe_rows(
    windows: list[list[int]], asked: list[float], affine_bits: list[int], length: int, calibrations: list[str]
) -> list[dict]:
    """The demo MoE, its experts alone compressed, against the unconverted; ours by the product's own commands, at every
    rate with every calibration ("text": other passages of two sources that the windows come from).
    """
    from tiny_qmoe_mlx import demo
    from tiny_qmoe_mlx.container import sizes
    from tiny_qmoe_mlx.convert import convert
    from tiny_qmoe_mlx.evaluate import open_any
    from tiny_qmoe_mlx.report.compare import evaluate

    source = str(demo.source_directory())
    original, _ = open_any(source, quiet=True)

    def row(method: str, target: float, bits: float, model: Callable) -> dict:
        found = evaluate(model, windows, original)
        scores = {"ppl": found["perplexity"], "kl": found["kl_mean"], "top1": found["top1"]}
        return report({"method": method, "asked": target, "bits": bits, **scores})

    rows = [row("original", 16, 16.0, original)]
    for bits in affine_bits:
        rows.append(row("affine", bits, *affine_experts(source, bits)))
    for target, calibration in itertools.product(asked, calibrations):
        text = str(demo.calibration_text_path()) if calibration == "text" else calibration
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "converted"
            convert(source, out, bits=target, rest_bits=16, length=length, calibration=text)
            rows.append(row("trellis", target, sizes(out)["bits"], open_any(str(out), quiet=True)[0]))
            rows[-1]["calibration"] = calibration
    return rows


def affine_experts(source: str, bits: int) -> tuple[float, Callable]:
    """(bits per expert weight, the model with its experts after mx.quantize), float16 scales and biases."""
    import mlx.core as mx

    from tiny_qmoe_mlx.evaluate import open_any

    model, _ = open_any(source, quiet=True)
    size, count = 0, 0
    for _, module in model.named_modules():
        if type(module).__name__ == "SwitchLinear":
            parts = mx.quantize(module.weight.astype(mx.float16), GROUP_SIZE, bits)
            size, count = size + sum(part.nbytes for part in parts), count + module.weight.size
            module.weight = mx.dequantize(*parts, GROUP_SIZE, bits).astype(mx.float32)
    return 8 * size / count, model


def report(row: dict) -> dict:
    print(
        f"{row['method']:9s} asked {row['asked']:<5} bits {row['bits']:6.3f}  ppl {row['ppl']:9.2f}  "
        f"KL {row['kl']:.4f}  top-1 {row['top1']:.4f}"
        + (f"  KL other {row['kl_other']:.4f}" if "kl_other" in row else "")
        + (f"  seed {row['seed']}" if "seed" in row else "")
        + (f"  {row['seconds']:.0f} s" if "seconds" in row else ""),
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, nargs="*", default=None, help="bits per weight (default: 1.5 2 3)")
    parser.add_argument("--affine", type=int, nargs="*", default=None, help="MLX affine bits (default: 2 3 4)")
    parser.add_argument("--model", default="smollm2", choices=LOADERS, help="the dense model (default: smollm2)")
    parser.add_argument("--models", nargs="*", default=["dense", "moe"], choices=["dense", "moe"], help="which models")
    parser.add_argument("--length", type=int, default=12, choices=trellis.LENGTHS, help="L of the trellis")
    parser.add_argument("--seed", type=int, nargs="*", default=[SEED], help="seeds of the dense rows (default: 0)")
    parser.add_argument("--calibration", nargs="*", default=["text"], help="of the demo: text, self, builtin, none")
    parser.add_argument("--ablate", nargs="*", choices=ABLATIONS, default=None, help="the ablation, or rows of it")
    parser.add_argument("--add", type=Path, help="rows that `rivals.py --json` printed, a line each, for the plot")
    parser.add_argument("--plot", type=Path, help="draw KL against bits of the dense rows into this PNG file")
    parser.add_argument("--quick", action="store_true", help="2.0 bits and affine 2 only, fewer tokens")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    bits = args.bits if args.bits is not None else [2.0] if args.quick else [1.5, 2.0, 3.0]
    affine_bits = args.affine if args.affine is not None else [2] if args.quick else [2, 3, 4]
    blas.install()
    with blas.shared_machine():
        result = run(args, bits, affine_bits)
    if args.json:
        print(json.dumps(result))


def run(args: argparse.Namespace, bits: list[float], affine_bits: list[int]) -> dict:
    """Both models' rows, as asked on the command line."""
    model = LOADERS[args.model]()
    samples = {seed: passages(model, *((4, 1) if args.quick else (CALIBRATION, 8)), seed) for seed in args.seed}
    sample = samples[args.seed[0]]
    result: dict = {}
    if args.ablate is not None:
        print(f"{args.model}, ablation, {sample.held_out.size} tokens")
        result["ablation"] = ablation(model, sample, args.ablate)
        return result
    if "dense" in args.models:
        print(f"{args.model}, {sample.held_out.size} tokens")
        result["rows"] = dense_rows(model, samples, bits, affine_bits, args.length)
        result["medians"] = medians(result["rows"])
        if args.add:
            lines = [line for line in args.add.read_text().splitlines() if line.startswith("{")]
            result["rows"] += [row for line in lines for row in json.loads(line)["rivals"]]
        if args.plot:
            plot_rates(result["rows"], args.plot)
    if "moe" in args.models:
        windows = sample.held_out[:: 1 if args.quick else 2].tolist()
        print(f"demo MoE, {len(windows) * CONTEXT} tokens")
        result["moe_rows"] = moe_rows(windows, bits, affine_bits, args.length, args.calibration)
    return result


if __name__ == "__main__":
    main()
