"""The header of a safetensors file, read and checked before a library maps what it says.

Format: u64 length (little endian), that many bytes of JSON, data. The rules are those of the format's own reader: every
tensor has a known type, its bytes are its shape times its type's, and tensors follow one another without holes up to
the file's end. Files that are loaded together hold each tensor once: of two the last would win, whichever that is.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_qmoe_mlx.disk_errors import named
from tiny_qmoe_mlx.errors import FormatError, shown

MOST_HEADER = 1 << 25  # bytes; a checkpoint of 90,000 tensors in one file has 12 MB, the hub itself reads 25 MB
MOST_VALUES = 1 << 20  # of a header, by its commas; a tensor has four to seven
MOST_TENSORS = 1 << 18  # of all files together: 60 layers of 384 experts, each of 3 matrices of 3 tensors, have 207,360
MOST_HEADERS = 1 << 26  # bytes of all files together: those have 35 MB
MOST_SIDE = (1 << 31) - 1  # of a shape: MLX counts in int32
MOST_DIMENSIONS = 16
BITS = {  # of a type
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
AGAIN = "download or copy the file again"


@dataclass
class Together:
    """What the files of a directory that are loaded together hold.

    Attributes:
        sizes: dtype and shape of each tensor.
        places: the file that each name stands in, as errors name it.
        header_bytes: of all files.
    """

    sizes: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    header_bytes: int = 0

    def add(self, file: Path, where: str | None = None) -> list[str]:
        """Check one more file; the names of its tensors. Errors name `where`, or the file.

        Raises:
            FormatError: a library should not see its header, another file has one of its tensors, or all together are
                too many; with the names and both numbers.
            OSError: it cannot be read.
        """
        where = where or file.name
        header, data = read(file, where)
        check_tensors(header, data, where)
        self.header_bytes += file.stat().st_size - data
        if self.header_bytes > MOST_HEADERS:
            raise FormatError(
                f"[{where}] headers should have at most {MOST_HEADERS} bytes in all files together, with this file's "
                f"they have {self.header_bytes}; {AGAIN}."
            )
        names = [name for name in header if name != "__metadata__"]
        for name in names:
            self.claim(name, where)
            self.sizes[name] = header[name]["dtype"], header[name]["shape"]
        return names

    def claim(self, name: str, where: str) -> None:
        """Note that a file holds a tensor of this name.

        Raises:
            FormatError: another does too, with both files' names; or there are too many.
        """
        other = self.places.setdefault(name, where)
        if other != where:
            raise FormatError(
                f"[{where}] {shown(name)} should stand in one file, {other} has it too; remove the one that is not of "
                "this model (an index file lists those that are), or download or copy the model again."
            )
        if len(self.places) > MOST_TENSORS:
            raise FormatError(
                f"[{where}] should hold at most {MOST_TENSORS} tensors with the other files, they hold more; {AGAIN}."
            )


def check(file: Path, where: str | None = None) -> int:
    """Refuse a file whose header a library should not see; the number of its tensors. Errors name `where`, or the file.

    Raises:
        FormatError: with the file's name, the tensor's and both numbers.
        OSError: it cannot be read.
    """
    return len(Together().add(file, where))


def read(file: Path, where: str) -> tuple[dict[str, Any], int]:
    """The header as JSON has it, and the bytes of data after it.

    Raises:
        FormatError: it is longer than the file, or no JSON object.
        OSError: it cannot be read.
    """
    with named(file), open(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        length = int.from_bytes(opened.read(8), "little")
        most = min(MOST_HEADER, size - 8)
        if not 2 <= length <= most:
            raise FormatError(
                f"[{where}] its header is damaged: it should have 2 to {max(2, most)} bytes, it says {length}; {AGAIN}."
            )
        raw = opened.read(length)
    return parse(raw, where), size - 8 - length


def parse(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON of a header, in which no name stands twice.

    Raises:
        FormatError: it is none, or has more values than a model has: they are counted before they take memory.
    """
    if raw.count(b",") > MOST_VALUES:
        raise FormatError(
            f"[{where}] its header should have at most {MOST_VALUES} values, it has {raw.count(b',')}; {AGAIN}."
        )
    try:
        found = json.loads(raw, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise FormatError(f"[{where}] its header should be JSON and is not: {reason}; {AGAIN}.") from None
    if type(found) is not dict:
        raise FormatError(f"[{where}] its header should be an object, it is another value; {AGAIN}.")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def check_tensors(header: dict[str, Any], data: int, where: str) -> int:
    """Every tensor of a header against the bytes of data that there are; how many tensors.

    Raises:
        FormatError: with the first that does not fit.
    """
    ends = []
    for name, entry in header.items():
        if name != "__metadata__":
            ends.append((*_offsets(name, entry, where), name))
        elif entry is None:  # as mx.save_safetensors writes it where it is given none
            continue
        elif type(entry) is not dict or not all(type(value) is str for value in entry.values()):
            raise FormatError(f"[{where}] __metadata__ of its header should be an object of texts; {AGAIN}.")
    before = 0
    for start, stop, name in sorted(ends):
        if start != before:
            raise FormatError(f"[{where}] {shown(name)} should begin at byte {before}, it says {start}; {AGAIN}.")
        before = stop
    if before != data:
        raise FormatError(f"[{where}] its tensors should take the file's {data} bytes of data, take {before}; {AGAIN}.")
    return len(ends)


def _offsets(name: str, entry: Any, where: str) -> tuple[int, int]:
    """Where a tensor begins and ends; its type, shape and size are checked."""
    keys = ("dtype", "shape", "data_offsets")
    if type(entry) is not dict or not all(key in entry for key in keys):
        raise _wrong(where, name, f"should have {', '.join(keys)}", entry)
    dtype, shape, offsets = (entry[key] for key in keys)
    if type(dtype) is not str or dtype not in BITS:
        raise _wrong(where, name, "should have a known dtype", dtype)
    if type(shape) is not list or len(shape) > MOST_DIMENSIONS or not all(map(_is_side, shape)):
        raise _wrong(where, name, f"should have at most {MOST_DIMENSIONS} sides of 0 to {MOST_SIDE}", shape)
    if type(offsets) is not list or len(offsets) != 2 or not all(type(v) is int for v in offsets):
        raise _wrong(where, name, "should have two data_offsets", offsets)
    bits = BITS[dtype]
    for side in shape:
        bits *= side
    if offsets[0] < 0 or 8 * (offsets[1] - offsets[0]) != bits:
        raise _wrong(where, name, f"should have {-(-bits // 8)} bytes as its shape asks for", offsets)
    return offsets[0], offsets[1]


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST_SIDE


def _wrong(where: str, name: str, rule: str, received: Any) -> FormatError:
    return FormatError(f"[{where}] {shown(name)} {rule}, received {shown(received)}; {AGAIN}.")
