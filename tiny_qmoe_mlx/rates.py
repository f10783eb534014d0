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
KEEP = 0.998  # of the asked bits a coarser alignment must still spend


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
        (record bytes, alignment): the coarsest alignment that still spends 99.8 % of the asked bits, else 128.

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
