"""mlx-lm's classes with their routed experts where this program looks for them: in a SwitchGLU or SwitchMLP that holds
nothing else; and those of the one type that mlx-lm does not have (switch_transformers.py).

Two families have them otherwise. DBRX keeps a list of dense layers and calls them token by token; here they become one
SwitchGLU. Muse Spark hangs a norm on its SwitchGLU; here a `Holder` takes the module's place and has both below it.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models import dbrx
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from tiny_qmoe_mlx.masked_spans import is_encoder_decoder
from tiny_qmoe_mlx.original import switch_transformers

MATRIX_NAMES = {SwitchGLU: ("gate_proj", "up_proj", "down_proj"), SwitchMLP: ("fc1", "fc2")}
DBRX_NAMES = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}
Weights = dict[str, mx.array]


def model_classes(config: dict) -> tuple[type, type]:
    """(Model, ModelArgs) for a config, with experts as above; `sanitize` takes what mlx-lm's takes.

    Raises:
        ValueError: mlx-lm does not know the model_type.
    """
    from mlx_lm.utils import _get_classes

    if is_encoder_decoder(config):
        return switch_transformers.Model, switch_transformers.ModelArgs
    base, arguments = _get_classes(config)
    if issubclass(base, dbrx.Model):
        return Dbrx, arguments

    class Model(base):  # type: ignore[valid-type, misc]
        def __init__(self, args: object):
            super().__init__(args)
            self._held = _hold(self)

        def sanitize(self, weights: Weights) -> Weights:
            weights = super().sanitize(weights) if hasattr(base, "sanitize") else weights
            return {_renamed(name, self._held): array for name, array in weights.items()} if self._held else weights

    return Model, arguments


# ---- a SwitchGLU that holds more than its matrices


class Holder(nn.Module):
    """In the place of a SwitchGLU that has other modules hung on it: those, and the experts as `routed`."""

    def __init__(self, routed: nn.Module, others: dict[str, nn.Module]):
        super().__init__()
        self.routed = routed
        for name, module in others.items():
            self[name] = module

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        return self.routed(x, indices)


def _hold(model: nn.Module) -> tuple[str, ...]:
    """Put a Holder in the place of every SwitchGLU that has other modules hung on it; the matrices' old paths."""
    held, holders = [], []
    for path, module in list(model.named_modules()):
        kind = next((k for k in MATRIX_NAMES if isinstance(module, k)), None)
        others = {n: m for n, m in module.children().items() if kind and n not in (*MATRIX_NAMES[kind], "activation")}
        if kind and others:
            for name in others:
                del module[name]
            held += [f"{path}.{name}" for name in MATRIX_NAMES[kind]]
            holders.append((path, Holder(module, others)))
    model.update_modules(tree_unflatten(holders))
    return tuple(held)


def _renamed(name: str, held: tuple[str, ...]) -> str:
    """A tensor's name below a Holder."""
    old = next((path for path in held if name.startswith(f"{path}.")), None)
    if old is None:
        return name
    block, matrix = old.rsplit(".", 1)
    return f"{block}.routed.{matrix}{name.removeprefix(old)}"


# ---- DBRX


class DbrxBlock(nn.Module):
    """mlx-lm's block with the router's choice handed to all experts at once."""

    def __init__(self, args: dbrx.ModelArgs):
        super().__init__()
        self.num_experts_per_tok = args.ffn_config["moe_top_k"]
        self.router = dbrx.Router(args.d_model, args.ffn_config["moe_num_experts"])
        self.experts = SwitchGLU(args.d_model, args.ffn_config["ffn_hidden_size"], args.ffn_config["moe_num_experts"])

    def __call__(self, x: mx.array) -> mx.array:
        gates = mx.softmax(self.router(x).astype(mx.float32), axis=-1)
        kept = self.num_experts_per_tok
        indices = mx.stop_gradient(mx.argpartition(-gates, kth=kept - 1, axis=-1)[..., :kept])
        scores = mx.take_along_axis(gates, indices, axis=-1)
        scores = (scores / mx.linalg.norm(scores, ord=1, axis=-1, keepdims=True)).astype(x.dtype)
        return (self.experts(x, indices) * scores[..., None]).sum(axis=-2)


class Dbrx(dbrx.Model):
    """mlx-lm's DBRX with its experts in a SwitchGLU."""

    def __init__(self, args: dbrx.ModelArgs):
        super().__init__(args)
        for layer in self.layers:
            layer.ffn = DbrxBlock(args)

    def sanitize(self, weights: Weights) -> Weights:
        """The maker's tall matrices cut into experts, or mlx-lm's tensors per expert stacked."""
        count = self.args.ffn_config["moe_num_experts"]
        out = {}
        for name, array in weights.items():
            block, found, part = name.partition(".ffn.experts.")
            if not found or part.split(".")[0] in DBRX_NAMES.values():
                out[name] = array
            elif part.startswith("mlp."):
                experts = array.reshape(count, -1, array.shape[-1])
                matrix = DBRX_NAMES[part.removeprefix("mlp.")]
                out[f"{block}{found}{matrix}.weight"] = experts.swapaxes(1, 2) if part == "mlp.w2" else experts
            elif part.startswith("0."):
                _, own, kind = part.split(".")
                rows = [weights[f"{block}{found}{e}.{own}.{kind}"] for e in range(count)]
                out[f"{block}{found}{DBRX_NAMES[own]}.{kind}"] = mx.stack(rows)
        return out
