"""Finite width: the law of the squared gradient norm of a random network (Hanin and Nica 2018), known before
training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import polygamma

from torch_rmt.theory.activation import Activation, as_activation
from torch_rmt.theory.gaussian import gaussian_rule
from torch_rmt.theory.gradient_norm import GradientNormLaw

_REFERENCE = "Hanin and Nica 2018, Products of many large random matrices and gradients in deep neural networks"


def gradient_norm_law(
    widths: Sequence[int],
    activation: object,
    weight_kurtosis: float = 3.0,
    *,
    sigma_w: float | None = None,
    sigma_b: float = 0.0,
    q: float | None = None,
    concentration: float | None = None,
) -> GradientNormLaw:
    """Law of log ||J u||^2, J the input-output Jacobian of a network drawn at random, u a fixed unit vector.

    Weights of layer l have variance sigma_w^2 / n_{l-1}; every map is followed by the activation. The same law holds
    for the gradient sent back by a unit vector at the output, widths reversed.

    Homogeneous activations (ReLU, leaky ReLU, linear): the layers' factors are independent and the cumulants of their
    logarithms exact; to leading order N(-beta/2, beta), beta = sum_l (3 mu_2/mu_1^2 - 1)/n_l, for ReLU 5 sum_l 1/n_l.
    Others: the length q of the hidden vectors fluctuates too and moves the slope of later layers; the covariance of
    (q, log ||J u||^2) is carried from layer to layer, exact to leading order in 1/width.

    Args:
        widths: (n_0, ..., n_L).
        activation: as `as_activation` takes it.
        weight_kurtosis: fourth moment over squared variance of a weight; 3 for Gaussian.
        sigma_w: None takes the critical value (mean-field gain one) at sigma_b.
        sigma_b: standard deviation of the biases.
        q: mean square of the pre-activations; sets sigma_w and sigma_b to the critical point with this fixed point.
            None: an input of mean square one, and the length map after it.
        concentration: sum of u_j^4; None for a u spread evenly, 3/(n_0 + 2). One for a single input coordinate.

    Raises:
        ValueError: fewer than two widths, one below 1, a kurtosis below 1, no critical point and no sigma_w.

    >>> law = gradient_norm_law([100] * 21, "relu")
    >>> 1.0 < law.variance < 1.1, law.exact                # 5 * 20 / 100 and what is of higher order
    (True, True)
    """
    sizes = tuple(int(n) for n in widths)
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"widths are (n_0, ..., n_L), at least two, each at least 1; got {tuple(widths)}")
    if not (np.isfinite(weight_kurtosis) and weight_kurtosis >= 1.0):
        raise ValueError(f"the kurtosis of a random variable is at least 1, got {weight_kurtosis}")
    first = 3.0 / (sizes[0] + 2.0) if concentration is None else float(concentration)
    if not 1.0 / sizes[0] - 1e-12 <= first <= 1.0 + 1e-12:
        raise ValueError(f"sum of u_j^4 of a unit vector lies in [1/n_0, 1], got {concentration}")
    phi = as_activation(activation)
    slopes = _homogeneous_slopes(phi)
    if slopes is not None and sigma_b == 0.0:
        return _homogeneous(sizes, slopes, weight_kurtosis, sigma_w, first)
    gain, start, bias = _operating_point(phi, sigma_w, sigma_b, q)
    return _coupled(sizes, phi, weight_kurtosis, gain, bias, start, first)


def _homogeneous_slopes(phi: Activation) -> tuple[float, float] | None:
    """Slopes (left, right) if phi(t h) = t phi(h) for t > 0."""
    slopes = phi.slopes()
    if slopes is None or any(kink != 0.0 for kink in phi.kinks) or float(phi.value(np.zeros(1))[0]) != 0.0:
        return None
    return slopes[0], slopes[-1]


def layer_log_cumulants(width: int, slopes: tuple[float, float]) -> Float[np.ndarray, " 4"]:
    """First four cumulants of log (1/width) sum_i c_i z_i^2, z Gaussian, c_i = left^2 or right^2 with equal chance.

    With E exponential, P(log E - log X > y) = E exp(-e^y X) is [(1 + 2 l^2 s)^(-1/2)/2 + (1 + 2 r^2 s)^(-1/2)/2]^width,
    s = e^y/width: the cumulants of log E are polygamma(1), and those of log X are left. Where a slope is zero, given
    that not all neurons are dead.
    """
    left, right = slopes[0] ** 2, slopes[1] ** 2
    if left == right:
        # chi-square: closed
        orders = np.arange(1, 5)
        value = np.array([float(polygamma(k - 1, 0.5 * width)) for k in orders])
        value[0] += np.log(2.0 * left / width)
        return value
    dead = 0.5**width if min(left, right) == 0.0 else 0.0
    scale = 0.5 * (left + right)
    # Trapezoidal rule for the density of V = log E - log X, analytic for |Im y| < pi: exact to rounding at step 0.1.
    # The
    # right tail falls like exp(-y/2) at worst (one neuron alive).
    y = np.arange(-45.0, 100.0, 0.1)
    s = np.exp(y) / (width * scale)
    inner = 0.5 * (1.0 + 2.0 * left * s) ** -0.5 + 0.5 * (1.0 + 2.0 * right * s) ** -0.5
    fall = 0.5 * s * (left * (1.0 + 2.0 * left * s) ** -1.5 + right * (1.0 + 2.0 * right * s) ** -1.5)
    density = 0.1 * width * inner ** (width - 1) * fall / (1.0 - dead)
    centre = float(density @ y)
    second, third, fourth = (float(density @ (y - centre) ** k) for k in (2, 3, 4))
    cumulants = np.array([centre, second, third, fourth - 3.0 * second**2])
    exponential = np.array([float(polygamma(k, 1.0)) for k in range(4)])
    value = (cumulants - exponential) * np.array([-1.0, 1.0, -1.0, 1.0])
    value[0] += np.log(scale)
    return np.asarray(value)


def _homogeneous(
    sizes: tuple[int, ...],
    slopes: tuple[float, float],
    kurtosis: float,
    sigma_w: float | None,
    first: float,
) -> GradientNormLaw:
    second, fourth = 0.5 * (slopes[0] ** 2 + slopes[1] ** 2), 0.5 * (slopes[0] ** 4 + slopes[1] ** 4)
    if second == 0.0:
        raise ValueError("the activation is zero: no gradient passes")
    variance_w = 1.0 / second if sigma_w is None else sigma_w**2
    ratio = fourth / second**2
    cumulants = np.zeros(4)
    extra, concentration = 0.0, first
    for before, after in itertools.pairwise(sizes):
        layer = layer_log_cumulants(after, slopes)
        layer[0] += np.log(variance_w * after / before)
        cumulants += layer
        # the fourth moment of the weights sees the concentration of the vector that comes in
        extra += ratio * (kurtosis - 3.0) * concentration / after
        concentration = 3.0 * ratio / (after + 2.0)
    mean, variance = float(cumulants[0]) - 0.5 * extra, float(cumulants[1]) + extra
    if variance <= 0.0:
        raise ValueError(f"a weight kurtosis of {kurtosis} with these widths leaves no variance: widths are too small")
    dead = 1.0 - np.prod([1.0 - 0.5**n for n in sizes[1:]]) if min(abs(slopes[0]), abs(slopes[1])) == 0.0 else 0.0
    assumptions = [
        "weights independent, symmetric, of variance sigma_w^2/fan-in, no biases; one fixed direction u",
        "exact cumulants of independent layers; bands corrected for skewness and kurtosis",
    ]
    if extra:
        assumptions.append("weights not Gaussian: their kurtosis enters to leading order in 1/width")
    if dead > 1e-12:
        assumptions.append(f"given that no layer is dead (probability of a dead one {dead:.2g})")
    return GradientNormLaw(
        mean=mean,
        variance=variance,
        log_mean_field=float(np.log(sizes[-1] / sizes[0]) + (len(sizes) - 1) * np.log(variance_w * second)),
        skewness=float(cumulants[2] / variance**1.5),
        excess_kurtosis=float(cumulants[3] / variance**2),
        exact=extra == 0.0,
        assumptions=tuple(assumptions),
        reference=_REFERENCE + ", Theorem 1; cumulants of each layer exact",
    )


def _operating_point(
    phi: Activation, sigma_w: float | None, sigma_b: float, q: float | None
) -> tuple[float, float, float]:
    """sigma_w^2, the first pre-activation variance and sigma_b^2."""
    if q is not None:
        if not (np.isfinite(q) and q > 0.0):
            raise ValueError(f"q is a mean square and must be positive, got {q}")
        at = _LayerMoments.at(phi, q)
        gain = 1.0 / at.slope2 if sigma_w is None else sigma_w**2
        bias = q - gain * at.value2
        if bias < -1e-12 * q:
            raise ValueError(
                f"no sigma_b makes q = {q:g} a fixed point at sigma_w = {gain**0.5:.4g}: it would have to be imaginary"
            )
        return gain, q, max(bias, 0.0)
    if sigma_w is None:
        from torch_rmt.theory import critical_point

        point = critical_point(phi, sigma_b=sigma_b)
        sigma_w = float(point.sigma_w)
        if not np.isfinite(sigma_w):
            raise ValueError(f"{phi.name} has no critical point at sigma_b = {sigma_b:g}: give sigma_w")
    return sigma_w**2, sigma_w**2 + sigma_b**2, sigma_b**2


@dataclass(frozen=True)
class _LayerMoments:
    """Gaussian moments of phi and phi' at pre-activation variance k; a prime is a derivative in k."""

    value2: float
    value2_rate: float
    value2_bend: float
    value2_variance: float
    slope2: float
    log_slope2_rate: float
    log_slope2_bend: float
    slope4: float
    mixed: float
    """E phi^2 phi'^2."""
    cross: float
    """E phi phi' h / k."""
    slope2_along: float
    """E phi'^2 h^2 / k."""

    @classmethod
    def at(cls, phi: Activation, k: float) -> _LayerMoments:
        h, weight = gaussian_rule(k, phi.kinks, order=24)
        value, slope = phi.value(h), phi.derivative(h)
        z2 = h**2 / k
        # d/dk E F(sqrt(k) z) = E F (z^2 - 1)/(2 k), and again
        rate = weight * (z2 - 1.0) / (2.0 * k)
        bend = weight * (z2**2 - 6.0 * z2 + 3.0) / (4.0 * k**2)
        v2, s2 = value**2, slope**2
        mean_v2, mean_s2 = float(weight @ v2), float(weight @ s2)
        if mean_s2 <= 0.0:
            raise ValueError(
                f"{phi.name} is flat where the pre-activations are (mean square {k:g}): no gradient passes"
            )
        first = float(rate @ s2) / mean_s2
        return cls(
            value2=mean_v2,
            value2_rate=float(rate @ v2),
            value2_bend=float(bend @ v2),
            value2_variance=float(weight @ v2**2) - mean_v2**2,
            slope2=mean_s2,
            log_slope2_rate=first,
            log_slope2_bend=float(bend @ s2) / mean_s2 - first**2,
            slope4=float(weight @ s2**2),
            mixed=float(weight @ (v2 * s2)),
            cross=float(weight @ (value * slope * h)) / k,
            slope2_along=float(weight @ (s2 * z2)),
        )


def _coupled(
    sizes: tuple[int, ...],
    phi: Activation,
    kurtosis: float,
    gain: float,
    bias: float,
    start: float,
    first: float,
) -> GradientNormLaw:
    """Covariance of (q, log ||J u||^2) and their means to order 1/width, layer by layer.

    A neuron's pair (pre-activation, tangent) is Gaussian with variances K, T and covariance C. With k, t the
    fluctuations of K and log T: k' = f'(K) k + noise, t' = t + (log chi)'(K) k + noise, the noises being averages
    over n neurons, hence correlated; C^2/T starts at 1/n_0 for a random direction and adds to the mean only.
    """
    depth = len(sizes) - 1
    K = start
    mean_k = var_k = cov = var_t = shift = mean_field = 0.0
    alignment = max(start - bias, 0.0) / sizes[0]
    concentration = first
    for n in sizes[1:]:
        m = _LayerMoments.at(phi, K)
        ratio = m.slope4 / m.slope2**2
        noise_t = (ratio * (3.0 + (kurtosis - 3.0) * concentration) - 1.0) / n
        noise_k = gain**2 * m.value2_variance / n
        noise_kt = gain * (m.mixed / m.slope2 - m.value2) / n
        g1, g2 = m.log_slope2_rate, m.log_slope2_bend
        f1, f2 = gain * m.value2_rate, gain * m.value2_bend
        mean_field += float(np.log(gain * m.slope2))
        shift += g1 * mean_k + 0.5 * g2 * var_k + (m.slope2_along / m.slope2 - 1.0) * alignment / K - 0.5 * noise_t
        alignment = ((gain * m.cross) ** 2 * alignment + gain**2 * m.mixed / n) / (gain * m.slope2)
        var_t += 2.0 * g1 * cov + g1**2 * var_k + noise_t
        cov = f1 * (cov + g1 * var_k) + noise_kt
        mean_k = f1 * mean_k + 0.5 * f2 * var_k
        var_k = f1**2 * var_k + noise_k
        concentration = 3.0 * ratio / (n + 2.0)
        K = gain * m.value2 + bias
    mean_field += float(np.log(sizes[-1] / sizes[0]))
    return GradientNormLaw(
        mean=mean_field + shift,
        variance=var_t,
        log_mean_field=mean_field,
        assumptions=(
            "weights independent, of variance sigma_w^2/fan-in, biases Gaussian; one direction u, generic to the input",
            f"depth/width ({depth}/{min(sizes)}) small: leading order in 1/width, the coupling of q and slope included",
            f"first pre-activations of mean square {start:.4g}",
        ),
        reference=_REFERENCE + "; coupled recursion of (q, log chi) derived here",
    )
