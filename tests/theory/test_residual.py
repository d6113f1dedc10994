"""Residual networks: the law of blocks against free sums, closed forms, limits and networks that torch draws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from torch_rmt.measures import Discrete, PointMass, Semicircle, free_add
from torch_rmt.theory import Architecture, Layer, Residual, as_activation, jacobian_spectrum, residual_spectrum
from torch_rmt.theory import like_blocks as like_blocks_module
from torch_rmt.theory.isometry import slope_variance, smooth_limit
from torch_rmt.theory.moments import mean_value, second_moment, slope_moment
from torch_rmt.theory.propagation import propagate

RELU, TANH, GELU = as_activation("relu"), as_activation("tanh"), as_activation("gelu")


def norm(n: int) -> Layer:
    return Layer(n, n, None, 1.0, ensemble=PointMass(1.0), normalisation="rms")


def pre_norm(n: int, phi, scale: float, ensemble: str = "gaussian", hidden: int = 1) -> Residual:
    m = hidden * n
    return Residual((norm(n), Layer(n, m, phi, 1.0, ensemble=ensemble), Layer(m, n, None, scale, ensemble=ensemble)))


def draw(architecture: Architecture, generator: torch.Generator) -> tuple[np.ndarray, float]:
    """Eigenvalues of J^T J of one network and the last signal's mean square, from an input of mean square one."""

    def run(layers, x: torch.Tensor, jacobian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in layers:
            if isinstance(layer, Residual):
                branch, beside = run(layer.branch, x, jacobian), run(layer.shortcut, x, jacobian)
                x, jacobian = branch[0] + beside[0], branch[1] + beside[1]
            elif not isinstance(layer.ensemble, PointMass):
                weights = torch.empty(layer.n_out, layer.n_in, dtype=torch.float64)
                if layer.ensemble == "orthogonal":
                    torch.nn.init.orthogonal_(weights, generator=generator)
                    weights *= max(1.0, layer.n_out / layer.n_in) ** 0.5
                else:
                    weights.normal_(generator=generator).div_(layer.n_in**0.5)
                weights *= layer.sigma_w
                x, jacobian = weights @ x, weights @ jacobian
            if layer.normalisation is not None:
                root = x.pow(2).mean() ** 0.5
                x, jacobian = x / root, jacobian / root
            if layer.activation is not None:
                slope = torch.from_numpy(layer.activation.derivative(x.numpy()))
                x, jacobian = torch.from_numpy(layer.activation.value(x.numpy())), slope[:, None] * jacobian
        return x, jacobian

    n = architecture.layers[0].n_in
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    x, jacobian = run(architecture.layers, x / x.pow(2).mean() ** 0.5, torch.eye(n, dtype=torch.float64))
    return np.sort(torch.linalg.svdvals(jacobian).numpy() ** 2), float(x.pow(2).mean())


def kolmogorov(law, values: np.ndarray) -> float:
    """sup |F - F_n|; values that agree to 1e-8 are one."""
    n, up, down = len(values), values * (1 + 1e-8), values * (1 - 1e-8)
    right, left = np.searchsorted(values, up * (1 + 1e-9), "right"), np.searchsorted(values, down * (1 - 1e-9), "left")
    return float(max(np.abs(law.cdf(up) - right / n).max(), np.abs(law.cdf(down) - left / n).max()))


def linear(sigma: float, ensemble: str = "gaussian", depth: int = 1) -> Architecture:
    return Architecture((Residual((Layer(50, 50, None, sigma, ensemble=ensemble),)),) * depth, 1.0)


@pytest.mark.parametrize("sigma", [0.3, 0.9, 1.0, 2.0])
def test_a_linear_block_is_a_free_sum(sigma: float) -> None:
    """The symmetrised singular law of a Gaussian matrix is a semicircle: (delta_-1 + delta_1)/2 + semicircle."""
    law = jacobian_spectrum(linear(sigma)).measure
    whole = free_add(Discrete([-1.0, 1.0]), Semicircle(sigma**2))
    low, high = whole.bounds()[1] * 1e-3, whole.bounds()[1]
    x = np.linspace(low, high, 60)
    np.testing.assert_allclose(law.cdf(x**2), 2 * whole.cdf(x) - 1, atol=1e-7)
    assert law.bounds()[1] == pytest.approx(high**2, rel=1e-9)
    edge = whole.support()[-1][0]
    assert law.bounds()[0] == pytest.approx(max(edge, 0.0) ** 2, rel=1e-7, abs=1e-9)
    for k in (1, 2, 3, 4):
        assert law.moment(k) == pytest.approx(whole.moment(2 * k), rel=1e-9)


@pytest.mark.parametrize("sigma", [0.4, 3.0])
def test_a_haar_block_is_the_arcsine_law(sigma: float) -> None:
    """|1 + sigma U|^2 = 1 + sigma^2 + 2 sigma cos(angle), the angle uniform."""
    law = jacobian_spectrum(linear(sigma, "orthogonal")).measure
    angle = np.linspace(0.02, np.pi - 0.02, 40)
    np.testing.assert_allclose(law.cdf(1 + sigma**2 + 2 * sigma * np.cos(angle)), 1 - angle / np.pi, atol=1e-9)
    assert law.bounds() == pytest.approx(((1 - sigma) ** 2, (1 + sigma) ** 2), rel=1e-6)


@pytest.mark.parametrize("depth", [1, 5])
@pytest.mark.parametrize("name", ["tanh", "relu", "gelu"])
def test_mean_and_variance(name: str, depth: int) -> None:
    """Relative variances of free factors add up; of one block it is (2 c + r c^2) / (1 + c)^2."""
    prediction = residual_spectrum(name, depth=depth, width=100, sigma_w=1.3, sigma_b=0.1, scale=0.8)
    shares, total = [], 0.0
    phi, v, m = as_activation(name), 1.0, 0.0
    for _ in range(depth):
        q = 1.69 * v + 0.01
        c = 0.64 * 1.69 * slope_moment(phi, q)
        shares.append(c)
        total += (2 * c + (1 + slope_variance(phi, q)) * c**2) / (1 + c) ** 2
        v, m = v + 1.6 * m * mean_value(phi, q) + 0.64 * second_moment(phi, q), m + 0.8 * mean_value(phi, q)
    mean = np.prod([1 + c for c in shares])
    assert prediction.measure.moment(1) == pytest.approx(mean, rel=1e-6)
    assert prediction.scalars["variance"] == pytest.approx(mean**2 * total, rel=1e-5)
    assert prediction.scalars["q_final"] == pytest.approx(1.69 * v + 0.01, rel=1e-10)
    # The quantiles' own moments: nothing of the above is put into them.
    nodes, weights = np.polynomial.legendre.leggauss(200)
    x = prediction.measure.quantile((1 + np.sin(np.pi / 2 * nodes)) / 2)
    weights = weights * np.pi / 4 * np.cos(np.pi / 2 * nodes)
    assert weights @ x == pytest.approx(mean, rel=1e-3)
    assert weights @ x**2 - mean**2 == pytest.approx(mean**2 * total, rel=5e-3)


def test_many_small_branches() -> None:
    """The law tends to the free multiplicative Gaussian, the distance like one over the depth."""
    distances = []
    for depth in (8, 32):
        law = residual_spectrum("tanh", depth=depth, width=100, sigma_w=1.0, scale=(0.8 / depth) ** 0.5)
        c = law.scalars["cumulated_branch"]
        limit = smooth_limit(2 * c, c)
        x = np.linspace(*limit.bounds(), 200)[1:-1]
        distances.append(np.abs(law.measure.cdf(x) - limit.cdf(x)).max())
        low, high = law.measure.bounds()  # the edges are where the mass begins and ends
        np.testing.assert_allclose(law.measure.cdf([low * 1.001, high * 0.999]), [0.0, 1.0], atol=1e-4)
    assert distances[1] < 0.02
    assert distances[1] / distances[0] == pytest.approx(0.25, abs=0.06)


NETWORKS: dict[str, Callable[[int], tuple]] = {
    "pre-norm relu": lambda n: (pre_norm(n, RELU, 1.0),) * 6,
    "pre-norm gelu, wide": lambda n: (pre_norm(n, GELU, 0.8, hidden=2),) * 3,
    "no norm, tanh": lambda n: (Residual((Layer(n, n, TANH, 1.5), Layer(n, n, None, 1.2))),) * 5,
    "between layers": lambda n: (
        Layer(n, n, TANH, 1.2), *(pre_norm(n, TANH, 0.7),) * 3, norm(n), Layer(n, n, None, 1.0),
    ),
    "orthogonal": lambda n: (pre_norm(n, TANH, 0.9, "orthogonal"),) * 2,
    "post-norm": lambda n: (Residual((Layer(n, n, TANH, 1.0), Layer(n, n, None, 0.9)), normalisation="rms"),) * 4,
    "gaussian shortcut": lambda n: (
        Residual((Layer(n, n, TANH, 1.2), Layer(n, n, None, 1.0)), (Layer(n, n, None, 0.7),), activation=TANH),
    ) * 3,
    "haar shortcut": lambda n: (
        Residual((Layer(n, n, TANH, 1.2), Layer(n, n, None, 1.0)), (Layer(n, n, None, 0.7, ensemble="orthogonal"),)),
    ) * 3,
    "nested": lambda n: (
        Residual((Residual((Layer(n, n, TANH, 1.0), Layer(n, n, None, 0.8))), Layer(n, n, None, 0.7))),
    ) * 2,
    "activation last": lambda n: (Residual((Layer(n, n, RELU, 1.4),)), Residual((Layer(n, n, RELU, 1.4),))),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_drawn_networks(name: str) -> None:
    """Whole networks at three widths: the distance falls, and the stated error is what is found."""
    prediction = jacobian_spectrum(Architecture(NETWORKS[name](96), 1.0))
    generator, distances = torch.Generator().manual_seed(3), []
    for n, draws in ((32, 12), (96, 6), (288, 2)):
        architecture = Architecture(NETWORKS[name](n), 1.0)
        drawn = [draw(architecture, generator)[0] for _ in range(draws)]
        distances.append(np.mean([kolmogorov(prediction.measure, values) for values in drawn]))
    assert distances[1] < 0.7 * distances[0]
    assert distances[2] < 0.7 * distances[1]
    assert distances[2] < 0.45 * distances[0]
    assert prediction.finite_size_error is not None
    assert 0.6 < distances[1] / prediction.finite_size_error < 1.9


def test_the_signal_through_blocks() -> None:
    """v through a block whose branch has a mean (cross terms), and through one in front of a normalisation."""
    n = 3000
    layers = (Residual((Layer(n, n, RELU, 1.0),)),) * 3 + (pre_norm(n, GELU, 1.5),) * 2
    architecture = Architecture(layers, 1.0)
    generator, found = torch.Generator().manual_seed(0), []
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    for index in range(5):
        weights = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
        if index < 3:
            x = x + torch.relu(weights @ x)
        else:
            other = 1.5 * torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
            x = x + other @ torch.nn.functional.gelu(weights @ (x / x.pow(2).mean() ** 0.5))
        found.append(float(x.pow(2).mean()))
    np.testing.assert_allclose([signal.q for signal in propagate(architecture)], found, rtol=0.08)


def test_directions_that_no_branch_touches() -> None:
    """A branch of rank r leaves 1 - 2r of the singular values of 1 + A at one; blocks meet in general position."""
    n = 80
    block = Residual((Layer(n, n // 8, None, 1.0), Layer(n // 8, n, None, 1.0)))
    law = jacobian_spectrum(Architecture((block,) * 2, 1.0)).measure
    assert law.atoms() == (pytest.approx((1.0, 0.5)),)
    values, _ = draw(Architecture((block,) * 2, 1.0), torch.Generator().manual_seed(1))
    assert np.mean(np.abs(values - 1) < 1e-9) == pytest.approx(0.5)
    assert law.cdf(law.bounds()[1]) == pytest.approx(1.0)


def test_like_blocks_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The few representative blocks give the law of all blocks one by one."""
    architecture = Architecture((pre_norm(40, RELU, 0.9),) * 10, 1.0)
    few = jacobian_spectrum(architecture).measure
    monkeypatch.setattr(like_blocks_module, "_SMOOTH", -1.0)
    every = jacobian_spectrum(architecture).measure
    assert len(few.solver.kinds) < len(every.solver.kinds) == 10
    x = np.linspace(*every.bounds(), 100)[1:-1]
    np.testing.assert_allclose(few.cdf(x), every.cdf(x), atol=1e-6)


def test_slopes_that_persist_are_said() -> None:
    """x + W phi(x / |x|): the mean is right, the variance is larger, and the stated error covers the distance."""
    n = 300
    first = Layer(n, n, RELU, 1.0, ensemble=PointMass(1.0), normalisation="rms")
    block = Residual((first, Layer(n, n, None, 1.0)))
    prediction = jacobian_spectrum(Architecture((block,) * 8, 1.0))
    assert any("hardly change from block to block" in line for line in prediction.assumptions)
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(Architecture((block,) * 8, 1.0), generator)[0] for _ in range(4)]
    assert np.mean(drawn) == pytest.approx(prediction.scalars["mean"], rel=0.05)
    assert np.mean([values.var() for values in drawn]) > 1.05 * prediction.scalars["variance"]
    distance = np.mean([kolmogorov(prediction.measure, values) for values in drawn])
    assert 0.02 < distance < 2 * prediction.finite_size_error


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((Residual((Layer(9, 9, TANH, 1.0, ensemble=PointMass(1.0)),)),), "no random weights"),
        ((Residual((Layer(9, 6, TANH, 1.0),), (Layer(9, 6, TANH, 1.0),)),), "one linear layer"),
        ((Residual((Layer(9, 9, TANH, 1.0), Layer(9, 9, None, 1.0)), activation=RELU),) * 2, "act on the same units"),
        ((Residual((Layer(9, 9, None, 1.0),), (Layer(9, 9, RELU, 1.0),)),), "one linear layer"),
    ],
    ids=["no weights", "rectangular", "post-activation", "shortcut with activation"],
)
def test_what_has_no_law_is_refused(layers: tuple[Residual, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        jacobian_spectrum(Architecture(layers, 1.0))


def test_blocks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="does not add up"):
        Residual((Layer(8, 6, None, 1.0),))
    with pytest.raises(ValueError, match="needs a branch"):
        Residual(())
    with pytest.raises(ValueError, match="input_second_moment"):
        jacobian_spectrum(Architecture((pre_norm(8, TANH, 1.0),)))


@pytest.mark.parametrize("seed", [0, 1])
def test_unlike_pre_activation_blocks_with_a_long_lower_tail(seed: int) -> None:
    """Below e^-26, where less than 1e-4 of the mass is left, the continuation stalls: no reason to have no law."""
    n, relu = 400, as_activation("relu")
    sizes = ((7.15, 1.8, 0.521), (4.42, 1.72, 0.528), (2.9, 1.67, 0.541), (2.21, 1.57, 0.528))
    blocks = tuple(
        Residual(
            (
                Layer(n, n, relu, 1.0, ensemble=PointMass(s), q=0.838),
                Layer(n, n, relu, inner, q=0.838),
                Layer(n, n, None, outer),
            )
        )
        for s, inner, outer in sizes
    )
    law = jacobian_spectrum(Architecture(blocks, input_second_moment=0.2)).measure
    generator = torch.Generator().manual_seed(seed)

    def gaussian(sigma: float) -> torch.Tensor:
        return sigma / n**0.5 * torch.randn(n, n, generator=generator, dtype=torch.float64)

    def open_units() -> torch.Tensor:
        return torch.randint(0, 2, (n,), generator=generator).double()

    jacobian = torch.eye(n, dtype=torch.float64)
    for s, inner, outer in sizes:
        branch = gaussian(outer) @ (open_units()[:, None] * gaussian(inner)) * (open_units() * s**0.5)
        jacobian = jacobian + branch @ jacobian
    values = np.sort(torch.linalg.svdvals(jacobian).numpy() ** 2)
    below = law.cdf(values)
    assert np.abs(below - (np.arange(n) + 0.5) / n).max() < 0.03  # the numbers of open units are binomial
    assert law.cdf(law.bounds()[1]) == pytest.approx(1.0, abs=1e-9)
