"""Plants defects in the kernels, one at a time, and says which of them the tests catch.

    python tests/metal_mutants.py [word ...]     only the defects whose name has one of the words

Each defect is a replacement in the text of kernels/<file>.metal that still compiles as a rule; the tests below run on it in the
emulator until one fails. Survivors are listed; the reason why each is harmless stands beside it in HARMLESS.
"""

import io
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from tiny_qmoe_mlx import metal, metal_encode  # noqa: E402

QMV = [
    "test_metal_qmv.py::test_every_instance_of_gate_up_at_every_rate[2-16-swiglu_oai]",
    "test_metal_qmv.py::test_every_instance_of_qmv_at_every_rate[1-16-mlx.core.float32]",
    "test_metal_qmv.py::test_one_token_top_one_with_inputs_in_constant_space",
    "test_metal_qmv.py::test_more_than_one_group_of_32_blocks",
    "test_metal_qmv.py::test_more_picks_of_an_expert_than_one_group_takes",
    "test_metal_qmv.py::test_order_of_two_bytes_above_256_blocks",
    "test_metal_qmv.py::test_expert_beyond_the_table_stays_inside_the_pool",
    "test_metal_qmv.py::test_records_begin_at_a_base",
    "test_metal_qmv.py::test_row_gains_of_some_matrices",
    "test_metal_qmv.py::test_absent_blocks_at_the_end_of_the_pool",
    "test_metal_qmv.py::test_shared_experts_are_decoded_once",
    "test_metal_qmv.py::test_record_beyond_4_gib",
]
ACTIVATE = [f"test_metal_qmv.py::test_every_instance_of_gate_up_at_every_rate[1-16-{n}]" for n in metal.ACTIVATIONS]
DENSE = [
    "test_metal_dense.py::test_every_instance_of_dequantize_at_every_rate[12-mlx.core.float16]",
    "test_metal_dense.py::test_dequantize_down_with_more_than_32_blocks",
    "test_metal_dense.py::test_dequantize_address_spaces",
]
ENCODE = [
    "test_metal_viterbi.py::test_codes_are_those_of_the_cpu[12-4]",
    "test_metal_viterbi.py::test_codes_are_those_of_the_cpu[12-6]",
    "test_metal_viterbi.py::test_tiles_of_zeros",
    "test_metal_viterbi.py::test_targets_far_outside_the_code",
    "test_metal_viterbi.py::test_checked_with_costs_in_threadgroup_memory[2]",
    "test_metal_viterbi.py::test_checked_with_costs_in_device_memory",
]
ROTATE = ["test_metal_dense.py::test_rotation_to_float32", "test_metal_dense.py::test_rotation_in_any_order_of_lanes"]

# name: (file, text, replacement, tests)
MUTANTS = {
    # where things lie
    "slot table ignored": ("trellis_decode", "ulong(table[min(expert, experts - 1)])", "ulong(table[0])", QMV),
    "slot address of 32 bits": ("trellis_decode", "128 * ulong(table[min(", "ulong(128u * table[min(", QMV),
    "slot in units of 64": ("trellis_decode", "128 * ulong(table", "64 * ulong(table", QMV),
    "expert not bounded": ("trellis_decode", "table[min(expert, experts - 1)]", "table[expert]", QMV),
    "base ignored": ("trellis_decode", "pool + ulong(base) +", "pool +", QMV),
    "bias flag for row gain": ("trellis_decode", "matrix == 0 ? 256", "matrix == 0 ? 1", QMV),
    "row gain of the wrong matrix": ("trellis_decode", "matrix == 1 ? 512 : 1024", "matrix == 1 ? 1024 : 512", QMV),
    "row gain always": ("trellis_decode", "m.has_row_gain = (flags & (", "m.has_row_gain = (0xFFFF & (", QMV),
    "section of the wrong matrix": ("trellis_decode", "header[6 + 3 * matrix]", "header[9 + 3 * matrix]", QMV),
    "rows not padded": ("trellis_decode", "(rows + 31) & ~31u", "rows", QMV),
    "blocks rounded down": ("trellis_decode", "(columns + 63) / 64", "columns / 64", QMV),
    "payload not aligned": ("trellis_decode", "(side + 127) / 128 * 128", "side / 128 * 128", QMV),
    "nibbles swapped": ("trellis_decode", "block & 1 ? pair >> 4 : pair & 15", "block & 1 ? pair & 15 : pair >> 4", QMV),
    "narrow order only": ("trellis_decode", "m.blocks > 256 ? uint((", "m.blocks > 999 ? uint((", QMV),
    "wide order starts at 256": ("trellis_decode", "m.blocks > 256 ? 2 * m.blocks", "m.blocks > 257 ? 2 * m.blocks", QMV),
    "seven planes at rate 7": ("trellis_decode", "rate == 7 ? 8 : rate", "rate", QMV),
    "inclusive prefix": ("trellis_decode", "simd_prefix_exclusive_sum(own)", "simd_prefix_inclusive_sum(own)", QMV),
    "end without the last block": ("trellis_decode", "simd_broadcast(before + own, 31)", "simd_broadcast(before, 31)", QMV),
    "end of lane 30": ("trellis_decode", "simd_broadcast(before + own, 31)", "simd_broadcast(before + own, 30)", QMV),
    "group start dropped": ("trellis_decode", "g.word = start + 32 * before", "g.word = 32 * before", QMV),
    "group end dropped": ("trellis_decode", "g.end = start + 32 *", "g.end = 32 *", QMV),
    "rates beyond the last block": ("trellis_decode", "first + lane < m.blocks ? block_rate(m, block) : 0", "block_rate(m, block)", QMV),
    "block not bounded": ("trellis_decode", "min(first + lane, m.blocks - 1)", "first + lane", QMV),
    "tile stride of the first group": ("trellis_decode", "if (m.blocks <= 32) return g.end;", "return g.end;", QMV),
    "tile stride misses a block": ("trellis_decode", "block = 32 + lane; block < m.blocks;", "block = 33 + lane; block < m.blocks;", QMV),
    "block of 32 columns": ("trellis_decode", "g.column = 64 *", "g.column = 32 *", QMV),
    # bits
    "plane off by one": ("trellis_decode", "words[i] = mine[32 * i]", "words[i] = mine[32 * i + 1]", QMV),
    "planes of 31 words": ("trellis_decode", "words[i] = mine[32 * i]", "words[i] = mine[31 * i]", QMV),
    "own row as next": ("trellis_decode", "const ushort next = (lane + 1) & 31;", "const ushort next = lane;", QMV),
    "two rows further": ("trellis_decode", "const ushort next = (lane + 1) & 31;", "const ushort next = (lane + 2) & 31;", QMV),
    "bitstring not circular": ("trellis_decode", "const ushort next = (lane + 1) & 31;", "const ushort next = min(lane + 1, 31);", QMV),
    "one plane: third row": ("trellis_decode", "ushort((lane + 2) & 31)", "ushort((lane + 1) & 31)", QMV),
    "one plane: next row": ("trellis_decode", "next = simd_shuffle(own, ushort((lane + 1) & 31))", "next = own", QMV),
    "one plane: tiles swapped": ("trellis_decode", "words[tile % 2]", "words[1 - tile % 2]", QMV),
    "one plane: halves swapped": ("trellis_decode", "bits[0] = tile < 2 ?", "bits[0] = tile >= 2 ?", QMV),
    "three planes: part not masked": ("trellis_decode", "(words, 24 * tile) & 0xFFFFFFu", "(words, 24 * tile)", QMV),
    "three planes: second chunk": ("trellis_decode", "ushort(beyond >> 8)", "ushort(beyond)", QMV),
    "five planes: top not masked": ("trellis_decode", "(words, 40 * tile + 32) & 0xFFu) |", "(words, 40 * tile + 32)) |", QMV),
    "five planes: part of 32 bits": ("trellis_decode", "part = segment_bits<P>(words, 40 * tile)", "part = segment_bits<P>(words, 32 * tile)", QMV),
    "even planes: wrong half beyond": ("trellis_decode", "first % 2 ? high16(beyond) : low16(beyond)", "first % 2 ? low16(beyond) : high16(beyond)", QMV),
    "even planes: last half": ("trellis_decode", "j + 1 < halves ?", "j + 1 <= halves ?", QMV),
    "segment without the next word": ("trellis_decode", "words[word] >> shift | above << (32 - shift)", "words[word] >> shift", QMV),
    "window a bit late": ("trellis_decode", "extract_bits(bits[at / 16], at % 16, L)", "extract_bits(bits[at / 16], (at + 1) % 16, L)", QMV),
    "window a bit short": ("trellis_decode", "at % 16, L)", "at % 16, L - 1)", QMV),
    "multiplier": ("trellis_decode", "0xCBAC1FEDu", "0xCBAC1FEFu", QMV),
    "3INST addend": ("trellis_decode", "+ 64248484u", "+ 64248485u", QMV),
    "code mask": ("trellis_decode", "0x8FFF8FFFu", "0x0FFF8FFFu", QMV),
    "3INST one half twice": ("trellis_decode", "weights[p] = float(v.x) + float(v.y)", "weights[p] = float(v.x) + float(v.x)", QMV),
    "pair swapped": ("trellis_decode", "weights[2 * p] = float(v.x)", "weights[2 * p] = float(v.y)", QMV),
    # products
    "picks of all experts": ("trellis_gather_qmv", "uint(ids[min(other, picks - 1)]) == expert", "true", QMV),
    "picks not bounded": ("trellis_gather_qmv", "other < picks && uint(ids[min(other, picks - 1)])", "uint(ids[other])", QMV),
    "every pick leads": ("trellis_gather_qmv", "if (before % W != 0) return m;", "", QMV),
    "one group of picks only": ("trellis_gather_qmv", "if (before % W != 0) return m;", "if (before != 0) return m;", QMV),
    "earlier picks again": ("trellis_gather_qmv", "same &= ~earlier;", "", QMV),
    "picks of the first 32 only": ("trellis_gather_qmv", "m.pick = first + ctz(same)", "m.pick = ctz(same)", QMV),
    "member in the wrong lane": ("trellis_gather_qmv", "if (lane == m.count)", "if (lane == m.count + 1)", QMV),
    "first row of z for all": ("trellis_gather_qmv", "m.pick / TQ_SHARED * TQ_COLUMNS", "0", QMV),
    "row of z by pick": ("trellis_gather_qmv", "m.pick / TQ_SHARED * TQ_COLUMNS", "m.pick * TQ_COLUMNS", QMV),
    "gain of the next tile": ("trellis_gather_qmv", "float(gains[tile])", "float(gains[(tile + 1) % 4])", QMV),
    "gains of the next block": ("trellis_gather_qmv", "m.block_gain[first + i]", "m.block_gain[first + i + 1]", QMV),
    "order ignored": ("trellis_gather_qmv", "z + simd_broadcast(g.column, ushort(i))", "z + 64 * (first + i)", QMV),
    "sum not added": ("trellis_gather_qmv", "acc[t] = fma(sum, gain, acc[t])", "acc[t] = sum * gain", QMV),
    "rate of the first block": ("trellis_gather_qmv", "simd_broadcast(g.rate, ushort(i))", "simd_broadcast(g.rate, ushort(0))", QMV),
    "last block skipped": ("trellis_gather_qmv", "min(32u, m.blocks - first)", "min(32u, m.blocks - first - 1)", QMV),
    "simdgroups share a block": ("trellis_gather_qmv", "for (uint i = sg; i < last; i += sgs)", "for (uint i = 0; i < last; i += sgs)", QMV),
    "no barrier in qmv": ("trellis_gather_qmv", "threadgroup_barrier(mem_flags::mem_threadgroup);\n  const uint row = 32 * tile + lane;\n  for (uint t = sg; t < members.count; t += sgs) {\n    const float v", "const uint row = 32 * tile + lane;\n  for (uint t = sg; t < members.count; t += sgs) {\n    const float v", QMV),
    "no barrier in gate_up": ("trellis_gather_qmv", "threadgroup_barrier(mem_flags::mem_threadgroup);\n  const uint row = 32 * tile + lane;\n  for (uint t = sg; t < members.count; t += sgs) {\n    const float g", "const uint row = 32 * tile + lane;\n  for (uint t = sg; t < members.count; t += sgs) {\n    const float g", QMV),
    "barrier for device memory": ("trellis_gather_qmv", "mem_flags::mem_threadgroup", "mem_flags::mem_device", QMV),
    "sums of one simdgroup": ("trellis_gather_qmv", "for (uint s = 0; s < sgs; ++s) sum +=", "for (uint s = 0; s < 1; ++s) sum +=", QMV),
    "up over gate": ("trellis_gather_qmv", "up_sums = sums + sgs * W * 32", "up_sums = sums", QMV),
    "row not bounded in qmv": ("trellis_gather_qmv", "if (row < TQ_ROWS) y[", "y[", QMV),
    "row not bounded in gate_up": ("trellis_gather_qmv", "if (row < TQ_ROWS) hidden[", "hidden[", QMV),
    "rows bounded one early": ("trellis_gather_qmv", "if (row < TQ_ROWS) y[", "if (row + 1 < TQ_ROWS) y[", QMV),
    "bias dropped": ("trellis_gather_qmv", "m.has_bias ? float(m.bias[row]) : 0.0f", "0.0f", QMV),
    "bias subtracted": ("trellis_gather_qmv", "+ (m.has_bias ?", "- (m.has_bias ?", QMV),
    "gate twice": ("trellis_gather_qmv", "up = matrix_view(record, 1)", "up = matrix_view(record, 0)", QMV),
    "sign of the logistic": ("trellis_gather_qmv", "1.0f + exp(-v)", "1.0f + exp(v)", QMV),
    "gate and up swapped": ("trellis_gather_qmv", "activate<ACT>(g, u,", "activate<ACT>(u, g,", QMV),
    "gate not clamped": ("trellis_gather_qmv", "gate = min(gate, limit);", "", QMV),
    "up clamped on one side": ("trellis_gather_qmv", "clamp(up, -limit, limit)", "min(up, limit)", QMV),
    "up without its one": ("trellis_gather_qmv", "limit) + 1.0f)", "limit))", QMV),
    "GELU constant": ("trellis_gather_qmv", "0.044715f", "0.044f", ACTIVATE),
    "ReLU not squared": ("trellis_gather_qmv", "return gate * gate;", "return gate;", ACTIVATE),
    # dense
    "no barrier before rows": ("trellis_dequantize", "simdgroup_barrier(mem_flags::mem_threadgroup);\n    device Pair* to", "device Pair* to", DENSE),
    "no barrier after rows": ("trellis_dequantize", "    }\n    simdgroup_barrier(mem_flags::mem_threadgroup);\n  }", "    }\n  }", DENSE),
    "simdgroups share their memory": ("trellis_dequantize", "staged + 32 * 17 * sg", "staged", DENSE),
    "dense rows not bounded": ("trellis_dequantize", "r < min(rows, part + 16)", "r < part + 16", DENSE),
    "dense bias rows not bounded": ("trellis_dequantize", "if (sg == 0 && row < rows)", "if (sg == 0)", DENSE),
    "dense row gain dropped": ("trellis_dequantize", "float(gains[tile]) * row_gain", "float(gains[tile])", DENSE),
    "absent blocks not written": ("trellis_dequantize", "default: store_block<0, L>(block, gains, row_gain, mine, to, columns, inside, lane); break;", "default: break;", DENSE),
    "dense place ignored": ("trellis_dequantize", "out + simd_broadcast(g.column, ushort(i))", "out + 64 * (first + i)", DENSE),
    "dense expert index": ("trellis_dequantize", "(ulong(index) * rows + 32 * tile)", "(ulong(index) * rows + 31 * tile)", DENSE),
    "dense ids ignored": ("trellis_dequantize", "uint(ids[index])", "index", DENSE),
    "dense tiles of a pair swapped": ("trellis_dequantize", "mine[8 * (tile % 2) + i]", "mine[8 * (1 - tile % 2) + i]", DENSE),
    # encoder
    "no barrier between steps": ("trellis_viterbi", "threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);\n    for (uint i = 0", "for (uint i = 0", ENCODE),
    "barrier for one memory only": ("trellis_viterbi", "threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);\n    for (uint i = 0", "threadgroup_barrier(mem_flags::mem_threadgroup);\n    for (uint i = 0", ENCODE),
    "no barrier after targets": ("trellis_viterbi", "  threadgroup_barrier(mem_flags::mem_threadgroup);\n  // Survivors", "  // Survivors", ENCODE),
    "no barrier before symbols are read": ("trellis_viterbi", "threadgroup_barrier(mem_flags::mem_threadgroup);\n  constexpr uint bytes", "constexpr uint bytes", ENCODE),
    "one half of costs": ("trellis_viterbi", "best[(step & 1) * Q + q + r] = ", "best[q + r] = ", ENCODE),
    "ties to the later": ("trellis_viterbi", "winner[r] = cost < lowest[r] ? j", "winner[r] = cost <= lowest[r] ? j", ENCODE),
    "costs not brought down": ("trellis_viterbi", "amount = min(least + 32768, 32767)", "amount = 0", ENCODE),
    "least of one simdgroup": ("trellis_viterbi", "least = min(least, all[i])", "least = all[0]", ENCODE),
    "squares not rounded": ("trellis_viterbi", " + 32768u", "", ENCODE),
    "seam ignored": ("trellis_viterbi", "seam < Q && q + r != seam ? 32767 : -32768", "-32768", ENCODE),
    "seam of the state after": ("trellis_viterbi", "2 * reach, reach, false", "2 * reach, reach - 1, false", ENCODE),
    "window off by one": ("trellis_viterbi", "(first + 1 + total - step) % total", "(first + total - step) % total", ENCODE),
    "mark of the next lane": ("trellis_viterbi", "word[b] >> (q / R & 31) & 1", "word[b] >> (q / R + 1 & 31) & 1", ENCODE),
    "error does not saturate": ("trellis_viterbi", "return min(rounded_square(d0) + rounded_square(d1), 32767);", "return rounded_square(d0) + rounded_square(d1);", ENCODE),
    "cost does not saturate": ("trellis_viterbi", "min(before + state_error<WEIGHTS>(own, unit, x0, x1), 32767)", "before + state_error<WEIGHTS>(own, unit, x0, x1)", ENCODE),
    "predecessor not advanced": ("trellis_viterbi", "from += Q >> KV;", "", ENCODE),
    "product not advanced": ("trellis_viterbi", "product += state_product<WEIGHTS>(Q) - state_product<WEIGHTS>(0);", "", ENCODE),
    "marks of one row of states": ("trellis_viterbi", "q / (32 * R) * R + q % R", "q / (32 * R) * R", ENCODE),
    "difference not saturated": ("trellis_viterbi", "rounded_square(clamp(d, -32767, 32767))", "rounded_square(d)", ENCODE),
    "target not clipped": ("trellis_viterbi", "clamp(x[512 * tile + i] * units[0], -units[1], units[1])", "x[512 * tile + i] * units[0]", ENCODE),
    # rotation
    "no barrier in rotation": ("rotate", "threadgroup_barrier(mem_flags::mem_threadgroup);", "", ROTATE),
    "sign of butterfly": ("rotate", "v[e + half_step] = a - b", "v[e + half_step] = b - a", ROTATE),
    "sign of lanes": ("rotate", "lane & step ? other - v[e]", "lane & step ? v[e] - other", ROTATE),
    "lanes shifted": ("rotate", "simd_shuffle_xor(v[e], ushort(step))", "simd_shuffle_xor(v[e], ushort(step ^ 1))", ROTATE),
    "last butterflies dropped": ("rotate", "half_step < simdgroups; half_step *= 2", "half_step < simdgroups; half_step *= 4", ROTATE),
    "scale by H": ("rotate", "1.0f / sqrt(float(H))", "1.0f / float(H)", ROTATE),
    "signs ignored": ("rotate", "signs[column / 32] >> (column % 32) & 1 ? -value : value", "value", ROTATE),
    "sign of the next column": ("rotate", "signs[column / 32] >> (column % 32)", "signs[column / 32] >> ((column + 1) % 32)", ROTATE),
    "columns not bounded": ("rotate", "column < columns ? float(x[from + column]) : 0.0f", "float(x[from + column])", ROTATE),
    "row ignored": ("rotate", "ulong(at.y) * columns", "0 * ulong(columns)", ROTATE),
    "group ignored": ("rotate", "first = at.x * H", "first = 0 * at.x", ROTATE),
}  # fmt: skip

# Why a surviving defect changes nothing.
HARMLESS: dict[str, str] = {}


def run(tests: list[str]) -> str:
    """Name of the first test that fails, or an empty text."""
    folder = Path(__file__).resolve().parent
    for module in (metal, metal_encode):
        for build in (f for name, f in vars(module).items() if name.endswith("_kernel")):
            build.cache_clear()
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(str(folder / t) for t in tests)])
    lines = [line for line in out.getvalue().splitlines() if line.startswith(("FAILED", "ERROR"))]
    if code == pytest.ExitCode.OK:
        return ""
    if code != pytest.ExitCode.TESTS_FAILED:
        raise RuntimeError(out.getvalue())
    return lines[0].split("::")[-1]


def main(words: list[str]) -> int:
    original = metal.source

    def text_of(name: str, mutant: str) -> str:
        file, old, new, _ = MUTANTS[mutant]
        text = original(name)
        if name == file and old not in text:
            raise ValueError(f"[mutants] {mutant}: the text to replace should be in {file}.metal and is not")
        return text.replace(old, new) if name == file else text

    chosen = [m for m in MUTANTS if not words or any(w in m for w in words)]
    survivors = []
    for mutant in chosen:
        metal.source = lambda *names, mutant=mutant: "\n".join(text_of(n, mutant) for n in names)
        start = time.perf_counter()
        caught = run(MUTANTS[mutant][3])
        if not caught:
            survivors.append(mutant)
        verdict = f"caught by {caught}" if caught else f"SURVIVED {HARMLESS.get(mutant, '')}"
        print(f"{mutant:36} {time.perf_counter() - start:5.1f} s  {verdict}", flush=True)
    metal.source = original
    share = 1 - len(survivors) / max(len(chosen), 1)
    print(f"{len(chosen)} defects, {len(chosen) - len(survivors)} caught ({share:.0%}); survivors: {survivors or 'none'}")
    return int(share < 0.95)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
