"""A checkpoint's experts as qmoe records: rounded by GPTQ in groups of experts, coded, and brought to one size a layer.

How large records are is known when all of a layer are coded; until then they wait in a file beside the model.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from tiny_qmoe_mlx.codecs import qmoe
from tiny_qmoe_mlx.conversion.affine import affine_alignment
from tiny_qmoe_mlx.conversion.calibrate import LayerTokens, hidden_values
from tiny_qmoe_mlx.conversion.expert_pass import groups
from tiny_qmoe_mlx.conversion.gptq import gptq, grid_of, hessians, most_tokens
from tiny_qmoe_mlx.conversion.settings import Settings
from tiny_qmoe_mlx.disk_reads import read_header
from tiny_qmoe_mlx.expert_kind import ExpertKind
from tiny_qmoe_mlx.original import checkpoint
from tiny_qmoe_mlx.spec import LayerSpec, ModelSpec, bits_per_weight

AT_ONCE = 16  # experts of a call of GPTQ, as published
GUESS = 1.0  # bits per weight of records that are not coded yet: what alignment and free space are chosen by
WAITING = ".partial-records"


def coding_of(settings: Settings) -> qmoe.Coding:
    """The grid and the code that settings ask for: 1.5 bits are QMoE's word for ternary."""
    grid = qmoe.TERNARY if settings.bits == 1.5 else qmoe.TWO_BIT
    if settings.codewords == qmoe.DICTIONARY:
        return qmoe.Coding(grid, qmoe.DICTIONARY, 16)
    return qmoe.Coding(grid, qmoe.TUNSTALL, int(settings.codewords.removeprefix(f"{qmoe.TUNSTALL}-")))


def qmoe_layer_specs(layers: list[checkpoint.ExpertLayer], settings: Settings) -> tuple[list[LayerSpec], int]:
    """What the experts files of all layers hold, with a guess at the size of records, and their alignment."""
    coding, guesses = coding_of(settings), []
    for found in layers:
        shapes = [(rows, columns) for _, rows, columns in checkpoint.matrix_shapes(found)]
        weights = sum(rows * columns for rows, columns in shapes)
        least = qmoe.least_bytes(shapes, coding, checkpoint.has_bias(found))
        guesses.append(max(least, int(least + GUESS * weights / 8)))
    alignment = min(map(affine_alignment, guesses))
    specs = [checkpoint.layer_spec(f, _aligned(n, alignment)) for f, n in zip(layers, guesses, strict=True)]
    return [replace(spec, coding=coding) for spec in specs], alignment


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def qmoe_records(found: checkpoint.ExpertLayer, kind: ExpertKind, tokens: LayerTokens | None) -> Iterator[np.ndarray]:
    """A layer's records, each as long as it needs, expert 0 first.

    The Hessian of gate and up is that of the expert's tokens, that of down of what the unrounded gate and up give for
    them; both see four times as many tokens as experts have on average at most. As published, an expert's first tokens
    are cut there, and sentinels among them left out afterwards.

    Args:
        tokens: None for no calibration: rounding to nearest.

    Raises:
        ValueError: weights that are not finite, with layer and expert.
    """
    most = 0
    if tokens is not None:
        count, picks = tokens.chosen.shape
        most = most_tokens(count, picks, checkpoint.expert_count(found))
    for group in groups(found):
        for first in range(group.start, group.stop, AT_ONCE):
            part = range(first, min(first + AT_ONCE, group.stop))
            weights, biases = checkpoint.expert_weights(found, part)
            experts = [_Expert([w[i] for w in weights], biases and [b[i] for b in biases]) for i in range(len(part))]
            for e, expert in zip(part, experts, strict=True):
                expert.see(None if tokens is None else _seen(tokens, e, most), kind)
            yield from _coded(experts, kind)


def _seen(tokens: LayerTokens, expert: int, most: int) -> np.ndarray:
    """The tokens that an expert's Hessians see, float32 (tokens, d)."""
    first = tokens.of_expert(expert)[0][:most]
    return tokens.x[first if tokens.counted is None else first[tokens.counted[first]]]


class _Expert:
    """An expert on its way: weights and biases per matrix, and what reaches its first matrices and its last one."""

    def __init__(self, weights: list[np.ndarray], biases: list[np.ndarray] | None):
        self.weights, self.biases = weights, biases
        self.inputs = self.hidden = np.empty((0, 0), np.float32)

    def see(self, x: np.ndarray | None, kind: ExpertKind) -> None:
        """Take the expert's tokens, float32 (tokens, d), or none."""
        first, last = self.weights[0].shape[1], self.weights[-1].shape[1]
        self.inputs = np.empty((0, first), np.float32) if x is None else x
        self.hidden = np.empty((0, last), np.float32)
        if len(self.inputs):
            self.hidden = hidden_values(self.weights, self.biases, self.inputs, kind)


def _coded(experts: list[_Expert], kind: ExpertKind) -> Iterator[np.ndarray]:
    """Records of experts that are rounded together."""
    coding, last = kind.coding, len(kind.matrices) - 1
    assert coding is not None
    outer, inner = hessians([e.inputs for e in experts]), hessians([e.hidden for e in experts])
    rounded = []
    for m in range(last + 1):
        w = np.stack([e.weights[m] for e in experts])
        grid = grid_of(w, coding.grid)
        rounded.append((gptq(w, inner if m == last else outer, grid), grid.bits16()))
    for i, expert in enumerate(experts):
        biases: list[np.ndarray | None] = [None] * (last + 1)
        if expert.biases:
            biases = list(expert.biases)
        parts = zip(rounded, biases, strict=True)
        yield qmoe.pack([qmoe.encode(s[i], v[i], coding, b) for (s, v), b in parts], coding)


# ---- sizes that are known when all are coded


@contextmanager
def spooled(
    records: Iterable[np.ndarray], directory: Path, alignment: int
) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """Records of any size in a file until the last is there: the size that holds each of them, and the padded records.

    Raises:
        OSError: the disk is full.
    """
    path, sizes = directory / WAITING, []
    try:
        with open(path, "w+b") as file:
            for record in records:
                file.write(record.data)
                sizes.append(len(record))
            size = _aligned(max(sizes), alignment)
            file.seek(0)
            yield size, (np.frombuffer(file.read(n).ljust(size, b"\0"), np.uint8) for n in sizes)
    finally:
        path.unlink(missing_ok=True)


def settled(spec: ModelSpec, layers: dict[int, int]) -> ModelSpec:
    """A model's words with the record sizes of some layers, bytes by index of the decoder layer."""
    sized = [replace(s, record_bytes=layers.get(s.layer, s.record_bytes)) for s in spec.layers]
    return replace(spec, layers=tuple(sized), bits=round(bits_per_weight(sized, spec.alignment), 4))


def settle_finished(spec: ModelSpec, directory: Path, finished: int) -> ModelSpec:
    """The same with the sizes that the files of finished layers have."""
    sizes = {}
    for layer in (s for s in spec.layers if s.layer <= finished):
        tensors, _ = read_header(directory / layer.file)
        sizes[layer.layer] = tensors[f"{layer.path}.records"].shape[1]
    return settled(spec, sizes)
