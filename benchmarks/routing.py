"""Routing traces in Qwen3-30B-A3B's shape without its weights: real text through random routers, or uniform chance.

    python benchmarks/routing.py {text,uniform} FILE [--prompt 512] [--tokens 256] [--model DIR] [--json]

text: the hidden states of SmolLM2-135M on held-out text, centred and whitened in part, are what each layer's random
router sees; a bias per expert, found on the text itself, makes the loads those of a log-normal spread; and states are
smoothed over the tokens before until neighbours share as many experts as is published for a model of this kind (27 %;
chance is 6 %). uniform: every token draws its experts anew, the worst case for any cache. A trace is one prefill and
then a call per token.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import print_json

from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.footprint import top_k
from tiny_qmoe_mlx.streaming import trace as traces
from tiny_qmoe_mlx.streaming.profile import identity

LAYERS, EXPERTS, TOP_K = 48, 128, 8
RECORD_BYTES = 1_179_648  # 2 bits; a model's own where one is given
SHARED = 0.27
LOAD_SPREAD = (
    0.6  # standard deviation over mean of the experts' loads, as it is in models trained with a balancing loss
)
WHITEN = 0.5  # power of the covariance's inverse root: 0 leaves the states, 1 whitens them
SEED = 0


def uniform(tokens: int, layers: int, experts: int, k: int, seed: int = SEED) -> np.ndarray:
    """Experts of independent draws, int (layers, tokens, k)."""
    rng = np.random.default_rng(seed)
    noise = rng.random((layers, tokens, experts), np.float32)
    return np.argpartition(noise, k, axis=-1)[..., :k]


# ---- text


def states(tokens: int, layers: int) -> Iterator[np.ndarray]:
    """What each layer's router sees, float32 (tokens, d): the small model's layers are spread over the asked ones."""
    import dense_llama
    import texts

    model = dense_llama.load()
    windows = model.windows(texts.load("lee")[: 8 * tokens + 8000])[: -(-tokens // dense_llama.CONTEXT)]
    if windows.size < tokens:
        raise SystemExit(f"the text has {windows.size} tokens, asked were {tokens}")
    x, kept = model.embed(windows), []
    for i in range(len(model.layers)):
        x = model.attend(i, x)
        z = model.ffn_input(i, x)
        kept.append(z.reshape(-1, z.shape[-1])[:tokens])
        x = model.join(i, x, model.ffn_hidden(i, *model.feed_forward(i)[:2], z) @ model.feed_forward(i)[2].T)
    for layer in range(layers):
        yield kept[layer * len(kept) // layers]


def whitened(z: np.ndarray) -> np.ndarray:
    """States centred and whitened in part, of rms 1."""
    z = z - z.mean(0)
    values, vectors = np.linalg.eigh(z.T @ z / len(z))
    values = np.maximum(values, 1e-4 * values.max())
    z = z @ (vectors * values ** (-WHITEN / 2)) @ vectors.T
    return z / np.sqrt(np.mean(z * z))


def smoothed(z: np.ndarray, keep: float) -> np.ndarray:
    """Running means: what is kept of the token before, keep in 0 to 1."""
    out = z.copy()
    for t in range(1, len(z)):
        out[t] = keep * out[t - 1] + (1 - keep) * z[t]
    return out


def route(scores: np.ndarray, k: int, seed: int) -> np.ndarray:
    """The k best of scores (tokens, experts), with biases that bring the loads to a log-normal spread."""
    tokens, experts = scores.shape
    sigma = np.sqrt(np.log1p(LOAD_SPREAD**2))
    wanted = np.exp(sigma * np.random.default_rng(seed).standard_normal(experts))
    wanted *= tokens * k / wanted.sum()
    bias, step = np.zeros(experts, np.float32), scores.std()
    for turn in range(60):
        chosen = np.argpartition(scores + bias, -k, axis=-1)[:, -k:]
        load = np.bincount(chosen.ravel(), minlength=experts)
        bias += step * 0.3 / (1 + turn / 20) * np.clip(np.log((wanted + 1) / (load + 1)), -1, 1)
    return np.argpartition(scores + bias, -k, axis=-1)[:, -k:]


def routed(seen: list[np.ndarray], experts: int, k: int, keep: float) -> np.ndarray:
    """Experts of every layer, int (layers, tokens, k)."""
    chosen = []
    for layer, z in enumerate(seen):
        router = np.random.default_rng(SEED + layer).standard_normal((z.shape[1], experts), np.float32)
        chosen.append(route(smoothed(z, keep) @ router, k, 1000 + layer))
    return np.stack(chosen)


def text(tokens: int, layers: int, experts: int, k: int, shared: float = SHARED) -> tuple[np.ndarray, float]:
    """Experts of real text, int (layers, tokens, k), and what was kept of the token before to reach the asked share."""
    seen = [whitened(z) for z in states(tokens, layers)]
    some = seen[:: max(1, layers // 6)]  # layers to tune on
    low, high = 0.0, 0.95
    for _ in range(6):
        keep = (low + high) / 2
        low, high = (keep, high) if shared_share(routed(some, experts, k, keep)) < shared else (low, keep)
    return routed(seen, experts, k, (low + high) / 2), (low + high) / 2


# ---- figures and files


def one_hot(chosen: np.ndarray, experts: int) -> np.ndarray:
    """bool (layers, tokens, experts)."""
    hot = np.zeros((*chosen.shape[:2], experts), bool)
    np.put_along_axis(hot, chosen, True, -1)
    return hot


def shared_share(chosen: np.ndarray) -> float:
    """Share of a token's experts that the token before had too."""
    hot = one_hot(chosen, int(chosen.max()) + 1)
    return float((hot[:, 1:] & hot[:, :-1]).sum() / (chosen[:, 1:].size))


def load_spread(chosen: np.ndarray, experts: int) -> float:
    """Standard deviation over mean of the experts' loads, mean over layers."""
    load = one_hot(chosen, experts).sum(1)
    return float((load.std(-1) / load.mean(-1)).mean())


def write(path: Path, chosen: np.ndarray, header: dict[str, Any], prompt: int) -> None:
    """A trace file: the first `prompt` tokens as a prefill, the rest a call each."""
    writer = traces.TraceWriter(path, header)
    stops = [prompt, *range(prompt + 1, chosen.shape[1] + 1)] if prompt else list(range(1, chosen.shape[1] + 1))
    start = 0
    for stop in stops:
        for layer in range(len(chosen)):
            writer.write(layer, chosen[layer, start:stop], prompt > 0 and start == 0)
        start = stop
    writer.close()


def header_of(model: Path | None) -> tuple[dict[str, Any], int]:
    """A trace's first line for a converted model, or for 48 layers of 128 experts, and how many each token takes."""
    if model is None:
        return traces.header({"model": "Qwen3-30B-A3B's shape"}, [EXPERTS] * LAYERS, [RECORD_BYTES] * LAYERS), TOP_K
    opened = open_model(model)
    layers = opened.spec.layers
    sizes = [layer.experts for layer in layers], [layer.record_bytes for layer in layers]
    return traces.header(identity(opened), *sizes), top_k(opened.config)


def make(kind: str, path: Path, prompt: int, tokens: int, model: Path | None = None) -> dict[str, Any]:
    """Write a trace; returns its figures."""
    header, k = header_of(model)
    layers, experts, keep = len(header["experts"]), header["experts"][0], 0.0
    if kind == "text":
        chosen, keep = text(prompt + tokens, layers, experts, k)
    else:
        chosen = uniform(prompt + tokens, layers, experts, k)
    write(path, chosen, header, prompt)
    found = {"kind": kind, "prompt": prompt, "tokens": tokens, "kept_of_token_before": keep, "chance": k / experts}
    return {**found, "shared": shared_share(chosen), "load_spread": load_spread(chosen, experts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("text", "uniform"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of prefill (default 512)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of decode (default 256)")
    parser.add_argument("--model", type=Path, help="a converted model whose shape the trace gets")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    found = make(args.kind, args.file, args.prompt, args.tokens, args.model)
    print(
        f"{args.file}: consecutive tokens share {100 * found['shared']:.1f} % of their experts (chance "
        f"{100 * found['chance']:.1f} %), spread of the loads {found['load_spread']:.2f}, kept of the token before "
        f"{found['kept_of_token_before']:.2f}"
    )
    if args.json:
        print_json(found)


if __name__ == "__main__":
    main()
