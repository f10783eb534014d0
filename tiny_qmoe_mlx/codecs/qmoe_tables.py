"""The codes of the qmoe codec: what each codeword stands for, as symbols of weights (docs/FORMAT.md, section 7).

`dictionary` is the one table of QMoE (arXiv 2310.16795, section 4.2; heap order and limits as in its published code):
65,536 sequences of 1 to 14 pairs of ternary weights, every prefix of a sequence among them. `tunstall` is the repair:
leaves only, of any length, for one of 16 probabilities of a zero (Tunstall, 1967). Symbol 0 is a zero weight.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import numpy as np

ZEROS = 0.885  # the one probability of a zero weight in QMoE's code
ENTRIES, MOST_PAIRS, PAIRS = 65536, 14, 9
PROBABILITIES = tuple(n / 256 for n in (64, 85, 102, 128, 154, 171, 192, 205, 215, 221, 227, 233, 238, 243, 247, 251))
NONE = -1
Emit = Callable[[np.ndarray, np.ndarray], None]  # rows, and the codeword that each of them has reached


@dataclass(frozen=True)
class Table:
    """A code: codeword c stands for symbols[start[c] : start[c + 1]].

    start: int64 (codewords + 1,). symbols: u8. tree: int32 (nodes, symbols of a step), how an encoder walks; what its
    entries mean is `encode`'s and differs between the two codes.
    """

    start: np.ndarray
    symbols: np.ndarray
    tree: np.ndarray

    @cached_property
    def lengths(self) -> np.ndarray:
        """Weights of each codeword, int64 (codewords,)."""
        return np.diff(self.start)

    @cached_property
    def starts32(self) -> np.ndarray:
        """`start` as the kernels take it, u32."""
        return self.start.astype(np.uint32)

    @cached_property
    def words(self) -> np.ndarray:
        """The symbols as the kernels take them: u32, 16 a word, the first in the lowest bits; two words of zeros
        follow, so that a read of 64 bits may begin at any symbol.
        """
        padded = np.zeros((len(self.symbols) // 16 + 3, 16), np.uint32)
        padded.reshape(-1)[: len(self.symbols)] = self.symbols
        return (padded << (2 * np.arange(16, dtype=np.uint32))).sum(1, dtype=np.uint32)


# ---- QMoE's dictionary


@cache
def dictionary() -> Table:
    """QMoE's table: codewords by falling probability, then by sequence; `tree` maps (codeword, pair) to the codeword of
    the longer sequence, or NONE; its last row stands for the empty sequence. A pair is first + 3 * second.
    """
    key, pairs = _likeliest()
    shift = 4 * (MOST_PAIRS - pairs)
    last = (key >> shift & 15).astype(np.int64) - 1
    parent = key & ~(np.int64(15) << shift)
    order = np.argsort(key)
    place = order[np.minimum(np.searchsorted(key[order], parent), ENTRIES - 1)]
    tree = np.full((ENTRIES + 1, PAIRS), NONE, np.int32)
    tree[np.where(pairs == 1, ENTRIES, place), last] = np.arange(ENTRIES)
    start = 2 * np.concatenate([[0], np.cumsum(pairs)])
    symbols = np.zeros(start[-1], np.uint8)
    for i in range(MOST_PAIRS):
        has = pairs > i
        pair = (key[has] >> 4 * (MOST_PAIRS - 1 - i) & 15) - 1
        symbols[start[:-1][has] + 2 * i] = pair % 3
        symbols[start[:-1][has] + 2 * i + 1] = pair // 3
    return Table(start, symbols, tree)


def _likeliest() -> tuple[np.ndarray, np.ndarray]:
    """Keys int64 and lengths int64 of the likeliest sequences of pairs, in the dictionary's order.

    QMoE pops a heap of (-probability, sequence) and pushes the nine longer sequences of what it popped. A longer
    sequence is less likely, so it pops in sorted order, and sorting all that are likely enough gives the same, ties
    included: probabilities are float64 products from the first pair on, and a key has a hexadecimal digit (pair + 1)
    for each pair, the first one highest, so that keys order as sequences do.
    """
    single = np.array([ZEROS, (1 - ZEROS) / 2, (1 - ZEROS) / 2])
    pair = np.outer(single, single).reshape(-1)
    least = 1e-5
    while True:
        probability, key, sizes = _above(pair, least)
        if len(key) >= ENTRIES:
            chosen = np.lexsort((key, -probability))[:ENTRIES]
            return key[chosen], sizes[chosen]
        least /= 2


def _above(pair: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(probability, key, pairs) of all sequences of at least that probability."""
    probability, key = np.ones(1), np.zeros(1, np.int64)
    found = []
    for i in range(MOST_PAIRS):
        digits = np.arange(1, PAIRS + 1, dtype=np.int64) << 4 * (MOST_PAIRS - 1 - i)
        probability = (probability[:, None] * pair).reshape(-1)
        key = (key[:, None] + digits).reshape(-1)
        likely = probability >= least
        probability, key = probability[likely], key[likely]
        found.append((probability, key, np.full(len(key), i + 1)))
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))  # type: ignore[return-value]


# ---- the repair


@lru_cache(maxsize=2 * len(PROBABILITIES))
def tunstall(levels: int, bits: int, index: int) -> Table:
    """Tunstall's code for symbols of which 0 has probability PROBABILITIES[index] and the others are equally likely.

    The likeliest leaf is split until another split would give more than 2^bits leaves; of equals, the one that was
    made first. A leaf's codeword is its place among the leaves in the order in which they were made; a split makes its
    leaves in the order of symbols. `tree` maps (inner node, symbol) to an inner node, or to its own length + the
    codeword of a leaf; row 0 is the root.

    Args:
        levels: of the grid, 3 or 4.
        bits: of a codeword.
        index: of PROBABILITIES.
    """
    parent, inner = _split(levels, bits, PROBABILITIES[index])
    leaf = np.ones(len(parent), bool)
    leaf[inner] = False
    number = np.empty(len(parent), np.int64)  # an inner node's row, or a leaf's codeword after all rows
    number[inner] = np.arange(len(inner))
    number[leaf] = len(inner) + np.arange(leaf.sum())
    tree = number[1:].reshape(len(inner), levels).astype(np.int32)
    node = np.flatnonzero(leaf)
    sizes = _depths(parent)[node]
    start = np.concatenate([[0], np.cumsum(sizes)])
    symbols = np.zeros(start[-1], np.uint8)
    end = start[1:].copy()
    while len(node):  # from the leaves to the root, all at once
        end -= 1
        symbols[end] = (node - 1) % levels
        node = parent[node]
        node, end = node[node > 0], end[node > 0]
    return Table(start, symbols, tree)


def _split(levels: int, bits: int, zeros: float) -> tuple[np.ndarray, np.ndarray]:
    """The tree: parent of each node in the order made, int64 (nodes,), and the nodes that were split, in that order;
    the n-th of them has nodes 1 + levels * n and on as its children.
    """
    probability = [zeros] + [(1 - zeros) / (levels - 1)] * (levels - 1)
    heap = [(-1.0, 0)]
    parent, inner = [0], []
    for _ in range((2**bits - 1) // (levels - 1)):
        negative, node = heapq.heappop(heap)
        inner.append(node)
        for p in probability:
            heapq.heappush(heap, (negative * p, len(parent)))
            parent.append(node)
    return np.array(parent), np.array(inner)


def _depths(parent: np.ndarray) -> np.ndarray:
    """Symbols from the root to each node, int64 (nodes,)."""
    depth, node = np.zeros(len(parent), np.int64), np.arange(len(parent))
    while node.any():
        depth += node > 0
        node = parent[node]
    return depth


# ---- rows to codewords


def encode(symbols: np.ndarray, table: Table, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codewords of each row: the longest that fits, again and again (QMoE, section 4.2: rows are independent).

    The last codeword of a row may end within the dictionary's tree, where every node is a codeword; a leaf-only code
    ends with a leaf that goes on with zeros.

    Args:
        symbols: u8 (rows, columns); with `paired` columns are even.
        table: of `dictionary`, then paired, or of `tunstall`.

    Returns:
        codewords u16 (all,), row after row, and their places int64 (rows + 1,).
    """
    steps = (symbols[:, ::2] + 3 * symbols[:, 1::2]) if paired else symbols
    walk = _pairs if paired else _leaves
    out = np.zeros((len(steps), steps.shape[1]), np.uint16)
    count = np.zeros(len(steps), np.int64)

    def emit(rows: np.ndarray, codewords: np.ndarray) -> None:
        out[rows, count[rows]] = codewords
        count[rows] += 1

    walk(np.ascontiguousarray(steps.T), table.tree, emit)
    kept = np.arange(out.shape[1]) < count[:, None]
    return out[kept], np.concatenate([[0], np.cumsum(count)])


def _pairs(steps: np.ndarray, tree: np.ndarray, emit: Emit) -> None:
    root = len(tree) - 1
    node = np.full(steps.shape[1], root)
    for step in steps:
        following = tree[node, step]
        ended = np.flatnonzero(following == NONE)
        emit(ended, node[ended])
        following[ended] = tree[root, step[ended]]
        node = following
    emit(np.arange(len(node)), node)


def _leaves(steps: np.ndarray, tree: np.ndarray, emit: Emit) -> None:
    node = np.zeros(steps.shape[1], np.int64)

    def step(rows: np.ndarray, symbols: np.ndarray) -> None:
        following = tree[node[rows], symbols]
        ended = following >= len(tree)
        emit(rows[ended], following[ended] - len(tree))
        node[rows] = np.where(ended, 0, following)

    every = np.arange(len(node))
    for symbols in steps:
        step(every, symbols)
    while len(open_rows := np.flatnonzero(node)):
        step(open_rows, np.zeros(len(open_rows), np.uint8))
