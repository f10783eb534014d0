"""The file by which mlx-lm's own tools open a converted directory, and what may stand in it.

mlx-lm runs the file that config.json calls `model_file`, if it is told to trust it. Ours never changes, this program
never runs it, and a directory that names another, or has another text in it, is refused.
"""

from pathlib import Path
from typing import Any

from tiny_qmoe_mlx.disk_errors import named
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.spec import AGAIN, CONFIG

NAME = "tiny_qmoe_model.py"
TEXT = b'''"""Opens this directory in mlx-lm's own tools; needs tiny-qmoe-mlx. TINY_QMOE_MEMORY is the memory budget."""

from pathlib import Path

from tiny_qmoe_mlx.mlx_lm_entry import classes

Model, ModelArgs = classes(Path(__file__).parent)
'''
NOT_RUN = {"model_file": None}  # mlx_lm.utils.load_model's `model_config`, where it is given classes of ours


def write(directory: Path) -> dict[str, str]:
    """Write the file; what config.json says of it."""
    (directory / NAME).write_bytes(TEXT)
    return {"model_file": NAME}


def check_named(config: dict[str, Any], files: dict[str, Any]) -> None:
    """config.json may name our file, if the manifest lists it, or none.

    Raises:
        FormatError: it names another, which would be code of somebody else's.
    """
    named = config.get("model_file")
    if named is not None and (named != NAME or NAME not in files):
        raise FormatError(
            f"[{CONFIG}] model_file should be {NAME}, listed by the manifest, or absent, received {str(named)[:80]!r}: "
            f"code that no conversion wrote; {AGAIN}."
        )


def refuse(config: dict[str, Any]) -> None:
    """config.json of an original may name no file of code: versions of mlx-lm differ in whether they run it unasked.

    Raises:
        FormatError: it names one.
    """
    named = config.get("model_file")
    if named is not None:
        raise FormatError(
            f"[{CONFIG}] model_file should be absent, received {str(named)[:80]!r}: code of the model's own is never "
            "run here; use a checkpoint of a type that mlx-lm has itself."
        )


def check_text(directory: Path, name: str, entry: object = None) -> None:
    """A file of a converted directory, if it has this name, should have our text.

    Raises:
        FormatError: it has another.
    """
    if name != NAME:
        return
    with named(directory / NAME), open(directory / NAME, "rb") as file:
        if file.read(len(TEXT) + 1) != TEXT:
            raise FormatError(f"[{NAME}] should be the file that convert writes and is not; {AGAIN}.")


def check(directory: Path, config: dict[str, Any], files: dict[str, Any]) -> None:
    """Both, for the files that a manifest lists.

    Raises:
        FormatError: as they say.
    """
    check_named(config, files)
    for name in files:
        check_text(directory, name)
