from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.special import erf

from torch_rmt.theory import Activation, as_activation, gaussian_expectation, leaky_relu
from torch_rmt.theory.correlation import pair_expectation, value_pair
from torch_rmt.theory.gaussian import gaussian_rule
from torch_rmt.theory.isometry import shifted_relu
from torch_rmt.theory.moments import closed_moments

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


CLOSED = ["linear", "relu", leaky_relu(0.2), "abs", "erf", "scaled_erf", "gelu", "sin", "hard_tanh", "relu6",
          "hard_sigmoid", shifted_relu(0.7)]  # fmt: skip


@pytest.mark.parametrize("q", [1e-8, 1e-4, 0.02, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("activation", CLOSED, ids=lambda a: getattr(a, "name", str(a)))
def test_closed_moments_against_split_quadrature(activation: str | Activation, q: float) -> None:
    """Two derivations of every Gaussian moment that mean field uses."""
    phi = as_activation(activation)
    closed = closed_moments(phi)
    assert closed is not None

    def expect(function: Callable[[np.ndarray], np.ndarray]) -> float:
        return gaussian_expectation(function, q, phi.kinks)

    square, slope = expect(lambda h: phi.value(h) ** 2), expect(lambda h: phi.derivative(h) ** 2)
    assert closed.square(q) == pytest.approx(square, rel=1e-14)
    assert closed.square_slope(q) == pytest.approx(slope, rel=1e-14)
    assert closed.mean(q) == pytest.approx(expect(phi.value), abs=1e-14 * square**0.5)
    assert closed.mean_slope(q) == pytest.approx(expect(phi.derivative), abs=1e-14 * slope**0.5)
    rate = expect(lambda h: h * phi.value(h) * phi.derivative(h)) / q
    assert closed.square_rate(q) == pytest.approx(rate, abs=3e-15 * (square / q + slope))
    for c in (0.0, 0.05, 0.9, 0.999, 1.0):
        if phi.name == "sin" and q > 100:
            continue  # the pair quadrature does not resolve 10 periods a deviation; the closed form is the better one
        both = pair_expectation(phi.value, q, c, phi.kinks)
        # Slopes that jump limit the quadrature, not the closed form.
        both_slopes = pair_expectation(phi.derivative, q, c, phi.kinks)
        assert closed.pair(q, c) == pytest.approx(both, abs=1e-12 * square)
        assert closed.pair_slope(q, c) == pytest.approx(both_slopes, abs=1e-12 * slope)


@pytest.mark.parametrize("activation", CLOSED, ids=lambda a: getattr(a, "name", str(a)))
def test_closed_pairs_are_correlation_functions(activation: str | Activation) -> None:
    """At c = 1 the square, at c = 0 the squared mean, d/dc the pair of slopes (Price); at c < 0 too."""
    closed = closed_moments(as_activation(activation))
    assert closed is not None
    for q in (0.3, 5.0):
        assert closed.pair(q, 1.0) == pytest.approx(closed.square(q), rel=1e-14)
        assert closed.pair(q, 0.0) == pytest.approx(closed.mean(q) ** 2, abs=1e-14 * closed.square(q))
        assert closed.pair_slope(q, 0.0) == pytest.approx(closed.mean_slope(q) ** 2, abs=1e-14)
        for c in (-0.95, -0.4, 0.6):
            step = 1e-4
            change = (closed.pair(q, c + step) - closed.pair(q, c - step)) / (2 * step)
            assert q * closed.pair_slope(q, c) == pytest.approx(change, rel=1e-6, abs=1e-7)
            assert abs(closed.pair(q, c)) <= closed.square(q)
        grown = (closed.square(q * 1.0001) - closed.square(q * 0.9999)) / (2e-4 * q)
        assert closed.square_rate(q) == pytest.approx(grown, rel=1e-6, abs=1e-9)
        assert closed.pair(q, -1.0) == pytest.approx(closed.pair(q, -1.0 + 1e-12), abs=1e-6 * closed.square(q))


def test_where_a_closed_form_loses_its_digits_quadrature_takes_over() -> None:
    phi = as_activation("hard_tanh")
    closed = closed_moments(phi)
    assert closed is not None
    assert np.isnan(closed.pair(1e6, 0.5))
    # sign(u1) sign(u2) in the limit
    assert value_pair(phi, 1e6, 0.5) == pytest.approx(1 / 3, abs=2e-3)
    assert closed_moments(Activation("other", phi.value, np.ones_like, phi.kinks)) is None


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
