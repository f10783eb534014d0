"""Plants defects in the kernels, one at a time, and says which of them the tests catch.

    python tests/metal_mutants.py [word ...]     only the defects whose name has one of the words

Each defect of metal_mutants.txt is a replacement in the text of kernels/<file>.metal; the tests named here run on it in
the emulator until one fails. Survivors are listed, and in HARMLESS why each of them changes nothing.
"""

import io
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from tiny_qmoe_mlx import metal, metal_encode, metal_qmoe, metal_rans  # noqa: E402

QMV = [
    "test_metal_qmv.py::test_every_instance_of_gate_up_at_every_rate[2-swiglu_oai-16]",
    "test_metal_qmv.py::test_every_instance_of_qmv_at_every_rate[1-mlx.core.float32-16]",
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
ACTIVATE = [f"test_metal_qmv.py::test_every_instance_of_gate_up_at_every_rate[1-{n}-16]" for n in metal.ACTIVATIONS]
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
QMOE = [
    "test_metal_qmoe.py::test_every_instance[5-ternary-dictionary-16-mlx.core.float32]",
    "test_metal_qmoe.py::test_every_instance[1-ternary-tunstall-12-mlx.core.float32]",
    "test_metal_qmoe.py::test_every_instance[5-2-bit-tunstall-8-mlx.core.float32]",
    "test_metal_qmoe.py::test_few_zeros_and_many",
    "test_metal_qmoe.py::test_whatever_lies_in_a_record_nothing_outside_is_read",
    "test_metal_qmoe.py::test_records_begin_at_a_base",
]
QMOE_DENSE = [
    "test_metal_qmoe.py::test_every_instance_of_dequantize[ternary-dictionary-16-mlx.core.float32]",
    "test_metal_qmoe.py::test_every_instance_of_dequantize[2-bit-tunstall-8-mlx.core.float16]",
    "test_metal_qmoe.py::test_dense_rows_of_many_codewords_in_any_order_of_lanes",
    "test_metal_qmoe.py::test_dense_rows_whose_codewords_end_too_early_end_in_zeros",
]
RANS = [
    "test_metal_rans.py::test_the_bytes_of_the_specification[20.0-65537]",
    "test_metal_rans.py::test_the_bytes_of_the_specification[20.0-327757]",
    "test_metal_rans.py::test_the_bytes_of_the_specification[0.4-33]",
    "test_metal_rans.py::test_lanes_and_simdgroups_in_any_order[1]",
    "test_metal_rans.py::test_payloads_begin_anywhere",
    "test_metal_rans.py::test_a_payload_beyond_4_gib_of_the_pool",
    "test_metal_rans.py::test_a_tile_that_ends_early_or_late_is_a_fault",
    "test_metal_rans.py::test_a_lane_that_ends_elsewhere_is_a_fault",
    "test_metal_rans.py::test_a_lane_that_begins_too_low_is_a_fault",
    "test_metal_rans.py::test_damage_is_a_fault_where_the_specification_refuses_it",
    "test_metal_rans.py::test_whatever_the_ends_are_nothing_outside_is_read",
]

TESTS = {
    "RANS": RANS,
    "QMOE": QMOE,
    "QMOE_DENSE": QMOE_DENSE,
    "QMV": QMV,
    "ACTIVATE": ACTIVATE,
    "DENSE": DENSE,
    "ENCODE": ENCODE,
    "ROTATE": ROTATE,
}

# Why a surviving defect changes nothing.
HARMLESS: dict[str, str] = {}


@dataclass(frozen=True)
class Mutant:
    """`text` of kernels/<file>.metal becomes `replacement`; one of `tests` should fail then."""

    name: str
    file: str
    tests: tuple[str, ...]
    text: str
    replacement: str

    def apply(self, name: str, source: str) -> str:
        """The source of kernels/<name>.metal with the defect, if it is the file."""
        if name != self.file:
            return source
        if self.text not in source:
            raise ValueError(f"[mutants] {self.name}: the text to replace should be in {self.file}.metal and is not")
        return source.replace(self.text, self.replacement)


def read_mutants() -> Iterator[Mutant]:
    """The defects of metal_mutants.txt."""
    file, tests, entry = "", "", []
    for line in (Path(__file__).resolve().parent / "metal_mutants.txt").read_text().splitlines():
        if line.startswith("= "):
            file, tests = line[2:].split()
        elif line and not line.startswith("# "):
            entry.append(line if not entry else line[2:].replace("\\n", "\n"))
        if len(entry) == 3:
            yield Mutant(entry[0], file, tuple(TESTS[tests]), *entry[1:])
            entry = []


def forget_kernels() -> None:
    """metal.py and its siblings build their kernels anew."""
    for module in (metal, metal_encode, metal_qmoe, metal_rans):
        for build in (f for name, f in vars(module).items() if name.endswith("_kernel")):
            build.cache_clear()


def first_failure(tests: tuple[str, ...]) -> str:
    """Name of the first test that fails, or an empty text."""
    folder, out = Path(__file__).resolve().parent, io.StringIO()
    forget_kernels()
    with redirect_stdout(out), redirect_stderr(out):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(str(folder / t) for t in tests)])
    if code == pytest.ExitCode.OK:
        return ""
    lines = [line for line in out.getvalue().splitlines() if line.startswith(("FAILED", "ERROR"))]
    if code != pytest.ExitCode.TESTS_FAILED or not lines:
        raise RuntimeError(out.getvalue())
    return lines[0].split("::")[-1].split(" - ")[0]


def main(words: list[str]) -> int:
    """0 if at least 95 % of the defects are caught."""
    original = metal.source
    chosen = [m for m in read_mutants() if not words or any(w in m.name for w in words)]
    survivors = []
    for mutant in chosen:
        metal.source = lambda *names, m=mutant: "\n".join(m.apply(n, original(n)) for n in names)
        start = time.perf_counter()
        caught = first_failure(mutant.tests)
        if not caught:
            survivors.append(mutant.name)
        verdict = f"caught by {caught}" if caught else f"SURVIVED {HARMLESS.get(mutant.name, '')}"
        print(f"{mutant.name:36} {time.perf_counter() - start:5.1f} s  {verdict}", flush=True)
    metal.source = original
    caught_count = len(chosen) - len(survivors)
    print(f"{len(chosen)} defects, {caught_count} caught; survivors: {', '.join(survivors) or 'none'}")
    return int(caught_count < 0.95 * len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
