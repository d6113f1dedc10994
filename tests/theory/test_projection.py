"""Blocks whose shortcut changes the width: against sums of rectangular laws, square blocks, and drawn networks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.theory.test_residual import GELU, RELU, TANH, draw, norm, pre_norm
from torch_rmt.measures import Discrete, MarchenkoPastur, Mixture, PointMass, SpectralMeasure, rectangular_sum
from torch_rmt.theory import Architecture, Layer, Residual, jacobian_spectrum


def haar_law(n_in: int, n_out: int, sigma: float) -> SpectralMeasure:
    if n_in <= n_out:
        return PointMass(sigma**2 * n_out / n_in)
    return Discrete([0.0, sigma**2], [1 - n_out / n_in, n_out / n_in])


@pytest.mark.parametrize("widths", [(100, 200), (200, 100), (100, 350)])
@pytest.mark.parametrize("sigmas", [(1.0, 1.0), (0.3, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize("ensemble", ["gaussian", "orthogonal"])
def test_linear_blocks_are_rectangular_sums(
    widths: tuple[int, int], sigmas: tuple[float, float], ensemble: str
) -> None:
    """Two solvers that share no line: this one in logarithms along real M, the other in the plane of sqrt(z)."""
    branch, shortcut = Layer(*widths, None, sigmas[0]), Layer(*widths, None, sigmas[1], ensemble=ensemble)
    law = jacobian_spectrum(Architecture((Residual((branch,), (shortcut,)),), 1.0)).measure
    ratio = widths[0] / widths[1]
    beside = MarchenkoPastur(ratio, sigmas[1] ** 2 / ratio) if ensemble == "gaussian" else haar_law(*widths, sigmas[1])
    wanted = rectangular_sum([MarchenkoPastur(ratio, sigmas[0] ** 2 / ratio), beside], widths)
    np.testing.assert_allclose(np.ravel(law.atoms()), np.ravel(wanted.atoms()), atol=1e-14)
    np.testing.assert_allclose(law.support(), wanted.support(), rtol=1e-9)
    low, high = wanted.support()[0]
    x = low + (high - low) * np.linspace(0.002, 0.998, 50)
    np.testing.assert_allclose(law.density(x), wanted.density(x), rtol=1e-9)
    np.testing.assert_allclose(law.cdf(x), wanted.cdf(x), atol=1e-11)
    np.testing.assert_allclose([law.moment(k) for k in (1, 2, 3, 4)], wanted.moments(4), rtol=1e-11)
    z = x[::10] + 0.1j * high
    np.testing.assert_allclose(law.stieltjes(z), wanted.stieltjes(z), rtol=1e-9)


def test_a_shortcut_that_sees_a_quarter_of_its_input() -> None:
    """As a strided 1x1 convolution: a projection, then a Gaussian matrix."""
    shortcut = (Layer(400, 100, None, 1.0, ensemble="orthogonal"), Layer(100, 200, None, 0.9))
    law = jacobian_spectrum(Architecture((Residual((Layer(400, 200, None, 1.0),), shortcut),), 1.0)).measure
    beside = Mixture([PointMass(0.0), MarchenkoPastur(0.5, 1.62)], [0.75, 0.25])
    wanted = rectangular_sum([MarchenkoPastur(2.0, 0.5), beside], [4, 2])
    x = np.linspace(0.12, 7.0, 30)
    np.testing.assert_allclose(law.cdf(x), wanted.cdf(x), atol=1e-11)
    np.testing.assert_allclose(law.density(x), wanted.density(x), atol=1e-9)
    np.testing.assert_allclose([law.moment(k) for k in (1, 2, 3, 4)], wanted.moments(4), rtol=1e-11)
    np.testing.assert_allclose(law.support(), wanted.support(), rtol=1e-9)


def test_a_branch_of_low_rank() -> None:
    """D W with D of rank 1/2 beside a Haar shortcut: two intervals, from either side of the shortcut's own value."""
    n = 96
    block = Residual((Layer(2 * n, n, RELU, 0.3),), (Layer(2 * n, n, None, 1.0, ensemble="orthogonal"),))
    law = jacobian_spectrum(Architecture((block,), 1.0)).measure
    wanted = rectangular_sum([MarchenkoPastur(4.0, 0.3**2 / 4), Discrete([0.0, 1.0])], [2, 1])
    x = np.concatenate([np.linspace(0.63, 0.995, 30), np.linspace(1.002, 1.6, 30)])
    np.testing.assert_allclose(law.cdf(x), wanted.cdf(x), atol=1e-10)
    below, above = wanted.density(law.support()[0][0] * np.array([1 - 1e-6, 1 + 1e-6]))
    assert below == 0.0 < above
    few = Residual((Layer(2 * n, n // 4, None, 0.3), Layer(n // 4, n, None, 1.0)), block.shortcut)
    atoms = jacobian_spectrum(Architecture((few,), 1.0)).measure.atoms()
    np.testing.assert_allclose(atoms, [(0.0, 0.5), (1.0, 0.25)], atol=1e-12)


def test_nearly_equal_widths_are_nearly_square() -> None:
    """The square block is another code: the difference falls with the square root of 1 - ratio, at the hard edge."""
    distances = []
    for n_out in (10**4, 10**4 + 1600, 10**4 + 100):
        block = Residual(
            (Layer(10**4, n_out, TANH, 1.3), Layer(n_out, n_out, None, 0.8)),
            (Layer(10**4, n_out, None, 0.9, ensemble="orthogonal"),),
        )
        law = jacobian_spectrum(Architecture((block,), 1.0)).measure
        if n_out == 10**4:
            x = law.quantile(np.linspace(0.1, 0.9, 30))
            wanted = law.cdf(x)
        else:
            distances.append(np.abs(law.cdf(x) - wanted).max())
    assert distances[0] < 0.15
    assert distances[1] < 0.2 * distances[0]


Build = Callable[[int], tuple[Layer | Residual, ...]]


def haar(n_in: int, n_out: int, sigma: float) -> Layer:
    return Layer(n_in, n_out, None, sigma, ensemble="orthogonal")


NETWORKS: dict[str, Build] = {
    "narrower, relu": lambda n: (
        Residual((Layer(2 * n, n, RELU, 1.4), Layer(n, n, None, 1.0)), (Layer(2 * n, n, None, 0.8),)),
    ),
    "wider, haar": lambda n: (
        Residual((Layer(n, 2 * n, GELU, 1.4), Layer(2 * n, 2 * n, None, 1.0)), (haar(n, 2 * n, 0.8),)),
    ),
    "narrower, all haar": lambda n: (
        Residual(
            (Layer(2 * n, n, TANH, 1.4, ensemble="orthogonal"), haar(n, n, 1.0)),
            (haar(2 * n, n, 0.8),),
        ),
    ),
    "like a resnet": lambda n: (
        pre_norm(2 * n, RELU, 0.7),
        Residual((norm(2 * n), Layer(2 * n, n, RELU, 1.4), Layer(n, n, None, 0.7)), (Layer(2 * n, n, None, 1.0),)),
        pre_norm(n, RELU, 0.7),
    ),
    "strided shortcut": lambda n: (
        Residual(
            (Layer(2 * n, n, TANH, 1.4), Layer(n, n, None, 1.0)),
            (haar(2 * n, n // 2, 1.0), Layer(n // 2, n, None, 0.9)),
        ),
    ),
    "there and back": lambda n: (
        Layer(n, n, TANH, 1.2),
        Residual((Layer(n, 2 * n, TANH, 1.2), Layer(2 * n, 2 * n, None, 0.8)), (Layer(n, 2 * n, None, 0.7),), TANH),
        Residual((Layer(2 * n, n, TANH, 1.2), Layer(n, n, None, 0.8)), (haar(2 * n, n, 0.7),), TANH),
        Layer(n, n, None, 1.0),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_drawn_networks(name: str) -> None:
    """Whole networks at two widths: the distance falls, and the stated error is what is found."""
    build = NETWORKS[name]
    prediction = jacobian_spectrum(Architecture(build(96), 1.0))
    law, generator, distances = prediction.measure, torch.Generator().manual_seed(3), []
    for n, draws in ((32, 12), (128, 6)):
        architecture, found = Architecture(build(n), 1.0), []
        zeros = max(0.0, 1 - architecture.layers[-1].n_out / architecture.layers[0].n_in)
        for _ in range(draws):
            values = draw(architecture, generator)[0]
            steps = zeros + (1 - zeros) * np.arange(len(values) + 1) / len(values)
            reached = law.cdf(values)
            found.append(max(np.abs(reached - steps[1:]).max(), np.abs(reached - steps[:-1]).max()))
        distances.append(np.mean(found))
    assert distances[1] < 0.6 * distances[0]
    assert prediction.finite_size_error is not None
    assert 0.4 < distances[1] / (prediction.finite_size_error * 96 / 128) < 2.2
    mean = np.mean([draw(Architecture(build(128), 1.0), generator)[0].sum() for _ in range(6)])
    assert mean / build(128)[0].n_in == pytest.approx(prediction.scalars["mean"], rel=0.08)
