"""The C++ library under libFuzzer: what was found before is replayed, then some thousand new inputs each."""

import pytest
from abuse import fuzz_native, native_build, native_corpus

pytestmark = pytest.mark.skipif(
    bool(native_build.unavailable()), reason=native_build.unavailable() or "the fuzzers can be built"
)
# New inputs of each target: about a second on one core.
NEW = {
    "trellis": 20_000,
    "products": 10_000,
    "products_threads": 500,
    "qmoe": 6_000,
    "rans": 5_000,
    "affine": 10_000,
    "encoder": 20,
}


@pytest.mark.parametrize("name", native_build.TARGETS)
def test_no_input_breaks_the_library(tmp_path, name):
    inputs = fuzz_native.inputs(name, tmp_path / "inputs")
    count = len(list(inputs.iterdir()))
    found = fuzz_native.run(name, inputs, count + NEW[name])
    assert not found.crashes, found.output[-4000:]
    assert found.executions >= count + NEW[name] and found.features > 60


@pytest.mark.parametrize("source", native_corpus.MAKERS)
def test_seeds_are_sound(tmp_path, source):
    """Every one of them comes as far as the comparison, so none is refused for a slip in how it was written."""
    count = native_corpus.write(source, tmp_path)
    found = fuzz_native.run(source, tmp_path, 0)
    assert found.compared >= count, f"{found.compared} of {count} seeds were compared"
