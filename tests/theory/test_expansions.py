"""What is only an expansion or a derivative, checked by its order: gradient norms, length maps, extreme eigenvalues."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2

from torch_rmt.theory.activation import Activation, as_activation
from torch_rmt.theory.correlation import slope_pair, value_pair
from torch_rmt.theory.critical import critical_point
from torch_rmt.theory.edges import LargestEigenvalue, TracyWidom
from torch_rmt.theory.finite_width import gradient_norm_law
from torch_rmt.theory.fisher import fisher_law, fisher_spectrum
from torch_rmt.theory.gaussian import gaussian_expectation
from torch_rmt.theory.gradient_norm import GradientNormLaw
from torch_rmt.theory.isometry import limit_law, shifted_relu, smoothed_relu
from torch_rmt.theory.moments import length_slope, second_moment
from torch_rmt.theory.phase import critical_line, phase_diagram


def like_chi_square(k: int) -> GradientNormLaw:
    """A law with the first four cumulants of chi-square, of which nothing else is known."""
    return GradientNormLaw(k, 2.0 * k, log_mean_field=k, skewness=(8 / k) ** 0.5, excess_kurtosis=12 / k)


def test_the_corrected_gaussian_is_good_to_the_order_of_its_cumulants() -> None:
    # with two cumulants the error falls as k^-1/2, with three as 1/k, with four as k^-3/2 (Edgeworth; Cornish, Fisher)
    sizes = np.array([50, 200, 800])
    p = np.linspace(0.02, 0.98, 33)
    at, places = [], []
    for k in sizes.tolist():
        law = like_chi_square(k)
        y = chi2.ppf(p, k)
        at.append(np.abs(law.log_cdf(y) - p).max())
        places.append(np.abs(law.log_quantile(p) - y).max() / (2 * k) ** 0.5)
    assert np.polyfit(np.log(sizes), np.log(at), 1)[0] == pytest.approx(-1.5, abs=0.1)
    assert np.polyfit(np.log(sizes), np.log(places), 1)[0] == pytest.approx(-1.5, abs=0.1)
    assert at[-1] < 1e-4
    assert places[-1] < 1e-4


def test_bands_and_risks_keep_their_probability() -> None:
    law = like_chi_square(400)
    low, high = law.band(0.1)
    assert chi2.cdf(np.log(low), 400) == pytest.approx(0.05, abs=1e-3)
    assert chi2.sf(np.log(high), 400) == pytest.approx(0.05, abs=1e-3)
    reach = 2 * np.log(law.factor_at_risk(10.0))
    assert chi2.cdf(400 - reach, 400) + chi2.sf(400 + reach, 400) == pytest.approx(0.1, abs=1e-3)
    assert GradientNormLaw(1.0, 0.0).factor_at_risk() == pytest.approx(np.exp(0.5))
    for bad in (0.0, 1.0):
        with pytest.raises(ValueError, match="false_alarms"):
            law.band(bad)
    for bad in (1.0, np.inf):
        with pytest.raises(ValueError, match="one_in"):
            law.factor_at_risk(bad)


@pytest.mark.parametrize("name", ["softplus", "sigmoid", "tanh", "silu", "selu", "gelu_tanh"])
@pytest.mark.parametrize("q", [1e-5, 1e-3, 0.1, 3.0])
def test_length_slope_is_the_derivative_of_the_second_moment(name: str, q: float) -> None:
    phi = as_activation(name)
    step = 0.02 * q
    near = [second_moment(phi, q + k * step) for k in (-2, -1, 1, 2)]
    difference = (near[0] - 8 * near[1] + 8 * near[2] - near[3]) / (12 * step)
    assert length_slope(phi, q) == pytest.approx(difference, rel=3e-7, abs=1e-14 * near[0] / step)


def test_far_out_the_tracy_widom_law_is_complete() -> None:
    law = TracyWidom()
    assert law.cdf([-100.0, 100.0]).tolist() == [0.0, 1.0]
    assert law.density([-100.0, 100.0]).tolist() == [0.0, 0.0]
    assert float(law.survival(law.quantile(1 - 1e-9))) == pytest.approx(1e-9, rel=1e-6)
    assert law.quantile([0.0, 1.0]).tolist() == [-np.inf, np.inf]
    top = LargestEigenvalue(edge=4.0, kappa=0.25, dim=1000)
    for p in (0.01, 0.5, 0.99):
        assert top.p_value(top.quantile(p)) == pytest.approx(1 - p, abs=1e-9)
    wide = LargestEigenvalue(edge=4.0, kappa=0.25, dim=8000)
    assert wide.mean - 4.0 == pytest.approx((top.mean - 4.0) / 4, rel=1e-12)
    assert wide.variance == pytest.approx(top.variance / 16, rel=1e-12)


def test_the_default_picture_is_that_of_its_points() -> None:
    q, sigma_w, sigma_b = critical_line("tanh")
    assert len(q) > 50
    assert np.all(np.diff(q) > 0)
    # each of these critical points falls on a point of the table that roots are looked for in
    diagram = phase_diagram("tanh", sigma_w[[40, 80]], sigma_b[[40, 80]])
    assert np.diag(diagram.chi) == pytest.approx([1.0, 1.0], abs=1e-6)
    assert np.diag(diagram.q_star) == pytest.approx(q[[40, 80]], rel=1e-5)
    assert diagram.critical_sigma_w == pytest.approx(sigma_w[[40, 80]], rel=1e-6)
    assert diagram.chi[0, 1] > 1 > diagram.chi[1, 0]
    # E phi^2 = q E phi'^2 for ReLU: no bias on the critical line, and none is critical
    assert critical_line("relu")[2] == pytest.approx(0.0, abs=1e-3)
    assert np.isnan(phase_diagram("relu", [1.0], [0.1]).critical_sigma_w[0])
    with pytest.raises(ValueError, match="one axis"):
        phase_diagram("tanh", [])


@pytest.mark.parametrize("width", [0.3, 2.0])
def test_a_smoothed_relu_is_the_mean_of_a_shaken_one(width: float) -> None:
    phi = smoothed_relu(width)
    for h in (-3.0, -0.4, 0.0, 0.7, 5.0):
        kink = (-h / width,) if abs(h) < 8 * width else ()
        shaken = gaussian_expectation(lambda z, h=h: np.maximum(h + width * z, 0.0), 1.0, kink)
        assert float(phi.value(np.array(h))) == pytest.approx(shaken, abs=1e-12)
        passing = gaussian_expectation(lambda z, h=h: (h + width * z > 0) * 1.0, 1.0, kink)
        assert float(phi.derivative(np.array(h))) == pytest.approx(passing, abs=1e-12)
    with pytest.raises(ValueError, match="width must be positive"):
        smoothed_relu(np.inf)
    with pytest.raises(ValueError, match="shift must be finite"):
        shifted_relu(np.nan)


@pytest.mark.parametrize("name", ["tanh", "hard_tanh"])
@pytest.mark.parametrize("variance", [0.25, 4.0])
def test_the_largest_of_a_limit_is_where_its_inverse_turns(name: str, variance: float) -> None:
    limit = limit_law(name, variance)
    m = np.geomspace(1e-4, 1e6, 200001)
    assert limit.largest() == pytest.approx(float(np.exp(limit.log_inverse(m).min())), rel=1e-5)
    for bad in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="variance"):
            limit_law(name, bad)


def test_pairs_without_a_closed_form_go_by_quadrature() -> None:
    # erf hidden behind another name has no closed form, and the same moments
    erf = as_activation("erf")
    hidden = Activation("hidden", erf.value, erf.derivative)
    for q, c in ((0.5, 0.3), (2.0, 0.9)):
        assert value_pair(hidden, q, c) == pytest.approx(value_pair(erf, q, c), rel=1e-10)
        assert slope_pair(hidden, q, c) == pytest.approx(slope_pair(erf, q, c), rel=1e-10)


def test_a_given_sigma_w_is_the_one_that_is_used() -> None:
    sigma_w = critical_point("tanh", q_star=0.5).sigma_w
    free, given = (
        gradient_norm_law([60] * 5, "tanh", q=0.5),
        gradient_norm_law([60] * 5, "tanh", sigma_w=sigma_w, q=0.5),
    )
    assert given.mean == pytest.approx(free.mean, rel=1e-10)
    assert given.log_mean_field == pytest.approx(free.log_mean_field, abs=1e-10)
    smaller = gradient_norm_law([60] * 5, "tanh", sigma_w=0.9 * sigma_w, q=0.5)
    assert smaller.log_mean_field == pytest.approx(free.log_mean_field + 8 * np.log(0.9), rel=1e-9)


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_the_fisher_law_has_the_unit_of_the_activation_squared(unit: float) -> None:
    tanh = as_activation("tanh")
    scaled = fisher_law(Activation("scaled", lambda h: unit * tanh.value(h), lambda h: unit * tanh.derivative(h)))
    assert np.allclose(np.array(scaled.support()) / unit**2, fisher_law("tanh").support(), rtol=1e-8, atol=0.0)
    jump = Activation("jump", lambda h: unit * (h + np.sign(h)), lambda h: unit * np.ones_like(h), (0.0,))
    with pytest.raises(ValueError, match="jumps"):
        fisher_law(jump)
    assert ["outlier" in " ".join(fisher_spectrum(name).assumptions) for name in ("relu", "tanh")] == [True, False]
