"""How far one drawn network of finite width lies from the Jacobian law: the expected Kolmogorov distance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import ndtri

from torch_rmt.measures.base import SpectralMeasure
from torch_rmt.theory.activation import Activation
from torch_rmt.theory.architecture import Architecture, plain_layers
from torch_rmt.theory.gaussian import gaussian_rule
from torch_rmt.theory.jacobian_law import JacobianLaw

# Eigenvalues are rigid: what is left once slopes and signal are the drawn ones is 1.8 to 2.8 over n, measured on
# products of Gaussian and Haar matrices with even slopes, n = 64 and 200, depth 1 to 30.
RIGID = 2.3
# sup over t of a Gaussian process against the mean modulus where it is widest: drawn tanh, GELU, ReLU networks.
SUPREMUM = 1.15
_POINTS = 16


def expected_distance(architecture: Architecture, moments: tuple[float, ...], measure: SpectralMeasure) -> float:
    """Expected Kolmogorov distance between the law and the spectrum of one network of these widths.

    Linear response to the drawn units: at fixed z the potential Phi changes by -E log(1 - s / w_l) of what is drawn, so
    layer l moves F(t) by the mean over its n_l units of (n_l / n_0) Im log(1 - s / w_l) / pi + A phi^2, A the effect of
    the signal on all later layers; for orthogonal weights less the part along h^2. The distance is 0.8 x 1.15 times the
    largest standard deviation over t, plus 2.3 / n for the eigenvalues' own scatter. Derived here; simulated in
    tests/laws/test_jacobian_laws.py within a factor of two, three for slopes of two widely different values.
    """
    n = min(min(layer.n_in, layer.n_out) for layer in architecture.layers)
    if not isinstance(measure, JacobianLaw):
        return min(1.0, _rank_deviation(architecture, moments))
    spread = float(np.sqrt(2 / np.pi) * SUPREMUM * np.sqrt(_response(architecture, moments, measure).max()))
    return min(1.0, float(np.hypot(max(spread, _rank_deviation(architecture, moments)), RIGID / n)))


def _response(architecture: Architecture, moments: tuple[float, ...], measure: JacobianLaw) -> np.ndarray:
    """Variance of F(t) at points through the spectrum."""
    zero = sum(mass for location, mass in measure.log_atoms if location == -np.inf)
    levels = zero + (1 - zero) * (np.arange(_POINTS) + 0.5) / _POINTS
    t = measure.rough_log_quantile(levels) - measure.log_scale
    w, m = measure.solver.solve(t)
    found = np.isfinite(m) & (np.abs(m.imag) > 1e-9)
    if not found.any():
        return np.zeros(1)
    m = m[found]
    starts = np.atleast_2d(w)[:, found] if w.size else np.empty((0, int(found.sum())), dtype=np.complex128)
    first = architecture.layers[0].n_in
    variance, following, gain_after = np.zeros(m.shape), np.zeros(m.shape), 0.0
    known: dict[tuple[int, int, int], _Units] = {}
    for layer, q in zip(reversed(plain_layers(architecture)), reversed(moments), strict=True):
        later = following * gain_after
        if layer.activation is None or q <= 0:
            own = 2.0 * (later * q) ** 2 if layer.ensemble == "gaussian" else np.zeros(m.shape)
            following = later
        else:
            # An estimate: layers whose q agree to five per cent share their units.
            key = id(layer.activation), layer.n_out, round(20 * float(np.log(q)))
            if key not in known:
                known[key] = units_of(layer.activation, q, layer.n_out / first, m, starts)
            units = known[key]
            own = units.share_share + 2.0 * later * units.share_square + later**2 * units.square_square
            if layer.ensemble == "orthogonal":
                own = own - (units.share_radial + later * units.square_radial) ** 2 / 2.0
            # d/dq E f(h) = E[(h^2 / q - 1) f] / 2q.
            following = (units.share_radial + later * units.square_radial) / (2.0 * q)
        variance = variance + own / layer.n_out
        gain_after = float(layer.sigma_w) ** 2 if isinstance(layer.ensemble, str) else layer.ensemble.mean
    return variance


@dataclass(frozen=True, eq=False)
class _Units:
    """Covariances over one unit of its share in F(t), of phi^2 and of h^2 / q; the first has one value for each t."""

    share_share: np.ndarray
    share_square: np.ndarray
    share_radial: np.ndarray
    square_square: float
    square_radial: float


def units_of(activation: Activation, q: float, width: float, m: np.ndarray, starts: np.ndarray) -> _Units:
    """The covariances over one unit of a layer `width` times as wide as the input, at points with these M."""
    h, weights = gaussian_rule(q, activation.kinks, order=8)
    s = np.asarray(activation.derivative(h)) ** 2
    place = _subordinate(s, weights, m / width, starts)
    share = width * np.angle(1.0 - s / place[:, None]) / np.pi
    share = share - (share @ weights)[:, None]
    square = np.asarray(activation.value(h)) ** 2
    square = square - float(weights @ square)
    radial = h**2 / q - 1.0
    return _Units(
        share**2 @ weights,
        share @ (weights * square),
        share @ (weights * radial),
        float(weights @ square**2),
        float(weights @ (square * radial)),
    )


def _subordinate(s: np.ndarray, weights: np.ndarray, u: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """w in the upper half-plane with E[s / (w - s)] = u, by Newton from several starts; the best one counts."""
    mean = float(weights @ s)
    p = float(weights @ (s > 1e-12 * s.max()))
    # {0, s}: the exact answer for two values, a fair start for others.
    tries = [*(row * mean for row in starts), mean / p * (u + p) / u]
    best = np.full(u.shape, mean + 0j)
    least = np.full(u.shape, np.inf)
    for start in tries:
        y = np.log(start)
        with np.errstate(all="ignore"):
            for _ in range(8):
                w = np.exp(y)[:, None]
                value = (s / (w - s)) @ weights
                slope = -(s * w / (w - s) ** 2) @ weights
                step = (value - u) / slope
                y = y - step * np.minimum(1.0, 0.5 / np.maximum(np.abs(step), 1e-300))
                y = y.real + 1j * np.clip(y.imag, 1e-6, np.pi)
            error = np.abs((s / (np.exp(y)[:, None] - s)) @ weights - u)
        better = error < least
        best, least = np.where(better, np.exp(y), best), np.where(better, error, least)
        if least.max() < 1e-6:
            break
    return best


def _rank_deviation(architecture: Architecture, moments: tuple[float, ...]) -> float:
    """Expected deviation of the rank over n_0: the least of the layers' numbers of live units."""
    first = architecture.layers[0].n_in
    live, spread = [], []
    known: dict[tuple[int, float], float] = {}
    for layer, q in zip(plain_layers(architecture), moments, strict=True):
        if layer.activation is None or q <= 0 or not _has_dead_units(layer.activation):
            continue
        key = id(layer.activation), q
        if key not in known:
            h, weights = gaussian_rule(q, layer.activation.kinks)
            known[key] = float(weights @ (np.asarray(layer.activation.derivative(h)) != 0))
        p = known[key]
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


@lru_cache(maxsize=256)
def _has_dead_units(activation: Activation) -> bool:
    slopes = activation.slopes()
    return slopes is not None and 0.0 in slopes
