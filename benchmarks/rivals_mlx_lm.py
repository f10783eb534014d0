"""mlx-lm's own learned quantizers, AWQ and DWQ, on the feed-forward weights alone; the rest of the model stays float32.

Both call mlx-lm's functions. Instead of quantized products, which are slow on a CPU, the weights are dequantized and
multiplied as float32: the same numbers. Import nothing of MLX before `blas.install()`; so MLX is imported inside.
"""

import contextlib
import sys
from typing import Any

import numpy as np
from dense_llama import Dense, Matrices, forward

GROUP_SIZE = 64
AWQ_SEQUENCES = 8  # of 512 tokens; mlx-lm's default is 128
DWQ_RATE = 3e-4  # of Adam, for a few dozen steps; mlx-lm's default of 1e-6 is for 2048 samples of 1025 tokens
LLAMA = {
    "attn_norm": "input_layernorm",
    **{f"attn_{short}": f"self_attn.{long}_proj" for short, long in (("q", "q"), ("k", "k"), ("v", "v"))},
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
GEMMA = {
    **LLAMA,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

Rounded = tuple[list[Matrices], float]


def affine_bits(bits: int) -> float:
    """Bits per weight of MLX's affine format: codes, and a float16 scale and bias for 64 of them."""
    return bits + 32 / GROUP_SIZE


def affine_parts(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What mx.quantize makes of a matrix: codes u8 (rows, groups, 64), scales and biases float32 (rows, groups)."""
    import mlx.core as mx

    parts = mx.quantize(mx.array(w).astype(mx.float16), GROUP_SIZE, bits)
    scales, biases = (np.array(part.astype(mx.float32)) for part in parts[1:])
    wide = [parts[0], parts[1].astype(mx.float32), parts[2].astype(mx.float32)]
    values = np.array(mx.dequantize(*wide, GROUP_SIZE, bits)).reshape(*scales.shape, GROUP_SIZE)
    scale = np.where(scales == 0, np.float32(1), scales)[..., None]
    return np.rint((values - biases[..., None]) / scale).astype(np.uint8), scales, biases


def affine_values(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """A matrix of affine_parts' form, float32; scales and biases are rounded to float16 on the way."""
    scales, biases = (part.astype(np.float16).astype(np.float32)[..., None] for part in (scales, biases))
    return (codes * scales + biases).reshape(len(codes), -1)


def awq(model: Dense, tokens: np.ndarray, bits: int) -> Rounded:
    """AWQ (arXiv 2306.00978) as mlx-lm searches it: scales of the inputs of gate, up and down, then clipped ranges.

    The scales are folded into the norm and into up, so what is returned has them divided out of gate and up again.
    """
    tokens = tokens[np.linspace(0, len(tokens) - 1, min(AWQ_SEQUENCES, len(tokens))).astype(int)]
    x = model.embed(tokens)
    out = []
    for i in range(len(model.layers)):
        x = model.attend(i, x)
        z = model.ffn_input(i, x)
        gate, up, down = model.feed_forward(i)
        mid = model.ffn_hidden(i, gate, up, z)
        y = mid @ down.T
        searched = _search(model, i, z, mid, bits)
        plain = [affine_values(*affine_parts(w, bits)) for w in (gate, up, down)]
        losses = [float(np.square(model.ffn_hidden(i, g, u, z) @ d.T - y).sum()) for g, u, d in (searched, plain)]
        out.append(searched if losses[0] <= losses[1] else plain)  # mlx-lm does the same
        x = model.join(i, x, y)
    return out, affine_bits(bits)


def _search(model: Dense, layer: int, z: np.ndarray, mid: np.ndarray, bits: int) -> Matrices:
    """A layer's matrices after mlx-lm's search on z (sequences, tokens, d) and mid (sequences, tokens, w)."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.quant import awq as published

    def quantize(w: Any) -> Any:
        return mx.dequantize(*mx.quantize(w, GROUP_SIZE, bits), GROUP_SIZE, bits)

    block = nn.Module()
    block.norm = nn.RMSNorm(z.shape[-1])  # stands for the layer's own; starts at ones, so it ends as 1 / scales
    block.mlp = _mlp(model, layer)
    block.mlp.gate_proj.input_feat = block.mlp.up_proj.input_feat = mx.array(z)
    block.mlp.down_proj.input_feat = mx.array(mid)
    configs = [
        published.ScaleConfig(prev="mlp.up_proj", layers=["mlp.down_proj"]),
        published.ScaleConfig(block="mlp", prev="norm", layers=["gate_proj", "up_proj"]),
    ]
    published.scale_block(block, configs, quantize, layer_kwargs={}, n_grid=20)
    published.clip_block(block, [], quantize, GROUP_SIZE)
    values = [
        affine_values(*affine_parts(np.array(linear.weight), bits))
        for linear in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj)
    ]
    inverse = np.array(block.norm.weight)
    mx.clear_cache()
    return [values[0] * inverse, values[1] * inverse, values[2]]


def _mlp(model: Dense, layer: int) -> Any:
    """An nn.Module with a layer's gate, up and down, as every MLP of mlx-lm."""
    import mlx.core as mx
    import mlx.nn as nn

    activation = getattr(nn, model.activation)

    class MLP(nn.Module):
        def __call__(self, x: Any) -> Any:
            return self.down_proj(activation(self.gate_proj(x)) * self.up_proj(x))

    mlp = MLP()
    for name, w in zip(("gate_proj", "up_proj", "down_proj"), model.feed_forward(layer), strict=True):
        linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
        linear.weight = mx.array(w)
        setattr(mlp, name, linear)
    return mlp


def dwq(model: Dense, tokens: np.ndarray, bits: int, rate: float = DWQ_RATE) -> Rounded:
    """DWQ as mlx-lm trains it: scales and biases learn by distillation, codes stay. One pass, a sequence a step."""
    import mlx.core as mx
    import mlx.optimizers as optimizers
    from mlx_lm.quant.dwq import dwq_quantize

    def targets(batch: Any, index: int, split: str) -> Any:
        return mx.array(forward(model, np.array(batch)) @ model.embedding.T)

    student = mlx_model(model)
    student.freeze()
    learners = [_replace(layer.mlp, bits) for layer in student.model.layers]
    data = [(row.tolist(), 0) for row in tokens]
    optimizer = optimizers.Adam(learning_rate=rate, bias_correction=True)
    with contextlib.redirect_stdout(sys.stderr):  # it reports as it goes
        dwq_quantize(
            student,
            targets,
            optimizer,
            data,
            data[:1],
            batch_size=1,
            max_seq_length=tokens.shape[1] + 1,
            seed=0,
            dtype=mx.float32,
        )
    weights = [[affine_values(*(np.array(a) for a in (m.weight, m.scales, m.biases))) for m in row] for row in learners]
    return weights, affine_bits(bits)


def _replace(mlp: Any, bits: int) -> list[Any]:
    """Put modules in the place of gate, up and down that dwq_quantize takes for quantized ones."""
    import mlx.core as mx
    import mlx.nn as nn

    class Affine(nn.Module):
        """What nn.QuantizedLinear computes, from codes (`weight`) that are not packed; MLX differentiates it."""

        def __init__(self, w: np.ndarray) -> None:
            super().__init__()
            self.bits, self.group_size, self.mode = bits, GROUP_SIZE, "affine"
            self.weight, self.scales, self.biases = (mx.array(part) for part in affine_parts(w, bits))
            self.freeze()

        def __call__(self, x: Any) -> Any:
            w = self.weight.astype(x.dtype) * self.scales[..., None] + self.biases[..., None]
            return x @ w.flatten(1).T

    names = ("gate_proj", "up_proj", "down_proj")
    for name in names:
        setattr(mlp, name, Affine(np.array(mlp[name].weight)))
    return [mlp[name] for name in names]


def mlx_model(model: Dense) -> Any:
    """The model as mlx-lm runs it, float32: dense_llama's and dense_gemma's arithmetic can be checked against it."""
    import mlx.core as mx
    from mlx_lm.models import gemma3_text, llama

    gate, up, _ = model.feed_forward(0)
    sizes = {
        "hidden_size": gate.shape[1],
        "intermediate_size": gate.shape[0],
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": model.epsilon,
        "rope_theta": model.theta,
        "vocab_size": len(model.embedding),
    }
    gemma = model.activation == "gelu_approx"
    out: Any
    if gemma:
        own = {"head_dim": model.head_size, "query_pre_attn_scalar": model.head_size, "sliding_window": model.window}
        out = gemma3_text.Model(gemma3_text.ModelArgs("gemma3_text", **sizes, **own))
    else:  # rotary pairs lie side by side, which is what MLX calls traditional
        out = llama.Model(llama.ModelArgs("llama", **sizes, rope_traditional=True, tie_word_embeddings=True))
    shift = 1 if gemma else 0  # the GGUF's norms hold 1 + w
    weights = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm - shift}
    if gemma:
        weights["lm_head.weight"] = model.embedding
    for i, layer in enumerate(model.layers):
        for name, w in layer.items():
            long = (GEMMA if gemma else LLAMA)[name]
            weights[f"model.layers.{i}.{long}.weight"] = w - shift if "norm" in name else w
    out.load_weights([(name, mx.array(w)) for name, w in weights.items()])
    return out
