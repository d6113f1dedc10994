"""The Hessian of one hidden layer (Pennington and Bahri 2017): H = H0 + H1, index and critical energy."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.optimize import brentq

from torch_rmt.measures.base import SpectralMeasure
from torch_rmt.theory.expected_error import rigid_error
from torch_rmt.theory.free_levy import FreeLevy
from torch_rmt.theory.prediction import Prediction
from torch_rmt.theory.sizes import one_of, whole_number

Residual = Literal["relu", "wigner"]


def gauss_newton_part(*, phi: float, scale: float = 1.0) -> FreeLevy:
    """H0: free Wishart, R(z) = scale / (1 - scale phi z); Marchenko-Pastur of ratio phi and variance scale."""
    _check(phi=phi, energy=0.0, scale=scale)
    return FreeLevy(jumps=((scale * phi, 1.0 / phi),))


def residual_part(*, phi: float, energy: float, residual: Residual = "relu") -> FreeLevy:
    """H1, weighted by the errors.

    ReLU structure: R(z) = energy phi z / (2 - energy phi^2 z^2); the off-diagonal product of two Wisharts' factors has
    symmetric jumps +-phi sqrt(energy/2), each of rate 1/(2 phi). Wigner: R(z) = 2 energy z.
    """
    _check(phi=phi, energy=energy, scale=1.0, residual=residual)
    if energy == 0.0:
        raise ValueError("at energy 0 the residual part vanishes; the Hessian is gauss_newton_part")
    if residual == "wigner":
        return FreeLevy(gaussian=2.0 * energy)
    size = phi * float(np.sqrt(0.5 * energy))
    return FreeLevy(jumps=((-size, 0.5 / phi), (size, 0.5 / phi)))


def hessian_law(*, phi: float, energy: float, scale: float = 1.0, residual: Residual = "relu") -> FreeLevy:
    """Law of H0 + H1, free: the R-transforms add, z = R0(G) + R1(G) + 1/G."""
    _check(phi=phi, energy=energy, scale=scale, residual=residual)
    wishart = gauss_newton_part(phi=phi, scale=scale)
    if energy == 0.0:
        return wishart
    other = residual_part(phi=phi, energy=energy, residual=residual)
    return FreeLevy(gaussian=other.gaussian, jumps=wishart.jumps + other.jumps)


def critical_energy(*, phi: float, scale: float = 1.0, residual: Residual = "relu") -> float:
    """Energy below which the Hessian has no negative eigenvalue in the limit, in closed form; 0 for phi >= 1.

    ReLU: scale^2 (27 - 18 c - c^2 + 8 c^(3/2)) / (32 phi (1 - phi)^3) with c = 1 + 16 phi - 8 phi^2.
    Wigner: scale^2 (1 - 20 phi - 8 phi^2 + (1 + 8 phi)^(3/2)) / 16.
    From z = 0 being the lower edge, i.e. z(G) = z'(G) = 0. At phi >= 1 the Wishart part is not positive definite, and
    any error makes saddles.

    >>> round(critical_energy(phi=1e-9, residual="wigner"), 6)        # H0 = identity, semicircle of radius 1
    0.125
    """
    _check(phi=phi, energy=0.0, scale=scale, residual=residual)
    if phi >= 1.0:
        return 0.0
    if residual == "wigner":
        # with y = sqrt(1 + 8 phi) the bracket factors, and nothing cancels as phi -> 1
        y = float(np.sqrt(1.0 + 8.0 * phi))
        return scale**2 * (3.0 - y) ** 3 * (1.0 + y) / 128.0
    c = 1.0 + 16.0 * phi - 8.0 * phi**2
    root = float(np.sqrt(c))
    # 27 - 18 c - c^2 + 8 c^(3/2) = (3 - root)^3 (1 + root), and 9 - c = 8 (1 - phi)^2: no cancellation at either end
    gap = 8.0 * (1.0 - phi) ** 2 / (3.0 + root)
    return scale**2 * gap**3 * (1.0 + root) / (32.0 * phi * (1.0 - phi) ** 3)


def critical_energy_numerical(*, phi: float, scale: float = 1.0, residual: Residual = "relu") -> float:
    """The same energy by bisection on the lower edge of the law: no formula, for comparison."""
    _check(phi=phi, energy=0.0, scale=scale, residual=residual)
    if phi >= 1.0:
        return 0.0

    def lower_edge(log_energy: float) -> float:
        return hessian_law(phi=phi, energy=float(np.exp(log_energy)), scale=scale, residual=residual).bounds()[0]

    low = float(np.log(1e-12 * scale**2 * (1.0 - phi) ** 4))
    return float(np.exp(brentq(lower_edge, low, np.log(8.0 * scale**2 * (1.0 + 1.0 / phi)), xtol=1e-14)))


def index(law: SpectralMeasure) -> float:
    """Fraction of negative eigenvalues: the mass of the law below zero."""
    low, _ = law.bounds()
    if low >= 0.0:
        return 0.0
    at_zero = sum(mass for location, mass in law.atoms() if location == 0.0)
    return max(0.0, float(law.cdf(np.array(0.0))) - at_zero)


def hessian_spectrum(
    *, phi: float, energy: float, scale: float = 1.0, residual: Residual = "relu", dim: int | None = None
) -> Prediction:
    """Predict the spectrum of the Hessian of a network with one hidden layer at a point of given error.

    Args:
        phi: parameters / data points; 2 n / m for n inputs, n hidden units, n outputs and m samples.
        energy: loss per output, half the mean square error (errors have variance 2 energy); >= 0.
        scale: mean eigenvalue of the Gauss-Newton part H0.
        residual: structure of H1: "relu" (products of errors and inputs) or "wigner" (independent entries).
        dim: number of parameters, if known: for the expected finite-size error.

    Returns:
        Prediction with scalars "index", "critical_energy", "mean", "largest_eigenvalue", "smallest_eigenvalue" and
        "max_stable_lr" = 2 / largest eigenvalue.

    Raises:
        ValueError: phi or scale not positive, energy negative, or dim below 1.

    Source: Pennington and Bahri 2017, sections 3 and 4; the critical energies from z = z' = 0.

    >>> hessian_spectrum(phi=0.25, energy=0.0).scalars["index"]
    0.0
    """
    _check(phi=phi, energy=energy, scale=scale, residual=residual)
    if dim is not None:
        dim = whole_number("dim, the number of parameters,", dim)
    law = hessian_law(phi=phi, energy=energy, scale=scale, residual=residual)
    low, high = law.bounds()
    return Prediction(
        measure=law,
        scalars={
            "index": index(law),
            "critical_energy": critical_energy(phi=phi, scale=scale, residual=residual),
            "mean": scale,
            "smallest_eigenvalue": low,
            "largest_eigenvalue": high,
            "max_stable_lr": 2.0 / high,
        },
        assumptions=(
            "one hidden layer, squared loss, widths and data large with parameters/data = phi",
            "the errors are independent Gaussians of variance 2 energy, independent of inputs and weights",
            "the Gauss-Newton part H0 is a Wishart matrix, free of the residual part H1",
            "H1 has the product structure of a ReLU layer"
            if residual == "relu"
            else "H1 is a Wigner matrix of variance 2 energy",
        ),
        reference="Pennington and Bahri 2017, Geometry of neural network loss surfaces, eqs. 16-22",
        finite_size_error=None if dim is None else rigid_error(dim),
    )


def _check(*, phi: float, energy: float, scale: float, residual: str = "relu") -> None:
    one_of("residual", residual, ("relu", "wigner"))
    if not (np.isfinite(phi) and phi > 0.0):
        raise ValueError(f"phi = parameters/data must be positive and finite, got {phi}")
    if not (np.isfinite(scale) and scale > 0.0):
        raise ValueError(f"scale, the mean eigenvalue of H0, must be positive and finite, got {scale}")
    if not (np.isfinite(energy) and energy >= 0.0):
        raise ValueError(f"energy is half a mean square error and cannot be negative, got {energy}")
