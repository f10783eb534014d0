"""Large blocks that are freed go back to the system, also between small ones that stay."""

import platform
import subprocess
import sys

import pytest

BODY = """
import sys
import numpy as np
from tiny_qmoe_mlx import allocator
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
if sys.argv[1] == "fixed":
    allocator.return_large_blocks()
del_me = np.ones(30 << 20, np.uint8)
del del_me  # after which glibc, left alone, keeps blocks of up to 30 MB in its heap
before = resident()
large, small = [], []
for _ in range(100):
    large.append(np.ones(1 << 20, np.uint8))
    small.append(np.ones(3 << 15, np.uint8))
large.clear()
print(resident() - before - sum(a.nbytes for a in small))
"""


def kept(how: str) -> int:
    """Bytes of freed blocks of a process that are still resident."""
    done = subprocess.run([sys.executable, "-c", BODY, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_blocks_are_given_back():
    assert kept("fixed") < 8 << 20
    assert kept("as it is") > 50 << 20  # what there would be to give back
