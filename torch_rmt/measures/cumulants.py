"""Moments and free cumulants, each from the other."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from torch_rmt.measures.half_plane import Numbers


def _powers(moments: Float[np.ndarray, " n"], order: int) -> Float[np.ndarray, "rows columns"]:
    """Coefficients of x^0 .. x^order in (1 + sum_k m_k x^k)^s, one row for each s = 0 .. order."""
    series = np.concatenate([[1.0], moments])[: order + 1]
    rows = np.zeros((order + 1, order + 1))
    rows[0, 0] = 1.0
    for s in range(1, order + 1):
        rows[s] = np.convolve(rows[s - 1], series)[: order + 1]
    return rows


def free_cumulants(moments: Numbers) -> Float[np.ndarray, " n"]:
    """Free cumulants kappa_1 .. kappa_n of the moments m_1 .. m_n.

    m_n = sum_s kappa_s [x^(n - s)] (1 + sum_k m_k x^k)^s. Source: Nica and Speicher 2006, lecture 11.

    >>> free_cumulants([0.0, 1.0, 0.0, 2.0]).tolist()
    [0.0, 1.0, 0.0, 0.0]
    """
    m = np.asarray(moments, dtype=float)
    rows = _powers(m, m.size)
    kappa = np.zeros(m.size)
    for n in range(1, m.size + 1):
        kappa[n - 1] = m[n - 1] - sum(kappa[s - 1] * rows[s, n - s] for s in range(1, n))
    return kappa


def moments_from_free_cumulants(cumulants: Numbers) -> Float[np.ndarray, " n"]:
    """Moments m_1 .. m_n of the free cumulants kappa_1 .. kappa_n.

    >>> moments_from_free_cumulants([1.0, 1.0, 1.0]).tolist()
    [1.0, 2.0, 5.0]
    """
    kappa = np.asarray(cumulants, dtype=float)
    m = np.zeros(kappa.size)
    for n in range(1, kappa.size + 1):
        rows = _powers(m[: n - 1], n)
        m[n - 1] = sum(kappa[s - 1] * rows[s, n - s] for s in range(1, n + 1))
    return m


def _rectangular_powers(
    moments: Float[np.ndarray, " n"], ratio: float, order: int
) -> Float[np.ndarray, "rows columns"]:
    """As `_powers` for (1 + M)(1 + ratio M), M = sum_k m_k x^k."""
    series = np.concatenate([[0.0], moments])[: order + 1]
    one = np.zeros(len(series))
    one[0] = 1.0
    return _powers(np.convolve(one + series, one + ratio * series)[1 : len(series)], order)


def rectangular_cumulants(moments: Numbers, ratio: float | int) -> Float[np.ndarray, " n"]:
    """Rectangular free cumulants c_1 .. c_n of the moments m_1 .. m_n of A^T A, A of the smaller width to the larger.

    They add for free matrices of one shape, ratio <= 1 the smaller width over the larger one:
    m_n = sum_s c_s [x^(n - s)] ((1 + M)(1 + ratio M))^s, M = sum_k m_k x^k. Source: Benaych-Georges 2009.

    >>> rectangular_cumulants([1.0, 1.5, 2.75], 0.5).tolist()  # of a Gaussian matrix
    [1.0, 0.0, 0.0]
    """
    m = np.asarray(moments, dtype=float)
    rows = _rectangular_powers(m, float(ratio), m.size)
    c = np.zeros(m.size)
    for n in range(1, m.size + 1):
        c[n - 1] = m[n - 1] - sum(c[s - 1] * rows[s, n - s] for s in range(1, n))
    return c


def moments_from_rectangular_cumulants(cumulants: Numbers, ratio: float | int) -> Float[np.ndarray, " n"]:
    """Moments m_1 .. m_n of the rectangular cumulants c_1 .. c_n.

    >>> moments_from_rectangular_cumulants([1.0, 0.0, 0.0], 0.5).tolist()
    [1.0, 1.5, 2.75]
    """
    c = np.asarray(cumulants, dtype=float)
    m = np.zeros(c.size)
    for n in range(1, c.size + 1):
        rows = _rectangular_powers(m[: n - 1], float(ratio), n)
        m[n - 1] = sum(c[s - 1] * rows[s, n - s] for s in range(1, n + 1))
    return m
