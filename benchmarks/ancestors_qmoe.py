"""QMoE (arXiv 2310.16795): its code on random ternary weights beside the paper's figures, and what the repair gains.

Compression is counted as the paper's program counts it: 16 bits a weight over 16 a codeword and 64 a row (its place and
two bfloat16 values). `container` is what a record takes on the disk, headers and padding included.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from common import print_table

from tiny_qmoe_mlx.codecs import qmoe, qmoe_tables

DICTIONARY = qmoe.Coding(qmoe.TERNARY, qmoe.DICTIONARY, 16)
ZEROS, PAPER = 0.885, 21.11
C2048 = [(6144, 2080), (2080, 6144)]  # rows, columns of a Switch expert's two matrices
BASE, LARGE = [(3072, 768), (768, 3072)], [(4096, 1024), (1024, 4096)]
# model, its share of zeros (table 3), its shapes, the paper's compression of its experts (table 6)
MODELS = [("base128", 0.857, BASE, 17.06), ("large128", 0.864, LARGE, 18.34), ("c2048", 0.886, C2048, 20.07)]
SHARES = (0.5, 0.7, 0.8, 0.857, 0.885, 0.9, 0.95)
PAIRS = (9, 65, 233, 577, 1161, 2049, 3305, 4993, 7177, 9921, 13289, 17345, 3843, 1569)


def ternary(rng: np.random.Generator, rows: int, columns: int, zeros: float, spread: float = 0.0) -> np.ndarray:
    """Independent symbols u8 (rows, columns); the share of zeros of a row has standard deviation `spread`."""
    share = np.clip(rng.normal(zeros, spread, (rows, 1)), 0, 1)
    return np.where(rng.random((rows, columns)) < share, 0, rng.integers(1, 3, (rows, columns))).astype(np.uint8)


def coded(rng: np.random.Generator, symbols: np.ndarray, coding: qmoe.Coding) -> tuple[float, qmoe.Matrix]:
    """Bits that the paper counts, per weight, of a matrix whose codewords were decoded and compared."""
    rows, columns = symbols.shape
    values = np.tile(np.array([0xBF80, 0x3F80], np.uint16), (rows, 1))  # -1 and 1
    m = qmoe.encode(symbols, values, coding)
    back = qmoe.decode_matrix(m, coding)
    if not np.array_equal(back, np.array([0, -1, 1], np.float32)[symbols]):
        raise AssertionError(f"{coding} of {rows} x {columns} does not decode to what was coded")
    return (coding.bits * m.codewords + 64 * (rows + 1)) / symbols.size, m


def over_shapes(rng: np.random.Generator, shapes: list[tuple[int, int]], quick: bool, **options: float) -> np.ndarray:
    """Bits per weight over some shapes with the dictionary: as the paper counts, and in a record."""
    bits, weights = np.zeros(2), 0
    for rows, columns in shapes:
        used = rows // 8 if quick else rows
        symbols = ternary(rng, used, columns, **options)
        paper, m = coded(rng, symbols, DICTIONARY)
        bits += np.array([paper, 8 * len(qmoe.pack([m], DICTIONARY)) / symbols.size]) * symbols.size
        weights += symbols.size
    return bits / weights


def entropy(zeros: float, levels: int = 3) -> float:
    """Bits a weight at least, symbols being independent."""
    other = (1 - zeros) / (levels - 1)
    return -zeros * np.log2(zeros) - (1 - zeros) * np.log2(other)


def show(quick: bool) -> dict[str, Any]:
    """Print QMoE's tables; their values."""
    rng = np.random.default_rng(0)
    print("QMoE's dictionary: codewords by length in pairs of weights")
    histogram = np.bincount(qmoe_tables.dictionary().lengths // 2)[1:].tolist()
    print_table(["pairs", *map(str, range(1, 15))], [["ours", *histogram], ["published code", *PAIRS]])
    print(f"\nRandom ternary matrices of its largest model's shapes, P(0) = {ZEROS}")
    paper, container = over_shapes(rng, C2048, quick, zeros=ZEROS)
    rows = [["paper", "", PAPER], ["ours", paper, 16 / paper], ["ours, whole records", container, 16 / container]]
    print_table(["", "bits", "compression"], [*rows, ["entropy", entropy(ZEROS), 16 / entropy(ZEROS)]])
    found = {"random": 16 / paper, "histogram": histogram, "models": list(_models(rng, quick))}
    return {**found, "tunstall": list(_repaired(rng, quick))}


def _models(rng: np.random.Generator, quick: bool) -> Iterator[dict[str, Any]]:
    """Rates at the sparsities that the paper measured, and the spread over rows that would explain the rest."""
    print("\nAt the shares of zeros that the paper measured, independent weights of the model's own shapes")
    table = []
    for name, zeros, shapes, claimed in MODELS:
        found = 16 / over_shapes(rng, shapes, quick, zeros=zeros)
        spread = _explaining(rng, shapes, zeros, claimed)
        table.append([name, zeros, claimed, found[0], found[0] / claimed - 1, found[1], spread])
        yield {"model": name, "zeros": zeros, "paper": claimed, "independent": found[0], "spread": spread}
    header = ["", "P(0)", "paper", "ours", "more", "whole records", "spread of P(0) over rows that gives the paper's"]
    print_table(header, table)
    print(
        "Real matrices are not independent: rows (and regions of rows) differ in their zeros, and every share but the\n"
        "one that the dictionary was made for costs more. Rows of independent weights whose P(0) has the standard\n"
        "deviation in the last column take as much as the paper's matrices do (it says: under .05 over matrices)."
    )


def _explaining(rng: np.random.Generator, shapes: list[tuple[int, int]], zeros: float, claimed: float) -> float:
    """Standard deviation of P(0) over rows at which the compression is the claimed one, by bisection."""
    low, high = 0.0, 0.15
    for _ in range(8):
        middle = (low + high) / 2
        found = 16 / over_shapes(rng, shapes, True, zeros=zeros, spread=middle)[0]
        low, high = (middle, high) if found > claimed else (low, middle)
    return round((low + high) / 2, 3)


def _repaired(rng: np.random.Generator, quick: bool) -> Iterator[dict[str, Any]]:
    """Bits of codewords alone against the entropy, rows of 6144 weights: the dictionary and Tunstall's leaves."""
    print(
        "\nBits per weight of codewords alone, rows of 6144 independent weights; Tunstall's table by the share of zeros"
    )
    codings = [DICTIONARY, *(qmoe.Coding(qmoe.TERNARY, qmoe.TUNSTALL, bits) for bits in (8, 12, 16))]
    table, number = [], 100 if quick else 400
    for zeros in SHARES:
        symbols = ternary(rng, number, 6144, zeros)
        bits = [(coded(rng, symbols, c)[0] - 64 * (number + 1) / symbols.size) for c in codings]
        own = entropy(zeros)
        table.append([f"{zeros:.3f}", *(f"{b:.4f}" for b in (own, *bits)), *(f"{b / own - 1:+.1%}" for b in bits)])
        yield {"zeros": zeros, "entropy": own, "bits": bits}
    names = ["dictionary", "8 bits", "12 bits", "16 bits"]
    print_table(["P(0)", "entropy", *names, *(f"{n}, over" for n in names)], table)
