"""rANS: bytes at their entropy, 32 interleaved streams a tile; the plain numpy coder is the specification.

Range asymmetric numeral systems (Duda, arXiv 1311.2540), interleaved over one stream of words (Giesen, arXiv
1402.3392). A tile is 65,536 symbols; lane l of 32 codes the symbols l, l + 32, l + 64 ... of it. All lanes take their
16-bit words from the tile's one stream, in the order in which a decoder needs them, so that a step of all lanes is one
of vectors.

A symbol is a byte: one 8-bit code, or two 4-bit ones. (Two 8-bit codes a symbol would need a table of 65,536.)
"""

from dataclasses import dataclass

import numpy as np

from tiny_qmoe_mlx.errors import FormatError

BITS = 14  # frequencies sum to 2^14
TOTAL, LOW = 1 << BITS, 1 << 16  # a state lies in 2^16 to 2^32 - 1
TILE, LANES = 1 << 16, 32
SPARE = 32 - BITS  # a state below frequency << SPARE has room for a symbol


@dataclass(frozen=True)
class Coded:
    """A coded sequence.

    frequencies: u32 (256,), of each symbol, summing to 16384. ends: u32 (tiles,), words up to the end of each tile.
    states: u32 (tiles, 32), of the lanes where decoding begins. words: u16 (ends[-1],).
    """

    frequencies: np.ndarray
    ends: np.ndarray
    states: np.ndarray
    words: np.ndarray

    def pack(self) -> np.ndarray:
        """The bytes of a payload: table, ends, states, words."""
        table = _pack_table(self.frequencies)
        parts = (self.ends.astype("<u4"), self.states.astype("<u4"), self.words.astype("<u2"))
        return np.concatenate([table, *(np.ascontiguousarray(p).reshape(-1).view(np.uint8) for p in parts)])


# ---- tables


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Whole frequencies, u32 (256,) with sum 16384, of symbols seen `counts` times: at least 1 where a count is not 0,
    and then whatever makes the coded bytes the fewest, a step at a time.
    """
    total = int(counts.sum())
    found = np.maximum(counts * TOTAL // total, counts > 0).astype(np.int64)
    weight = counts.astype(np.float64)
    while (off := int(found.sum()) - TOTAL) != 0:
        with np.errstate(divide="ignore", invalid="ignore"):
            if off > 0:
                cost = np.where(found > 1, weight * np.log2(found / (found - 1.0)), np.inf)
                found[np.argmin(cost)] -= 1
            else:
                gain = np.where(found > 0, weight * np.log2((found + 1.0) / found), -np.inf)
                found[np.argmax(gain)] += 1
    return found.astype(np.uint32)


def _pack_table(frequency: np.ndarray) -> np.ndarray:
    """First and last symbol that occurs, then each frequency in one byte (below 128) or two; padded to 4 bytes."""
    used = np.flatnonzero(frequency)
    out = [int(used[0]), int(used[-1])]
    for f in frequency[used[0] : used[-1] + 1].tolist():
        out += [f] if f < 128 else [128 | f & 127, f >> 7]
    return np.array(out + [0] * (-len(out) % 4), np.uint8)


def _parse_table(payload: np.ndarray, where: str) -> tuple[np.ndarray, int]:
    """Frequencies u32 (256,), and the bytes that they took.

    Raises:
        FormatError: they end early, or do not sum to 16384.
    """
    head = payload[: 2 + 2 * 256].tolist()
    found, at = np.zeros(256, np.uint32), 2
    if len(head) < 2 or head[0] > head[1]:
        raise FormatError(f"[{where}] a table of frequencies should begin with its first and last symbol; {AGAIN}.")
    for symbol in range(head[0], head[1] + 1):
        wide = at < len(head) and head[at] >= 128
        if at + wide >= len(head):
            raise FormatError(f"[{where}] a table of frequencies ends early, at symbol {symbol}; {AGAIN}.")
        found[symbol] = head[at] & 127 | head[at + 1] << 7 if wide else head[at]
        at += 1 + wide
    if int(found.sum()) != TOTAL:
        raise FormatError(f"[{where}] frequencies should sum to {TOTAL}, they sum to {int(found.sum())}; {AGAIN}.")
    return found, at + -at % 4


AGAIN = "run verify, then copy or convert the file again"


def parse(payload: np.ndarray, count: int, where: str) -> Coded:
    """A payload's parts as views of its bytes, u8 (n,), checked as far as can be without decoding.

    Args:
        payload: u8 (n,).
        count: symbols that it should hold, at least 1.
        where: for the error's text.

    Raises:
        FormatError: what is wrong.
    """
    table, at = _parse_table(payload, where)
    tiles = -(-count // TILE)
    states = at + 4 * tiles
    words = states + 4 * LANES * tiles
    if len(payload) < words:
        raise FormatError(f"[{where}] {tiles} tiles should take {words} bytes and words, received {len(payload)}.")
    ends = payload[at:states].view("<u4")
    if (ends[1:] < ends[:-1]).any() or words + 2 * int(ends[-1]) != len(payload):
        raise FormatError(
            f"[{where}] tiles should end one after the other and the last at word {(len(payload) - words) / 2:g}, "
            f"received ends of which the last is {int(ends[-1])}; {AGAIN}."
        )
    return Coded(table, ends, payload[states:words].view("<u4").reshape(-1, LANES), payload[words:].view("<u2"))


# ---- coding


def encode(symbols: np.ndarray) -> Coded:
    """Code a sequence, u8 (n,), n at least 1."""
    table = frequencies(np.bincount(symbols, minlength=256))
    whole = len(symbols) // TILE * TILE
    parts = [_encode_tiles(symbols[:whole].reshape(-1, TILE), table)] if whole else []
    parts += [_encode_tiles(symbols[None, whole:], table)] if whole < len(symbols) else []
    words = [w for _, tile in parts for w in tile]
    ends = np.cumsum([len(w) for w in words]).astype(np.uint32)
    return Coded(table, ends, np.concatenate([states for states, _ in parts]), np.concatenate(words))


def _encode_tiles(tiles: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Tiles of one length, u8 (t, n), from their ends backwards: states u32 (t, 32), and each tile's words."""
    count, length = tiles.shape
    steps = -(-length // LANES)
    first = np.cumsum(table, dtype=np.uint32) - table
    state = np.full((count, LANES), LOW, np.uint32)
    sent = np.zeros((count, steps, LANES), bool)
    words = np.zeros((count, steps, LANES), np.uint16)
    for step in range(steps - 1, -1, -1):
        symbol = tiles[:, step * LANES : (step + 1) * LANES]
        lanes = symbol.shape[1]
        x, f = state[:, :lanes], table[symbol]
        full = x >> SPARE >= f
        sent[:, step, :lanes], words[:, step, :lanes] = full, x & 0xFFFF
        x = np.where(full, x >> 16, x)
        state[:, :lanes] = (x // f << BITS) + x % f + first[symbol]
    return state, [w[s] for w, s in zip(words, sent, strict=True)]


def decode(coded: Coded, count: int, where: str) -> np.ndarray:
    """The sequence, u8 (count,).

    Raises:
        FormatError: a tile's words end early or late, or its lanes do not end where coding began.
    """
    out = np.empty(count, np.uint8)
    whole, begins = count // TILE, np.concatenate([[0], coded.ends[:-1]]).astype(np.int64)
    for tiles, mine in (
        (slice(0, whole), out[: whole * TILE].reshape(whole, TILE)),
        (slice(whole, None), out[None, whole * TILE :]),
    ):
        if mine.size:
            ends = coded.ends[tiles].astype(np.int64)
            _decode_tiles(coded, begins[tiles], ends, coded.states[tiles], mine, where)
    return out


def _decode_tiles(
    coded: Coded, at: np.ndarray, ends: np.ndarray, states: np.ndarray, out: np.ndarray, where: str
) -> None:
    """Fill `out`, u8 (tiles, n), from tiles whose words lie at `at` to `ends`, all tiles a step at a time."""
    table, x = coded.frequencies, states.astype(np.uint32)
    first = np.cumsum(table, dtype=np.uint32) - table
    symbol_of = np.repeat(np.arange(256, dtype=np.uint8), table)
    words = np.append(coded.words, np.uint16(0)).astype(np.uint32)
    _require((x >= LOW).all(), f"lanes should begin at {LOW} or more", where)
    for start in range(0, out.shape[1], LANES):
        lanes = min(LANES, out.shape[1] - start)
        slot = x[:, :lanes] & (TOTAL - 1)
        symbol = symbol_of[slot]
        out[:, start : start + lanes] = symbol
        y = table[symbol] * (x[:, :lanes] >> BITS) + slot - first[symbol]
        empty = y < LOW
        place = at[:, None] + np.cumsum(empty, 1) - empty
        _require((place[empty] < np.broadcast_to(ends[:, None], empty.shape)[empty]).all(), "words end early", where)
        x[:, :lanes] = np.where(empty, y << 16 | words[np.where(empty, place, 0)], y)
        at = at + empty.sum(1)
    _require((at == ends).all(), "words end late", where)
    _require((x == LOW).all(), "lanes do not end where coding began", where)


def _require(fine: bool | np.bool_, problem: str, where: str) -> None:
    if not fine:
        raise FormatError(f"[{where}] a tile of coded bytes is damaged: {problem}; {AGAIN}.")


def entropy(symbols: np.ndarray) -> float:
    """Order-0 entropy in bits a symbol: what no code of single symbols of this sequence can beat."""
    p = np.bincount(symbols, minlength=256) / len(symbols)
    return float(-(p[p > 0] * np.log2(p[p > 0])).sum())
