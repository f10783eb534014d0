"""The decoder of rANS that is used: kernels/cpu/rans.cpp where the C++ library was built, else codecs/rans.py."""

import numpy as np

from tiny_qmoe_mlx import native
from tiny_qmoe_mlx.codecs import rans
from tiny_qmoe_mlx.errors import FormatError


def decode(coded: rans.Coded, count: int, where: str) -> np.ndarray:
    """The sequence of `codecs.rans.decode`, u8 (count,).

    Args:
        coded: from `codecs.rans.parse`.
        count: symbols that it should hold.
        where: for the error's text.

    Raises:
        FormatError: the coded bytes are damaged.
    """
    if not native.available():
        return rans.decode(coded, count, where)
    found = by_library(coded.frequencies, coded.ends, coded.states, coded.words, count)
    if found is None:
        rans.decode(coded, count, where)  # which has the sentence
        raise FormatError(f"[{where}] coded bytes are refused by the C++ library; {rans.AGAIN}.")
    return found


def by_library(
    frequencies: np.ndarray, ends: np.ndarray, states: np.ndarray, words: np.ndarray, count: int
) -> np.ndarray | None:
    """The same by the C++ library, each tile by one thread; None where anything is damaged.

    Args: u32 (256,), u32 (tiles,), u32 (tiles, 32) and u16 (any,), as in `codecs.rans.Coded`; how many symbols.
    """
    library, array, pointer = native._need(), native._array, native._pointer
    frequencies = array("rans", "frequencies", frequencies, np.uint32, (256,))
    ends = array("rans", "ends", ends, np.uint32, (None,))
    states = array("rans", "states", states, np.uint32, (len(ends), rans.LANES))
    words, out = array("rans", "words", words, np.uint16, (None,)), np.empty(count, np.uint8)
    parts = pointer(frequencies), pointer(ends), pointer(states), len(ends), pointer(words), len(words)
    status = library.tq_rans_decode(*parts, count, pointer(out))
    if status == native._RECORD:
        return None
    native._check("rans", status)
    return out
