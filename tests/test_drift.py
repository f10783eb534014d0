"""Correction of down: against least squares written out, and where it must keep its hands off."""

import numpy as np
import pytest

from tiny_qmoe_mlx.conversion.drift import corrected_down, share_of_missing
from tiny_qmoe_mlx.conversion.feedback import clipped

WIDTH, D = 24, 16


def case(tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(down, hidden, rounded), float32."""
    rng = np.random.default_rng(seed)
    down = rng.standard_normal((D, WIDTH)).astype(np.float32)
    hidden = rng.standard_normal((tokens, WIDTH)).astype(np.float32)
    return down, hidden, (hidden + 0.3 * rng.standard_normal(hidden.shape)).astype(np.float32)


def ridge_by_stacking(inputs: np.ndarray, wanted: np.ndarray, penalty: float) -> np.ndarray:
    """The ridge as so many more observations of zero, by numpy's least squares: (d, w)."""
    zeros = np.zeros((inputs.shape[1], wanted.shape[1]))
    stacked = np.concatenate([inputs, penalty**0.5 * np.eye(inputs.shape[1])])
    return np.linalg.lstsq(stacked, np.concatenate([wanted, zeros]), rcond=None)[0].T


@pytest.mark.parametrize("tokens", [5, 23, 24, 400], ids=lambda n: f"{n} tokens")
def test_correction_is_the_ridge_regression(tokens):
    down, hidden, rounded = case(tokens)
    rng = np.random.default_rng(1)
    missing = rng.standard_normal((tokens, D)).astype(np.float32)
    router = rng.random(tokens).astype(np.float32)
    new, moment = corrected_down(down, hidden, rounded, missing, router, ridge=2.0, carried=0.5)
    inputs = (rounded * router[:, None]).astype(np.float64)
    wanted = 0.5 * missing + (hidden - rounded) @ down.T * router[:, None]
    penalty = 2.0 * WIDTH * clipped((inputs**2).mean(0)).mean()
    np.testing.assert_allclose(new - down, ridge_by_stacking(inputs, wanted, penalty), atol=1e-5)
    np.testing.assert_allclose(moment, inputs.T @ inputs, rtol=1e-4, atol=1e-5)


def test_many_tokens_recover_what_is_missing():
    down, hidden, _ = case(20000)
    lost = 0.1 * np.random.default_rng(2).standard_normal(down.shape).astype(np.float32)
    new, _ = corrected_down(down, hidden, hidden, hidden @ lost.T, carried=1.0)
    np.testing.assert_allclose(new, down + lost, atol=0.01)


def test_rounding_of_gate_and_up_is_made_up_for_on_other_tokens():
    down, hidden, rounded = case(4000)
    new, _ = corrected_down(down, hidden[:2000], rounded[:2000], None)
    before = np.square(hidden[2000:] @ down.T - rounded[2000:] @ down.T).sum()
    after = np.square(hidden[2000:] @ down.T - rounded[2000:] @ new.T).sum()
    assert after < 0.95 * before


def test_few_tokens_leave_down_nearly_as_it_is():
    tokens = 3
    down, hidden, rounded = case(tokens)
    missing = np.random.default_rng(3).standard_normal((tokens, D)).astype(np.float32)
    few, _ = corrected_down(down, hidden, rounded, missing)
    assert np.linalg.norm(few - down) < 0.02 * np.linalg.norm(down)


def test_no_tokens_and_no_router_weight_leave_down_alone():
    down, hidden, rounded = case(8)
    same, moment = corrected_down(down, hidden[:0], rounded[:0], np.zeros((0, D), np.float32))
    np.testing.assert_array_equal(same, down)
    assert moment.shape == (WIDTH, WIDTH) and not moment.any()
    same, _ = corrected_down(down, hidden, rounded, np.ones((8, D), np.float32), np.zeros(8, np.float32))
    assert np.isfinite(same).all()


def test_one_massive_activation_leaves_the_others_corrected():
    """One input 1,000 times the others' size must not become everyone's ridge."""
    down, hidden, _ = case(20000)
    lost = 0.1 * np.random.default_rng(4).standard_normal(down.shape).astype(np.float32)
    lost[:, 5] = 0
    hidden[7, 5] = 1e5
    new, _ = corrected_down(down, hidden, hidden, hidden @ lost.T, carried=1.0)
    np.testing.assert_allclose(new, down + lost, atol=0.02)


def test_shares_of_all_experts_sum_to_what_is_missing():
    rng = np.random.default_rng(5)
    chosen = np.stack([rng.permutation(6)[:2] for _ in range(50)])
    weight = rng.random((50, 2)).astype(np.float32)
    missing = rng.standard_normal((50, D)).astype(np.float32)
    total = np.zeros_like(missing)
    for expert in range(6):
        total[np.nonzero(chosen == expert)[0]] += share_of_missing(missing, chosen, weight, expert)
    np.testing.assert_allclose(total, missing, rtol=1e-5, atol=1e-6)


def test_share_goes_by_squared_router_weight():
    share = share_of_missing(np.ones((1, D), np.float32), np.array([[4, 2]]), np.array([[0.6, 0.2]]), 4)
    np.testing.assert_allclose(share, np.full((1, D), 0.9), rtol=1e-6)
