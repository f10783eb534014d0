"""The quantizer: byte budgets, rates, error feedback, gains, and inputs that try to break it."""

import numpy as np
import pytest

from tiny_qmoe_mlx import native
from tiny_qmoe_mlx.codecs import rotation, trellis
from tiny_qmoe_mlx.conversion.feedback import block_order, columns_of, encode_stack, factor, rotated_hessian
from tiny_qmoe_mlx.conversion.quantize import ExpertInputs, blend, quantize_layer, token_weights
from tiny_qmoe_mlx.conversion.rates import (
    record_bytes_for,
)
from tiny_qmoe_mlx.errors import BudgetError

needs_library = pytest.mark.skipif(not native.available(), reason="the C++ library is not built")


def second_moment(rng: np.random.Generator, columns: int, tokens: int) -> np.ndarray:
    """Of correlated inputs with columns of unlike size, float32 (columns, columns)."""
    mix = np.linalg.qr(rng.standard_normal((columns, columns)))[0] * np.exp(rng.standard_normal(columns))[:, None]
    x = rng.standard_normal((tokens, columns)) @ mix
    return (x.T @ x / max(tokens, 1)).astype(np.float32)


def make_expert(rng: np.random.Generator, d: int, w: int, two: bool = False, bias: bool = False) -> ExpertInputs:
    shapes = [(w, d), (d, w)] if two else [(w, d), (w, d), (d, w)]
    weights = [(0.02 * rng.standard_normal(shape)).astype(np.float32) for shape in shapes]
    biases = [rng.standard_normal(rows).astype(np.float32) for rows, _ in shapes] if bias else None
    return ExpertInputs(weights, second_moment(rng, d, 3 * d), second_moment(rng, w, 3 * w), biases)


def signs_of(expert: ExpertInputs) -> tuple[np.ndarray, np.ndarray]:
    return rotation.signs(3, 0, 0, expert.weights[0].shape[1]), rotation.signs(3, 0, 1, expert.weights[-1].shape[1])


def dense_weights(record: trellis.Record, expert: ExpertInputs) -> list[np.ndarray]:
    """Matrices in model space by the numpy specification."""
    signs = signs_of(expert)
    sides = [signs[0]] * (len(expert.weights) - 1) + [signs[1]]
    return [
        rotation.unrotate(trellis.decode_matrix(m, record.length), sign)[: w.shape[0], : w.shape[1]]
        for m, sign, w in zip(record.matrices, sides, expert.weights, strict=True)
    ]


def round_trip(expert: ExpertInputs, bits: float, length: int = 12) -> tuple[list[np.ndarray], int, int]:
    """(matrices after pack and parse, bytes used, record bytes)."""
    shapes = [w.shape for w in expert.weights]
    size, _ = record_bytes_for(bits, shapes, 1, expert.biases is not None)
    (record,) = quantize_layer([expert], *signs_of(expert), size, length)
    data = trellis.pack(record, size)
    parsed = trellis.parse(data, shapes, expert.biases is not None, "test")
    return dense_weights(parsed, expert), int(data[8:12].view("<u4")[0]), size


def relative_error(w: np.ndarray, q: np.ndarray, h: np.ndarray) -> float:
    e = w.astype(np.float64) - q
    return float(np.trace(e @ h @ e.T) / np.trace(w @ h @ w.T))


# ---- linear algebra


def test_factor_reproduces_the_hessian():
    """|E A|^2 by feedback and block weights equals tr(E H E^T) computed directly."""
    rng = np.random.default_rng(2)
    h = second_moment(rng, 64, 500).astype(np.float64) + 0.1 * np.eye(64)
    feedback, weight = factor(h)
    e = rng.standard_normal((5, 64))
    own = e + e @ feedback  # what is left to each column group after what the earlier ones imply
    upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    total = 0.0
    for s in range(0, 64, 16):
        block = upper[s : s + 16, s : s + 16]
        np.testing.assert_allclose((block**2).sum(1), weight[s : s + 16])
        total += np.square(own[:, s : s + 16] @ block).sum()
    np.testing.assert_allclose(total, np.trace(e @ h @ e.T), rtol=1e-5)


def test_rotation_keeps_the_output_energy():
    rng = np.random.default_rng(3)
    w, h = rng.standard_normal((8, 100)), second_moment(rng, 100, 400)
    sign = rotation.signs(1, 2, 0, 100)
    rotated = rotation.rotate(w, sign)
    got = np.trace(rotated @ rotated_hessian(h, sign, damping=0) @ rotated.T)
    np.testing.assert_allclose(got, np.trace(w @ h @ w.T), rtol=1e-6)


def test_blocks_are_ordered_by_mean_diagonal():
    diagonal = np.repeat([1.0, 3.0, 2.0], 64)
    order = block_order(np.diag(diagonal))
    assert order.tolist() == [1, 2, 0]
    assert (np.diff(diagonal[columns_of(order)]) <= 0).all()


def test_blend_moves_from_the_layers_hessian_to_the_experts_own():
    own, layer = 4.0 * np.eye(64), 100.0 * np.eye(64)  # sums over 2 and 100 tokens: means 2 and 1
    np.testing.assert_allclose(blend(0 * own, 0, layer, 100)[0, 0], 1)
    np.testing.assert_allclose(blend(own, 2, layer, 100)[0, 0], (4 + 16) / (2 + 16))
    np.testing.assert_allclose(blend(1e6 * own, 2e6, layer, 100)[0, 0], 2, rtol=1e-4)
    assert np.isfinite(blend(0 * own, 0)).all()


def test_token_weights_follow_the_output_energy_up_to_a_limit():
    hidden = np.array([[1.0, 0], [0, 1.0], [1.0, 0], [0, 3.0], [1e9, 0]], np.float32)
    weights = token_weights(hidden, np.eye(2, dtype=np.float32))
    np.testing.assert_allclose(weights, [1, 1, 1, 9, 1000])
    assert (token_weights(np.zeros((4, 2)), np.eye(2)) == 1).all()


@needs_library
def test_feedback_lowers_the_output_error():
    """Against rounding each column group for itself, same encoder and rates: error by the definition tr(E H E^T)."""
    rng = np.random.default_rng(4)
    w = rng.standard_normal((1, 64, 256)).astype(np.float32)
    h = rotated_hessian(second_moment(rng, 256, 400), rotation.signs(0, 0, 0, 256))
    feedback, _ = factor(h)
    rates, gains = np.full((1, 4), 3, np.uint8), np.ones((1, 64), np.float32)
    errors = []
    for matrix in (feedback, np.zeros_like(feedback)):
        q = encode_stack(w, [matrix], rates, gains, 64, 12, native.encode_tiles).rounded[0]
        errors.append(relative_error(w[0], q, h))
    assert errors[0] < 0.7 * errors[1]


# ---- whole experts


@needs_library
@pytest.mark.parametrize("two", [False, True], ids=["gate-up-down", "fc1-fc2"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_record_is_filled_and_decodes_near_the_weights(two, bias):
    expert = make_expert(np.random.default_rng(5), 192, 128, two, bias)
    decoded, used, size = round_trip(expert, 2.0)
    largest_step = trellis.block_bytes(192, 1)
    assert size - largest_step < used <= size
    for q, w, h in zip(decoded, expert.weights, [expert.h_in] * (1 if two else 2) + [expert.h_mid], strict=True):
        assert relative_error(w, q, h) < 0.06  # observed 0.01 to 0.04; 2 bits of a Gaussian leave 0.078


@needs_library
def test_more_bits_leave_less_error():
    expert = make_expert(np.random.default_rng(6), 192, 192)
    sides = (expert.h_in, expert.h_in, expert.h_mid)
    errors = []
    for bits in (1.0, 1.5, 2.0, 3.0, 3.8):
        decoded, _, _ = round_trip(expert, bits)
        errors.append(sum(map(relative_error, expert.weights, decoded, sides)) / 3)
    # half a bit is a factor of 1.9 on a Gaussian source; from 3 to 3.8 bits 2.5
    assert all(b < 0.7 * a for a, b in zip(errors, errors[1:], strict=False)), errors


@needs_library
def test_quantizers_own_reconstruction_is_what_the_record_decodes_to():
    """Without row gains the matrix that error feedback saw is, bit for bit, the one that the specification decodes."""
    rng = np.random.default_rng(7)
    expert = ExpertInputs(
        [rng.standard_normal((64, 128)).astype(np.float32) for _ in range(2)], np.eye(128), np.eye(128)
    )
    expert.weights[1] = rng.standard_normal((64, 128)).astype(np.float32)
    sign = rotation.signs(3, 0, 0, 128)
    (record,) = quantize_layer([expert], sign, rotation.signs(3, 0, 1, 128), 128 + 2 * (128 + 64 * 128 // 4))
    m = record.matrices[0]
    assert m.row_gain is None
    h = rotated_hessian(np.eye(128), sign)
    columns = columns_of(m.order)
    feedback, _ = factor(h[np.ix_(columns, columns)])
    rotated = rotation.rotate(expert.weights[0], sign)[:, columns]
    ones = np.ones((1, 64), np.float32)

    own = encode_stack(rotated[None], [feedback], m.rates[None], ones, 64, 12, native.encode_tiles).rounded[0]
    np.testing.assert_array_equal(trellis.decode_matrix(m, 12)[:, columns], own)


@needs_library
@pytest.mark.parametrize("d, w", [(72, 40), (192, 97), (130, 65), (576, 64)])
def test_any_shape_by_padding(d, w):
    expert = make_expert(np.random.default_rng(8), d, w)
    decoded, used, size = round_trip(expert, 4.0)
    assert used <= size
    for q, matrix, h in zip(decoded, expert.weights, (expert.h_in, expert.h_in, expert.h_mid), strict=True):
        assert q.shape == matrix.shape
        assert relative_error(matrix, q, h) < 0.15  # 97 rows are stored as 128, 65 columns as 128: bits are lost there


@needs_library
def test_same_input_gives_the_same_bytes_alone_or_beside_others():
    rng = np.random.default_rng(9)
    experts = [make_expert(rng, 128, 64) for _ in range(4)]
    size, _ = record_bytes_for(1.5, [w.shape for w in experts[0].weights], 4)
    together = [trellis.pack(r, size) for r in quantize_layer(iter(experts), *signs_of(experts[0]), size)]
    alone = [trellis.pack(next(quantize_layer([e], *signs_of(e), size)), size) for e in experts]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a, b)


@needs_library
def test_down_is_what_down_inputs_says_of_the_rounded_gate_and_up():
    """The rounded matrices that it sees are those that the record holds; down then stands for its answer."""
    rng = np.random.default_rng(17)
    expert = make_expert(rng, 128, 192)
    other = make_expert(rng, 128, 192)
    seen = []

    def down_inputs(rounded: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        seen.extend(rounded)
        return other.weights[2], other.h_mid

    expert.down_inputs = down_inputs
    decoded, used, size = round_trip(expert, 2.0)
    assert used <= size
    for q, own in zip(decoded[:2], seen, strict=True):
        np.testing.assert_allclose(q, own, atol=1e-3 * np.abs(q).max())
    assert relative_error(other.weights[2], decoded[2], other.h_mid) < 0.06


@needs_library
def test_down_inputs_that_change_nothing_change_no_byte():
    expert = make_expert(np.random.default_rng(18), 128, 64)
    size, _ = record_bytes_for(1.5, [w.shape for w in expert.weights], 1)
    plain = trellis.pack(next(quantize_layer([expert], *signs_of(expert), size)), size)
    expert.down_inputs = lambda rounded: (expert.weights[2], expert.h_mid)
    np.testing.assert_array_equal(trellis.pack(next(quantize_layer([expert], *signs_of(expert), size)), size), plain)


@needs_library
def test_down_inputs_that_do_not_fit_are_refused():
    expert = make_expert(np.random.default_rng(19), 128, 64)
    expert.down_inputs = lambda rounded: (expert.weights[2], np.full((64, 64), np.nan))
    with pytest.raises(ValueError, match="expert 0: the Hessian of down should be finite"):
        next(quantize_layer([expert], *signs_of(expert), 1 << 14))


# ---- hostile input


@needs_library
@pytest.mark.parametrize(
    "kind", ["no tokens", "rank one", "massive activation", "zero weights", "tiny", "one huge row"]
)
def test_hostile_experts_give_finite_records(kind):
    rng = np.random.default_rng(10)
    expert = make_expert(rng, 128, 128)
    if kind == "no tokens":
        expert.h_in = expert.h_mid = np.zeros((128, 128), np.float32)
    if kind == "rank one":
        expert.h_in = expert.h_mid = np.ones((128, 128), np.float32)
    if kind == "massive activation":
        expert.h_mid[5, 5] = 768168 * np.median(np.diag(expert.h_mid))
    if kind == "zero weights":
        expert.weights = [0 * w for w in expert.weights]
    if kind == "tiny":
        expert.weights = [1e-5 * w for w in expert.weights]
    if kind == "one huge row":
        expert.weights[2][7] *= 1e4
    decoded, _, _ = round_trip(expert, 2.0)
    for q, w, h in zip(decoded, expert.weights, (expert.h_in, expert.h_in, expert.h_mid), strict=True):
        assert np.isfinite(q).all()
        if not w.any():
            np.testing.assert_allclose(q, 0, atol=1e-5)
        else:
            assert relative_error(w, q, h if h.any() else np.eye(128)) < 0.3


@needs_library
def test_massive_activation_leaves_the_other_inputs_their_precision():
    """One input of down 768,168 times the others took bits and damping away; the others must stay as good as 2 bits."""
    rng = np.random.default_rng(11)
    expert = make_expert(rng, 128, 128)
    plain = expert.h_mid.copy()
    expert.h_mid[5, 5] = 768168 * np.median(np.diag(plain))
    decoded, _, _ = round_trip(expert, 2.0)
    assert relative_error(expert.weights[2], decoded[2], plain) < 0.12


@pytest.mark.parametrize("what", ["weights", "Hessian", "bias"])
def test_values_that_are_not_finite_are_refused_by_name(what):
    expert = make_expert(np.random.default_rng(12), 64, 64, bias=True)
    {"weights": expert.weights[1], "Hessian": expert.h_mid, "bias": expert.biases[1]}[what].flat[3] = np.nan
    name = "down" if what == "Hessian" else "up"
    with pytest.raises(ValueError, match=f"expert 0: the {what} of {name} should be finite"):
        next(quantize_layer([expert], *signs_of(expert), 1 << 16))


def test_shapes_that_do_not_fit_are_refused():
    expert = make_expert(np.random.default_rng(13), 128, 64)
    expert.h_in = np.eye(64, dtype=np.float32)
    with pytest.raises(ValueError, match="expert 0: gate is"):
        next(quantize_layer([expert], *signs_of(expert), 1 << 16))


def test_record_without_room_for_gains_is_refused():
    expert = make_expert(np.random.default_rng(14), 128, 64)
    with pytest.raises(BudgetError, match="a record has 256"):
        next(quantize_layer([expert], *signs_of(expert), 256))
