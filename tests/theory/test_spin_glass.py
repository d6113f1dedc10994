"""The spherical spin glass: printed energies, an exact finite-size Kac-Rice count, and drawn couplings."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from tests.theory.drawn_matrices import normal
from torch_rmt.theory import SphericalSpinGlass


def test_printed_energies() -> None:
    glass = SphericalSpinGlass(3)
    assert glass.ground_state_energy == pytest.approx(1.6569983, abs=1e-7)
    assert glass.threshold_energy == pytest.approx(2.0 * (2.0 / 3.0) ** 0.5)
    # large p: the random energy model, sqrt(2 log 2) per spin of its own; E_0 ~ sqrt(log p) (Auffinger et al., remark)
    assert SphericalSpinGlass(1000).ground_state_energy > SphericalSpinGlass(10).ground_state_energy


@pytest.mark.parametrize("p", [3, 4, 7])
def test_complexity_by_its_integral(p: int) -> None:
    glass = SphericalSpinGlass(p)
    e = glass.threshold_energy
    for u in (-1.3 * e, -1.05 * e):
        cost, _ = quad(lambda x: 2.0 / e**2 * (x * x - e * e) ** 0.5, e, -u)
        expected = 0.5 * np.log(p - 1.0) - (p - 2.0) / (4.0 * (p - 1.0)) * u**2
        assert float(glass.complexity(np.array(u))) == pytest.approx(expected - cost, abs=1e-9)
        assert float(glass.complexity(np.array(u), index=2)) == pytest.approx(expected - 3.0 * cost, abs=1e-9)
    assert float(glass.complexity(np.array(1.0))) == pytest.approx(0.5 * np.log(p - 1.0))


@pytest.mark.parametrize("p", [3, 5])
def test_expected_count_of_critical_points_at_finite_size(p: int) -> None:
    """log(expected number)/N by the GOE one-point density of N eigenvalues (Hermite functions), exact; tends to
    theta."""
    glass = SphericalSpinGlass(p)
    errors = []
    for n in (16, 32, 64):
        # ABC Theorem 2.1 and Lemma 3.3: E Crt_N(u) = 2N sqrt(2/p) (p-1)^(N/2) E[e^(-N (p-2)/(2p) l^2) in the GOE_N
        # law of one
        # eigenvalue, l below u sqrt(p/(2 (p-1)))]; semicircle on [-sqrt 2, sqrt 2]
        total = 0.5 * n * np.log(p - 1.0) + np.log(2.0 * n * (2.0 / p) ** 0.5)
        x = np.linspace(-6.0 * n**0.5, 6.0 * n**0.5, 20001)
        log_weight = np.log(one_point_density(n, x) / n + 1e-300) - (p - 2.0) / (2.0 * p) * x**2
        top = log_weight.max()
        count = total + top + np.log(np.exp(log_weight - top).sum() * (x[1] - x[0]))
        errors.append(abs(count / n - float(glass.complexity(np.array(np.inf)))))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < np.log(64) / 64 * 1.5


def one_point_density(n: int, x: np.ndarray) -> np.ndarray:
    """Density of eigenvalues of GOE with weight exp(-x^2/2) an eigenvalue (n even): Mehta 7.2.32."""
    phi = [np.pi**-0.25 * np.exp(-0.5 * x**2)]
    phi.append(2.0**0.5 * x * phi[0])
    for k in range(1, n):
        phi.append((2.0 / (k + 1)) ** 0.5 * x * phi[k] - (k / (k + 1)) ** 0.5 * phi[k - 1])
    gue = sum(f**2 for f in phi[:n])
    step = x[1] - x[0]
    integral = np.cumsum(phi[n]) * step
    integral = integral - 0.5 * integral[-1]
    return np.maximum(gue + (n / 2.0) ** 0.5 * phi[n - 1] * integral, 0.0)


def test_energy_is_the_trace_of_the_hessian_and_the_index_its_negative_part() -> None:
    glass = SphericalSpinGlass(3)
    assert glass.index_fraction(-glass.threshold_energy) == pytest.approx(0.0, abs=1e-12)
    assert glass.index_fraction(0.0) == pytest.approx(0.5)
    for fraction in (0.05, 0.3):
        assert glass.index_fraction(glass.expected_energy_of_index(fraction)) == pytest.approx(fraction, abs=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_descents_on_drawn_couplings_end_between_ground_state_and_threshold(seed: int) -> None:
    glass = SphericalSpinGlass(3)
    misses = []
    for n in (20, 40, 80):
        generator = torch.Generator().manual_seed(seed)
        coupling = normal(generator, n, n, n) / n
        x = normal(generator, 12, n)
        x = x / x.norm(dim=1, keepdim=True) * n**0.5
        symmetric = sum(coupling.permute(*order) for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1)))
        for _ in range(500):
            gradient = torch.einsum("aij,ri,rj->ra", symmetric, x, x)
            x = x - 0.08 * gradient
            x = x / x.norm(dim=1, keepdim=True) * n**0.5
        energy = torch.einsum("ijk,ri,rj,rk->r", coupling, x, x, x) / n
        misses.append(abs(float(energy.mean()) + glass.threshold_energy))
        # fluctuations of the lowest energy are of order n^(-2/3) and more at small n
        assert float(energy.min()) > -glass.ground_state_energy - 2.0 / n**0.5
    assert misses[-1] < 0.12
    assert misses[-1] < misses[0] + 0.02


def test_bands_and_verdicts() -> None:
    glass = SphericalSpinGlass(3)
    bands = glass.bands(4)
    assert [k for _, _, k in bands] == [0, 1, 2, 3]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bands))
    assert bands[-1][1] < -glass.threshold_energy
    assert "below the ground" in glass.verdict(-1.7)
    assert "index at most 0" in glass.verdict(-1.655)
    assert "saddles" in glass.verdict(-1.2)
    low, _, _ = bands[1]
    assert float(glass.complexity(np.array(low), index=1)) == pytest.approx(0.0, abs=1e-10)


def test_a_network_maps_with_its_assumptions_named() -> None:
    glass = SphericalSpinGlass.of_relu_network(5)
    assert glass.p == 5
    assert any("path" in text for text in glass.assumptions)
    for bad in (2, 0):
        with pytest.raises(ValueError, match="3"):
            SphericalSpinGlass(bad)
    with pytest.raises(ValueError, match="index"):
        glass.complexity(np.array(-1.0), index=-1)
    with pytest.raises(ValueError, match="finite"):
        glass.hessian_spectrum(float("nan"))
    with pytest.raises(ValueError, match="dim"):
        glass.hessian_spectrum(0.0, dim=0)
