"""The model that the soak and the server's load run on: the server tests' own, made from nothing in a directory."""

import random
from pathlib import Path

import server_model

WORDS = "the river stone light walks under old quick bright over slow small green house tree wind rain of and".split()


def make(directory: Path) -> Path:
    """Write a text, a checkpoint, and convert it; the converted directory."""
    text = directory / "text.txt"
    text.write_text(" ".join(random.Random(0).choices(WORDS, k=2000)))
    return server_model.make(directory, text)


def prompts(count: int, seed: int = 0) -> list[str]:
    """Different prompts of 3 to 40 words, each with its number first, so that none is another's beginning."""
    draw = random.Random(seed)
    return [f"{i:03d} {' '.join(draw.choices(WORDS, k=draw.randint(3, 40)))}" for i in range(count)]
