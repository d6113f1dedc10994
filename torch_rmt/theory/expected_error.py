"""How far one draw of a finite matrix lies from its limit law: the expected Kolmogorov distance, for `Prediction`."""

from __future__ import annotations

import numpy as np

from torch_rmt.measures.base import SpectralMeasure
from torch_rmt.theory.activation import Activation
from torch_rmt.theory.gaussian import gaussian_expectation

# Calibrated on drawn Gram matrices of |h| (1.6) and of GELU in two bands (1.3); see `quadratic_error`.
_QUADRATIC = 1.6
# within a band, closer towards its ends
_PLACES = 0.5 - 0.5 * np.cos(np.pi * (np.arange(14) + 0.5) / 14)


def rigid_error(count: int, dim: int | None = None) -> float:
    """log(count) / (pi dim): what `count` rigid eigenvalues among `dim` deviate by, the rest sitting on an atom.

    The counting function of a real symmetric matrix fluctuates as a log-correlated field, whose maximum is
    log(n)/pi. Drawn Wishart, Wigner and Gram matrices of 40 to 640 rows gave 0.24 to 0.36 in place of 1/pi (the step
    1/n of the staircase not counted).

    >>> round(rigid_error(400) * 400, 2)
    1.91
    """
    dim = count if dim is None else dim
    return float(min(1.0, np.log(max(count, 2)) / np.pi / dim))


def scale_error(law: SpectralMeasure, deviation: float) -> float:
    """What a common factor of relative standard deviation `deviation` moves F by: sqrt(2/pi) max |F(x e^d) - F(x)|.

    An atom away from zero that moves at all costs its whole mass.
    """
    return scale_or_shift_error(law, deviation, 0.0)


def scale_or_shift_error(law: SpectralMeasure, scale: float, shift: float) -> float:
    """The larger of what a common factor and a common shift move F by, of these standard deviations.

    As `scale_error`; for the shift at the mean absolute shift, any atom costing its mass. One call of F.
    """
    bands = law.support()
    if not bands or max(scale, shift) <= 0.0:
        return 0.0
    mean_modulus = float(np.sqrt(2.0 / np.pi))
    x = np.concatenate([low + (high - low) * np.concatenate([[0.0], _PLACES]) for low, high in bands])
    at_rest, scaled, shifted = np.split(
        law.cdf(np.concatenate([x, x * np.exp(scale), x + mean_modulus * shift])), [len(x), 2 * len(x)]
    )
    inner = np.tile(np.arange(len(_PLACES) + 1) > 0, len(bands))
    moved = [mean_modulus * np.abs(scaled - at_rest)[inner].max(), np.abs(shifted - at_rest).max()]
    if scale > 0.0:
        moved.append(sum(mass for place, mass in law.atoms() if place != 0.0))
    if shift > 0.0:
        moved.append(max((mass for _, mass in law.atoms()), default=0.0))
    return float(min(1.0, max(moved)))


def quadratic_share(phi: Activation, q: float) -> float:
    """Part of the nonlinear variance of phi(h), h ~ N(0, q), that is quadratic in h; z = h / sqrt(q).

    (E phi (z^2 - 1))^2 / 2 over Var phi - (E phi z)^2; zero for an odd or linear activation.
    """
    mean = gaussian_expectation(phi.value, q, phi.kinks)
    variance = gaussian_expectation(lambda h: (phi.value(h) - mean) ** 2, q, phi.kinks)
    linear = gaussian_expectation(lambda h: phi.value(h) * h, q, phi.kinks) / np.sqrt(q)
    second = gaussian_expectation(lambda h: phi.value(h) * (h**2 / q - 1.0), q, phi.kinks)
    rest = variance - linear**2
    return float(min(1.0, second**2 / (2.0 * rest))) if rest > 1e-9 * variance else 0.0


def quadratic_error(share: float, n_in: int, count: int, dim: int) -> float:
    """What the quadratic part of an activation adds: its n_in^2/2 features are many, but not infinitely many.

    1.6 share (count/n_in^2)(count/dim), `count` the number of nonzero eigenvalues among `dim`. The form is argued
    (the law of `count` vectors in n_in^2/2 dimensions), the constant calibrated.
    """
    return min(1.0, _QUADRATIC * share * count / n_in**2 * count / dim)
