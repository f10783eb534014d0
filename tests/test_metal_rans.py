"""rANS on a GPU: the kernel in the emulator, bit for bit the numpy decoder, whatever a payload holds; and models whose
layers are expanded by it.
"""

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest
import source_layouts
import tiny_models

from tiny_qmoe_mlx import coded_gpu, container, metal, metal_rans, models, native, ops, rans_probe
from tiny_qmoe_mlx.codecs import affine, packed, rans
from tiny_qmoe_mlx.conversion import run as conversion
from tiny_qmoe_mlx.conversion.settings import Settings
from tiny_qmoe_mlx.errors import FormatError

pytestmark = metal_cpu.required
TOKENS = np.random.default_rng(1).integers(0, 256, (1, 9))
UNIFORM = 1e9


def noise(rng, count, sigma):
    if sigma == UNIFORM:
        return rng.integers(0, 256, count, np.uint8)
    return np.clip(np.rint(rng.normal(128, sigma, count)), 0, 255).astype(np.uint8)


class Payload:
    """Coded symbols in a pool, which ends where the payload does."""

    def __init__(self, symbols, base=128, at=48):
        self.count, self.base, self.at = len(symbols), base, at
        self.bytes = rans.encode(symbols).pack()
        self.pool = np.concatenate([np.full(base + at, 0xA5, np.uint8), self.bytes])
        self.coded = rans.parse(self.pool[base + at :], self.count, "here")

    def decode(self, pool):
        return list(metal_rans.decode(pool, self.base, self.at, len(self.bytes), self.coded, self.count))

    def run(self, mode="check", **options):
        """(bytes, tiles that are damaged, the emulator's report)."""
        (out, faults), report = metal_cpu.emulate(self.decode, self.pool, mode=mode, **options)
        return np.array(out), np.array(faults), report

    def part(self, name):
        """Ends, states or words, as a view of the pool's bytes that may be written to."""
        tiles, words = len(self.coded.ends), len(self.coded.words)
        start = {"words": 2 * words, "states": 2 * words + 128 * tiles, "ends": 2 * words + 132 * tiles}[name]
        size = {"words": 2 * words, "states": 128 * tiles, "ends": 4 * tiles}[name]
        data = self.pool[len(self.pool) - start : len(self.pool) - start + size]
        return data.view("<u2" if name == "words" else "<u4")


@pytest.mark.parametrize("count", [1, 31, 32, 33, 1000, 65536, 65537, 5 * 65536 + 77])
@pytest.mark.parametrize("sigma", [0.0, 0.4, 20.0, UNIFORM])
def test_the_bytes_of_the_specification(rng, count, sigma):
    """One symbol, few, many and all; less than a step, less than a tile, and more tiles than a threadgroup takes."""
    payload = Payload(noise(rng, count, sigma))
    out, faults, report = payload.run()
    assert not report.problems and not faults.any(), report
    np.testing.assert_array_equal(out, rans.decode(payload.coded, count, "here"))


@pytest.mark.parametrize("seed", [1, 2])
def test_lanes_and_simdgroups_in_any_order(rng, seed):
    payload = Payload(noise(rng, 70000, 20.0))
    out, faults, report = payload.run(seed=seed)
    assert not report.problems and not faults.any(), report
    np.testing.assert_array_equal(out, rans.decode(payload.coded, payload.count, "here"))


@pytest.mark.parametrize(("base", "at"), [(0, 0), (4096 - 128, 16), (24 + 4, 32)])
def test_payloads_begin_anywhere(rng, base, at):
    payload = Payload(noise(rng, 500, 9.0), base, at)
    out, _, report = payload.run()
    assert not report.problems, report
    np.testing.assert_array_equal(out, rans.decode(payload.coded, 500, "here"))


def test_a_payload_beyond_4_gib_of_the_pool(rng):
    payload, far = Payload(noise(rng, 500, 9.0), 0, 0), (4 << 30) + 16 * 77
    pool = np.zeros((4, (far + len(payload.bytes)) // 4 + 1), np.uint8)  # pages that were never written take no memory
    pool.reshape(-1)[far : far + len(payload.bytes)] = payload.bytes

    def decode(pool):
        return list(metal_rans.decode(pool, 0, far, len(payload.bytes), payload.coded, 500))

    (out, faults), report = metal_cpu.emulate(decode, pool, mode="run")
    assert not report.problems and not np.array(faults).any(), report
    np.testing.assert_array_equal(np.array(out), rans.decode(payload.coded, 500, "here"))


@pytest.mark.parametrize("count", [1, 3 * 65536])
def test_address_spaces(rng, count):
    payload = Payload(noise(rng, count, 9.0))
    assert not metal_cpu.emulate(payload.decode, payload.pool, mode="as")[1].problems


def test_issue_slots_of_a_byte(rng):
    """By the emulator's model, not a time; seen: 60, of which 14 are look-ups in threadgroup memory."""
    payload = Payload(noise(rng, 8 * 65536, 20.0))
    _, _, report = payload.run(mode="profile")
    assert 32 * report.profile.issue_slots / payload.count <= 62
    pool = report.profile.buffers["pool"]
    assert pool.lines <= 1.01 * len(payload.pool) + 64 and report.profile.lane_efficiency >= 0.9


# ---- damage


def change(rng, payload, part):
    """Some words of a part replaced, in a way that `rans.parse` may or may not refuse."""
    data = payload.part(part)
    where = rng.integers(0, len(data), rng.integers(1, 4))
    data[where] = (
        rng.choice([0, 1, 65535, rng.integers(0, 65536)], len(where))
        if part == "words"
        else rng.choice([0, 65535, 65536, 2**31, 2**32 - 1, int(rng.integers(0, 2**32))], len(where))
    )


@pytest.mark.parametrize("part", ["states", "words"])
@pytest.mark.parametrize("seed", range(6))
def test_damage_is_a_fault_where_the_specification_refuses_it(part, seed):
    rng = np.random.default_rng(seed)
    payload = Payload(noise(rng, [200, 65536 + 200][seed % 2], 12.0))
    change(rng, payload, part)
    out, faults, report = payload.run()
    assert not report.problems, report
    coded = rans.parse(payload.pool[payload.base + payload.at :], payload.count, "here")
    try:
        want = rans.decode(coded, payload.count, "here")
    except FormatError:
        assert faults.any()
    else:
        assert not faults.any()
        np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("lane", [0, 7, 31])
def test_a_lane_that_ends_elsewhere_is_a_fault(lane):
    """With one symbol alone a state stays what it is: all words are taken, and the lane is not where coding began."""
    payload = Payload(np.full(32, 9, np.uint8))
    payload.part("states")[lane] += np.uint32(5)
    _, faults, report = payload.run()
    assert not report.problems and faults.tolist() == [1], report


def test_a_lane_that_begins_too_low_is_a_fault():
    """It takes the word that brings it to where coding began, and nothing else is wrong with it."""
    payload = Payload(np.full(32, 9, np.uint8))
    payload.bytes = np.append(payload.bytes, np.zeros(2, np.uint8))
    payload.pool = np.append(payload.pool, np.zeros(2, np.uint8))
    data = payload.pool[payload.base + payload.at :]
    start = len(data) - 2 - 128 - 4
    data[start : start + 4].view("<u4")[0] = 1
    data[start + 4 : start + 8].view("<u4")[0] = 1
    payload.coded = rans.parse(data, 32, "here")
    with pytest.raises(FormatError, match="lanes should begin at 65536 or more"):
        rans.decode(payload.coded, 32, "here")
    _, faults, report = payload.run()
    assert not report.problems and faults.tolist() == [1], report


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_ends_are_nothing_outside_is_read(seed):
    """Ends that run backwards or past the payload; `rans.parse` refuses these, the kernel does not rely on it."""
    rng = np.random.default_rng(seed)
    payload = Payload(noise(rng, 2 * 65536 + 50, 12.0))
    before = payload.part("ends").copy()
    change(rng, payload, "ends")
    _, faults, report = payload.run()
    assert not report.problems, report
    moved = np.flatnonzero(payload.part("ends") != before)
    assert faults[moved].all() and len(moved)


def test_a_tile_that_ends_early_or_late_is_a_fault(rng):
    for step in (np.uint32(2**32 - 1), np.uint32(1)):
        payload = Payload(noise(rng, 2 * 65536, 12.0))
        payload.part("ends")[:1] += step
        _, faults, report = payload.run()
        assert not report.problems, report
        assert faults.tolist() == [1, 1]
        payload.coded = rans.parse(payload.pool[payload.base + payload.at :], payload.count, "here")
        with pytest.raises(FormatError, match="words end (early|late)"):
            rans.decode(payload.coded, payload.count, "here")


def test_a_plane_of_too_many_bytes_and_an_odd_place_are_refused(rng):
    payload = Payload(noise(rng, 50, 9.0))
    for at, count in ((8, 50), (16, 1 << 31)):
        with pytest.raises(ValueError, match="less than 2147483648 bytes and begin at a multiple of 16"):
            metal_rans.decode(mx.array(payload.pool), 0, at, len(payload.bytes), payload.coded, count)


# ---- records


PACKINGS = {
    **{f"affine {bits}": affine.Packing("affine", bits, 32, "bfloat16") for bits in (2, 3, 4, 5, 6, 8)},
    "affine float32": affine.Packing("affine", 4, 64, "float32"),
    "mxfp4": affine.Packing("mxfp4", 4, 32, "uint8"),
    "bfloat16": affine.Packing("plain", 16, 0, "bfloat16"),
    "float32": affine.Packing("plain", 32, 0, "float32"),
    "levels": affine.Packing("levels", 8, 128, "float16"),
    "levels, one scale": affine.Packing("levels", 8, 0, "float32"),
}


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("shape", [(24, 192), (96, 64)])
def test_planes_are_joined_as_the_specification_does(rng, name, shape):
    """Every array of every packing, its planes from the host; sizes are not multiples of anything but a row's."""
    own = PACKINGS[name]
    for part in affine.layout((shape,), (own,))[0][0]:
        raw = rng.integers(0, 256, part.size, np.uint8).view(affine.storage(part.dtype)).reshape(part.shape)
        got = coded_gpu.join([mx.array(p) for p in packed.split(raw, own)], part, own)
        assert got.dtype == getattr(mx, part.dtype)
        bits = {2: mx.uint16, 4: mx.uint32}.get(got.dtype.size, got.dtype)
        np.testing.assert_array_equal(np.array(got.view(bits)), raw.view(np.array(mx.zeros(1, bits)).dtype))


def clear():
    metal_rans._kernel.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Coded layers are expanded by the kernel, in the emulator, where it is switched on."""
    clear()
    with metal_cpu.emulated_kernels("run") as report:
        yield lambda on: monkeypatch.setattr(ops, "on_gpu", lambda: on)
    assert not report.problems, report
    clear()


def llama(root):
    directory = tiny_models.make_checkpoint(root / "hf", "llama")
    return source_layouts.rewrite(directory, lambda w: {n: a.astype(mx.bfloat16) for n, a in w.items()})


SOURCES = {
    "levels, 128 columns": (Settings(codec="tiny-qmoe", group=128, coder="rans", rest_bits=16), None),
    "levels, a matrix": (Settings(codec="tiny-qmoe", group=0, coder="rans", rest_bits=16), None),
    "levels, tuples": (Settings(codec="tiny-qmoe", group=128, coder="tuples", rest_bits=16), None),
    "bfloat16": (Settings(codec="lossless"), None),
    "3 bits": (Settings(codec="lossless"), ("affine", 3, 32)),
    "mxfp4": (Settings(codec="lossless"), ("mxfp4", 4, 32)),
}


@pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
@pytest.mark.parametrize("name", SOURCES)
def test_a_model_computes_on_a_gpu_what_it_does_on_the_cpu(tmp_path, gpu, name):
    settings, quantization = SOURCES[name]
    source = llama(tmp_path)
    if quantization:
        source = source_layouts.quantize_with_mlx(source, *quantization)
    directory = conversion.convert(source, tmp_path / "out", settings)
    with models.load(directory, context=64)[0] as model:
        want = np.array(model(mx.array(TOKENS)))
        gpu(True)
        np.testing.assert_array_equal(np.array(model(mx.array(TOKENS))), want)
        layers = len(model.tiny_qmoe.cache.pool_of_layer)
        assert model.tiny_qmoe.dispatch.counts == {"layers expanded": layers, "layers expanded metal": layers}


@pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
def test_damage_in_the_pool_never_becomes_a_weight(tmp_path, gpu):
    """The record was sound when it was read; then its memory was written to."""
    directory = conversion.convert(llama(tmp_path), tmp_path / "out", Settings(codec="lossless"))
    with models.load(directory, context=64)[0] as model:
        gpu(True)
        pool, spec = model.tiny_qmoe.cache.pool_of_layer[1], container.open_model(directory).spec.layers[1]
        record = pool.slot(pool.slot_of[1, 0])[: spec.record_bytes]
        plane = next(p for p in packed.parse(record, spec.shapes, spec.packing, "here") if p.coded is not None)
        plane.coded.words[5] ^= 1
        with pytest.raises(FormatError, match="tiles of coded bytes are damaged"):
            mx.eval(model(mx.array(TOKENS)))


def test_the_emulated_gpu_passes_the_check_at_load_and_a_wrong_one_does_not(gpu, monkeypatch):
    gpu(True)
    assert rans_probe.error() == 0
    models.check_gpu_rans()
    table = metal_rans.table
    monkeypatch.setattr(metal_rans, "table", lambda frequencies: table(np.roll(frequencies, 1)))
    with pytest.raises(ValueError, match=r"\[gpu\] coded bytes should be decoded"):
        models.check_gpu_rans()


def test_the_cpus_decoder_passes_too():
    assert not metal.available() and rans_probe.error() == 0
