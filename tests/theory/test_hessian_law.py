"""The Hessian law against the published quartic, closed critical energies, the 3/2 law and free addition."""

from __future__ import annotations

import numpy as np
import pytest

from torch_rmt.measures import MarchenkoPastur, Semicircle, free_add
from torch_rmt.theory import (
    FreeLevy,
    critical_energy,
    critical_energy_numerical,
    gauss_newton_part,
    hessian_law,
    hessian_spectrum,
    largest_eigenvalue_law,
    residual_part,
)


@pytest.mark.parametrize("phi", [0.1, 0.6, 1.5])
@pytest.mark.parametrize("energy", [0.05, 0.8])
def test_the_law_solves_the_published_quartic(phi: float, energy: float) -> None:
    scale = 1.3
    z = np.array([0.4 + 0.1j, 2.0 + 0.5j, -0.5 + 0.2j])
    g = hessian_law(phi=phi, energy=energy, scale=scale).stieltjes(z)
    right = (
        2.0 * (z - scale * (1.0 - phi)) * g
        - phi * (2.0 * scale * z + energy * (1.0 - phi)) * g**2
        - energy * phi**2 * (z + scale * (phi - 2.0)) * g**3
        + z * energy * scale * phi**3 * g**4
    )
    np.testing.assert_allclose(right, 2.0, rtol=1e-9)


@pytest.mark.parametrize("residual", ["relu", "wigner"])
@pytest.mark.parametrize("phi", [0.02, 0.3, 0.8, 0.97])
def test_critical_energy_closed_and_by_bisection(residual: str, phi: float) -> None:
    closed = critical_energy(phi=phi, scale=0.7, residual=residual)
    assert closed == pytest.approx(critical_energy_numerical(phi=phi, scale=0.7, residual=residual), rel=1e-9)


def test_critical_energies_are_the_published_expressions() -> None:
    phi = 0.4
    c = 1.0 + 16.0 * phi - 8.0 * phi**2
    relu = (27.0 - 18.0 * c - c**2 + 8.0 * c**1.5) / (32.0 * phi * (1.0 - phi) ** 3)
    assert critical_energy(phi=phi) == pytest.approx(relu, rel=1e-10)
    wigner = (1.0 - 20.0 * phi - 8.0 * phi**2 + (1.0 + 8.0 * phi) ** 1.5) / 16.0
    assert critical_energy(phi=phi, residual="wigner") == pytest.approx(wigner, rel=1e-10)
    # phi -> 1: (8/27) (1 - phi)^3 for the ReLU structure
    near = 1.0 - 1e-4
    assert critical_energy(phi=near) / (1.0 - near) ** 3 == pytest.approx(8.0 / 27.0, rel=1e-3)


@pytest.mark.parametrize("residual", ["relu", "wigner"])
def test_index_rises_as_the_three_halves_power(residual: str) -> None:
    threshold = critical_energy(phi=0.5, residual=residual)
    excess = np.array([1e-2, 1e-3, 1e-4])
    index = [
        hessian_spectrum(phi=0.5, energy=threshold * (1.0 + e), residual=residual).scalars["index"] for e in excess
    ]
    slopes = np.diff(np.log(index)) / np.diff(np.log(excess))
    np.testing.assert_allclose(slopes, 1.5, atol=0.02)
    below = hessian_spectrum(phi=0.5, energy=0.999 * threshold, residual=residual)
    assert below.scalars["index"] == 0.0
    assert below.scalars["smallest_eigenvalue"] > 0.0


def test_free_addition_is_a_second_derivation() -> None:
    law = hessian_law(phi=0.5, energy=0.6, residual="wigner")
    other = free_add(MarchenkoPastur(0.5), Semicircle(variance=1.2))
    z = np.array([0.5 + 0.3j, 2.0 + 0.2j, -1.0 + 0.1j])
    np.testing.assert_allclose(law.stieltjes(z), other.stieltjes(z), rtol=1e-8)
    parts = free_add(gauss_newton_part(phi=0.5), residual_part(phi=0.5, energy=0.6))
    np.testing.assert_allclose(hessian_law(phi=0.5, energy=0.6).stieltjes(z), parts.stieltjes(z), rtol=1e-7)


def test_parts_are_known_laws_and_cumulants_add() -> None:
    x = np.linspace(0.2, 2.5, 30)
    np.testing.assert_allclose(gauss_newton_part(phi=0.5).density(x), MarchenkoPastur(0.5).density(x), atol=1e-10)
    law = hessian_law(phi=0.5, energy=0.6)
    third = sum(part.free_cumulant(3) for part in (gauss_newton_part(phi=0.5), residual_part(phi=0.5, energy=0.6)))
    k1, k2 = law.free_cumulant(1), law.free_cumulant(2)
    assert law.moment(3) == pytest.approx(third + 3.0 * k1 * k2 + k1**3, rel=1e-9)


def test_many_bands_and_the_atom_are_accounted_for() -> None:
    law = FreeLevy(drift=0.3, jumps=((2.0, 0.2), (-1.0, 0.3)))
    assert law.atoms() == ((0.3, pytest.approx(0.5)),)
    (low, _), (_, high) = law.support()
    assert float(law.cdf(np.array(low))) == pytest.approx(0.0, abs=1e-7)
    np.testing.assert_allclose(law.cdf(np.array([0.25, 0.31, 0.7])), [0.3, 0.8, 0.8], atol=1e-9)
    assert float(law.cdf(np.array(high))) == 1.0


def test_sharpness_of_the_edge_by_its_second_derivative() -> None:
    # kappa = sqrt(2/z''(G_c)) for the semicircle of variance v: z'' = 2/G^3, G_c = v^(-1/2)
    assert largest_eigenvalue_law(Semicircle(variance=4.0), 10).kappa == pytest.approx(4.0**-0.75, rel=1e-6)


@pytest.mark.parametrize("bad", [{"energy": -0.1}, {"phi": 0.0}, {"scale": -1.0}, {"phi": float("nan")}])
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        hessian_spectrum(**({"phi": 0.5, "energy": 0.1} | bad))


def test_parts_refuse_what_is_no_ratio() -> None:
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="phi"):
            gauss_newton_part(phi=bad)
        with pytest.raises(ValueError, match="phi"):
            residual_part(phi=bad, energy=1.0)
    with pytest.raises(ValueError, match="scale"):
        gauss_newton_part(phi=0.5, scale=0.0)
    with pytest.raises(ValueError, match="energy 0"):
        residual_part(phi=0.5, energy=0.0)
