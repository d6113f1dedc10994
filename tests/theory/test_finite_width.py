"""The law of the gradient norm against drawn networks, exact moments, and the rate of its bands' false alarms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.special import digamma, polygamma
from scipy.stats import binom, chi2

from torch_rmt.theory import gradient_norm_law, leaky_relu
from torch_rmt.theory.gaussian import gaussian_expectation
from torch_rmt.theory.layer_factor import layer_log_cumulants

SLOPES = {
    "relu": (torch.relu, lambda h: (h > 0).to(h)),
    "linear": (lambda h: h, torch.ones_like),
    "leaky": (lambda h: torch.where(h > 0, h, 0.3 * h), lambda h: torch.where(h > 0, 1.0, 0.3).to(h)),
    "tanh": (torch.tanh, lambda h: 1.0 / torch.cosh(h) ** 2),
}


def haar(generator: torch.Generator, draws: int, n_out: int, n_in: int) -> torch.Tensor:
    """Haar matrices of entry variance 1/n_in."""
    large, small = max(n_out, n_in), min(n_out, n_in)
    q, r = torch.linalg.qr(torch.randn(draws, large, small, generator=generator))
    q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1))[:, None, :]
    return q * (n_out / n_in) ** 0.5 if n_out >= n_in else q.transpose(1, 2)


def log_norms(
    widths: list[int],
    name: str,
    sigma_w: float,
    sigma_b: float,
    second: float,
    draws: int,
    seed: int,
    sign: bool = False,
    orthogonal: bool = False,
) -> np.ndarray:
    """log ||J u||^2 for independent networks, each with its own input and direction."""
    phi, slope = SLOPES[name]
    g = torch.Generator().manual_seed(seed)
    x, u = (torch.randn(draws, widths[0], generator=g) for _ in range(2))
    x, u = x / x.norm(dim=1, keepdim=True) * (widths[0] * second) ** 0.5, u / u.norm(dim=1, keepdim=True)
    for n_in, n_out in itertools.pairwise(widths):
        weight = haar(g, draws, n_out, n_in) if orthogonal else torch.randn(draws, n_out, n_in, generator=g) / n_in**0.5
        weight = sigma_w * (weight.sign() / n_in**0.5 if sign else weight)
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


ORTHOGONAL_WIDTHS = [
    ("relu", [12] * 5, 2**0.5),
    ("relu", [12, 30, 8, 20], 2**0.5),
    ("leaky", [6, 15, 10, 10], 1.2),
    ("linear", [8, 20, 5, 5], 1.0),
]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("name", "widths", "sigma_w"), ORTHOGONAL_WIDTHS)
def test_orthogonal_moments_are_exact_at_small_widths(name: str, widths: list[int], sigma_w: float, seed: int) -> None:
    """Square layers, wider, and narrower: the first layer with them."""
    activation = leaky_relu(0.3) if name == "leaky" else name
    law = gradient_norm_law(widths, activation, sigma_w=sigma_w, ensemble="orthogonal")
    assert law.exact
    values = log_norms(widths, name, sigma_w, 0.0, 1.0, 8000, seed, orthogonal=True)
    values = values[np.isfinite(values)]
    assert_moments(values, law.mean, law.variance)
    low, high = law.band(0.1)
    rate = np.mean((values < np.log(low)) | (values > np.log(high)))
    assert abs(rate - 0.1) < 4.0 * (0.09 / len(values)) ** 0.5


def test_orthogonal_limit_is_three_over_n_and_an_isometry_has_no_spread() -> None:
    """beta = 3 (mu_2/mu_1^2 - 1) sum 1/n_l, reached like 1/n; twice as wide a layer divides by a chi-square more."""
    errors = []
    for n in (100, 400, 1600):
        law = gradient_norm_law([n] * 11, "relu", ensemble="orthogonal")
        errors.append(law.variance / (3.0 * 10 / n) - 1.0)
    assert np.polyfit(np.log([100, 400, 1600]), np.log(np.abs(errors)), 1)[0] == pytest.approx(-1.0, abs=0.05)
    wide = gradient_norm_law([4000, 2000], "relu", ensemble="orthogonal")
    assert wide.variance == pytest.approx(5.0 / 2000 - 2.0 / 4000, rel=5e-3)
    flat = gradient_norm_law([50] * 4, "linear", ensemble="orthogonal")
    assert flat.variance == 0.0
    assert flat.band(0.05) == pytest.approx((1.0, 1.0))
    assert flat.factor_at_risk() == pytest.approx(1.0)
    np.testing.assert_array_equal(flat.log_cdf(np.array([-0.1, 0.1])), [0.0, 1.0])


def test_orthogonal_layers_of_a_smooth_activation() -> None:
    sigma_w, sigma_b = critical_tanh(0.5)
    second = (0.5 - sigma_b**2) / sigma_w**2
    for widths in ([40] * 7, [30, 60, 20, 40]):
        values = log_norms(widths, "tanh", sigma_w, sigma_b, second, 6000, 2, orthogonal=True)
        law = gradient_norm_law(widths, "tanh", q=0.5, ensemble="orthogonal")
        assert_moments(values, law.mean, law.variance, slack=0.08 * law.variance)
        sampled = gradient_norm_law(widths, "tanh", q=0.5, ensemble="orthogonal", draws=6000, seed=3)
        assert_moments(values, sampled.mean, sampled.variance, slack=4.0 * sampled.variance * (2.0 / 6000) ** 0.5)
        gaussian = gradient_norm_law(widths, "tanh", q=0.5)
        assert law.variance < 0.75 * gaussian.variance
    # the draws, which are the networks, against the expansion where it is good: 1.3 % of noise, 2 % of next order
    expanded = gradient_norm_law([150] * 7, "tanh", q=0.5, ensemble="orthogonal")
    sampled = gradient_norm_law([150] * 7, "tanh", q=0.5, ensemble="orthogonal", draws=12000, seed=1)
    assert expanded.variance == pytest.approx(sampled.variance, rel=0.06)


@pytest.mark.parametrize(
    ("activation", "settings", "constant"),
    [
        ("tanh", {"sigma_w": 2.0, "sigma_b": 0.1}, 6.0),
        ("gelu", {"sigma_w": 1.5, "sigma_b": 0.3}, 14.0),
        ("silu", {"sigma_w": 2.2, "sigma_b": 0.3}, 6.0),
    ],
)
def test_the_expansion_falls_short_by_one_over_width(
    activation: str, settings: dict[str, float], constant: float
) -> None:
    """GELU at sigma_w = 1.5 is far from criticality: 20 % at n = 50, but 1/n like the others."""
    widths, missing = (16, 32, 64), []
    for n in widths:
        sizes = [n] * 11
        found = gradient_norm_law(sizes, activation, draws=24000, seed=1, **settings).variance
        missing.append(1.0 - gradient_norm_law(sizes, activation, **settings).variance / found)
    assert all(part * n < constant for part, n in zip(missing, widths, strict=True)), missing
    # noise of 24,000 draws: 0.9 % of the variance
    assert -1.6 < np.polyfit(np.log(widths), np.log(missing), 1)[0] < -0.5, missing


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_of_the_lengths_are_the_network_itself(seed: int) -> None:
    """Where the expansion fails (variance above one): mean, variance and bands from draws, against drawn networks."""
    widths = [16] * 13
    law = gradient_norm_law(widths, "tanh", sigma_w=2.0, sigma_b=0.1, draws=8000, seed=seed)
    values = log_norms(widths, "tanh", 2.0, 0.1, 1.0, 8000, 10 + seed)
    error = (2.0 * law.variance / 8000) ** 0.5
    assert abs(values.mean() - law.mean) < 4.0 * error
    assert abs(values.var() - law.variance) < 4.0 * law.variance * (5.0 / 8000) ** 0.5
    low, high = law.band(0.1)
    rate = np.mean((values < np.log(low)) | (values > np.log(high)))
    assert abs(rate - 0.1) < 4.0 * (2.0 * 0.09 / 8000) ** 0.5


@pytest.mark.parametrize("false_alarms", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("widths", [[30] * 9, [10, 12, 14], [5, 5, 5, 5], [8, 30, 5, 20]])
def test_bands_raise_false_alarms_at_the_stated_rate(widths: list[int], false_alarms: float) -> None:
    low, high = gradient_norm_law(widths, "relu").band(false_alarms)
    values = np.concatenate([log_norms(widths, "relu", 2**0.5, 0.0, 1.0, 6000, seed) for seed in (3, 4)])
    values = values[np.isfinite(values)]  # given that no layer is dead
    for beyond in (values < np.log(low), values > np.log(high)):
        half = 0.5 * false_alarms
        assert abs(beyond.mean() - half) < 4.0 * (half * (1 - half) / len(values)) ** 0.5


def test_the_exact_law_against_another_derivation() -> None:
    """One ReLU layer: binomial mixture of chi-squares; leaky: moments of the transform are the cumulants."""
    n = 9
    law = gradient_norm_law([n, n], "relu")
    alive = np.arange(1, n + 1)
    weight = binom.pmf(alive, n, 0.5) / (1.0 - 0.5**n)
    y = np.linspace(-6.0, 2.0, 30)
    expected = (weight * chi2.cdf(np.exp(y)[:, None] * n / 2.0, alive)).sum(axis=1)
    np.testing.assert_allclose(law.log_cdf(y), expected, atol=1e-10)
    for widths in ([6] * 4, [40] * 4):
        for ensemble in ("gaussian", "orthogonal"):
            leaky = gradient_norm_law([*widths, 80], leaky_relu(0.3), ensemble=ensemble)
            deviation = leaky.variance**0.5
            grid = np.linspace(leaky.mean - 14 * deviation, leaky.mean + 8 * deviation, 4001)
            mass, middle = np.diff(leaky.log_cdf(grid)), 0.5 * (grid[1:] + grid[:-1])
            assert mass @ middle == pytest.approx(leaky.mean, abs=1e-3 * deviation)
            assert mass @ (middle - leaky.mean) ** 2 == pytest.approx(leaky.variance, rel=1e-3)
            third = leaky.skewness * leaky.variance**1.5
            assert mass @ (middle - leaky.mean) ** 3 == pytest.approx(third, rel=2e-2, abs=1e-3 * deviation**3)


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
    with pytest.raises(ValueError, match="ensemble"):
        gradient_norm_law([10, 10], "relu", ensemble="uniform")
    with pytest.raises(ValueError, match="kurtosis"):
        gradient_norm_law([10, 10], "relu", 1.0, ensemble="orthogonal")
    with pytest.raises(ValueError, match="draws"):
        gradient_norm_law([10, 10], "tanh", q=0.5, draws=-1)
    for bad in ({"sigma_w": float("nan")}, {"sigma_b": -1.0}, {"q": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            gradient_norm_law([10, 10], "tanh", **bad)
