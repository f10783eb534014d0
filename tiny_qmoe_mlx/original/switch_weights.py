"""The tensors of a Switch Transformers checkpoint as transformers writes them, under our model's names."""

import re

import mlx.core as mx

Weights = dict[str, mx.array]

BLOCK = re.compile(r"(encoder|decoder)\.block\.(\d+)\.layer\.(\d)\.(.*)")
EXPERT = re.compile(r"mlp\.experts\.expert_(\d+)\.(\w+)\.weight")
PARTS = (
    ("SelfAttention.relative_attention_bias.", "relative_attention_bias."),
    ("SelfAttention.", "self_attn."),
    ("EncDecAttention.", "cross_attn."),
    ("mlp.router.classifier.", "mlp.router."),
    ("mlp.", "mlp."),
)
MATRICES = {"wi": "fc1", "wo": "fc2"}
GATED_MATRICES = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}


def sanitize(weights: Weights, tied: bool, gated: bool, count: int) -> Weights:
    """transformers' tensors under our names, experts stacked; what has our names already stays.

    Args:
        tied: whether the output layer is the embedding.
        gated: whether feed-forward layers are.
        count: of a layer's experts.

    Raises:
        ValueError: an output layer of its own beside tied embeddings, which nothing says how to scale.
    """
    out: Weights = {}
    if not tied and "shared.weight" in weights:  # what a stack has of its own replaces it below
        out = {f"{stack}.embed_tokens.weight": weights["shared.weight"] for stack in ("encoder", "decoder")}
    experts: dict[str, dict[int, mx.array]] = {}
    matrices = GATED_MATRICES if gated else MATRICES
    for name, array in weights.items():
        found = BLOCK.fullmatch(name)
        if not found:
            out |= _outside(name, array, tied)
            continue
        stack, block, place, rest = found.groups()
        expert = EXPERT.fullmatch(rest)
        if expert and expert[2] in matrices:
            path = f"{stack}.layers.{block}.mlp.experts.{matrices[expert[2]]}.weight"
            experts.setdefault(path, {})[int(expert[1])] = array
        elif "EncDecAttention.relative_attention_bias" not in rest:  # which old checkpoints have, and nobody reads
            out[_inside(stack, block, place, rest)] = array
    for path, stacked in experts.items():
        out[path] = mx.stack([stacked[e] for e in range(count)])
    return out


def _inside(stack: str, block: str, place: str, rest: str) -> str:
    """Our name of a block's tensor."""
    if rest == "layer_norm.weight":
        last = place == ("2" if stack == "decoder" else "1")
        norm = "mlp_norm" if last else ("self_attn_norm", "cross_attn_norm")[int(place)]
        return f"{stack}.layers.{block}.{norm}.weight"
    old, new = next((pair for pair in PARTS if rest.startswith(pair[0])), ("", ""))
    rest = new + rest.removeprefix(old)
    if new == "relative_attention_bias.":
        return f"{stack}.{rest}"
    if new.endswith("attn."):
        rest = re.sub(r"\.([qkvo])\.weight$", r".\1_proj.weight", rest)
    return f"{stack}.layers.{block}.{rest}"


def _outside(name: str, array: mx.array, tied: bool) -> Weights:
    """What a tensor outside of the blocks becomes: nothing where it repeats another."""
    if tied and name == "decoder.lm_head.weight":
        raise ValueError("an output layer should not lie beside tied embeddings, decoder.lm_head.weight does")
    repeats = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    if name in repeats if tied else name == "shared.weight":
        return {}
    return {name.replace("final_layer_norm", "final_norm").replace("decoder.lm_head", "lm_head"): array}
