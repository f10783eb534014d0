"""mlx-lm's model types with routed experts: which the installed mlx-lm has, and a tiny config of each."""

import importlib
import re
from pathlib import Path

import tiny_models

# what most of them read; a type takes from a config what it knows
COMMON = {
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_shared_expert": 1,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
    "attention_bias": False,
    "partial_rotary_factor": 1.0,
    "use_qk_norm": True,
    "sliding_window": 32,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_scaling": None,
}
MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
GROUPS = {"n_group": 4, "topk_group": 2}  # experts are chosen among the best groups
THREE = ["sliding_attention", "full_attention", "sliding_attention"]
INDEX = {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 16}
GRANITE = {
    "embedding_multiplier": 1.0,
    "attention_multiplier": 0.25,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "intermediate_size": 128,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
KIMI = {
    **MLA,
    "linear_attn_config": {
        "kda_layers": [1, 3],
        "full_attn_layers": [2],
        "num_heads": 4,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
    },
    "model_max_length": 1024,
    "num_expert_group": 1,
}
LONGCAT = {
    **MLA,
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "zero_expert_num": 4,
    "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 64,
    "num_layers": 3,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "moe_topk": 3,
}
PHIXTRAL = {
    "num_vocab": 258,
    "model_dim": 64,
    "num_heads": 4,
    "num_layers": 3,
    "rotary_dim": 8,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}
QWEN35 = {**LINEAR, "rope_parameters": {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
GEMMA4 = {
    "enable_moe_block": True,
    "top_k_experts": 2,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "layer_types": THREE,
    "tie_word_embeddings": True,
}
MISTRAL4 = {
    **MLA,
    "rope_parameters": {
        "type": "default",
        "rope_theta": 10000.0,
        "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 16,
    },
}
DEEPSEEK41 = {
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "head_dim": 32,
    "o_groups": 2,
    "o_lora_rank": 64,
    "swiglu_limit": 0.5,
    "compress_ratios": [0, 4, 4],
    "kv_source_layer_ids": [1],
    "index_source_layer_ids": [1],
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 8,
    "hc_mult": 2,
    "rms_norm_eps": 1e-6,
}
MUSE = {
    "post_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0},
    "layer_rope_theta": [10000.0, 0.0, 10000.0],
    "layer_types": THREE,
    "final_logit_softcapping": 30.0,
    "output_multiplier": 1.0,
    "moe_hidden_size": 32,
    "num_shared_experts": 0,
}
OWN_WORDS = ("dbrx", "phixtral", "phi-msft")  # their configs share no key with those of others
TYPES: dict[str, dict] = {
    "Klear": {},
    "afmoe": {**GROUPS, "layer_types": THREE, "num_dense_layers": 1},
    "bailing_hybrid": {**MLA, **GROUPS, "layer_group_size": 2, "group_norm_size": 2},
    "bailing_moe": {"score_function": "sigmoid", "moe_router_enable_expert_bias": True, **GROUPS},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 1, **GROUPS},
    "bailing_moe_v3": {**MLA, **GROUPS, "layer_group_size": 2, "moe_shared_expert_intermediate_size": 64},
    "dbrx": {
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek": {},
    "deepseek_v2": tiny_models.FAMILIES["deepseek_v2"],
    "deepseek_v3": {**MLA, **GROUPS},
    "deepseek_v32": {**MLA, **INDEX},
    "deepseek_v41": DEEPSEEK41,
    "deepseek_v41_text": DEEPSEEK41,
    "dots1": {},
    "ernie4_5_moe": tiny_models.FAMILIES["ernie4_5_moe"],
    "exaone_moe": {"layer_types": THREE, "is_moe_layer": [False, True, True]},
    "gemma4": {"text_config": GEMMA4},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": GEMMA4},
    "glm4_moe": GROUPS,
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": {**MLA, **INDEX, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    "gpt_oss": tiny_models.FAMILIES["gpt_oss"],
    "granitemoe": GRANITE,
    "granitemoehybrid": {
        **GRANITE,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_proj_bias": False,
        "mamba_conv_bias": True,
    },
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1.0},
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_expand": 2,
    },
    "joyai_llm_flash": MLA,
    "kimi_k2": MLA,
    "kimi_k25": {"text_config": MLA},
    "kimi_k3": {
        "text_config": {
            **KIMI,
            "activation_situ_beta": 1.5,
            "activation_situ_linear_beta": 2.0,
            "routed_expert_hidden_size": 32,
            "latent_moe_use_norm": True,
            "attn_res_block_size": 2,
        }
    },
    "kimi_linear": KIMI,
    "kimi_vl": {"text_config": MLA},
    "laguna": {"layer_types": THREE, "moe_routed_scaling_factor": 1.5},
    "lfm2_moe": {
        "use_expert_bias": True,
        "num_dense_layers": 1,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "llama4": {
        "text_config": {
            "num_experts_per_tok": 1,
            "attention_chunk_size": 32,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 96,
            "num_hidden_layers": 4,
        }
    },
    "llava": {"text_config": {**MISTRAL4, "model_type": "mistral4"}},
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": {**LONGCAT, "ngram_vocab_size_ratio": 4, "emb_neighbor_num": 3, "emb_split_num": 2},
    "mellum": {
        "layer_types": THREE,
        "rope_parameters": {
            "full_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0],
        "moe_layer_freq": [0, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 32,
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "v_head_dim": 16,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "minimax": {"rotary_dim": 16},
    "minimax_m2": {"rotary_dim": 16},
    "minimax_m3_vl": {
        "text_config": {
            "dense_intermediate_size": 96,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "swiglu_limit": 1.0,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 8,
            "index_topk_blocks": 4,
            "sparse_attention_freq": [0, 1, 0],
        }
    },
    "mistral3": {"text_config": {**MISTRAL4, "model_type": "mistral4"}},
    "mistral4": MISTRAL4,
    "mixtral": {},
    "muse_spark": {"text_config": MUSE, "audio_config": {"out_hidden_size": 64}},
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "hybrid_override_pattern": ["M", "*", "E", "-", "E"],
        "moe_shared_expert_intermediate_size": 64,
        "moe_latent_size": 32,
    },
    "olmoe": {},
    "phi-msft": PHIXTRAL,
    "phimoe": {
        "rope_scaling": {
            "short_factor": [1.0] * 8,
            "long_factor": [1.0] * 8,
            "short_mscale": 1.0,
            "long_mscale": 1.0,
            "type": "longrope",
            "original_max_position_embeddings": 512,
        },
        "original_max_position_embeddings": 512,
    },
    "phixtral": PHIXTRAL,
    "prism_hadamard_qwen35": {
        "text_config": {**QWEN35, "hidden_size": 128},
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [{"path": "lm_head", "block": 0, "embedding": False, "dtype": "float16"}],
    },
    "qwen2_moe": {},
    "qwen3_5": {"text_config": QWEN35},
    "qwen3_5_moe": {"text_config": QWEN35},
    "qwen3_moe": {},
    "qwen3_next": LINEAR,
    "qwen3_vl_moe": {"text_config": {}},
    "solar_open": {},
    "step3p5": {
        "num_attention_groups": 2,
        "moe_num_experts": 8,
        "moe_top_k": 2,
        "share_expert_dim": 64,
        "moe_layers_enum": "1,2",
        "layer_types": THREE,
        "swiglu_limits": [0.0, 0.0, 0.2],
        "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2, "head_dim": 16},
    },
}


def installed() -> dict[str, str]:
    """Every model type of the installed mlx-lm whose file has routed experts, and that file's name.

    A file has them if it, or one that it takes classes from, uses mlx-lm's `switch_layers`, or if it speaks of experts.
    """
    from mlx_lm import models
    from mlx_lm.utils import MODEL_REMAPPING

    files = {path.stem: path.read_text() for folder in models.__path__ for path in Path(folder).glob("*.py")}
    uses = {name: _imports(text) & set(files) for name, text in files.items()}
    having = {"switch_layers"} | {name for name, text in files.items() if "experts" in text}
    while more := {name for name, used in uses.items() if used & having} - having:
        having |= more
    modules = {name: importlib.import_module(f"mlx_lm.models.{name}") for name in having}
    types = {name for name, module in modules.items() if hasattr(module, "Model") and hasattr(module, "ModelArgs")}
    named = {name: name for name in types} | {alias: name for alias, name in MODEL_REMAPPING.items() if name in types}
    return {alias: f"{named[alias]}.py" for alias in sorted(named)}


def _imports(text: str) -> set[str]:
    """Names of the sibling modules that a file imports."""
    found = set(re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE))
    for names in re.findall(r"^\s*from \. import ([^\n(]+)", text, re.MULTILINE):
        found |= {n.split(" as ")[0].strip() for n in names.split(",")}
    return found


def config(model_type: str) -> dict:
    """The tiny config of a type; where its language model has a config of its own, in there too."""
    own = TYPES[model_type]
    base = {**tiny_models.BASE, **COMMON}
    if model_type in OWN_WORDS:
        base = {key: base[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    inner = {**base, "model_type": model_type, **own["text_config"]} if "text_config" in own else {}
    return {**base, **own, **({"text_config": inner} if inner else {}), "model_type": model_type}
