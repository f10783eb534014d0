"""The C++ library under libFuzzer: what was found before is replayed, then some thousand new inputs each."""

import shutil

import pytest
from abuse import fuzz_native, native_build, native_corpus

pytestmark = pytest.mark.skipif(
    bool(native_build.unavailable()), reason=native_build.unavailable() or "the fuzzers can be built"
)
# New inputs of each target: half a second on one core.
NEW = {
    "trellis": 10_000,
    "products": 4_000,
    "products_threads": 300,
    "qmoe": 3_000,
    "rans": 2_000,
    "affine": 5_000,
    "encoder": 10,
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


# Target, file, what stands there, what is planted instead.
DEFECTS = [
    ("trellis", "record.cpp", "start + padded / kRowTile * 4 * words > size", "start > size"),
    ("trellis", "record.cpp", "block_place(m, b) >= m.blocks", "block_place(m, b) > m.blocks"),
    ("trellis", "record.cpp", "used > size ||", "used > size + 128 ||"),
    ("trellis", "record.cpp", "if (seen[block_place(m, b)]) return false;", ""),
    ("trellis", "record.cpp", "if (whole && hash_header(data)", "if (false && hash_header(data)"),
    ("trellis", "api.cpp", "row_stop > m.padded_rows", "row_stop > m.padded_rows + 32"),
    ("products", "moe.cpp", "g.rows_of[p] >= g.tokens", "g.rows_of[p] > g.tokens"),
    ("products", "moe.cpp", "m.rows != rows || m.columns != g.columns", "m.rows != rows"),
    ("products", "moe.cpp", "r.matrix[down_].columns == middle_ && ", ""),
    ("products", "moe.cpp", "* gain + bias", "* gain"),
    ("products", "moe.cpp", "hadamard_size(padded_middle_)", "64"),
    ("qmoe", "qmoe.cpp", "if (column >= m.columns) return false;", "if (column > m.columns) return false;"),
    ("qmoe", "qmoe.cpp", "code >= m.entries", "code > m.entries"),
    ("qmoe", "qmoe.cpp", "begin > end || end > m.codewords", "begin > end"),
    ("qmoe", "qmoe.cpp", "at >= m.columns && at <= m.reach", "at >= m.columns"),
    ("rans", "rans.cpp", "if (end < before) return false;", ""),
    ("rans", "rans.cpp", "if (word == stop) return false;", ""),
    ("rans", "rans.cpp", "stop - word >= 2 * kLanes", "stop - word >= 0"),
    ("rans", "rans.cpp", "return lane == kLow;", "return lane >= kLow;"),
    ("affine", "affine.cpp", "std::min(job.rows, (part + 1) * kRowsAtOnce)", "(part + 1) * kRowsAtOnce"),
    ("encoder", "encoder.cpp", "(p * step / 8 + i) % size", "p * step / 8 + i"),
]


@pytest.mark.slow
@pytest.mark.parametrize("target, file, text, planted", DEFECTS)
def test_a_planted_defect_is_found(tmp_path, monkeypatch, target, file, text, planted):
    library = shutil.copytree(native_build.LIBRARY, tmp_path / "library")
    source = (library / file).read_text()
    assert text in source
    (library / file).write_text(source.replace(text, planted))
    monkeypatch.setattr(fuzz_native, "CRASHES", tmp_path / "crashes")
    inputs = fuzz_native.inputs(target, tmp_path / "inputs")
    found = fuzz_native.run(target, inputs, 200_000, program=native_build.build(target, library=library))
    assert found.crashes, f"not found in {found.executions} executions"
