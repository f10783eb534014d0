"""How the page takes an answer apart, in JavaScript without a browser."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tiny_qmoe_mlx.serving import paths

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="needs node")
LONG = {
    "letters": "```" + "a" * 30_000 + "`",
    "tildes": "~" * 30_000 + "`",
    "spaces": "~~~" + " " * 30_000 + "`",
    "words": "~~~" + "a " * 15_000 + "`",
}


def blocks(text: str) -> list[dict]:
    """What text.js makes of an answer."""
    script = Path(paths.PAGE / "text.js").read_text() + f"\nconsole.log(JSON.stringify(blocks({json.dumps(text)})));"
    return json.loads(subprocess.run([NODE, "-e", script], check=True, capture_output=True, timeout=60).stdout)


@pytest.mark.parametrize("what", LONG)
def test_a_long_line_does_not_stop_the_page(what):
    """A model that goes round in circles may write any: some took hours to be no fence."""
    assert blocks(LONG[what]) == [{"code": None, "text": LONG[what]}]


def test_fences():
    text = "so:\n```python title\na = 1\n~~~\n```\nand\n  ~~~~\nb\n~~~\n~~~~\nend"
    assert blocks(text) == [
        {"code": None, "text": "so:"},
        {"code": "python", "text": "a = 1\n~~~"},
        {"code": None, "text": "and"},
        {"code": "", "text": "b\n~~~"},
        {"code": None, "text": "end"},
    ]
