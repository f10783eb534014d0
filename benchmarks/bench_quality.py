"""Quality of compressed experts on held-out text: perplexity, KL divergence and top-1 agreement with the original.

    python benchmarks/bench_quality.py [--quick] [--json] [--bits 1.5 2.0 3.0] [--models dense moe]

`rows`: SmolLM2-135M, each layer's feed-forward as one expert, ours beside MLX's affine quantization (group size 64),
every byte counted. `moe_rows`: the demo model, converted by `convert` and compared with the unconverted. Text for
calibration and for evaluation come from other passages of the same two sources (texts.py).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import texts
from dense_llama import CONTEXT, Dense, attention, forward, hidden, load, rms_norm

from tiny_qmoe_mlx import blas
from tiny_qmoe_mlx.codecs import rotation, trellis
from tiny_qmoe_mlx.quantize import ExpertInputs, quantize_layer, token_weights
from tiny_qmoe_mlx.rates import file_bytes, record_bytes_for

SEED = 0
HEADER_BYTES = 512
GROUP_SIZE = 64
CHUNK = 64  # tokens whose logits are in memory at once: they should fit the cache


@dataclass
class Sample:
    """Token ids, int (sequences, 512) each."""

    calibration: np.ndarray
    held_out: np.ndarray


def passages(model: Dense, calibration: int, evaluation: int) -> Sample:
    """From each text, sequences for calibration, spread over it, and its first ones for evaluation."""
    learn, held_out = [], []
    for name in texts.NAMES:
        ids = np.array(model.tokenizer.encode(texts.load(name)[:1_500_000]).ids)
        windows = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
        held_out.append(windows[:evaluation])
        rest = windows[2 * evaluation :]
        learn.append(rest[np.linspace(0, len(rest) - 1, calibration).astype(int)])
    return Sample(np.concatenate(learn), np.concatenate(held_out))


def compress(model: Dense, tokens: np.ndarray, bits: float, length: int) -> tuple[list[list[np.ndarray]], float]:
    """Feed-forward weights after a trip through records, and the bits that their files would spend.

    Calibration goes layer by layer through the layers compressed so far, as `convert` does.
    """
    shapes = [w.shape for w in model.feed_forward(0)]
    record_bytes, alignment = record_bytes_for(bits, shapes, experts=1, header_bytes=HEADER_BYTES)
    x = model.embedding[tokens]
    out = []
    for i in range(len(model.layers)):
        x = attention(model, i, x)
        z = rms_norm(x, model.layers[i]["ffn_norm"], model.epsilon).reshape(-1, x.shape[-1])
        weights = model.feed_forward(i)
        mid = hidden(weights[0], weights[1], z)
        weighted = z * token_weights(mid, weights[2])[:, None]
        expert = ExpertInputs(weights, z.T @ weighted / len(z), mid.T @ mid / len(z))
        signs = [rotation.signs(SEED, i, side, w.shape[1]) for side, w in enumerate(weights[1:])]
        (record,) = quantize_layer([expert], *signs, record_bytes, length)
        out.append(decoded(trellis.pack(record, record_bytes), shapes, signs))
        x += (hidden(out[-1][0], out[-1][1], z) @ out[-1][2].T).reshape(x.shape)
    spent = 8 * file_bytes(record_bytes, 1, alignment, HEADER_BYTES) / sum(r * c for r, c in shapes)
    return out, spent


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


def dense_rows(model: Dense, sample: Sample, asked: list[float], affine_bits: list[int], length: int) -> list[dict]:
    """The dense model: original, MLX affine, ours."""
    reference = forward(model, sample.held_out)
    scores = compare(model, reference, reference, sample.held_out)
    rows = [report({"method": "original", "asked": 32, "bits": 32.0, **scores})]
    for bits in affine_bits:
        weights, spent = affine(model, bits)
        scores = compare(model, reference, forward(model, sample.held_out, weights), sample.held_out)
        rows.append(report({"method": "affine", "asked": bits, "bits": spent, **scores}))
    for target in asked:
        start = time.perf_counter()
        weights, spent = compress(model, sample.calibration, target, length)
        seconds = time.perf_counter() - start
        scores = compare(model, reference, forward(model, sample.held_out, weights), sample.held_out)
        rows.append(report({"method": "trellis", "asked": target, "bits": spent, **scores, "seconds": seconds}))
    return rows


def moe_rows(windows: list[list[int]], asked: list[float], affine_bits: list[int], length: int) -> list[dict]:
    """The demo MoE, its experts alone compressed, against the unconverted; ours by the product's own commands."""
    from tiny_qmoe_mlx import demo
    from tiny_qmoe_mlx.container import sizes
    from tiny_qmoe_mlx.convert import convert
    from tiny_qmoe_mlx.evaluate import evaluate, open_any

    source = str(demo.source_directory())
    original, _ = open_any(source, quiet=True)

    def row(method: str, target: float, bits: float, model: Callable) -> dict:
        found = evaluate(model, windows, original)
        scores = {"ppl": found["perplexity"], "kl": found["kl_mean"], "top1": found["top1"]}
        return report({"method": method, "asked": target, "bits": bits, **scores})

    rows = [row("original", 16, 16.0, original)]
    for bits in affine_bits:
        rows.append(row("affine", bits, *affine_experts(source, bits)))
    for target in asked:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "converted"
            convert(
                source, out, bits=target, rest_bits=16, length=length, calibration=str(demo.calibration_text_path())
            )
            rows.append(row("trellis", target, sizes(out)["bits"], open_any(str(out), quiet=True)[0]))
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
        f"KL {row['kl']:.4f}  top-1 {row['top1']:.4f}" + (f"  {row['seconds']:.0f} s" if "seconds" in row else ""),
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, nargs="*", default=None, help="bits per weight (default: 1.5 2 3)")
    parser.add_argument("--affine", type=int, nargs="*", default=None, help="MLX affine bits (default: 2 3 4)")
    parser.add_argument("--models", nargs="*", default=["dense", "moe"], choices=["dense", "moe"], help="which models")
    parser.add_argument("--length", type=int, default=12, choices=trellis.LENGTHS, help="L of the trellis")
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
    model = load()
    sample = passages(model, *((4, 1) if args.quick else (24, 8)))
    result: dict = {}
    if "dense" in args.models:
        print(f"SmolLM2-135M, {sample.held_out.size} tokens")
        result["rows"] = dense_rows(model, sample, bits, affine_bits, args.length)
    if "moe" in args.models:
        windows = sample.held_out[:: 1 if args.quick else 2].tolist()
        print(f"demo MoE, {len(windows) * CONTEXT} tokens")
        result["moe_rows"] = moe_rows(windows, bits, affine_bits, args.length)
    return result


if __name__ == "__main__":
    main()
