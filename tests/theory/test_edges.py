"""Tracy-Widom against printed numbers and drawn matrices; spikes against closed forms and drawn matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.theory.drawn_matrices import HessianCase, normal
from torch_rmt.measures import MarchenkoPastur, PointMass, Semicircle
from torch_rmt.theory import (
    TracyWidom,
    edge_sharpness,
    gram_law,
    largest_eigenvalue_law,
    spike_in_product,
    spike_in_sum,
)
from torch_rmt.theory.edges import tracy_widom_determinant


def test_printed_numbers() -> None:
    law = TracyWidom()
    # Bornemann 2010, table 10
    assert law.mean == pytest.approx(-1.20653357458209, abs=1e-10)
    assert law.variance == pytest.approx(1.60778103458103, abs=1e-9)
    # Tracy and Widom 2009: quantiles of beta = 1 as in the tables of Bejan 2005
    np.testing.assert_allclose(law.quantile(np.array([0.9, 0.95, 0.99])), [0.4501, 0.9793, 2.0234], atol=2e-4)


def test_painleve_is_a_second_derivation() -> None:
    # F1(s)^2 = F2(s) exp(-integral of q), q'' = s q + 2 q^3, q ~ Ai; integrated from the right
    from scipy.integrate import solve_ivp
    from scipy.special import airy

    start = 6.0
    ai, slope, _, _ = airy(start)
    # log F2'' = -q^2; tails of the integrals beyond `start` are below 1e-9
    system = solve_ivp(
        lambda s, y: [y[1], s * y[0] + 2 * y[0] ** 3, y[3], -(y[0] ** 2), y[0]],
        (start, -3.0),
        [ai, slope, 0.0, 0.0, 0.0],
        rtol=1e-11,
        atol=1e-13,
        dense_output=True,
    )
    for s in (-3.0, -1.5, 0.0, 1.5):
        _, _, log_f2, _, area = system.sol(s)
        assert float(TracyWidom().cdf(np.array(s))) == pytest.approx(np.exp(0.5 * (log_f2 + area)), abs=2e-6)


def test_interpolant_tail_and_quantiles_agree() -> None:
    law = TracyWidom()
    s = np.linspace(-8.0, 6.0, 25)
    np.testing.assert_allclose(law.cdf(s), tracy_widom_determinant(s), atol=1e-12)
    np.testing.assert_allclose(law.survival(np.array([3.99, 4.01])), 1.0 - law.cdf(np.array([3.99, 4.01])), rtol=1e-3)
    p = np.array([0.01, 0.5, 0.999])
    np.testing.assert_allclose(law.cdf(law.quantile(p)), p, atol=1e-10)
    assert 0.0 < float(law.survival(np.array(30.0))) < 1e-40


@pytest.mark.parametrize("seed", [0, 1])
def test_largest_eigenvalues_of_drawn_hessians(seed: int) -> None:
    case = HessianCase(0.5, 0.4, "wigner")
    scaled = []
    for n in (20, 40, 80):
        law = largest_eigenvalue_law(case.predict(n).measure, 2 * n)
        tops = np.array([case.draw(n, torch.Generator().manual_seed(997 * seed + k))[-1] for k in range(80)])
        scaled.append((tops - law.edge) / law.scale)
    mean = np.array([values.mean() for values in scaled])
    # mean and spread are Tracy-Widom's, up to n^(-2/3)-like terms and the noise of 80 draws
    assert abs(mean[-1] - TracyWidom().mean) < 4.0 * (1.61 / 80) ** 0.5 + 0.2, mean
    assert 0.6 < scaled[-1].var() / TracyWidom().variance < 1.6
    p_values = np.array([law.p_value(float(law.edge + law.scale * value)) for value in scaled[-1]])
    assert 0.3 < p_values.mean() < 0.75
    assert (p_values < 1e-4).mean() < 0.05


def test_sharpness_and_what_has_no_soft_edge() -> None:
    # MP(c): density sqrt((b - x)(x - a))/(2 pi c x), so kappa = sqrt(b - a)/(2 c b)
    law = MarchenkoPastur(0.3)
    low, high = law.bounds()
    assert edge_sharpness(law) == pytest.approx((high - low) ** 0.5 / (0.6 * high), rel=1e-6)
    assert edge_sharpness(law, upper=False) == pytest.approx((high - low) ** 0.5 / (0.6 * low), rel=1e-3)
    with pytest.raises(ValueError, match="continuous"):
        edge_sharpness(PointMass(1.0))
    with pytest.raises(ValueError, match="square-root"):
        edge_sharpness(MarchenkoPastur(1.0), upper=False)


@pytest.mark.parametrize("theta", [1.2, 3.0, -2.0])
def test_spike_in_wigner_noise_is_closed(theta: float) -> None:
    found = spike_in_sum(PointMass(0.0), Semicircle(), theta)
    assert found.visible
    assert found.position == pytest.approx(theta + 1.0 / theta, rel=1e-9)
    assert found.overlap == pytest.approx(1.0 - 1.0 / theta**2, rel=1e-6)


def test_transition_of_baik_ben_arous_and_peche() -> None:
    ratio = 0.25
    for spike in (1.2, 1.49):
        hidden = spike_in_product(PointMass(1.0), MarchenkoPastur(ratio), spike)
        assert not hidden.visible
        assert hidden.position == pytest.approx((1.0 + ratio**0.5) ** 2, rel=1e-6)
    found = spike_in_product(PointMass(1.0), MarchenkoPastur(ratio), 1.6)
    assert found.position == pytest.approx(1.6 * (1.0 + ratio / 0.6), rel=1e-9)
    assert found.overlap == pytest.approx((1.0 - ratio / 0.36) / (1.0 + ratio / 0.6), rel=1e-6)
    with pytest.raises(ValueError, match="bulk"):
        spike_in_sum(Semicircle(), Semicircle(), 1.0)


@pytest.mark.parametrize("seed", [0, 1])
def test_drawn_spikes_in_a_sum_and_in_a_product(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = 400
    bulk = torch.linalg.eigvalsh((lambda x: x @ x.T / (2 * n))(normal(generator, n, 2 * n)))
    bulk[-1] = 5.0
    noise = normal(generator, n, n)
    noise = (noise + noise.T) * (0.3 / (2 * n)) ** 0.5
    values, vectors = torch.linalg.eigh(torch.diag(bulk) + noise)
    found = spike_in_sum(MarchenkoPastur(0.5), Semicircle(0.3), 5.0)
    assert float(values[-1]) == pytest.approx(found.position, abs=4.0 / n**0.5)
    assert float(vectors[-1, -1] ** 2) == pytest.approx(found.overlap, abs=0.03)
    wishart = (lambda x: x @ x.T / (4 * n))(normal(generator, n, 4 * n))
    values, vectors = torch.linalg.eigh(bulk.sqrt()[:, None] * wishart * bulk.sqrt()[None, :])
    found = spike_in_product(MarchenkoPastur(0.5), MarchenkoPastur(0.25), 5.0)
    assert float(values[-1]) == pytest.approx(found.position, rel=4.0 / n**0.5)
    assert float(vectors[-1, -1] ** 2) == pytest.approx(found.overlap, abs=0.06)


def test_drawn_spikes_approach_their_places_and_overlaps_like_one_over_root_n() -> None:
    sizes, errors = (50, 100, 200), []
    in_sum = spike_in_sum(MarchenkoPastur(0.5), Semicircle(0.3), 5.0)
    in_product = spike_in_product(MarchenkoPastur(0.5), MarchenkoPastur(0.25), 5.0)
    for n in sizes:
        # population at its quantiles: what is left is the noise of the other part
        bulk = torch.as_tensor(MarchenkoPastur(0.5).quantile((np.arange(n) + 0.5) / n))
        bulk[-1] = 5.0
        found = []
        for seed in range(24):
            generator = torch.Generator().manual_seed(100 * seed + n)
            noise = normal(generator, n, n)
            values, vectors = torch.linalg.eigh(torch.diag(bulk) + (noise + noise.T) * (0.3 / (2 * n)) ** 0.5)
            row = [float(values[-1]) / in_sum.position - 1.0, float(vectors[-1, -1] ** 2) - in_sum.overlap]
            noise = bulk.sqrt()[:, None] * normal(generator, n, 4 * n)
            values, vectors = torch.linalg.eigh(noise @ noise.T / (4 * n))
            row += [float(values[-1]) / in_product.position - 1.0, float(vectors[-1, -1] ** 2) - in_product.overlap]
            found.append(row)
        errors.append(np.sqrt(np.mean(np.square(found), axis=0)))
    slopes = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    np.testing.assert_allclose(slopes, -0.5, atol=0.3)
    assert np.all(errors[-1] < np.array([0.03, 0.03, 0.1, 0.05])), errors[-1]


def test_outlier_of_the_gram_law_is_that_of_the_product() -> None:
    law = gram_law(1.0, 0.0, psi=1.0, phi=0.5)
    # population I with one spike strength + 1 in the direction of the mean, to leading order in 1/strength
    strength = 400.0
    spiked = spike_in_product(PointMass(1.0), MarchenkoPastur(0.5), strength)
    assert law.outlier(strength) == pytest.approx(spiked.position, rel=3.0 / strength)
