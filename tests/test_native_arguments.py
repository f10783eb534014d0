"""The C++ library's callers: wrong arguments, and a library that is missing."""

import numpy as np
import pytest
from records import pool_of, random_record

from tiny_qmoe_mlx import native
from tiny_qmoe_mlx.codecs import rotation

pytestmark = pytest.mark.skipif(not native.available(), reason="the C++ library is not built")


# ---- arguments


def test_wrong_arguments_are_refused_with_a_sentence(rng):
    record = random_record(rng, [(32, 64), (32, 64), (64, 32)])
    pool, _ = pool_of([record])
    x, zero = np.zeros((1, 64), np.float32), np.zeros(1, np.int64)
    row, sign = np.zeros(1, np.int32), rotation.signs(0, 0, 0, 64)
    tiles = np.zeros((1, 32, 16), np.float32)
    for call, word in [
        (lambda: native.encode_tiles(tiles, 0, 12), "rate"),
        (lambda: native.encode_tiles(tiles, 8, 12), "rate"),
        (lambda: native.encode_tiles(tiles, 1, 13), "length"),
        (lambda: native.encode_tiles(tiles[0], 1, 12), "shape"),
        (lambda: native.encode_tiles(tiles.astype(np.float64), 1, 12), "float32"),
        (lambda: native.encode_tiles(tiles * np.nan, 1, 12), "finite"),
        (lambda: native.check_record(pool, [], False), "shapes"),
        (lambda: native.dequantize(pool, 3, 0, 1), "matrices"),
        (lambda: native.dequantize(pool, 0, 0, 33), "rows"),
        (lambda: native.dequantize(pool, 0, 5, 5), "rows"),
        (lambda: native.dequantize(pool, 0, 0, 32, np.zeros((32, 65), np.float32)), "out"),
        (lambda: native.dequantize(np.zeros(256, np.uint8), 0, 0, 1), "damaged"),
        (lambda: native.gather_qmv(pool, zero - 1, 0, x, row, sign), "offsets"),
        (lambda: native.gather_qmv(pool, zero + pool.size, 0, x, row, sign), "offsets"),
        (lambda: native.gather_qmv(pool, zero, 0, x, row + 1, sign), "rows_of"),
        (lambda: native.gather_qmv(pool, zero, 0, x[:, :63], row, sign), "matrices"),
        (lambda: native.gather_qmv(pool, zero, 0, x, row, sign[:32]), "sign"),
        (lambda: native.gather_qmv(pool, zero, 2, x, row, sign), "matrices"),
        (lambda: native.gather_moe(pool, zero, x, row, sign, sign, "relu"), "activation"),
        (lambda: native.gather_moe(pool, zero, x, row, sign, sign, native.RELU2), "matrices"),
        (lambda: native.use_isa("sse9"), "sse9"),
        (lambda: native.set_threads(0), "count"),
    ]:
        with pytest.raises(ValueError, match=r"^\[native\.") as error:
            call()
        assert word in str(error.value)


def odd(array):
    """The same numbers at an odd address."""
    out = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    out[:] = array
    return out


def test_arrays_at_odd_addresses(rng):
    """C++ reads floats at their own alignment alone: such arrays are copied, and as `out` they are refused."""
    pool, _ = pool_of([random_record(rng, [(32, 64)])])
    x, sign = rng.standard_normal((2, 64)).astype(np.float32), rotation.signs(0, 0, 0, 64)
    where = np.zeros(2, np.int64), 0
    want = native.gather_qmv(pool, *where, x, np.arange(2, dtype=np.int32), sign)
    got = native.gather_qmv(odd(pool), *where, odd(x), odd(np.arange(2, dtype=np.int32)), odd(sign))
    np.testing.assert_array_equal(got, want)
    assert native._array("here", "x", odd(x), np.float32, (2, 64)).flags.aligned
    with pytest.raises(ValueError, match="aligned"):
        native.dequantize(pool, 0, 0, 32, odd(np.zeros((32, 64), np.float32)))


def test_a_library_that_is_missing_is_said_to_be_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_candidates", lambda: [tmp_path / "none.so"])
    native._library.cache_clear()
    try:
        assert not native.available()
        with pytest.raises(RuntimeError, match="C\\+\\+ library"):
            native.encode_tiles(np.zeros((1, 32, 16), np.float32), 1, 12)
    finally:
        native._library.cache_clear()
