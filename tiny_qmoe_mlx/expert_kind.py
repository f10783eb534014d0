"""What all experts of a layer have in common, and the check that a record must pass before any kernel sees it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tiny_qmoe_mlx import metal, native, native_qmoe, native_rans
from tiny_qmoe_mlx.codecs import affine, packed, qmoe, rotation, trellis
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.spec import LayerSpec, ModelSpec


@dataclass(frozen=True)
class ExpertKind:
    """What all experts of a layer have in common.

    matrices: (name, rows, columns) of gate, up, down, or fc1, fc2; length: L of the trellis; seed and layer: of the
    rotation's signs; activation: the module's own; called (up, gate), or (hidden) where there are two matrices;
    packing: of each matrix of the other codecs but qmoe, coding: of codec qmoe; neither has trellis or rotation. coded:
    whether a record on the disk is decoded into what is computed with (codecs/packed.py).
    """

    matrices: tuple[tuple[str, int, int], ...]
    bias: bool
    length: int
    seed: int
    layer: int
    activation: nn.Module
    packing: tuple[affine.Packing, ...] = ()
    coding: qmoe.Coding | None = None
    coded: bool = False

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(rows, columns) for _, rows, columns in self.matrices]

    @property
    def trellis(self) -> bool:
        """Whether records are of the trellis codec: rotated, and multiplied by the library's fused kernels."""
        return not self.packing and self.coding is None

    @cached_property
    def sign_in(self) -> np.ndarray:
        return rotation.signs(self.seed, self.layer, 0, self.matrices[0][2])

    @cached_property
    def sign_mid(self) -> np.ndarray:
        return rotation.signs(self.seed, self.layer, 1, self.matrices[-1][2])

    @cached_property
    def for_metal(self) -> metal.ExpertShapes:
        """The same for the Metal kernels."""
        parts = (tuple(self.shapes), self.bias, self.length, self.sign_in, self.sign_mid, self.activation, self.fused)
        return metal.ExpertShapes(*parts)

    @cached_property
    def fused(self) -> tuple[str, float, float] | None:
        """The activation's name in the C++ library with its alpha and limit, or None: then the module's own is
        called.
        """
        return fused_activation(self.activation, len(self.matrices))

    def activate(self, parts: list[np.ndarray]) -> np.ndarray:
        """The module's own activation of [gate, up] or [fc1's output]."""
        arrays = [mx.array(p) for p in reversed(parts)]
        return np.array(self.activation(*arrays))


def expert_kind(layer: LayerSpec, spec: ModelSpec, activation: nn.Module) -> ExpertKind:
    """What a layer's experts have in common, from the container's words and the module's activation."""
    own = layer.packing, layer.coding, layer.coded
    return ExpertKind(layer.matrices, layer.bias, spec.length, spec.seed, layer.layer, activation, *own)


def fused_activation(activation: nn.Module, matrices: int) -> tuple[str, float, float] | None:
    """(name, alpha, limit) of an activation that the C++ library fuses; matched by mlx-lm's classes, not by name."""
    from mlx_lm.models import activations, gpt_oss
    from mlx_lm.models.switch_layers import SwiGLU

    clamped = getattr(activations, "SwigluOAI", None) or getattr(gpt_oss, "SwiGLU", None)  # from mlx-lm 0.32; before
    if matrices == 3 and type(activation) is SwiGLU:
        return native.SILU, 0.0, 0.0
    if matrices == 3 and type(activation) is clamped:
        return native.SWIGLU_OAI, getattr(activation, "_alpha", 1.702), getattr(activation, "_limit", 7.0)
    return None


def expand(data: np.ndarray, kind: ExpertKind, where: str, table: np.ndarray | None) -> Iterator[affine.Matrix]:
    """The matrices of a coded record, one after the other; `table` is the model's of 4-tuples, if it has one.

    Raises:
        FormatError: naming `where` and what is wrong.
    """
    return packed.each(data, kind.shapes, kind.packing, where, table, native_rans.decode)


def check_record(data: np.ndarray, kind: ExpertKind, where: str, table: np.ndarray | None = None) -> None:
    """Refuse a record that a kernel must not see.

    Raises:
        FormatError: naming `where` and what is wrong.
    """
    if kind.coded:
        for matrix in expand(data, kind, where, table):
            packed.check_values(matrix, where)
        return
    if kind.packing:
        affine.parse(data, kind.shapes, kind.packing, where)
        return
    if kind.coding is not None:
        _check_qmoe(data, kind, kind.coding, where)
        return
    if native.available() and native.check_record(data, kind.shapes, kind.bias) and data[6] == kind.length:
        return
    trellis.parse(data, kind.shapes, kind.bias, where, kind.length)
    if native.available():
        raise FormatError(
            f"[{where}] the record is refused by the C++ library; run verify, then convert the model again."
        )


def _check_qmoe(data: np.ndarray, kind: ExpertKind, coding: qmoe.Coding, where: str) -> None:
    """Every codeword is followed, by the C++ library where it is there; numpy has the sentence."""
    if native_qmoe.available():
        matrices = qmoe.views(data, kind.shapes, kind.bias, coding, where)
        if all(native_qmoe.is_sound(m, coding) for m in matrices):
            return
    qmoe.parse(data, kind.shapes, kind.bias, coding, where)
    if native_qmoe.available():
        raise FormatError(
            f"[{where}] the record is refused by the C++ library; run verify, then convert the model again."
        )
