"""The laws and convolutions that the tests of `measures` run over, and the quadrature they are checked by."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import ndtr

from torch_rmt.measures import (
    Affine,
    Arcsine,
    Bernoulli,
    Discrete,
    FussCatalan,
    GaussianPushforward,
    KestenMcKay,
    MarchenkoPastur,
    Mixture,
    PointMass,
    QuarterCircle,
    Semicircle,
    SpectralMeasure,
    Uniform,
    Wachter,
    dilate,
    free_add,
    free_compress,
    free_mul,
    free_poisson,
    free_power,
    rectangular_product,
    rectangular_sum,
)

LAWS: dict[str, SpectralMeasure] = {
    "semicircle": Semicircle(2.0, mean=0.5),
    "mp-wide": MarchenkoPastur(0.3),
    "mp-square": MarchenkoPastur(1.0, 2.0),
    "mp-kernel": MarchenkoPastur(3.0, 2.0),
    "free-poisson": free_poisson(0.7, 1.5),
    "fuss-catalan-half": FussCatalan(0.5),
    "fuss-catalan-3": FussCatalan(3),
    "arcsine": Arcsine(-1.0, 2.0),
    "kesten-mckay": KestenMcKay(3),
    "wachter": Wachter(0.5, 0.25),
    "wachter-atoms": Wachter(0.3, 0.6),
    "uniform": Uniform(-1.0, 2.0),
    "quarter-circle": QuarterCircle(),
    "affine": Affine(FussCatalan(0.5), -1.5, 0.3),
    "affine-atom": Affine(MarchenkoPastur(3.0), -0.5, 0.3),
    "mixture": Mixture([Semicircle(1.0, mean=-4.0), MarchenkoPastur(2.0)], [1.0, 3.0]),
    "gauss-tanh": GaussianPushforward(np.tanh, 0.6),
    "gauss-relu": GaussianPushforward(lambda h: np.maximum(h, 0.0), 1.0, kinks=(0.0,)),
    "gauss-uniform": GaussianPushforward(ndtr, 1.0),
}
"""Laws with a continuous part, in closed form."""

_THREE = Discrete([0.0, 1.0, 3.0], [0.5, 0.3, 0.2])

CONVOLUTIONS: dict[str, Callable[[], SpectralMeasure]] = {
    "sum-bernoulli": lambda: free_add(Bernoulli(0.5, low=-1.0), Discrete([-1.0, 1.0])),
    "sum-atoms": lambda: free_add(Bernoulli(0.8), MarchenkoPastur(3.0)),
    "sum-gap": lambda: free_add(_THREE, Semicircle(0.04)),
    "sum-uniform": lambda: free_add(Uniform(), Arcsine(), Semicircle(0.1)),
    "sum-power": lambda: free_power(_THREE, 2.5, kind="additive"),
    "product-mp": lambda: free_mul(MarchenkoPastur(0.5), MarchenkoPastur(2.0)),
    "product-three": lambda: free_mul(MarchenkoPastur(0.5), _THREE, Uniform(0.5, 1.0)),
    "product-signed": lambda: free_mul(Semicircle(), MarchenkoPastur(0.5)),
    "product-signed-three": lambda: free_mul(Discrete([-1.0, 0.5, 2.0]), MarchenkoPastur(0.5), Uniform(0.5, 1.0)),
    "product-power": lambda: free_power(MarchenkoPastur(0.5), 3.5),
    "rectangular": lambda: rectangular_product([MarchenkoPastur(0.5), MarchenkoPastur(1.5, 2.0)], [100, 200, 400 / 3]),
    "rectangular-sum": lambda: rectangular_sum([Bernoulli(0.5), _THREE, dilate(MarchenkoPastur(2.0), 0.3)], [200, 100]),
    "rectangular-sum-tall": lambda: rectangular_sum([PointMass(1.0), dilate(MarchenkoPastur(0.5), 0.1)], [100, 200]),
    "rectangular-sum-atoms": lambda: rectangular_sum([Bernoulli(0.8), Bernoulli(0.15, high=3.0)], [100, 150]),
    "corner": lambda: free_compress(_THREE, 0.6),
}
"""Convolutions, made when asked for."""


def integral(law: SpectralMeasure, function: Callable[[np.ndarray], np.ndarray]) -> float:
    """Integral of a function by the density and the atoms: double-exponential rule on each interval."""
    u = np.linspace(-4.2, 4.2, 1601)
    share = 1.0 / (1.0 + np.exp(-np.pi * np.sinh(u)))
    weight = share * (1.0 - share) * np.pi * np.cosh(u) * (u[1] - u[0])
    total = sum(mass * float(function(np.array([location]))[0]) for location, mass in law.atoms())
    for low, high in law.support():
        # from the nearer end, so that points close to either end are exact
        x = np.where(share < 0.5, low + (high - low) * share, high - (high - low) / (1.0 + np.exp(np.pi * np.sinh(u))))
        keep = (x > low) & (x < high)
        density = np.zeros_like(x)
        density[keep] = law.density(x[keep])
        total += float(np.sum(density * function(x) * weight) * (high - low))
    return total
