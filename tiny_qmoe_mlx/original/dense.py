"""A dense model as a mixture of one expert that is always picked: so its feed-forward layers are experts like any
others, coded by the trellis and streamed layer by layer.
"""

import re
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwiGLU, SwitchGLU, SwitchLinear, SwitchMLP

from tiny_qmoe_mlx.errors import FormatError

NAMES = ("gate_proj", "up_proj", "down_proj")
EXPERTS = "switch_mlp"  # where the expert lies in the block, as in mlx-lm's mixtures


class GeGLU(nn.Module):
    """Gemma's activation, called as SwitchGLU calls its own."""

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        return nn.gelu_approx(gate) * x


class OneExpert(nn.Module):
    """A block with one expert and no router."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.switch_mlp = experts

    def __call__(self, x: mx.array) -> mx.array:
        return self.switch_mlp(x, mx.zeros((*x.shape[:-1], 1), mx.uint32))[..., 0, :]


class Only(SwitchGLU):
    """The one expert; its arrays are its own, where those of a mixture's experts are read from the files."""


def is_mixture(model: nn.Module) -> bool:
    """Whether a model has routed experts, of a kind that is known or not."""
    known = any(isinstance(module, SwitchGLU | SwitchMLP) for module in model.modules())
    return known or other_experts(model) is not None


def other_experts(model: nn.Module) -> str | None:
    """Where routed experts lie in a model that has neither SwitchGLU nor SwitchMLP; None where there are none."""
    for path, module in model.named_modules():
        if isinstance(module, SwitchLinear | QuantizedSwitchLinear) or re.search(r"\.experts(\.\d+)?$", str(path)):
            return str(path)
    return None


def as_mixture(model: nn.Module) -> None:
    """Replace every feed-forward of gate, up and down by a block of one expert, in place and lazily.

    Raises:
        FormatError: there is none, or one with another activation.
    """
    found = [(path, m) for path, m in model.named_modules() if all(type(m.get(n)) is nn.Linear for n in NAMES)]
    if not found:
        raise FormatError(
            "[model] the model should have routed experts (mlx-lm's SwitchGLU or SwitchMLP), or feed-forward layers of "
            "gate_proj, up_proj and down_proj; neither was found."
        )
    for path, module in found:
        *parents, name = str(path).split(".")
        _child(model, parents)[name] = OneExpert(_expert(str(path), module))


def _child(module: nn.Module, path: list[str]) -> nn.Module:
    for name in path:
        module = module[int(name)] if isinstance(module, list) else module[name]
    return module


def _expert(path: str, module: nn.Module) -> SwitchGLU:
    rows, columns = module.gate_proj.weight.shape
    biased = "bias" in module.gate_proj
    expert = Only(columns, rows, 1, _activation(path, module), biased)
    for name in NAMES:
        for key in ("weight", "bias")[: 1 + biased]:
            expert[name][key] = module[name][key][None]
    return expert


def _activation(path: str, module: nn.Module) -> nn.Module:
    """What the block's own code does between gate, up and down, found by running it with those replaced."""
    gate, up = mx.array([-2.0, -0.5, 0.7, 3.0]), mx.array([1.0, 2.0, -3.0, 0.5])
    parts = SimpleNamespace(gate_proj=lambda x: gate, up_proj=lambda x: up, down_proj=lambda hidden: hidden)
    try:
        got = type(module).__call__(parts, gate)
    except Exception:  # code that needs more of its module than these three
        got = None
    for activation in (SwiGLU(), GeGLU()):
        if got is not None and mx.allclose(got, activation(up, gate), rtol=1e-6, atol=1e-7).item():
            return activation
    raise FormatError(
        f"[{path}] should compute down(silu(gate) * up), or with gelu, and does not; this kind of dense model is not "
        "supported, --codec lossless takes it."
    )
