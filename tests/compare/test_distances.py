from __future__ import annotations

import numpy as np
import pytest
import torch

from torch_rmt.compare import compare, kolmogorov, numerical_zero, wasserstein
from torch_rmt.compare.distances import Tabulated, relative_scale
from torch_rmt.measures import Discrete, MarchenkoPastur, PointMass, Semicircle, dilate
from torch_rmt.spectra import DenseOperator, Spectrum, exact
from torch_rmt.theory import Prediction


def point_spectrum(nodes: np.ndarray, *, symmetric: bool = True) -> Spectrum:
    n = len(nodes)
    return Spectrum(np.sort(nodes)[None], np.full((1, n), 1 / n), n, n, "exact", symmetric=symmetric)


def quantiles(law, n: int) -> np.ndarray:
    return np.asarray(law.quantile((np.arange(n) + 0.5) / n))


@pytest.mark.parametrize("law", [Semicircle(), MarchenkoPastur(0.5), MarchenkoPastur(1.0)], ids=repr)
@pytest.mark.parametrize("n", [10, 100])
def test_quantile_points_are_half_a_step_away(law, n: int) -> None:
    """The midpoint quantiles minimise the Kolmogorov distance, and the minimum is 1 / (2 n)."""
    nodes = quantiles(law, n)
    assert kolmogorov(nodes, np.full(n, 1 / n), law) == pytest.approx(0.5 / n, rel=1e-9)


@pytest.mark.parametrize("shift", [1e-3, 0.1, 5.0])
def test_wasserstein_of_a_shift_is_the_shift(shift: float) -> None:
    law, n = Semicircle(), 400
    nodes = quantiles(law, n)
    fine = wasserstein(nodes, np.full(n, 1 / n), law)
    assert fine < 2 / n
    assert wasserstein(nodes + shift, np.full(n, 1 / n), law) == pytest.approx(shift, abs=fine * 1.001)


def test_wasserstein_to_a_point_is_the_mean_distance() -> None:
    rng = np.random.default_rng(0)
    nodes, weights = np.sort(rng.normal(size=50)), rng.dirichlet(np.ones(50))
    assert wasserstein(nodes, weights, PointMass(0.3)) == pytest.approx(float(weights @ abs(nodes - 0.3)), rel=1e-12)


def test_dilation_scales_wasserstein_and_leaves_kolmogorov() -> None:
    rng = np.random.default_rng(1)
    law, weights = MarchenkoPastur(0.5), np.full(80, 1 / 80)
    nodes = np.sort(law.sample(80, rng))
    for factor in (1e-6, 3.0, 1e6):
        assert kolmogorov(nodes * factor, weights, dilate(law, factor)) == pytest.approx(
            kolmogorov(nodes, weights, law), abs=1e-13
        )
        assert wasserstein(nodes * factor, weights, dilate(law, factor)) == pytest.approx(
            factor * wasserstein(nodes, weights, law), rel=1e-11
        )


def test_an_atom_spread_by_rounding_costs_nothing() -> None:
    """Half the mass of MP(2) is at 0: eigenvalues of 1e-9 are the atom, on whichever side they fall."""
    law, n = MarchenkoPastur(2.0), 200
    nodes = quantiles(law, n)
    clean = kolmogorov(nodes, np.full(n, 1 / n), law, zero=1e-7)
    dirty = nodes + np.where(nodes == 0, 1e-9 * np.resize([-1.0, 1.0], n), 0)
    order = np.argsort(dirty)
    assert kolmogorov(dirty[order], np.full(n, 1 / n), law, zero=1e-7) == pytest.approx(clean, abs=1e-12)
    assert kolmogorov(dirty[order], np.full(n, 1 / n), law, zero=0.0) > 0.2  # without the window it would


def test_a_missing_atom_is_seen_in_spite_of_the_window() -> None:
    law = MarchenkoPastur(2.0)
    positive = Discrete(quantiles(law, 400)[200:])
    nodes, weights = quantiles(positive, 100), np.full(100, 0.01)
    assert kolmogorov(nodes, weights, law, zero=1e-7) == pytest.approx(0.5, abs=0.02)


def test_singular_values_of_a_product_are_resolved_below_float32_rounding() -> None:
    """A dense decomposition resolves squared singular values to eps^2, Lanczos on A^T A only to eps."""
    matrix = torch.diag(torch.logspace(0, -4, 20, dtype=torch.float64))
    dense = exact(DenseOperator(matrix))
    assert numerical_zero(dense) < 1e-10
    symmetric = exact(DenseOperator(matrix, symmetric=True))
    assert 1e-8 < numerical_zero(symmetric) < 1e-5


@pytest.mark.parametrize("factor", [1e-12, 0.5, 3.0])
@pytest.mark.parametrize("law", [MarchenkoPastur(0.3), MarchenkoPastur(3.0), Semicircle()], ids=repr)
def test_the_scale_is_found(law, factor: float) -> None:
    nodes = quantiles(law, 2000) * factor
    zero = 1e-9 * factor
    table = Tabulated(law, nodes)
    assert relative_scale(nodes, np.full(2000, 1 / 2000), table, zero) == pytest.approx(factor, rel=2e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_drawn_wishart_matrices_agree_and_wrong_laws_do_not(seed: int) -> None:
    for n in (100, 400):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2 * n, n, generator=generator, dtype=torch.float64) / np.sqrt(2 * n)
        spectrum = exact(DenseOperator(x))
        right = compare(spectrum, Prediction(MarchenkoPastur(0.5), finite_size_error=2 / n))
        assert right.agrees, right.verdict
        assert right.outliers == ()
        wrong = compare(spectrum, Prediction(MarchenkoPastur(0.8), finite_size_error=2 / n))
        assert not wrong.agrees
        scaled = compare(spectrum, Prediction(dilate(MarchenkoPastur(0.5), 1.3), finite_size_error=2 / n))
        assert not scaled.agrees
        assert "Right shape" in scaled.verdict
        assert scaled.facts["scale"] == pytest.approx(1 / 1.3, rel=0.05)


def test_wigner_distance_falls_as_one_over_n() -> None:
    """Eigenvalues are rigid: both distances fall like 1/n (up to a logarithm), not 1/sqrt(n)."""
    sizes, kinds = (100, 400), {"kolmogorov": [], "wasserstein": []}
    for n in sizes:
        found = {kind: 0.0 for kind in kinds}
        for seed in range(4):
            g = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            report = compare(exact(DenseOperator((g + g.T) / np.sqrt(2 * n), symmetric=True)), Prediction(Semicircle()))
            for kind in kinds:
                found[kind] += report.distance(kind).value / 4
        for kind in kinds:
            kinds[kind].append(found[kind])
    for kind, (coarse, fine) in kinds.items():
        slope = np.log(fine / coarse) / np.log(sizes[1] / sizes[0])
        assert -1.3 < slope < -0.7, (kind, slope)


def test_a_spike_is_an_outlier_and_noise_is_not() -> None:
    n = 300
    for seed in range(3):
        g = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        wigner = (g + g.T) / np.sqrt(2 * n)
        pure = compare(exact(DenseOperator(wigner, symmetric=True)), Prediction(Semicircle(), finite_size_error=2 / n))
        assert pure.outliers == ()
        v = torch.ones(n, dtype=torch.float64) / np.sqrt(n)
        spiked = exact(DenseOperator(wigner + 3.0 * torch.outer(v, v), symmetric=True))
        report = compare(spiked, Prediction(Semicircle(), finite_size_error=2 / n))
        assert len(report.outliers) == 1
        # Baik, Ben Arous and Peche: a spike of 3 comes out at 3 + 1/3.
        assert report.outliers[0].location == pytest.approx(3 + 1 / 3, abs=0.15)
        assert report.outliers[0].margin > 4
        assert "outlier" in report.verdict
        assert report.agrees


def test_a_point_law_is_judged_by_the_wasserstein_distance() -> None:
    """Orthogonal float32 products put all singular values at 1 within rounding: that is agreement."""
    nodes = 1 + 1e-6 * np.random.default_rng(0).normal(size=64)
    assert compare(point_spectrum(nodes), Prediction(PointMass(1.0), finite_size_error=0.01)).agrees
    assert not compare(point_spectrum(nodes * 1.2), Prediction(PointMass(1.0), finite_size_error=0.01)).agrees
