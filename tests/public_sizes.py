"""Public models whose sizes are known, and what memory `plan` asks for them: for the table of docs/models.md.

Nothing of a model is downloaded or allocated: mlx-lm builds it lazily from its config, and the plan reads a header with
nothing behind it. In public_models.json sizes are the model's own, other values need not be; the number of parameters
that its makers publish checks them (test_families.py).
"""

import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from tiny_qmoe_mlx import budget, footprint
from tiny_qmoe_mlx.container import Container
from tiny_qmoe_mlx.conversion import rest
from tiny_qmoe_mlx.conversion.layerwise import Experts
from tiny_qmoe_mlx.conversion.planning import plan_layers
from tiny_qmoe_mlx.conversion.settings import Settings
from tiny_qmoe_mlx.hub.client import Located
from tiny_qmoe_mlx.original import adapted, checkpoint
from tiny_qmoe_mlx.original.shipped import dequantize_rest

GIB = 1 << 30
MACS = (
    8,
    16,
    18,
    24,
    32,
    36,
    48,
    64,
    96,
    128,
    192,
    256,
    512,
)  # GiB of memory that Macs with Apple silicon are sold with
TOKENIZER_FILE_BYTES = 20_000_000  # as large as most are
# footprint's guesses for macOS, whatever machine this runs on
MAC = {"PROGRAM_BYTES": 120_000_000, "TOKENIZER": (1250, 14)}
NAMES = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32", mx.uint32: "U32", mx.int32: "I32"}


@dataclass(frozen=True)
class Public:
    """A public model: its name, its parameters in billions as its makers publish them, what its config says."""

    name: str
    billions: float
    config: dict


MODELS = tuple(Public(**words) for words in json.loads(Path(__file__).with_name("public_models.json").read_text()))


def parameters(model) -> int:
    """Weights of a model, experts included."""
    return sum(array.size for _, array in tree_flatten(model.parameters()))


def build(public: Public):
    """The model in bfloat16, lazily: nothing is computed."""
    kind, arguments = adapted.model_classes(public.config)
    model = kind(arguments.from_dict(public.config))
    model.set_dtype(mx.bfloat16)
    return model


def smallest_macs(public: Public) -> tuple[int, int]:
    """GiB of the smallest Mac whose automatic budget runs the model at 2 bits, and of the smallest that keeps all its
    experts in memory; 0 where none does.
    """
    with tempfile.TemporaryDirectory() as folder:
        container = headers(public, Settings(bits=2.0, calibration="none"), Path(folder))
        with patch.multiple(footprint, **MAC):
            found = budget.split(container, sys.maxsize, context(public), cpu=False)
    return _mac(found.min_budget_bytes), _mac(found.resident_budget_bytes)


def context(public: Public) -> int:
    """Tokens that are provided for: the default, or the model's limit."""
    return min(budget.DEFAULT_CONTEXT, footprint.longest_context(public.config))


def headers(public: Public, settings: Settings, directory: Path) -> Container:
    """The converted model without a weight: what it will hold, and a header of what is not experts."""
    model = build(public)
    layers = checkpoint.expert_layers(model)
    dequantize_rest(model)
    spec = plan_layers(layers, settings, Located(directory), public.name, None, lambda what, done, total: None)
    kept = rest.routers(model, layers)
    model.update_modules(tree_unflatten([(found.path, Experts()) for found in layers]))
    rest.quantize(model, "", model, settings.rest_bits, kept)
    quantization = {"quantization": {"group_size": rest.GROUP, "bits": settings.rest_bits}}
    config = {**public.config, **(quantization if settings.rest_bits < 16 else {})}
    write_header(directory / rest.TOP, rest.weights(model))
    with open(directory / "tokenizer.json", "wb") as file:
        file.truncate(TOKENIZER_FILE_BYTES)
    return Container(directory, config, spec, {rest.TOP: {}})


def words(model_type: str) -> str:
    """What the table says of a type."""
    return "; ".join(_words(public) for public in MODELS if public.config["model_type"] == model_type)


def _words(public: Public) -> str:
    least, whole = smallest_macs(public)
    return f"{public.name}: {least} GB" + (f" (all in memory: {whole} GB)" if whole else "")


def _mac(size: int) -> int:
    return next((mac for mac in MACS if mac * GIB * budget.AUTO_SHARE >= size), 0)


def write_header(path: Path, arrays: dict[str, mx.array]) -> None:
    """A safetensors file of these shapes and types with nothing behind its header."""
    header, end = {}, 0
    for name, array in arrays.items():
        size = math.prod(array.shape) * array.dtype.size
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
