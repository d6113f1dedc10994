"""The Gram matrix (conjugate kernel) of one hidden layer: Pennington and Worah 2017, with bias Piccolo and Schröder
2021."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from torch_rmt.theory.activation import Activation, as_activation
from torch_rmt.theory.expected_error import quadratic_error, quadratic_share, rigid_error, scale_error
from torch_rmt.theory.gaussian import gaussian_expectation
from torch_rmt.theory.gram_bias import GramBiasLaw
from torch_rmt.theory.gram_law import SampleCovarianceLaw
from torch_rmt.theory.prediction import Prediction
from torch_rmt.theory.sizes import whole_number


@dataclass(frozen=True)
class NonlinearMoments:
    """What a spectrum of one hidden layer knows of its activation, at pre-activation variance q.

    Fields:
        mean: E phi(sqrt(q) Z).
        eta: variance of phi(sqrt(q) Z), i.e. E phi^2 of the centred activation.
        zeta: (E Z phi(sqrt(q) Z))^2 = q (E phi')^2, the linear part of eta; zeta <= eta.
    """

    mean: float
    eta: float
    zeta: float


def nonlinear_moments(activation: object, q: float) -> NonlinearMoments:
    """Mean, eta and zeta of an activation under N(0, q).

    >>> m = nonlinear_moments("linear", 4.0)
    >>> round(m.eta, 12), round(m.zeta, 12)
    (4.0, 4.0)
    """
    if not (np.isfinite(q) and q > 0.0):
        raise ValueError(f"the pre-activation variance must be positive and finite, got {q}")
    phi: Activation = as_activation(activation)
    deviation = float(np.sqrt(q))
    mean = gaussian_expectation(phi.value, q, phi.kinks)
    if abs(mean) < 1e-14 * deviation:
        mean = 0.0
    eta = gaussian_expectation(lambda h: (phi.value(h) - mean) ** 2, q, phi.kinks)
    linear = gaussian_expectation(lambda h: h / deviation * (phi.value(h) - mean), q, phi.kinks)
    if eta <= 1e-28 * q:
        raise ValueError(f"{phi.name} is constant where the pre-activations are; the Gram matrix is its mean squared")
    zeta = linear**2
    # Rounding must not make a curved activation linear, nor a linear one curved or an even one odd.
    if abs(eta - zeta) <= 1e-12 * eta:
        zeta = eta
    elif zeta <= 1e-24 * eta:
        zeta = 0.0
    return NonlinearMoments(mean=mean, eta=eta, zeta=zeta)


def gram_law(eta: float, zeta: float, *, psi: float, phi: float) -> SampleCovarianceLaw:
    """Law of M = Y Y^T / m for centred Y = activation(W X): Pennington-Worah 2017, eqs. 10-11.

    Args:
        eta, zeta: moments of the activation (see `NonlinearMoments`).
        psi: n_in / n_out.
        phi: n_in / n_samples.
    """
    if not 0.0 <= zeta <= eta:
        raise ValueError(f"an activation has 0 <= zeta <= eta, got eta {eta}, zeta {zeta}")
    if not (np.isfinite(psi) and psi > 0.0):
        raise ValueError(f"psi = n_in/n_out must be positive and finite, got {psi}")
    if not (np.isfinite(phi) and phi > 0.0):
        raise ValueError(f"phi = n_in/n_samples must be positive and finite, got {phi}")
    jumps = ((zeta / psi, psi),) if zeta > 0.0 else ()
    return SampleCovarianceLaw(ratio=phi / psi, drift=eta - zeta, jumps=jumps)


def gram_spectrum(
    activation: object,
    *,
    n_in: int,
    n_out: int,
    n_samples: int,
    sigma_w: float = 1.0,
    sigma_x: float = 1.0,
    sigma_b: float = 0.0,
) -> Prediction:
    """Predict the spectrum of the Gram matrix M = Y Y^T / n_samples, Y = activation(W X + b 1^T).

    W (n_out, n_in) has entry variance sigma_w^2 / n_in, X (n_in, n_samples) entry variance sigma_x^2, b entry variance
    sigma_b^2, one b_i a neuron. The activation is centred: its mean over everything is subtracted. What the law does
    not hold, a single eigenvalue that the mean (with bias, the row means) pulls out, is the scalar "outlier" of the
    matrix that is not centred. The nonzero eigenvalues are those of Y^T Y / n_samples.

    Returns:
        Prediction with scalars "eta", "zeta", "activation_mean", "mean", "largest_eigenvalue" (edge of the bulk),
        "atom_at_zero" and, where there is one, "outlier".

    Raises:
        ValueError: a size that is not a whole number of at least one, a sigma that is not positive (sigma_b: negative),
            a constant activation.

    Source: Pennington and Worah 2017, section 3; with bias Piccolo and Schröder 2021, as row-profile equations.

    >>> prediction = gram_spectrum("relu", n_in=400, n_out=200, n_samples=800)
    >>> round(prediction.measure.mean, 12) == round(0.5 - 0.5 / np.pi, 12)
    True
    """
    n_in, n_out = whole_number("n_in", n_in), whole_number("n_out", n_out)
    n_samples = whole_number("n_samples", n_samples)
    for name, sigma in (("sigma_w", sigma_w), ("sigma_x", sigma_x)):
        if not (np.isfinite(sigma) and sigma > 0.0):
            raise ValueError(f"{name} must be positive and finite, got {sigma}")
    if not (np.isfinite(sigma_b) and sigma_b >= 0.0):
        raise ValueError(f"sigma_b must be finite and >= 0, got {sigma_b}")
    phi = as_activation(activation)
    variance = (sigma_w * sigma_x) ** 2
    psi, ratio = n_in / n_out, n_out / n_samples
    total = nonlinear_moments(phi, variance + sigma_b**2)
    assumptions = [
        "widths and samples large, in the proportions given",
        "inputs with independent entries of variance sigma_x^2, weights independent Gaussians",
    ]
    scalars = {"eta": total.eta, "activation_mean": total.mean}
    law: SampleCovarianceLaw | GramBiasLaw
    if sigma_b == 0.0:
        law = gram_law(total.eta, total.zeta, psi=psi, phi=n_in / n_samples)
        outlier = law.outlier(n_out * total.mean**2)
        scalars |= {"zeta": total.zeta, "mean": total.eta}
    else:
        law = GramBiasLaw.of(phi, variance=variance, sigma_b=sigma_b, psi=psi, ratio=ratio)
        outlier = law.outlier(n_out)
        scalars |= {"zeta": law.zeta, "mean": law.mean}
        assumptions.append("one bias a neuron, Gaussian; the row means it causes are one outlier outside the law")
    if total.mean != 0.0:
        assumptions.append(
            f"the activation is centred: its mean {total.mean:.4g} is subtracted; left in, it is one outlier"
        )
    scalars |= {
        "largest_eigenvalue": law.bounds()[1],
        "atom_at_zero": sum(mass for location, mass in law.atoms() if location == 0.0),
    }
    if outlier is not None:
        scalars["outlier"] = outlier
    return Prediction(
        measure=law,
        scalars=scalars,
        assumptions=tuple(assumptions),
        reference="Pennington and Worah 2017, Nonlinear random matrix theory for deep learning"
        + ("; Piccolo and Schröder 2021 (bias)" if sigma_b else ""),
        finite_size_error=_expected_error(phi, law, variance + sigma_b**2, n_in, n_out, n_samples),
    )


def _expected_error(
    phi: Activation, law: SampleCovarianceLaw | GramBiasLaw, q: float, n_in: int, n_out: int, n_samples: int
) -> float:
    """Rigid eigenvalues, the quadratic features, and, with biases, the mean of the profiles over n_out of them."""
    count = min(n_out, n_samples)
    error = rigid_error(count, n_out) + quadratic_error(quadratic_share(phi, q), n_in, count, n_out)
    if isinstance(law, GramBiasLaw):
        profile = law.alpha + law.noise
        deviation = float(np.sqrt(law.weight @ (profile - law.mean) ** 2 / n_out)) / law.mean
        error = float(np.hypot(error, scale_error(law, deviation)))
    return min(1.0, error)
