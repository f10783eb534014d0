"""One MoE layer's experts: Hessians, weights and a byte budget in, records out.

The steps, per expert: rotate weights and Hessians, order the column blocks, share the record's bytes out (rates.py),
round with error feedback (feedback.py), refit the gains. Experts are independent: nothing here knows of other layers.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice

import numpy as np

from tiny_qmoe_mlx import metal, metal_encode, native
from tiny_qmoe_mlx.codecs.rotation import COLUMN_BLOCK, padded_columns, rotate, unrotate
from tiny_qmoe_mlx.codecs.trellis import PLANES, ROW_TILE, TILE_COLUMNS, Matrix, Record, block_bytes, padded_rows
from tiny_qmoe_mlx.conversion.feedback import (
    DAMPING,
    Encoder,
    block_order,
    clipped,
    columns_of,
    encode_stack,
    factor,
    rotated_hessian,
)
from tiny_qmoe_mlx.conversion.rates import fixed_bytes, keeps_row_gains, record_bytes_for, water_fill
from tiny_qmoe_mlx.errors import BudgetError

__all__ = ["ExpertInputs", "blend", "quantize_layer", "record_bytes_for", "token_weights"]

TILES_AT_ONCE = 64  # row tiles per call of the encoder: enough for its threads to be busy
PRIOR_STRENGTH = 0.25  # tokens that the layer's Hessian counts for, per column
MASSIVE = 1000.0  # times the median token's: the largest weight of a token
HIDDEN_WEIGHT = 2.0  # of gate and up beside down; measured by KL divergence, flat from 1.5 to 3

# rounded gate and up, float32 (w, d) each in model space -> (weights of down (d, w), their Hessian (w, w))
DownInputs = Callable[[list[np.ndarray]], tuple[np.ndarray, np.ndarray]]


@dataclass
class ExpertInputs:
    """One expert as the quantizer needs it.

    weights: float (rows, columns) each: gate, up, down, or fc1, fc2.
    h_in: float (d, d), mean over tokens of x x^T for the expert layer's input x, in model space (not rotated); best
        with tokens weighted by `token_weights`. Experts that share one array share the work on it.
    h_mid: float (w, w), the same for the input of down (fc2), on the scale of the same tokens.
    biases: float (rows,) each in the order of weights, or None.
    down_inputs: called when gate and up (fc1) are rounded; what it returns takes the place of down (fc2) and of h_mid
        from there on, so that down can make up for what the rounding and earlier layers lost (drift.py). The bytes that
        down gets are shared out before, by the weights and h_mid above. None: down is rounded as it is.
    """

    weights: list[np.ndarray]
    h_in: np.ndarray
    h_mid: np.ndarray
    biases: list[np.ndarray] | None = None
    down_inputs: DownInputs | None = None


def token_weights(hidden: np.ndarray, down: np.ndarray) -> np.ndarray:
    """How much each token should count in h_in, float32 (tokens,); the median token counts 1.

    An error of gate and up grows with the hidden values it passes through: at a token of massive activations (attention
    sinks; arXiv 2402.17762) by orders of magnitude, and all later tokens attend to what comes out there.

    Args:
        hidden: float (tokens, w), the input of down.
        down: float (d, w).
    """
    energy = np.square(hidden, dtype=np.float64) @ np.square(down, dtype=np.float64).sum(0)
    median = np.median(energy) if len(energy) else 0.0
    if not median > 0:
        return np.ones(len(energy), np.float32)
    return np.minimum(energy / median, MASSIVE).astype(np.float32)


def blend(
    own: np.ndarray,
    tokens: float,
    prior: np.ndarray | None = None,
    prior_tokens: float = 0,
    strength: float | None = None,
) -> np.ndarray:
    """A mean Hessian from an expert's own sum and the layer's, float32 (columns, columns).

    The layer's mean counts as `strength` tokens (default: a quarter of the number of columns) beside the expert's own
    tokens, so an expert with many tokens keeps its own Hessian and one with none gets the layer's.

    Args:
        own: sum of x x^T over the expert's tokens.
        tokens: how many tokens, or their summed weights.
        prior: sum over the layer's tokens; None where the layer has no such thing (the input of down is the expert's
            own space): then a multiple of the identity, of the own diagonal's size, takes its place.
        prior_tokens: how many tokens the prior summed.
    """
    columns = len(own)
    strength = columns * PRIOR_STRENGTH if strength is None else strength
    if prior is None or prior_tokens <= 0:
        mean = clipped(np.diag(own)).mean() / max(tokens, 1) * np.eye(columns, dtype=np.float32)
        strength = min(strength, 0.02 * max(tokens, 1))
    else:
        mean = prior / np.float32(prior_tokens)
    return ((own + strength * mean) / max(tokens + strength, 1e-9)).astype(np.float32)


def quantize_layer(
    experts: Iterable[ExpertInputs],
    signs_in: np.ndarray,
    signs_mid: np.ndarray,
    record_bytes: int,
    length: int = 12,
) -> Iterator[Record]:
    """Records of a layer's experts, in order; a few experts are worked on at once, so an iterable may be lazy.

    Args:
        experts: all of one set of shapes.
        signs_in: float32 (padded d,), rotation.signs of side 0.
        signs_mid: float32 (padded w,), of side 1.
        record_bytes: every record packs into this and uses it as far as whole rate steps allow.
        length: L, 12, 14 or 16; the encoder's time grows as 2^L.

    Raises:
        ValueError: weights, Hessians or biases that are not finite or do not fit together.
        BudgetError: a record that does not hold even the gains.
    """
    iterator = enumerate(experts)
    at_once = 1
    while batch := list(islice(iterator, at_once)):
        for number, expert in batch:
            _check(number, expert, signs_in, signs_mid)
        prepared = _prepare([expert for _, expert in batch], signs_in, signs_mid, record_bytes, length)
        matrices = _encode([p for planes in prepared for p in planes[:-1]], length)
        for (number, expert), planes in zip(batch, prepared, strict=True):
            if expert.down_inputs is not None:
                planes[-1] = _down_again(number, expert, planes, matrices, signs_in, signs_mid, length)
        matrices |= _encode([planes[-1] for planes in prepared], length)
        yield from (Record(length, [matrices[id(p)][0] for p in planes]) for planes in prepared)
        tiles = sum(w.shape[0] for w in batch[0][1].weights[:-1]) // ROW_TILE
        at_once = max(1, TILES_AT_ONCE // max(tiles, 1))


def _check(number: int, expert: ExpertInputs, signs_in: np.ndarray, signs_mid: np.ndarray) -> None:
    names = ("gate", "up", "down") if len(expert.weights) == 3 else ("fc1", "fc2")
    if len(expert.weights) != len(names):
        raise ValueError(f"[quantize] an expert has 2 or 3 matrices, expert {number} has {len(expert.weights)}.")
    for i, (name, w) in enumerate(zip(names, expert.weights, strict=True)):
        h, sign = (expert.h_mid, signs_mid) if name in ("down", "fc2") else (expert.h_in, signs_in)
        if w.ndim != 2 or h.shape != (w.shape[1], w.shape[1]) or padded_columns(w.shape[1]) != len(sign):
            raise ValueError(
                f"[quantize] expert {number}: {name} is {w.shape}, its Hessian should be {w.shape[-1]} on both sides "
                f"and its signs as many, padded to 64; received {h.shape} and {len(sign)}."
            )
        bias = expert.biases[i] if expert.biases is not None else None
        if bias is not None and bias.shape != (w.shape[0],):
            raise ValueError(
                f"[quantize] expert {number}: the bias of {name} should be ({w.shape[0]},), received {bias.shape}."
            )
        if bias is not None and np.abs(bias).max(initial=0) > 65504:
            raise ValueError(f"[quantize] expert {number}: the bias of {name} should fit float16 (65504), it does not.")
        for what, values in (("weights", w), ("Hessian", h), ("bias", bias)):
            if values is not None and not np.isfinite(values).all():
                raise ValueError(
                    f"[quantize] expert {number}: the {what} of {name} should be finite, received NaN or Inf; "
                    f"the checkpoint or the calibration overflowed there."
                )


@dataclass
class _Plane:
    """One matrix on its way: rotated, padded, in stored order, with what its rounding needs."""

    shape: tuple[int, int]
    w: np.ndarray  # float32 (R, C)
    h: np.ndarray  # float64 (C, C)
    feedback: np.ndarray
    weight: np.ndarray
    order: np.ndarray
    row_gain: np.ndarray  # float32 (R,)
    keep_gain: bool
    bias: np.ndarray | None
    rates: np.ndarray


def _prepare(
    experts: list[ExpertInputs], signs_in: np.ndarray, signs_mid: np.ndarray, record_bytes: int, length: int
) -> list[list[_Plane]]:
    sides: dict[tuple[int, int], tuple] = {}

    def side(h: np.ndarray, sign: np.ndarray) -> tuple:
        key = (id(h), id(sign))
        if key not in sides:
            sides[key] = _side(h, sign)
        return sides[key]

    bits = 8 * record_bytes / sum(w.size for w in experts[0].weights)
    out = []
    for expert in experts:
        planes = []
        for i, w in enumerate(expert.weights):
            last = i == len(expert.weights) - 1
            h, sign = (expert.h_mid, signs_mid) if last else (expert.h_in, signs_in)
            bias = expert.biases[i] if expert.biases is not None else None
            planes.append(_plane(w, sign, side(h, sign), bias, bits))
        _share_bytes(expert, planes, record_bytes, length)
        out.append(planes)
    return out


def _side(h: np.ndarray, sign: np.ndarray) -> tuple:
    rotated = rotated_hessian(h, sign)
    order = block_order(rotated)
    columns = columns_of(order)
    rotated = rotated[np.ix_(columns, columns)]
    return rotated, order, *factor(rotated)


def _plane(
    w: np.ndarray, sign: np.ndarray, side: tuple, bias: np.ndarray | None, bits: float, keep: bool | None = None
) -> _Plane:
    h, order, feedback, weight = side
    rows = padded_rows(w.shape[0])
    rotated = np.zeros((rows, len(sign)), np.float32)
    rotated[: w.shape[0]] = rotate(np.asarray(w, np.float32), sign)[:, columns_of(order)]
    power = np.mean(rotated.astype(np.float64) ** 2, axis=1)
    if keep is None:
        keep = keeps_row_gains(power[: w.shape[0]], w.shape[1], bits)
    row_gain = np.where((power > 0) & keep, np.sqrt(power), 1).astype(np.float32)
    rates = np.zeros(len(order), np.uint8)
    return _Plane(w.shape, rotated, h, feedback, weight, order, row_gain, keep, bias, rates)


def _share_bytes(expert: ExpertInputs, planes: list[_Plane], record_bytes: int, length: int) -> None:
    shapes = [p.shape for p in planes]
    fixed = fixed_bytes(shapes, [p.keep_gain for p in planes], expert.biases is not None)
    if fixed > record_bytes:
        raise BudgetError(
            f"[quantize] the gains alone need {fixed} bytes, a record has {record_bytes}; ask for more bits."
        )
    importance = []
    for p, reach in zip(planes, _reach(expert, planes), strict=True):
        importance.append(_block_energy(p, reach))
    rates = water_fill(importance, [p.shape[0] for p in planes], record_bytes - fixed, length)
    for p, r in zip(planes, rates, strict=True):
        p.rates = r


def _block_energy(p: _Plane, reach: np.ndarray) -> np.ndarray:
    """Output error (blocks,) if a block were absent, rows weighted by what they do to the output."""
    return ((reach @ p.w.astype(np.float64) ** 2) * p.weight).reshape(-1, COLUMN_BLOCK).sum(1)


def _reach(expert: ExpertInputs, planes: list[_Plane]) -> list[np.ndarray]:
    """Per matrix, float64 (R,): output error of the expert per unit of error of each row.

    An error of down is an error of the output. A relative error of a row of gate or up passes through the (nearly
    homogeneous) activation and product as the same relative error of the hidden value, which down multiplies by its
    column: reach_i = |down[:, i]|^2 E[h_i^2] / E[row_i^2].
    """
    down = expert.weights[-1].astype(np.float64)
    moment = np.diag(expert.h_mid).astype(np.float64)
    hidden = clipped((moment + DAMPING * clipped(moment).mean()) * (down**2).sum(0))
    out = []
    for p in planes[:-1]:
        power = np.einsum("ij,ij->i", p.w.astype(np.float64) @ p.h, p.w)
        reach = np.zeros(len(power))
        n = min(len(hidden), p.shape[0])
        reach[:n] = HIDDEN_WEIGHT * hidden[:n] / np.maximum(power[:n], 1e-30)
        out.append(reach)
    return [*out, np.ones(len(planes[-1].w))]


@cache
def encoder(length: int) -> Encoder:
    """The trellis encoder of this machine for L = length: the GPU's, once it has given the C++ one's codes; or C++.

    Raises:
        ValueError: the GPU's codes differ.
    """
    if not metal.available():
        return native.encode_tiles
    tiles = np.random.default_rng(0).standard_normal((2, ROW_TILE, TILE_COLUMNS)).astype(np.float32)
    for rate in range(1, len(PLANES)):
        codes, _ = metal_encode.encode_tiles(tiles, rate, length)
        if not np.array_equal(codes, native.encode_tiles(tiles, rate, length)[0]):
            raise ValueError(
                f"[quantize] the GPU's encoder should give the C++ encoder's codes at rate {rate} and L {length}, and "
                "does not; run python -m tiny_qmoe_mlx.doctor and report it."
            )
    return metal_encode.encode_tiles


def _down_again(
    number: int,
    expert: ExpertInputs,
    planes: list[_Plane],
    matrices: dict[int, tuple[Matrix, np.ndarray]],
    signs_in: np.ndarray,
    signs_mid: np.ndarray,
    length: int,
) -> _Plane:
    """Down as `down_inputs` wants it, in the bytes that gate and up left."""
    rounded = [_in_model_space(p, matrices[id(p)][1], signs_in) for p in planes[:-1]]
    down, h = expert.down_inputs(rounded)  # type: ignore[misc]
    bias = expert.biases[-1] if expert.biases is not None else None
    changed = ExpertInputs([*expert.weights[:-1], down], expert.h_in, h, expert.biases)
    _check(number, changed, signs_in, signs_mid)
    old = planes[-1]
    new = _plane(down, signs_mid, _side(h, signs_mid), bias, 0, old.keep_gain)
    left = sum(block_bytes(down.shape[0], int(rate)) for rate in old.rates)
    (new.rates,) = water_fill([_block_energy(new, np.ones(len(new.w)))], [down.shape[0]], left, length)
    return new


def _in_model_space(p: _Plane, rounded: np.ndarray, sign: np.ndarray) -> np.ndarray:
    natural = np.empty_like(rounded)
    natural[:, columns_of(p.order)] = rounded
    return unrotate(natural, sign)[: p.shape[0], : p.shape[1]]


def _encode(planes: list[_Plane], length: int) -> dict[int, tuple[Matrix, np.ndarray]]:
    """By id of the plane: the matrix, and the values that it stands for, float32 (R, C) in stored order."""
    stacks: dict[tuple[int, int], list[_Plane]] = {}
    for p in planes:
        stacks.setdefault(p.shape, []).append(p)
    out = {}
    for stack in stacks.values():
        encoded = encode_stack(
            np.stack([p.w for p in stack]),
            [p.feedback for p in stack],
            np.stack([p.rates for p in stack]),
            np.stack([p.row_gain for p in stack]),
            stack[0].shape[0],
            length,
            encoder(length),
        )
        for p, codes, gains, rounded in zip(stack, encoded.codes, encoded.gains, encoded.rounded, strict=True):
            out[id(p)] = _matrix(p, codes, gains, rounded)
    return out


def _matrix(p: _Plane, codes: list, block_gain: np.ndarray, rounded: np.ndarray) -> tuple[Matrix, np.ndarray]:
    row_gain = None
    if p.keep_gain:
        row_gain = (p.row_gain * _refit_rows(p.w, rounded, p.h)).astype(np.float16)
        rounded = rounded * (row_gain / p.row_gain)[:, None]
    bias = None
    if p.bias is not None:
        bias = np.zeros(len(p.w), np.float16)
        bias[: len(p.bias)] = p.bias
    return Matrix(*p.shape, p.rates, p.order, block_gain, row_gain, bias, _payload(codes, len(p.w))), rounded


def _refit_rows(w: np.ndarray, q: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Least-squares factors (R,) of the rows of q: w H q / q H q, not negative."""
    q64 = q.astype(np.float64)
    qh = q64 @ h
    power = np.einsum("ij,ij->i", qh, q64)
    return np.where(power > 0, np.maximum(np.einsum("ij,ij->i", qh, w), 0) / np.maximum(power, 1e-300), 1)


def _payload(codes: list, rows: int) -> np.ndarray:
    """u32 (R / 32, words): the planes of a row tile's superblocks, from the codes of 16-column groups."""
    parts = []
    per_block = COLUMN_BLOCK // TILE_COLUMNS
    for b in range(0, len(codes), per_block):
        if codes[b] is not None:
            segments = np.ascontiguousarray(np.concatenate(codes[b : b + per_block], axis=-1)).view("<u4")
            parts.append(segments.transpose(0, 2, 1).reshape(len(segments), -1))
    return np.concatenate(parts, axis=1) if parts else np.zeros((rows // ROW_TILE, 0), np.uint32)
