"""Split the dense SmolLM2-135M-Instruct into a mixture of experts: first step of tiny_qmoe_mlx/data/demo_moe.npz.

In every feed-forward layer the neurons that contribute most on average become the shared expert; the others are
clustered by when they fire (balanced k-means, as in MoEfication, arXiv 2110.01786) into routed experts, and a linear
router is fitted by ridge regression to the experts' energies. No weight is changed: the result is an order of neurons
and a router. On its own it costs much (perplexity 22 -> 38 on Wikipedia text); distill_demo_moe.py wins back half.

Needs torch, transformers and `pip install tiny-qmoe-mlx[demo]`. About a minute on a busy machine with 2 cores.

    python examples/make_demo_moe.py --out split.npz --text article1.txt article2.txt
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import dense_smollm2
import numpy as np
import torch
import torch.nn.functional as F
from dense_smollm2 import demo

WINDOW = 512
CLUSTER_TOKENS = 1536  # enough to tell neurons apart, few enough for a quick k-means


def read_windows(tokenizer, paths: list[Path], tokens: int) -> torch.Tensor:
    """Token windows (n, 512), the same number of tokens from the start of every file."""
    ids: list[int] = []
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        ids += tokenizer.encode(text[: 8 * tokens], add_special_tokens=False)[: tokens // len(paths)]
    whole = len(ids) // WINDOW * WINDOW
    if not whole:
        raise SystemExit(f"error: the text should hold at least {WINDOW} tokens, received {len(ids)}")
    return torch.tensor(ids[:whole]).view(-1, WINDOW)


@torch.no_grad()
def feed_forward_inputs(model, windows: torch.Tensor) -> list[torch.Tensor]:
    """What every feed-forward layer receives: a float32 tensor (tokens, hidden) per layer."""
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0].flatten(0, 1).clone()))
        for layer, into in zip(model.model.layers, seen, strict=True)
    ]
    for batch in windows.split(4):
        model.model(batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in seen]


def balanced_kmeans(points: np.ndarray, clusters: int, rng: np.random.Generator, rounds: int = 12) -> np.ndarray:
    """Cluster of every point; all clusters get the same number. Points are unit vectors, nearness is their product."""
    room = len(points) // clusters
    centres = points[rng.choice(len(points), clusters, replace=False)]
    for _ in range(rounds):
        near = points @ centres.T
        best_two = np.sort(near, 1)[:, -2:]
        decided_first = np.argsort(best_two[:, 0] - best_two[:, 1])  # those with most to lose choose first
        preference = np.argsort(-near, 1)
        left = np.full(clusters, room)
        member = np.empty(len(points), np.int64)
        for point in decided_first:
            cluster = next(c for c in preference[point] if left[c])
            member[point] = cluster
            left[cluster] -= 1
        centres = np.stack([points[member == c].sum(0) for c in range(clusters)])
        centres /= np.linalg.norm(centres, axis=1, keepdims=True) + 1e-9
    return member


@torch.no_grad()
def split_layer(x: torch.Tensor, mlp, layout: Sequence[int], rng, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Order of the neurons (neurons,) and router (experts, hidden) of one layer.

    Args:
        x: inputs of the layer (tokens, hidden).
        mlp: the dense layer, with gate_proj, up_proj, down_proj.
        layout: shared neurons, experts, top-k.
        rng: numpy generator.
        spread: standard deviation that the chosen experts' logits should have.
    """
    shared, experts, top_k = layout
    hidden = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    contribution = hidden.abs() * mlp.down_proj.weight.norm(dim=0)  # (tokens, neurons)
    ranked = contribution.mean(0).argsort(descending=True)
    rest = ranked[shared:].sort().values

    sample = torch.from_numpy(rng.choice(len(x), min(CLUSTER_TOKENS, len(x)), replace=False))
    firing = contribution[sample][:, rest].sqrt().T  # (neurons, tokens)
    firing = F.normalize(firing - firing.mean(1, keepdim=True), dim=1)
    member = balanced_kmeans(firing.numpy(), experts, rng)
    routed = rest[torch.from_numpy(np.argsort(member, kind="stable"))]
    order = torch.cat([ranked[:shared].sort().values, routed])

    energy = contribution[:, routed].square().unflatten(1, (experts, -1)).sum(-1).sqrt()
    target = energy / (energy.sum(1, keepdim=True) + 1e-9)
    gram = x.T @ x
    gram += 1e-3 * gram.trace() / len(gram) * torch.eye(len(gram))
    router = torch.linalg.solve(gram, x.T @ target).T
    chosen = (x @ router.T).topk(top_k, -1).values
    router *= spread / chosen.std(1).mean().clamp_min(1e-9)
    return order.numpy().astype(np.int16), router.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("split.npz"))
    parser.add_argument("--text", type=Path, nargs="+", default=[demo.calibration_text_path()])
    parser.add_argument("--tokens", type=int, default=12_000, help="tokens of text to look at (default 12000)")
    parser.add_argument("--shared", type=int, default=768, help="neurons of the shared expert (default 768)")
    parser.add_argument("--experts", type=int, default=12, help="routed experts (default 12)")
    parser.add_argument("--top-k", type=int, default=6, help="routed experts a token takes (default 6)")
    parser.add_argument("--spread", type=float, default=0.15, help="of the chosen experts' logits (default 0.15)")
    parser.add_argument("--layers", type=int, help="stop after so many layers, for a quick try; nothing is written")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    start = time.time()
    rng = np.random.default_rng(args.seed)
    model, tokenizer = dense_smollm2.load()
    inputs = feed_forward_inputs(model, read_windows(tokenizer, args.text, args.tokens))
    layout = (args.shared, args.experts, args.top_k)
    orders, routers = [], []
    for number, (x, layer) in enumerate(zip(inputs, model.model.layers, strict=True), start=1):
        order, router = split_layer(x, layer.mlp, layout, rng, args.spread)
        orders.append(order)
        routers.append(router)
        print(f"layer {number} of {len(inputs)}, {time.time() - start:.0f} s", flush=True)
        if number == args.layers:
            return
    np.savez(args.out, layout=np.array(layout, np.int32), order=np.stack(orders), router=np.stack(routers))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
