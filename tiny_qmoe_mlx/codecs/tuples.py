"""Tiny-QMoE's static table of 4-tuples (arXiv 2509.22951): the coder as stated there, with its faults repaired.

The most frequent runs of four 8-bit codes, counted at every position of all matrices, get a 16-bit codeword each; all
else is an escape, 0xFFFF, and the four codes in 16 bits each. Repaired: the published table has 65,535 entries, whose
last codeword is the escape (here 65,534); and a sequence that grows is stored as it is (packed.py), which on real
weights is the rule: four codes take 16 bits at best, and 80 where they are not in the table.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tiny_qmoe_mlx.disk_reads import read_header, read_tensor
from tiny_qmoe_mlx.errors import FormatError

FILE, TENSOR = "model-tuples.safetensors", "tiny_qmoe.tuples"  # a converted model's table, u8 (entries, 4)
WIDTH = 4
ESCAPE = 0xFFFF
ENTRIES = ESCAPE - 1  # codewords 1 to 65,534: rank + 1, as published; 0 stands for nothing
BATCH = 1 << 27  # tuples that are sorted at once
MOST_COUNTED = 1 << 27  # distinct tuples: beyond, those seen once so far are forgotten


def keys(symbols: np.ndarray, step: int = 1) -> np.ndarray:
    """Runs of four symbols as numbers, u32, the first symbol the highest byte; one at every `step`-th position."""
    n = len(symbols) - WIDTH + 1
    parts = [symbols[i : max(i, n + i) : step].astype(np.uint32) << (8 * (WIDTH - 1 - i)) for i in range(WIDTH)]
    return parts[0] | parts[1] | parts[2] | parts[3]


def make_table(sequences: Iterable[np.ndarray]) -> np.ndarray:
    """The table of some sequences, u8 (at most 65534, 4): the most frequent first, equals by their bytes.

    Exact up to 2^27 distinct tuples.
    """
    known, counts = np.zeros(0, np.uint32), np.zeros(0, np.int64)
    waiting: list[np.ndarray] = []
    for symbols in sequences:
        waiting.append(keys(symbols))
        if sum(map(len, waiting)) >= BATCH:
            known, counts = _merged(known, counts, *np.unique(np.concatenate(waiting), return_counts=True))
            waiting.clear()
            if len(known) > MOST_COUNTED:
                known, counts = known[counts > 1], counts[counts > 1]
    if waiting:
        known, counts = _merged(known, counts, *np.unique(np.concatenate(waiting), return_counts=True))
    if len(known) > ENTRIES:  # without sorting a hundred million
        least = np.partition(counts, -ENTRIES)[-ENTRIES]
        more = np.flatnonzero(counts > least)
        chosen = np.concatenate([more, np.flatnonzero(counts == least)[: ENTRIES - len(more)]])
        known, counts = known[chosen], counts[chosen]
    return known[np.lexsort((known, -counts))].astype(">u4").view(np.uint8).reshape(-1, WIDTH)


def _merged(known: np.ndarray, counts: np.ndarray, more: np.ndarray, times: np.ndarray) -> tuple:
    """Two ascending lists of keys with their counts as one."""
    if not len(known):
        return more, times
    both = np.concatenate([known, more])
    order = np.argsort(both, kind="stable")
    both, added = both[order], np.concatenate([counts, times])[order]
    new = np.flatnonzero(np.concatenate([[True], both[1:] != both[:-1]])[: len(both)])
    return both[new], np.add.reduceat(added, new) if len(new) else added


def check_table(table: np.ndarray, where: str) -> None:
    """Refuse a table that no coder can have made.

    Raises:
        FormatError: what is wrong.
    """
    fine = table.dtype == np.uint8 and table.ndim == 2 and table.shape[1] == WIDTH and 1 <= len(table) <= ENTRIES
    if not fine or len(np.unique(keys(table.reshape(-1), WIDTH))) != len(table):
        raise FormatError(
            f"[{where}] should be 1 to {ENTRIES} distinct rows of {WIDTH} bytes, received {table.dtype} of "
            f"{table.shape}; copy or convert the model again."
        )


def read_table(directory: Path) -> np.ndarray:
    """The table of a converted model, u8 (entries, 4).

    Raises:
        FormatError: the file is damaged.
    """
    try:
        found = read_tensor(directory / FILE, read_header(directory / FILE)[0][TENSOR])
    except (FormatError, LookupError, OSError) as error:
        raise FormatError(f"[{FILE}] should hold {TENSOR}: {error}; copy or convert the model again.") from error
    check_table(found, FILE)
    return found


def encode(symbols: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Code a sequence, u8 (n,), with a table, u8 (entries, 4): u16 codewords, escapes and symbols."""
    whole = len(symbols) // WIDTH * WIDTH
    groups = symbols[:whole].reshape(-1, WIDTH)
    entries = keys(table.reshape(-1), WIDTH)
    order, wanted = np.argsort(entries), keys(symbols[:whole], WIDTH)
    place = order[np.minimum(np.searchsorted(entries, wanted, sorter=order), len(order) - 1)]
    hit = entries[place] == wanted
    size = np.where(hit, 1, 1 + WIDTH)
    at = np.cumsum(size) - size
    out = np.empty(int(size.sum()), np.uint16)
    out[at[hit]] = place[hit] + 1
    out[at[~hit]] = ESCAPE
    for i in range(WIDTH):
        out[at[~hit] + 1 + i] = groups[~hit, i]
    rest = [np.array([ESCAPE], np.uint16), symbols[whole:].astype(np.uint16)] if whole < len(symbols) else []
    return np.concatenate([out, *rest])


def decode(codes: np.ndarray, count: int, table: np.ndarray, where: str) -> np.ndarray:
    """The sequence, u8 (count,).

    Args:
        codes: u16 (n,).
        count: symbols that it should hold, at least 1.
        table: u8 (entries, 4).
        where: for the error's text.

    Raises:
        FormatError: an escape at the end, a codeword that the table does not have, or another number of symbols.
    """
    tail = count % WIDTH
    escapes = np.flatnonzero(codes == ESCAPE)
    raws = np.full(len(escapes), WIDTH)
    if tail and len(raws):
        raws[-1] = tail
    stop = escapes + 1 + raws
    if (stop > len(codes)).any() or (stop[:-1] > escapes[1:]).any():
        raise FormatError(f"[{where}] an escape should be followed by {WIDTH} codes, it has fewer; {AGAIN}.")
    unit = np.ones(len(codes), bool)  # codewords and escapes: all but what follows an escape
    for i in range(WIDTH):
        unit[escapes[raws > i] + 1 + i] = False
    units = np.flatnonzero(unit)
    ended = not tail or (len(escapes) and units[-1] == escapes[-1])
    if len(units) != -(-count // WIDTH) or not ended:
        raise FormatError(f"[{where}] should hold {count} codes, holds {len(units)} groups; {AGAIN}.")
    words = codes[units].astype(np.int64)
    named = words != ESCAPE
    if (words[named] > len(table)).any() or (words[named] == 0).any() or (codes[~unit] > 255).any():
        raise FormatError(f"[{where}] has a codeword out of the table's {len(table)} or a code above 255; {AGAIN}.")
    out = np.zeros((len(units), WIDTH), np.uint8)
    out[named] = table[words[named] - 1]
    following = np.minimum(units[~named, None] + 1 + np.arange(WIDTH), len(codes) - 1)
    out[~named] = codes[following].astype(np.uint8)
    return out.reshape(-1)[:count]


AGAIN = "run verify, then copy or convert the file again"
