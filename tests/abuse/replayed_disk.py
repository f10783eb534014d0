"""A directory as it may be after a power cut: from a journal of changes, what POSIX lets be lost is lost.

Durable is a file's content at its last fsync, and a directory's entries at its last fsync. Of what came later:

- each file's bytes meet a fate of their own: kept, lost, kept up to some write (the last one torn), there in some pages
  of 4 KiB and zero in others, or all zero at the new length, as with delayed allocation;
- changes of names are kept up to some moment, as a journaling file system does, or any of them are, each whole: POSIX
  gives no order between them. A rename is one change; a name whose file was never synced leads to what is left of it.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

FATES = ("kept", "lost", "torn", "pages", "zeros")
ORDERS = ("all", "none", "first", "any")  # which changes of names are kept
PAGE = 4096


@dataclass(frozen=True)
class Change:
    """A record of the journal: its letter, its fields, and the bytes of a write."""

    kind: str
    fields: tuple[str, ...]
    data: bytes = b""


def read_journal(file: Path) -> list[Change]:
    """All records of a journal.

    Raises:
        ValueError: something was done that the replay does not model.
    """
    raw, at, out = file.read_bytes(), 0, list[Change]()
    while at < len(raw):
        end = raw.index(b"\n", at)
        kind, *fields = raw[at:end].decode().split("\t")
        at = end + 1
        size = int(fields[2]) if kind == "W" else 0
        if kind == "X":
            raise ValueError(f"the journal has what is not modelled: {fields}")
        out.append(Change(kind, tuple(fields), raw[at : at + size]))
        at += size
    return out


@dataclass
class Inode:
    """A file: its durable content, and what was done to it since: (offset, data), or a new size."""

    durable: bytes = b""
    since: list[tuple[int, bytes] | int] = field(default_factory=list)

    def after(self, changes: list[tuple[int, bytes] | int]) -> bytearray:
        content = bytearray(self.durable)
        for change in changes:
            if isinstance(change, int):
                content = content[:change] + bytes(max(0, change - len(content)))
            else:
                offset, data = change
                content.extend(bytes(max(0, offset - len(content))))
                content[offset : offset + len(data)] = data
        return content

    def shown(self, fate: str, rng: random.Random) -> bytes:
        """What the file may hold after a cut."""
        whole = self.after(self.since)
        if fate == "kept" or not self.since:
            return bytes(whole)
        if fate == "lost":
            return self.durable
        if fate == "torn":
            upto = rng.randrange(len(self.since))
            last = self.since[upto]
            torn = [] if isinstance(last, int) else [(last[0], last[1][: rng.randrange(len(last[1]) + 1)])]
            return bytes(self.after([*self.since[:upto], *torn]))
        for start in range(0, len(whole), PAGE):
            if fate == "zeros" or rng.random() < 0.5:
                old = self.durable[start : start + PAGE]
                size = len(whole[start : start + PAGE])
                whole[start : start + PAGE] = old[:size] + bytes(max(0, size - len(old)))
        return bytes(whole)


Place = tuple[str, str]  # inode of a directory, name in it
Names = dict[Place, str]  # -> inode


@dataclass(frozen=True)
class Renaming:
    """A change of names: one that goes, one that leads to an inode from now on, or both; `node` is that inode."""

    node: str
    goes: Place | None = None
    comes: Place | None = None

    def made_in(self, directory: str) -> bool:
        return any(place is not None and place[0] == directory for place in (self.goes, self.comes))

    def make(self, names: Names) -> None:
        if self.goes is not None and names.get(self.goes) == self.node:
            del names[self.goes]
        if self.comes is not None:
            names[self.comes] = self.node


class ReplayedDisk:
    """Takes changes in order, and shows what may be left of them.

    live: entries as the running program sees them. durable: those that are on the disk for sure. pending: what came
    between.
    """

    def __init__(self, top: Path):
        """top: the directory as it is before the journal begins; its inodes are those of the journal."""
        self.top = str(top.stat().st_ino)
        self.files: dict[str, Inode] = {}
        self.directories = {self.top}
        self.live: Names = {}
        self.pending: list[Renaming] = []
        self._made = 0
        self._now: dict[str, str] = {}  # inode -> its own name: numbers are used again once a file has gone
        for path in sorted(top.rglob("*")):
            node = str(path.stat().st_ino)
            self.live[str(path.parent.stat().st_ino), path.name] = node
            if path.is_dir():
                self.directories.add(node)
            else:
                self.files[node] = Inode(path.read_bytes())
        self.durable = dict(self.live)

    def apply(self, change: Change) -> None:
        """One more change has been made."""
        kind, fields = change.kind, change.fields
        if kind in "WTS":
            node = self._now.get(fields[0], fields[0])
            self._sync(node) if kind == "S" else self.files[node].since.append(
                (int(fields[1]), change.data) if kind == "W" else int(fields[1])
            )
            return
        renaming = self._renaming(kind, fields)
        renaming.make(self.live)
        self.pending.append(renaming)

    def _renaming(self, kind: str, fields: tuple[str, ...]) -> Renaming:
        if kind in "CM":
            self._made += 1
            node = f"{fields[2]}, {self._made}"
            self._now[fields[2]] = node
            if kind == "C":
                self.files[node] = Inode()
            else:
                self.directories.add(node)
            return Renaming(node, None, self._place(fields[0], fields[1]))
        if kind == "L":
            return Renaming(self._now.get(fields[0], fields[0]), None, self._place(fields[1], fields[2]))
        goes = self._place(fields[0], fields[1])
        return Renaming(self.live[goes], goes, self._place(fields[2], fields[3]) if kind == "R" else None)

    def _place(self, directory: str, name: str) -> Place:
        return self._now.get(directory, directory), name

    def _sync(self, node: str) -> None:
        if node in self.files:
            file = self.files[node]
            file.durable, file.since = bytes(file.after(file.since)), []
            return
        for renaming in [r for r in self.pending if r.made_in(node)]:
            renaming.make(self.durable)
        self.pending = [r for r in self.pending if not r.made_in(node)]

    def names(self, order: str, rng: random.Random) -> Names:
        """Entries that may be there; order: one of ORDERS."""
        upto = rng.randrange(len(self.pending) + 1)
        kept = {
            "all": self.pending,
            "none": [],
            "first": self.pending[:upto],
            "any": [r for r in self.pending if rng.random() < 0.6],
        }[order]
        out = dict(self.durable)
        for renaming in kept:
            renaming.make(out)
        return out

    def build(self, names: Names, fate: str, rng: random.Random, to: Path) -> None:
        """Write the directory that these names lead to; fate: one of FATES for all files, or "mixed"."""
        shown: dict[str, bytes] = {}
        for node in sorted(set(names.values()) & set(self.files)):
            shown[node] = self.files[node].shown(rng.choice(FATES) if fate == "mixed" else fate, rng)
        self._fill(self.top, names, shown, to)

    def _fill(self, directory: str, names: Names, shown: dict[str, bytes], to: Path) -> None:
        to.mkdir()
        for (parent, name), node in names.items():
            if parent == directory and node in self.directories:
                self._fill(node, names, shown, to / name)
            elif parent == directory:
                (to / name).write_bytes(shown[node])
