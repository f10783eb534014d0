"""The quantizer with one of its ingredients left out, for the ablation rows of bench_quality.py.

Functions of the quantizer are replaced while a context lasts; the product has no switches for this.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import numpy as np

from tiny_qmoe_mlx.codecs import rotation
from tiny_qmoe_mlx.conversion import rates


@contextmanager
def replaced(**functions: Callable) -> Iterator[None]:
    """The quantizer's functions of those names replaced."""
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(patch(f"tiny_qmoe_mlx.conversion.quantize.{name}", function))
        yield


@contextmanager
def no_rotation() -> Iterator[None]:
    """Columns as they are, padded, in the quantizer and in reading its records."""

    def padded(x: np.ndarray, sign: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, 0), (0, len(sign) - x.shape[1])))

    with ExitStack() as stack:
        for module in ("conversion.quantize", "conversion.feedback", "codecs.rotation"):
            stack.enter_context(patch(f"tiny_qmoe_mlx.{module}.rotate", padded))
        for module in ("conversion.quantize", "codecs.rotation"):
            stack.enter_context(patch(f"tiny_qmoe_mlx.{module}.unrotate", lambda x, sign: x))
        yield


def no_order() -> AbstractContextManager:
    return replaced(block_order=lambda h: np.arange(len(h) // rotation.COLUMN_BLOCK))


def equal_rates() -> AbstractContextManager:
    """All blocks of an expert alike, as far as the bytes go."""
    fill = rates.water_fill

    def even(importance: list[np.ndarray], rows: list[int], budget: int, length: int) -> list[np.ndarray]:
        return fill([np.full(len(d), float(n)) for d, n in zip(importance, rows, strict=True)], rows, budget, length)

    return replaced(water_fill=even)


def no_refit() -> AbstractContextManager:
    return replaced(_refit_rows=lambda w, q, h: np.ones(len(w)))


# name: L, drift correction, layers' sizes by sensitivity, what else is changed
ABLATIONS: dict[str, tuple[int, bool, bool, Callable[[], AbstractContextManager]]] = {
    "all": (12, True, True, nullcontext),
    "no rotation": (12, True, True, no_rotation),
    "no block order": (12, True, True, no_order),
    "equal rates of blocks": (12, True, True, equal_rates),
    "equal sizes of layers": (12, True, False, nullcontext),
    "no drift correction": (12, False, True, nullcontext),
    "no row-gain refit": (12, True, True, no_refit),
    "L14": (14, True, True, nullcontext),
    "L16": (16, True, True, nullcontext),
}
