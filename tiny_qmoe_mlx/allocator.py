"""Memory that the libraries below would keep.

glibc's allocator gives blocks above a size a mapping of their own, and raises that size, up to 32 MB, with every one
that is freed; what is smaller lies in a heap that shrinks at its end alone. After a batch a process held 200 MB that
neither MLX nor Python knew of. With a fixed size they are gone when MLX's cache, which is limited, lets them go.

It also gives threads heaps of their own, eight for a core, each with holes of its own: a server under load grew by
10 MB in ten minutes, of which nothing was in use; with two it soon stays as it is (benchmarks/LOG.md).
"""

import ctypes
import sys

import mlx.core as mx

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # malloc.h
OWN_MAPPING_BYTES, HEAPS = 64 << 10, 2


def keep_little() -> None:
    """Large blocks go back once they are free, and threads share two heaps, from now on; on Linux with glibc, elsewhere
    nothing is done."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, OWN_MAPPING_BYTES)
        mallopt(M_ARENA_MAX, HEAPS)


def give_back() -> None:
    """What is free goes back to the system: on Linux with glibc, and on macOS (never run there).

    Most of what making a tokenizer takes is free afterwards, between blocks that stay: Gemma's (262,144 tokens) held
    449 MB, of which 122 were its own (benchmarks/LOG.md).
    """
    library = ctypes.CDLL(None)
    if trim := getattr(library, "malloc_trim", None):
        trim(ctypes.c_size_t(0))
    elif relieve := getattr(library, "malloc_zone_pressure_relief", None):
        relieve.restype = ctypes.c_size_t
        relieve(None, ctypes.c_size_t(0))


def forget_draws() -> None:
    """Compute MLX's random state, which stays the same: until then it holds every draw that has been made from it.

    A new model draws the weights that it begins with, and loading puts others in their place before any is computed;
    the chain of those draws grew by 90 KB with every load of a tiny model.
    """
    mx.eval(mx.random.state)
