"""The tokens that a conversion is calibrated on: from a text, from chats, or written by the model itself.

Owns what `--calibration` may name. Chats are rendered by the model's own chat template. With `self` the original model
samples its text, as in 2410.17170, but from openings in several registers and languages, so that few tokens suffice to
reach many experts.
"""

import json
import random
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiny_qmoe_mlx import paths, plain_files
from tiny_qmoe_mlx.errors import BudgetError, FormatError

BUILTIN_TEXT = Path(__file__).parents[1] / "data" / "calibration.txt"
BUILTIN, NONE, SELF = "builtin", "none", "self"
CHATS = ".jsonl"
MOST_TEXT = 1 << 28  # bytes of a file: more than any calibration or measurement takes
PIECE = 1 << 19  # characters that become tokens at once
TEMPERATURE, TOP_P = 1.0, 0.95  # of the model that writes for itself
Progress = Callable[[str, int, int], None]

BEGUN = (  # text that the model goes on with
    "The town lies on the northern bank of the river, and",
    "It was late in the evening when she finally",
    "In this paper we show that",
    "Breaking news: officials said on Tuesday that",
    "Dear Sir or Madam,\n\nI am writing to",
    "Chapter 1\n\n",
    "The patient, a 54-year-old man, presented with",
    "Theorem 1. Let",
    "Step 1: Preheat the oven",
    "def ",
    "import numpy as np\n\n",
    "#include <stdio.h>\n\nint main(",
    "function render(items) {\n",
    "SELECT ",
    "<!DOCTYPE html>\n<html>\n",
    '{"id": 1, "name": "',
    '[{"type": "function", "function": {"name": "',
    "$ git ",
    "| Name | Year | Value |\n| --- | --- | --- |\n",
    "1. ",
    "- ",
    "La ville se trouve",
    "Die Geschichte der",
    "El presidente anunció",
    "В начале XX века",
    "这座城市位于",
    "日本の歴史において、",
    "من أهم",
    "भारत में",
)
ASKED = (  # messages that it answers
    "Explain how a refrigerator works.",
    "Write a short story about a lighthouse keeper.",
    "Write a Python function that merges two sorted lists, and explain it.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take? Think step by step.",
    "Return a JSON object that describes a book, with title, author, year and a list of topics.",
    "Summarize the causes of the French Revolution in five points.",
    "Translate into French, German and Spanish: Where is the nearest station?",
    "What are the pros and cons of working from home?",
    "Find the bug: for i in range(1, len(a)): total += a[i]",
    "Solve 3x + 7 = 25 and show each step.",
    "Write an SQL query for the ten customers with the highest sales in 2023.",
    "Draft a polite e-mail that declines an invitation.",
    "Compare TCP with UDP in a table.",
    "What should I see in Kyoto in two days?",
    "¿Cómo funciona una central nuclear?",
    "请用中文解释什么是机器学习。",
    "Erkläre mir den Unterschied zwischen Wetter und Klima.",
    "Give me a bash script that renames all .jpeg files to .jpg.",
)


def calibration_tokens(
    source: str,
    tokenizer: Any,
    original: Path,
    sequences: int,
    length: int,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> np.ndarray | None:
    """Tokens to calibrate on.

    Args:
        source: "builtin", "none", "self", or the path of a UTF-8 text or of a .jsonl file of chats.
        tokenizer: the model's.
        original: directory of the original checkpoint; read for `self` only.
        sequences: how many; a text that is too short for all gives fewer.
        length: tokens of each.
        seed: of the sampling of `self`.
        progress: called with (what, done, total).

    Returns:
        int32 (sequences, length), or None for "none".

    Raises:
        FormatError: a file that is no text or no chats, is too short, or does not fit the tokenizer.
        BudgetError: `self`, and the original does not fit the memory.
    """
    if source == NONE:
        return None
    if source == SELF:
        return self_written(original, tokenizer, sequences, length, seed, progress)
    path = BUILTIN_TEXT if source == BUILTIN else Path(source)
    ids = chat_tokens(path, tokenizer) if path.suffix == CHATS else text_tokens(tokenizer, read_text(path))
    return token_batch(ids, sequences, length, str(path), beginning(tokenizer))


def beginning(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text: Gemma's and Llama's first token, of many others nothing.

    A model that has always seen it computes something else without it: Gemma-3-270m has three times the perplexity.
    """
    first = getattr(tokenizer, "bos_token_id", None)
    return [first] if first is not None and list(tokenizer.encode("a"))[:1] == [first] else []


def text_tokens(tokenizer: Any, text: str, most: int = sys.maxsize) -> "array[int]":
    """Tokens of a text, at least the first `most`, without special ones; a long text in pieces, as tokenizers take
    hundreds of bytes for each character. A piece ends before a line or a word of its second half, if it can.
    """
    ids, start = array("i"), 0
    while start < len(text) and len(ids) < most:
        end = start + PIECE
        if end < len(text):
            half = start + PIECE // 2
            found = max(text.rfind("\n", half, end), text.rfind(" ", max(half, end - 1000), end))
            end = found if found > 0 else end
        # longer than the context, on purpose
        ids.extend(tokenizer.encode(text[start:end], add_special_tokens=False, verbose=False))
        start = end
    return ids


# ---- files


def read_text(path: Path, where: str = "calibration") -> str:
    """The text of a calibration file, or of another one that `where` names in errors.

    Raises:
        FormatError: missing, empty, too long, or not UTF-8 text; or its name is none.
    """
    paths.require_text(path.name, where)
    if not path.is_file():
        raise FormatError(f"[{where}] {path} should be a text file; there is no such file.")
    raw = plain_files.read(path, MOST_TEXT)
    if not raw.strip():
        raise FormatError(f"[{where}] {path} should hold text, it is empty.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"[{where}] {path} should be UTF-8 text, byte {error.start} is not; is it a binary file?"
        ) from error
    if "\0" in text:
        raise FormatError(f"[{where}] {path} should be text, byte {text.index(chr(0))} is NUL; is it a binary file?")
    return text


def token_batch(
    ids: Sequence[int], sequences: int, length: int, where: str, begin: list[int] | None = None
) -> np.ndarray:
    """Equal stretches of a text, spread evenly over it: int32 (at most `sequences`, length); `begin` before each, where
    there is room for more than it.

    Raises:
        FormatError: the text is shorter than one sequence.
    """
    count = min(sequences, len(ids) // length)
    if count < 1:
        raise FormatError(
            f"[calibration] {where} should have at least {length} tokens, it has {len(ids)}; give a longer text."
        )
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    begin = begin if begin and length > len(begin) else []
    return np.stack([np.asarray([*begin, *ids[s : s + length]][:length], np.int32) for s in starts])


def chat_tokens(path: Path, tokenizer: Any) -> list[int]:
    """Token ids of a file with one JSON object a line, one after the other.

    A line is {"messages": [...]} (and perhaps "tools"), {"prompt": text, "completion": text}, or {"text": text}; the
    first two go through the chat template.

    Raises:
        FormatError: with the number of the first line that does not serve.
    """
    ids: list[int] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            ids += _line_tokens(line, tokenizer, f"[calibration] {path}, line {number},")
    return ids


def _line_tokens(line: str, tokenizer: Any, where: str) -> list[int]:
    try:
        chat = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} should be JSON, it is not: {error}.") from error
    if type(chat) is not dict or not chat.keys() & {"messages", "prompt", "text"}:
        raise FormatError(
            f'{where} should be an object with "messages", with "prompt" and "completion", or with "text"; received '
            f"{line.strip()[:60]!r}."
        )
    if "messages" not in chat and "prompt" not in chat:
        return text_tokens(tokenizer, _text(chat, "text", where)).tolist()
    messages = chat["messages"] if "messages" in chat else _pair(chat, where)
    if type(messages) is not list or not messages or not all(type(m) is dict for m in messages):
        raise FormatError(f'{where} "messages" should be a list of objects with role and content.')
    return _render(messages, chat.get("tools"), tokenizer, where)


def _text(chat: dict[str, Any], key: str, where: str) -> str:
    if type(chat.get(key)) is not str:
        raise FormatError(f'{where} "{key}" should be a text, received {str(chat.get(key))[:60]!r}.')
    try:
        chat[key].encode()
    except UnicodeError:  # JSON can hold halves of surrogate pairs, which no tokenizer takes
        raise FormatError(f'{where} "{key}" should be Unicode, it holds half of a surrogate pair.') from None
    return chat[key]


def _pair(chat: dict[str, Any], where: str) -> list[dict[str, str]]:
    words = (("user", _text(chat, "prompt", where)), ("assistant", _text(chat, "completion", where)))
    return [{"role": role, "content": content} for role, content in words]


def _render(messages: list[dict], tools: Any, tokenizer: Any, where: str) -> list[int]:
    if not tokenizer.has_chat_template:
        raise FormatError(
            f'{where} holds a chat, and the model\'s tokenizer has no chat template; give a text, or lines with "text".'
        )
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        text.encode()
    except Exception as error:  # a template is a program of the checkpoint, and fails as programs do
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise FormatError(f"{where} does not go through the model's chat template: {reason}") from error
    return text_tokens(tokenizer, text).tolist()


# ---- self


def self_written(
    original: Path,
    tokenizer: Any,
    sequences: int,
    length: int,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> np.ndarray:
    """Text that the original writes, int32 (sequences, length): the same for the same seed on the same machine.

    All sequences are written at once, so that each step reads the weights once. They begin with openings in random
    order; one that comes to its end is followed by the next opening.

    Raises:
        BudgetError: the original does not fit the memory.
    """
    import mlx.core as mx

    from tiny_qmoe_mlx.conversion import writer

    model, config = writer.open_original(original)
    needed, given = writer.memory_bytes(model, config, sequences * length), writer.available_bytes()
    if needed > given:
        raise BudgetError(too_large(needed, given))
    written = write_text(model, tokenizer, sequences, length, seed, progress)
    del model
    mx.clear_cache()
    return written


def write_text(
    model: Any, tokenizer: Any, sequences: int, length: int, seed: int, progress: Progress, what: str = "calibration"
) -> np.ndarray:
    """What `self_written` gives, by a model that is open already; `what` is named in the progress."""
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    from tiny_qmoe_mlx import blas
    from tiny_qmoe_mlx.conversion import writer

    pool = openings(tokenizer, random.Random(seed))
    mx.random.seed(seed)
    with blas.shared_machine():
        rows = writer.write(
            model,
            [next(pool) for _ in range(sequences)],
            [length] * sequences,
            make_sampler(TEMPERATURE, top_p=TOP_P),
            tokenizer.eos_token_ids,
            lambda row: next(pool),
            lambda done, total: progress(f"writing {what} text", done, total),
        )
    return np.asarray(rows, np.int32)


def too_large(needed: int, given: int) -> str:
    """Why a model cannot write its own text."""
    from tiny_qmoe_mlx.budget import show

    return (
        f"[calibration] self needs the whole original in memory, {show(needed)} with the text that it writes, and this "
        f"machine can give {show(given)}; use --calibration builtin, or a text FILE."
    )


def can_write(original: Path, sequences: int, length: int) -> bool:
    """Whether the original fits the memory of this machine, so that `self` works; nothing but headers is read."""
    from tiny_qmoe_mlx.conversion import writer

    model, config = writer.open_original(original)
    return writer.memory_bytes(model, config, sequences * length) <= writer.available_bytes()


def openings(tokenizer: Any, rng: random.Random) -> Iterator[list[int]]:
    """Token ids of openings without end, each round of all of them in another order.

    Where the tokenizer has no chat template, what is asked is written as question and answer.
    """
    parts = [list(tokenizer.encode(text)) for text in BEGUN]
    for text in ASKED:
        if tokenizer.has_chat_template:
            parts.append(_question(tokenizer, text))
        else:
            parts.append(list(tokenizer.encode(f"Question: {text}\nAnswer:")))
    parts = [part for part in parts if part]
    while True:
        rng.shuffle(parts)
        yield from parts


def _question(tokenizer: Any, text: str) -> list[int]:
    """The chat with one question, as its template renders it; plain where the template fails on it."""
    try:
        messages = [{"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True))
    except Exception:  # a template is a program of the checkpoint
        return list(tokenizer.encode(text))
