"""Writes docs/API.md from the docstrings of the public names: `python tests/api_reference.py`."""

import inspect
import re
from pathlib import Path

import tiny_qmoe_mlx
from tiny_qmoe_mlx import errors, models
from tiny_qmoe_mlx.runtime import Runtime

PAGE = Path(__file__).parents[1] / "docs/API.md"
HEAD = """# Python

Written from docstrings by `python tests/api_reference.py`. `import tiny_qmoe_mlx` is all that is public; nothing of it
prints unless it is asked to (verbose), and progress goes to a callback. Errors of files are `FormatError`, of memory
`BudgetError`: both are `ValueError`s with one sentence.
"""


def entry(name: str, what: object, owner: str = "") -> str:
    """One name: its signature and its docstring, as it stands."""
    signature = str(inspect.signature(what)).replace("self, ", "").replace("(self)", "()")  # type: ignore[arg-type]
    signature = re.sub(r"<function <lambda> at \w+>", "...", signature)
    signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature)  # annotations that are text
    signature = re.sub(r"\b[a-z_]+(\.[a-z_]+)*\.(?=[A-Z])", "", signature)  # where a type lives
    return f"## {owner}{name}\n\n```text\n{name}{signature}\n\n{inspect.getdoc(what)}\n```\n"


def page() -> str:
    """The whole page."""
    names = [n for n in tiny_qmoe_mlx.__all__ if not n.startswith("__")]
    parts = [HEAD, *(entry(n, getattr(tiny_qmoe_mlx, n)) for n in names)]
    parts.append(entry("Streaming", models.Streaming, "tiny_qmoe_mlx.models."))
    for kind in (errors.FormatError, errors.BudgetError):
        assert issubclass(kind, ValueError)
        parts.append(f"## tiny_qmoe_mlx.errors.{kind.__name__}\n\n```text\n{inspect.getdoc(kind)}\n```\n")
    methods = [Runtime.stats, Runtime.set_memory, Runtime.close]
    parts += [entry(m.__name__, m, "model.tiny_qmoe.") for m in methods]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
