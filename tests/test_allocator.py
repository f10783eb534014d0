"""Large blocks that are freed go back to the system, also between small ones that stay; loads leave nothing behind."""

import platform
import subprocess
import sys

import pytest
import tiny_models

BODY = """
import sys
import numpy as np
from tiny_qmoe_mlx import allocator
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
if sys.argv[1] == "fixed":
    allocator.keep_little()
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


CRUMBS = """
from tiny_qmoe_mlx import allocator
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
crumbs = [bytes(600) for _ in range(200_000)]
crumbs = crumbs[::100]  # what stays lies between what goes
kept = resident() - before
allocator.give_back()
print(kept, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim")
def test_small_blocks_go_back_too():
    """A tokenizer was left with three times its own memory."""
    done = subprocess.run([sys.executable, "-c", CRUMBS], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 100e6 and left < 50e6


LOADS = """
import ctypes, gc, sys
import mlx.core as mx
from tiny_qmoe_mlx import allocator
from tiny_qmoe_mlx.original import checkpoint
if sys.argv[2] == "draws":
    allocator.forget_draws = lambda: None
def loads(count):
    for _ in range(count):
        checkpoint.load_lazy(checkpoint.Path(sys.argv[1]))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = loads(15)
print(loads(60) - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim")
def test_loads_leave_nothing_behind(tmp_path):
    source = tiny_models.make_checkpoint(tmp_path / "hf", "qwen3_moe")
    for how, right in (("", lambda grown: grown < 1 << 20), ("draws", lambda grown: grown > 2 << 20)):
        done = subprocess.run([sys.executable, "-c", LOADS, source, how], capture_output=True, text=True, check=True)
        assert right(int(done.stdout)), (how, done.stdout)
