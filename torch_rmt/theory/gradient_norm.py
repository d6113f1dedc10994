"""`GradientNormLaw`: the nearly log-normal law of a squared gradient norm, its quantiles, bands and risk in words."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from torch_rmt.theory.layer_factor import LogProductLaw


@dataclass(frozen=True)
class GradientNormLaw:
    """Law of log ||J u||^2 for a unit vector u and a network drawn at random.

    Fields:
        mean, variance: of log ||J u||^2.
        log_mean_field: what the mean field at infinite width says of log ||J u||^2; where nothing fluctuates.
        skewness, excess_kurtosis: of log ||J u||^2; zero where only the limit (a Gaussian) is known.
        exact: whether mean and variance are exact at these widths or hold to leading order in 1/width.
        assumptions, reference: in words.
        law: the distribution function itself, where it is known (homogeneous activations): bands then raise false
            alarms at the stated rate at every width. Without it the Gaussian limit is corrected for skewness and
            kurtosis (Cornish and Fisher), as far as they are known.
    """

    mean: float
    variance: float
    log_mean_field: float = 0.0
    skewness: float = 0.0
    excess_kurtosis: float = 0.0
    exact: bool = False
    assumptions: tuple[str, ...] = ()
    reference: str = ""
    law: LogProductLaw | None = field(default=None, repr=False)

    @property
    def beta(self) -> float:
        """The variance, by the name that Hanin and Nica give it."""
        return self.variance

    def log_quantile(self, p: ArrayLike) -> Float[np.ndarray, "..."]:
        """Quantile of log ||J u||^2 at probability p."""
        levels = np.asarray(p, dtype=float)
        z = ndtri(levels)
        skew, kurt = self.skewness, self.excess_kurtosis
        shifted = (
            z + skew * (z**2 - 1.0) / 6.0 + kurt * (z**3 - 3.0 * z) / 24.0 - skew**2 * (2.0 * z**3 - 5.0 * z) / 36.0
        )
        value = np.asarray(self.mean + np.sqrt(self.variance) * shifted)
        if self.law is None:
            return value
        exact = [self._exact_quantile(float(level)) for level in levels.ravel()]
        return np.array(exact).reshape(levels.shape)

    def _exact_quantile(self, level: float) -> float:
        if not 0.0 < level < 1.0:
            return float(np.sign(level - 0.5)) * np.inf if 0.0 <= level <= 1.0 else np.nan
        deviation = float(np.sqrt(self.variance))
        low, high = self.mean - 4.0 * deviation, self.mean + 4.0 * deviation
        while self._exact_cdf(low) >= level:
            low -= 4.0 * deviation
        while self._exact_cdf(high) < level and high < self.mean + 60.0 * deviation:
            high += 4.0 * deviation
        return float(brentq(lambda y: self._exact_cdf(y) - level, low, high, xtol=1e-12 * (1.0 + abs(self.mean))))

    def _exact_cdf(self, y: float) -> float:
        return float(self.log_cdf(np.array(y)))

    def log_cdf(self, y: ArrayLike) -> Float[np.ndarray, "..."]:
        """P(log ||J u||^2 <= y): exact where `law` is known, else by the Edgeworth expansion, clipped to [0, 1]."""
        at = np.asarray(y, dtype=float)
        if self.law is not None:
            return self.law.cdf(at)
        if self.variance == 0.0:
            return np.asarray(at >= self.mean, dtype=float)
        x = (at - self.mean) / np.sqrt(self.variance)
        skew, kurt = self.skewness, self.excess_kurtosis
        gauss = np.exp(-0.5 * x**2) / np.sqrt(2.0 * np.pi)
        correction = (
            skew * (x**2 - 1.0) / 6.0
            + kurt * (x**3 - 3.0 * x) / 24.0
            + skew**2 * (x**5 - 10.0 * x**3 + 15.0 * x) / 72.0
        )
        return np.asarray(np.clip(ndtr(x) - gauss * correction, 0.0, 1.0))

    def band(self, false_alarms: float = 0.05) -> tuple[float, float]:
        """Interval of ||J u||^2 that a network drawn at random leaves with probability `false_alarms`, half on each
        side."""
        if not 0.0 < false_alarms < 1.0:
            raise ValueError(f"false_alarms is a probability strictly between 0 and 1, got {false_alarms}")
        low, high = np.exp(self.log_quantile(np.array([0.5 * false_alarms, 1.0 - 0.5 * false_alarms])))
        return float(low), float(high)

    def probability_off_by(self, factor: float) -> float:
        """Probability that the norm ||J u|| is more than `factor` times above or below what the mean field says."""
        if not factor > 1.0:
            raise ValueError(f"factor must exceed 1, got {factor}")
        reach = 2.0 * np.log(factor)
        below, above = self.log_cdf(np.array([self.log_mean_field - reach, self.log_mean_field + reach]))
        return float(below + 1.0 - above)

    def factor_at_risk(self, one_in: float = 20.0) -> float:
        """The factor that the norm is off by in one network out of `one_in`."""
        if not (one_in > 1.0 and np.isfinite(one_in)):
            raise ValueError(f"one_in must exceed 1 and be finite, got {one_in}")
        if self.variance == 0.0:
            return float(np.exp(0.5 * abs(self.mean - self.log_mean_field)))
        spread = abs(self.mean - self.log_mean_field) + 12.0 * float(np.sqrt(self.variance))
        log_factor = brentq(
            lambda y: self.probability_off_by(float(np.exp(y))) - 1.0 / one_in, 1e-12, spread, xtol=1e-12
        )
        return float(np.exp(log_factor))

    def statement(self, one_in: float = 20.0) -> str:
        """The risk in words.

        >>> GradientNormLaw(mean=-1.0, variance=2.0).statement()
        'one network in 20 has gradients more than 5.3 times off (too large or too small) at random'
        """
        return (
            f"one network in {one_in:g} has gradients more than {self.factor_at_risk(one_in):.2g} times off "
            "(too large or too small) at random"
        )
