"""One number of bytes for everything the process holds, split into its parts from the files' headers alone.

`plan` prints the split, `models.load` keeps to it. Sizes are bytes.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tiny_qmoe_mlx.container import Container
from tiny_qmoe_mlx.errors import BudgetError, FormatError

UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)},
}
AUTO_SHARE = 0.65
MB = 1_000_000
RUNTIME_BYTES = (
    100 * MB
)  # the interpreter with numpy, MLX and mlx-lm, measured on Linux: 77 MB, and what they allocate later
TOKENIZER_FACTOR = 14  # memory of a tokenizer over the size of its tokenizer.json, measured
MLX_CACHE_BYTES = 32 * MB  # freed arrays that MLX may keep
PREFILL_CHUNK = 512  # tokens; fixed, so that results do not depend on the budget
DEFAULT_CONTEXT = 2048
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
    "v_head_dim",
)
FLOAT_TYPES = {"F32": 4, "F16": 2, "BF16": 2}
INTEGER_BYTES = {"U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8, "BOOL": 1}


@dataclass(frozen=True)
class Budget:
    """How a budget is spent.

    slots: per record size, the number of pool slots; least_pool_bytes: of the fewest that work; mode: "resident" where
    every expert has one, else "streamed".
    """

    budget_bytes: int
    runtime_bytes: int
    weight_bytes: int
    kv_bytes: int
    scratch_bytes: int
    slots: dict[int, int]
    mode: str
    min_budget_bytes: int
    resident_budget_bytes: int
    least_pool_bytes: int

    @property
    def pool_bytes(self) -> int:
        return sum(size * count for size, count in self.slots.items())


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the control group that the process runs in, whichever is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def parse_memory(text: str | int, machine: int | None = None) -> int:
    """Bytes of a budget given as 6GB, 512MiB, 60%, auto, or a plain number of bytes.

    Raises:
        BudgetError: it cannot be read, is not positive, or is more than the machine has.
    """
    machine = machine or machine_memory()
    word = str(text).strip().upper()
    if word == "AUTO":
        return int(machine * AUTO_SHARE)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[A-Z]*)", word)
    if not match or match[2] not in (*UNITS, "%"):
        raise BudgetError(
            f"[memory] a budget should look like 6GB, 512MiB, 60%, auto or a number of bytes, received {text!r}."
        )
    scale = machine / 100 if match[2] == "%" else UNITS[match[2]]
    size = int(float(match[1]) * scale)
    if not 0 < size <= machine:
        raise BudgetError(
            f"[memory] a budget should be more than 0 and at most this machine's {show(machine)}, received {text!r}."
        )
    return size


def show(size: float) -> str:
    """Bytes for people, rounded up so that a shown minimum suffices when it is typed in."""
    for unit, scale in (("GB", 1000**3), ("MB", 1000**2), ("KB", 1000)):
        if size >= scale:
            return f"{math.ceil(size / scale * 100) / 100:g}{unit}"
    return f"{int(size)}B"


def split(container: Container, budget: int, context: int = DEFAULT_CONTEXT, cpu: bool = True) -> Budget:
    """Split a budget for a converted model.

    Args:
        container: the open model.
        budget: bytes for everything.
        context: tokens of KV cache to provide for.
        cpu: whether MLX computes on the CPU (in float32).

    Raises:
        BudgetError: too small, with the smallest budget that works.
    """
    runtime = RUNTIME_BYTES + MLX_CACHE_BYTES + _tokenizer_bytes(container.directory)
    weights = weight_bytes(container, cpu)
    kv, scratch = kv_bytes(container.config, context, cpu), scratch_bytes(container, context, cpu)
    fixed = runtime + weights + kv + scratch
    counts = _records(container)
    least = {size: min(count, top_k(container.config)) for size, count in counts.items()}
    smallest, resident = (fixed + sum(s * n for s, n in slots.items()) for slots in (least, counts))
    if budget < smallest:
        raise BudgetError(
            f"[memory] {show(budget)} is too small for this model with a context of {context} tokens; the smallest "
            f"that works is "
            f"{show(smallest)}, and {show(resident)} keeps every expert in memory."
        )
    slots = counts if budget >= resident else _share(counts, least, budget - fixed)
    mode = "resident" if budget >= resident else "streamed"
    return Budget(budget, runtime, weights, kv, scratch, slots, mode, smallest, resident, smallest - fixed)


def _records(container: Container) -> dict[int, int]:
    """Number of records of each size."""
    counts: dict[int, int] = {}
    for layer in container.spec.layers:
        counts[layer.record_bytes] = counts.get(layer.record_bytes, 0) + layer.experts
    return counts


def _share(counts: dict[int, int], least: dict[int, int], pool: int) -> dict[int, int]:
    """Slots per record size: each size gets the same share of its records above the least that works."""
    spare = pool - sum(size * n for size, n in least.items())
    wanted = sum(size * (counts[size] - least[size]) for size in counts)
    return {
        size: least[size] + int((counts[size] - least[size]) * spare / wanted) if wanted else least[size]
        for size in counts
    }


def top_k(config: dict) -> int:
    text = {**config, **(config.get("text_config") or {})}
    found = [text[key] for key in TOP_K_KEYS if isinstance(text.get(key), int)]
    return max([1, *found]) if found else 8


def _tokenizer_bytes(directory: Path) -> int:
    file = directory / "tokenizer.json"
    return TOKENIZER_FACTOR * file.stat().st_size if file.exists() else 0


def tensor_sizes(container: Container) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape of every non-expert tensor, from the headers."""
    from safetensors import SafetensorError, safe_open

    sizes = {}
    experts = {layer.file for layer in container.spec.layers}
    for file in (container.directory / n for n in container.files if n.endswith(".safetensors") and n not in experts):
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    part = tensors.get_slice(name)
                    sizes[name] = (part.get_dtype(), part.get_shape())
        except SafetensorError as error:
            raise FormatError(
                f"[{file.name}] its header is damaged: {error}; copy or convert the model again."
            ) from error
    return sizes


def weight_bytes(container: Container, cpu: bool) -> int:
    """Bytes of the non-expert weights in memory; floating point becomes float32 on the CPU."""
    total = 0
    for dtype, shape in tensor_sizes(container).values():
        width = 4 if cpu and dtype in FLOAT_TYPES else FLOAT_TYPES.get(dtype) or INTEGER_BYTES.get(dtype, 8)
        total += width * math.prod(shape)
    return total


def longest_context(config: dict) -> int:
    """Most tokens that a model was made for; 2^20 where its config does not say."""
    limit = _text_config(config).get("max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 else 1 << 20


def _text_config(config: dict) -> dict:
    c = config.get("text_config") or config
    for key in SIZE_KEYS:
        if not isinstance(c.get(key), int | None) or (c.get(key) or 0) < 0:
            raise FormatError(f"[config.json] {key} should be a number of at least 0, received {str(c[key])[:80]}.")
    return {key: value for key, value in c.items() if value is not None}


def kv_bytes(config: dict, context: int, cpu: bool) -> int:
    """Bytes of the KV cache at a context, rounded up to the cache's steps of 256 tokens; keys and values of every
    layer.
    """
    c = _text_config(config)
    layers = c.get("num_hidden_layers", 0)
    heads = c.get("num_key_value_heads") or c.get("num_attention_heads", 0)
    head = c.get("head_dim") or c.get("hidden_size", 0) // max(1, c.get("num_attention_heads", 1))
    per_token = 2 * heads * head
    if c.get(
        "qk_rope_head_dim"
    ):  # multi-head latent attention; some of mlx-lm's models cache it expanded: allow for that
        per_token = c.get("num_attention_heads", 0) * (
            c.get("qk_nope_head_dim", 0) + c["qk_rope_head_dim"] + c.get("v_head_dim", 0)
        )
    steps = -(-(context + 1) // 256) + 1
    return layers * per_token * steps * 256 * (4 if cpu else 2)


def scratch_bytes(container: Container, context: int, cpu: bool) -> int:
    """Bytes of activations while a chunk of the prompt passes a layer, and of the logits.

    Counted: 12 arrays of the hidden size; 4 of the widest dense product; the attention scores twice where the CPU
    backend materialises them; the chosen experts' rows twice; decoded weights; on the CPU the largest dequantized dense
    layer twice.
    """
    from tiny_qmoe_mlx.ops import DENSE_BYTES

    c = _text_config(container.config)
    tokens = min(PREFILL_CHUNK, context)
    hidden = c.get("hidden_size", 0)
    tensors = tensor_sizes(container)
    head = ("embed_tokens", "lm_head", "wte", "output")
    dense = [
        _dense_size(name, shape, tensors)
        for name, (_, shape) in tensors.items()
        if name.endswith(".weight") and not any(h in name for h in head)
    ]
    widest, largest = max((rows for rows, _ in dense), default=0), max((math.prod(d) for d in dense), default=0)
    width = 4 if cpu else 2
    scores = 2 * c.get("num_attention_heads", 0) * tokens * context * width if cpu else 0
    picks = 2 * tokens * top_k(container.config) * hidden * 4
    activations = tokens * (12 * hidden + 4 * widest) * width
    logits = 6 * c.get("vocab_size", 0) * 4
    return activations + scores + picks + logits + 2 * DENSE_BYTES + (2 * largest * 4 if cpu else 0)


def _dense_size(name: str, shape: list[int], tensors: dict) -> tuple[int, int]:
    """(rows, columns) of a dense weight before MLX's quantization packed it."""
    if len(shape) != 2:
        return (0, 0)
    scales = tensors.get(name.replace(".weight", ".scales"))
    return (shape[0], scales[1][1] * 64 if scales else shape[1])
