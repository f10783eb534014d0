"""Commands in forked processes, which have most imports behind them: a run costs half of what a new process does.

This process is started with the shim loaded (disk.py) and imports what is slow and is no MLX, which does not survive a
fork. Each line of standard input is a run, as JSON: argv, cwd, the paths of stdin, stdout and stderr, and fault, the
four arguments of fault_configure. Its process id and, in the end, its exit status are printed.
"""

import ctypes
import importlib
import json
import os
import runpy
import sys
from typing import Any

SLOW = ("numpy", "safetensors.numpy", "tokenizers", "transformers.models.auto", "transformers.tokenization_utils_fast")


def run(argv: list[str], cwd: str, paths: list[str], fault: list[str]) -> None:
    """In the child: become the command."""
    flags = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, (path, flag) in enumerate(zip(paths, flags, strict=True)):
        os.dup2(os.open(path, flag, 0o644), number)
    sys.stdin = open(0, closefd=False)
    os.chdir(cwd)
    ctypes.CDLL(None).fault_configure(*(word.encode() for word in fault))
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = argv
        runpy.run_module(f"tiny_qmoe_mlx.{argv[0]}", run_name="__main__", alter_sys=True)


def asked() -> dict[str, Any] | None:
    """Fork for every line; what the child shall run, None in the parent at the end."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


if __name__ == "__main__":
    for name in SLOW:
        importlib.import_module(name)
    found = asked()
    if found is not None:
        run(**found)
