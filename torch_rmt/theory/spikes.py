"""Spikes: where an eigenvalue that stands apart in one part comes out in the whole, and how much its vector keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from torch_rmt.measures import r_transform, s_transform
from torch_rmt.measures.base import SpectralMeasure


@dataclass(frozen=True)
class Spike:
    """What becomes of one spike.

    Fields:
        visible: whether an eigenvalue leaves the bulk.
        position: of that eigenvalue; where none does, the edge of the bulk nearest to it.
        overlap: squared scalar product of its eigenvector with the spike's; 0 where none leaves.
    """

    visible: bool
    position: float
    overlap: float


def _derivative(function: Callable[[float], float], at: float, reach: float) -> float:
    """Central difference of sixth order, in steps of a fiftieth of `reach`, the distance to the nearest singularity."""
    h = 0.02 * reach
    values = [function(at + k * h) for k in (-3, -2, -1, 1, 2, 3)]
    return (-values[0] + 9 * values[1] - 45 * values[2] + 45 * values[3] - 9 * values[4] + values[5]) / (60 * h)


def spike_in_sum(bulk: SpectralMeasure, noise: SpectralMeasure, spike: float) -> Spike:
    """Outlier of A + B where A has law `bulk` and one eigenvalue `spike` outside it, and B of law `noise` is free of A.

    The subordination function takes the outlier x to the spike: x = spike + R_noise(G_bulk(spike)), visible where x
    rises with the spike, and the slope dx/dspike is the overlap (Capitaine 2013; Benaych-Georges and Nadakuditi 2011
    for bulk = delta_0).

    Raises:
        ValueError: the spike lies inside the hull of the bulk.

    >>> from torch_rmt.measures import PointMass, Semicircle
    >>> found = spike_in_sum(PointMass(0.0), Semicircle(), 2.0)
    >>> round(found.position, 9), round(found.overlap, 6)       # theta + 1/theta, 1 - 1/theta^2
    (2.5, 0.75)
    """

    def position(at: float) -> float:
        return at + _r(noise, float(np.real(bulk.stieltjes(np.array(at)))))

    return _follow(bulk, spike, position, lambda x, at, slope: slope)


def spike_in_product(bulk: SpectralMeasure, noise: SpectralMeasure, spike: float) -> Spike:
    """Outlier of A^(1/2) B A^(1/2), A >= 0 of law `bulk` with one eigenvalue `spike` outside it, B >= 0 free of A.

    x = spike / S_noise(M_bulk(spike)), M = zG - 1; visible where x rises with the spike; the overlap is the logarithmic
    slope d log x / d log spike. With bulk = delta_1 and Marchenko-Pastur noise this is Baik, Ben Arous and Péché 2005.

    >>> from torch_rmt.measures import MarchenkoPastur, PointMass
    >>> round(spike_in_product(PointMass(1.0), MarchenkoPastur(0.25), 3.0).position, 9)     # 3 (1 + 0.25/2)
    3.375
    """
    if bulk.bounds()[0] < 0.0 or noise.bounds()[0] < 0.0 or not spike > 0.0:
        raise ValueError("a product needs positive parts: bulk, noise and spike must not be negative")

    def position(at: float) -> float:
        m = at * float(np.real(bulk.stieltjes(np.array(at)))) - 1.0
        return at / _s(noise, m)

    return _follow(bulk, spike, position, lambda x, at, slope: slope * at / x)


def _r(measure: SpectralMeasure, g: float) -> float:
    return float(np.real(r_transform(measure, np.array(g))))


def _s(measure: SpectralMeasure, u: float) -> float:
    return float(np.real(s_transform(measure, np.array(u))))


def _follow(
    bulk: SpectralMeasure,
    spike: float,
    position: Callable[[float], float],
    overlap: Callable[[float, float, float], float],
) -> Spike:
    if not np.isfinite(spike):
        raise ValueError(f"the spike must be finite, got {spike}")
    low, high = bulk.bounds()
    if low <= spike <= high:
        raise ValueError(f"the spike {spike:g} lies within the bulk [{low:g}, {high:g}]: it cannot stand apart")
    edge, side = (high, 1.0) if spike > high else (low, -1.0)

    def outlier(distance: float) -> float:
        return position(edge + side * distance)

    def slope(log_distance: float) -> float:
        distance = float(np.exp(log_distance))
        return side * _derivative(outlier, distance, distance)

    distance = side * (spike - edge)
    here = np.log(distance)
    rate = slope(here)
    x = position(spike)
    if rate > 0.0:
        return Spike(visible=True, position=x, overlap=float(np.clip(overlap(x, spike, rate), 0.0, 1.0)))
    # the edge of the bulk is where x turns, further out
    far = here
    while slope(far) <= 0.0:
        far += 1.0
    turning = float(np.exp(brentq(slope, far - 1.0 if far > here else here, far, xtol=1e-12)))
    return Spike(visible=False, position=outlier(turning), overlap=0.0)
