"""What is only an expansion or a derivative, checked by its order: gradient norms, length maps, extreme eigenvalues."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2

from torch_rmt.theory.activation import as_activation
from torch_rmt.theory.edges import LargestEigenvalue, TracyWidom
from torch_rmt.theory.gradient_norm import GradientNormLaw
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
