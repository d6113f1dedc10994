"""What every prediction must obey: it is a probability measure, and the thing itself, drawn, converges to it."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch

from tests.cases import PREDICTIONS
from torch_rmt.measures import SpectralMeasure
from torch_rmt.theory import Prediction


@cache
def predict(name: str, size: int | None = None) -> Prediction:
    row = PREDICTIONS[name]
    return row.case.predict(row.sizes[-1] if size is None else size)


@pytest.fixture(params=PREDICTIONS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def law(name: str) -> SpectralMeasure:
    return predict(name).measure


def wasserstein(values: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(np.sort(values) - expected).mean())


def kolmogorov(values: np.ndarray, law: SpectralMeasure) -> float:
    """Largest distance of the staircase from the law, its own step 1/n not counted; beside atoms, not on them."""
    values = np.sort(values)
    count, beside = len(values), 1e-6 * np.ptp(values)
    steps = np.arange(count)
    above, below = steps / count - law.cdf(values + beside), law.cdf(values - beside) - (steps + 1) / count
    return float(max(above.max(), below.max(), 0.0))


def test_drawn_spectra_converge_at_the_stated_rate_and_size(name: str) -> None:
    """W1 falls as n^-rate, or (rigid eigenvalues) sqrt(log n) n^-rate; Kolmogorov's distance is the stated error."""
    row = PREDICTIONS[name]
    distances, ratios = [], []
    for size in row.sizes:
        # the sizes keep their ratios, on which alone most laws depend
        law = predict(name, None if row.same_law else size).measure
        expected: np.ndarray | None = None
        found, errors = [], []
        for seed in range(row.seeds):
            values = row.case.draw(size, torch.Generator().manual_seed(1000 * seed + size))
            if expected is None:
                expected = law.quantile((np.arange(len(values)) + 0.5) / len(values))
            found.append(wasserstein(values, expected))
            errors.append(kolmogorov(values, law))
        distances.append(np.mean(found) / np.sqrt(law.moment(2)))
        stated = predict(name, size).finite_size_error
        assert stated is not None
        ratios.append(float(np.mean(errors)) / stated)
    sizes = np.array(row.sizes, dtype=float)
    scaled = np.array(distances) * sizes**row.rate
    assert np.all(scaled < row.constant), scaled
    # two-sided: neither slower than stated nor faster; a few seeds leave 0.1 to 0.2 of noise in the exponent
    plain = np.polyfit(np.log(sizes), np.log(distances), 1)[0]
    rigid = plain - np.polyfit(np.log(sizes), 0.5 * np.log(np.log(sizes)), 1)[0]
    assert rigid - 0.05 < -row.rate + 0.25, (plain, rigid, distances)
    assert plain + 0.05 > -row.rate - 0.25, (plain, rigid, distances)
    # the error that `compare` allows for is that of a typical draw: calibrated, not a bound
    assert all(0.4 < ratio < 1.6 for ratio in ratios), ratios


def test_density_and_atoms_have_mass_one_and_the_stated_mean(name: str, law: SpectralMeasure) -> None:
    nodes, weights = np.polynomial.legendre.leggauss(300)
    angle, turn = 0.5 * np.pi * (nodes + 1.0), 0.5 * np.pi * weights
    mass = sum(part for _, part in law.atoms())
    mean = sum(place * part for place, part in law.atoms())
    for low, high in law.support():
        x = 0.5 * (low + high) - 0.5 * (high - low) * np.cos(angle)
        piece = law.density(x) * 0.5 * (high - low) * np.sin(angle) * turn
        assert np.all(piece >= 0.0)
        mass, mean = mass + piece.sum(), mean + piece @ x
    assert mass == pytest.approx(1.0, abs=1e-3)
    scale = np.sqrt(law.moment(2))
    assert mean == pytest.approx(law.mean, abs=1e-3 * scale)
    stated = predict(name).scalars.get("mean", law.mean)
    assert law.mean == pytest.approx(stated, rel=1e-9, abs=1e-9 * scale)


def test_distribution_function_is_the_integral_of_the_density(law: SpectralMeasure) -> None:
    low, high = law.bounds()
    # pieces away from the edges, where the density is smooth
    ends = low + (high - low) * np.linspace(0.031, 0.969, 41)
    nodes, weights = np.polynomial.legendre.leggauss(12)
    breaks = [b for band in law.support() for b in band] + [place for place, _ in law.atoms()]
    for a, b in itertools.pairwise(ends):
        if any(a <= place <= b for place in breaks):
            continue
        x = 0.5 * (a + b) + 0.5 * (b - a) * nodes
        piece = float(0.5 * (b - a) * (weights @ law.density(x)))
        assert float(law.cdf(np.asarray(b)) - law.cdf(np.asarray(a))) == pytest.approx(piece, abs=1e-5)


def test_distribution_function_rises_from_zero_to_one_and_quantiles_undo_it(law: SpectralMeasure) -> None:
    low, high = law.bounds()
    width = high - low
    x = np.linspace(low - 0.1 * width, high + 0.1 * width, 401)
    values = law.cdf(x)
    assert values[0] == 0.0
    assert values[-1] == 1.0
    assert np.all(np.diff(values) >= -1e-12)
    atoms = law.atoms()
    p = np.linspace(0.013, 0.987, 57)
    q = law.quantile(p)
    continuous = (
        np.all([np.abs(q - place) > 1e-9 * width for place, _ in atoms], axis=0) if atoms else np.full(57, True)
    )
    np.testing.assert_allclose(law.cdf(q[continuous]), p[continuous], atol=1e-9)
    for place, part in atoms:
        jump = float(law.cdf(np.asarray(place)) - law.cdf(np.asarray(place - 1e-7 * width)))
        assert jump == pytest.approx(part, abs=2e-3)


def test_stieltjes_transform_is_a_nevanlinna_function(law: SpectralMeasure) -> None:
    low, high = law.bounds()
    width = high - low
    x = np.linspace(low - 0.2 * width, high + 0.2 * width, 40)
    for height in (1e-3, 0.1, 1.0, 10.0):
        g = law.stieltjes(x + 1j * height * width)
        assert np.all(g.imag < 0.0)
        assert np.all(np.abs(g) <= 1.0 / (height * width) * (1.0 + 1e-9))
    far = np.array([1e5j * width])
    assert np.abs(far * law.stieltjes(far) - 1.0 - law.mean / far).max() < 1e-8
    above, below = law.stieltjes(np.array([x[7] + 0.3j * width, x[7] - 0.3j * width]))
    assert above == pytest.approx(np.conj(below))
    # on the axis: the boundary value from above
    inside = law.quantile(np.array([0.62, 0.81]))
    near = law.stieltjes(inside + 1e-9j * width)
    np.testing.assert_allclose(law.stieltjes(inside), near, rtol=2e-4)


def test_slope_and_potential_differentiate_and_moments_agree(law: SpectralMeasure) -> None:
    low, high = law.bounds()
    width = high - low
    z = low + width * (np.array([-0.1, 0.05, 0.5, 0.9, 1.2]) + 0.4j)
    step = 1e-2 * width
    offsets, weights = np.array([-2, -1, 1, 2]), np.array([1, -8, 8, -1]) / 12
    for function, derivative in ((law.stieltjes, law.slope), (law.log_potential, law.stieltjes)):
        difference = sum(w * function(z + k * step) for k, w in zip(offsets, weights, strict=True)) / step
        np.testing.assert_allclose(difference, derivative(z), rtol=2e-5)
    np.testing.assert_allclose(SpectralMeasure.log_potential(law, z), law.log_potential(z), rtol=1e-7, atol=1e-7)
    size = max(abs(low), abs(high))
    for k in (1, 2, 3):
        assert SpectralMeasure.moment(law, k) == pytest.approx(law.moment(k), rel=1e-7, abs=1e-9 * size**k)


def test_a_prediction_says_what_it_assumes_and_where_it_comes_from(name: str) -> None:
    prediction = predict(name)
    assert prediction.reference
    assert len(prediction.assumptions) >= 2
    assert prediction.finite_size_error is not None
