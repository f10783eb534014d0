"""Issue slots by a model of Apple's GPU, from a kernel's LLVM text and the counts of a run in mode ``profile``.

The prices are those measured on M1 and M2 by others (metal-benchmarks by P. Turner); nothing here was compared with
hardware:

    1   add, subtract, and, or, xor, compare, select, fused multiply-add, float add and multiply, device load or store
    2   simd_shuffle and broadcast, 64-bit integer add
    3   ballot
    4   static shift or bit extract, integer multiply, popcount, integer <-> float, a pass over threadgroup memory
    8   shift by a variable amount, division and transcendental functions
    12  prefix sum
    15  reduction over the simdgroup

Free: bit casts, widening and narrowing of integers, half -> float (operands may be of mixed width), constant address
offsets, phis, unconditional branches, and what the hardware folds: a float multiply into the only add that uses it, a
low mask into the constant shift or extract before it, a comparison into the only select or branch after it, the upper
half of a word. Vector instructions count once per component.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from metal_cpu.report import BufferTraffic, Profile

# In the order of MtlOp in include/abi.h: name and price of a 32-bit word.
EXCHANGES = (
    *(("reduction", 15),) * 7, ("prefix", 12), ("shuffle", 2), ("shuffle", 2), ("ballot", 3), ("shuffle", 2),
    ("matrix", 8), ("matrix", 8), ("matrix", 16), ("barrier", 1),
)  # fmt: skip
DEVICE_ACCESS, BANK_PASS = 1, 4

ARITHMETIC = {
    **dict.fromkeys(("add", "sub", "and", "or", "xor", "icmp", "fcmp", "select", "fadd", "fsub", "fmul", "fneg"), 1),
    **dict.fromkeys(("mul", "uitofp", "sitofp", "fptoui", "fptosi"), 4),
    **dict.fromkeys(("udiv", "sdiv", "urem", "srem"), 32),
    "fptrunc": 1,
    "fdiv": 8,
    "frem": 16,
}
SHIFTS = ("shl", "lshr", "ashr")
CALLS = {
    **dict.fromkeys(
        ("fma", "fmuladd", "umin", "umax", "smin", "smax", "minnum", "maxnum", "fabs", "copysign", "abs"), 1
    ),
    **dict.fromkeys(("floor", "ceil", "trunc", "rint", "round"), 1),
    **dict.fromkeys(("ctpop", "bitreverse", "ctlz", "cttz", "bswap"), 4),
    **dict.fromkeys(("sqrt", "exp", "exp2", "log", "log2", "sin", "cos"), 8),
    "pow": 16,
}
LIBRARY = re.compile(r"@(exp|log|tanh|sin|cos|tan|sinh|cosh|pow|atan|asin|acos|fmod|ldexp)\w*\(")


@dataclass(frozen=True)
class Instruction:
    """One line of LLVM text: ``result = operation ...``."""

    result: str
    operation: str
    text: str

    @property
    def width(self) -> int:
        """Components of a vector instruction, else 1."""
        found = re.match(r"[\w ]*<(\d+) x ", self.text)
        return int(found.group(1)) if found else 1

    @property
    def bits(self) -> int:
        """Bits of the integer type it works on; 32 for anything else."""
        found = re.match(r"(?:\w+ )*?(?:<\d+ x )?i(\d+)", self.text)
        return int(found.group(1)) if found else 32


def parse_instruction(line: str) -> Instruction | None:
    """The instruction on a line of LLVM text; None for labels, stores, debug records and the like."""
    found = re.match(r"\s+(?:(%[\w.]+) = )?(?:tail |musttail |notail )?(\w+) (.*)", line)
    return (
        Instruction(found.group(1) or "", found.group(2), re.sub(r", !\w+ !\d+", "", found.group(3))) if found else None
    )


def functions(text: str) -> Iterator[list[list[Instruction]]]:
    """The basic blocks of each function of an LLVM text."""
    for body in re.findall(r"^define .*?\{\n(.*?)^\}", text, re.M | re.S):
        blocks = re.split(r"^(?:[\w.$-]+|\"[^\"]*\"):.*\n", body, flags=re.M)
        yield [[i for i in map(parse_instruction, block.split("\n")) if i] for block in blocks]


def only_use(instruction: Instruction, users: dict[str, list[Instruction]], operations: tuple[str, ...]) -> bool:
    """True if the result is used once, by one of the operations."""
    using = users.get(instruction.result, [])
    return len(using) == 1 and using[0].operation in operations


def price(i: Instruction, users: dict[str, list[Instruction]], made_by: dict[str, Instruction]) -> int:
    """Slots of one instruction."""
    wide = 2 if i.bits > 32 else 1
    if i.operation == "fmul" and only_use(i, users, ("fadd", "fsub")):
        return 0
    if i.operation in ("icmp", "fcmp") and only_use(i, users, ("select", "br")):
        return 0
    if i.operation == "and" and (mask := re.search(r", (\d+)$", i.text)):
        source = made_by.get((re.findall(r"%[\w.]+", i.text) or [""])[0])
        low = (int(mask.group(1)) + 1) & int(mask.group(1)) == 0
        return 0 if low and source and (source.operation == "lshr" or "@llvm.fsh" in source.text) else i.width * wide
    if i.operation == "lshr" and i.text.endswith(", 16") and i.bits == 32 and only_use(i, users, ("trunc",)):
        return 0
    if i.operation in SHIFTS:
        return (4 if re.search(r", (\d+|<.*>|splat.*)$", i.text) else 8) * i.width * wide
    if i.operation == "mul":
        return 4 * i.width * wide * wide
    if i.operation == "getelementptr":
        return 1 if re.search(r", i\d+ %", i.text) else 0
    if i.operation == "br":
        return 1 if i.text.startswith("i1") else 0
    if i.operation == "switch":
        return 1
    if i.operation == "call":
        return call_price(i)
    return ARITHMETIC.get(i.operation, 0) * i.width * wide


def call_price(i: Instruction) -> int:
    """Slots of a call: intrinsics and library functions; the emulator's own calls are counted when they run."""
    if found := re.search(r"@llvm\.fsh[lr]\.(?:v\d+)?i(\d+)\(.*, (?:i\d+ )?(\S+?)\)", i.text):
        return (8 if found.group(2).startswith("%") else 4) * i.width
    if found := re.search(r"@llvm\.(\w+)\.", i.text):
        return CALLS.get(found.group(1), 0) * i.width
    return 8 if LIBRARY.search(i.text) else 0


def guard_offsets(text: str) -> dict[str, int]:
    """Where each function's counters start among all counters of the library."""
    offsets, total = {}, 0
    for name, count in re.findall(r"^@(__sancov_gen_[.\d]*) = [^\[]*\[(\d+) x i32\]", text, re.M):
        offsets[name] = total
        total += int(count)
    return offsets


def block_number(i: Instruction, offsets: dict[str, int]) -> int:
    """Number of the counter that a call of the instrumentation increments, from 1; 0 for other instructions."""
    if "@__sanitizer_cov_trace_pc_guard(" not in i.text:
        return 0
    name = re.search(r"@(__sancov_gen_[.\d]*)", i.text)
    assert name, i.text
    if element := re.search(r", i64 0, i64 (\d+)\)", i.text):
        index = int(element.group(1))
    else:
        byte = re.search(r", i64 (\d+)\)", i.text)
        index = int(byte.group(1)) // 4 if byte else 0
    return offsets[name.group(1)] + index + 1


def read_blocks(text: str) -> dict[int, Counter[str]]:
    """Slots of each counted basic block, by operation."""
    offsets = guard_offsets(text)
    found = {}
    for blocks in functions(text):
        instructions = [i for block in blocks for i in block]
        made_by = {i.result: i for i in instructions if i.result}
        users: dict[str, list[Instruction]] = {}
        for i in instructions:
            for name in set(re.findall(r"%[\w.]+", i.text)):
                users.setdefault(name, []).append(i)
        for block in blocks:
            number = max((block_number(i, offsets) for i in block), default=0)
            if number:
                found[number] = Counter({op: n for op, n in prices(block, users, made_by).items() if n})
    return found


def prices(
    block: list[Instruction], users: dict[str, list[Instruction]], made_by: dict[str, Instruction]
) -> Counter[str]:
    """Slots of a block by operation."""
    slots: Counter[str] = Counter()
    for i in block:
        called = re.search(r"@llvm\.(\w+)|@(\w+)\(", i.text) if i.operation == "call" else None
        slots[called.group(1) or called.group(2) if called else i.operation] += price(i, users, made_by)
    return slots


def read_profile(rows: list[list[str]], llvm: Path) -> Profile:
    """The profile of a run, from the runtime's report and the kernel's LLVM text."""
    profile = Profile()
    blocks = read_blocks(llvm.read_text())
    for kind, *row in rows:
        if kind == "BUFFER":
            profile.buffers[row[0]] = BufferTraffic(*map(int, row[1:]))
        elif kind == "BLOCK":
            number, lanes, issues = map(int, row)
            for operation, slots in blocks.get(number, {}).items():
                profile.slots[operation] += slots * issues
                profile.useful_lane_slots += slots * lanes
        elif kind == "SIMD":
            op, _, words, lanes = map(int, row)
            name, slots = EXCHANGES[op]
            profile.slots[f"simd {name}"] += slots * words
            profile.useful_lane_slots += slots * lanes
        elif kind == "SITE":
            count_site(row, profile)
    return profile


def count_site(row: list[str], profile: Profile) -> None:
    """Slots of a load or store."""
    space, direction = row[1:3]
    instructions, lanes, passes = map(int, row[3:])
    slots = DEVICE_ACCESS * instructions if space == "device" else BANK_PASS * passes
    profile.slots[f"{space} {direction}"] += slots
    profile.useful_lane_slots += slots / instructions * lanes
