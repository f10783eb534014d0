"""Records `generate` and a short `chat` at a terminal as text: what was typed, and what the terminal showed in the end.

python examples/record_terminal.py docs/terminal.txt --model demo --memory 360MB --context 512
"""

import argparse
import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

ROWS, COLUMNS = 40, 110
PROMPT = "> "  # of `chat`
LINES = ("What do trees give us?", "Name one animal that lives in them.", "/stats", "/save chat.json", "/exit")
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours, cursor moves, and what readline asks of a terminal


def main(argv: list[str]) -> None:
    """Write the record."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("file", metavar="FILE", help="the text to write")
    p.add_argument("--model", default="demo", metavar="DIR|HUB_ID|demo")
    p.add_argument("--memory", metavar="6GB|60%|auto", help="budget of both")
    p.add_argument("--context", metavar="N", help="of both")
    p.add_argument("--max-tokens", metavar="N", help="of each answer")
    args = p.parse_args(argv)
    given = {"--memory": args.memory, "--context": args.context, "--max-tokens": args.max_tokens}
    same = [word for name, value in given.items() if value for word in (name, value)]
    options = ["--model", args.model, *same]
    question = ["--prompt", "Why are trees important?"]
    with tempfile.TemporaryDirectory() as folder:
        text = record(["generate", *options, *question], (), folder) + "\n" + record(["chat", *options], LINES, folder)
    Path(args.file).write_text(text, encoding="utf-8")


def record(words: list[str], lines: tuple[str, ...], folder: str) -> str:
    """What a terminal shows of `python -m tiny_qmoe_mlx.<words>`, whose every prompt is answered with the next line.

    Raises:
        RuntimeError: it failed, or left before the last line.
    """
    outside, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    command = [sys.executable, "-m", f"tiny_qmoe_mlx.{words[0]}", *words[1:]]
    streams = {"stdin": inside, "stdout": inside, "stderr": inside}
    environment = {**os.environ, "TERM": "dumb", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)
    os.close(inside)
    seen, waiting = b"", list(lines)
    while piece := _read(outside):
        seen += piece
        if waiting and seen.endswith(f"\n{PROMPT}".encode()):
            os.write(outside, f"{waiting.pop(0)}\n".encode())
    os.close(outside)
    if child.wait() or waiting:
        raise RuntimeError(f"{shlex.join(words)} ended with {child.returncode}: {seen.decode(errors='replace')}")
    return f"$ python -m tiny_qmoe_mlx.{shlex.join(words)}\n{shown(seen.decode())}"


def _read(terminal: int) -> bytes:
    """More of what was printed; nothing once the command has gone."""
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux's way to say so
        return b""


def shown(text: str) -> str:
    """What lines look like in the end: a bar is written over and over from its line's beginning."""
    lines = CODES.sub("", text).replace("\r\n", "\n").split("\n")
    last = [next((part for part in reversed(line.split("\r")) if part.strip()), "").rstrip() for line in lines]
    return "\n".join(last).rstrip("\n") + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
