"""The law of the gradient norm against drawn networks, exact moments, and the rate of its bands' false alarms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.special import digamma, polygamma

from torch_rmt.theory import gradient_norm_law, leaky_relu
from torch_rmt.theory.finite_width import layer_log_cumulants
from torch_rmt.theory.gaussian import gaussian_expectation

SLOPES = {
    "relu": (torch.relu, lambda h: (h > 0).to(h)),
    "linear": (lambda h: h, torch.ones_like),
    "leaky": (lambda h: torch.where(h > 0, h, 0.3 * h), lambda h: torch.where(h > 0, 1.0, 0.3).to(h)),
    "tanh": (torch.tanh, lambda h: 1.0 / torch.cosh(h) ** 2),
}


def log_norms(
    widths: list[int],
    name: str,
    sigma_w: float,
    sigma_b: float,
    second: float,
    draws: int,
    seed: int,
    sign: bool = False,
) -> np.ndarray:
    """log ||J u||^2 for independent networks, each with its own input and direction."""
    phi, slope = SLOPES[name]
    g = torch.Generator().manual_seed(seed)
    x, u = (torch.randn(draws, widths[0], generator=g) for _ in range(2))
    x, u = x / x.norm(dim=1, keepdim=True) * (widths[0] * second) ** 0.5, u / u.norm(dim=1, keepdim=True)
    for n_in, n_out in itertools.pairwise(widths):
        weight = torch.randn(draws, n_out, n_in, generator=g)
        weight = sigma_w / n_in**0.5 * (weight.sign() if sign else weight)
        h = torch.einsum("rba,ra->rb", weight, x) + sigma_b * torch.randn(draws, n_out, generator=g)
        u = torch.einsum("rba,ra->rb", weight, u) * slope(h)
        x = phi(h)
    return torch.log((u**2).sum(dim=1)).numpy()


def assert_moments(values: np.ndarray, mean: float, variance: float, slack: float = 0.0) -> None:
    count = len(values)
    assert abs(values.mean() - mean) < 4.0 * values.std() / count**0.5 + slack
    kurtosis = ((values - values.mean()) ** 4).mean() / values.var() ** 2
    assert abs(values.var() - variance) < 4.0 * variance * ((kurtosis - 1.0) / count) ** 0.5 + slack


@pytest.mark.parametrize(
    ("name", "widths", "sigma_w"),
    [
        ("relu", [30] * 9, 2**0.5),
        ("relu", [12, 40, 20, 25], 2**0.5),
        ("linear", [8] * 5, 1.0),
        ("leaky", [15] * 6, 1.2),
    ],
)
def test_homogeneous_moments_are_exact_at_small_widths(name: str, widths: list[int], sigma_w: float) -> None:
    law = gradient_norm_law(widths, leaky_relu(0.3) if name == "leaky" else name, sigma_w=sigma_w)
    assert law.exact
    assert_moments(log_norms(widths, name, sigma_w, 0.0, 1.0, 4000, 0), law.mean, law.variance)


def test_cumulants_of_a_layer_by_another_sum() -> None:
    # ReLU: chi-square with a binomial number of degrees of freedom
    n = 9
    alive = np.arange(1, n + 1)
    weight = np.array([float(np.prod([(n - j) / (j + 1) for j in range(k)])) for k in alive])
    weight /= weight.sum()
    log_mean = digamma(alive / 2) + np.log(2.0 / n)
    mean = weight @ log_mean
    variance = weight @ (polygamma(1, alive / 2) + (log_mean - mean) ** 2)
    found = layer_log_cumulants(n, (0.0, 1.0))
    assert found[0] == pytest.approx(mean, rel=1e-10)
    assert found[1] == pytest.approx(variance, rel=1e-10)
    near = layer_log_cumulants(7, (1.0 - 1e-9, 1.0))
    np.testing.assert_allclose(near, layer_log_cumulants(7, (1.0, 1.0)), rtol=1e-7)


def test_limit_is_hanin_and_nica() -> None:
    for n in (100, 1000, 10000):
        law = gradient_norm_law([n] * 11, "relu")
        beta = 5.0 * 10 / n
        assert law.variance == pytest.approx(beta, rel=8.0 / n)
        assert law.mean == pytest.approx(-0.5 * beta, rel=8.0 / n)
    mixed = gradient_norm_law([500, 300, 400, 200], "relu")
    assert mixed.variance == pytest.approx(5.0 * (1 / 300 + 1 / 400 + 1 / 200), rel=0.03)


def critical_tanh(q: float) -> tuple[float, float]:
    sigma_w = gaussian_expectation(lambda h: 1.0 / np.cosh(h) ** 4, q) ** -0.5
    return sigma_w, (q - sigma_w**2 * gaussian_expectation(lambda h: np.tanh(h) ** 2, q)) ** 0.5


def test_smooth_activation_coupled_recursion_and_the_naive_formula_too_small() -> None:
    sigma_w, sigma_b = critical_tanh(0.5)
    widths = [60] * 11
    law = gradient_norm_law(widths, "tanh", q=0.5)
    values = log_norms(widths, "tanh", sigma_w, sigma_b, (0.5 - sigma_b**2) / sigma_w**2, 4000, 1)
    # leading order: what is left out is of order variance x depth/width
    assert_moments(values, law.mean, law.variance, slack=0.12 * law.variance)
    mu1 = gaussian_expectation(lambda h: 1.0 / np.cosh(h) ** 4, 0.5)
    mu2 = gaussian_expectation(lambda h: 1.0 / np.cosh(h) ** 8, 0.5)
    naive = 10 * (3.0 * mu2 / mu1**2 - 1.0) / 60
    assert naive < 0.85 * values.var() < values.var()
    assert abs(law.variance - values.var()) < 0.3 * abs(naive - values.var())


def test_coupled_recursion_agrees_with_the_homogeneous_one_to_leading_order() -> None:
    relu = gradient_norm_law([2000] * 6, "relu")
    shifted = gradient_norm_law([2000] * 6, "relu", sigma_w=2**0.5, sigma_b=1e-6)
    assert shifted.variance == pytest.approx(relu.variance, rel=5e-3)
    assert shifted.mean == pytest.approx(relu.mean, rel=5e-3)


def test_kurtosis_of_the_weights_enters_where_the_vector_is_concentrated() -> None:
    widths = [40] * 4
    law = gradient_norm_law(widths, "relu", 1.0)
    values = log_norms(widths, "relu", 2**0.5, 0.0, 1.0, 5000, 2, sign=True)
    assert_moments(values, law.mean, law.variance, slack=0.02)
    spiked = gradient_norm_law(widths, "relu", 1.0, concentration=1.0)
    assert spiked.variance < law.variance


@pytest.mark.parametrize("false_alarms", [0.05, 0.2])
@pytest.mark.parametrize("widths", [[30] * 9, [20, 24, 28]])
def test_bands_raise_false_alarms_at_the_stated_rate(widths: list[int], false_alarms: float) -> None:
    low, high = gradient_norm_law(widths, "relu").band(false_alarms)
    values = np.concatenate([log_norms(widths, "relu", 2**0.5, 0.0, 1.0, 4000, seed) for seed in (3, 4)])
    rate = np.mean((values < np.log(low)) | (values > np.log(high)))
    assert (
        abs(rate - false_alarms) < 4.0 * (false_alarms * (1 - false_alarms) / len(values)) ** 0.5 + 0.05 * false_alarms
    )


def test_the_risk_in_words() -> None:
    law = gradient_norm_law([50] * 51, "relu")
    factor = law.factor_at_risk(20.0)
    assert law.probability_off_by(factor) == pytest.approx(0.05, rel=1e-6)
    assert f"{factor:.2g} times" in law.statement(20.0)
    assert gradient_norm_law([500] * 51, "relu").factor_at_risk(20.0) < factor


@pytest.mark.parametrize("widths", [[10], [10, 0], []])
def test_bad_widths(widths: list[int]) -> None:
    with pytest.raises(ValueError, match="widths"):
        gradient_norm_law(widths, "relu")


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="kurtosis"):
        gradient_norm_law([10, 10], "relu", 0.5)
    with pytest.raises(ValueError, match="u_j"):
        gradient_norm_law([10, 10], "relu", concentration=2.0)
