"""The Fisher laws: the paper's double integral, elliptic integrals, drawn networks, and mean-field statistics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from tests.theory.drawn_matrices import TORCH_ACTIVATIONS, deep_theta, normal
from torch_rmt.measures import FussCatalan
from torch_rmt.theory import (
    DeepFisherLaw,
    FisherLaw,
    FisherStep,
    as_activation,
    deep_fisher_spectrum,
    deep_fisher_statistics,
    fisher_spectrum,
    linear_fisher_density,
)
from torch_rmt.theory.deep_fisher import scale_and_shift
from torch_rmt.theory.deep_fisher_edges import discrete_slopes
from torch_rmt.theory.far_slopes import FarNodeLaw, far_slope_law
from torch_rmt.theory.slope_law import slope_law


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "linear"])
def test_the_double_integral_of_pennington_and_worah(activation: str) -> None:
    law = fisher_spectrum(activation).measure
    assert isinstance(law, FisherLaw)
    angle = np.pi * (np.arange(200) + 0.5) / 400.0
    x, weight = 4.0 * np.sin(angle) ** 2, 4.0 / np.pi * np.cos(angle) ** 2 * np.pi / 400.0
    e, f, zeta = law.eta, law.eta_prime, law.zeta
    first, second = (f - zeta + zeta * x)[:, None], (e - zeta + zeta * x)[None, :]
    for z in (0.3 + 0.4j, 2.0 + 0.5j, -1.0 + 0.1j):
        below = 2.0 * ((e - zeta) * (f - zeta) + first * (z - e + zeta) + second * (z - f + zeta) - z**2)
        expected = weight @ ((first + second - 2.0 * z) / below) @ weight
        assert complex(law.stieltjes(np.array([z]))[0]) == pytest.approx(expected, rel=1e-9)


def test_linear_by_elliptic_integrals() -> None:
    law = fisher_spectrum("linear").measure
    x = np.linspace(0.05, 7.95, 80)
    np.testing.assert_allclose(law.density(x), linear_fisher_density(x), atol=1e-10)
    assert law.atoms() == ((0.0, 0.5),)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    total = sum(2.0 * weights @ linear_fisher_density(low + 2.0 * (nodes + 1.0)) for low in (0.0, 4.0))
    assert total == pytest.approx(0.5, abs=1e-8)


@pytest.mark.parametrize("activation", ["tanh", "relu", "linear"])
def test_moments(activation: str) -> None:
    prediction = fisher_spectrum(activation)
    assert prediction.measure.moment(2) == pytest.approx(prediction.scalars["second_moment"], rel=1e-9)


def test_no_linear_part_leaves_two_atoms() -> None:
    assert FisherLaw(eta=1.0, eta_prime=2.0, zeta=0.0).atoms() == ((1.0, 0.5), (2.0, 0.5))
    with pytest.raises(ValueError, match="zeta"):
        FisherLaw(eta=1.0, eta_prime=0.2, zeta=0.5)


def test_deep_linear_two_layers_is_a_shifted_marchenko_pastur() -> None:
    step = FisherStep(shift=0.7, gain=1.3, slopes=discrete_slopes([1.0]), gaussian=True)
    law = DeepFisherLaw(start=0.9, steps=(step,))
    x = np.linspace(1.0, 4.0, 20)
    known = FussCatalan(1).density((x - 0.7) / (1.3 * 0.9)) / (1.3 * 0.9)
    np.testing.assert_allclose(law.density(x), known, rtol=1e-8)
    np.testing.assert_allclose(law.cdf(x), FussCatalan(1).cdf((x - 0.7) / (1.3 * 0.9)), atol=1e-8)


@pytest.mark.parametrize("ensemble", ["gaussian", "orthogonal"])
def test_deep_fisher_of_drawn_networks_converges(ensemble: str) -> None:
    """The drawn lengths and slopes go into the law: their own fluctuation, 1/sqrt(n), is no business of the
    recursion."""
    distances = []
    for n in (32, 64, 128):
        found = []
        for seed in range(3):
            values, seconds, slopes2 = deep_theta("tanh", 3, n, 1.3, ensemble, torch.Generator().manual_seed(seed))
            steps = tuple(
                FisherStep(
                    shift=second,
                    gain=1.69,
                    slopes=discrete_slopes(slope.numpy()),
                    gaussian=ensemble == "gaussian",
                )
                for second, slope in zip(seconds[1:], slopes2, strict=False)
            )
            law = DeepFisherLaw(start=seconds[0], steps=steps)
            # Cauchy's transform above the axis, a distance that needs no quantiles
            z = np.linspace(values[0], values[-1], 24) + 0.1j
            empirical = (1.0 / (z[:, None] - values[None, :])).mean(axis=1)
            found.append(np.abs(law.stieltjes(z) - empirical).mean())
        distances.append(np.mean(found))
    assert distances[2] < 0.4 * distances[0], distances
    assert all(d < 8.0 / n for d, n in zip(distances, (32, 64, 128), strict=True)), distances


@pytest.mark.parametrize("activation", ["tanh", "elu"])
def test_two_orthogonal_layers_are_the_law_of_the_slopes_itself(activation: str) -> None:
    """Theta_2 = shift + sigma_w^2 W D^2 W^T: a continuous law, hard edges and all, by sampling h."""
    prediction = deep_fisher_spectrum(activation, depth=2, width=10**9, sigma_w=1.2, ensemble="orthogonal")
    phi = as_activation(activation)
    h = 1.2 * ndtri((np.arange(200_000) + 0.5) / 200_000)
    second = np.mean(phi.value(h) ** 2)
    values = np.sort(second + 1.44 * phi.derivative(h) ** 2)
    x = np.linspace(values[0], values[-1], 60)[1:-1]
    expected = np.searchsorted(values, x, side="right") / len(values)
    np.testing.assert_allclose(prediction.measure.cdf(x), expected, atol=1e-4)


@pytest.mark.parametrize("ensemble", ["gaussian", "orthogonal"])
@pytest.mark.parametrize(("activation", "sigma_w"), [("tanh", 1.3), ("relu", 2.0**0.5), ("gelu", 1.4), ("linear", 1.0)])
def test_outer_edges_of_the_deep_fisher_law(activation: str, sigma_w: float, ensemble: str) -> None:
    """Between the edges mass one less the atoms; just above the upper edge none."""
    law = deep_fisher_spectrum(activation, depth=3, width=300, sigma_w=sigma_w, ensemble=ensemble).measure
    atoms = sum(mass for _, mass in law.atoms())
    if not law.support():
        assert atoms == pytest.approx(1.0)
        return
    (low, high) = law.support()[0][0], law.support()[-1][1]
    nodes, weights = np.polynomial.legendre.leggauss(300)
    total = atoms
    for a, b in law.support():
        x = 0.5 * (a + b) - 0.5 * (b - a) * np.cos(0.5 * np.pi * (nodes + 1.0))
        total += law.density(x) @ (0.25 * np.pi * (b - a) * np.sin(0.5 * np.pi * (nodes + 1.0)) * weights)
    # the quadrature is a coarse one at a hard edge
    assert total == pytest.approx(1.0, abs=3e-3)
    beside = np.array([high + 1e-4 * (high - low), high - 1e-4 * (high - low)])
    outside, inside = -law.stieltjes(beside).imag
    assert inside > 1e-3 / (high - low) > 1e-6 / (high - low) > outside


def test_deep_fisher_prediction_has_mass_one_and_its_mean() -> None:
    prediction = deep_fisher_spectrum("relu", depth=3, width=200, sigma_w=2.0**0.5)
    law = prediction.measure
    assert law.mean == pytest.approx(3.0, rel=1e-7)
    assert law.atoms() == ((pytest.approx(1.0), pytest.approx(0.5)),)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    (low, high), *_ = law.support()
    x = 0.5 * (low + high) - 0.5 * (high - low) * np.cos(0.5 * np.pi * (nodes + 1.0))
    piece = law.density(x) * 0.25 * np.pi * (high - low) * np.sin(0.5 * np.pi * (nodes + 1.0)) * weights
    assert piece.sum() == pytest.approx(0.5, abs=2e-3)
    assert float(law.cdf(np.array(0.5 * (low + high)))) == pytest.approx(
        0.5 + piece[x < 0.5 * (low + high)].sum(), abs=2e-2
    )


@pytest.mark.parametrize(("activation", "sigma_b"), [("tanh", 0.3), ("relu", 0.0)])
def test_statistics_of_drawn_networks(activation: str, sigma_b: float) -> None:
    """Trace, trace of the square and largest eigenvalue of the dual matrix, through autograd, averaged over draws."""
    phi = TORCH_ACTIVATIONS[activation]
    errors = []
    for width in (30, 60, 120):
        widths, samples = (width, width, width, 2), 8
        stated = deep_fisher_statistics(activation, widths=widths, n_samples=samples, sigma_w=1.4, sigma_b=sigma_b)
        traces, squares, tops = [], [], []
        for seed in range(12):
            generator = torch.Generator().manual_seed(seed)
            parameters, shapes = [], list(itertools.pairwise(widths))
            for n_in, n_out in shapes:
                parameters.append((1.4 * normal(generator, n_out, n_in) / n_in**0.5).requires_grad_(True))
                if sigma_b:
                    parameters.append((sigma_b * normal(generator, n_out)).requires_grad_(True))
            rows = []
            for _ in range(samples):
                x = normal(generator, width)
                x = x / x.norm() * width**0.5
                stride = 2 if sigma_b else 1
                for layer in range(len(shapes)):
                    x = parameters[stride * layer] @ x
                    if sigma_b:
                        x = x + parameters[stride * layer + 1]
                    if layer + 1 < len(shapes):
                        x = phi(x)
                for out in range(2):
                    grads = torch.autograd.grad(x[out], parameters, retain_graph=True)
                    rows.append(torch.cat([g.reshape(-1) for g in grads]))
            jacobian = torch.stack(rows)
            dual = torch.linalg.eigvalsh(jacobian @ jacobian.T / samples)
            traces.append(float(dual.sum()) / stated.parameters)
            squares.append(float((dual**2).sum()) / stated.parameters)
            tops.append(float(dual[-2:].mean()))
        errors.append(
            [
                np.mean(traces) / stated.mean - 1.0,
                np.mean(squares) / stated.second_moment - 1.0,
                np.mean(tops) / stated.largest_eigenvalue - 1.0,
            ]
        )
    final = np.abs(errors[-1])
    assert final[0] < 0.05, errors
    assert final[1] < 0.2, errors
    # the top eigenvalue is that of k_1 + (N - 1) k_2 up to the fluctuation of the kernel between samples
    assert final[2] < 0.35, errors
    assert abs(errors[-1][1]) < abs(errors[0][1]) + 0.05


def test_karakida_reduces_to_counting_for_a_linear_network() -> None:
    stated = deep_fisher_statistics("linear", widths=(40, 30, 20, 5), n_samples=7, sigma_w=1.0)
    assert stated.diagonal == pytest.approx(40.0 + 30.0 + 20.0)
    assert stated.off_diagonal == pytest.approx(0.0, abs=1e-12)
    assert stated.mean == pytest.approx(5 * 90.0 / (1200 + 600 + 100))
    assert stated.max_stable_lr == pytest.approx(2.0 / (90.0 / 7.0))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="depth"):
        deep_fisher_spectrum("tanh", depth=1, width=10, sigma_w=1.0)
    with pytest.raises(ValueError, match="ensemble"):
        deep_fisher_spectrum("tanh", depth=2, width=10, sigma_w=1.0, ensemble="uniform")
    with pytest.raises(ValueError, match="explode"):
        deep_fisher_spectrum("relu_squared", depth=9, width=10, sigma_w=1.4)
    with pytest.raises(ValueError, match="vanish"):
        deep_fisher_spectrum("relu_squared", depth=10, width=10, sigma_w=0.5)
    with pytest.raises(ValueError, match="correlation"):
        deep_fisher_statistics("tanh", widths=(5, 5), n_samples=3, sigma_w=1.0, input_correlation=2.0)


@pytest.mark.parametrize("activation", ["gelu", "sin", "elu"])
def test_far_from_the_slopes_few_nodes_are_exact(activation: str) -> None:
    """The Gauss rules against all nodes of the path, and against each other where one hands over to the next."""
    phi = as_activation(activation)
    law, full = far_slope_law(phi, 1.3, order=20), slope_law(phi, 1.3, order=20)
    assert isinstance(law, FarNodeLaw)
    top = max(high for _, high in law.ranges)
    angle = np.pi * (np.arange(40) + 0.5) / 40
    w = np.concatenate([0.5 * top + r * top * np.exp(1j * angle) for r in (0.505, 0.6, 0.8, 1.4, 3.0, 1e3)])
    assert len(np.unique(law._sizes(w))) == 4
    for mine, all_nodes in zip(law.transform(w), full.transform(w), strict=True):
        np.testing.assert_allclose(mine, all_nodes, rtol=1e-8)
    np.testing.assert_allclose(law.mean_log(w), full.mean_log(w), atol=1e-9)


def total_mass(law: DeepFisherLaw) -> float:
    nodes, weights = np.polynomial.legendre.leggauss(400)
    total = sum(mass for _, mass in law.atoms())
    for low, high in law.support():
        angle = 0.5 * np.pi * (nodes + 1.0)
        x = 0.5 * (low + high) - 0.5 * (high - low) * np.cos(angle)
        total += float(law.density(x) @ (0.25 * np.pi * (high - low) * np.sin(angle) * weights))
    return total


@pytest.mark.parametrize("ensemble", ["gaussian", "orthogonal"])
@pytest.mark.parametrize(
    ("activation", "sigma_w", "depth"),
    [("relu", 2.0**0.5, 8), ("relu", 1.4, 10), ("hard_tanh", 1.4, 8), ("relu6", 2.0, 6), ("leaky_relu", 1.4, 5)],
)
def test_deep_laws_of_few_slopes_have_mass_one(activation: str, sigma_w: float, depth: int, ensemble: str) -> None:
    """Beyond the turn that is the lower edge poles crowd; small slopes make narrow bands just above the shift."""
    law = deep_fisher_spectrum(activation, depth=depth, width=300, sigma_w=sigma_w, ensemble=ensemble).measure
    assert isinstance(law, DeepFisherLaw)
    assert total_mass(law) == pytest.approx(1.0, abs=3e-3)
    (low, high), *_ = law.support()
    assert law.steps[-1].shift <= low < high
    assert len(law.support()) == (2 if activation == "leaky_relu" else 1)
    levels = np.linspace(0.013, 0.987, 41)
    places = law.quantile(levels)
    loose = np.all([np.abs(places - at) > 1e-9 * high for at, _ in law.atoms()] or [np.full(41, True)], axis=0)
    np.testing.assert_allclose(law.cdf(places[loose]), levels[loose], atol=1e-9)


def test_deep_relu_reaches_down_to_where_drawn_networks_do() -> None:
    law = deep_fisher_spectrum("relu", depth=8, width=400, sigma_w=2.0**0.5).measure
    lows = []
    for seed in range(3):
        values, seconds, _ = deep_theta("relu", 8, 400, 2.0**0.5, "gaussian", torch.Generator().manual_seed(seed))
        lows.append(values[values > seconds[-1] * (1.0 + 1e-6)][0] / seconds[-1])
    (low, _), *_ = law.support()
    assert np.mean(lows) == pytest.approx(low / law.steps[-1].shift, rel=0.15)


@pytest.mark.parametrize(
    ("activation", "sigma_w", "ensemble"),
    [("gelu", 1.4, "gaussian"), ("tanh", 1.3, "gaussian"), ("gelu", 1.6, "orthogonal"), ("tanh", 1.5, "orthogonal")],
)
def test_scatter_of_the_mean_eigenvalue_and_of_the_lower_end(activation: str, sigma_w: float, ensemble: str) -> None:
    """Drawn networks; without the response of q, which each layer hands on to the next, both would be halved."""
    means, ends = [], []
    for seed in range(200):
        values, seconds, _ = deep_theta(activation, 5, 64, sigma_w, ensemble, torch.Generator().manual_seed(seed))
        means.append(np.log(values.mean()))
        ends.append(seconds[-1])
    stated = scale_and_shift(as_activation(activation), 5, 64, sigma_w**2, 0.0, 1.0, ensemble == "orthogonal")
    assert np.std(means) == pytest.approx(stated[0], rel=0.25)
    assert np.std(ends) == pytest.approx(stated[1], rel=0.3)
