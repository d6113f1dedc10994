from __future__ import annotations

import numpy as np
import pytest
from scipy.special import erf

from torch_rmt.theory import as_activation, gaussian_expectation
from torch_rmt.theory.correlation import pair_expectation
from torch_rmt.theory.gaussian import gaussian_rule

VARIANCES = [1e-8, 1e-3, 0.1, 1.0, 10.0, 1e3, 1e4]


@pytest.mark.parametrize("q", VARIANCES)
def test_closed_forms(q: float) -> None:
    relu, hard, smooth = (as_activation(n) for n in ("relu", "hard_tanh", "scaled_erf"))
    assert gaussian_expectation(lambda h: relu.value(h) ** 2, q, relu.kinks) == pytest.approx(q / 2, rel=1e-13)
    assert gaussian_expectation(lambda h: hard.derivative(h) ** 2, q, hard.kinks) == pytest.approx(
        erf(1 / np.sqrt(2 * q)), rel=1e-12
    )
    for k in (1, 2, 4):
        value = gaussian_expectation(lambda h, k=k: smooth.derivative(h) ** (2 * k), q)
        assert value == pytest.approx((1 + np.pi * k * q) ** -0.5, rel=1e-12)


@pytest.mark.parametrize("q", VARIANCES)
def test_rule_is_a_probability_with_gaussian_moments(q: float) -> None:
    h, weights = gaussian_rule(q)
    assert weights.min() > 0
    for k, moment in ((0, 1), (2, 1), (4, 3), (6, 15)):
        assert weights @ h**k == pytest.approx(moment * q ** (k / 2), rel=1e-12)


def test_an_undeclared_jump_is_found_by_bisection() -> None:
    value = gaussian_expectation(lambda h: (h > 0.3).astype(float), 1.0)
    assert value == pytest.approx(0.5 * (1 - erf(0.3 / np.sqrt(2))), abs=1e-11)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="variance"):
        gaussian_expectation(np.abs, -1.0)
    for growth in (1.0, 0.5):
        with pytest.raises(ValueError, match="diverges"):
            gaussian_expectation(lambda h, g=growth: np.exp(g * h * h), 1.0)


@pytest.mark.parametrize("c", [0.0, 0.3, 0.9, 0.999, 1 - 1e-6, 1.0])
@pytest.mark.parametrize("q", [1e-3, 1.0, 1e3])
def test_pairs_against_the_arc_functions(q: float, c: float) -> None:
    """Cho and Saul 2009 for ReLU, Williams 1997 for erf."""
    relu, smooth = as_activation("relu"), as_activation("erf")
    angle = np.arccos(c)
    exact = q * (np.sin(angle) + (np.pi - angle) * c) / (2 * np.pi)
    assert pair_expectation(relu.value, q, c, relu.kinks) == pytest.approx(exact, rel=1e-13)
    assert pair_expectation(relu.derivative, q, c, relu.kinks) == pytest.approx(
        (np.pi - angle) / (2 * np.pi), rel=1e-13
    )
    assert pair_expectation(smooth.value, q, c) == pytest.approx(
        2 / np.pi * np.arcsin(2 * q * c / (1 + 2 * q)), abs=1e-14
    )
