"""How the makers of each model type lay out its experts in a checkpoint, written from mlx-lm's own names.

A layout is (what docs/models.md says of it, a function from mlx-lm's weights to the maker's). Every type is also read
as mlx-lm itself saves it.
"""

import re
from collections.abc import Callable

import mlx.core as mx

Weights = dict[str, mx.array]
Layout = tuple[str, Callable[[Weights], Weights]]
EXPERTS = re.compile(r"(.+)\.(switch_mlp|switch_glu|experts)\.(gate_proj|up_proj|down_proj|fc1|fc2)\.(weight|bias)")
W_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _each(
    place: str = "{block}.experts.{e}.{name}.{kind}", names: dict[str, str] | None = None
) -> Callable[[Weights], Weights]:
    """A tensor per expert, under `place`; the parts of a name are the block's path, expert, matrix and kind."""

    def change(weights: Weights) -> Weights:
        out: Weights = {}
        for name, array in weights.items():
            found = EXPERTS.fullmatch(name)
            if not found:
                out[name] = array
                continue
            block, _, matrix, kind = found.groups()
            called = (names or {}).get(matrix, matrix)
            for e in range(len(array)):
                out[place.format(block=block, e=e, name=called, kind=kind)] = array[e]
        return out

    return change


def _joined(gate_up: str, down: str, transposed: bool = False) -> Callable[[Weights], Weights]:
    """All experts of a layer in two tensors: gate and up one after the other, and down."""

    def change(weights: Weights) -> Weights:
        out = {name: array for name, array in weights.items() if not EXPERTS.fullmatch(name)}
        for name, gate in weights.items():
            found = EXPERTS.fullmatch(name)
            if not found or found.group(3) != "gate_proj":
                continue
            block, part, _, kind = found.groups()
            up, last = (weights[f"{block}.{part}.{matrix}.{kind}"] for matrix in ("up_proj", "down_proj"))
            for place, array in ((gate_up, mx.concatenate([gate, up], axis=1)), (down, last)):
                out[place.format(block=block)] = array.swapaxes(-2, -1) if transposed else array
        return out

    return change


def _moved(block: str, to: str, change: Callable[[Weights], Weights]) -> Callable[[Weights], Weights]:
    """The same with the experts' block under another name."""

    def moved(weights: Weights) -> Weights:
        changed = change(weights)
        return {
            name.replace(f".{block}.", f".{to}.") if re.search(r"\.experts\.\d+\.", name) else name: array
            for name, array in changed.items()
        }

    return moved


def _step(weights: Weights) -> Weights:
    """A stack per matrix under `moe`; norms are stored less one."""
    out = {}
    for name, array in weights.items():
        found = EXPERTS.fullmatch(name)
        name = f"{found.group(1).removesuffix('.mlp')}.moe.{found.group(3)}.weight" if found else name
        out[name] = array - 1 if name.endswith(".weight") and "norm" in name else array
    return out


def _dbrx(weights: Weights) -> Weights:
    """One tall matrix of all experts for each of w1, v1 and w2, the last transposed."""
    parts: dict[tuple[str, str], dict[int, mx.array]] = {}
    out = {}
    for name, array in weights.items():
        found = re.fullmatch(r"(.+\.experts)\.(\d+)\.(w1|v1|w2)\.weight", name)
        if not found:
            out[name] = array
            continue
        parts.setdefault((found.group(1), found.group(3)), {})[int(found.group(2))] = array
    for (block, matrix), experts in parts.items():
        rows = [experts[e].T if matrix == "w2" else experts[e] for e in sorted(experts)]
        out[f"{block}.mlp.{matrix}"] = mx.concatenate(rows)
    return out


def _muse(weights: Weights) -> Weights:
    """All experts in one tensor, and the gates that mlx-lm computes its own weights from."""
    out = {}
    for name, array in JOINED[1](weights).items():
        if name.endswith("add_attn_alpha"):
            out[name.replace("add_attn_alpha", "post_attention_residual_gate.gate")] = mx.zeros_like(array)
        elif name.endswith("add_ffn_alpha"):
            out[name.replace("add_ffn_alpha", "post_feedforward_residual_gate.gate")] = mx.zeros_like(array)
        elif not name.endswith("_beta"):
            out[name] = array
    return out


DEEPSEEK41 = (  # mlx-lm's names and the maker's, in the order in which they are replaced
    ("lm_head.", "head."),
    ("embed_tokens.", "embed."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".compressor.kv_norm.", ".compressor.norm."),
    (".indexer.k_proj.", ".indexer.wk."),
    (".compressor.kv_proj.", ".compressor.wkv."),
    (".compressor.gate_proj.", ".compressor.wgate."),
    (".shared_experts.gate_proj.", ".shared_experts.w1."),
    (".shared_experts.down_proj.", ".shared_experts.w2."),
    (".shared_experts.up_proj.", ".shared_experts.w3."),
    (".self_attn.sinks", ".attn.attn_sink"),
    (".q_a_proj.", ".wq_a."),
    (".q_b_proj.", ".wq_b."),
    (".q_a_norm.", ".q_norm."),
    (".kv_proj.", ".wkv."),
    (".o_a_proj.", ".wo_a."),
    (".o_b_proj.", ".wo_b."),
    (".attn_hc.", ".hc_attn_"),
    (".ffn_hc.", ".hc_ffn_"),
    (".gate.e_score_correction_bias", ".gate.bias"),
    (".self_attn.", ".attn."),
    (".mlp.", ".ffn."),
)


def _deepseek41(weights: Weights) -> Weights:
    """A tensor per expert under the maker's own names."""
    out = {}
    for name, array in _each("{block}.{e}.{name}.{kind}", W_NAMES)(weights).items():
        for own, theirs in DEEPSEEK41:
            name = name.replace(own, theirs)
        out[name.removeprefix("model.")] = array.flatten(0, 1) if ".wo_a." in name else array
    return out


EACH: Layout = ("a tensor per expert (experts.N.gate_proj)", _each())
W123: Layout = ("a tensor per expert (experts.N.w1)", _each(names=W_NAMES))
JOINED: Layout = (
    "all experts in one tensor (experts.gate_up_proj)",
    _joined("{block}.experts.gate_up_proj", "{block}.experts.down_proj"),
)
JOINED_HERE: Layout = (JOINED[0], _joined("{block}.gate_up_proj", "{block}.down_proj"))
TRANSPOSED: Layout = (
    "all experts in one tensor, transposed (experts.gate_up_proj)",
    _joined("{block}.experts.gate_up_proj", "{block}.experts.down_proj", transposed=True),
)
MUSE: Layout = (JOINED[0], _muse)
MXFP4: Layout = ("MXFP4 blocks of all experts (experts.gate_up_proj_blocks)", dict)  # test_gpt_oss_as_published
GRANITE: Layout = (
    "all experts in one tensor (input_linear, output_linear)",
    _joined("{block}.input_linear.weight", "{block}.output_linear.weight"),
)
KIMI: Layout = (W123[0], _moved("mlp", "block_sparse_moe", _each(names=W_NAMES)))
MLX_ONLY: Layout = ("as mlx-lm saves it", dict)
PHIXTRAL: Layout = ("a tensor per expert (mlp.N.fc1)", _each("{block}.mlp.{e}.{name}.{kind}"))
NEMOTRON: Layout = ("a tensor per expert (experts.N.up_proj)", _each(names={"fc1": "up_proj", "fc2": "down_proj"}))
STEP: Layout = ("a stack per matrix (moe.gate_proj)", _step)
DBRX: Layout = ("all experts in one tensor (experts.mlp.w1)", _dbrx)
OF_TYPE: dict[str, tuple[Layout, ...]] = {
    "dbrx": (DBRX,),
    "deepseek_v41": ((W123[0], _deepseek41),),
    "deepseek_v41_text": ((W123[0], _deepseek41),),
    "gemma4": (JOINED_HERE,),
    "gemma4_text": (JOINED_HERE,),
    "gemma4_unified": (JOINED_HERE,),
    "gpt_oss": (MXFP4,),
    "granitemoe": (GRANITE,),
    "granitemoehybrid": (GRANITE,),
    "kimi_k3": (KIMI,),
    "kimi_linear": (KIMI,),
    "lfm2_moe": (W123,),
    "llama4": (TRANSPOSED,),
    "llava": (EACH, JOINED),
    "minimax": (W123,),
    "minimax_m2": (W123,),
    "minimax_m3_vl": (W123,),
    "mistral3": (EACH, JOINED),
    "mistral4": (EACH, JOINED),
    "mixtral": (W123,),
    "muse_spark": (MUSE,),
    "nemotron_h": (NEMOTRON,),
    "phi-msft": (PHIXTRAL,),
    "phimoe": (W123,),
    "phixtral": (PHIXTRAL,),
    "prism_hadamard_qwen35": (("2-bit packs", dict),),
    "qwen3_5": (MLX_ONLY,),
    "qwen3_5_moe": (JOINED,),
    "qwen3_vl_moe": (TRANSPOSED,),
    "step3p5": (STEP,),
}


def of_type(model_type: str) -> tuple[Layout, ...]:
    """The layouts that a type's checkpoints come in."""
    return OF_TYPE.get(model_type, (EACH,))
