"""The deep Fisher law against its first two moments, which the layers give by themselves, and drawn networks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.theory.drawn_matrices import deep_theta
from torch_rmt.theory import DeepFisherLaw, FisherStep, deep_fisher_law, deep_fisher_spectrum
from torch_rmt.theory.deep_fisher_edges import discrete_slopes


def moments_of_layers(law: DeepFisherLaw) -> tuple[float, float]:
    """Mean and mean square by the rules for free products: no transform is inverted."""
    first, second = law.start, law.start**2
    for step in law.steps:
        slope, square = step.slopes.moment(1), step.slopes.moment(2)
        mean = first * slope
        product = second * slope**2 + first**2 * (square - slope**2) + (mean**2 if step.gaussian else 0.0)
        first = step.shift + step.gain * mean
        second = step.shift**2 + 2.0 * step.shift * step.gain * mean + step.gain**2 * product
    return first, second


def moments_of_the_distribution(law: DeepFisherLaw) -> tuple[float, float]:
    """The same from F: high - integral of F, high^2 - integral of 2 x F."""
    low, high = law.bounds()
    ends = sorted({low, high, *(end for band in law.support() for end in band), *(at for at, _ in law.atoms())})
    u = np.linspace(-2.7, 2.7, 301)
    share = 1.0 / (1.0 + np.exp(-np.pi * np.sinh(u)))
    weights = share * (1.0 - share) * np.pi * np.cosh(u) * (u[1] - u[0])
    mean, square = high, high**2
    for a, b in itertools.pairwise(ends):
        x = a + (b - a) * share
        inside = (x > a) & (x < b)
        reached = law.cdf(x[inside]) * weights[inside] * (b - a)
        mean, square = mean - reached.sum(), square - 2.0 * (reached @ x[inside])
    return float(mean), float(square)


@pytest.mark.parametrize(
    ("activation", "depth", "sigma_w", "ensemble"),
    [
        ("hard_sigmoid", 6, 0.8, "gaussian"),  # layers shrink the distance from the law by 50 each
        ("hard_sigmoid", 10, 1.0, "gaussian"),
        ("hard_sigmoid", 4, 1.0, "orthogonal"),  # all but 1e-8 of the mass in atoms
        ("hard_sigmoid", 10, 2.0, "orthogonal"),
        ("hard_tanh", 3, 1.0, "orthogonal"),  # an atom above the band
        ("hard_swish", 2, 1.0, "orthogonal"),  # a kink at which the slope vanishes
        ("hard_swish", 6, 1.4, "gaussian"),
        ("relu_squared", 4, 1.0, "gaussian"),
        ("gelu_tanh", 10, 2.0, "gaussian"),
    ],
)
def test_the_distribution_function_has_the_moments_of_the_layers(
    activation: str, depth: int, sigma_w: float, ensemble: str
) -> None:
    prediction = deep_fisher_spectrum(activation, depth=depth, width=300, sigma_w=sigma_w, ensemble=ensemble)
    law = prediction.measure
    assert isinstance(law, DeepFisherLaw)
    first, second = moments_of_layers(law)
    found = moments_of_the_distribution(law)
    assert law.mean == pytest.approx(first, rel=1e-12)
    assert found[0] == pytest.approx(first, rel=1e-6)
    assert found[1] == pytest.approx(second, rel=4e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_atom_above_the_band_is_not_its_edge(seed: int) -> None:
    """Haar weights and hard tanh: the units alive in every layer are an atom; the band below it ends before."""
    edges = []
    for n in (150, 300):
        values, seconds, slopes2 = deep_theta("hard_tanh", 4, n, 0.8, "orthogonal", torch.Generator().manual_seed(seed))
        steps = tuple(
            FisherStep(second, 0.64, discrete_slopes(slope.numpy()), False)
            for second, slope in zip(seconds[1:], slopes2, strict=False)
        )
        law = DeepFisherLaw(seconds[0], steps)
        place, mass = law.atoms()[-1]
        assert np.mean(np.abs(values - place) < 1e-9 * place) == pytest.approx(mass, abs=1e-9)
        below = values[values < place * (1.0 - 1e-9)]
        assert law.support()[-1][1] < below[-1] + 0.2 * (place - below[-1])
        edges.append(abs(law.support()[-1][1] - below[-1]) / place)
    assert edges[1] < 0.02, edges


def test_hard_sigmoid_reaches_up_to_where_drawn_networks_do() -> None:
    """The upper end in units of the mean, both from the lower end on, which is each network's own."""
    errors = []
    for n in (50, 400):
        law = deep_fisher_spectrum("hard_sigmoid", depth=6, width=n, sigma_w=1.0).measure
        ratios = []
        for seed in range(6):
            values, seconds, _ = deep_theta("hard_sigmoid", 6, n, 1.0, "gaussian", torch.Generator().manual_seed(seed))
            ratios.append((values[-1] - seconds[-1]) / (values.mean() - seconds[-1]))
        wanted = (law.bounds()[1] - law.bounds()[0]) / (law.mean - law.bounds()[0])
        errors.append(abs(float(np.mean(ratios)) / wanted - 1.0))
    assert errors[1] < 0.5 * errors[0] < 0.1, errors  # n^(-2/3): 0.25


def test_a_band_that_cannot_hold_the_mean_is_no_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_fisher_law, "outer_edges", lambda *_: (0.6, 0.7))
    with pytest.raises(ArithmeticError, match="lies outside of its bands"):
        deep_fisher_spectrum("tanh", depth=4, width=200, sigma_w=1.0)
