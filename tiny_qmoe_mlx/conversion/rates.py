"""How many bits each 64-column block gets, and how large a record is.

Reverse water-filling (Cover and Thomas, section 10.3): a block's error falls with each rate step by a known amount, and
the next bytes always go where they lower the output error most. Everything here is arithmetic on sizes and variances.
"""

import heapq

import numpy as np

from tiny_qmoe_mlx.codecs.rotation import COLUMN_BLOCK, padded_columns
from tiny_qmoe_mlx.codecs.trellis import BITS, UNIT, block_bytes, side_bytes
from tiny_qmoe_mlx.codecs.trellis_scale import GAUSSIAN
from tiny_qmoe_mlx.errors import BudgetError

DB_PER_BIT = 6.02
SPREAD_LOSS = 0.85  # dB per bit and unit of row spread that one gain for all rows costs (measured on mixed Gaussians)

ALIGNMENTS = (16384, 4096, 1024, 128)
CHECKSUM_BYTES, CHECKSUM_SPAN = 8, 65536
MAX_RATE = len(BITS) - 1
CODE_DB_PER_BIT = 5.5  # what a bit buys with the code of this project, DB_PER_BIT with an ideal one
LAYER_SIZES = 4  # different record sizes in a model
KEEP = 0.993  # of the asked bits a coarser alignment must still spend: at 2 bits the rest is worth .07 dB


def distortion(length: int) -> np.ndarray:
    """Mean squared error of the code at each rate, 0 to 7, on a unit Gaussian source."""
    return np.array([1.0] + [GAUSSIAN[length, rate][1] for rate in range(1, MAX_RATE + 1)])


def fixed_bytes(shapes: list[tuple[int, int]], row_gains: list[bool], bias: bool) -> int:
    """Bytes of a record before any payload: the header and every matrix's gains, biases, order and rates."""
    return UNIT + sum(side_bytes(*shape, gain, bias) for shape, gain in zip(shapes, row_gains, strict=True))


def keeps_row_gains(power: np.ndarray, columns: int, bits: float) -> bool:
    """Whether a gain per row lowers a matrix's error more than the bits that the gains cost.

    Args:
        power: mean square of each row, (rows,).
        columns: of the matrix; 16 bits a row are the more per weight the fewer there are.
        bits: about how many bits a weight has.
    """
    spread = np.log(max(np.mean(power**2), 1e-300) / max(np.mean(power) ** 2, 1e-300))
    return SPREAD_LOSS * bits * spread > DB_PER_BIT * 16 / padded_columns(columns)


def largest_record(shapes: list[tuple[int, int]], bias: bool) -> int:
    """Bytes of a record with every block at the highest rate, a multiple of 128."""
    payload = sum(block_bytes(rows, MAX_RATE) * padded_columns(columns) // COLUMN_BLOCK for rows, columns in shapes)
    return payload + fixed_bytes(shapes, [True] * len(shapes), bias)


def file_bytes(record_bytes: int, experts: int, alignment: int, header_bytes: int) -> int:
    """Bytes of one layer's experts file: header, records and checksums (docs/FORMAT.md, section 3)."""
    checksums = CHECKSUM_BYTES * -(-record_bytes // CHECKSUM_SPAN)
    return -(-header_bytes // alignment) * alignment + experts * (record_bytes + checksums)


def record_bytes_for(
    bits: float, shapes: list[tuple[int, int]], experts: int, bias: bool = False, header_bytes: int = 512
) -> tuple[int, int]:
    """The largest record with which an experts file spends at most `bits` per weight, everything counted.

    Args:
        bits: asked bits per expert weight.
        shapes: (rows, columns) of one expert's matrices.
        experts: experts in the layer.
        bias: whether the experts have biases.
        header_bytes: most bytes that the file's header takes before it is padded to the alignment.

    Returns:
        (record bytes, alignment): the coarsest alignment that still spends 99.3 % of the asked bits, else 128.

    Raises:
        BudgetError: the bits do not hold the gains and half a bit for every weight.
    """
    weights = experts * sum(rows * columns for rows, columns in shapes)
    allowed = int(bits * weights / 8)
    cap = largest_record(shapes, bias)
    record = 0
    for alignment in ALIGNMENTS:
        record = _largest_within(allowed, experts, alignment, header_bytes)
        if record >= cap:
            return -(-cap // alignment) * alignment, alignment
        if KEEP * allowed <= file_bytes(record, experts, alignment, header_bytes) <= allowed:
            break
    least = fixed_bytes(shapes, [False] * len(shapes), bias)
    least += sum(block_bytes(rows, 1) * padded_columns(columns) // COLUMN_BLOCK for rows, columns in shapes)
    if record < least:
        needed = 8 * file_bytes(least, experts, UNIT, header_bytes) / weights
        raise BudgetError(
            f"[quantize] experts of {_shapes_text(shapes)} need at least {needed:.2f} bits per weight, "
            f"received {bits:g}; ask for more bits."
        )
    return record, alignment


def _largest_within(allowed: int, experts: int, alignment: int, header_bytes: int) -> int:
    guess = (allowed - -(-header_bytes // alignment) * alignment) // experts // alignment * alignment
    while guess > 0 and file_bytes(guess, experts, alignment, header_bytes) > allowed:
        guess -= alignment
    return max(guess, 0)


def _shapes_text(shapes: list[tuple[int, int]]) -> str:
    return ", ".join(f"{rows} x {columns}" for rows, columns in shapes)


def water_fill(importance: list[np.ndarray], rows: list[int], budget: int, length: int) -> list[np.ndarray]:
    """Rates of all blocks of one expert that lower the summed error most within a byte budget.

    Args:
        importance: per matrix float (blocks,): the output error if a block were absent.
        rows: rows of each matrix.
        budget: bytes for all payloads of the expert.
        length: L.

    Returns:
        per matrix u8 (blocks,). Errors fall by one common slope (lambda) per byte; bytes that the next step of a wide
        matrix cannot use go to the best step that still fits.
    """
    error = distortion(length)
    rates = [np.zeros(len(d), np.uint8) for d in importance]
    heap = [_step(m, b, 0, importance, rows, error) for m, d in enumerate(importance) for b in range(len(d))]
    heapq.heapify(heap)
    left = budget
    while heap:
        _, m, b, rate, cost = heapq.heappop(heap)
        if cost > left:
            continue
        left -= cost
        rates[m][b] = rate
        if rate < MAX_RATE:
            heapq.heappush(heap, _step(m, b, rate, importance, rows, error))
    return rates


def _step(
    m: int, b: int, rate: int, importance: list[np.ndarray], rows: list[int], error: np.ndarray
) -> tuple[float, int, int, int, int]:
    """The step from a rate to the next: (-error saved per byte, matrix, block, next rate, bytes).

    Single steps are the convex hull: the error falls ever more slowly per plane, which the tests check.
    """
    cost = block_bytes(rows[m], rate + 1) - block_bytes(rows[m], rate)
    saved = importance[m][b] * (error[rate] - error[rate + 1])
    return -saved / cost, m, b, rate + 1, cost


def layer_bits(
    sensitivity: np.ndarray,
    weights: np.ndarray,
    bits: float,
    least: float,
    most: float,
    sizes: int = LAYER_SIZES,
) -> np.ndarray:
    """Bits per weight of each layer that lower the summed damage most, at most `sizes` different values.

    The damage of layer l at R_l bits is taken as sensitivity_l x 10^(-CODE_DB_PER_BIT R_l / 10); layers of like
    sensitivity per weight share a size, cut where the sum loses least (dynamic programming over the sorted layers).

    Args:
        sensitivity: float (layers,), positive: how much a relative error of the layer's expert output, once, does.
        weights: int (layers,), expert weights of each layer.
        bits: mean over all weights; kept exactly.
        least, most: bounds of every layer, least <= bits <= most.

    Returns:
        float64 (layers,).

    Raises:
        ValueError: sensitivities that are not finite, or bounds that exclude the mean.
    """
    s, n = np.asarray(sensitivity, np.float64), np.asarray(weights, np.float64)
    if s.shape != n.shape or not np.isfinite(s).all() or not (n > 0).all():
        raise ValueError("[rates] each layer should have a finite sensitivity and weights; calibrate on more text.")
    if not least <= bits <= most:
        raise ValueError(f"[rates] the mean of {bits:g} bits should lie between {least:g} and {most:g}.")
    s = np.maximum(s, max(s.max() * 1e-6, 1e-300))
    order = np.argsort(s / n, kind="stable")
    groups = [order[a:b] for a, b in _cuts(s[order], n[order], sizes)]
    wish = np.array([10 / CODE_DB_PER_BIT * np.log10(s[g].sum() / n[g].sum()) for g in groups])
    share = np.array([n[g].sum() for g in groups]) / n.sum()
    out = np.empty(len(s))
    for g, value in zip(groups, _with_mean(wish, share, bits, least, most), strict=True):
        out[g] = value
    return out


def _cuts(s: np.ndarray, n: np.ndarray, sizes: int) -> list[tuple[int, int]]:
    """Sorted layers cut into at most `sizes` runs so that sum of N log(S / N) over runs is least: with the best bits
    for each run, that is the logarithm of the summed damage.
    """
    s_sum, n_sum = np.concatenate([[0], np.cumsum(s)]), np.concatenate([[0], np.cumsum(n)])

    def cost(a: int, b: int) -> float:
        return (n_sum[b] - n_sum[a]) * np.log((s_sum[b] - s_sum[a]) / (n_sum[b] - n_sum[a]))

    best: dict[int, tuple[float, list[tuple[int, int]]]] = {0: (0.0, [])}
    for _ in range(min(sizes, len(s))):
        longer = dict(best)
        for b in range(1, len(s) + 1):
            options = [(best[a][0] + cost(a, b), [*best[a][1], (a, b)]) for a in best if a < b]
            longer[b] = min([*options, *([best[b]] if b in best else [])], key=lambda option: option[0])
        best = longer
    return best[len(s)][1]


def _with_mean(wish: np.ndarray, share: np.ndarray, bits: float, least: float, most: float) -> np.ndarray:
    """wish + a constant, within the bounds, whose mean by share is `bits`, by bisection."""
    low, high = least - wish.max(), most - wish.min()
    for _ in range(100):
        middle = (low + high) / 2
        below = share @ np.clip(wish + middle, least, most) < bits
        low, high = (middle, high) if below else (low, middle)
    return np.clip(wish + high, least, most)
