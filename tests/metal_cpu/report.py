"""What a launch reports: problems as readable lines, and counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class BufferTraffic:
    """What a launch did with one buffer, in bytes.

    ``requested`` sums over lanes. ``fetched`` sums over simdgroup instructions, each byte once however many lanes asked
    for it: what a GPU without a cache would read. ``compulsory`` counts each byte once in the whole launch: what one
    with an endless cache would read. ``lines`` is ``compulsory`` in whole 64-byte lines.
    """

    size: int
    requested: int = 0
    fetched: int = 0
    compulsory: int = 0
    lines: int = 0
    written: int = 0

    def add(self, other: BufferTraffic) -> None:
        """Add another launch's traffic of a buffer with this name."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Profile:
    """Counts of mode ``profile``; the model is in profile.py.

    ``slots`` are issue slots of simdgroups by class of instruction, summed over the launch; a slot serves 32 lanes.
    ``per_weight(n)`` is lane slots per weight: 32 * issue_slots / n, the unit of "slots a weight".
    """

    buffers: dict[str, BufferTraffic] = field(default_factory=dict)
    slots: Counter[str] = field(default_factory=Counter)
    useful_lane_slots: float = 0.0

    def add(self, other: Profile) -> None:
        """Add the profile of another launch; buffers of one name are added up."""
        self.slots.update(other.slots)
        self.useful_lane_slots += other.useful_lane_slots
        for name, traffic in other.buffers.items():
            if name in self.buffers:
                self.buffers[name].add(traffic)
            else:
                self.buffers[name] = traffic

    @property
    def issue_slots(self) -> float:
        """Issue slots of all simdgroups; loads, stores and simd operations included."""
        return float(sum(self.slots.values()))

    @property
    def lane_efficiency(self) -> float:
        """Share of lanes that did something in the issued instructions, 0 to 1."""
        return self.useful_lane_slots / (32 * self.issue_slots) if self.issue_slots else 1.0

    def per_weight(self, weights: int) -> float:
        """Issue slots per weight and lane: 32 * issue_slots / weights."""
        return 32 * self.issue_slots / weights


@dataclass
class Report:
    """Everything a launch (or several) had to say.

    ``problems``: one line each, ``KIND kernel.metal:LINE `text of the line` message [where]``; one per kind and place,
    at most 50 a launch. ``kinds``: how often each kind occurred, repeats included. ``counts``: threads, switches,
    simd_ops, barriers, accesses, threadgroup_bytes (the largest). ``profile`` only in mode ``profile``.
    """

    mode: str
    problems: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    profile: Profile | None = None

    def add(self, other: Report) -> None:
        """Add the report of another launch."""
        largest = max(self.counts["threadgroup_bytes"], other.counts["threadgroup_bytes"])
        self.problems += [line for line in other.problems if line not in self.problems]
        self.kinds.update(other.kinds)
        self.counts.update(other.counts)
        self.counts["threadgroup_bytes"] = largest
        if other.profile:
            self.profile = self.profile or Profile()
            self.profile.add(other.profile)

    def __str__(self) -> str:
        return "\n".join(self.problems) or f"no problems ({self.mode}: {dict(self.counts)})"
