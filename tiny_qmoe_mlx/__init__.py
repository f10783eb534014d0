"""Mixture-of-experts models at 1 to 3 bits per expert weight, streamed from disk under a memory budget, on MLX."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from tiny_qmoe_mlx import blas

__version__ = "0.1.0"

_HOMES = {"load": "models", "generate": "generate", "stream_generate": "generate", "convert": "convert"}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import `load`, `generate`, `stream_generate` and `convert` (and with them MLX) when they are first asked for."""
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

blas.install()  # before MLX is imported, or it has no effect
