"""The C library's allocator: large blocks go back to the system as soon as they are freed.

glibc gives blocks above a size a mapping of their own, and raises that size, up to 32 MB, with every one that is freed;
what is smaller lies in a heap that shrinks at its end alone. After a batch a process held 200 MB that neither MLX nor
Python knew of. With a fixed size they are gone when MLX's cache, which is limited, lets them go.
"""

import ctypes
import sys

M_MMAP_THRESHOLD = -3  # malloc.h
OWN_MAPPING_BYTES = 256 << 10


def return_large_blocks() -> None:
    """From now on; on Linux with glibc, elsewhere nothing is done."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, OWN_MAPPING_BYTES)
