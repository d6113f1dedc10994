"""Gaussian moments of an activation in closed form: what an `Activation` carries where they are known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class GaussianMoments(Protocol):
    """Expectations over h ~ N(0, q), and over a pair (h1, h2) of that variance and correlation -1 <= c <= 1."""

    def mean(self, q: float) -> float:
        """E phi(h)."""
        ...

    def mean_slope(self, q: float) -> float:
        """E phi'(h)."""
        ...

    def square(self, q: float) -> float:
        """E phi(h)^2."""
        ...

    def square_slope(self, q: float) -> float:
        """E phi'(h)^2."""
        ...

    def square_rate(self, q: float) -> float:
        """d/dq E phi(h)^2 = E[h phi(h) phi'(h)] / q."""
        ...

    def pair(self, q: float, c: float) -> float:
        """E phi(h1) phi(h2)."""
        ...

    def pair_slope(self, q: float, c: float) -> float:
        """E phi'(h1) phi'(h2), which is d/dc of the former over q."""
        ...


def _arc(c: float) -> tuple[float, float]:
    """arcsin(c) and sqrt(1 - c^2), the latter without cancellation."""
    root = math.sqrt((1.0 - c) * (1.0 + c))
    return math.atan2(c, root), root


@dataclass(frozen=True)
class Homogeneous:
    """phi(h) = left h below zero, right h above: linear, ReLU, leaky ReLU, |h|.

    With phi = m h + d |h|: E phi phi = q [m^2 c + d^2 (2 / pi) (sqrt(1 - c^2) + c arcsin c)].

    Source: Cho and Saul 2009, arc-cosine kernels of order 1 and 0.

    Example:
        >>> Homogeneous(0.0, 1.0).square(3.0), round(Homogeneous(0.0, 1.0).pair(1.0, 0.0) * 2 * math.pi, 12)
        (1.5, 1.0)
    """

    left: float
    right: float

    def mean(self, q: float) -> float:
        """E phi(h)."""
        return (self.right - self.left) * math.sqrt(q / (2.0 * math.pi))

    def mean_slope(self, q: float) -> float:
        """E phi'(h)."""
        return (self.left + self.right) / 2.0

    def square(self, q: float) -> float:
        """E phi(h)^2."""
        return q * (self.left**2 + self.right**2) / 2.0

    def square_slope(self, q: float) -> float:
        """E phi'(h)^2."""
        return (self.left**2 + self.right**2) / 2.0

    def square_rate(self, q: float) -> float:
        """d/dq E phi(h)^2."""
        return (self.left**2 + self.right**2) / 2.0

    def pair(self, q: float, c: float) -> float:
        """E phi(h1) phi(h2)."""
        m, d = (self.left + self.right) / 2.0, (self.right - self.left) / 2.0
        angle, root = _arc(c)
        return q * (m * m * c + d * d * (root + c * angle) * (2.0 / math.pi))

    def pair_slope(self, q: float, c: float) -> float:
        """E phi'(h1) phi'(h2)."""
        m, d = (self.left + self.right) / 2.0, (self.right - self.left) / 2.0
        return m * m + d * d * _arc(c)[0] * (2.0 / math.pi)


@dataclass(frozen=True)
class ErrorFunction:
    """phi(h) = erf(scale h): E phi phi = (2 / pi) arcsin(x c / (1 + x)), x = 2 scale^2 q.

    Source: Williams 1997, eq. (10).

    Example:
        >>> round(ErrorFunction(1.0).square(0.5) * math.pi, 12) == round(2 * math.asin(0.5), 12)
        True
    """

    scale: float

    def mean(self, q: float) -> float:
        """E phi(h)."""
        return 0.0

    def mean_slope(self, q: float) -> float:
        """E phi'(h)."""
        return 2.0 * self.scale / math.sqrt(math.pi * (1.0 + 2.0 * self.scale**2 * q))

    def square(self, q: float) -> float:
        """E phi(h)^2."""
        return self.pair(q, 1.0)

    def square_slope(self, q: float) -> float:
        """E phi'(h)^2."""
        return self.pair_slope(q, 1.0)

    def square_rate(self, q: float) -> float:
        """d/dq E phi(h)^2."""
        x = 2.0 * self.scale**2 * q
        return 4.0 * self.scale**2 / (math.pi * (1.0 + x) * math.sqrt(1.0 + 2.0 * x))

    def pair(self, q: float, c: float) -> float:
        """E phi(h1) phi(h2)."""
        x = 2.0 * self.scale**2 * q
        # arcsin(y) as an angle: no digit is lost where y is close to one.
        return 2.0 / math.pi * math.atan2(x * c, math.sqrt((1.0 + x * (1.0 - c)) * (1.0 + x * (1.0 + c))))

    def pair_slope(self, q: float, c: float) -> float:
        """E phi'(h1) phi'(h2)."""
        x = 2.0 * self.scale**2 * q
        return 4.0 * self.scale**2 / (math.pi * math.sqrt((1.0 + x * (1.0 - c)) * (1.0 + x * (1.0 + c))))


@dataclass(frozen=True)
class GaussianLinear:
    """phi(h) = h Phi(h), GELU.

    Phi(h) is the probability that h + t > 0, t ~ N(0, 1): so E phi phi is the mean of h1 h2 over the quadrant where
    both v_i = h_i + t_i are positive. With den = (1 + q)^2 - q^2 c^2, P = 1/4 + arcsin(q c / (1 + q)) / 2 pi,
    a = (q + q^2 (1 - c^2)) / den and b = q c / den, the regression coefficients of h_1 on v_1 and v_2:
    E phi phi = b P + 2 a b E[v1^2; quadrant] + (a^2 + b^2) E[v1 v2; quadrant].

    Source: derived here; Tsuchida et al. 2021, "Avoiding kernel fixed points", proposition 5, has an equal one.

    Example:
        >>> round(GaussianLinear().mean_slope(7.0), 12), round(GaussianLinear().square(1e-12) * 1e12, 6)
        (0.5, 0.25)
    """

    def mean(self, q: float) -> float:
        """E phi(h)."""
        return q / math.sqrt(2.0 * math.pi * (1.0 + q))

    def mean_slope(self, q: float) -> float:
        """E phi'(h)."""
        return 0.5

    def square(self, q: float) -> float:
        """E phi(h)^2."""
        root = math.sqrt(1.0 + 2.0 * q)
        return q * (0.25 + math.atan2(q, root) / (2.0 * math.pi)) + q * q / (math.pi * (1.0 + q) * root)

    def square_slope(self, q: float) -> float:
        """E phi'(h)^2."""
        return self.pair_slope(q, 1.0)

    def square_rate(self, q: float) -> float:
        """d/dq E phi(h)^2."""
        root = math.sqrt(1.0 + 2.0 * q)
        share = q / (math.pi * (1.0 + q) * root)
        quadrant = 0.25 + math.atan2(q, root) / (2.0 * math.pi)
        return quadrant + share * (2.5 - q / (1.0 + q) - q / (1.0 + 2.0 * q))

    def pair(self, q: float, c: float) -> float:
        """E phi(h1) phi(h2)."""
        den = (1.0 + q * (1.0 - c)) * (1.0 + q * (1.0 + c))
        root = math.sqrt(den)
        angle = 0.25 + math.atan2(q * c, root) / (2.0 * math.pi)
        a, b = (q + q * q * (1.0 - c) * (1.0 + c)) / den, q * c / den
        # E[v1^2; quadrant] and E[v1 v2; quadrant], v of variance 1 + q.
        own = (1.0 + q) * angle + q * c * root / (2.0 * math.pi * (1.0 + q))
        both = q * c * angle + root / (2.0 * math.pi)
        return b * angle + 2.0 * a * b * own + (a * a + b * b) * both

    def pair_slope(self, q: float, c: float) -> float:
        """E phi'(h1) phi'(h2)."""
        den = (1.0 + q * (1.0 - c)) * (1.0 + q * (1.0 + c))
        root = math.sqrt(den)
        angle = 0.25 + math.atan2(q * c, root) / (2.0 * math.pi)
        return angle + q * c / (2.0 * math.pi * root) * (2.0 / (1.0 + q) + 1.0 / den)


@dataclass(frozen=True)
class Sine:
    """phi(h) = sin(h): E phi phi = exp(-q) sinh(q c).

    Example:
        >>> round(Sine().square_slope(0.0), 12)
        1.0
    """

    def mean(self, q: float) -> float:
        """E phi(h)."""
        return 0.0

    def mean_slope(self, q: float) -> float:
        """E phi'(h)."""
        return math.exp(-q / 2.0)

    def square(self, q: float) -> float:
        """E phi(h)^2."""
        return -math.expm1(-2.0 * q) / 2.0

    def square_slope(self, q: float) -> float:
        """E phi'(h)^2."""
        return (1.0 + math.exp(-2.0 * q)) / 2.0

    def square_rate(self, q: float) -> float:
        """d/dq E phi(h)^2."""
        return math.exp(-2.0 * q)

    def pair(self, q: float, c: float) -> float:
        """E phi(h1) phi(h2)."""
        size = abs(c)
        return math.copysign(-math.exp(-q * (1.0 - size)) * math.expm1(-2.0 * q * size) / 2.0, c)

    def pair_slope(self, q: float, c: float) -> float:
        """E phi'(h1) phi'(h2)."""
        return (math.exp(-q * (1.0 - c)) + math.exp(-q * (1.0 + c))) / 2.0
