"""Tiny checkpoints laid out and quantized as their makers publish them, for tests of what is read from them."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import tiny_models
from mlx_lm.utils import load_model, quantize_model, save_model

Weights = dict[str, mx.array]
W_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
EXTRA = {
    "granitemoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "logits_scaling": 1.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_bias": False,
    },
    "deepseek_v3": {
        **tiny_models.FAMILIES["deepseek_v2"],
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "rope_scaling": None,
    },
    "phixtral": {"num_vocab": 258, "model_dim": 64, "num_heads": 4, "num_layers": 2, "rotary_dim": 8},
}
tiny_models.MORE.update(EXTRA)


def rewrite(directory: Path, change: Callable[[Weights], Weights], **config) -> Path:
    """Write a checkpoint's tensors anew as `change` gives them, and add to its config."""
    file = directory / "model.safetensors"
    weights = dict(mx.load(str(file)))
    mx.eval(weights)
    mx.save_safetensors(str(file), change(weights), {"format": "mlx"})
    (directory / "config.json").write_text(
        json.dumps({**json.loads((directory / "config.json").read_text()), **config})
    )
    return directory


def each_expert(weights: Weights) -> Weights:
    """A tensor per expert, in a shuffled order, named as Hugging Face's Qwen, OLMoE, ERNIE, DeepSeek and Mixtral do."""
    out = {}
    for name, array in weights.items():
        part = next((p for p in (".switch_mlp.", ".switch_glu.") if p in name), None)
        if part is None:
            out[name] = array
            continue
        head, tail = name.split(part)
        mixtral = "block_sparse_moe" in name
        for e in range(len(array)):
            matrix, kind = tail.split(".")
            out[f"{head}.experts.{e}.{W_NAMES[matrix] if mixtral else matrix}.{kind}"] = array[e]
    return dict(sorted(out.items(), key=lambda item: item[0][::-1]))


def fused_granite(weights: Weights) -> Weights:
    """Gate and up of all experts in one tensor."""
    out = dict(weights)
    for name in [n for n in weights if n.endswith("switch_mlp.gate_proj.weight")]:
        head = name.removesuffix("switch_mlp.gate_proj.weight")
        both = [out.pop(name), out.pop(f"{head}switch_mlp.up_proj.weight")]
        out[f"{head}input_linear.weight"] = mx.concatenate(both, axis=1)
        out[f"{head}output_linear.weight"] = out.pop(f"{head}switch_mlp.down_proj.weight")
    return out


def phixtral_experts(weights: Weights) -> Weights:
    """Experts of two matrices, each a module of its own in a list, with biases."""
    out = {}
    for name, array in weights.items():
        if ".switch_mlp." not in name:
            out[name] = array
            continue
        head, tail = name.split(".switch_mlp.")
        out.update({f"{head}.mlp.{e}.{tail}": array[e] for e in range(len(array))})
    return out


EACH = ("qwen3_moe", "mixtral", "olmoe", "ernie4_5_moe", "deepseek_v2", "deepseek_v3")
LAYOUTS = {
    **{f"{f} each": (f, each_expert) for f in EACH},
    **{f"{f} stacked": (f, dict) for f in ("qwen3_moe", "mixtral", "gpt_oss", "granitemoe")},
    "granitemoe fused": ("granitemoe", fused_granite),
    "phixtral each": ("phixtral", phixtral_experts),
}


def make(directory: Path, layout: str, **overrides) -> Path:
    """A tiny checkpoint in one of the layouts."""
    family, change = LAYOUTS[layout]
    return rewrite(tiny_models.make_checkpoint(directory, family, **overrides), change)


def quantize_with_mlx(directory: Path, mode: str, bits: int, group: int, mixed: bool = False) -> Path:
    """Quantize a checkpoint as mlx_lm.convert -q does; mixed: other bits for the experts' down projections."""
    model, config = load_model(directory)

    def wanted(path, module):
        down = mixed and "switch_mlp.down_proj" in path
        return {"group_size": group, "bits": 8, "mode": mode} if down else hasattr(module, "to_quantized")

    model, config = quantize_model(model, config, group, bits, mode=mode, quant_predicate=wanted)
    save_model(directory, model)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def make_gpt_oss_mxfp4(directory: Path, seed: int = 0) -> dict[int, dict[str, np.ndarray]]:
    """gpt-oss as published: 4-bit blocks and scales of random codes; returns each layer's expert tensors."""
    tiny_models.make_checkpoint(directory, "gpt_oss", seed, intermediate_size=96)
    rng, made = np.random.default_rng(seed), {}
    experts, hidden, width = 8, 64, 96

    def change(weights):
        out = {n: a for n, a in weights.items() if ".experts." not in n}
        for layer in range(3):
            made[layer] = tensors = {}
            for name, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
                blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16)).astype(np.uint8)
                tensors[f"{name}_blocks"] = blocks
                tensors[f"{name}_scales"] = rng.integers(119, 124, blocks.shape[:-1]).astype(np.uint8)
                tensors[f"{name}_bias"] = rng.normal(size=(experts, rows)).astype(np.float32)
            out |= {f"model.layers.{layer}.mlp.experts.{n}": mx.array(a) for n, a in tensors.items()}
        return out

    rewrite(directory, change, quantization_config={"quant_method": "mxfp4"})
    return made


PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def to_int4(expected: dict[str, np.ndarray]):
    """Experts as compressed-tensors packs them: 8 codes of 4 bits an int32, the lowest first; value (code - 8) x s."""

    def change(weights):
        rng, out = np.random.default_rng(0), {}
        for name, array in weights.items():
            if ".experts." not in name:
                out[name] = array
                continue
            rows, columns = array.shape
            codes = rng.integers(0, 16, (rows, columns)).astype(np.uint32)
            scale = mx.array(rng.uniform(0.01, 0.1, (rows, columns // 32)).astype(np.float32)).astype(mx.bfloat16)
            spread = np.repeat(np.array(scale.astype(mx.float32)), 32, 1)
            expected[name] = (codes.astype(np.float32) - 8) * spread
            words = (codes.reshape(rows, -1, 8) << (4 * np.arange(8, dtype=np.uint32))).sum(-1).astype(np.uint32)
            base = name.removesuffix(".weight")
            out[f"{base}.weight_packed"] = mx.array(words.view(np.int32))
            out[f"{base}.weight_scale"], out[f"{base}.weight_shape"] = scale, mx.array([rows, columns])
        return out

    return change
