"""Gemma-3-270m out of its packages' GGUF as an ordinary dense checkpoint of mlx-lm's `gemma3_text`.

    python benchmarks/dense_gemma_checkpoint.py DIRECTORY

For measurement only, as dense_gemma.py says. The weights are bfloat16 values of the GGUF's codes.
"""

import json
import sys
from pathlib import Path
from typing import Any

import dense_gemma
import numpy as np

from tiny_qmoe_mlx import demo

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
EOS = 1


def write(directory: Path) -> Path:
    """Write config, weights and tokenizer into a directory, made if it is missing; nothing where it is there already.

    Raises:
        RuntimeError: the packages cannot be fetched.
    """
    if (directory / "tokenizer.json").is_file():
        return directory
    model = dense_gemma.load()
    directory.mkdir(parents=True, exist_ok=True)
    demo._save_bfloat16(directory / "model.safetensors", demo._bfloat16(weights(model)))
    (directory / "config.json").write_text(json.dumps(config(model), indent=2))
    _write_tokenizer(directory, model.tokenizer)
    return directory


def config(model: dense_gemma.Gemma) -> dict[str, Any]:
    """config.json of a model."""
    width, hidden = model.layers[0]["ffn_gate"].shape
    return {
        "model_type": "gemma3_text",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "query_pre_attn_scalar": model.head_size,
        "rms_norm_eps": round(float(model.epsilon), 9),
        "rope_theta": float(model.theta),
        "rope_local_base_freq": dense_gemma.LOCAL_THETA,
        "sliding_window": model.window,
        "sliding_window_pattern": dense_gemma.PATTERN,
        "max_position_embeddings": 32768,
        "vocab_size": len(model.embedding),
        "bos_token_id": dense_gemma.BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def weights(model: dense_gemma.Gemma) -> dict[str, np.ndarray]:
    """Every tensor under its name in a checkpoint, float32; checkpoints keep norms less the 1 that the model adds."""
    out = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm - 1}
    for i, layer in enumerate(model.layers):
        for name, theirs in NAMES.items():
            part = layer[name] - 1 if name.endswith("norm") else layer[name]
            out[f"model.layers.{i}.{theirs}.weight"] = part
    return out


def _write_tokenizer(directory: Path, tokenizer: Any) -> None:
    """The tokenizer with <bos> before each text, as Gemma's own."""
    from tokenizers.processors import TemplateProcessing

    names = {name: tokenizer.id_to_token(i) for name, i in (("bos_token", dense_gemma.BOS), ("eos_token", EOS))}
    bos = names["bos_token"]
    tokenizer.add_special_tokens(list(names.values()))
    tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, dense_gemma.BOS)])
    tokenizer.save(str(directory / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "pad_token": names["eos_token"]}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({**words, "unk_token": "<unk>", "clean_up_tokenization_spaces": False}, indent=2)
    )


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
