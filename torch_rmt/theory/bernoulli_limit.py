"""The Bernoulli universality class as a law: infinitely many projections that each lose an infinitesimal share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Complex, Float
from scipy.special import lambertw

from torch_rmt.theory.jacobian_law import JacobianLaw

Points = Complex[np.ndarray, " points"]
Reals = Float[np.ndarray, " points"]

_ORDERS = 9


@dataclass(frozen=True)
class BernoulliProduct:
    """Solves z = exp(v s) / s, s = M / (1 + M): s = -W(-v / z) / v with W Lambert's function.

    On the spectrum v s = a cot a - i a for an angle 0 < a < pi, and lambda = v (sin a / a) exp(a cot a), up to the edge
    e v at a = 0. For v < 1 the point mass 1 - v stands off the rest, at exp(v).

    Fields:
        variance: v, of a law of mean one.
    """

    variance: float

    @property
    def edges(self) -> tuple[tuple[float, float], ...]:
        """One interval of t = log z, down to a hard edge at zero."""
        return ((-math.inf, 1.0 + math.log(self.variance)),)

    @np.errstate(all="ignore")  # NaN outside is the answer
    def solve(self, t: Reals) -> tuple[np.ndarray, Points]:
        """(s, M) at real t inside the spectrum, NaN outside."""
        inside = np.isfinite(t) & (t < self.edges[0][1])
        s = np.full(t.shape, np.nan + 0j)
        s[inside], _ = self.solve_above(t[inside] + 0j)
        return s, s / (1.0 - s)

    def solve_above(self, log_z: Points) -> tuple[np.ndarray, Points]:
        """(s, M) at log z with 0 <= Im log z <= pi."""
        log_x = math.log(self.variance) - log_z + 1j * np.pi  # log of -v / z, from above
        near = log_x.real < 300.0
        w: Points = np.asarray(lambertw(np.exp(np.where(near, log_x, 0.0))), dtype=np.complex128)  # type: ignore[call-overload]
        w = np.where(near, w, log_x - np.log(np.where(near, 1.0, log_x)))
        for _ in range(4):
            # Newton on W + log W = log x where W is large: exp(log x) may overflow.
            step = (w + np.log(np.where(w == 0, 1.0, w)) - log_x) * w / (1.0 + w)
            w = np.where(near, w, w - step)
        s = -w / self.variance
        return s, s / (1.0 - s)

    def potential(self, log_z: Points, w: np.ndarray, u: Points) -> Points:
        """Integral of log(z - lambda), which is (1 - v) log(1 - s) - log s."""
        return np.asarray((1.0 - self.variance) * np.log(1.0 - w) - np.log(w))

    def knots(self) -> tuple[np.ndarray, ...]:
        """t through the spectrum, by the angle."""
        angle = np.concatenate([np.linspace(1e-3, 3.1, 200), np.pi - np.geomspace(0.04, 5e-3, 60)])
        t = math.log(self.variance) + np.log(np.sin(angle) / angle) + angle / np.tan(angle)
        return (t[::-1],)


def bernoulli_limit(variance: float) -> JacobianLaw:
    """The law with S(u) = exp(-variance u / (1 + u)), of mean one.

    Source: Pennington, Schoenholz and Ganguli 2018, section 3.3 (the equation for G); by Lambert's function here.
    Moments by Lagrange inversion: m_k = sum over j < k of (1 - j / k) (k v)^j / j!.

    Example:
        >>> law = bernoulli_limit(0.25)
        >>> law.atoms()[0][1], round(law.variance, 12), round(law.support()[0][1] / 0.25, 9)
        (0.75, 0.25, 2.718281828)
    """
    atoms = ((variance, 1.0 - variance),) if variance < 1.0 else ()
    moments = [1.0]
    for k in range(1, _ORDERS):
        moments.append(sum((1.0 - j / k) * (k * variance) ** j / math.factorial(j) for j in range(k)))
    return JacobianLaw(BernoulliProduct(variance), 0.0, atoms, np.array(moments))
