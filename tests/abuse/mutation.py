"""Damage to bytes, by chance and on purpose, and headers made right again where a check would only see the hash."""

import numpy as np
import xxhash

WORDS = (0, 1, 2, 127, 128, 255, 256, 1 << 15, (1 << 16) - 1, 1 << 20, 1 << 31, (1 << 32) - 1)


def mutate(rng: np.random.Generator, data: np.ndarray, start: int = 0, most: int = 4) -> np.ndarray:
    """A copy with up to `most` damages from byte `start` on: bits, bytes, wild words, a run copied elsewhere, noise."""
    data = data.copy()
    for _ in range(rng.integers(1, most + 1)):
        at, size = int(rng.integers(start, len(data))), int(rng.integers(1, 33))
        kind = rng.integers(5)
        if kind == 0:
            data[at] ^= 1 << rng.integers(8)
        elif kind == 1:
            data[at] = rng.integers(256)
        elif kind == 2:
            word = np.array([rng.choice(WORDS)], "<u4").view(np.uint8)[: len(data) - at]
            data[at : at + len(word)] = word
        elif kind == 3:
            origin = int(rng.integers(start, len(data)))
            run = data[origin : origin + size][: len(data) - at].copy()
            data[at : at + len(run)] = run
        else:
            data[at : at + size] = rng.integers(0, 256, len(data[at : at + size]), np.uint8)
    return data


def resize(rng: np.random.Generator, data: np.ndarray) -> np.ndarray:
    """A copy that ends early, often within the header, or goes on."""
    if rng.random() < 0.7:
        return data[: rng.integers(1 + min(len(data), 1 << int(rng.integers(20))))].copy()
    return np.append(data, rng.integers(0, 256, int(rng.integers(1, 300)), np.uint8))


def rehash(data: np.ndarray) -> None:
    """Make the hash of a record's header (docs/FORMAT.md, sections 4, 6 and 7) that of its bytes, in place."""
    if len(data) >= 64:
        data[56:64] = np.frombuffer(xxhash.xxh3_64_digest(data[:56].tobytes())[::-1], np.uint8)
