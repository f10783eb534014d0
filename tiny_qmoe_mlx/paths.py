"""Paths as a person gives them: where pathlib raises a RuntimeError (a link in a circle, the home of nobody), these
leave the path as it is, and the system's own word for it follows."""

import os
from pathlib import Path

from tiny_qmoe_mlx.errors import FormatError, shown


def expanded(path: str | Path) -> Path:
    """With the home directory in the place of `~`, if there is one."""
    return Path(os.path.expanduser(path))


def real(path: str | Path) -> Path:
    """Absolute, its links followed; a link that leads in a circle stays one."""
    return Path(os.path.realpath(path))


def require_text(path: str | Path, where: str) -> None:
    """Refuse a name that is no text: neither MLX nor the tokenizers open such files, and no report can name them.

    Raises:
        FormatError: it is not UTF-8; `where` is what the name is for.
    """
    try:
        os.fspath(path).encode()
    except UnicodeError:
        name = shown(os.fspath(path), 300)
        raise FormatError(f"[{where}] {name} should have a name of UTF-8, it has other bytes; rename it.") from None
