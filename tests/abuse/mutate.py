"""Mutations of files for the fuzzers: of bytes, of JSON as a tree, of the length before a safetensors header."""

import json
import random
from collections.abc import Callable
from typing import Any

NUMBERS = (
    0, 1, -1, 2, 7, 127, 128, 255, 256, 65535, 65536, 2**24 + 1, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63,
    2**64, -(2**31), -(2**63), 10**30, 10**400, 1e9, 1.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"),
    float("nan"),
)  # fmt: skip
TEXTS = (
    "", "\0", "..", ".", "/", "../../etc/passwd", "/etc/passwd", "a\nb", "\ud800", "\u202e", "x" * 5000, "é", "1e999",
    "config.json", "model.safetensors", "README.md", "U8", "F8_E8M0", "trellis", "{}", "%s%n", "{0.__class__}",
)  # fmt: skip
PIECES = (
    b"\0", b"\xff", b"\n", b"\r\n", b'"', b"\\", b"[", b"{", b"]", b"}", b",", b":", b"-", b"9" * 30, b"1e999", b"null",
    b"NaN", b"Infinity", b"true", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000,
)  # fmt: skip


def value(pick: random.Random) -> Any:
    """Something that stands where another kind of thing should."""
    kind = pick.randrange(8)
    if kind < 3:
        return pick.choice(NUMBERS)
    if kind == 3:
        return pick.choice(TEXTS)
    if kind == 4:
        return pick.choice((None, True, False, [], {}, [[]], [{}], {"": None}))
    if kind == 5:
        return [pick.choice(NUMBERS) for _ in range(pick.choice((1, 2, 3, 40)))]
    return pick.choice(NUMBERS) if kind == 6 else {pick.choice(TEXTS): pick.choice(NUMBERS)}


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value below a JSON value."""
    found, waiting = [], [tree]
    while waiting:
        part = waiting.pop()
        keys = list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        for key in keys:
            found.append((part, key))
            waiting.append(part[key])
    return found


def tree(root: Any, pick: random.Random) -> Any:
    """A JSON value, changed in place in one to three places."""
    for _ in range(pick.choice((1, 1, 1, 2, 3))):
        spots = places(root)
        if not spots:
            return value(pick)
        holder, key = pick.choice(spots)
        how = pick.randrange(6)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, list):
            holder.insert(pick.randrange(len(holder) + 1), holder[key] if pick.random() < 0.5 else value(pick))
        elif how == 1:
            holder[pick.choice((*TEXTS, *map(str, holder)))] = value(pick)
        elif how == 2 and type(holder[key]) is int:
            holder[key] += pick.choice((-1, 1, 8, -128, 2**31, 2**32, 2**63))
        elif how == 3:
            other = pick.choice(spots)
            holder[key] = json.loads(json.dumps(other[0].get(other[1]) if isinstance(other[0], dict) else value(pick)))
        else:
            holder[key] = value(pick)
    return root


def jsons(data: bytes, pick: random.Random) -> bytes:
    """A JSON text with its tree changed; its bytes where it is none."""
    try:
        root = json.loads(data)
        return json.dumps(tree(root, pick), ensure_ascii=pick.random() < 0.5).encode(errors="surrogatepass")
    except (ValueError, RecursionError, TypeError, KeyError, IndexError):
        return byte(data, pick)


def byte(data: bytes, pick: random.Random) -> bytes:
    """Bytes changed, left out, put in, or moved."""
    out = bytearray(data)
    for _ in range(pick.choice((1, 1, 2, 4, 8))):
        at = pick.randrange(len(out) + 1)
        how = pick.randrange(5)
        if how == 0 and at < len(out):
            out[at] ^= 1 << pick.randrange(8)
        elif how == 1 and at < len(out):
            out[at] = pick.randrange(256)
        elif how == 2:
            del out[at : at + pick.choice((1, 1, 4, 16, 1000))]
        elif how == 3:
            out[at:at] = pick.choice(PIECES)
        else:
            piece = out[at : at + pick.choice((1, 8, 64))]
            other = pick.randrange(len(out) + 1)
            out[other:other] = piece
    return bytes(out[: 1 << 20])


def lines(data: bytes, pick: random.Random) -> bytes:
    """A text of lines, each perhaps JSON, with one of them changed, doubled, left out or cut."""
    parts = data.split(b"\n")
    at = pick.randrange(len(parts))
    how = pick.randrange(5)
    if how == 0:
        parts[at] = jsons(parts[at], pick)
    elif how == 1:
        parts.insert(at, parts[at])
    elif how == 2:
        del parts[at]
    elif how == 3:
        words = parts[at].split(b" ")
        words[pick.randrange(len(words))] = str(pick.choice(NUMBERS)).encode()
        parts[at] = b" ".join(words)
    else:
        parts[at] = byte(parts[at], pick)
    return b"\n".join(parts)


def safetensors(data: bytes, pick: random.Random) -> bytes:
    """A safetensors file: its header's tree, its length, or its bytes changed."""
    how = pick.randrange(5)
    length = int.from_bytes(data[:8], "little")
    if how == 0 or length > len(data):
        return byte(data, pick)
    if how == 1:
        size = pick.choice((0, 1, 7, length - 1, length + 1, len(data) - 8, len(data), 2**31, 2**32, 2**63, 2**64 - 1))
        return (size % 2**64).to_bytes(8, "little") + data[8:]
    header = jsons(data[8 : 8 + length], pick)
    if how == 2 and len(header) <= length:
        header = header.ljust(length)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


Mutation = Callable[[bytes, random.Random], bytes]
