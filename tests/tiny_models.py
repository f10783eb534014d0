"""Tiny checkpoints of six families with random weights, and the plain mlx-lm model that a converted one is compared
with.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, load_model, save_model

from tiny_qmoe_mlx.codecs import rotation, trellis
from tiny_qmoe_mlx.container import Container

BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 258,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "intermediate_size": 96,
}
FAMILIES = {
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_intermediate_size": 64,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "moe_layer_interval": 1,
        "moe_gate_act": "softmax",
        "use_bias": False,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": False},
    "deepseek_v2": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "attention_bias": False,
        "rope_scaling": {
            "type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 512,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_scaling": None,
    },
}
MORE: dict[str, dict] = {  # families that some tests read checkpoints of, and that not every test need run
    "llama": {  # as Llama 3.2: the head is the embedding, rotary frequencies are stretched
        "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "qwen2": {"tie_word_embeddings": True},  # its q, k and v have biases
}
TOP_K = {"ernie4_5_moe": "moe_k"}


def make_checkpoint(directory: Path, family: str, seed: int = 0, **overrides) -> Path:
    """Write a Hugging Face style directory of a family with random weights and a byte tokenizer."""
    config = {**BASE, "model_type": family, **(FAMILIES | MORE)[family], **overrides}
    return write_checkpoint(directory, config, seed)


def write_checkpoint(directory: Path, config: dict, seed: int = 0) -> Path:
    """The same for any config of mlx-lm's."""
    mx.random.seed(seed)
    kind, args = _get_classes(config)
    model = kind(args.from_dict(config))
    # larger than mlx-lm's own start values, so that logits are well apart
    scaled = [
        (n, w * (3 if w.ndim > 1 else 1) + 0.05 * mx.random.normal(w.shape))
        for n, w in tree_flatten(model.parameters())
        if mx.issubdtype(w.dtype, mx.floating)
    ]
    model.load_weights(scaled, strict=False)
    directory.mkdir(parents=True, exist_ok=True)
    save_model(directory, model)
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of 256 bytes and two special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(words))


def dense_experts(container: Container) -> dict[str, np.ndarray]:
    """Every expert matrix as mlx-lm stacks them, decoded by the numpy specification and rotated back, in float64."""
    out = {}
    for index, layer in enumerate(container.spec.layers):
        data = np.fromfile(container.expert_file(index), np.uint8)
        records = []
        for e in range(layer.experts):
            start = container.record_offset(index, e)
            records.append(
                trellis.parse(data[start : start + layer.record_bytes], layer.shapes, layer.bias, layer.file)
            )
        for m, (name, rows, columns) in enumerate(layer.matrices):
            side = int(m == len(layer.matrices) - 1)
            sign = rotation.signs(container.spec.seed, layer.layer, side, columns)
            dense = [
                rotation.unrotate(trellis.decode_matrix(r.matrices[m], r.length).astype(np.float64), sign)
                for r in records
            ]
            out[f"{layer.path}.{name}.weight"] = np.stack(dense)[:, :rows, :columns].astype(np.float32)
            if layer.bias:
                out[f"{layer.path}.{name}.bias"] = np.stack(
                    [r.matrices[m].bias[:rows].astype(np.float32) for r in records]
                )
    return out


def own_names(model_type: str, weights: dict) -> dict:
    """A converted model's weights under the names that mlx-lm has for them, where it has its experts otherwise."""
    if model_type == "muse_spark":
        return {name.replace(".experts.routed.", ".experts."): array for name, array in weights.items()}
    if model_type != "dbrx":
        return weights
    out = {}
    for name, array in weights.items():
        block, found, matrix = name.partition(".ffn.experts.")
        if found:
            own = {"gate_proj.weight": "w1", "up_proj.weight": "v1", "down_proj.weight": "w2"}[matrix]
            out.update({f"{block}{found}{e}.{own}.weight": array[e] for e in range(len(array))})
        else:
            out[name] = array
    return out


def plain_model(container: Container):
    """Plain mlx-lm on the dequantized weights: stock classes, stock SwitchGLU, float32."""

    def classes(config):
        base, args = _get_classes(config)

        class Plain(base):
            def sanitize(self, weights):
                kept = {k: w for k, w in weights.items() if not k.endswith((".records", ".checksums"))}
                # names and values are mlx-lm's own already: its sanitize would change some again
                named = own_names(config["model_type"], {**kept, **dense_experts(container)})
                return {name: mx.array(array) for name, array in named.items()}

        return Plain, args

    model, _ = load_model(container.directory, lazy=True, model_config={"model_file": None}, get_model_classes=classes)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model
