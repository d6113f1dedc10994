"""The law of unlike layers: real networks of every sort get a law, measured layers are multiplied freely."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from torch_rmt.measures import Discrete
from torch_rmt.theory import Architecture, JacobianLaw, Layer, as_activation, jacobian_spectrum


def network(
    widths: tuple[int, ...], names: tuple[str, ...], ensemble: str, sigma_w: float, moment: float
) -> Architecture:
    layers = [
        Layer(a, b, None if name == "linear" else as_activation(name), sigma_w, 0.1, ensemble)
        for a, b, name in zip(widths[:-1], widths[1:], names, strict=True)
    ]
    return Architecture(tuple(layers), input_second_moment=moment)


NETWORKS = {
    "classifier, gelu": ((784, 256, 256, 10), ("gelu", "gelu", "linear"), "gaussian", 1.4, 0.5),
    "chaotic silu": ((256, 256, 256, 256), ("silu",) * 3, "gaussian", 3.0, 1.0),
    "ordered tanh, orthogonal": ((256,) * 6, ("tanh",) * 5, "orthogonal", 0.5, 3.0),
    "thin at the end": ((256, 64, 10), ("softplus", "relu"), "orthogonal", 1.1, 0.1),
    "mixed": ((64, 512, 300, 300, 10), ("elu", "hard_tanh", "erf", "linear"), "orthogonal", 1.0, 1.0),
    "linear first": ((784, 128, 128, 10), ("linear", "selu", "linear"), "gaussian", 1.0, 1.0),
    "widening": ((3072, 4096, 2048), ("gelu", "gelu"), "orthogonal", 3.0, 3.0),
    "chaotic erf": ((256,) * 9, ("erf",) * 8, "gaussian", 2.0, 1.0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_a_law(name: str) -> None:
    """The distribution function rises from the atom to one; its quantiles have the moments of the S-transforms."""
    law = jacobian_spectrum(network(*NETWORKS[name])).measure
    assert isinstance(law, JacobianLaw)
    high = law.log_support()[-1][1]
    t = high - 30 * np.linspace(0, 1, 200)[::-1] ** 2
    values = law.cdf(np.exp(t))
    assert np.diff(values).min() > -1e-10
    assert values[-1] == pytest.approx(1.0, abs=1e-9)
    # The slope of the closed form is the density.
    middle, density = (t[1:] + t[:-1]) / 2, law.log_density
    simpson = np.diff(t) / 6 * (density(t[1:]) + density(t[:-1]) + 4 * density(middle))
    lows = [low for low, _ in law.log_support() if np.isfinite(low)]
    clear = np.min([np.abs(middle - e) for e in (*lows, high)], axis=0) > 0.5
    np.testing.assert_allclose(np.diff(values)[clear], simpson[clear], atol=2e-4)
    nodes, weights = np.polynomial.legendre.leggauss(10)
    zero = sum(mass for location, mass in law.atoms() if location == 0)
    places = zero + (1 - zero) * (0.5 - 0.5 * np.cos(np.pi * np.linspace(0, 1, 13)))
    half = np.diff(places)[:, None] / 2
    x = law.quantile((places[:-1, None] + half * (1 + nodes)).ravel())
    for k in (1, 2):  # to the accuracy of this rule where the law spreads over many decades
        assert (half * weights).ravel() @ x**k == pytest.approx(law.moment(k), rel=5e-4)


def test_the_lower_edge_of_a_narrow_end_is_positive() -> None:
    """J J^T of a network that ends in ten units is W A W^T, ten from many: no eigenvalue near zero."""
    law = jacobian_spectrum(network(*NETWORKS["thin at the end"])).measure
    assert len(law.support()) == 1
    low, high = law.support()[0]
    assert 0 < low < high
    t = np.log(low) + np.array([1e-6, 4e-6])
    densities = law.density(np.exp(t))
    # The square-root edge: four times the distance, twice the density.
    assert densities[1] / densities[0] == pytest.approx(2.0, rel=1e-3)
    assert law.density(np.array(low * (1 - 1e-9))) == 0.0


WIDTHS = [(128, 128, 128, 128), (64, 200, 150)]


@pytest.mark.parametrize("widths", WIDTHS)
def test_measured_weights_and_slopes(widths: tuple[int, ...]) -> None:
    """Fixed matrices and fixed slopes with Haar rotations between: a layer for W, and one of its own for D^2."""
    generator = torch.Generator().manual_seed(3)
    layers, matrices = [], []
    for a, b in pairwise(widths):
        weights = torch.randn(b, a, generator=generator, dtype=torch.float64) / a**0.5
        weights[:, : a // 4] *= 3.0
        slopes = 1 - torch.tanh(torch.randn(b, generator=generator, dtype=torch.float64)) ** 2
        squares = torch.linalg.svdvals(weights).numpy() ** 2
        squares = np.concatenate([squares, np.zeros(max(0, a - b))])
        layers.append(Layer(a, b, None, 1.0, ensemble=Discrete(squares)))
        layers.append(Layer(b, b, None, 1.0, ensemble=Discrete(slopes.numpy() ** 2)))
        matrices += [weights, torch.diag(slopes)]
    law = jacobian_spectrum(Architecture(tuple(layers))).measure
    n, draws = widths[0], 8
    found = []
    for _ in range(draws):
        jacobian = torch.eye(n, dtype=torch.float64)
        for matrix in matrices:
            haar = torch.empty(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
            torch.nn.init.orthogonal_(haar, generator=generator)
            jacobian = matrix @ (haar @ jacobian)
        values = torch.linalg.svdvals(jacobian).numpy() ** 2
        found.append(np.concatenate([np.zeros(max(0, n - len(values))), values]))
    pooled = np.sort(np.concatenate(found))
    positive = pooled > 1e-20
    distance = np.abs(law.cdf(pooled[positive]) - (np.flatnonzero(positive) + 0.5) / len(pooled)).max()
    assert distance < 1.0 / min(widths)
    assert pooled.mean() == pytest.approx(law.mean, rel=0.08)
    means = [layer.ensemble.mean for layer in layers if isinstance(layer.ensemble, Discrete)]
    assert law.mean == pytest.approx(np.prod(means), rel=1e-10)
