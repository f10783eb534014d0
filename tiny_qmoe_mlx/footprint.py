"""What a loaded model holds beside its pool of experts, predicted from the files' headers and the config alone.

Sizes are bytes. `plan --check` runs a model and prints how far the prediction was off.
"""

import math
import sys

from tiny_qmoe_mlx.container import Container
from tiny_qmoe_mlx.errors import FormatError, shown
from tiny_qmoe_mlx.masked_spans import is_encoder_decoder
from tiny_qmoe_mlx.spec import LayerSpec

MB = 1_000_000
LINUX = sys.platform == "linux"
# The interpreter with numpy, MLX and mlx-lm: measured on Linux once a model has run; elsewhere a guess.
PROGRAM_BYTES = (95 if LINUX else 120) * MB
# A tokenizer, in bytes for a token and for a byte of its tokenizer.json (long tokens, merges), whichever is more:
# measured on Linux with 49,152, 150,000 and 262,144 tokens once what making it takes has gone back to the system
# (allocator.py); elsewhere that is taken to stay. MAKING: the most while it is made.
TOKENIZER = (550, 4) if LINUX else (1250, 14)
TOKENIZER_MAKING = (1650, 22.5)
MLX_CACHE_BYTES = 32 * MB  # freed arrays that MLX may keep
READERS = 8  # threads that decode records of experts as they read them
WORK_BYTES = 16  # a weight, while a matrix of a whole decoder layer is expanded: codes, steps, scales, values
PREFILL_CHUNK = 512  # tokens; fixed, so that results do not depend on the budget
LONGEST_BOTH = 1024  # tokens of an encoder-decoder's text and of its answer: T5's kind is trained with 512 of each
KV_STEP = 256  # tokens by which mlx-lm's KV caches grow, from wherever the last chunk ended
TOP_K_KEYS = (
    "num_experts_per_tok",
    "moe_k",
    "num_experts_per_token",
    "moe_topk",
    "top_k_experts",
    "experts_per_token",
    "moe_top_k",
)
SIZE_KEYS = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "vocab_size",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "kv_lora_rank",
    "v_head_dim",
)
ALIASES = {  # what some types call them
    "num_hidden_layers": ("n_layers", "n_layer", "num_layers"),
    "num_attention_heads": ("n_heads", "n_head", "num_heads"),
    "num_key_value_heads": ("kv_n_heads", "num_attention_groups"),
    "hidden_size": ("d_model", "n_embd", "model_dim"),
    "vocab_size": ("num_vocab",),
    "max_position_embeddings": ("max_seq_len", "n_positions"),
}
PARTS = ("attn_config", "ffn_config")  # objects within a config that some types keep such numbers in
Matrix = tuple[int, int, int]
FLOAT_TYPES = {"F32": 4, "F16": 2, "BF16": 2}
INTEGER_BYTES = {"U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8, "BOOL": 1}


def program_bytes(container: Container) -> int:
    """Bytes of the interpreter, the libraries, MLX's cache and the model's tokenizer."""
    return PROGRAM_BYTES + MLX_CACHE_BYTES + _tokenizer_bytes(container, *TOKENIZER)


def _tokenizer_bytes(container: Container, a_token: float, a_byte: float) -> int:
    file = container.directory / "tokenizer.json"
    if not file.exists():
        return 0
    tokens = _text_config(container.config).get("vocab_size", 0)
    return int(max(a_token * tokens, a_byte * file.stat().st_size))


def loading_bytes(container: Container, cpu: bool) -> int:
    """The most that is held before there is a pool: while the tokenizer is made, or while weights are read, the largest
    first, each on the CPU beside what it was before it became float32."""
    making = PROGRAM_BYTES + _tokenizer_bytes(container, *TOKENIZER_MAKING)
    held = most = 0
    sizes = [(_tensor_bytes(*tensor, cpu), tensor[0]) for tensor in tensor_sizes(container).values()]
    for size, dtype in sorted(sizes, reverse=True):
        held += size
        most = max(most, held + (size // 2 if cpu and FLOAT_TYPES.get(dtype) == 2 else 0))
    return max(making, program_bytes(container) + most)


def top_k(config: dict) -> int:
    if is_encoder_decoder(config):
        return 1
    text = _flat({**config, **(config.get("text_config") or {})})
    found = [text[key] for key in TOP_K_KEYS if isinstance(text.get(key), int)]
    return max([1, *found]) if found else 8


def decoding_layers(container: Container) -> tuple[LayerSpec, ...]:
    """The expert layers that a written token passes: of an encoder-decoder the decoder's, if it has some."""
    layers = container.spec.layers
    if not is_encoder_decoder(container.config):
        return layers
    return tuple(layer for layer in layers if layer.path.startswith("decoder.")) or layers


def picks(container: Container) -> int:
    """Most records of a layer that one token asks for: 1 of a dense model."""
    return min(max(layer.experts for layer in container.spec.layers), top_k(container.config))


def tensor_sizes(container: Container) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape of every non-expert tensor, from the headers."""
    return container.tensors


def weight_bytes(container: Container, cpu: bool) -> int:
    """Bytes of the non-expert weights in memory; floating point becomes float32 on the CPU."""
    return sum(_tensor_bytes(dtype, shape, cpu) for dtype, shape in tensor_sizes(container).values())


def _tensor_bytes(dtype: str, shape: list[int], cpu: bool) -> int:
    width = 4 if cpu and dtype in FLOAT_TYPES else FLOAT_TYPES.get(dtype) or INTEGER_BYTES.get(dtype, 8)
    return width * math.prod(shape)


def longest_context(config: dict) -> int:
    """Most tokens that a model was made for; 2^20 where its config does not say."""
    if is_encoder_decoder(config):
        return LONGEST_BOTH
    limit = _text_config(config).get("max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 else 1 << 20


def _text_config(config: dict) -> dict:
    c = _flat(config.get("text_config") or config)
    if is_encoder_decoder(config):  # what is cached is the decoder's
        decoder = "num_sparse_decoder_layers" if c.get("is_full_sparse") else "num_decoder_layers"
        c |= {"num_hidden_layers": c.get(decoder) or c.get("num_layers"), "head_dim": c.get("d_kv")}
    for key, others in ALIASES.items():
        if c.get(key) is None:
            c[key] = next((c[other] for other in others if c.get(other) is not None), None)
    for key in SIZE_KEYS:
        if not isinstance(c.get(key), int | None) or (c.get(key) or 0) < 0:
            raise FormatError(f"[config.json] {key} should be a number of at least 0, received {shown(c[key])}.")
    return {key: value for key, value in c.items() if value is not None}


def _flat(config: dict) -> dict:
    """A config with the objects in it that hold sizes spread out; a copy."""
    parts = [config[name] for name in PARTS if isinstance(config.get(name), dict)]
    return {key: value for part in (*parts, config) for key, value in part.items()}


def kv_bytes(config: dict, context: int, cpu: bool) -> int:
    """Bytes of the KV cache at a context: keys and values of every layer, and the step that a cache may be ahead."""
    c = _text_config(config)
    layers = c.get("num_hidden_layers", 0)
    heads = c.get("num_key_value_heads") or c.get("num_attention_heads", 0)
    per_token = 2 * heads * _head_size(c)
    if c.get("qk_rope_head_dim"):  # latent attention
        head = c.get("qk_nope_head_dim", 0) + c["qk_rope_head_dim"] + c.get("v_head_dim", 0)
        per_token = c.get("num_attention_heads", 0) * head
        if c.get("kv_lora_rank") and _caches_latent(c):  # twice: a layer may have two, or an index beside one
            per_token = min(per_token, 2 * (c["kv_lora_rank"] + c["qk_rope_head_dim"]))
    return layers * per_token * (context + KV_STEP) * (4 if cpu else 2)


def _caches_latent(config: dict) -> bool:
    """Whether mlx-lm's model caches the latent itself; some of its models cache keys and values expanded from it."""
    from mlx_lm.utils import _get_classes

    try:
        kind, _ = _get_classes(config)
    except (KeyError, TypeError, ValueError):
        return False
    return hasattr(sys.modules[kind.__module__], "MultiLinear")


def _head_size(c: dict) -> int:
    return c.get("head_dim") or c.get("hidden_size", 0) // max(1, c.get("num_attention_heads", 1))


def scratch_bytes(container: Container, context: int, cpu: bool) -> int:
    """Bytes of activations while a chunk of the prompt passes a layer: the larger of what its attention and its experts
    need, beside four arrays of the hidden size that both need, and the logits of a token.
    """
    c = _text_config(container.config)
    pairs = is_encoder_decoder(container.config)
    tokens, width = context if pairs else min(PREFILL_CHUNK, context), 4 if cpu else 2
    residual = 4 * tokens * c.get("hidden_size", 0) * width
    logits = 6 * c.get("vocab_size", 0) * 4
    attention = _attention_bytes(c, tokens, context, cpu) + (_position_bytes(c, context) if pairs else 0)
    most = max(attention, _expert_bytes(container, tokens, cpu))
    return residual + most + logits + (_dequantized_bytes(container) if cpu else 0)


def _attention_bytes(c: dict, tokens: int, context: int, cpu: bool) -> int:
    """Queries, keys, values, what they give, and the scores, which the CPU backend writes out."""
    heads, width = c.get("num_attention_heads", 0), 4 if cpu else 2
    arrays = 4 * tokens * heads * _head_size(c) * width
    return arrays + (heads * tokens * context * 4 if cpu else 0)


def _position_bytes(c: dict, context: int) -> int:
    """Biases of all pairs of positions, each twice, and the tables that they are looked up by: an encoder reads a text
    at once."""
    return (2 * 4 * c.get("num_attention_heads", 0) + 5 * 8) * context**2


def _expert_bytes(container: Container, tokens: int, cpu: bool) -> int:
    """Outputs of all picks three times (computed, an array of MLX's, weighted), one expert's hidden rows, and decoded
    weights; on a GPU the picks' hidden rows, and a group's decoded matrices while the next ones are decoded.
    """
    from tiny_qmoe_mlx.ops import DENSE_BYTES, GPU_DENSE_BYTES

    layers, picks = container.spec.layers, tokens * top_k(container.config)
    if layers[0].whole:
        return _whole_bytes(container, tokens, cpu)
    hidden = max(layer.shapes[-1][0] for layer in layers)
    inner = max(layer.shapes[0][0] for layer in layers)
    reading = max((READERS * (layer.record_bytes + 2 * layer.slot) for layer in layers if layer.expands), default=0)
    if cpu:
        return 3 * picks * hidden * 4 + tokens * (hidden + 3 * inner) * 4 + DENSE_BYTES + reading
    # of a model in float16 a group's rotated rows, and what they give, are float32 for a moment
    return reading + 3 * picks * hidden * 2 + picks * (3 * hidden + 5 * inner) * 2 + 2 * GPU_DENSE_BYTES


def _whole_bytes(container: Container, tokens: int, cpu: bool) -> int:
    """One decoder layer expanded, its largest matrix on the way there, and the rows that its matrices put out."""
    layers = container.spec.layers
    expanded = max(layer.weights for layer in layers) * (4 if cpu else 2)
    largest = max(rows * columns for layer in layers for rows, columns in layer.shapes)
    return expanded + WORK_BYTES * largest + 3 * tokens * max(r for layer in layers for r, _ in layer.shapes) * 4


def _dequantized_bytes(container: Container) -> int:
    """The largest quantized matrix of a layer as float32, which the CPU path multiplies many tokens with."""
    top = ("embed_tokens", "lm_head", "wte", "output")
    inside = ((n, m) for n, m in matrices(container).items() if not any(part in n for part in top))
    return max((4 * rows * columns for _, (rows, columns, bits) in inside if bits), default=0)


def matrices(container: Container) -> dict[str, Matrix]:
    """(rows, columns, bits) of every dense matrix, 0 bits where it is not quantized; a stack is one tall matrix."""
    sizes, found = tensor_sizes(container), {}
    for name, (_, shape) in sizes.items():
        if not name.endswith(".weight") or len(shape) < 2:
            continue
        groups = (sizes.get(name.removesuffix("weight") + "scales", ("", []))[1] or [0])[-1]
        columns = groups * group_size(name, container.config) or shape[-1]
        found[name] = math.prod(shape[:-1]), columns, shape[-1] * 32 // columns if groups else 0
    return found


def group_size(name: str, config: dict) -> int:
    """Columns of a quantized matrix that share a scale."""
    every = config.get("quantization")
    if not isinstance(every, dict):  # which `load` refuses
        return 64
    own = every.get(name.removesuffix(".weight"))
    size = (own if isinstance(own, dict) else every).get("group_size", 64)
    return size if isinstance(size, int) and 0 < size <= 1024 else 64
