"""Mixture-of-experts models at 1 to 3 bits per expert weight, streamed from disk under a memory budget, on MLX.

    with load("qwen3-2bit", memory="6GB")[0] as model: ...    # or model.close()

Models loaded in one process share code, and no state of ours: each has its budget, pool, reader threads and counters.
Process-wide, and so common to all, are MLX's limits and allocator (`load` sets `mx.set_cache_limit`), the BLAS under
MLX's CPU backend (chosen by this import, before MLX's), the C++ library's threads, which calls use in turns, and the
peak memory in a model's `stats()`. A budget counts everything that a process holds beside one model: of two, each
counts the program once. A model may generate in any thread, and in several at once: each gets the tokens that it would
get alone. Its budget provides for one generation at a time. On a GPU the calls of a streamed model take turns. `close`
waits for calls under way, later ones are refused. A fork of a process that has loaded a model is refused (MLX's threads
are not in it): start processes by `spawn`. At the end of the process we wait for threads that have generated.
"""

import signal
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tiny_qmoe_mlx import blas

if TYPE_CHECKING:
    from tiny_qmoe_mlx.convert import convert
    from tiny_qmoe_mlx.generate import batch_generate, generate, stream_generate
    from tiny_qmoe_mlx.models import load
    from tiny_qmoe_mlx.plan import plan

__version__ = "0.1.0"

_HOMES = {
    "batch_generate": "generate",
    "convert": "convert",
    "generate": "generate",
    "load": "models",
    "plan": "plan",
    "stream_generate": "generate",
}
__all__ = ["__version__", "batch_generate", "convert", "generate", "load", "plan", "stream_generate"]


def __getattr__(name: str) -> Any:
    """Import the public functions (and with them MLX) when they are first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps `tiny_qmoe_mlx.generate` the function where the import system would put the module of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOMES.get(name) == name:
            value = getattr(value, name, value)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

# A command that is still loading (argv is so until it is found) ends by Ctrl-C at once, without Python's traceback.
_is_command = sys.argv[:1] == ["-m"] and any(word.startswith(f"{__name__}.") for word in sys.orig_argv)
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

blas.install()  # before MLX is imported, or it has no effect
