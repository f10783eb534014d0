"""A converted directory in mlx-lm's own tools: the classes that its model file (model_file.py) hands to mlx-lm.

mlx-lm builds the model, quantizes it and loads its weights, as it does with any other; experts are connected to the
pool when the weights have come. The budget is the environment's TINY_QMOE_MEMORY, the context that it provides for is
the default one.
"""

import os
from pathlib import Path
from typing import Any

import mlx.core as mx

from tiny_qmoe_mlx import budget as budgets
from tiny_qmoe_mlx import models
from tiny_qmoe_mlx.disk_errors import weights_of
from tiny_qmoe_mlx.errors import BudgetError
from tiny_qmoe_mlx.masked_spans import refuse

MEMORY = "TINY_QMOE_MEMORY"


def classes(directory: Path) -> tuple[type, type]:
    """(Model, ModelArgs) of a converted directory; its files and the budget are checked first.

    Raises:
        FormatError: the files are not a whole converted model.
        BudgetError: the budget cannot be read or is too small.
        ValueError: this machine's GPU computes experts wrongly, or it is an encoder-decoder, which mlx-lm has not.
    """
    cpu = mx.default_device() == mx.cpu
    try:
        container, budget = models.prepare(directory, os.environ.get(MEMORY) or "auto", budgets.DEFAULT_CONTEXT, cpu)
    except BudgetError as error:
        raise BudgetError(str(error).replace("[memory]", f"[{MEMORY}]", 1)) from None
    refuse(container.config, "a tool of mlx-lm")
    read: dict[str, mx.array] = {}
    base, arguments = models.model_classes(container.spec)(container.config)

    class Model(base):  # type: ignore[valid-type, misc]
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            nonlocal read
            read = super().sanitize(weights)
            return read

        def load_weights(self, weights: Any, strict: bool = True) -> "Model":
            super().load_weights(weights, strict=strict)
            if not hasattr(self, "tiny_qmoe"):  # later ones are adapters
                # mlx-lm holds what it read until this returns: emptied, so that no array is twice in memory
                for held in (weights, read):
                    held.clear()
                with weights_of(directory):
                    models.finish(self, cpu)
                models.attach(self, container, budget)
            return self

    return Model, arguments
