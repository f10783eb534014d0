"""The defects that `make mutants` plants still have their place in the kernels, and tests that are there."""

import re
from pathlib import Path

import metal_mutants

TESTS = Path(__file__).parent


def test_every_defect_has_its_text_and_its_tests():
    found = list(metal_mutants.read_mutants())
    assert len(found) == len({mutant.name for mutant in found}) > 180
    for mutant in found:
        source = (TESTS.parent / "kernels" / f"{mutant.file}.metal").read_text()
        assert mutant.apply(mutant.file, source) != source, mutant.name
        for test in mutant.tests:
            file, name = re.fullmatch(r"(\w+\.py)::(\w+).*", test).groups()
            assert f"def {name}(" in (TESTS / file).read_text(), test
