"""Distances against SciPy: samples from the law stand for the law itself."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from torch_rmt.compare import kolmogorov, wasserstein
from torch_rmt.measures import Discrete, MarchenkoPastur, Semicircle


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("law", [Semicircle(), MarchenkoPastur(0.4), MarchenkoPastur(1.0)], ids=repr)
def test_against_scipy_on_continuous_laws(law, seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes = np.sort(1.2 * law.sample(60, rng) - 0.1)
    weights = np.full(60, 1 / 60)
    ours = kolmogorov(nodes, weights, law)
    assert ours == pytest.approx(stats.kstest(nodes, lambda x: np.asarray(law.cdf(x))).statistic, abs=1e-12)
    fine = np.asarray(law.quantile((np.arange(20_000) + 0.5) / 20_000))
    expected = stats.wasserstein_distance(nodes, fine, weights)
    assert wasserstein(nodes, weights, law) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_against_scipy_on_discrete_laws(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes, weights = np.sort(rng.normal(size=30)), rng.dirichlet(np.ones(30))
    places, masses = np.sort(rng.normal(size=20)), rng.dirichlet(np.ones(20))
    expected = stats.wasserstein_distance(nodes, places, weights, masses)
    assert wasserstein(nodes, weights, Discrete(places, masses)) == pytest.approx(expected, rel=1e-10)
