"""Writes tests/data/switch_reference.npz: what transformers' SwitchTransformersForConditionalGeneration computes for
tiny random models, for test_switch_parity.py.

    pip install torch
    python tests/switch_reference.py

For each case of CASES: its weights in float16 (the model computes with just those, in float32), one after the other,
with transformers' names and their shapes; logits, and the encoder's output. Where a config is gated the feed-forward
modules are T5's (transformers.models.t5), put in the place of Switch's, which transformers has no gated kind of.
"""

import json
from pathlib import Path
from unittest.mock import patch

import numpy as np

FILE = Path(__file__).parent / "data" / "switch_reference.npz"
BASE = {
    "model_type": "switch_transformers",
    "vocab_size": 48,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_heads": 3,
    "num_experts": 4,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
CASES: dict[str, dict] = {
    "tied": {"num_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1},
    "untied": {"tie_word_embeddings": False},
    "gated": {"is_gated_act": True, "dense_act_fn": "gelu_new"},
    "crowded": {"expert_capacity": 3, "router_bias": True},
    "full": {  # as in switch-c-2048, all blocks sparse and one embedding for both stacks
        "num_sparse_encoder_layers": 3,
        "tie_word_embeddings": False,
        "one_embedding": True,
    },
    "steps": {"encoder_sparse_step": 1, "decoder_sparse_step": 0, "num_layers": 2},
}
ENCODER_TOKENS, DECODER_TOKENS = 21, 13


def config(case: str) -> dict:
    """config.json of a case."""
    return {**BASE, **{key: value for key, value in CASES[case].items() if key != "one_embedding"}}


def build(case: str):
    """transformers' model with random weights that float16 can hold, larger than its own start values."""
    import torch
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
    from transformers.models.switch_transformers import modeling_switch_transformers as switch
    from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

    torch.manual_seed(list(CASES).index(case))
    words = SwitchTransformersConfig(**config(case))
    words.tie_word_embeddings = config(case).get("tie_word_embeddings", True)
    feed_forward = (
        T5DenseGatedActDense if words.to_dict().get("is_gated_act") else switch.SwitchTransformersDenseActDense
    )

    def no_weights(self, module):
        """Their own start values: every weight is set below."""

    with (
        patch.object(switch, "SwitchTransformersDenseActDense", feed_forward),
        patch.object(switch.SwitchTransformersPreTrainedModel, "_init_weights", no_weights),
    ):
        model = SwitchTransformersForConditionalGeneration(words).eval()
    if "one_embedding" in CASES[case]:
        model.set_input_embeddings(model.shared)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = 1 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2
            noise = wide * torch.randn(parameter.shape) + (0 if parameter.ndim > 1 else 1)
            scale = 3 if "router" in name or "relative" in name else 1.5
            parameter.copy_((noise * (scale if parameter.ndim > 1 else 1)).half().float())
    return model


def tokens(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Two rows for the encoder, int (2, 21), and for the decoder, (2, 13) with its start token first."""
    rng = np.random.default_rng(list(CASES).index(case))
    vocabulary = config(case)["vocab_size"]
    decoder = rng.integers(1, vocabulary, (2, DECODER_TOKENS))
    decoder[:, 0] = 0
    return rng.integers(1, vocabulary, (2, ENCODER_TOKENS)), decoder


def outputs(model, case: str) -> dict[str, np.ndarray]:
    """logits float32 (2, 13, vocabulary), encoded float32 (2, 21, d)."""
    import torch

    encoder, decoder = (torch.from_numpy(part) for part in tokens(case))
    with torch.no_grad():
        found = model(input_ids=encoder, decoder_input_ids=decoder, use_cache=False)
    return {"logits": found.logits.numpy(), "encoded": found.encoder_last_hidden_state.numpy()}


def state(model) -> dict[str, np.ndarray]:
    """A model's tensors as its save_pretrained names them, each once."""
    own, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            own[name] = tensor.numpy()
    return own


def recorded_weights(recorded: dict[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    """A case's tensors, float32, from what `main` wrote."""
    out, start = {}, 0
    for name, shape in json.loads(str(recorded[f"{case}/shapes"])).items():
        size = int(np.prod(shape))
        out[name] = recorded[f"{case}/weights"][start : start + size].reshape(shape).astype(np.float32)
        start += size
    return out


def main() -> None:
    import torch
    from transformers import __version__
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersAttention

    arrays: dict[str, np.ndarray] = {"transformers": np.array(__version__)}
    distances = torch.arange(-300, 301)
    for both in (True, False):
        found = SwitchTransformersAttention._relative_position_bucket(distances, both, 32, 128)
        arrays[f"buckets/{both}"] = found.numpy().astype(np.int8)
    for case in CASES:
        model = build(case)
        arrays[f"{case}/config"] = np.array(json.dumps(config(case)))
        arrays |= {f"{case}/{name}": array for name, array in outputs(model, case).items()}
        own = state(model)
        arrays[f"{case}/shapes"] = np.array(json.dumps({name: array.shape for name, array in own.items()}))
        arrays[f"{case}/weights"] = np.concatenate([array.reshape(-1) for array in own.values()]).astype(np.float16)
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
