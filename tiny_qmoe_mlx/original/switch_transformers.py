"""Switch Transformers (arXiv 2101.03961): a T5 encoder-decoder of whose feed-forward layers some are mixtures, each
token going to one expert. mlx-lm has no such type; what transformers' SwitchTransformersForConditionalGeneration
computes is the definition (tests/test_switch_parity.py).

The blocks of both stacks are one list, `layers`, encoder first. Text is decoded through caches that know the encoder's
tokens (`Model.make_cache`): the first call encodes them. Without caches a model takes both halves in one array, the
decoder's from its start token on, and all blocks hand on hidden states of both: so a conversion can walk through it
block by block as through any other model. There is no padding: rows of a batch have one length.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from tiny_qmoe_mlx.original.dense import GeGLU
from tiny_qmoe_mlx.original.switch_weights import Weights, sanitize
from tiny_qmoe_mlx.original.t5_attention import Attention, DecoderCache, buckets

SIZES = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_heads",
    "num_layers",
    "num_decoder_layers",
    "num_experts",
    "expert_capacity",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)


@dataclass
class ModelArgs(BaseModelArgs):
    """What config.json says. `is_full_sparse` is in that of switch-c-2048 alone, which contradicts its own checkpoint
    otherwise: all of its blocks are sparse, the decoder has as many of them as it has sparse ones, and the output layer
    is not the embedding.

    Raises:
        ValueError: something is not supported.
    """

    model_type: str
    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    num_experts: int
    num_decoder_layers: int | None = None
    num_sparse_encoder_layers: int = 3
    num_sparse_decoder_layers: int = 3
    encoder_sparse_step: int | None = None
    decoder_sparse_step: int | None = None
    is_full_sparse: bool = False
    expert_capacity: int = 64
    router_bias: bool = False
    router_dtype: str = "float32"
    dense_act_fn: str = "relu"
    is_gated_act: bool = False
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    tie_word_embeddings: bool = True
    decoder_start_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = 0
        if self.is_full_sparse:
            self.num_decoder_layers = self.num_sparse_decoder_layers
            self.encoder_sparse_step = self.decoder_sparse_step = 1
            self.tie_word_embeddings = False
        self._check_sizes()
        known = ("gelu_new", "gated-gelu") if self.is_gated_act else ("relu",)
        if self.dense_act_fn not in known:
            raise ValueError(
                f"dense_act_fn should be one of {known} with is_gated_act {self.is_gated_act}, received "
                f"{self.dense_act_fn!r}"
            )
        if self.router_dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"router_dtype should be float32, float16 or bfloat16, received {self.router_dtype!r}")

    def _check_sizes(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} should be an integer of at least 1, received {str(value)[:80]}")
        count, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if count < 4 or farthest <= count // 2:
            raise ValueError(
                "relative_attention_num_buckets should be at least 4, and relative_attention_max_distance more than "
                f"half of it, received {count} and {farthest}"
            )
        start = self.decoder_start_token_id
        if type(start) is not int or not 0 <= start < self.vocab_size:
            raise ValueError(f"decoder_start_token_id should lie in 0 to {self.vocab_size - 1}, received {start}")

    def sparse(self, decoder: bool) -> list[bool]:
        """Whether each block of a stack has experts, by transformers' rule."""
        assert self.num_decoder_layers is not None
        layers = self.num_decoder_layers if decoder else self.num_layers
        step = self.decoder_sparse_step if decoder else self.encoder_sparse_step
        wanted = self.num_sparse_decoder_layers if decoder else self.num_sparse_encoder_layers
        if step is None:
            step = layers // wanted if wanted > 0 else layers
        return [step > 0 and (step == 1 or i % step == 1) for i in range(layers)]


# ---- feed-forward


class Dense(nn.Module):
    """A feed-forward layer without experts, gated or not."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        names = ("wi_0", "wi_1") if args.is_gated_act else ("wi",)
        for name in names:
            self[name] = nn.Linear(args.d_model, args.d_ff, bias=False)
        self.wo = nn.Linear(args.d_ff, args.d_model, bias=False)

    def __call__(self, x: mx.array, inside: mx.array | None = None) -> mx.array:
        """x (rows, length, d) -> the same; zeros where `inside` (length,) is false."""
        hidden = nn.gelu_approx(self.wi_0(x)) * self.wi_1(x) if "wi_0" in self else nn.relu(self.wi(x))
        y = self.wo(hidden)
        return y if inside is None else mx.where(inside[:, None], y, 0)


class Mixture(nn.Module):
    """Experts and the router that sends each token to one of them.

    An expert takes the first `expert_capacity` tokens of a call in each row; what comes after gets nothing added, as in
    transformers. A token that is decoded by itself is always taken.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self._capacity = args.expert_capacity
        self._dtype = getattr(mx, args.router_dtype)
        sizes = (args.d_model, args.d_ff, args.num_experts)
        self.router = nn.Linear(args.d_model, args.num_experts, bias=args.router_bias)
        self.experts = SwitchGLU(*sizes, activation=GeGLU()) if args.is_gated_act else SwitchMLP(*sizes, nn.ReLU())

    def __call__(self, x: mx.array, inside: mx.array | None = None) -> mx.array:
        """x (rows, length, d) -> the same; tokens where `inside` (length,) is false count for nothing."""
        chosen, weight = self.route(x, inside)
        return self.experts(x, chosen)[..., 0, :] * weight

    def route(self, x: mx.array, inside: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """The expert of each token of x, int (rows, length, 1), and what its output is multiplied with: its
        probability, computed in float32 whatever the weights are, or 0; (rows, length, 1)."""
        scores = x.astype(self._dtype) @ self.router.weight.astype(self._dtype).T
        if "bias" in self.router:
            scores = scores + self.router.bias.astype(self._dtype)
        probability = mx.softmax(scores, axis=-1, precise=True).astype(x.dtype)
        chosen = mx.stop_gradient(probability.argmax(axis=-1, keepdims=True))
        weight = mx.take_along_axis(probability, chosen, axis=-1)
        taken = None if inside is None else mx.broadcast_to(inside[:, None], chosen.shape)
        if x.shape[-2] > self._capacity:
            taken = self._fits(chosen, taken)
        return chosen, weight if taken is None else mx.where(taken, weight, 0)

    def _fits(self, chosen: mx.array, counted: mx.array | None) -> mx.array:
        picks = chosen == mx.arange(self.router.weight.shape[0])
        if counted is not None:
            picks = picks & counted
        place = mx.cumsum(picks.astype(mx.int32), axis=-2)
        fits = mx.take_along_axis(place, chosen, axis=-1) <= self._capacity
        return fits if counted is None else fits & counted


# ---- blocks


@dataclass(frozen=True)
class Halves:
    """Hidden states of encoder and decoder in one array: the encoder's come first, `length` of them. norm: the
    encoder's last, which every decoder block applies for itself."""

    length: int
    total: int
    norm: nn.Module

    def inside(self, decoder: bool) -> mx.array:
        """Which positions are those of a stack, bool (total,)."""
        own = mx.arange(self.total) >= self.length
        return own if decoder else mx.logical_not(own)


class EncoderBlock(nn.Module):
    """Self-attention and feed-forward."""

    def __init__(self, args: ModelArgs, sparse: bool):
        super().__init__()
        self.self_attn_norm = nn.RMSNorm(args.d_model, args.layer_norm_epsilon)
        self.self_attn = Attention(args.d_model, args.num_heads, args.d_kv)
        self.mlp_norm = nn.RMSNorm(args.d_model, args.layer_norm_epsilon)
        self.mlp = Mixture(args) if sparse else Dense(args)

    def __call__(self, x: mx.array, bias: mx.array, halves: Halves | None = None) -> mx.array:
        """x (rows, length, d) of the encoder, or of both halves, whose second one passes unchanged."""
        own, others = (x, None) if halves is None else (x[:, : halves.length], x[:, halves.length :])
        z = self.self_attn_norm(own)
        x = own + self.self_attn(z, *self.self_attn.keys_values(z), bias)
        x = x if others is None else mx.concatenate([x, others], axis=1)
        return x + self.mlp(self.mlp_norm(x), halves.inside(decoder=False) if halves else None)


class DecoderBlock(nn.Module):
    """Self-attention, attention to the encoder's output, and feed-forward."""

    def __init__(self, args: ModelArgs, sparse: bool):
        super().__init__()
        self.self_attn_norm = nn.RMSNorm(args.d_model, args.layer_norm_epsilon)
        self.self_attn = Attention(args.d_model, args.num_heads, args.d_kv)
        self.cross_attn_norm = nn.RMSNorm(args.d_model, args.layer_norm_epsilon)
        self.cross_attn = Attention(args.d_model, args.num_heads, args.d_kv)
        self.mlp_norm = nn.RMSNorm(args.d_model, args.layer_norm_epsilon)
        self.mlp = Mixture(args) if sparse else Dense(args)

    def __call__(
        self,
        x: mx.array,
        bias: mx.array,
        encoded: mx.array | None = None,
        cache: DecoderCache | None = None,
        halves: Halves | None = None,
    ) -> mx.array:
        """x (rows, length, d) of the decoder, or of both halves, whose first one passes unchanged.

        Args:
            bias: (1, heads, length, tokens so far), which hides what comes later too.
            encoded: (rows, tokens, d), the encoder's output; None where the cache or the first half has it.
        """
        first = None
        if halves is not None:
            first, x = x[:, : halves.length], x[:, halves.length :]
            encoded = halves.norm(first)
        x = x + self._to_itself(self.self_attn_norm(x), bias, cache)
        x = x + self._to_encoded(self.cross_attn_norm(x), encoded, cache)
        x = x if first is None else mx.concatenate([first, x], axis=1)
        return x + self.mlp(self.mlp_norm(x), halves.inside(decoder=True) if halves else None)

    def _to_itself(self, x: mx.array, bias: mx.array, cache: DecoderCache | None) -> mx.array:
        keys, values = self.self_attn.keys_values(x)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        return self.self_attn(x, keys, values, bias)

    def _to_encoded(self, x: mx.array, encoded: mx.array | None, cache: DecoderCache | None) -> mx.array:
        if cache is None or cache.memory is None:
            assert encoded is not None
            memory = self.cross_attn.keys_values(encoded)
            if cache is not None:
                cache.memory = memory
        else:
            memory = cache.memory
        return self.cross_attn(x, *memory)


class Stack(nn.Module):
    """The blocks of one half, the biases of relative positions that they share, and the norm after them."""

    def __init__(self, args: ModelArgs, decoder: bool):
        super().__init__()
        self._decoder, self._farthest = decoder, args.relative_attention_max_distance
        kind = DecoderBlock if decoder else EncoderBlock
        if not args.tie_word_embeddings:
            self.embed_tokens = nn.Embedding(args.vocab_size, args.d_model)
        self.relative_attention_bias = nn.Embedding(args.relative_attention_num_buckets, args.num_heads)
        self.layers: list[nn.Module] = [kind(args, sparse) for sparse in args.sparse(decoder)]
        self.final_norm = nn.RMSNorm(args.d_model, args.layer_norm_epsilon)

    def bias(self, length: int, offset: int = 0) -> mx.array:
        """What is added to the scores of `length` positions from `offset` on, (1, heads, length, offset + length)."""
        rows, columns = np.arange(offset, offset + length)[:, None], np.arange(offset + length)
        count = self.relative_attention_bias.weight.shape[0]
        index = buckets(columns - rows, not self._decoder, count, self._farthest)
        bias = self.relative_attention_bias(mx.array(index)).transpose(2, 0, 1)[None]
        if not self._decoder or length == 1:
            return bias
        return mx.where(mx.array(columns <= rows), bias, mx.finfo(bias.dtype).min)


class Model(nn.Module):
    """The whole; see this file's head for how it is called."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args, self.model_type = args, args.model_type
        if args.tie_word_embeddings:
            self.shared = nn.Embedding(args.vocab_size, args.d_model)
        else:
            self.lm_head = nn.Linear(args.d_model, args.vocab_size, bias=False)
        self.encoder = Stack(args, decoder=False)
        self.decoder = Stack(args, decoder=True)

    @property
    def layers(self) -> list[nn.Module]:
        """All blocks in the order in which tokens pass them."""
        return [*self.encoder.layers, *self.decoder.layers]

    def make_cache(self, inputs: mx.array | None = None) -> list[DecoderCache]:
        """Caches to decode with, one for each decoder block.

        Args:
            inputs: int (rows, tokens), what the encoder reads.
        """
        return make_caches(self.args, inputs)

    def __call__(self, inputs: mx.array, cache: list[DecoderCache] | None = None) -> mx.array:
        """Logits (rows, tokens, vocabulary) of the decoder's tokens.

        Args:
            inputs: int (rows, tokens), the decoder's; without caches the encoder's before them.
            cache: of `make_cache`.

        Raises:
            ValueError: nobody said what the encoder reads.
        """
        return self._both(inputs) if cache is None else self._decode(inputs, cache)

    def _decode(self, inputs: mx.array, cache: list[DecoderCache]) -> mx.array:
        encoded = None
        if cache[0].memory is None:
            if cache[0].inputs is None:
                raise ValueError(
                    "[model] an encoder-decoder decodes from a text that its encoder has read; use "
                    "tiny_qmoe_mlx.generate, or make_cache(tokens)."
                )
            encoded = self._encode(cache[0].inputs)
        x = self._embed(self.decoder, inputs)
        bias = self.decoder.bias(x.shape[1], cache[0].offset)
        for layer, own in zip(self.decoder.layers, cache, strict=True):
            x = layer(x, bias, encoded, own)
        return self._logits(x)

    def _encode(self, inputs: mx.array) -> mx.array:
        x = self._embed(self.encoder, inputs)
        bias = self.encoder.bias(x.shape[1])
        for layer in self.encoder.layers:
            x = layer(x, bias)
        return self.encoder.final_norm(x)

    def _both(self, inputs: mx.array) -> mx.array:
        starts = np.flatnonzero((np.array(inputs) == self.args.decoder_start_token_id).all(0))
        if len(starts) != 1:
            raise ValueError(
                f"[model] an encoder-decoder without caches takes the encoder's tokens and the decoder's in one array, "
                f"parted by one start token {self.args.decoder_start_token_id}; there are {len(starts)}."
            )
        length, total = int(starts[0]), inputs.shape[1]
        halves = Halves(length, total, self.encoder.final_norm)
        parts = ((self.encoder, inputs[:, :length]), (self.decoder, inputs[:, length:]))
        x = mx.concatenate([self._embed(stack, tokens) for stack, tokens in parts], axis=1)
        for stack, tokens in parts:
            bias = stack.bias(tokens.shape[1])
            for layer in stack.layers:
                x = layer(x, bias, halves=halves)
        return self._logits(x[:, length:])

    def _embed(self, stack: Stack, tokens: mx.array) -> mx.array:
        return (self.shared if self.args.tie_word_embeddings else stack.embed_tokens)(tokens)

    def _logits(self, x: mx.array) -> mx.array:
        x = self.decoder.final_norm(x)
        if self.args.tie_word_embeddings:
            return self.shared.as_linear(x * self.args.d_model**-0.5)
        return self.lm_head(x)

    def quant_predicate(self, path: str, module: nn.Module) -> bool:
        """Biases of positions are a few numbers, and stay as they are."""
        return not path.endswith("relative_attention_bias")

    def sanitize(self, weights: Weights) -> Weights:
        """transformers' tensors under this module's names, experts stacked."""
        args = self.args
        return sanitize(weights, args.tie_word_embeddings, args.is_gated_act, args.num_experts)


def make_caches(args: ModelArgs, inputs: mx.array | None = None) -> list[DecoderCache]:
    """Caches of a model with these arguments; see `Model.make_cache`."""
    return [DecoderCache(inputs) for _ in args.sparse(decoder=True)]
