"""How far one drawn network of finite width lies from the Jacobian law: the expected Kolmogorov distance."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri

from torch_rmt.measures.base import SpectralMeasure
from torch_rmt.theory.architecture import Architecture
from torch_rmt.theory.gaussian import gaussian_rule
from torch_rmt.theory.jacobian_law import JacobianLaw

# Eigenvalues are rigid: what is left once scale and rank are right falls like 1 / n. Calibrated on drawn tanh, ReLU
# and GELU networks, Gaussian and orthogonal, widths 64 to 512, depths 2 to 32 (tests/laws/test_jacobian_laws.py).
_RIGID = 0.9


def scale_variance(architecture: Architecture, moments: tuple[float, ...]) -> float:
    """Variance of the log of the scale of J^T J over drawn networks, to first order in 1 / width.

    A layer's mean slope and mean signal are averages over its n units. With s = phi'^2, mu = E s, V = E phi^2 and G_l
    the effect of q_l on the log scale, G_l = mu'_l / mu_l + G_{l+1} sigma_w^2 V'(q_l), the layer adds
    Var[s / mu_l + G_{l+1} sigma_w^2 phi^2] / n_l, for orthogonal weights less the part along h^2. Derived here;
    simulated in the tests.
    """
    total, following = 0.0, 0.0
    gain_after = 0.0
    for layer, q in zip(reversed(architecture.layers), reversed(moments), strict=True):
        if layer.activation is None or q <= 0:
            effect = 2.0 * (following * gain_after * q) ** 2 / layer.n_out if layer.activation is None else 0.0
            total += effect
            following = following * gain_after
        else:
            h, weights = gaussian_rule(q, layer.activation.kinks)
            s = np.asarray(layer.activation.derivative(h)) ** 2
            square = np.asarray(layer.activation.value(h)) ** 2
            mu = float(weights @ s)
            mixed = s / mu + following * gain_after * square
            mixed = mixed - float(weights @ mixed)
            own = float(weights @ mixed**2)
            if layer.ensemble == "orthogonal":
                # h lies on a sphere: what follows h^2 alone cannot fluctuate.
                own -= float(weights @ (mixed * (h**2 / q - 1.0))) ** 2 / 2.0
            total += own / layer.n_out
            # d/dq E f(h) = E[(h^2 / q - 1) f] / 2q.
            by_q = weights * (h**2 / q - 1.0) / (2.0 * q)
            following = float(by_q @ s) / mu + following * gain_after * float(by_q @ square)
        gain_after = layer.sigma_w**2 if isinstance(layer.ensemble, str) else layer.ensemble.mean
    return total


def expected_distance(architecture: Architecture, moments: tuple[float, ...], measure: SpectralMeasure) -> float:
    """Expected Kolmogorov distance between the law and the spectrum of one network of these widths.

    sqrt(shift^2 + rank^2) + 0.9 / n: the shift of log lambda of variance `scale_variance` moves the distribution
    function by its steepest slope; the rank fluctuates where slopes are zero with some probability.
    """
    n = min(layer.n_out for layer in architecture.layers)
    shift = 0.0
    if isinstance(measure, JacobianLaw):
        t = np.linspace(*_bulk(measure), 200)
        steepest = float(measure.log_density(t).max())
        shift = min(1.0, float(np.sqrt(2 / np.pi * scale_variance(architecture, moments))) * steepest)
    return min(1.0, float(np.hypot(shift, _rank_deviation(architecture, moments))) + _RIGID / n)


def _bulk(measure: JacobianLaw) -> tuple[float, float]:
    zero = sum(mass for location, mass in measure.log_atoms if location == -np.inf)
    low, high = measure.log_quantile(np.array([zero + 0.01 * (1 - zero), 0.999]))
    return float(low), float(high)


def _rank_deviation(architecture: Architecture, moments: tuple[float, ...]) -> float:
    """Expected deviation of the rank over n_0: the least of the layers' numbers of live units."""
    first = architecture.layers[0].n_in
    live, spread = [], []
    for layer, q in zip(architecture.layers, moments, strict=True):
        slopes = None if layer.activation is None else layer.activation.slopes()
        if slopes is None or 0.0 not in slopes or q <= 0:
            continue
        assert layer.activation is not None
        h, weights = gaussian_rule(q, layer.activation.kinks)
        p = float(weights @ (np.asarray(layer.activation.derivative(h)) != 0))
        live.append(p * layer.n_out / first)
        spread.append(np.sqrt(p * (1 - p) * layer.n_out) / first)
    if not live:
        return 0.0
    least = min(live)
    near = [sd for mean, sd in zip(live, spread, strict=True) if mean < least + 2 * sd]
    if least > 1.0 + 2 * max(spread):
        return 0.0
    # Least of k normal deviations: the mean of its absolute value is about the median for k > 1.
    k = len(near)
    return float(np.mean(near)) * (0.8 if k == 1 else float(-ndtri(1 - 0.5 ** (1 / k))))
