"""The Fisher information matrix of one hidden layer (Pennington and Worah 2018)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.special import ellipe, ellipk

from torch_rmt.theory.activation import as_activation
from torch_rmt.theory.fisher_law import FisherLaw
from torch_rmt.theory.gaussian import gaussian_expectation
from torch_rmt.theory.gram import nonlinear_moments
from torch_rmt.theory.prediction import Prediction
from torch_rmt.theory.sizes import whole_number


def fisher_law(activation: object) -> FisherLaw:
    """The law of the Fisher matrix of x -> W2 phi(W1 x), all widths n, entries of W of variance 1/n, x ~ N(0, I)."""
    phi = as_activation(activation)
    moments = nonlinear_moments(phi, 1.0)
    slope = gaussian_expectation(phi.derivative, 1.0, phi.kinks)
    eta_prime = gaussian_expectation(lambda h: phi.derivative(h) ** 2, 1.0, phi.kinks)
    if abs(slope**2 - moments.zeta) > 1e-6 * max(moments.zeta, 1e-6 * moments.eta):
        raise ValueError(f"E phi' and E Z phi disagree for {phi.name}: it jumps, and its gradient misses that")
    # eta' >= (E phi')^2 with equality for a linear activation only: keep rounding out of it
    return FisherLaw(
        eta=moments.eta,
        eta_prime=max(eta_prime, moments.zeta) if moments.eta > moments.zeta else moments.zeta,
        zeta=moments.zeta,
    )


def linear_fisher_density(x: ArrayLike) -> Float[np.ndarray, "..."]:
    """Density of the continuous half for a linear network, (1/2) MP(1) * MP(1), by complete elliptic integrals.

    With h = x/2 and c = 4 - h: c E(h^2/c^2) / (4 pi^2) for x <= 4 and h [E(m) - (1 - m) K(m)] / (4 pi^2), m = c^2/h^2,
    for 4 <= x <= 8 (E, K of the parameter m = k^2). Mass 1/2; the other half is an atom at zero.

    >>> float(linear_fisher_density(0.0)) == 0.5 / np.pi
    True
    """
    point = np.asarray(x, dtype=float)
    inside = (point >= 0.0) & (point <= 8.0)
    h = np.where(inside, 0.5 * point, 1.0)
    c = 4.0 - h
    small = np.minimum(h, c)
    large = np.maximum(h, c)
    m = (small / large) ** 2
    with np.errstate(all="ignore"):
        # (1 - m) K(m) -> 0 at m = 1, where K itself is infinite
        tail = np.where(m < 1.0, (1.0 - m) * ellipk(np.minimum(m, 1.0 - 1e-17)), 0.0)
    value = np.where(h <= c, c * ellipe(m), h * (ellipe(m) - tail)) / (4.0 * np.pi**2)
    return np.asarray(np.where(inside, value, 0.0))


def fisher_spectrum(activation: object, *, width: int | None = None) -> Prediction:
    """Predict the spectrum of the Fisher matrix E_x J^T J of a network with one hidden layer, all widths equal.

    f(x) = W2 phi(W1 x), W entries of variance 1/n, x standard Gaussian, squared loss; J the (n, 2 n^2) Jacobian with
    respect to all weights. Mean eigenvalue (eta + eta')/2.

    Args:
        activation: as `as_activation` takes it.
        width: n, if known: for the expected finite-size error, which here follows n and not the 2 n^2 eigenvalues (they
            are functions of pairs of 2 n numbers).

    Returns:
        Prediction with scalars "eta", "eta_prime", "zeta", "mean", "second_moment", "largest_eigenvalue" (edge of the
        bulk) and "max_stable_lr" = 2 / largest eigenvalue.

    Raises:
        ValueError: an unknown activation, a constant one, or one that jumps; a width below 1.

    Source: Pennington and Worah 2018, The spectrum of the Fisher information matrix of a single-hidden-layer neural
    network, Theorem 1, rewritten as an average over 2 x 2 blocks (no branch to choose).

    >>> round(fisher_spectrum("linear").scalars["largest_eigenvalue"], 12)
    8.0
    """
    if width is not None:
        width = whole_number("width", width)
    phi = as_activation(activation)
    law = fisher_law(phi)
    mean = nonlinear_moments(phi, 1.0).mean
    assumptions = [
        "one hidden layer, input, hidden and output widths equal and large, no biases",
        "inputs standard Gaussian, weights Gaussian of variance 1/n, squared loss, infinitely many samples",
    ]
    if mean != 0.0:
        assumptions.append(
            f"the activation is centred: its mean {mean:.4g} adds one outlier an output, about n mean^2, not in the law"
        )
    high = law.bounds()[1]
    e, f, z = law.eta, law.eta_prime, law.zeta
    return Prediction(
        measure=law,
        scalars={
            "eta": e,
            "eta_prime": f,
            "zeta": z,
            "mean": 0.5 * (e + f),
            # (1/2) E tr B^2 with E l = 1, E l^2 = 2
            "second_moment": 0.5 * (e**2 + f**2) + 2.0 * z**2,
            "largest_eigenvalue": high,
            "max_stable_lr": 2.0 / high,
        },
        assumptions=tuple(assumptions),
        reference="Pennington and Worah 2018, Theorem 1",
        finite_size_error=None if width is None else _expected_error(law, width),
    )


def _expected_error(law: FisherLaw, width: int) -> float:
    """0.45/n for a linear network, 0.75 log(n)/n where the two layers' entries differ: calibrated at n = 6 to 24."""
    if not law.atoms():
        return float(min(1.0, 0.75 * np.log(max(width, 2)) / width))
    return min(1.0, 0.45 / width)
