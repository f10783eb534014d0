"""Files of kernels/, from the installed package or from a checkout."""

from functools import cache
from importlib import resources
from pathlib import Path


@cache
def read(name: str) -> str:
    """Text of kernels/<name>.

    Raises:
        FileNotFoundError: there is no such file.
    """
    folder = resources.files("tiny_qmoe_mlx") / "kernels"
    if not folder.is_dir():
        folder = Path(__file__).resolve().parents[1] / "kernels"
    return (folder / name).read_text(encoding="utf-8")
