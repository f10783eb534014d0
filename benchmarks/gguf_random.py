"""A GGUF file of Qwen3-30B-A3B's shape with random weights, for llama.cpp's speed and memory at full size.

    python benchmarks/gguf_random.py OUT.gguf [--experts-type Q3_K] [--dense-type Q8_0] [--layers 48] [--tiny]

Every block is random bytes with scales that keep the weights near 0.02, so activations stay finite; norms are ones.
The router is random too. Embeddings are large beside what the layers add, so that tokens drawn at random choose their
experts at random, in every layer anew: the worst case for any cache of experts. There is no vocabulary in the file:
token ids go in. Q3_K and IQ3_S experts take 12.5 GB, the rest 1.7 GB at Q8_0.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

SHAPE = {
    "layers": 48, "experts": 128, "chosen": 8, "hidden": 2048, "width": 768, "heads": 32, "kv_heads": 4,
    "head_dim": 128, "vocabulary": 151936, "dense_width": 6144, "context": 4096,
}  # fmt: skip
TINY = {**SHAPE, "layers": 2, "experts": 8, "chosen": 2, "hidden": 256, "width": 256, "heads": 4, "kv_heads": 2,
        "head_dim": 64, "vocabulary": 512, "dense_width": 256}  # fmt: skip
DEVIATION = 0.02  # of the weights, about
EMBEDDING = 100.0  # deviation of the embeddings
POOL = 1 << 26  # random bytes that all blocks are cut from: fresh ones for 12 GB would take minutes

Tensor = tuple[str, tuple[int, int], str, int]  # name, (rows, columns) of one matrix, ggml type, matrices


def _half(value: float) -> np.ndarray:
    return np.array([value], "<f2").view(np.uint8)


# Per type: where the fp16 scales lie in a block, and the values that give DEVIATION with all other bytes random.
# Q8_0: d int8. Q3_K: d (6-bit scale - 32) (-4..3). Q4_K: d scale (0..15) - dmin minimum, means equal.
# IQ3_S: d (1 + 2 (0..15)) (odd 1..15, signed).
SCALES: dict[str, list[tuple[int, float]]] = {
    "Q8_0": [(0, DEVIATION / 74)],
    "Q3_K": [(108, DEVIATION / 43)],
    "Q4_K": [(0, DEVIATION / 290), (2, 7.5 * DEVIATION / 290)],
    "IQ3_S": [(0, DEVIATION / 150)],
}


def tensors(shape: dict[str, int], experts_type: str, dense_type: str) -> Iterator[Tensor]:
    """All tensors in the order of the file."""
    d, width, experts = shape["hidden"], shape["width"], shape["experts"]
    queries, keys = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    yield "token_embd.weight", (shape["vocabulary"], d), dense_type, 1
    yield "output_norm.weight", (1, d), "F32", 1
    yield "output.weight", (shape["vocabulary"], d), dense_type, 1
    for layer in range(shape["layers"]):
        at = f"blk.{layer}"
        yield f"{at}.attn_norm.weight", (1, d), "F32", 1
        yield f"{at}.attn_q.weight", (queries, d), dense_type, 1
        yield f"{at}.attn_k.weight", (keys, d), dense_type, 1
        yield f"{at}.attn_v.weight", (keys, d), dense_type, 1
        yield f"{at}.attn_output.weight", (d, queries), dense_type, 1
        yield f"{at}.attn_q_norm.weight", (1, shape["head_dim"]), "F32", 1
        yield f"{at}.attn_k_norm.weight", (1, shape["head_dim"]), "F32", 1
        yield f"{at}.ffn_norm.weight", (1, d), "F32", 1
        yield f"{at}.ffn_gate_inp.weight", (experts, d), "F32", 1
        yield f"{at}.ffn_gate_exps.weight", (width, d), experts_type, experts
        yield f"{at}.ffn_up_exps.weight", (width, d), experts_type, experts
        yield f"{at}.ffn_down_exps.weight", (d, width), experts_type, experts


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor in the file.

    Raises:
        ValueError: the type's block does not divide the columns.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, (rows, columns), kind, count = tensor
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    if columns % block:
        raise ValueError(f"[gguf] the rows of {name} should be a multiple of {block} for {kind}, received {columns}.")
    return count * rows * columns // block * size


def expert_bytes(shape: dict[str, int], experts_type: str) -> int:
    """Bytes of all experts."""
    return sum(tensor_bytes(t) for t in tensors(shape, experts_type, "Q8_0") if "_exps" in t[0])


def block_pool(kind: str, rng: np.random.Generator, size: int = POOL) -> np.ndarray:
    """Random blocks of a type with sane scales, u8 (blocks, bytes of a block)."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    pool = rng.integers(0, 256, (max(size // block, 1), block), np.uint8)
    for offset, value in SCALES[kind]:
        pool[:, offset : offset + 2] = _half(value)
    return pool


def values(tensor: Tensor, pool_of: Callable[[str], np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """What a tensor holds: ones for a norm, a random router, cuts of the pool for blocks; float32 or u8."""
    name, (rows, columns), kind, _ = tensor
    if kind == "F32":
        if rows == 1:
            return np.ones(columns, np.float32)
        return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(DEVIATION)
    pool, blocks = pool_of(kind), tensor_bytes(tensor) // pool_of(kind).shape[1]
    out = np.empty((blocks, pool.shape[1]), np.uint8)
    step = max(len(pool) // 2, 1)
    for start in range(0, blocks, step):
        part = out[start : start + step]
        part[:] = pool[(at := int(rng.integers(len(pool) - len(part) + 1))) : at + len(part)]
    if name == "token_embd.weight":
        for offset, value in SCALES[kind]:
            out[:, offset : offset + 2] = _half(value * EMBEDDING / DEVIATION)
    return out.reshape(-1)


def write(path: Path, shape: dict[str, int], experts_type: str = "Q3_K", dense_type: str = "Q8_0") -> int:
    """Write the file, tensor by tensor; returns its bytes.

    Raises:
        ValueError: a type that is not in SCALES, or whose block does not divide the rows.
    """
    for kind in (experts_type, dense_type):
        if kind not in SCALES:
            raise ValueError(f"[gguf] a type should be one of {', '.join(SCALES)}, received {kind}.")
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(str(path), "qwen3moe")
    _write_config(writer, shape)
    everything = list(tensors(shape, experts_type, dense_type))
    for tensor in everything:
        name, matrix, kind, count = tensor
        dims = (count, *matrix) if count > 1 else matrix if matrix[0] > 1 else matrix[1:]
        size = tensor_bytes(tensor)
        writer.add_tensor_info(name, dims, np.dtype(np.float32), size, GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    pools: dict[str, np.ndarray] = {}

    def pool_of(kind: str) -> np.ndarray:
        if kind not in pools:
            pools[kind] = block_pool(kind, rng)
        return pools[kind]

    for tensor in everything:
        writer.write_tensor_data(values(tensor, pool_of, rng))
    writer.close()
    return path.stat().st_size


def _write_config(writer, shape: dict[str, int]) -> None:
    writer.add_block_count(shape["layers"])
    writer.add_context_length(shape["context"])
    writer.add_embedding_length(shape["hidden"])
    writer.add_feed_forward_length(shape["dense_width"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(shape["experts"])
    writer.add_expert_used_count(shape["chosen"])
    writer.add_expert_feed_forward_length(shape["width"])
    writer.add_vocab_size(shape["vocabulary"])
    writer.add_tokenizer_model("no_vocab")


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts-type", default="Q3_K", choices=sorted(SCALES))
    parser.add_argument("--dense-type", default="Q8_0", choices=sorted(SCALES), help="of attention and embeddings")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tiny", action="store_true", help="2 layers, 8 experts, width 256")
    args = parser.parse_args()
    shape = dict(TINY if args.tiny else SHAPE)
    shape["layers"] = args.layers or shape["layers"]
    size = write(args.out, shape, args.experts_type, args.dense_type)
    print(f"{args.out}: {size / 1e9:.2f} GB, experts {expert_bytes(shape, args.experts_type) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
