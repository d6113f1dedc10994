"""The Gram matrix of one hidden layer with biases (Piccolo and Schröder 2021), as row-profile equations."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Complex, Float
from scipy.optimize import brentq

from torch_rmt.measures.base import Atom, Interval
from torch_rmt.theory.activation import Activation
from torch_rmt.theory.axis_newton import SystemLaw, Unknowns
from torch_rmt.theory.gaussian import gaussian_rule
from torch_rmt.theory.rational_curve import log_from_above, log_from_below

_HERMITE = 48  # nodes in the bias; the profiles are smooth in it (a Gaussian has been averaged over)
_GRID = 241


@dataclass(frozen=True, eq=False)
class GramBiasLaw(SystemLaw):
    """Law of Y Y^T / m, Y = activation(W X + b 1^T) less its row means, one Gaussian bias a row.

    A row with bias b has linear part alpha(b) = (E g phi(b + sigma g))^2 and remainder v(b) = Var_g phi(b + sigma g) -
    alpha(b). The population covariance of the columns is diag(v) + diag(sqrt alpha) (W W^T/n_in) diag(sqrt alpha), so
    with g(b) = 1/(w - v - alpha tau):  tau (1 - E alpha g / psi) = 1,  z = w gain,  G = E g / gain,
    gain = 1 + ratio (w E g - 1). Averaging alpha and v over b before solving would be wrong.

    Fields:
        alpha, noise, row_mean: profiles alpha(b), v(b), E_g phi(b + sigma g) at the nodes of the bias.
        weight: of the nodes; sums to one.
        psi: n_in / n_out.  ratio: n_out / n_samples.
    """

    alpha: Float[np.ndarray, " nodes"]
    noise: Float[np.ndarray, " nodes"]
    row_mean: Float[np.ndarray, " nodes"]
    weight: Float[np.ndarray, " nodes"]
    psi: float
    ratio: float

    @classmethod
    def of(cls, phi: Activation, *, variance: float, sigma_b: float, psi: float, ratio: float) -> GramBiasLaw:
        """Profiles of an activation; `variance` is (sigma_w sigma_x)^2."""
        nodes, weight = np.polynomial.hermite_e.hermegauss(_HERMITE)
        keep = weight > 1e-14 * weight.max()
        bias, weight = sigma_b * nodes[keep], weight[keep] / weight[keep].sum()
        deviation = float(np.sqrt(variance))
        alpha, noise, mean = np.empty_like(bias), np.empty_like(bias), np.empty_like(bias)
        for k, b in enumerate(bias):
            # split where b + h meets a kink of phi, and at b + h = 0 where it bends most
            h, w = gaussian_rule(variance, (*(kink - b for kink in phi.kinks), -b))
            value = phi.value(b + h)
            mean[k] = w @ value
            alpha[k] = (w @ (h / deviation * value)) ** 2
            noise[k] = max(float(w @ (value - mean[k]) ** 2) - alpha[k], 0.0)
        noise = np.where(noise < 1e-12 * (alpha + noise), 0.0, noise)
        return cls(alpha=alpha, noise=noise, row_mean=mean, weight=weight, psi=psi, ratio=ratio)

    @property
    def zeta(self) -> float:
        """E alpha(b): the linear part on average."""
        return float(self.weight @ self.alpha)

    @property
    def mean(self) -> float:
        """Mean eigenvalue, E (alpha + v)."""
        return float(np.dot(self.weight, self.alpha + self.noise))

    def atoms(self) -> tuple[Atom, ...]:
        """At zero, where there are fewer samples than neurons (or, for a linear activation, inputs)."""
        mass = max(0.0, 1.0 - 1.0 / self.ratio)
        if not np.any(self.noise > 0.0):
            mass = max(mass, 1.0 - self.psi)
        return ((0.0, mass),) if mass > 0.0 else ()

    def support(self) -> tuple[Interval, ...]:
        """Bands between the stretches of real tau on which w and z fall."""
        return self._bands

    def _scale(self) -> float:
        return float(2.0 * self._largest * (1.0 + np.sqrt(self.ratio)) ** 2)

    @cached_property
    def _largest(self) -> float:
        return float((self.noise + self.alpha * (1.0 + self.psi**-0.5) ** 2).max())

    def _profiles(self, y: Unknowns) -> tuple[np.ndarray, ...]:
        """E g, E alpha g, E g^2, E alpha g^2, E alpha^2 g^2."""
        w, tau = y
        g = 1.0 / (w - self.noise[:, None] - self.alpha[:, None] * tau)
        first, second = self.weight, self.weight * self.alpha
        square = g * g
        return first @ g, second @ g, first @ square, second @ square, (second * self.alpha) @ square

    def _equations(
        self, y: Unknowns, z: Complex[np.ndarray, " points"]
    ) -> tuple[Unknowns, Complex[np.ndarray, "unknowns unknowns points"]]:
        w, tau = y
        with np.errstate(all="ignore"):
            g, ag, gg, agg, aagg = self._profiles(y)
        gain = 1.0 + self.ratio * (w * g - 1.0)
        beta = 1.0 / self.psi
        value = np.stack([tau * (1.0 - beta * ag) - 1.0, w * gain - z])
        slope = np.stack(
            [
                np.stack([tau * beta * agg, 1.0 - beta * ag - tau * beta * aagg]),
                np.stack([gain + self.ratio * w * (g - w * gg), self.ratio * w * w * agg]),
            ]
        )
        return value, slope

    def _far(self, z: Complex[np.ndarray, " points"]) -> Unknowns:
        return np.stack([z - self.ratio * self.mean, 1.0 + self.zeta / (self.psi * z)])

    def _admissible(self, y: Unknowns) -> Bool[np.ndarray, " points"]:
        w, tau = y
        return np.asarray((w.imag >= -1e-11 * np.abs(w)) & (tau.imag <= 1e-11 * np.abs(tau)))

    def _transform(self, y: Unknowns, z: Complex[np.ndarray, " points"]) -> Complex[np.ndarray, " points"]:
        g = self._profiles(y)[0]
        with np.errstate(all="ignore"):
            return np.asarray(g / (1.0 + self.ratio * (y[0] * g - 1.0)))

    def _potential(self, y: Unknowns, z: Complex[np.ndarray, " points"]) -> Complex[np.ndarray, " points"]:
        w, tau = y
        inverse = w - self.noise[:, None] - self.alpha[:, None] * tau
        u = w * (self.weight @ (1.0 / inverse)) - 1.0
        value = self.weight @ log_from_above(inverse) + self.psi * (tau - 1.0 - log_from_below(tau)) + u
        if self.ratio != 1.0:
            value = value + (1.0 - 1.0 / self.ratio) * log_from_below(1.0 + self.ratio * u)
        return np.asarray(value)

    def _outside(self, tau: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
        """Real w with E alpha/(w - v - alpha tau) = psi (1 - 1/tau), beyond every v + alpha tau, by bisection."""
        level = self.psi * (1.0 - 1.0 / tau)
        corner = self.noise[:, None] + self.alpha[:, None] * tau
        side = np.where(level > 0.0, 1.0, -1.0)
        base = np.where(level > 0.0, corner.max(axis=0), corner.min(axis=0))
        low, high = np.full(tau.shape, -80.0), np.full(tau.shape, 80.0)
        second = self.weight * self.alpha
        # 60 halvings of 160 units of log distance: to rounding
        for _ in range(60):
            middle = 0.5 * (low + high)
            w = base + side * np.exp(middle)
            with np.errstate(all="ignore"):
                too_large = np.abs(second @ (1.0 / (w - corner))) > np.abs(level)
            low, high = np.where(too_large, middle, low), np.where(too_large, high, middle)
        return np.asarray(base + side * np.exp(0.5 * (low + high)))

    def _real_curve(
        self, tau: Float[np.ndarray, " points"]
    ) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
        """w, z and the larger of the slopes dw/dtau, dz/dtau (scaled): negative where the law has no density."""
        w = self._outside(tau)
        y = np.stack([w, tau]).astype(complex)
        with np.errstate(all="ignore"):
            _, slope = self._equations(y, np.zeros(len(tau), dtype=complex))
            fall = -(slope[0, 1] / slope[0, 0]).real
            z_slope = (slope[1, 0] * fall + slope[1, 1]).real
            gain = 1.0 + self.ratio * (w * self._profiles(y)[0].real - 1.0)
        worst = np.maximum(fall, z_slope)
        return w, w * gain, np.where(np.isfinite(worst), worst, 1.0)

    @cached_property
    def _gaps(self) -> tuple[tuple[Interval, Interval], ...]:
        """Gaps in z, each with its stretch of tau."""
        spread = np.exp(np.linspace(-14.0, 14.0, _GRID))
        gaps = []
        for tau in (1.0 + spread, 1.0 / (1.0 + spread[::-1]), -spread[::-1]):
            falls = self._real_curve(tau)[2] < 0.0
            change = np.flatnonzero(np.diff(falls.astype(int)))
            cuts = [brentq(self._worst, tau[k], tau[k + 1], xtol=1e-15, rtol=1e-14) for k in change]
            ends = np.array([tau[0], *cuts, tau[-1]])
            state = bool(falls[0])
            for a, b in itertools.pairwise(ends):
                if state and b > a:
                    high, low = self._real_curve(np.array([a, b]))[1]
                    low = -np.inf if a == 1.0 else low
                    gaps.append(((float(low), float(high)), (float(a), float(b))))
                state = not state
        gaps.sort()
        # near tau = 1 the curve runs out to infinity
        (first, s0), (last, s1) = gaps[0], gaps[-1]
        gaps[0], gaps[-1] = ((-np.inf, first[1]), s0), ((last[0], np.inf), s1)
        return tuple(gaps)

    def _worst(self, tau: float) -> float:
        return float(self._real_curve(np.array([tau]))[2][0])

    @cached_property
    def _bands(self) -> tuple[Interval, ...]:
        gaps = self._gaps
        bands = [(a[1], b[0]) for (a, _), (b, _) in itertools.pairwise(gaps)]
        # the matrix is not negative: at most rounding below zero
        bands = [(max(low, 0.0), high) for low, high in bands]
        return tuple((low, high) for low, high in bands if high - low > 1e-9 * self._largest)

    def outlier(self, n_out: int) -> float | None:
        """Eigenvalue that the row means pull out of the bulk: n_out E h^2 g = 1, h = E_g phi(b + sigma g)."""
        (_, _), (start, stop) = self._gaps[-1]

        def excess(tau: float) -> float:
            w = self._outside(np.array([tau]))
            g = 1.0 / (w[0] - self.noise - self.alpha * tau)
            return n_out * float(self.weight @ (self.row_mean**2 * g)) - 1.0

        if excess(stop) <= 0.0:
            return None
        if excess(start) >= 0.0:
            return float(self.weight @ self.row_mean**2) * n_out
        tau = brentq(excess, start, stop, xtol=1e-15, rtol=1e-14)
        return float(self._real_curve(np.array([tau]))[1][0])
