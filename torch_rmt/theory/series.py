"""Moments of a free product from the moments of its factors, by S-transforms as truncated power series."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

Series = Float[np.ndarray, " orders"]
Other = Float[np.ndarray, " others"]  # a series of another length


def multiply(a: Series, b: Series) -> Series:
    """Product of two power series, truncated to the length of the first."""
    return np.asarray(np.convolve(a, b)[: len(a)])


def power(a: Series, exponent: float | int) -> Series:
    """A series with a_0 > 0 to a real power (J. C. P. Miller's recurrence)."""
    result = np.zeros_like(a)
    result[0] = a[0] ** exponent
    for n in range(1, len(a)):
        k = np.arange(1, n + 1)
        result[n] = np.sum((k * exponent - n + k) * a[k] * result[n - k]) / (n * a[0])
    return result


def revert(a: Series) -> Series:
    """Compositional inverse of a_0 + ... with a_0 = 0, a_1 != 0, by Lagrange's formula."""
    orders = len(a)
    ratio = np.append(a[1:], 0.0)
    result = np.zeros(orders)
    for n in range(1, orders):
        result[n] = power(ratio, -n)[n - 1] / n
    return result


def s_series(moments: Sequence[float] | Series) -> Other:
    """S(u) as a series from moments m_0 = 1, m_1 > 0, ..., m_n; n coefficients."""
    shifted = np.array(moments, dtype=np.float64)
    shifted[0] = 0.0
    inverse = revert(shifted)
    # S(u) = (1 + u) / u * inverse(u).
    over_u = inverse[1:]
    return np.asarray(over_u + np.append(0.0, over_u[:-1]))


def moments_from_s(s: Series) -> Other:
    """Moments m_0 = 1, m_1, ..., m_n from n coefficients of S."""
    # inverse(u) = u / (1 + u) * S(u).
    geometric = (-1.0) ** np.arange(len(s))
    result = revert(np.append(0.0, multiply(s, geometric)))
    result[0] = 1.0
    return result
