"""A trace of routing: which experts each token asked for, layer by layer and call by call, as a text file.

The first line is JSON: `{"tiny_qmoe_trace": 1, "model": identity, "experts": [per MoE layer], "record_bytes": [...]}`.
Every other line is one token in one layer, `call layer phase e1,e2,...`: `call` counts that layer's calls from 0,
`phase` is d (decode) or p (prefill). What a call demands is the union of its lines. A trace that was cut off in
mid-line is read up to its last whole line.
"""

import errno
import json
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from tiny_qmoe_mlx.codecs.trellis import UNIT
from tiny_qmoe_mlx.disk_errors import named
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.spec import MAX_EXPERTS, MAX_LAYERS, MAX_RECORD

VERSION = 1
KEY = "tiny_qmoe_trace"
MAX_HEADER = 1 << 24
MAX_LINE = 1 << 16
MAX_CHOSEN = 1024  # experts of one token
MAX_DECISIONS = 1 << 28  # lines
BUFFER = 1 << 20
_AGAIN = "record it again with generate --trace"


def header(model: dict[str, Any], experts: list[int], record_bytes: list[int]) -> dict[str, Any]:
    """The first line of a trace.

    Args:
        model: the identity of the model, as `streaming.profile.identity` gives it.
        experts, record_bytes: of each MoE layer.
    """
    return {KEY: VERSION, "model": model, "experts": list(experts), "record_bytes": list(record_bytes)}


# ---- write


_writers: "weakref.WeakSet[TraceWriter]" = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a fork: what is in the buffers is the parent's to write, and a fork that ends would write it once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for writer in list(_writers):
        if writer._file is not None and not writer._file.closed:
            os.dup2(nowhere, writer._file.fileno())
    os.close(nowhere)


os.register_at_fork(after_in_child=_leave_to_parent)


class TraceWriter:
    """Appends routing decisions to a file. Not safe from several threads at once."""

    def __init__(self, path: str | Path, header: dict[str, Any]):
        """Begin a trace, over any file of that name.

        Raises:
            OSError: it cannot be written.
        """
        self.path = Path(path)
        self._calls = [0] * len(header["experts"])
        self._names = [str(e) for e in range(max(header["experts"], default=0))]
        self._file: IO[str] | None = open(path, "w", buffering=BUFFER, encoding="utf-8", newline="\n")  # noqa: SIM115
        _writers.add(self)
        self._put(json.dumps(header, separators=(",", ":")) + "\n")

    def write(self, layer: int, chosen: np.ndarray, cold: bool) -> None:
        """One call of a layer.

        Args:
            layer: index among the MoE layers.
            chosen: int (tokens, k), the experts of each token.
            cold: whether the call is a prefill's.

        Raises:
            OSError: the disk is full; the trace is closed then, and later calls do nothing.
        """
        names = self._names
        start = f"{self._calls[layer]} {layer} {'p' if cold else 'd'} "
        self._calls[layer] += 1
        self._put("".join([f"{start}{','.join([names[e] for e in row])}\n" for row in chosen.tolist()]))

    def _put(self, text: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(text)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        file, self._file = self._file, None
        if file is not None and not file.closed:
            try:
                file.close()
            except OSError:  # the same disk, as full as before
                pass
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            sentence = f"[{self.path}] the disk is full, the trace ends early; free some space or write it elsewhere"
            raise OSError(error.errno, sentence) from error
        with named(self.path):
            raise error

    def close(self) -> None:
        """Write what is buffered and close the file; a second call does nothing.

        Raises:
            OSError: the disk is full.
        """
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as error:
            self._give_up(error)
        self._file = None


# ---- read


@dataclass(frozen=True)
class Call:
    """One call of one layer: chosen is int32 (tokens, k); cold: a prefill's."""

    layer: int
    cold: bool
    chosen: np.ndarray


@dataclass(frozen=True)
class Trace:
    """A trace that was read and checked; calls in the order in which they were made."""

    model: dict[str, Any]
    experts: list[int]
    record_bytes: list[int]
    calls: list[Call]
    path: Path

    def tokens(self, cold: bool) -> int:
        """Tokens that went through the first layer in decode, or in prefill."""
        return sum(len(call.chosen) for call in self.calls if call.layer == 0 and call.cold == cold)

    def check(self, identity: dict[str, Any]) -> None:
        """Refuse a trace of another model.

        Raises:
            FormatError: with both names.
        """
        if self.model != identity:
            ours, theirs = identity.get("model"), self.model.get("model")
            why = "another model" if ours != theirs else "a model of that name with another config"
            raise FormatError(
                f"[{self.path}] should be a trace of {_shown(ours)}, is one of {why}, {_shown(theirs)}; {_AGAIN}."
            )


def read_trace(path: str | Path) -> Trace:
    """Read a trace, every value checked.

    Raises:
        FormatError: what is wrong in which line.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no such trace; a run with --trace writes one", str(path))
    if not path.is_file():
        raise FormatError(f"[{path}] should be the file of a routing trace, it is none; {_AGAIN}.")
    with open(path, "rb") as file:
        first = _header(path, file.readline(MAX_HEADER + 1))
        calls = _Calls(path, first["experts"])
        number = 1
        while (line := file.readline(MAX_LINE + 1)).endswith(b"\n"):
            number += 1
            calls.add(number, line)
        if len(line) > MAX_LINE:
            raise calls.refuse(number + 1, f"should have at most {MAX_LINE} bytes, has more")
    return Trace(first["model"], first["experts"], first["record_bytes"], calls.finish(), path)


class _Calls:
    """Lines as they come, gathered to calls."""

    def __init__(self, path: Path, experts: list[int]):
        self.path, self.experts = path, experts
        self.done: list[Call] = []
        self.counts = [0] * len(experts)  # calls of each layer so far, the open one included
        self.open: tuple[int, int, bytes] | None = None  # call, layer, phase
        self.rows: list[list[int]] = []

    def refuse(self, number: int, rule: str) -> FormatError:
        return FormatError(f"[{self.path}] line {number} {rule}; {_AGAIN}.")

    def add(self, number: int, line: bytes) -> None:
        words = line.split()
        try:
            call, layer, chosen = int(words[0]), int(words[1]), [int(e) for e in words[3].split(b",")]
        except (ValueError, IndexError):
            raise self.refuse(number, "should be a call, a layer, a phase and experts, and is not") from None
        if len(words) != 4 or words[2] not in (b"d", b"p"):
            raise self.refuse(number, f"should be 4 words, the third d or p, received {_shown(line)}")
        if not 0 <= layer < len(self.experts) or number > MAX_DECISIONS:
            raise self.refuse(number, f"should name a layer in 0 to {len(self.experts) - 1}, received {_shown(layer)}")
        self._check_chosen(number, layer, chosen)
        if self.open != (call, layer, words[2]):
            self._begin(number, call, layer, words[2])
        elif len(self.rows[0]) != len(chosen):
            raise self.refuse(number, f"should have {len(self.rows[0])} experts as its call has, has {len(chosen)}")
        self.rows.append(chosen)

    def _check_chosen(self, number: int, layer: int, chosen: list[int]) -> None:
        last = self.experts[layer] - 1
        if min(chosen) < 0 or max(chosen) > last or len(chosen) > MAX_CHOSEN or len(set(chosen)) != len(chosen):
            rule = f"should name 1 to {MAX_CHOSEN} distinct experts in 0 to {last}"
            raise self.refuse(number, f"{rule}, received {_shown(chosen)}")

    def _begin(self, number: int, call: int, layer: int, phase: bytes) -> None:
        if call != self.counts[layer]:
            raise self.refuse(number, f"should begin call {self.counts[layer]} of layer {layer}, says {_shown(call)}")
        self._end()
        self.counts[layer] += 1
        self.open = (call, layer, phase)

    def _end(self) -> None:
        if self.open is not None:
            self.done.append(Call(self.open[1], self.open[2] == b"p", np.array(self.rows, np.int32)))
        self.rows = []

    def finish(self) -> list[Call]:
        self._end()
        return self.done


def _header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        found = None
    if type(found) is not dict or KEY not in found:
        raise FormatError(f"[{path}] should begin with the line of a routing trace and does not; {_AGAIN}.")
    if type(found[KEY]) is not int or found[KEY] != VERSION:
        raise FormatError(
            f"[{path}] version {VERSION} of a trace is read here, received {_shown(found[KEY])}; {_AGAIN}."
        )
    if type(found.get("model")) is not dict:
        raise FormatError(f"[{path}] model should be an object, received {_shown(found.get('model'))}; {_AGAIN}.")
    _check_list(path, "experts", found.get("experts"), 1, MAX_EXPERTS)
    _check_list(path, "record_bytes", found.get("record_bytes"), UNIT, MAX_RECORD)
    if len(found["experts"]) != len(found["record_bytes"]):
        both = f"{len(found['experts'])} and {len(found['record_bytes'])}"
        raise FormatError(f"[{path}] experts and record_bytes should be equally long, have {both} entries; {_AGAIN}.")
    return found


def _check_list(path: Path, name: str, values: Any, low: int, high: int) -> None:
    fine = type(values) is list and 1 <= len(values) <= MAX_LAYERS
    if not fine or not all(type(v) is int and low <= v <= high for v in values):
        rule = f"{name} should be 1 to {MAX_LAYERS} integers in {low} to {high}"
        raise FormatError(f"[{path}] {rule}, received {_shown(values)}; {_AGAIN}.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
