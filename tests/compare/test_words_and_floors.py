"""What a report says of zeros, spread and gradients; how noise floors scale; outliers with no favourite side."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from torch_rmt.compare import compare, freeness_gap, kolmogorov
from torch_rmt.compare.comparison import noise_floor, probe_noise
from torch_rmt.compare.distances import Tabulated, relative_scale
from torch_rmt.compare.freeness import coarse
from torch_rmt.compare.outliers import find_outliers
from torch_rmt.compare.report import Distance
from torch_rmt.compare.verdict import gradients_in_words, spreads
from torch_rmt.measures import Discrete, MarchenkoPastur, PointMass, Semicircle, Uniform, affine, dilate
from torch_rmt.spectra import Spectrum
from torch_rmt.theory import Prediction


def exact_spectrum(nodes: np.ndarray) -> Spectrum:
    n = len(nodes)
    return Spectrum(np.sort(nodes)[None], np.full((1, n), 1 / n), n, n, "exact")


def quantiles(law, n: int) -> np.ndarray:
    return np.asarray(law.quantile((np.arange(n) + 0.5) / n))


def test_too_many_and_too_few_zeros_are_told_apart() -> None:
    half_zeros, none = MarchenkoPastur(2.0), MarchenkoPastur(0.5)
    found = {
        name: compare(exact_spectrum(quantiles(law, 300)), Prediction(other, finite_size_error=0.01))
        for name, law, other in (("more", half_zeros, none), ("fewer", none, half_zeros), ("same", none, Uniform()))
    }
    assert "50% of the eigenvalues are zero, the law has 0%: dead units" in found["more"].verdict
    assert "0% of the eigenvalues are zero, the law has 50%: fewer dead units" in found["fewer"].verdict
    assert "are zero" not in found["same"].verdict
    nothing = compare(exact_spectrum(np.zeros(300)), Prediction(none, finite_size_error=0.01))
    assert nothing.agrees is False
    assert "100% of the eigenvalues are zero" in nothing.verdict
    assert nothing.distance("shape") is None
    assert "scale" not in nothing.facts
    assert found["more"].scalars()["outliers"] == len(found["more"].outliers) > 0  # the rest is twice as large


@pytest.mark.parametrize(
    ("law", "unit", "scale"),
    [
        (MarchenkoPastur(0.5), 1.0, 1.0),
        (MarchenkoPastur(2.0), 7.0, 7.0),
        (Semicircle(2.0, mean=0.5), 3.0, 3.0),
        (Semicircle(2.0, mean=0.5), 1.0, math.nan),
    ],
    ids=["positive", "with zeros", "signed", "without a scale"],
)
def test_the_spread_of_a_law_is_its_own(law, unit: float, scale: float) -> None:
    nodes, weights = quantiles(law, 4000) * unit, np.full(4000, 1 / 4000)
    measured, predicted = spreads(nodes, weights, Tabulated(law, nodes), scale, 1e-9)
    assert measured == pytest.approx(predicted, rel=2e-3)
    merged = spreads(nodes[::2], 2 * weights[::2], Tabulated(law, nodes), scale, 1e-9)[0]
    assert merged == pytest.approx(measured, rel=5e-3)


def test_wider_and_narrower_are_not_mistaken() -> None:
    narrow, wide = MarchenkoPastur(0.1), MarchenkoPastur(0.7)
    for law, other, word in ((wide, narrow, "Wider"), (narrow, wide, "Narrower")):
        assert word in compare(exact_spectrum(quantiles(law, 400)), Prediction(other, finite_size_error=0.01)).verdict


def test_the_table_knows_the_logarithms_of_its_law() -> None:
    half, kernel = MarchenkoPastur(0.5), MarchenkoPastur(2.0)
    nodes = quantiles(half, 50)
    assert Tabulated(half, nodes).log_mean(0.0) == pytest.approx(half.log_potential(0.0).real, abs=1e-4)
    logs = np.log(quantiles(half, 20000))
    assert Tabulated(half, nodes).log_deviation(0.0) == pytest.approx(logs.std(), rel=1e-3)
    # the nonzero eigenvalues of X X^T are those of X^T X
    levels = np.linspace(0.05, 0.95, 19)
    found = Tabulated(kernel, nodes).positive_quantiles(levels, 1e-9)
    assert np.allclose(found, dilate(half, 2.0).quantile(levels), rtol=1e-4)


def test_one_outlier_does_not_move_the_scale() -> None:
    law = MarchenkoPastur(0.3)
    nodes = quantiles(law, 2000)
    nodes[-1] *= 1e4
    assert relative_scale(nodes, np.full(2000, 1 / 2000), Tabulated(law, nodes), 0.0) == pytest.approx(1.0, rel=2e-3)


@pytest.mark.parametrize("atom", [0.0, 2.0])
def test_both_sides_of_an_atom_count(atom: float) -> None:
    around = atom + np.array([-1.0, 1.0])
    assert kolmogorov(around, np.array([0.5, 0.5]), PointMass(atom)) == pytest.approx(0.5)
    assert kolmogorov(around, np.array([0.25, 0.75]), PointMass(atom)) == pytest.approx(0.75)


def test_outliers_know_no_left_or_right_and_no_origin() -> None:
    law, n = Semicircle(), 300
    nodes = np.sort(np.append(quantiles(law, n - 2), [2.6, 3.5]))

    def margins(values: np.ndarray, of) -> np.ndarray:
        weights = np.full(n, 1 / n)
        return np.array([o.margin for o in find_outliers(values, weights, Tabulated(of, values), dim=n, noise=0.01)])

    plain = margins(nodes, law)
    assert len(plain) == 2
    assert margins(-nodes[::-1], law) == pytest.approx(plain, rel=0.02)
    assert margins(nodes + 50.0, affine(law, 1.0, 50.0)) == pytest.approx(plain, rel=0.02)
    assert margins(nodes * 1e-6, dilate(law, 1e-6)) == pytest.approx(plain, rel=0.02)


def test_floors_scale_as_they_say() -> None:
    def floor(law, n: int) -> float:
        return noise_floor(exact_spectrum(quantiles(law, n)), Prediction(law))

    smooth = [floor(Semicircle(), n) for n in (50, 200, 800)]
    assert np.allclose(smooth, smooth[0] * np.array([1, 1 / 4, 1 / 16]), rtol=1e-12, atol=0.0)  # eigenvalues are rigid
    counted = [floor(MarchenkoPastur(4.0), n) - smooth[0] * 50 / n for n in (50, 200, 800)]
    assert np.allclose(
        counted, np.sqrt(0.75 * 0.25 / np.array([50, 200, 800])), rtol=1e-9, atol=0.0
    )  # a binomial count
    # the mean of n independent eigenvalues wanders as 1/sqrt(n)
    w1 = []
    for n in (400, 6400):
        report = compare(exact_spectrum(quantiles(Semicircle(), n)), Prediction(Semicircle(), finite_size_error=0.0))
        w1.append(report.distance("wasserstein").noise)
    assert w1[1] == pytest.approx(w1[0] / 4, rel=0.05)


@pytest.mark.parametrize(("probes", "dim"), [(1, 100), (4, 1000)])
def test_probe_noise_is_largest_at_the_median(probes: int, dim: int) -> None:
    law = Semicircle(mean=3.0)
    nodes = np.tile(quantiles(law, 401), (probes, 1))
    spectrum = Spectrum(nodes, np.full(nodes.shape, 1 / 401), dim, probes * 401, "slq", seed=0)
    middle = math.sqrt(2 * 0.25 / ((dim + 2) * probes))
    assert probe_noise(exact_spectrum(nodes[0])) == 0.0
    assert middle < probe_noise(spectrum) < 2 * middle
    assert float(spectrum.cdf_standard_error(3.0)) == pytest.approx(middle, rel=1e-4)
    assert float(spectrum.cdf_standard_error(quantiles(law, 10)[0])) == pytest.approx(
        math.sqrt(4 * 0.05 * 0.95) * middle, rel=0.03
    )


def test_ratios_without_noise() -> None:
    assert Distance("x", 0.0, 0.0).ratio == 0.0
    assert Distance("x", 1e-9, 0.0).ratio == math.inf
    assert Distance("x", 1.0, 0.5).ratio == 2.0


def test_gradients_are_counted_over_the_depth() -> None:
    grown = gradients_in_words({"chi": 1.2, "depth": 40.0})
    assert "grow 38 times over 40 layers" in grown  # 1.2^20
    assert "Lower sigma_w by 8.7%" in grown  # chi is proportional to sigma_w^2
    shrunk = gradients_in_words({"chi": 1 / 1.2, "depth": 40.0})
    assert "shrink 38 times" in shrunk
    assert "Raise sigma_w by 9.5%" in shrunk
    assert "grow" in gradients_in_words({"chi": 2.0, "depth": 1e5})
    assert "shrink" in gradients_in_words({"chi": 0.5, "depth": 1e5})
    for facts in ({"chi": 1.2}, {"depth": 3.0}, {"chi": -1.0, "depth": 3.0}, {"chi": 1.2, "depth": 0.0}):
        assert gradients_in_words(facts) == ""


@pytest.mark.parametrize("seed", [0, 1])
def test_a_coarse_law_keeps_mean_outliers_and_zeros(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes = np.concatenate([rng.uniform(-1e-9, 1e-9, 500), rng.uniform(1.0, 2.0, 1498), [-40.2, -40, 40, 40.2]])
    law = coarse(exact_spectrum(nodes), 1e-8)
    assert law.mean == pytest.approx(np.where(np.abs(nodes) < 0.5, 0.0, nodes).mean(), rel=1e-12)
    assert law.nodes.size <= 256
    assert law.cdf([-30.0, 30.0]) == pytest.approx([2 / 2002, 2000 / 2002], rel=1e-12)
    assert np.abs(law.nodes[[0, -1]]).min() > 39.9
    # no atom holds more than its share, but the zeros
    zeros = law.nodes == 0.0
    assert law.weights[zeros] == pytest.approx([500 / 2002])
    assert law.weights[~zeros].max() <= 1 / 128
    few = coarse(exact_spectrum(nodes[500:700]), 1e-8)
    assert np.allclose(few.nodes, np.sort(nodes[500:700]), rtol=1e-13, atol=0.0)


def test_freeness_gap_of_a_rectangular_chain() -> None:
    values = []
    for unit in (1, 3):
        rng = np.random.default_rng(unit)
        widths = [30 * unit, 80 * unit, 60 * unit, 40 * unit]
        parts = [rng.standard_normal((m, n)) / np.sqrt(n) for n, m in pairwise(widths)]
        whole = parts[2] @ parts[1] @ parts[0]
        spectra = [
            Spectrum(v[None], np.full((1, v.size), 1 / v.size), v.size, v.size, "exact", symmetric=False)
            for v in (np.clip(np.linalg.eigvalsh(a.T @ a), 0, None) for a in (*parts, whole))
        ]
        report = freeness_gap(spectra[:-1], spectra[-1], kind="product")
        assert report.agrees, report.verdict
        values.append(report.distance("kolmogorov"))
    assert values[0].noise == pytest.approx(3 * values[1].noise, rel=1e-9)  # exact parts: 1/n only
    assert values[1].value < 3 / 90
    zero = exact_spectrum(np.zeros(40))
    with pytest.raises(ValueError, match="is zero"):
        freeness_gap([zero, zero], zero, kind="product")


def test_a_law_of_atoms_agrees_with_itself() -> None:
    law = Discrete([1.0, 2.0, 5.0], [0.5, 0.25, 0.25])
    nodes = np.repeat([1.0, 2.0, 5.0], [50, 25, 25])
    assert kolmogorov(nodes, np.full(100, 0.01), law) == pytest.approx(0.0, abs=1e-12)
