from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tests.cases import ACTIVATIONS
from torch_rmt.theory import Activation, as_activation, gaussian_expectation, leaky_relu
from torch_rmt.theory.contour import contour


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_integrates_to_the_value(name: str) -> None:
    phi = as_activation(name)
    nodes, weights = np.polynomial.legendre.leggauss(30)
    edges = np.unique(np.concatenate([np.linspace(-9, 9, 37), phi.kinks]))
    for low, high in pairwise(edges):
        x = (low + high) / 2 + (high - low) / 2 * nodes
        integral = (high - low) / 2 * weights @ phi.derivative(x)
        change = phi.value(np.array(high)) - phi.value(np.array(low))
        assert integral == pytest.approx(float(change), abs=2e-13)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_callable_gets_the_same_kinks_and_derivative(name: str) -> None:
    phi = as_activation(name)
    numeric = as_activation(lambda h: phi.value(h))
    assert numeric.kinks == pytest.approx(phi.kinks, abs=1e-8)
    points = np.linspace(-12, 12, 801) + 0.00123
    np.testing.assert_allclose(numeric.derivative(points), phi.derivative(points), atol=2e-11)


def test_kinks_off_any_grid_are_found() -> None:
    at = (-np.sqrt(2), 0.1234567, np.pi)
    phi = as_activation(lambda h: sum(np.abs(h - k) for k in at) + np.sin(h))
    assert phi.kinks == pytest.approx(at, abs=1e-10)


@pytest.mark.parametrize(("q", "order"), [(0.7, 20), (0.01, 8), (1.0, 8), (300.0, 8)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_complex_derivative_is_the_analytic_continuation(name: str, q: float, order: int) -> None:
    """The path that the Jacobian law integrates along must give the moments of the real axis."""
    phi = as_activation(name)
    path = contour(phi, q, order=order)
    if phi.slopes() is not None:
        return
    assert path is not None, f"{name} has no complex derivative"
    _, s, weights = path
    for k in (1, 2):
        direct = gaussian_expectation(lambda h, k=k: phi.derivative(h) ** (2 * k), q, phi.kinks)
        assert weights @ s**k == pytest.approx(direct, rel=1e-11 if order == 20 else 1e-7)
    assert s.imag.max() <= 1e-9 * np.abs(s).max()


def test_names_are_forgiving_and_refusals_helpful() -> None:
    assert as_activation("LeakyReLU").name == "leaky_relu"
    assert as_activation("Swish").name == "silu"
    phi = as_activation("tanh")
    assert as_activation(phi) is phi
    with pytest.raises(ValueError, match="relu"):
        as_activation("relo")
    with pytest.raises(TypeError, match="callable"):
        as_activation(3)
    with pytest.raises(ValueError, match="jumps"):
        as_activation(np.sign)
    with pytest.raises(TypeError, match="elementwise"):
        as_activation(lambda h: np.asarray(h).sum())
    with pytest.raises(ValueError, match="finite"):
        leaky_relu(np.inf)


def test_piecewise_linear_is_recognised() -> None:
    assert as_activation("hard_tanh").slopes() == (0.0, 1.0, 0.0)
    assert as_activation("erf").slopes() is None
    assert isinstance(leaky_relu(0.3), Activation)
    assert leaky_relu(0.3).slopes() == (0.3, 1.0)
