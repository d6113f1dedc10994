"""The deep Jacobian law against matrices and networks that torch draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from tests.cases import NETWORKS
from torch_rmt.measures import PointMass
from torch_rmt.theory import (
    Architecture,
    Layer,
    as_activation,
    convolution_layer,
    jacobian_spectrum,
    mean_field,
    normalised_chi,
    residual_spectrum,
)
from torch_rmt.theory.moments import second_moment


def draw_weights(n_out: int, n_in: int, ensemble: str, generator: torch.Generator) -> torch.Tensor:
    weights = torch.empty(n_out, n_in, dtype=torch.float64)
    if ensemble == "orthogonal":
        torch.nn.init.orthogonal_(weights, gain=max(1.0, n_out / n_in) ** 0.5, generator=generator)
        return weights
    return weights.normal_(generator=generator) / n_in**0.5


def draw_network(architecture: Architecture, second_moment: float, generator: torch.Generator) -> np.ndarray:
    """Eigenvalues of J^T J of one network, the signal propagated by torch."""
    n = architecture.layers[0].n_in
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    x *= (second_moment / x.pow(2).mean()) ** 0.5
    jacobian = torch.eye(n, dtype=torch.float64)
    for layer in architecture.layers:
        weights = layer.sigma_w * draw_weights(layer.n_out, layer.n_in, str(layer.ensemble), generator)
        x = weights @ x + layer.sigma_b * torch.randn(layer.n_out, generator=generator, dtype=torch.float64)
        jacobian = weights @ jacobian
        if layer.activation is not None:
            slope = torch.from_numpy(layer.activation.derivative(x.numpy()))
            jacobian, x = slope[:, None] * jacobian, torch.from_numpy(layer.activation.value(x.numpy()))
    return padded(torch.linalg.svdvals(jacobian).numpy() ** 2, n)


def padded(values: np.ndarray, n: int) -> np.ndarray:
    return np.sort(np.concatenate([np.zeros(max(n - len(values), 0)), values]))


def kolmogorov(law, eigenvalues: np.ndarray, floor: float = 1e-24) -> float:
    """sup |F - F_n| on either side of each eigenvalue; those below the floor of float64 count as zero."""
    n = len(eigenvalues)
    tiny = floor * eigenvalues.max()
    worst = 0.0
    above = eigenvalues[eigenvalues > tiny]
    zeros = n - len(above)
    if zeros:
        worst = max(worst, abs(float(law.cdf(np.array(tiny))) - zeros / n))
    up, down = law.cdf(above * (1 + 1e-8)), law.cdf(above * (1 - 1e-8))
    right = np.searchsorted(above, above * (1 + 2e-8), side="right")
    left = np.searchsorted(above, above * (1 - 2e-8), side="left")
    worst = max(worst, np.abs(up - (zeros + right) / n).max(), np.abs(down - (zeros + left) / n).max())
    return float(worst)


def even_slopes(name: str, q: float, n: int) -> torch.Tensor:
    """phi' at the quantiles of h: the law of the slopes without its sampling noise."""
    h = ndtri((np.arange(n) + 0.5) / n) * q**0.5
    return torch.from_numpy(as_activation(name).derivative(h))


@pytest.mark.parametrize("ensemble", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_distance_to_drawn_matrices_falls_like_one_over_n(name: str, ensemble: str) -> None:
    q, depth = 0.6, 2
    distances = []
    # The slopes are set, not drawn from the signal: the common fluctuation of q (Hanin and Nica) would fall like
    # 1 / sqrt N and hide the law's own distance.
    for n, draws in ((500, 3), (2000, 1)):
        arch = Architecture.mlp(depth=depth, width=n, activation=name, sigma_w=1.2, ensemble=ensemble, q=q)
        law = jacobian_spectrum(arch).measure
        generator = torch.Generator().manual_seed(3)
        found = []
        for _ in range(draws):
            jacobian = torch.ones((), dtype=torch.float64)
            for layer in range(depth):
                order = torch.randperm(n, generator=generator)
                weights = draw_weights(n, n, ensemble, generator)
                below = weights @ jacobian if layer else weights
                jacobian = even_slopes(name, q, n)[order][:, None] * (1.2 * below)
            values = torch.linalg.eigvalsh(jacobian.T @ jacobian).clamp(min=0.0).numpy()
            found.append(kolmogorov(law, values, floor=1e-13))
        distances.append(np.mean(found))
    slope = np.log(distances[1] / distances[0]) / np.log(4.0)
    assert -1.35 < slope < -0.65
    assert distances[1] < 5.0 / 2000


@pytest.mark.parametrize("ensemble", ["gaussian", "orthogonal"])
@pytest.mark.parametrize(("name", "sigma_w", "sigma_b"), NETWORKS)
def test_drawn_networks(name: str | None, sigma_w: float, sigma_b: float, ensemble: str) -> None:
    """Whole networks: within the expected finite-size error on average, and nearer with width."""
    distances, expected = [], []
    for n, draws in ((64, 12), (256, 4)):
        arch = Architecture.mlp(
            depth=5, width=n, activation=name, sigma_w=sigma_w, sigma_b=sigma_b, ensemble=ensemble,
            input_second_moment=1.0,
        )  # fmt: skip
        prediction = jacobian_spectrum(arch)
        generator = torch.Generator().manual_seed(11)
        found = [kolmogorov(prediction.measure, draw_network(arch, 1.0, generator)) for _ in range(draws)]
        distances.append(np.mean(found))
        expected.append(prediction.finite_size_error)
    if name is None and ensemble == "orthogonal":
        assert max(distances) < 1e-9
        return
    assert distances[1] < 0.75 * distances[0]
    for found, stated in zip(distances, expected, strict=True):
        assert (0.3 if name == "leaky_relu" else 0.45) < found / stated < 2.2


SHAPES = [(5, 3, 4), (2, 5, 4), (3, 6, 2)]


@pytest.mark.parametrize("ensemble", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_unlike_layers(shape: tuple[int, ...], ensemble: str) -> None:
    """Rectangular, three activations, an identity start and a linear end."""
    a, b, c = shape
    distances = []
    for unit, draws in ((15, 6), (60, 3)):
        tanh, hard = as_activation("tanh"), as_activation("hard_tanh")
        body = (
            Layer(a * unit, b * unit, tanh, 1.3, 0.1, ensemble),
            Layer(b * unit, c * unit, hard, 1.1, 0.3, ensemble),
            Layer(c * unit, a * unit, None, 1.0, 0.0, ensemble),
        )
        arch = Architecture(body, input_second_moment=1.0)
        law = jacobian_spectrum(arch).measure
        generator = torch.Generator().manual_seed(5)
        found = [draw_network(arch, 1.0, generator) for _ in range(draws)]
        distances.append(np.mean([kolmogorov(law, values) for values in found]))
    assert distances[1] < 0.75 * distances[0]
    assert distances[1] < 0.06


def test_a_chain_that_starts_at_a_pre_activation() -> None:
    n, q = 300, 0.5
    tanh = as_activation("tanh")
    start = Layer(n, n, tanh, 1.0, ensemble=PointMass(1.0), q=q)
    law = jacobian_spectrum(Architecture((start, Layer(n, n, None, 1.0)))).measure
    generator = torch.Generator().manual_seed(0)
    jacobian = draw_weights(n, n, "gaussian", generator) * even_slopes("tanh", q, n)[None, :]
    assert kolmogorov(law, np.sort(torch.linalg.svdvals(jacobian).numpy() ** 2)) < 0.012


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("name", "sigma_w"), [("tanh", 1.0), ("relu", 1.4)])
def test_residual_networks(name: str, sigma_w: float, seed: int) -> None:
    """x + scale phi(W x + b) by torch: distance to the bulk, length map, mean (less the outlier of ReLU's mean)."""
    distances, scale, depth = [], 0.12, 50
    phi = {"tanh": torch.tanh, "relu": torch.relu}[name]
    for n in (75, 300):
        prediction = residual_spectrum(name, depth=depth, width=n, sigma_w=sigma_w, sigma_b=0.2, scale=scale)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, generator=generator, dtype=torch.float64)
        x /= x.pow(2).mean() ** 0.5
        jacobian = torch.eye(n, dtype=torch.float64)
        for _ in range(depth):
            weights = sigma_w * draw_weights(n, n, "gaussian", generator)
            bias = 0.2 * torch.randn(n, generator=generator, dtype=torch.float64)
            h = (weights @ x + bias).requires_grad_()
            y = phi(h)
            (slope,) = torch.autograd.grad(y.sum(), h)
            jacobian = jacobian + scale * slope[:, None] * (weights @ jacobian)
            x = x + scale * y.detach()
        values = np.sort(torch.linalg.svdvals(jacobian).numpy() ** 2)
        distances.append(kolmogorov(prediction.measure, values))
    assert float(sigma_w**2 * x.pow(2).mean() + 0.04) == pytest.approx(prediction.scalars["q_final"], rel=0.25)
    bulk = values[values <= prediction.scalars["largest_eigenvalue"] * 1.2]
    assert bulk.mean() == pytest.approx(prediction.scalars["mean"], rel=0.08)
    assert distances[1] < 0.025
    assert distances[1] < 0.7 * distances[0]


def test_few_residual_branches() -> None:
    """Mean, variance and the whole law hold for few large branches as for many small ones."""
    n, distances, phi = 400, [], as_activation("tanh")
    for depth in (3, 12):
        scale = (1.2 / depth) ** 0.5
        prediction = residual_spectrum("tanh", depth=depth, width=n, sigma_w=1.0, scale=scale)
        generator = torch.Generator().manual_seed(2)
        jacobian, v = torch.eye(n, dtype=torch.float64), 1.0
        for _ in range(depth):
            order = torch.randperm(n, generator=generator)
            slopes = scale * even_slopes("tanh", v, n)[order]
            jacobian = jacobian + slopes[:, None] * (draw_weights(n, n, "gaussian", generator) @ jacobian)
            v += scale**2 * second_moment(phi, v)
        values = np.sort(torch.linalg.svdvals(jacobian).numpy() ** 2)
        assert values.mean() == pytest.approx(prediction.scalars["mean"], rel=0.02)
        assert values.var() == pytest.approx(prediction.scalars["variance"], rel=0.06)
        distances.append(kolmogorov(prediction.measure, values))
    assert max(distances) < 5.0 / n


def test_circular_convolution() -> None:
    """A circular convolution with drawn taps, as the dense matrix that it is."""
    channels, positions, taps, q = 48, 12, 3, 0.5
    generator = torch.Generator().manual_seed(2)
    kernel = torch.randn(channels, channels, taps, generator=generator, dtype=torch.float64) / (channels * taps) ** 0.5
    dense = torch.zeros(channels, positions, channels, positions, dtype=torch.float64)
    for p in range(positions):
        for k in range(taps):
            dense[:, p, :, (p + k - 1) % positions] += kernel[:, :, k]
    n = channels * positions
    order = torch.randperm(n, generator=generator)
    jacobian = even_slopes("tanh", q, n)[order][:, None] * dense.reshape(n, n)
    arch = Architecture((convolution_layer(channels, channels, positions, "tanh", sigma_w=1.0, q=q),))
    distance = kolmogorov(jacobian_spectrum(arch).measure, np.sort(torch.linalg.svdvals(jacobian).numpy() ** 2))
    assert distance < 0.02


@pytest.mark.parametrize("ensemble", ["orthogonal", "gaussian"])
def test_convolutional_networks(ensemble: str) -> None:
    """Circular torch convolutions, delta-orthogonal or Gaussian, whole networks by autograd, at two sizes."""
    distances = []
    for channels, side, draws in ((6, 3, 6), (24, 4, 2)):
        layer = convolution_layer(
            channels, channels, side**2, "tanh", sigma_w=1.2, sigma_b=0.2, ensemble="orthogonal"
            if ensemble == "orthogonal" else "gaussian",
        )  # fmt: skip
        law = jacobian_spectrum(Architecture((layer,) * 3, input_second_moment=1.0)).measure
        generator = torch.Generator().manual_seed(9)
        found = []
        for _ in range(draws):
            modules: list[torch.nn.Module] = []
            for _ in range(3):
                conv = torch.nn.Conv2d(channels, channels, 3, padding=1, padding_mode="circular", dtype=torch.float64)
                with torch.no_grad():
                    if ensemble == "orthogonal":
                        conv.weight.zero_()
                        conv.weight[:, :, 1, 1] = 1.2 * draw_weights(channels, channels, ensemble, generator)
                    else:
                        conv.weight.normal_(std=1.2 / (9 * channels) ** 0.5, generator=generator)
                    conv.bias.normal_(std=0.2, generator=generator)  # type: ignore[union-attr]
                modules += [conv, torch.nn.Tanh()]
            x = torch.randn(1, channels, side, side, generator=generator, dtype=torch.float64)
            x = x / x.pow(2).mean() ** 0.5
            jacobian = torch.autograd.functional.jacobian(torch.nn.Sequential(*modules), x)
            n = channels * side**2
            found.append(kolmogorov(law, np.sort(torch.linalg.svdvals(jacobian.reshape(n, n)).numpy() ** 2)))
        distances.append(np.mean(found))
    # Freeness needs many channels; many positions alone only add copies.
    assert distances[1] < 0.6 * distances[0]
    assert distances[1] < 0.05


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_batch_norm_makes_gradients_explode(name: str) -> None:
    """chi from the growth of a gradient through drawn layers with batch norm, against E phi'^2 / Var phi."""
    n, batch, depth = 400, 400, 12
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(n, batch, generator=generator, dtype=torch.float64)
    values, tail = [], []
    for _ in range(depth):
        h = draw_weights(n, n, "gaussian", generator) @ x
        h = ((h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True, unbiased=False)).requires_grad_()
        x = torch.from_numpy(as_activation(name).value(h.detach().numpy()))
        values.append(h.detach())
        tail.append(x)
    # One layer, from the fixed point: back through W, batch norm, activation.
    phi = as_activation(name)
    ratios = []
    for h in values[-4:]:
        signal = torch.from_numpy(phi.value(h.numpy()))
        weights = draw_weights(n, n, "gaussian", generator)
        inner = signal.clone().requires_grad_()
        z = weights @ inner
        z = (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True, unbiased=False)
        up = torch.randn(n, batch, generator=generator, dtype=torch.float64)
        (gradient,) = torch.autograd.grad((z * up).sum(), inner)
        slope = torch.from_numpy(phi.derivative(h.numpy()))
        ratios.append(float((gradient * slope).pow(2).mean() / up.pow(2).mean()))
    assert np.mean(ratios) == pytest.approx(normalised_chi(name, "batch"), rel=0.06)
    assert normalised_chi(name, "batch") > 1


def test_layer_norm_chi() -> None:
    n = 3000
    generator = torch.Generator().manual_seed(0)
    phi = as_activation("tanh")
    h = torch.randn(n, generator=generator, dtype=torch.float64)
    h = (h - h.mean()) / h.std(unbiased=False)
    inner = torch.from_numpy(phi.value(h.numpy())).requires_grad_()
    z = 1.3 * draw_weights(n, n, "gaussian", generator) @ inner + 0.4 * torch.randn(
        n, generator=generator, dtype=torch.float64
    )
    z = torch.nn.functional.layer_norm(z, (n,))
    up = torch.randn(n, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(z @ up, inner)
    back = gradient * torch.from_numpy(phi.derivative(h.numpy()))
    found = float(back.pow(2).sum() / up.pow(2).sum())
    assert found == pytest.approx(normalised_chi("tanh", "layer", sigma_w=1.3, sigma_b=0.4), rel=0.08)


def test_dropout_noise() -> None:
    """Two masks of one input decorrelate to c* < 1; q and the backward ratio as stated."""
    n, keep, sigma_w, sigma_b = 2000, 0.8, 1.1, 0.2
    field = mean_field("tanh", sigma_w, sigma_b, dropout=1 - keep)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(n, 1, generator=generator, dtype=torch.float64).repeat(1, 2)
    for _ in range(25):
        mask = (torch.rand(n, 2, generator=generator) < keep).double() / keep
        bias = sigma_b * torch.randn(n, 1, generator=generator, dtype=torch.float64)
        h = sigma_w * draw_weights(n, n, "gaussian", generator) @ (mask * torch.tanh(h)) + bias
    gram = (h.T @ h / n).numpy()
    assert gram[0, 0] == pytest.approx(field.q_star, rel=0.1)
    assert gram[0, 1] / np.sqrt(gram[0, 0] * gram[1, 1]) == pytest.approx(field.c_star, abs=0.1)
    slope = (1 - torch.tanh(h[:, 0]) ** 2) / keep
    live = torch.rand(n, generator=generator) < keep
    assert float(sigma_w**2 * (slope**2 * live).mean()) == pytest.approx(field.chi, rel=0.1)


NORMED = [
    ("relu", "gaussian", 0.0, "rms"), ("tanh", "orthogonal", 0.0, "layer"), ("tanh", "gaussian", 0.3, None),
    ("relu", "orthogonal", 0.2, None), ("gelu", "gaussian", 0.1, "layer"), ("linear", "orthogonal", 0.4, None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "ensemble", "dropout", "norm"), NORMED)
def test_dropout_and_normalisation_over_units(name: str, ensemble: str, dropout: float, norm: str | None) -> None:
    """Torch modules with their own autograd Jacobian against the law, at two widths; the rank one falls with 1 / n."""
    functions = {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh, "gelu": torch.nn.GELU, "linear": torch.nn.Identity}
    distances, means, sigma_w = [], [], 1.2 if norm is None else 2.0
    for n, draws in ((40, 4), (160, 2)):
        arch = Architecture.mlp(
            depth=3, width=n, activation=name, sigma_w=sigma_w, sigma_b=0.3, ensemble=ensemble, input_second_moment=1.0,
            dropout=dropout, normalisation=norm,
        )  # fmt: skip
        prediction = jacobian_spectrum(arch)
        found = []
        torch.manual_seed(7)
        for _ in range(draws):
            modules: list[torch.nn.Module] = []
            for _ in range(3):
                linear = torch.nn.Linear(n, n, dtype=torch.float64)
                with torch.no_grad():
                    linear.weight.copy_(sigma_w * draw_weights(n, n, ensemble, torch.default_generator))
                    linear.bias.normal_(std=0.3)
                norms = {"layer": [torch.nn.LayerNorm(n)], "rms": [torch.nn.RMSNorm(n)], None: []}[norm]
                modules += [linear, *norms, functions[name](), torch.nn.Dropout(dropout)]
            network = torch.nn.Sequential(*modules).double()
            x = torch.randn(n, dtype=torch.float64)
            x = x / x.pow(2).mean() ** 0.5
            jacobian = torch.autograd.functional.jacobian(network, x)
            found.append(np.sort(torch.linalg.svdvals(jacobian).numpy() ** 2))
        distances.append(np.mean([kolmogorov(prediction.measure, values, floor=1e-14) for values in found]))
        means.append(np.mean(found) / prediction.scalars["mean"])
        assert prediction.finite_size_error is None
        if dropout > 0:
            place, mass = prediction.measure.atoms()[0]
            assert place == 0.0
            assert mass >= dropout - 1e-12
    # Drawn masks and slopes scatter like 1 / sqrt n, the eigenvalues like 1 / n.
    assert -1.5 < np.log(distances[1] / distances[0]) / np.log(4.0) < -0.3
    assert distances[1] < 0.07
    assert means[1] == pytest.approx(1.0, abs=0.2)


def test_batch_norm_spectrum() -> None:
    """Whole torch networks with BatchNorm1d in train mode: the Jacobian of one sample with respect to its own input."""
    distances = []
    for n, draws in ((40, 8), (160, 2)):
        arch = Architecture.mlp(
            depth=3,
            width=n,
            activation="relu",
            sigma_w=0.7,
            sigma_b=0.5,
            input_second_moment=1.0,
            normalisation="batch",
        )
        law = jacobian_spectrum(arch).measure
        torch.manual_seed(3)
        found = []
        for _ in range(draws):
            modules: list[torch.nn.Module] = []
            for _ in range(3):
                linear = torch.nn.Linear(n, n)
                torch.nn.init.normal_(linear.weight, std=0.7 / n**0.5)
                torch.nn.init.normal_(linear.bias, std=0.5)
                modules += [linear, torch.nn.BatchNorm1d(n), torch.nn.ReLU()]
            network = torch.nn.Sequential(*modules).double()
            others = torch.randn(8 * n, n, dtype=torch.float64)

            def one(x: torch.Tensor) -> torch.Tensor:
                return network(torch.cat([x[None], others]))[0]  # noqa: B023

            jacobian = torch.autograd.functional.jacobian(one, torch.randn(n, dtype=torch.float64))
            found.append(kolmogorov(law, np.sort(torch.linalg.svdvals(jacobian).numpy() ** 2), floor=1e-14))
        distances.append(np.mean(found))
    assert distances[1] < 0.6 * distances[0]
    assert distances[1] < 0.08


def test_norm_after_an_activation() -> None:
    """LayerNorm and RMSNorm behind ReLU differ by the mean that one takes off."""
    n = 4000
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(n, generator=generator, dtype=torch.float64)
    for norm, module in (("layer", torch.nn.LayerNorm(n)), ("rms", torch.nn.RMSNorm(n))):
        body = (
            Layer(n, n, as_activation("relu"), 1.0, ensemble=PointMass(1.0), q=1.0),
            Layer(n, n, None, 1.0, ensemble=PointMass(1.0), normalisation=norm),
        )
        law = jacobian_spectrum(Architecture(body)).measure
        x = torch.relu(h).requires_grad_()
        probe = torch.randn(n, generator=generator, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(module.double()(x) @ probe, x)
        # mean of J J^T over the kept half of the units
        measured = float((gradient * (h > 0)).pow(2).sum() / probe.pow(2).sum())
        assert law.mean == pytest.approx(measured, rel=0.06)
