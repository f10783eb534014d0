"""A conversion of a checkpoint larger than the memory it may use, and how fast the encoder is.

    python benchmarks/bench_convert.py [--layers 8] [--limit 6GB] [--bits 2] [--quick] [--json] [--keep DIR]

Makes a checkpoint of Qwen3-30B-A3B's shape out of random float32 weights (8 layers: 23 GB), converts it in a process
that the operating system holds to `--limit` (a memory cgroup: run as root on Linux), and prints the peak. Then weights
per second and core of the C++ encoder for L 12, 14 and 16, and what a model of 30 billion weights takes.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import limits
import numpy as np

from tiny_qmoe_mlx import blas, native
from tiny_qmoe_mlx.budget import parse_memory

SHAPE = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
SMALL = {**SHAPE, "hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 16, "vocab_size": 4096}
POOL = 1 << 25  # random values that all weights are cut from: fresh ones for 23 GB would take longer than converting
EXPERT_WEIGHTS_30B = 48 * 128 * 3 * 2048 * 768
SLOTS = 42  # issue slots of the Metal encoder for each state and step, counted by tests/test_metal_profile.py
M3_MAX = 40 * 128 * 1.4e9  # issue slots a second of 40 cores with 128 lanes: a model, nobody has timed it


def tensors(config: dict, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one layer's tensors, as the checkpoints on the hub have them."""
    d, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    size, width, at = config["head_dim"], config["moe_intermediate_size"], f"model.layers.{layer}"
    yield from ((f"{at}.{norm}.weight", (d,)) for norm in ("input_layernorm", "post_attention_layernorm"))
    yield from ((f"{at}.self_attn.{norm}.weight", (size,)) for norm in ("q_norm", "k_norm"))
    yield f"{at}.self_attn.q_proj.weight", (heads * size, d)
    yield from ((f"{at}.self_attn.{name}.weight", (kv * size, d)) for name in ("k_proj", "v_proj"))
    yield f"{at}.self_attn.o_proj.weight", (d, heads * size)
    yield f"{at}.mlp.gate.weight", (config["num_experts"], d)
    for expert in range(config["num_experts"]):
        yield f"{at}.mlp.experts.{expert}.gate_proj.weight", (width, d)
        yield f"{at}.mlp.experts.{expert}.up_proj.weight", (width, d)
        yield f"{at}.mlp.experts.{expert}.down_proj.weight", (d, width)


def make_checkpoint(directory: Path, config: dict, layers: int) -> int:
    """Write a random checkpoint, a shard per layer; returns its bytes."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    pool = np.random.default_rng(0).standard_normal(POOL, dtype=np.float32) * np.float32(0.02)
    rng = np.random.default_rng(1)
    outside = [
        (f"{n}.weight", (config["vocab_size"], config["hidden_size"])) for n in ("model.embed_tokens", "lm_head")
    ]
    outside.append(("model.norm.weight", (config["hidden_size"],)))
    for shard, entries in enumerate([outside, *(list(tensors(config, layer)) for layer in range(layers))]):
        write_shard(directory / f"model-{shard:05d}-of-{layers + 1:05d}.safetensors", entries, pool, rng)
    write_tokenizer(directory, config["vocab_size"])
    return sum(p.stat().st_size for p in directory.iterdir())


def write_shard(path: Path, entries: list, pool: np.ndarray, rng: np.random.Generator) -> None:
    """One safetensors file, written tensor by tensor: a shard is larger than what should be in memory."""
    header, offset = {}, 0
    for name, shape in entries:
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in entries:
            count, start = int(np.prod(shape)), int(rng.integers(POOL // 2))
            if len(shape) == 1:
                file.write(np.ones(count, np.float32).data)
                continue
            while count:
                part = pool[start : start + min(count, POOL - start)]
                file.write(part.data)
                count, start = count - len(part), int(rng.integers(POOL // 2))


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(vocabulary - 1)} | {"?": vocabulary - 1}
    tokenizer = Tokenizer(models.WordLevel(words, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def convert_limited(source: Path, out: Path, limit: int, bits: float, sequences: int) -> dict:
    """Convert in a child process under a memory cgroup; seconds, and its peak in bytes."""
    text = source / "calibration.txt"
    rng = np.random.default_rng(2)
    text.write_text(" ".join(f"w{i}" for i in rng.integers(0, 4000, sequences * 256 + 256)))
    words = ("--hf-path", source, "--mlx-path", out, "--bits", bits, "--calibration", text)
    command = [sys.executable, "-c", CHILD, *map(str, words), "--calibration-sequences", str(sequences)]
    start = time.perf_counter()
    try:
        child, used = limits.run_command(command, limit)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    seconds = time.perf_counter() - start
    if child.returncode:
        raise SystemExit(f"the conversion failed ({child.returncode}) under {limit} bytes: {child.stderr[-500:]}")
    return {"seconds": seconds, "limit": limit, "peak_memory_bytes": int(child.stdout.split()[-1]), "with_cache": used}


CHILD = """
import importlib, sys
status = importlib.import_module("tiny_qmoe_mlx.convert").main([*sys.argv[1:], "--quiet"])
print(1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]))
sys.exit(status)
"""


def encoder_rows(quick: bool) -> list[dict]:
    """Weights per second and core of the C++ encoder at 2 bits, median of 3."""
    native.set_threads(1)
    rows = []
    for length in (12, 14, 16):
        tiles = np.random.default_rng(0).standard_normal((8 if quick else 256 >> (length - 12), 32, 16))
        tiles = tiles.astype(np.float32)
        runs = []
        for _ in range(3):
            start = time.process_time()
            native.encode_tiles(tiles, 4, length)
            runs.append(tiles.size / (time.process_time() - start))
        speed = sorted(runs)[1]
        hours = EXPERT_WEIGHTS_30B / speed / 7200
        row = {"length": length, "weights_per_s": speed, "hours_30b_2_cores": hours}
        rows.append({**row, "modelled_hours_30b_m3_max": modelled_hours(length)})
    return rows


def modelled_hours(length: int) -> float:
    """Hours of an M3 Max's 40 GPU cores for the experts of a 30B model at 2 bits, by counted issue slots."""
    steps = 256 + 2 * (8 * length // 4)  # of the two runs over a tile of 512 weights (kernels/trellis_viterbi.metal)
    return EXPERT_WEIGHTS_30B / 512 * steps * 2**length * SLOTS / M3_MAX / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--limit", default="6GB", help="memory of the conversion (default 6GB)")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--sequences", type=int, default=16, help="of 256 calibration tokens (default 16)")
    parser.add_argument("--keep", type=Path, help="work in this directory and keep the checkpoint")
    parser.add_argument("--quick", action="store_true", help="a small model of one layer")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    blas.install()
    result: dict = {"encoder": encoder_rows(args.quick)}
    for row in result["encoder"]:
        print(
            f"L {row['length']}: {row['weights_per_s'] / 1e6:.2f} million weights/s and core; "
            f"30B on 2 cores {row['hours_30b_2_cores']:.1f} h; on an M3 Max, modelled, never run: "
            f"{row['modelled_hours_30b_m3_max']:.2f} h"
        )
    with tempfile.TemporaryDirectory(dir=args.keep) as scratch:
        source = (args.keep or Path(scratch)) / "original"
        config, layers = (SMALL, 1) if args.quick else (SHAPE, args.layers)
        if not source.exists():
            make_checkpoint(source, config, layers)
        size = sum(p.stat().st_size for p in source.iterdir())
        out = Path(scratch) / "converted"
        found = convert_limited(source, out, parse_memory(args.limit), args.bits, args.sequences)
        written = sum(p.stat().st_size for p in out.iterdir())
        result |= {"checkpoint_bytes": size, "written_bytes": written, **found}
        shutil.rmtree(out)
    print(
        f"{size / 1e9:.1f} GB converted to {written / 1e9:.2f} GB in {found['seconds'] / 60:.1f} min under "
        f"{args.limit}: peak {found['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
