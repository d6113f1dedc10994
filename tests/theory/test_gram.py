"""The Gram law against its moments, its limits, a second derivation, and drawn outliers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.theory.drawn_matrices import GramCase
from torch_rmt.measures import FussCatalan, MarchenkoPastur, dilate, free_mul
from torch_rmt.theory import gram_law, gram_spectrum, nonlinear_moments
from torch_rmt.theory.gram import GramBiasLaw, as_activation

GRID = [(1.0, 0.5, 1.0, 1.0), (1.0, 0.9, 0.3, 0.1), (0.7, 0.2, 2.0, 3.0), (1.3, 1.25, 0.5, 2.0)]


@pytest.mark.parametrize(("eta", "zeta", "psi", "phi"), GRID)
def test_the_law_solves_the_quartic_of_pennington_and_worah(eta: float, zeta: float, psi: float, phi: float) -> None:
    law = gram_law(eta, zeta, psi=psi, phi=phi)
    z = np.array([0.3 + 0.2j, 1.0 + 0.01j, 3.0 + 1.0j, -1.0 + 0.5j])
    big = (z * law.stieltjes(z) - 1.0) / psi + 1.0  # P of the paper, from G = psi P/z + (1 - psi)/z
    t = 1.0 / (z * psi)
    a, b = 1.0 + (big - 1.0) * phi, 1.0 + (big - 1.0) * psi
    np.testing.assert_allclose(
        big, 1.0 + (eta - zeta) * t * a * b + a * b * t * zeta / (1.0 - a * b * t * zeta), rtol=1e-9
    )


@pytest.mark.parametrize(("eta", "zeta", "psi", "phi"), GRID)
def test_moments_are_those_of_the_expansion(eta: float, zeta: float, psi: float, phi: float) -> None:
    law = gram_law(eta, zeta, psi=psi, phi=phi)
    assert law.moment(1) == pytest.approx(eta, rel=1e-12)
    assert law.moment(2) == pytest.approx(eta**2 * (1.0 + phi / psi) + zeta**2 / psi, rel=1e-12)


def test_limits_no_linear_part_and_nothing_but() -> None:
    x = np.linspace(0.05, 5.0, 60)
    np.testing.assert_allclose(
        gram_law(1.5, 0.0, psi=1.2, phi=0.6).density(x), MarchenkoPastur(0.5, 1.5).density(x), atol=1e-9
    )
    np.testing.assert_allclose(gram_law(1.0, 1.0, psi=1.0, phi=1.0).density(x), FussCatalan(2).density(x), atol=1e-8)


def test_free_product_is_a_second_derivation() -> None:
    eta, zeta, psi, phi = 1.0, 1.0, 0.8, 1.6
    law = gram_law(eta, zeta, psi=psi, phi=phi)
    other = free_mul(dilate(MarchenkoPastur(1.0 / psi), zeta), MarchenkoPastur(phi / psi))
    z = np.array([0.5 + 0.3j, 2.0 + 0.2j, 5.0 + 1.0j])
    np.testing.assert_allclose(law.stieltjes(z), other.stieltjes(z), rtol=1e-8)


def test_edges_carry_the_law_and_two_bands_are_found() -> None:
    law = gram_law(1.0, 0.9, psi=0.3, phi=0.1)
    assert len(law.support()) == 2
    for low, high in law.support():
        width = high - low
        outside = np.array([low - 1e-6 * width, high + 1e-6 * width])
        assert np.all(law.stieltjes(outside).imag == 0.0)
        assert np.all(law.density(np.array([low + 1e-6 * width, high - 1e-6 * width])) > 0.0)
    # the band of the signal has one direction an input
    assert float(law.cdf(np.array(0.4))) == pytest.approx(1.0 - 0.3, abs=1e-12)


def test_bias_zero_limit_is_the_law_without() -> None:
    phi = as_activation("tanh")
    small = GramBiasLaw.of(phi, variance=1.3, sigma_b=1e-7, psi=1.5, ratio=0.5)
    moments = nonlinear_moments(phi, 1.3)
    plain = gram_law(moments.eta, moments.zeta, psi=1.5, phi=0.75)
    x = np.linspace(0.01, 1.0, 50)
    np.testing.assert_allclose(small.density(x), plain.density(x), rtol=1e-6)
    np.testing.assert_allclose(small.cdf(x), plain.cdf(x), atol=1e-8)
    np.testing.assert_allclose(small.support()[0], plain.support()[0], rtol=1e-8)


@pytest.mark.parametrize("n_out", [2, 20, 2000])
def test_without_bias_the_outlier_of_the_row_means_is_that_of_one_mean(n_out: int) -> None:
    phi = as_activation("relu")
    moments = nonlinear_moments(phi, 1.3)
    small = GramBiasLaw.of(phi, variance=1.3, sigma_b=1e-7, psi=1.5, ratio=0.5)
    plain = gram_law(moments.eta, moments.zeta, psi=1.5, phi=0.75).outlier(n_out * moments.mean**2)
    assert (plain is None) == (n_out == 2)
    assert small.outlier(n_out) == (None if plain is None else pytest.approx(plain, rel=1e-6))


def test_with_bias_second_moment_by_hand() -> None:
    # E tr Sigma^2 with Sigma = diag(v) + sqrt(alpha) W W^T sqrt(alpha), then Marchenko-Pastur
    law = gram_spectrum("relu", n_in=100, n_out=150, n_samples=300, sigma_b=0.8).measure
    assert isinstance(law, GramBiasLaw)
    diagonal = law.weight @ (law.alpha + law.noise) ** 2
    second = diagonal + law.zeta**2 / law.psi
    assert law.moment(2) == pytest.approx(second + law.ratio * law.mean**2, rel=1e-9)


def test_averaging_the_profiles_first_would_be_another_law() -> None:
    law = gram_spectrum("relu", n_in=100, n_out=150, n_samples=300, sigma_b=0.8).measure
    assert isinstance(law, GramBiasLaw)
    averaged = gram_law(law.mean, law.zeta, psi=law.psi, phi=law.psi * law.ratio)
    x = np.linspace(0.01, 2.0, 60)
    assert np.abs(law.cdf(x) - averaged.cdf(x)).max() > 0.01


@pytest.mark.parametrize("sigma_b", [0.0, 0.7])
@pytest.mark.parametrize("seed", [1, 2])
def test_outlier_of_the_uncentred_matrix(sigma_b: float, seed: int) -> None:
    errors = []
    for n in (60, 120, 240):
        case = GramCase("relu", (1.0, 1.0, 2.0), sigma_b=sigma_b)
        top = float(torch.linalg.eigvalsh(case.matrix(n, torch.Generator().manual_seed(seed), centred=False))[-1])
        errors.append(abs(top / case.predict(n).scalars["outlier"] - 1.0))
    # the drawn mean fluctuates by 1/sqrt(n) at most
    assert all(error < 2.0 / np.sqrt(n) for error, n in zip(errors, (60, 120, 240), strict=True)), errors


def test_no_outlier_below_the_transition_and_the_atom_of_the_rank() -> None:
    assert "outlier" not in gram_spectrum("tanh", n_in=50, n_out=100, n_samples=40).scalars
    assert gram_spectrum("tanh", n_in=50, n_out=100, n_samples=40).scalars["atom_at_zero"] == pytest.approx(0.6)
    assert gram_spectrum("linear", n_in=25, n_out=100, n_samples=400).scalars["atom_at_zero"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n_in": 0}, "n_in"),
        ({"n_samples": -3}, "n_samples"),
        ({"sigma_w": 0.0}, "sigma_w"),
        ({"sigma_b": -0.1}, "sigma_b"),
    ],
)
def test_bad_sizes_are_refused_by_name(change: dict[str, float], word: str) -> None:
    settings = {"n_in": 10, "n_out": 10, "n_samples": 10} | change
    with pytest.raises(ValueError, match=word):
        gram_spectrum("tanh", **settings)


def test_a_constant_activation_is_refused_and_centring_is_said() -> None:
    with pytest.raises(ValueError, match="constant"):
        gram_spectrum(lambda h: 0.0 * h + 1.0, n_in=10, n_out=10, n_samples=10)
    assert any("centred" in text for text in gram_spectrum("relu", n_in=10, n_out=10, n_samples=10).assumptions)
