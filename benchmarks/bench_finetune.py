"""What training gains and norms after the conversion buys: SmolLM2-135M, each layer's feed-forward as one expert.

    python benchmarks/bench_finetune.py [--bits 2.0] [--steps 100] [--batch 4] [--rate 0.005] [--json]

The text trained on, and that which chooses the best step, are other passages than the one that the rows are measured on
(bench_quality.passages).
"""

import argparse
import time

from tiny_qmoe_mlx import blas

blas.install()  # before MLX is imported

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from bench_quality import SEED, SENSED, compare, compress, forward, passages, report, sensitivities  # noqa: E402
from common import print_json  # noqa: E402
from dense_llama import Dense, load  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models import llama  # noqa: E402
from mlx_lm.models.switch_layers import SwiGLU  # noqa: E402

from tiny_qmoe_mlx.codecs import trellis  # noqa: E402
from tiny_qmoe_mlx.expert_kind import ExpertKind  # noqa: E402
from tiny_qmoe_mlx.finetune.distill import Found, Schedule, distill, teach  # noqa: E402
from tiny_qmoe_mlx.finetune.model import GainedExperts, decoded  # noqa: E402

MATRICES = ("gate_proj", "up_proj", "down_proj")
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
PARTS = {"all": ("row_gain", "block_gain", "norm"), "no-block": ("row_gain", "norm"), "norm": ("norm",)}
TOP, HELD_OUT = 128, 8


class OneExpert(nn.Module):
    """A feed-forward that is the only expert of its layer."""

    def __init__(self, experts: GainedExperts):
        super().__init__()
        self.experts = experts

    def __call__(self, x: mx.array) -> mx.array:
        return self.experts(x, mx.zeros((*x.shape[:-1], 1), dtype=mx.int32))[..., 0, :]


def mlx_model(dense: Dense) -> nn.Module:
    """The same model by mlx-lm; the rotary pairs stand side by side, as llama.cpp has them."""
    layers, (width, d) = len(dense.layers), dense.feed_forward(0)[0].shape
    sizes = (d, layers, width, dense.heads, dense.epsilon, len(dense.embedding))
    model = llama.Model(
        llama.ModelArgs(
            "llama", *sizes, num_key_value_heads=dense.kv_heads, rope_theta=dense.theta, rope_traditional=True
        )
    )
    arrays = {"model.embed_tokens.weight": dense.embedding, "model.norm.weight": dense.norm}
    for i, layer in enumerate(dense.layers):
        arrays |= {f"model.layers.{i}.{name}.weight": layer[key] for key, name in NAMES.items()}
    model.load_weights([(name, mx.array(a)) for name, a in arrays.items()])
    mx.eval(model.parameters())
    return model


def put_records(model: nn.Module, records: list[np.ndarray], shapes: list[tuple[int, int]], length: int) -> None:
    """Give the model's feed-forwards the codes and gains of records, in place."""
    named = tuple((name, *shape) for name, shape in zip(MATRICES, shapes, strict=True))
    for i, data in enumerate(records):
        kind = ExpertKind(named, False, length, SEED, i, SwiGLU())
        experts = GainedExperts(kind, [decoded(data, shapes, False, f"layer {i}")])
        model.model.layers[i].mlp = OneExpert(experts)
    mx.eval(model.parameters())


def hidden_states(model: nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Final normed states (sequences, tokens, d)."""
    return np.concatenate([np.array(model.model(mx.array(row[None]))) for row in tokens])


def train(
    model: nn.Module, teacher_model: nn.Module, tokens: np.ndarray, parts: tuple[str, ...], schedule: Schedule
) -> Found:
    """Train the named kinds of parameters; the last HELD_OUT sequences choose the best step."""
    teacher = teach(teacher_model, tokens, TOP, lambda what, done, total: None)
    names = [n for n, _ in tree_flatten(model.parameters()) if any(part in n for part in parts)]
    return distill(model, names, tokens, teacher, HELD_OUT, schedule, shown)


def shown(what: str, done: int, total: int) -> None:
    if done % 10 == 0:
        print(f"{what}: {done} of {total}", flush=True)


def rows(dense: Dense, args: argparse.Namespace, bits: float) -> list[dict]:
    """Before and after, on the held-out passages."""
    sample = passages(dense, 24, args.evaluate)
    more = passages(dense, 160, args.evaluate).calibration.reshape(-1, args.tokens)
    chosen = np.random.default_rng(0).permutation(len(more))[: args.steps * args.batch + HELD_OUT]
    reference = forward(dense, sample.held_out)
    records, spent = compressed(dense, sample.calibration, bits, args.length)
    model, original = mlx_model(dense), mlx_model(dense)
    put_records(model, records, [w.shape for w in dense.feed_forward(0)], args.length)
    out = []

    def row(method: str, **more: float) -> None:
        scores = compare(dense, reference, hidden_states(model, sample.held_out), sample.held_out)
        out.append(report({"method": method, "asked": bits, "bits": spent, **scores, **more}))

    row("trellis")
    start = time.perf_counter()
    schedule = Schedule(args.steps, args.batch, args.rate, args.every)
    found = train(model, original, more[chosen].astype(np.int32), PARTS[args.only], schedule)
    row("trained", seconds=time.perf_counter() - start, best_step=found.best_step)
    print("held-out KL by step:", [(step, round(kl, 4)) for step, kl in found.history])
    return out


def compressed(dense: Dense, tokens: np.ndarray, bits: float, length: int) -> tuple[list[np.ndarray], float]:
    """Records of all layers as `bench_quality.compress` makes them, and the bits they spend."""
    records: list[np.ndarray] = []
    pack = trellis.pack

    def kept(record: trellis.Record, record_bytes: int) -> np.ndarray:
        records.append(pack(record, record_bytes))
        return records[-1]

    trellis.pack = kept
    try:
        sensitivity = sensitivities(dense, tokens[:, :SENSED])
        return records, compress(dense, tokens, bits, length, SEED, True, sensitivity)[1]
    finally:
        trellis.pack = pack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, nargs="*", default=[2.0], help="bits per weight (default: 2)")
    parser.add_argument("--steps", type=int, default=100, help="of Adam (default 100)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step (default 4)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence (default 256)")
    parser.add_argument("--rate", type=float, default=5e-3, help="share of a value per step (default 0.005)")
    parser.add_argument("--every", type=int, default=10, help="steps between looks at held-out text (default 10)")
    parser.add_argument("--only", choices=PARTS, default="all", help="which parameters (default all)")
    parser.add_argument("--evaluate", type=int, default=8, help="sequences of 512 measured on, per text (default 8)")
    parser.add_argument("--length", type=int, default=12, choices=trellis.LENGTHS, help="L of the trellis")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    dense, found = load(), []
    with blas.shared_machine():
        for bits in args.bits:
            found += rows(dense, args, bits)
    if args.json:
        print_json({"rows": found})


if __name__ == "__main__":
    main()
