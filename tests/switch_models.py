"""Tiny Switch Transformers with random weights under transformers' names; a tokenizer of bytes with T5's sentinels."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import qmoe_records
from safetensors.numpy import save_file
from tiny_models import dense_experts

from tiny_qmoe_mlx.codecs import qmoe
from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.original import switch_transformers as switch

CONFIG = {
    "model_type": "switch_transformers",
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "is_encoder_decoder": True,
    "vocab_size": 384,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_heads": 4,
    "num_experts": 8,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "expert_capacity": 64,
    "tie_word_embeddings": True,
}
SENTINELS = 100


def write(directory: Path, seed: int = 0, **overrides) -> Path:
    """A checkpoint as transformers would save it."""
    config = {**CONFIG, **overrides}
    rng = np.random.default_rng(seed)
    arrays = {name: _noise(name, shape, rng) for name, shape in shapes(config).items()}
    directory.mkdir(parents=True)
    save_file(arrays, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    return directory


def _noise(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Sizes at which attention is not a matter of one position alone, and routers are decided."""
    if len(shape) == 1:
        return (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
    sizes = {".q.": 0.3, "router": 4.0, "relative": shape[1] ** 0.5, "shared": shape[1] ** 0.5}
    size = next((own for part, own in sizes.items() if part in name), 1.5)
    return (size * rng.standard_normal(shape) / shape[1] ** 0.5).astype(np.float32)


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor."""
    d, inner, vocabulary = config["d_model"], config["num_heads"] * config["d_kv"], config["vocab_size"]
    out = {"shared.weight": (vocabulary, d)}
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (vocabulary, d)
    sparse = switch.ModelArgs.from_dict(config).sparse
    for stack, decoder in (("encoder", False), ("decoder", True)):
        attentions = ("SelfAttention", "EncDecAttention")[: 1 + decoder]
        for i, experts in enumerate(sparse(decoder)):
            block = f"{stack}.block.{i}.layer"
            for place, attention in enumerate(attentions):
                out |= {f"{block}.{place}.{attention}.{m}.weight": (inner, d) for m in "qkv"}
                out[f"{block}.{place}.{attention}.o.weight"] = (d, inner)
            for place in range(len(attentions) + 1):
                out[f"{block}.{place}.layer_norm.weight"] = (d,)
            out |= feed_forward(f"{block}.{len(attentions)}.mlp", config, experts)
        out[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, config["num_heads"])
        out[f"{stack}.final_layer_norm.weight"] = (d,)
    return out


def feed_forward(path: str, config: dict, experts: bool) -> dict[str, tuple[int, ...]]:
    d, width = config["d_model"], config["d_ff"]
    first = ("wi_0", "wi_1") if config.get("is_gated_act") else ("wi",)
    own = {f"{name}.weight": (width, d) for name in first} | {"wo.weight": (d, width)}
    if not experts:
        return {f"{path}.{name}": shape for name, shape in own.items()}
    count = config["num_experts"]
    out = {f"{path}.experts.expert_{e}.{name}": shape for e in range(count) for name, shape in own.items()}
    return {**out, f"{path}.router.classifier.weight": (count, d)}


def write_tokenizer(directory: Path, sentinels: int = SENTINELS) -> None:
    """Ids as T5 has them: <pad>, </s>, <unk>, then bytes, and at the end sentinels, <extra_id_0> last; every text is
    given an end token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    names = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<unused_{i}>" for i in range(CONFIG["vocab_size"] - len(names) - sentinels)]
    names += [f"<extra_id_{i}>" for i in range(sentinels - 1, -1, -1)]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [name for name in names if name.startswith(("<pad", "</s", "<unk", "<extra"))]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**words, "unk_token": "<unk>"}))


def qmoe_experts(container) -> dict[str, np.ndarray]:
    """Every expert matrix of codec qmoe, stacked, by the tests' own decoder."""
    out = {}
    for index, layer in enumerate(container.spec.layers):
        data = np.fromfile(container.expert_file(index), np.uint8)
        starts = [container.record_offset(index, e) for e in range(layer.experts)]
        records = [data[s : s + layer.record_bytes] for s in starts]
        for m, (name, _, _) in enumerate(layer.matrices):
            own = [qmoe_records.decode(r, m, layer.coding, layer.bias) for r in records]
            out[f"{layer.path}.{name}.weight"] = np.stack(own).astype(np.float32)
    return out


def plain_model(directory: Path):
    """Our model file alone, stock experts, on a converted directory's dequantized weights, float32."""
    from mlx_lm.utils import load_model

    container = open_model(directory)
    experts = (qmoe_experts if isinstance(container.spec.layers[0].coding, qmoe.Coding) else dense_experts)(container)

    class Plain(switch.Model):
        def sanitize(self, weights):
            kept = {k: w for k, w in weights.items() if not k.endswith((".records", ".checksums"))}
            return {**kept, **{name: mx.array(array) for name, array in experts.items()}}

    model, _ = load_model(
        directory,
        lazy=True,
        model_config={"model_file": None},
        get_model_classes=lambda config: (Plain, switch.ModelArgs),
    )
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model
