"""Finite width, smooth activations: length and gradient fluctuate together, in expansion or drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from torch_rmt.theory.activation import Activation
from torch_rmt.theory.gaussian import gaussian_rule
from torch_rmt.theory.gradient_norm import GradientNormLaw

_REFERENCE = "coupled recursion of (q, log chi), derived here, after Hanin and Nica 2018"
_NUMBERS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Chain:
    """A network as far as its gradient's length goes: widths (n_0, ..., n_L), every map followed by `phi`.

    Fields:
        gain, bias: sigma_w^2 and sigma_b^2.
        start: mean square of the first pre-activations.
        concentration: sum of u_j^4; None for a direction u drawn at random.
        orthogonal: Haar weights in place of Gaussian ones.
    """

    widths: tuple[int, ...]
    phi: Activation
    gain: float
    bias: float
    start: float
    kurtosis: float = 3.0
    concentration: float = 1.0
    orthogonal: bool = False

    @property
    def assumptions(self) -> tuple[str, ...]:
        """In words."""
        weights = "weights Haar orthogonal" if self.orthogonal else "weights independent"
        return (
            f"{weights}, of variance sigma_w^2/fan-in, biases Gaussian; one direction u, generic to the input",
            f"first pre-activations of mean square {self.start:.4g}",
        )

    def mean_field(self) -> float:
        """log ||J u||^2 where nothing fluctuates."""
        total, q = float(np.log(self.widths[-1] / self.widths[0])), self.start
        for _ in self.widths[1:]:
            m = LayerMoments.at(self.phi, q)
            total += float(np.log(self.gain * m.slope2))
            q = self.gain * m.value2 + self.bias
        return total


@dataclass(frozen=True)
class LayerMoments:
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
    def at(cls, phi: Activation, k: float) -> LayerMoments:
        """At variance k, by quadrature split at the kinks."""
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


def expand(chain: Chain) -> GradientNormLaw:
    """Covariance of (q, log ||J u||^2) and their means to order 1/width, layer by layer.

    A neuron's pair (pre-activation, tangent) has variances K, T and covariance C. With k, t the fluctuations of K and
    log T: k' = f'(K) k + noise, t' = t + (log chi)'(K) k + noise, the noises being averages over n neurons, hence
    correlated; C^2/T starts at 1/n_0 for a random direction and adds to the mean only. For Haar weights the pair lies
    on a sphere of R^m, m the larger width: what follows z^2 - 1, w^2 - 1 or z w alone cannot fluctuate.
    """
    K = chain.start
    mean_k = var_k = cov = var_t = shift = mean_field = 0.0
    alignment = max(chain.start - chain.bias, 0.0) / chain.widths[0]
    concentration, gain = chain.concentration, chain.gain
    for before, n in zip(chain.widths, chain.widths[1:], strict=False):
        m = LayerMoments.at(chain.phi, K)
        ratio = m.slope4 / m.slope2**2
        g1, g2 = m.log_slope2_rate, m.log_slope2_bend
        f1, f2 = gain * m.value2_rate, gain * m.value2_bend
        along = m.slope2_along / m.slope2 - 1.0
        noise_t = (ratio * (3.0 + (chain.kurtosis - 3.0) * concentration) - 1.0) / n
        noise_k = gain**2 * m.value2_variance / n
        noise_kt = gain * (m.mixed / m.slope2 - m.value2) / n
        noise_c = gain**2 * m.mixed / n
        level_t = level_k = 0.0
        if chain.orthogonal:
            # K f' = E f (z^2 - 1)/2; the biases' part of h is free of the sphere
            sphere, share = max(before, n), max(K - chain.bias, 0.0)
            noise_t -= 2.0 * (1.0 + (share * g1) ** 2) / sphere
            noise_k -= 2.0 * (share * f1) ** 2 / sphere
            noise_kt -= 2.0 * g1 * f1 * share**2 / sphere
            noise_c -= share * gain**2 * m.cross**2 / sphere
            # E over the sphere of f(z), and of w^2 given z
            level_t = -(share**2 * (g2 + g1**2) + along * share / K) / sphere
            level_k = -(share**2) * f2 / sphere
        mean_field += float(np.log(gain * m.slope2))
        shift += g1 * mean_k + 0.5 * g2 * var_k + along * alignment / K - 0.5 * noise_t + level_t
        alignment = ((gain * m.cross) ** 2 * alignment + noise_c) / (gain * m.slope2)
        var_t += 2.0 * g1 * cov + g1**2 * var_k + noise_t
        cov = f1 * (cov + g1 * var_k) + noise_kt
        mean_k = f1 * mean_k + 0.5 * f2 * var_k + level_k
        var_k = f1**2 * var_k + noise_k
        concentration = 3.0 * ratio / (n + 2.0)
        K = gain * m.value2 + chain.bias
    mean_field += float(np.log(chain.widths[-1] / chain.widths[0]))
    depth = len(chain.widths) - 1
    return GradientNormLaw(
        mean=mean_field + shift,
        variance=max(var_t, 0.0),
        log_mean_field=mean_field,
        assumptions=(
            *chain.assumptions,
            f"depth/width ({depth}/{min(chain.widths)}) small: leading order in 1/width, the coupling of q and slope "
            "included; bands of a Gaussian",
        ),
        reference=_REFERENCE,
    )


def drawn(chain: Chain, draws: int, seed: int) -> GradientNormLaw:
    """The law from `draws` networks, each drawn as three numbers a layer: no expansion in 1/width.

    Given |x|^2, |u|^2 and x . u, the pairs (h_i, (W u)_i) of a layer are independent Gaussians (Haar: coordinates of
    two vectors of fixed lengths and angle, uniform on a sphere), so that three averages over n pairs are all that
    passes on. Exact in law for a direction drawn at random; the cumulants come with the noise of the draws.
    """
    rng = np.random.default_rng(seed)
    size = max(1, min(draws, _NUMBERS_AT_ONCE // max(chain.widths)))
    parts = [_log_norms(chain, min(size, draws - done), rng) for done in range(0, draws, size)]
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        raise ValueError("no gradient passed in any of the drawn networks")
    mean, variance = float(values.mean()), float(values.var(ddof=1))
    centred = (values - mean) / max(variance, 1e-300) ** 0.5
    return GradientNormLaw(
        mean=mean,
        variance=variance,
        log_mean_field=chain.mean_field(),
        skewness=float((centred**3).mean()),
        excess_kurtosis=float((centred**4).mean()) - 3.0,
        assumptions=(*chain.assumptions, f"from {len(values)} draws of the recursion of lengths, seed {seed}"),
        reference=_REFERENCE,
    )


def _log_norms(chain: Chain, count: int, rng: np.random.Generator) -> np.ndarray:
    n0 = chain.widths[0]
    x2 = np.full(count, max(chain.start - chain.bias, 0.0) / chain.gain)  # |x|^2 / n
    u2 = np.full(count, 1.0 / n0)
    # a random direction: its cosine with the input
    direction = rng.standard_normal(count) / np.sqrt(rng.chisquare(n0 - 1, count)) if n0 > 1 else np.full(count, np.inf)
    cosine = np.sign(direction) / np.sqrt(1.0 + 1.0 / np.maximum(direction**2, 1e-300))
    xu = np.sqrt(x2 * u2) * cosine
    for before, n in zip(chain.widths, chain.widths[1:], strict=False):
        sphere = max(before, n) if chain.orthogonal else n
        z, w = rng.standard_normal((count, sphere)), rng.standard_normal((count, sphere))
        if chain.orthogonal:
            z *= (sphere / np.einsum("rn,rn->r", z, z))[:, None] ** 0.5
            w -= (np.einsum("rn,rn->r", z, w) / sphere)[:, None] * z
            w *= (sphere / np.maximum(np.einsum("rn,rn->r", w, w), 1e-300))[:, None] ** 0.5
            z, w = z[:, :n], w[:, :n]
        with np.errstate(all="ignore"):
            along = np.where(x2 > 0.0, xu / np.sqrt(x2), 0.0)
        across = np.sqrt(np.maximum(u2 - along**2, 0.0))
        root = np.sqrt(chain.gain)
        h = (root * np.sqrt(x2))[:, None] * z
        tangent = (root * along)[:, None] * z
        tangent += (root * across)[:, None] * w
        if chain.bias > 0.0:
            h += np.sqrt(chain.bias) * rng.standard_normal(h.shape)
        x, u = np.asarray(chain.phi.value(h)), np.asarray(chain.phi.derivative(h)) * tangent
        x2, u2, xu = (np.einsum("rn,rn->r", a, b) / n for a, b in ((x, x), (u, u), (x, u)))
    with np.errstate(all="ignore"):
        return np.asarray(np.log(chain.widths[-1] * u2))
