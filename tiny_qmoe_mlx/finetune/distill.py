"""Distillation of a few multiplicative parameters: KL divergence from a teacher's stored predictions, Adam, early stop.

Knows nothing of records or files: a model is a function of tokens, a parameter a path in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from tiny_qmoe_mlx.library_errors import computing
from tiny_qmoe_mlx.original.source import computed

Progress = Callable[[str, int, int], None]
LARGEST_CHANGE = math.log(4.0)  # of a gain, either way: all that is useful, and far from float16's limits
BETAS, EPSILON = (0.9, 0.98), 1e-12
WARMUP = 0.1  # of all steps
SMALLEST_REST = 1e-6  # probability of all tokens that are not among the top k


@dataclass(frozen=True)
class Teacher:
    """The likeliest tokens of the original at every position: ids int32 and log-probabilities float32 (n, T, k)."""

    ids: np.ndarray
    log_p: np.ndarray


def teach(model: Callable, tokens: np.ndarray, top: int, progress: Progress) -> Teacher:
    """A model's predictions on int (n, T) tokens, sequence by sequence; what is not among the `top` is one rest."""
    ids, log_p = [], []
    for i, row in enumerate(tokens):
        with computing("the original"):
            logits = computed(model(mx.array(row[None]))[0].astype(mx.float32))
        best = np.argpartition(logits, -min(top, logits.shape[-1]), axis=-1)[:, -top:]
        shifted = logits - logits.max(-1, keepdims=True)
        total = np.log(np.exp(shifted).sum(-1, keepdims=True))
        ids.append(best.astype(np.int32))
        log_p.append((np.take_along_axis(shifted, best, -1) - total).astype(np.float32))
        progress("asking the original", i + 1, len(tokens))
    return Teacher(np.stack(ids), np.stack(log_p))


def divergence(logits: np.ndarray, ids: np.ndarray, log_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL of predictions from a teacher's, and its derivative; numpy has a faster exp than MLX's CPU backend.

    Args:
        logits: float32 (T, vocabulary), overwritten.
        ids, log_p: the teacher's top k (T, k); all other tokens count as one outcome.

    Returns:
        (KL (T,) in nats, its derivative by the logits float32 (T, vocabulary)).
    """
    logits -= logits.max(-1, keepdims=True)
    q = np.exp(logits, out=logits)
    q /= q.sum(-1, keepdims=True)
    p, q_top = np.exp(log_p), np.take_along_axis(q, ids, -1)
    rest_p, rest_q = (np.maximum(1 - a.sum(-1, dtype=np.float64), SMALLEST_REST) for a in (p, q_top))
    kl = (p * (log_p - np.log(np.maximum(q_top, 1e-30)))).sum(-1) + rest_p * np.log(rest_p / rest_q)
    q *= (1 - rest_p / rest_q).astype(np.float32)[:, None]
    np.put_along_axis(q, ids, q_top - p, -1)
    return kl, q


@dataclass
class Found:
    """What training came to.

    factors: by parameter, float32 of its shape, what to multiply it with; before, after: KL on the held-out sequences
    in nats, of the model as it was and with the factors; best_step: where they were found, 0 is the start; history:
    (step, held-out KL).
    """

    factors: dict[str, mx.array]
    before: float
    after: float
    best_step: int
    steps: int
    history: list[tuple[int, float]]


@dataclass(frozen=True)
class Schedule:
    """steps of `batch` sequences each; rate: Adam's, per step as a share of a parameter's value, falling to 0 along a
    cosine; the held-out sequences are asked every `every` steps, and training ends after `patience` askings in a row
    without a better one.
    """

    steps: int
    batch: int
    rate: float
    every: int
    patience: int = 3
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Of step 0 to steps - 1."""
        warm = max(1, round(WARMUP * self.steps))
        return self.rate * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))


class Factors:
    """The parameters under training: each is its start value times exp(t), t from 0 on by Adam."""

    def __init__(self, model: nn.Module, names: list[str]):
        held = dict(tree_flatten(model.parameters()))
        self.model = model
        self.start = {name: held[name].astype(mx.float32) for name in names}
        self.t = {name: mx.zeros_like(a) for name, a in self.start.items()}
        self._mean = dict(self.t)
        self._square = dict(self.t)
        self._steps = 0

    def put(self, t: dict[str, mx.array]) -> None:
        """Give the model its start values times exp(t)."""
        self.model.update(tree_unflatten([(name, a * mx.exp(t[name])) for name, a in self.start.items()]))

    def step(self, gradient: dict[str, mx.array], rate: float) -> None:
        """One step of Adam (arXiv 1412.6980)."""
        self._steps += 1
        for name, g in gradient.items():
            self._mean[name] = BETAS[0] * self._mean[name] + (1 - BETAS[0]) * g
            self._square[name] = BETAS[1] * self._square[name] + (1 - BETAS[1]) * g * g
            mean = self._mean[name] / (1 - BETAS[0] ** self._steps)
            size = mx.sqrt(self._square[name] / (1 - BETAS[1] ** self._steps))
            moved = self.t[name] - rate * mean / (size + EPSILON)
            self.t[name] = mx.clip(moved, -LARGEST_CHANGE, LARGEST_CHANGE)
        mx.eval(self.t, self._mean, self._square)


def distill(
    model: nn.Module,
    names: list[str],
    tokens: np.ndarray,
    teacher: Teacher,
    held_out: int,
    schedule: Schedule,
    progress: Progress = lambda what, done, total: None,
) -> Found:
    """Train some parameters of a model towards a teacher; the model is left with the best it had.

    Args:
        model: maps int (1, T) to logits (1, T, vocabulary).
        names: paths of the parameters; no other changes.
        tokens: int32 (n, T).
        teacher: its predictions on them.
        held_out: the last so many sequences are never trained on, they choose the best step.
        schedule: how.
        progress: called with (what, done, total).
    """
    factors = Factors(model, names)
    history = [(0, held_out_loss(model, tokens, teacher, held_out))]
    best, best_step, done = dict(factors.t), 0, 0
    for picks in _batches(np.arange(len(tokens) - held_out), schedule):
        factors.step(_gradient(factors, tokens, teacher, picks), schedule.rate_at(done))
        done += 1
        progress("training gains", done, schedule.steps)
        if done % schedule.every == 0 or done == schedule.steps:
            factors.put(factors.t)
            history.append((done, held_out_loss(model, tokens, teacher, held_out)))
            if history[-1][1] < dict(history)[best_step]:
                best, best_step = dict(factors.t), done
            if done - best_step >= schedule.patience * schedule.every:
                break
    factors.put(best)
    mx.eval(model.parameters())
    kl = dict(history)
    return Found({n: mx.exp(t) for n, t in best.items()}, kl[0], kl[best_step], best_step, done, history)


def _gradient(factors: Factors, tokens: np.ndarray, teacher: Teacher, picks: np.ndarray) -> dict[str, mx.array]:
    """Of the mean KL of some sequences, which pass one at a time."""

    def surrogate(t: dict[str, mx.array], i: int) -> mx.array:
        factors.put(t)
        return _surrogate(factors.model, tokens[i], teacher, i)

    total: dict[str, mx.array] = {}
    for i in picks:
        for name, g in mx.grad(surrogate)(factors.t, int(i)).items():
            total[name] = g / len(picks) + total.get(name, 0.0)
        mx.eval(total)
    return total


def _batches(learn: np.ndarray, schedule: Schedule) -> list[np.ndarray]:
    """Sequences of each step: all of them in turn, shuffled anew each time round."""
    random = np.random.default_rng(schedule.seed)
    rounds = -(-schedule.steps * schedule.batch // len(learn))
    order = np.concatenate([random.permutation(learn) for _ in range(rounds)])
    return np.split(order[: schedule.steps * schedule.batch], schedule.steps)


def _surrogate(model: nn.Module, row: np.ndarray, teacher: Teacher, i: int) -> mx.array:
    """A scalar with the gradient of the mean KL of sequence i."""
    logits = model(mx.array(row[None]))[0].astype(mx.float32)
    _, slope = divergence(np.array(logits), teacher.ids[i], teacher.log_p[i])
    return (logits * mx.array(slope)).sum() / len(row)


def held_out_loss(model: nn.Module, tokens: np.ndarray, teacher: Teacher, held_out: int) -> float:
    """Mean KL in nats on the last `held_out` sequences."""
    found = []
    for i in range(len(tokens) - held_out, len(tokens)):
        logits = computed(model(mx.array(tokens[i : i + 1]))[0].astype(mx.float32))
        found.append(divergence(logits, teacher.ids[i], teacher.log_p[i])[0].mean())
    return float(np.mean(found))
