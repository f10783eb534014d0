"""Tiny-QMoE (arXiv 2509.22951) checked: its published sizes, the rate of its stated coder on real weights, and ours.

    python benchmarks/bench_tiny_qmoe.py [--quick] [--json]

1. The sizes that it prints for Llama 3.2 1B and 3B, from the shapes in their configs alone.
2. SmolLM2-135M's weights (every matrix of its decoder layers, and the embedding) as its 8-bit codes: their entropy,
   what the table of 4-tuples makes of them, and what rANS makes of them; all bytes of a coded plane counted.
3. What codec `lossless` saves of the same layers as they are shipped: bfloat16, and in MLX's quantizations.
4. How fast the decoders are on one layer's codes.

What rounding to 8 bits costs, and how fast whole models are: bench_ancestors.py's table.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from common import interleaved, machine, print_json, print_table
from dense_llama import Dense, Matrices, load

from tiny_qmoe_mlx import native, native_rans
from tiny_qmoe_mlx.codecs import affine, levels, packed, rans, tuples

MIB = 1 << 20
NPY_HEADER = 128  # bytes that numpy.save puts before an array
# Of the models' public configs; published: MiB of "8 bits + dictionary" in the paper's table
LLAMA = {
    "Llama 3.2 1B": {"vocabulary": 128256, "hidden": 2048, "layers": 16, "published": 125.29},
    "Llama 3.2 3B": {"vocabulary": 128256, "hidden": 3072, "layers": 28, "published": 187.97},
}
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
GROUPS = {"a matrix": 0, "128 columns": 128}  # what shares a scale
SHIPPED = {
    "bfloat16": None,
    **{f"MLX affine {bits} bits, groups of 64": ("affine", bits, 64) for bits in (2, 3, 4, 6, 8)},
    "MXFP4": ("mxfp4", 4, 32),
}


# ---- the published sizes


def faulty_bytes(vocabulary: int, hidden: int, layers: int) -> int:
    """Bytes of the files that the published code writes for a GPTQ model.

    GPTQ keeps the codes of linear layers in buffers, so `parameters()` gives the embedding (which is the head too) and
    the norms, two a layer and the last: float16 values, not codes. `.astype(uint8)` makes nearly all of them 0. Every
    run of four is then in the table: 2 bytes for 4 parameters, a .npy file for each tensor.
    """
    tensors = [vocabulary * hidden] + [hidden] * (2 * layers + 1)
    return sum(NPY_HEADER + count // 4 * 2 for count in tensors)


def audit(model: Dense) -> list[dict[str, Any]]:
    """Predicted and published sizes; what the same conversion to uint8 does to a real embedding."""
    truncated = model.embedding.astype(np.float16).astype(np.int32).astype(np.uint8)
    zeros = float((truncated == 0).mean())
    table = tuples.make_table([truncated.reshape(-1)])
    coded = tuples.encode(truncated.reshape(-1), table)
    rows = []
    for name, shape in LLAMA.items():
        size = faulty_bytes(shape["vocabulary"], shape["hidden"], shape["layers"])
        rows.append({"model": name, "bytes": size, "mib": size / MIB, "published_mib": shape["published"]})
    rows.append({"model": "SmolLM2-135M's embedding", "zeros": zeros, "bytes_of_4": coded.nbytes / truncated.size * 4})
    return rows


# ---- 8-bit codes


def matrices(model: Dense) -> Iterator[tuple[str, np.ndarray]]:
    """Every matrix with a name, float32, the embedding first."""
    yield "embedding", model.embedding
    for index, layer in enumerate(model.layers):
        yield from ((f"{index} {name}", layer[name]) for name in MATRICES)


def rates(model: Dense, group: int) -> dict[str, float]:
    """Bits a weight of all matrices' codes: entropy of each by itself, tuples, rANS; scales and zeros on their own."""
    codes = [levels.quantize(w, group) for _, w in matrices(model)]
    planes = [c["weight"].reshape(-1) for c in codes]
    count = sum(map(len, planes))
    table = tuples.make_table(planes)
    coded = [tuples.encode(p, table) for p in planes]
    kept = sum(min(len(p), c.nbytes) for p, c in zip(planes, coded, strict=True))
    hits = 1 - sum(int((c == tuples.ESCAPE).sum()) for c in coded) / sum(len(p) / 4 for p in planes)
    entropy = sum(rans.entropy(p) * len(p) for p in planes) / count
    ours = 8 * sum(len(rans.encode(p).pack()) for p in planes) / count
    side = sum(c["scales"].nbytes + c["zeros"].nbytes for c in codes)
    return {
        "entropy": entropy,
        "hits": hits,
        "tuples": 8 * (sum(c.nbytes for c in coded) + table.nbytes) / count,
        "tuples_or_raw": 8 * (kept + table.nbytes) / count,
        "rans": ours,
        "rans_over_entropy": ours / entropy - 1,
        "scales": 8 * side / count,
    }


def tiny_qmoe(model: Dense, tokens: np.ndarray, group: int, coder: str) -> tuple[list[Matrices], float]:
    """A method as rivals.py has them: the feed-forward weights rounded, and bits a weight of their records."""
    packing = (affine.Packing("levels", 8, group, "float16" if group else "float32"),) * 3
    coded = [[levels.quantize(w, group) for w in model.feed_forward(i)] for i in range(len(model.layers))]
    table = tuples.make_table(a["weight"].reshape(-1) for layer in coded for a in layer) if coder == "tuples" else None
    shapes = [w.shape for w in model.feed_forward(0)]
    spent = sum(len(packed.pack(layer, shapes, packing, coder, table)) for layer in coded)
    spent += 0 if table is None else table.nbytes
    weights = [[levels.dequantize(a, group) for a in layer] for layer in coded]
    return weights, 8 * spent / sum(w.size for layer in weights for w in layer)


# ---- shipped weights


def shipped(model: Dense, kind: tuple[str, int, int] | None, layers: int) -> dict[str, float]:
    """Bits a weight of some decoder layers' matrices as they are shipped, and as a lossless record."""
    before = after = count = 0
    for layer in model.layers[:layers]:
        found = [_arrays(layer[name], kind) for name in MATRICES]
        shapes = [layer[name].shape for name in MATRICES]
        packing = (_packing(kind),) * len(found)
        record = packed.pack(found, shapes, packing, "rans")
        for got, had in zip(packed.expand(record, shapes, packing, "record"), found, strict=True):
            assert all((got.arrays[key] == array).all() for key, array in had.items())
        before += sum(array.nbytes for arrays in found for array in arrays.values())
        after += len(record)
        count += sum(rows * columns for rows, columns in shapes)
    return {"before": 8 * before / count, "after": 8 * after / count, "saved": 1 - after / before}


def _packing(kind: tuple[str, int, int] | None) -> affine.Packing:
    if kind is None:
        return affine.Packing("plain", 16, 0, "bfloat16")
    return affine.Packing(*kind, "bfloat16" if kind[0] == "affine" else "uint8")


def _arrays(weight: np.ndarray, kind: tuple[str, int, int] | None) -> dict[str, np.ndarray]:
    """A matrix's arrays as MLX ships them."""
    plain = mx.array(weight).astype(mx.bfloat16)
    if kind is None:
        return {"weight": np.array(plain.view(mx.uint16))}
    mode, bits, group = kind
    parts = zip(("weight", "scales", "biases"), mx.quantize(plain, group, bits, mode=mode), strict=False)
    return {name: np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a) for name, a in parts}


# ---- speed


def speed(model: Dense, rounds: int) -> dict[str, float]:
    """Million codes a second of one layer's matrices, numpy's decoder and the C++ library's, with its threads."""
    planes = [levels.quantize(model.layers[0][name], 0)["weight"].reshape(-1) for name in MATRICES]
    coded = [(rans.encode(p), len(p)) for p in planes]
    cases = {"numpy": lambda: [rans.decode(*c, "layer") for c in coded]}
    if native.available():
        cases["cpp"] = lambda: [native_rans.decode(*c, "layer") for c in coded]
    found = interleaved(cases, rounds)
    return {name: sum(map(len, planes)) / times["median_s"] / 1e6 for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few layers")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    found = show(args.quick)
    if args.json:
        print_json({**found, "machine": machine()})


def show(quick: bool) -> dict[str, Any]:
    """Print what takes no conversion; its values."""
    model = load()
    if quick:
        model.layers, model.embedding = model.layers[:4], model.embedding[:4096]
    found: dict[str, Any] = {"audit": show_audit(audit(model))}
    found["rates"] = show_rates({name: rates(model, group) for name, group in GROUPS.items()})
    found["shipped"] = show_shipped({name: shipped(model, kind, 4 if quick else 10) for name, kind in SHIPPED.items()})
    found["million_codes_per_s"] = speed(model, 3 if quick else 9)
    print(f"\nrANS, million codes a second: {found['million_codes_per_s']}", flush=True)
    return found


# ---- tables for people; each is printed as soon as it is there


def show_audit(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    *sizes, embedding = found
    print("Files of the published code, from the configs alone (embedding and norms cut to uint8, no linear layer):")
    rows = [[r["model"], r["bytes"], r["mib"], r["published_mib"]] for r in sizes]
    print_table(["model", "bytes", "MiB", "published"], rows)
    zeros, four = embedding["zeros"], embedding["bytes_of_4"]
    print(f"SmolLM2-135M's embedding so cut: {zeros:.4%} zeros, {four:.4f} bytes for 4 weights", flush=True)
    return found


def show_rates(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    print("\n8-bit codes of SmolLM2-135M, bits a weight:")
    header = ["a scale for", "entropy", "tuples hit", "tuples", "or raw", "rANS", "rANS over entropy", "scales"]
    keys = ("entropy", "hits", "tuples", "tuples_or_raw", "rans", "rans_over_entropy", "scales")
    form = {"hits": "{:.2%}", "rans_over_entropy": "{:.2%}"}
    print_table(header, [[n, *(form.get(k, "{:.3f}").format(r[k]) for k in keys)] for n, r in found.items()])
    return found


def show_shipped(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    print("\nlossless, all arrays of decoder layers, bits a weight:")
    rows = [[n, f"{r['before']:.3f}", f"{r['after']:.3f}", f"{r['saved']:.1%}"] for n, r in found.items()]
    print_table(["shipped as", "before", "after", "saved"], rows)
    return found


if __name__ == "__main__":
    main()
