"""Damaged records through every Metal kernel in the emulator's check mode."""

import metal_cpu
import pytest
from abuse import fuzz_kernels
from abuse.fuzz_kernels import INSTANCES, KERNELS, Launches

from tiny_qmoe_mlx import native

pytestmark = [
    metal_cpu.required,
    pytest.mark.skipif(not native.available(), reason="the C++ library is not built"),
]
# Of one instance each, which takes longer to compile than to launch.
LAUNCHES = {name: 2 if name == "trellis_viterbi" else 100 for name in KERNELS}


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_outside_is_read_and_results_are_numpys(name):
    found = fuzz_kernels.fuzz(name, LAUNCHES[name], seed=1, instances=1)
    assert not found.wrong, "\n".join(found.wrong[:20])
    assert found.made == LAUNCHES[name] and found.compared >= found.made / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_every_instance(name):
    found = fuzz_kernels.fuzz(name, 10 * len(INSTANCES) if LAUNCHES[name] > 2 else 3, seed=2)
    assert not found.wrong, "\n".join(found.wrong[:20])


def test_a_wrong_result_and_a_read_outside_are_found(rng, monkeypatch):
    """Of a decoder that says something else, and of a table that leads out of the pool."""
    for module, name, kernel in (
        (fuzz_kernels.trellis, "decode_matrix", "trellis_dequantize"),
        (fuzz_kernels.qmoe, "decode_matrix", "qmoe_dequantize"),
        (fuzz_kernels.rans, "decode", "rans_decode"),
    ):
        decode = getattr(module, name)
        with monkeypatch.context() as m:
            m.setattr(module, name, lambda *args, decode=decode: 1 - decode(*args))
            assert "should be" in fuzz_kernels.fuzz(kernel, 4, instances=1).wrong[0]

    def silent(payload, count, where):
        raise fuzz_kernels.FormatError("damaged")

    with monkeypatch.context() as m:
        m.setattr(fuzz_kernels.rans, "decode", silent)
        assert "a damaged tile" in fuzz_kernels.fuzz("rans_decode", 4, instances=1).wrong[0]
    emulate = fuzz_kernels.metal_cpu.emulate

    def beyond(function, pool, table, *rest, **options):
        return emulate(function, pool, table + 10_000, *rest, **options)

    monkeypatch.setattr(fuzz_kernels.metal_cpu, "emulate", beyond)
    out = Launches()
    fuzz_kernels.dequantize(rng, out, INSTANCES[0])
    assert "pool" in out.wrong[0]
