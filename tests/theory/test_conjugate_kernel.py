"""Deep kernels: limits that are known laws, moments by hand, and the reduction of one layer to the Gram law."""

from __future__ import annotations

import numpy as np
import pytest

from torch_rmt.measures import Discrete, FussCatalan, MarchenkoPastur, free_mul
from torch_rmt.theory import (
    KernelLayer,
    LayeredKernelLaw,
    conjugate_kernel_spectrum,
    gram_spectrum,
    neural_tangent_spectrum,
)


def test_one_layer_is_the_gram_law_seen_from_the_samples() -> None:
    kernel = conjugate_kernel_spectrum("tanh", widths=(150, 100), n_samples=80, sigma_w=1.4)[0].measure
    gram = gram_spectrum("tanh", n_in=150, n_out=100, n_samples=80, sigma_w=1.4).measure
    z = np.array([0.3 + 0.1j, 1.0 + 0.5j, -0.2 + 0.05j])
    # K = X^T X/n_1 and M = X X^T/m share what is not zero, up to the factor m/n_1
    factor = 80 / 100
    both = 100 / 80 * (gram.stieltjes(z / factor) / factor) + (1.0 - 100 / 80) / z
    np.testing.assert_allclose(kernel.stieltjes(z), both, rtol=1e-9)
    np.testing.assert_allclose(kernel.support()[0], np.array(gram.support()[0]) * factor, rtol=1e-6)


def test_linear_layers_are_fuss_catalan() -> None:
    law = conjugate_kernel_spectrum("linear", widths=(60, 60, 60, 60), n_samples=60)[-1].measure
    z = np.array([0.5 + 0.4j, 3.0 + 0.5j, 8.0 + 0.2j])
    np.testing.assert_allclose(law.stieltjes(z), FussCatalan(4).stieltjes(z), rtol=1e-7)


def test_free_product_and_data_of_any_law() -> None:
    data = Discrete(np.array([0.5, 1.0, 2.0]), np.array([0.3, 0.5, 0.2]))
    law = LayeredKernelLaw(
        input_law=data, layers=(KernelLayer(ratio=0.5, constant=0.0, linear=1.0),), weights=(0.0, 1.0)
    )
    other = free_mul(data, MarchenkoPastur(0.5))
    z = np.array([0.5 + 0.4j, 2.0 + 0.5j])
    np.testing.assert_allclose(law.stieltjes(z), other.stieltjes(z), rtol=1e-8)


def test_moments_of_a_sum_by_hand() -> None:
    # K = r + a K_0 + b X^T X with X of covariance c + d K_0: first two moments, K_0 of law MP
    ratio, r, a, b, c, d = 0.7, 0.3, 0.5, 1.5, 0.4, 0.6
    base = MarchenkoPastur(0.8)
    law = LayeredKernelLaw(
        input_law=base, layers=(KernelLayer(ratio=ratio, constant=c, linear=d),), weights=(a, b), shift=r
    )
    m1, m2 = base.moment(1), base.moment(2)
    s1, s2 = c + d * m1, c * c + 2 * c * d * m1 + d * d * m2
    cross = c * m1 + d * m2
    second = r * r + a * a * m2 + b * b * (s2 + ratio * s1**2) + 2 * r * a * m1 + 2 * r * b * s1 + 2 * a * b * cross
    assert law.moment(1) == pytest.approx(r + a * m1 + b * s1, rel=1e-9)
    assert law.moment(2) == pytest.approx(second, rel=1e-9)


def test_tangent_kernel_lies_above_its_shift_and_scales_with_width() -> None:
    small = neural_tangent_spectrum("tanh", widths=(60, 90, 60), n_samples=40)
    large = neural_tangent_spectrum("tanh", widths=(120, 180, 120), n_samples=80)
    assert large.scalars["mean"] == pytest.approx(2.0 * small.scalars["mean"])
    assert large.scalars["largest_eigenvalue"] == pytest.approx(2.0 * small.scalars["largest_eigenvalue"], rel=1e-6)
    assert small.scalars["smallest_eigenvalue"] > small.scalars["shift"]


def test_an_inner_gap_is_found() -> None:
    law = neural_tangent_spectrum("tanh", widths=(100, 400, 400), n_samples=300, sigma_w=2.0).measure
    assert len(law.support()) == 2
    (_, end), (start, _) = law.support()
    x = np.array([end - 1.0, 0.5 * (end + start), start + 1.0])
    density = law.density(x)
    assert density[0] > 0.0
    assert density[1] == 0.0
    assert density[2] > 0.0
    # the upper band holds one direction an input dimension
    assert float(law.cdf(x[1:2])[0]) == pytest.approx(1.0 - 100 / 300, abs=1e-9)


@pytest.mark.parametrize(
    "bad", [{"widths": (10,)}, {"widths": (10, 0)}, {"n_samples": 0}, {"sigma_w": -1.0}, {"sigma_x": 0.0}]
)
def test_bad_sizes(bad: dict[str, object]) -> None:
    settings = {"widths": (10, 10), "n_samples": 10} | bad
    with pytest.raises(ValueError, match=next(iter(bad))):
        conjugate_kernel_spectrum("tanh", **settings)


def test_biases_are_refused_with_advice() -> None:
    for predict in (conjugate_kernel_spectrum, neural_tangent_spectrum):
        with pytest.raises(ValueError, match="gram_spectrum"):
            predict("tanh", widths=(10, 10), n_samples=10, sigma_b=0.1)


def test_layers_of_an_even_activation_forget_what_came_before() -> None:
    """No linear part: every layer is Marchenko-Pastur of its own, and the tangent kernel one more, shifted."""
    widths, n = (120, 180, 120, 240), 60
    for layer, prediction in enumerate(conjugate_kernel_spectrum("abs", widths=widths, n_samples=n), start=1):
        expected = MarchenkoPastur(n / widths[layer], prediction.scalars["eta"])
        x = np.linspace(*expected.bounds(), 41)
        np.testing.assert_allclose(prediction.measure.bounds(), expected.bounds(), rtol=1e-6)
        np.testing.assert_allclose(prediction.measure.cdf(x), expected.cdf(x), atol=1e-6)
    tangent = neural_tangent_spectrum("abs", widths=widths, n_samples=n)
    shift = tangent.scalars["shift"]
    top = MarchenkoPastur(n / widths[-1], widths[-1] * prediction.scalars["eta"])
    np.testing.assert_allclose(tangent.measure.bounds(), np.add(top.bounds(), shift), rtol=1e-6)
    assert tangent.measure.mean == pytest.approx(shift + top.mean, rel=1e-12)
