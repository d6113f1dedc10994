"""The shortcut of a residual block: a multiple of the identity, a Haar matrix or a Gaussian one, of any shape."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from torch_rmt.theory.chain_parts import Points, log_one_plus
from torch_rmt.theory.series import Series, multiply, power
from torch_rmt.theory.slope_law import x_log_x

Reals = Float[np.ndarray, " points"]


@dataclass(frozen=True)
class Shortcut:
    """A shortcut B from a space to one of 1 / ratio times its dimension; |B|^2 has mean `scale` in the first.

    Alone it has M_B = b at h = (1 + b)(1 + ratio b) / z = k(b): b / scale for a Gaussian one, and for the identity and
    Haar matrices, with B^T B or B B^T a multiple of the identity, b (1 + c b) / scale, c = min(1, ratio). A Gaussian
    one that sees but a share p of the input's dimensions has b (1 + b) / (1 + b / p) / scale.
    """

    scale: float
    gaussian: bool = False
    ratio: float = 1.0
    seen: float = 1.0

    @property
    def curve(self) -> float:
        """c."""
        return min(1.0, self.ratio)

    @property
    def value(self) -> float:
        """What the squares of a Haar matrix's singular values all are."""
        return self.scale * max(1.0, self.ratio)

    @np.errstate(all="ignore")
    def evaluate(self, log_b: Points) -> tuple[Points, Points]:
        """log k(b) and its slope in log b."""
        if self.gaussian and self.seen == 1.0:
            return log_b - np.log(self.scale), np.ones_like(log_b)
        if self.gaussian:
            b = np.exp(log_b)
            log_k = log_b + log_one_plus(b) - log_one_plus(b / self.seen) - np.log(self.scale)
            return log_k, 1.0 + b / (1.0 + b) - b / (self.seen + b)
        b = self.curve * np.exp(log_b)
        return log_b + log_one_plus(b) - np.log(self.scale), 1.0 + b / (1.0 + b)

    def roots(self, square: Reals) -> tuple[Reals, ...]:
        """The real b with k(b) = square; NaN where there is none."""
        if self.gaussian and self.seen == 1.0:
            return (self.scale * square,)
        if self.gaussian:
            with np.errstate(all="ignore"):
                half = 0.5 * (1.0 - self.scale * square / self.seen)
                root = np.sqrt(half**2 + self.scale * square)
                # Without cancellation at small squares.
                far = -half - np.copysign(root, half)
                near = -self.scale * square / far
                return np.maximum(near, far), np.minimum(near, far)
        with np.errstate(all="ignore"):
            root = np.sqrt(1.0 + 4.0 * self.curve * self.scale * square)
            # Without cancellation at small squares.
            upper = 2.0 * self.scale * square / (1.0 + root)
            return upper, -1.0 / self.curve - upper

    def primitive(self, b: Points, log_b: Points) -> Points:
        """Integral of log k over b, from 0."""
        if self.gaussian:
            seen = x_log_x(1.0 + b) - self.seen * x_log_x(1.0 + b / self.seen) if self.seen < 1.0 else 0.0
            return np.asarray(b * log_b - b - b * np.log(self.scale) + seen)
        c = self.curve
        return np.asarray(b * log_b + x_log_x(1.0 + c * b) / c - 2.0 * b - b * np.log(self.scale))

    def series(self, square: Series) -> Series:
        """b as a power series, from that of k(b)."""
        if self.gaussian and self.seen == 1.0:
            return np.asarray(self.scale * square)
        if self.gaussian:
            half = -0.5 * self.scale * square / self.seen
            half[0] += 0.5
            inside = multiply(half, half) + self.scale * square
            return np.asarray(power(inside, 0.5) - half)
        inside = 4.0 * self.curve * self.scale * square
        inside[0] += 1.0
        root = power(inside, 0.5)
        root[0] -= 1.0
        return np.asarray(root / (2.0 * self.curve))
