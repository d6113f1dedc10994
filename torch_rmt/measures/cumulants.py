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
