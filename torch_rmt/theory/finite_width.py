"""Finite width: the law of the squared gradient norm of a random network (Hanin and Nica 2018), known before
training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from torch_rmt.theory.activation import Activation, as_activation
from torch_rmt.theory.coupled_width import Chain, LayerMoments, drawn, expand
from torch_rmt.theory.gradient_norm import GradientNormLaw
from torch_rmt.theory.layer_factor import LayerFactor, LogProductLaw
from torch_rmt.theory.sizes import checked_widths, one_of, whole_number

_REFERENCE = "Hanin and Nica 2018, Products of many large random matrices and gradients in deep neural networks"
_NO_SPREAD = 1e-13  # a variance of rounding errors only


def gradient_norm_law(
    widths: Sequence[int],
    activation: object,
    weight_kurtosis: float = 3.0,
    *,
    ensemble: str = "gaussian",
    sigma_w: float | None = None,
    sigma_b: float = 0.0,
    q: float | None = None,
    concentration: float | None = None,
    draws: int = 0,
    seed: int = 0,
) -> GradientNormLaw:
    """Law of log ||J u||^2, J the input-output Jacobian of a network drawn at random, u a fixed unit vector.

    Weights of layer l have variance sigma_w^2 / n_{l-1}; every map is followed by the activation. The same law holds
    for the gradient sent back by a unit vector at the output, widths reversed.

    Homogeneous activations (ReLU, leaky ReLU, linear): the layers' factors are independent and their law is exact at
    every width, bands included; to leading order N(-beta/2, beta), beta = sum_l v_l/n_l, v = 3 mu_2/mu_1^2 - 1 for
    Gaussian weights (ReLU: 5 sum_l 1/n_l), less 2 n_l/max(n_l, n_{l-1}) for Haar orthogonal ones: square,
    v = 3 (mu_2/mu_1^2 - 1), ReLU 3, linear 0.
    Others: the length q of the hidden vectors fluctuates too and moves the slope of later layers; the covariance of
    (q, log ||J u||^2) is carried from layer to layer, to leading order in 1/width.
    Over 10 layers of n units that variance is too small by a part of about 3/n (tanh anywhere; GELU and SiLU at and
    above criticality); in the ordered phase by 10/n (GELU, sigma_w = 1.5) and more (SiLU), where at n = 100 the mean
    is wrong too. Where the expansion gives a variance above one half, take `draws`: the lengths drawn layer by layer.

    Args:
        widths: (n_0, ..., n_L).
        activation: as `as_activation` takes it.
        weight_kurtosis: fourth moment over squared variance of a weight; 3 for Gaussian.
        ensemble: "gaussian" (independent weights) or "orthogonal" (Haar; where the widths differ, W^T W or W W^T is a
            multiple of the identity, of entry variance sigma_w^2 / n_{l-1} still).
        sigma_w: None takes the critical value (mean-field gain one) at sigma_b.
        sigma_b: standard deviation of the biases.
        q: mean square of the pre-activations; sets sigma_w and sigma_b to the critical point with this fixed point.
            None: an input of mean square one, and the length map after it.
        concentration: sum of u_j^4; None for a u spread evenly, 3/(n_0 + 2). One for a single input coordinate. Haar
            weights do not see it.
        draws, seed: where the law is not exact, take it from so many draws of the layers' lengths; 0: by expansion.

    Raises:
        ValueError: fewer than two widths, one below 1, a kurtosis below 1 (or one that is not 3 for Haar weights or
            draws), another ensemble, no critical point and no sigma_w, negative draws.

    >>> law = gradient_norm_law([100] * 21, "relu")
    >>> 1.0 < law.variance < 1.1, law.exact                # 5 * 20 / 100 and what is of higher order
    (True, True)
    >>> 0.6 < gradient_norm_law([100] * 21, "relu", ensemble="orthogonal").variance < 0.65
    True
    """
    sizes = checked_widths(widths)
    if not (np.isfinite(weight_kurtosis) and weight_kurtosis >= 1.0):
        raise ValueError(f"the kurtosis of a random variable is at least 1, got {weight_kurtosis}")
    one_of("ensemble", ensemble, ("gaussian", "orthogonal"))
    draws = whole_number("draws, 0 (by expansion) or a number of networks,", draws, least=0)
    if draws == 1:
        raise ValueError("draws is 0 (by expansion) or a number of networks, at least 2; got 1")
    if q is not None and not (np.isfinite(q) and q > 0.0):
        raise ValueError(f"q is a mean square and must be positive and finite, got {q}")
    if weight_kurtosis != 3.0 and (ensemble == "orthogonal" or draws):
        raise ValueError("a kurtosis other than 3 goes with independent weights and no draws: leave it out")
    if not (np.isfinite(sigma_b) and sigma_b >= 0.0):
        raise ValueError(f"sigma_b must be finite and >= 0, got {sigma_b}")
    if sigma_w is not None and not (np.isfinite(sigma_w) and sigma_w > 0.0):
        raise ValueError(f"sigma_w must be finite and positive, got {sigma_w}")
    first = 3.0 / (sizes[0] + 2.0) if concentration is None else float(concentration)
    if not 1.0 / sizes[0] - 1e-12 <= first <= 1.0 + 1e-12:
        raise ValueError(f"sum of u_j^4 of a unit vector lies in [1/n_0, 1], got {concentration}")
    phi = as_activation(activation)
    slopes = _homogeneous_slopes(phi)
    if slopes is not None and sigma_b == 0.0:
        return _homogeneous(sizes, slopes, weight_kurtosis, sigma_w, first, ensemble == "orthogonal")
    gain, start, bias = _operating_point(phi, sigma_w, sigma_b, q)
    chain = Chain(
        widths=sizes,
        phi=phi,
        gain=gain,
        bias=bias,
        start=start,
        kurtosis=weight_kurtosis,
        concentration=first,
        orthogonal=ensemble == "orthogonal",
    )
    return drawn(chain, draws, seed) if draws else expand(chain)


def _homogeneous_slopes(phi: Activation) -> tuple[float, float] | None:
    """Slopes (left, right) if phi(t h) = t phi(h) for t > 0."""
    slopes = phi.slopes()
    if slopes is None or any(kink != 0.0 for kink in phi.kinks) or float(phi.value(np.zeros(1))[0]) != 0.0:
        return None
    return slopes[0], slopes[-1]


def _homogeneous(
    sizes: tuple[int, ...],
    slopes: tuple[float, float],
    kurtosis: float,
    sigma_w: float | None,
    first: float,
    orthogonal: bool,
) -> GradientNormLaw:
    second, fourth = 0.5 * (slopes[0] ** 2 + slopes[1] ** 2), 0.5 * (slopes[0] ** 4 + slopes[1] ** 4)
    if second == 0.0:
        raise ValueError("the activation is zero: no gradient passes")
    variance_w = 1.0 / second if sigma_w is None else sigma_w**2
    ratio = fourth / second**2
    cumulants = np.zeros(4)
    extra, concentration, shift = 0.0, first, 0.0
    factors = []
    for before, after in itertools.pairwise(sizes):
        factors.append(LayerFactor(after, slopes, sphere=max(before, after) if orthogonal else None))
        shift += float(np.log(variance_w * after / before))
        # the fourth moment of the weights sees the concentration of the vector that comes in
        extra += ratio * (kurtosis - 3.0) * concentration / after
        concentration = 3.0 * ratio / (after + 2.0)
    known: dict[LayerFactor, np.ndarray] = {}
    for factor in factors:
        if factor not in known:
            known[factor] = factor.log_cumulants()
        cumulants = cumulants + known[factor]
    mean, variance = float(cumulants[0]) + shift - 0.5 * extra, float(cumulants[1]) + extra
    if variance < _NO_SPREAD and extra:
        raise ValueError(f"a weight kurtosis of {kurtosis} with these widths leaves no variance: widths are too small")
    sharp = variance < _NO_SPREAD
    dead = 1.0 - np.prod([1.0 - 0.5**n for n in sizes[1:]]) if min(abs(slopes[0]), abs(slopes[1])) == 0.0 else 0.0
    assumptions = [
        ("weights Haar orthogonal" if orthogonal else "weights independent, symmetric")
        + ", of variance sigma_w^2/fan-in, no biases; one fixed direction u"
    ]
    if extra:
        assumptions.append("weights not Gaussian: their kurtosis enters to leading order in 1/width, bands corrected")
    else:
        assumptions.append("layers independent, each exact at its width; so are the bands")
    if dead > 1e-12:
        assumptions.append(f"given that no layer is dead (probability of a dead one {dead:.2g})")
    return GradientNormLaw(
        mean=mean,
        variance=0.0 if sharp else variance,
        log_mean_field=float(np.log(sizes[-1] / sizes[0]) + (len(sizes) - 1) * np.log(variance_w * second)),
        skewness=0.0 if sharp else float(cumulants[2] / variance**1.5),
        excess_kurtosis=0.0 if sharp else float(cumulants[3] / variance**2),
        exact=extra == 0.0,
        assumptions=tuple(assumptions),
        reference=_REFERENCE + ", Theorem 1; each layer exact",
        law=None if sharp or extra else LogProductLaw.of(factors, shift, mean, variance**0.5),
    )


def _operating_point(
    phi: Activation, sigma_w: float | None, sigma_b: float, q: float | None
) -> tuple[float, float, float]:
    """sigma_w^2, the first pre-activation variance and sigma_b^2."""
    if q is not None:
        at = LayerMoments.at(phi, q)
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
