"""The affine codec: codes kept bit for bit, hostile bytes, and models that compute what plain mlx-lm computes from the
same codes.
"""

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import stored

from tiny_qmoe_mlx import spec
from tiny_qmoe_mlx.codecs import affine
from tiny_qmoe_mlx.errors import FormatError

MODES = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
MODES += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
SHAPES = [(128, 256), (128, 256), (256, 128)]


def quantized(rng, rows, columns, mode, bits, group, dtype=mx.bfloat16):
    """MLX's arrays of a random matrix, by name."""
    w = mx.array(rng.normal(size=(rows, columns)).astype(np.float32)).astype(dtype)
    return dict(zip(("weight", "scales", "biases"), mx.quantize(w, group, bits, mode=mode), strict=False))


def packing_of(mode, bits, group, dtype="bfloat16", bias=None):
    return affine.Packing(mode, bits, group, dtype if mode == "affine" else "uint8", bias)


def make_record(rng, packing, shapes=SHAPES):
    matrices = []
    for (rows, columns), own in zip(shapes, packing, strict=True):
        arrays = stored(
            quantized(
                rng,
                rows,
                columns,
                own.mode,
                own.bits,
                own.group_size,
                mx.bfloat16 if own.scales == "uint8" else getattr(mx, own.scales),
            )
        )
        if own.bias:
            arrays["bias"] = stored({"b": mx.random.normal((rows,)).astype(getattr(mx, own.bias))})["b"]
        matrices.append(arrays)
    size = affine.layout(tuple(shapes), packing)[1] + 256
    return matrices, affine.pack(matrices, shapes, packing, size)


# ---- records


@pytest.mark.parametrize("mode, bits, group", MODES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_record_gives_back_every_bit_and_decodes_as_mlx_does(rng, mode, bits, group, dtype):
    packing = (packing_of(mode, bits, group, dtype),) * 3
    matrices, record = make_record(rng, packing)
    parsed = affine.parse(record, SHAPES, packing, "here")
    for arrays, matrix, (rows, columns) in zip(matrices, parsed, SHAPES, strict=True):
        assert sorted(arrays) == sorted(matrix.arrays)
        for name, array in arrays.items():
            assert array.dtype == matrix.arrays[name].dtype
            np.testing.assert_array_equal(array, matrix.arrays[name])
        floats = [affine.floats(arrays[n], dtype) for n in ("scales", "biases") if mode == "affine"]
        floats = floats or [arrays["scales"], None]
        parts = (mx.array(arrays["weight"]), *(None if a is None else mx.array(a) for a in floats))
        want = mx.dequantize(*parts, group, bits, mode, dtype=mx.float32)
        got = affine.decode_matrix(matrix)
        assert got.shape == (rows, columns) and got.dtype == np.float32
        np.testing.assert_allclose(got, np.array(want), rtol=0, atol=1e-6)  # a compiler may fuse scale * code + bias


def test_matrices_may_differ_and_have_biases(rng):
    packing = tuple(
        packing_of(*m, "float16", b) for m, b in zip(MODES[1:4], ("float32", "bfloat16", "float16"), strict=True)
    )
    matrices, record = make_record(rng, packing)
    for arrays, matrix in zip(matrices, affine.parse(record, SHAPES, packing, "here"), strict=True):
        np.testing.assert_array_equal(arrays["bias"], matrix.arrays["bias"])
    for parts in affine.layout(tuple(SHAPES), packing)[0]:
        assert all(part.offset % 128 == 0 for part in parts)


PACKING = (packing_of("affine", 4, 64, "float16", "float32"),) * 3
PLACES, USED = affine.layout(tuple(SHAPES), PACKING)


def at(matrix, name, byte, value):
    part = next(p for p in PLACES[matrix] if p.name == name)

    def change(data):
        data[part.offset + byte] = value

    return change


def header(byte, value, signed=True):
    def change(data):
        import xxhash

        data[byte] = value
        if signed:
            data[56:64].view("<u8")[0] = xxhash.xxh3_64_intdigest(data[:56].tobytes())

    return change


HOSTILE = {
    "magic": (header(0, 0), "header is damaged"),
    "hash": (header(20, 1, signed=False), "header is damaged"),
    "version": (header(4, 2), "received version 2 of codec 2"),
    "codec": (header(5, 1), "received version 1 of codec 1"),
    "matrices": (header(7, 2), "the config asks for matrices"),
    "used": (header(9, 0), "the config asks for matrices"),
    "flags": (header(12, 0), "the config asks for matrices"),
    "rows": (header(16, 7), "the config asks for matrices"),
    "columns": (header(32, 7), "the config asks for matrices"),
    "offset": (header(36, 7), "the config asks for matrices"),
    "Inf scale": (at(1, "scales", 1, 0x7C), "should make finite weights"),
    "NaN bias": (at(2, "biases", 3, 0x7F), "should make finite weights"),
    "NaN expert bias": (at(0, "bias", 3, 0x7F), "should make finite weights"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_bytes_are_refused(rng, what):
    change, message = HOSTILE[what]
    _, record = make_record(rng, PACKING)
    if what == "NaN expert bias":
        at(0, "bias", 2, 0xC0)(record)
    change(record)
    with pytest.raises(FormatError, match=rf"^\[there\] .*{message}"):
        affine.parse(record, SHAPES, PACKING, "there")


@pytest.mark.parametrize("mode, bits, group", MODES[-3:])
def test_small_floats_that_are_not_finite_are_refused(rng, mode, bits, group):
    packing = (packing_of(mode, bits, group),) * 3
    for value in (0x7F, 0xFF) if mode == "nvfp4" else (0xFF, 254):
        _, record = make_record(rng, packing)
        record[affine.layout(tuple(SHAPES), packing)[0][1][1].offset] = value
        with pytest.raises(FormatError, match="should make finite weights"):
            affine.parse(record, SHAPES, packing, "there")
    if mode == "mxfp8":
        _, record = make_record(rng, packing)
        record[affine.layout(tuple(SHAPES), packing)[0][0][0].offset] = 0x7F
        with pytest.raises(FormatError, match="should make finite weights"):
            affine.parse(record, SHAPES, packing, "there")


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=12), st.integers(0, USED + 300))
def test_any_bytes_are_refused_or_decode_to_finite_weights(changes, size):
    _, record = make_record(np.random.default_rng(0), PACKING)
    for place, value in changes:
        record[place if place < 100 else place * 97 % len(record)] = value
    try:
        parsed = affine.parse(record[:size], SHAPES, PACKING, "there")
    except FormatError as error:
        assert str(error).startswith("[there] ") and "\n" not in str(error)
        return
    for matrix in parsed:
        assert np.isfinite(affine.decode_matrix(matrix)).all()


def test_pack_refuses_other_arrays(rng):
    matrices, _ = make_record(rng, PACKING)
    with pytest.raises(ValueError, match="needs .* bytes but was given 1000"):
        affine.pack(matrices, SHAPES, PACKING, 1000)
    matrices[1]["scales"] = matrices[1]["scales"].astype(np.float32)
    with pytest.raises(ValueError, match="scales of matrix 1 should be float16"):
        affine.pack(matrices, SHAPES, PACKING, USED)


# ---- the config's words


LAYER = spec.LayerSpec(
    "model.layers.0.mlp.switch_mlp", 0, "model-experts-00000.safetensors", 3, -(-USED // 1024) * 1024,
    tuple((n, *s) for n, s in zip(("gate_proj", "up_proj", "down_proj"), SHAPES, strict=True)), True, PACKING,
)  # fmt: skip
MODEL = spec.ModelSpec(
    1, "affine", 4.5, 1024, 0, 0, (LAYER,), {"model": "x", "revision": None}, {"source": "none", "tokens": 0}
)


def test_the_config_says_all_of_it():
    words = json.loads(json.dumps(MODEL.to_dict()))
    assert spec.ModelSpec.from_dict(words) == MODEL
    assert words["layers"][0]["packing"][0] == {
        "mode": "affine", "bits": 4, "group_size": 64, "scales": "float16", "bias": "float32",
    }  # fmt: skip


WRONG = [
    (("packing", 0, "mode"), "q4", "mode should be one of"),
    (("packing", 0, "mode"), ["affine"], "mode should be one of"),
    (("packing", 1, "bits"), 7, "bits of mode affine should be one of"),
    (("packing", 1, "bits"), True, "bits of mode affine should be one of"),
    (("packing", 1, "bits"), 4.0, "bits of mode affine should be one of"),
    (("packing", 2, "group_size"), 48, "group_size of mode affine should be one of"),
    (("packing", 2, "scales"), "uint8", "scales of mode affine should be one of"),
    (("packing", 0, "mode"), "mxfp4", "group_size of mode mxfp4"),
    (("packing", 0, "bias"), None, "should have a bias type"),
    (("packing", 0, "bias"), "int8", "bias should be one of"),
    (("packing", 0, "bias"), {}, "bias should be one of"),
    (("packing",), [], "a packing unless codec is trellis or qmoe"),
    (("packing",), None, "packing should be a list"),
    (("packing",), [3], "packing should be an object with"),
    (("packing",), [{"mode": "affine"}], "packing should be an object with"),
    (("packing",), [MODEL.to_dict()["layers"][0]["packing"][0]], "should have one per matrix"),
    (("record_bytes",), 1024, "record_bytes of .* should be at least"),
    (("matrices",), [[n, 96, 96] for n in ("gate_proj", "up_proj", "down_proj")], "columns should be a multiple of 64"),
    (("bias",), False, "should have a bias type: False"),
]  # fmt: skip


@pytest.mark.parametrize("place, value, message", WRONG)
def test_wrong_words_are_refused(place, value, message):
    words = json.loads(json.dumps(MODEL.to_dict()))
    inner = words["layers"][0]
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(FormatError, match=message):
        spec.ModelSpec.from_dict(words)


def test_codec_and_packing_belong_together():
    with pytest.raises(FormatError, match="length and seed of codec affine should be 0"):
        dataclasses.replace(MODEL, length=12)
    with pytest.raises(FormatError, match="a packing unless codec is trellis or qmoe"):
        dataclasses.replace(MODEL, codec="trellis", length=12)
