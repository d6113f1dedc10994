"""Gaussian moments of piecewise-linear activations in closed form: hard tanh, ReLU6, shifted ReLU and their kin."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import gammainc, owens_t

# The terms of a pair, each of order q, cancel where the function is bounded; what may be lost, relative to E phi^2.
_LOST = 1e-12


@dataclass(frozen=True)
class PiecewiseLinear:
    """phi(h) = offset + slope h around zero, with the slope changing by `turn` at each of the kinks.

    Fields:
        offset, slope: value at zero and slope of the piece that holds zero (of the one to its right if zero is a kink).
        turns: (kink, change of slope from left to right), ascending.

    Moments of one variable sum the pieces, by the incomplete gamma function; pairs sum the hinges, by Owen's function:
    with X, Y standard, r^2 = 1 - c^2, L = P(X > x, Y > y), Q the upper tail and g the density of N(0, 1),
    E (X - x)+ (Y - y)+ = (c + x y) L + r^2 g2 - x g(y) Q((x - c y) / r) - y g(x) Q((y - c x) / r).

    Source: Rosenbaum 1961 for the truncated moments; Owen 1956. Put together here.

    Example:
        >>> hard_tanh = PiecewiseLinear(0.0, 1.0, ((-1.0, 1.0), (1.0, -1.0)))
        >>> abs(hard_tanh.square_slope(1.0) - math.erf(0.5**0.5)) < 1e-15
        True
    """

    offset: float
    slope: float
    turns: tuple[tuple[float, float], ...]

    def value(self, h: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """phi(h)."""
        result = self.offset + self.slope * h
        for side, distance, turn in self._hinges():
            result = result + turn * np.maximum(side * h - distance, 0.0)
        return np.asarray(result)

    def _pieces(self) -> list[tuple[float, float, float, float]]:
        """(low, high, intercept, slope) of each piece, from left to right."""
        middle = sum(1 for kink, _ in self.turns if kink <= 0.0)
        pieces = [(-math.inf, math.inf, self.offset, self.slope)]
        for kink, turn in reversed(self.turns[:middle]):
            low, high, intercept, slope = pieces[0]
            left = slope - turn
            pieces[0] = (kink, high, intercept, slope)
            pieces.insert(0, (low, kink, intercept + (slope - left) * kink, left))
        for kink, turn in self.turns[middle:]:
            low, high, intercept, slope = pieces[-1]
            pieces[-1] = (low, kink, intercept, slope)
            pieces.append((kink, high, intercept - turn * kink, slope + turn))
        return pieces

    def _hinges(self) -> list[tuple[int, float, float]]:
        """(side, distance, turn): phi = offset + slope h + sum of turn (side h - distance)+, distances >= 0."""
        return [(1, kink, turn) if kink > 0.0 else (-1, -kink, turn) for kink, turn in self.turns]

    def mean(self, q: float) -> float:
        """E phi(h)."""
        return sum(b * _mass(q, low, high) + a * _first(q, low, high) for low, high, b, a in self._pieces())

    def mean_slope(self, q: float) -> float:
        """E phi'(h)."""
        return sum(a * _mass(q, low, high) for low, high, _, a in self._pieces())

    def square(self, q: float) -> float:
        """E phi(h)^2."""
        return sum(
            b * b * _mass(q, low, high) + 2.0 * a * b * _first(q, low, high) + a * a * q * _second(q, low, high)
            for low, high, b, a in self._pieces()
        )

    def square_slope(self, q: float) -> float:
        """E phi'(h)^2."""
        return sum(a * a * _mass(q, low, high) for low, high, _, a in self._pieces())

    def square_rate(self, q: float) -> float:
        """d/dq E phi(h)^2."""
        total = 0.0
        for low, high, b, a in self._pieces():
            total += a * a * _second(q, low, high)
            if a * b != 0.0:
                total += a * b * _first(q, low, high) / q
        return total

    def pair(self, q: float, c: float) -> float:
        """E phi(h1) phi(h2); NaN where the terms cancel (hard tanh from about q = 1e4)."""
        square = self.square(q)
        if c >= 1.0 or q == 0.0:
            return square
        s, total, size = math.sqrt(q), self.offset**2 + self.slope**2 * q * c, 0.0
        hinges = self._hinges()
        for i, (side, distance, turn) in enumerate(hinges):
            x = distance / s
            # E (h - k)+ and E h2 (h1 - k)+ = q c P(h1 > k).
            total += 2.0 * turn * (self.offset * s * _excess(x) + side * self.slope * q * c * _upper(x))
            for other, other_distance, other_turn in hinges[: i + 1]:
                both = q * _hinge_pair(x, other_distance / s, side * other * c)
                total += turn * other_turn * both * (1.0 if (other, other_distance) == (side, distance) else 2.0)
                size = max(size, abs(turn * other_turn) * both)
        return total if 4e-16 * size <= _LOST * square else math.nan

    def pair_slope(self, q: float, c: float) -> float:
        """E phi'(h1) phi'(h2)."""
        if c >= 1.0:
            return self.square_slope(q)
        s, total = math.sqrt(q), self.slope**2
        hinges = self._hinges()
        for i, (side, distance, turn) in enumerate(hinges):
            x = distance / s if distance > 0.0 else 0.0
            total += 2.0 * self.slope * side * turn * _upper(x)
            for other, other_distance, other_turn in hinges[: i + 1]:
                y = other_distance / s if other_distance > 0.0 else 0.0
                weight = 1.0 if (other, other_distance) == (side, distance) else 2.0
                total += weight * side * other * turn * other_turn * _orthant(x, y, side * other * c)
        return total


def piecewise_linear(kinks: tuple[float, ...], slopes: tuple[float, ...], offset: float) -> PiecewiseLinear:
    """The function with these kinks, slopes between them and value at zero."""
    turns = tuple((k, right - left) for k, left, right in zip(kinks, slopes[:-1], slopes[1:], strict=True))
    return PiecewiseLinear(offset, slopes[sum(1 for k in kinks if k <= 0.0)], turns)


def _upper(x: float) -> float:
    """P(X > x)."""
    return 0.5 * math.erfc(x / math.sqrt(2.0))


def _gauss(x: float) -> float:
    return math.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def _excess(x: float) -> float:
    """E (X - x)+."""
    return _gauss(x) - x * _upper(x)


def _ends(q: float, low: float, high: float) -> tuple[float, float]:
    s = math.sqrt(q)
    if s == 0.0:
        return (math.copysign(math.inf, low) if low else 0.0), (math.copysign(math.inf, high) if high else 0.0)
    return low / s, high / s


def _mass(q: float, low: float, high: float) -> float:
    """P(low < h < high)."""
    a, b = _ends(q, low, high)
    if a >= 0.0:
        return _upper(a) - _upper(b)
    if b <= 0.0:
        return _upper(-b) - _upper(-a)
    return 0.5 * (math.erf(b / math.sqrt(2.0)) - math.erf(a / math.sqrt(2.0)))


def _first(q: float, low: float, high: float) -> float:
    """E[h; low < h < high]."""
    a, b = _ends(q, low, high)
    return math.sqrt(q) * (_gauss(a) - _gauss(b))


def _second(q: float, low: float, high: float) -> float:
    """E[h^2; low < h < high] / q."""

    def up_to(x: float) -> float:
        return math.copysign(0.5 * float(gammainc(1.5, 0.5 * x * x)), x)

    def beyond(x: float) -> float:
        return _upper(x) + x * _gauss(x) if math.isfinite(x) else 0.0

    a, b = _ends(q, low, high)
    if a > 1.0 or b < -1.0:  # both far out: differences of tails
        a, b = (a, b) if a > 0 else (-b, -a)
        return beyond(a) - beyond(b)
    return up_to(b) - up_to(a)


def _orthant(x: float, y: float, c: float) -> float:
    """P(X > x, Y > y) for x, y >= 0 and correlation c."""
    root = math.sqrt((1.0 - c) * (1.0 + c))
    if x == 0.0 and y == 0.0:
        return 0.25 + math.atan2(c, root) / (2.0 * math.pi)
    if c <= -1.0 or max(x, y) > 38.0:
        return 0.0
    if c >= 1.0:
        return _upper(max(x, y))

    def share(at: float, other: float) -> float:
        # (other - c at) without cancellation where both agree and c is close to one.
        gap = (other - at) + (1.0 - c) * at
        return 0.25 if at == 0.0 else float(owens_t(at, gap / (at * root)))

    return max(0.5 * (_upper(x) + _upper(y)) - share(x, y) - share(y, x), 0.0)


def _hinge_pair(x: float, y: float, c: float) -> float:
    """E (X - x)+ (Y - y)+ for standard X, Y of correlation c, x, y >= 0."""
    if max(x, y) > 38.0:
        return 0.0
    root = math.sqrt((1.0 - c) * (1.0 + c))
    if root == 0.0:
        far = max(x, y)
        return 0.0 if c < 0.0 else max((1.0 + x * y) * _upper(far) - min(x, y) * _gauss(far), 0.0)
    to_x, to_y = (x - y) + (1.0 - c) * y, (y - x) + (1.0 - c) * x
    exponent = ((x - y) ** 2 / (1.0 - c) + 2.0 * x * y) / (2.0 * (1.0 + c))
    both = root * math.exp(-exponent) / (2.0 * math.pi)
    edges = x * _gauss(y) * _upper(to_x / root) + y * _gauss(x) * _upper(to_y / root)
    return max((c + x * y) * _orthant(x, y, c) + both - edges, 0.0)
