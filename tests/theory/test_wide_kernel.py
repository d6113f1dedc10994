"""The tangent kernel of wide networks: pair maps, limits, and networks drawn by torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from torch_rmt.theory import Architecture, Layer, Residual, as_activation, kernel_noise, wide_kernel
from torch_rmt.theory.correlation import slope_pair, value_pair
from torch_rmt.theory.pair_maps import kernel_slopes, kernel_values

MODULES: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}


def covariance(seed: int, n: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, 8)) * rng.uniform(0.4, 1.6, (n, 1))
    z[1] = 1.2 * z[0] + 0.05 * z[1]
    return z @ z.T / 8


@pytest.mark.parametrize("seed", [0, 1])
def test_pairs_of_unequal_variances_have_their_closed_forms(seed: int) -> None:
    s = covariance(seed)
    q = np.sqrt(np.outer(np.diag(s), np.diag(s)))
    c = np.clip(s / q, -1, 1)
    angle = np.arccos(c)
    arc = q * (np.sin(angle) + (np.pi - angle) * c) / (2 * np.pi)  # Cho and Saul 2009
    np.testing.assert_allclose(kernel_values(as_activation("relu"), s) / q, arc / q, atol=1e-5)
    np.testing.assert_allclose(kernel_slopes(as_activation("relu"), s), (np.pi - angle) / (2 * np.pi), atol=1e-3)
    own = 1 + 2 * np.diag(s)
    erf = 2 / np.pi * np.arcsin(2 * s / np.sqrt(np.outer(own, own)))  # Williams 1997
    np.testing.assert_allclose(kernel_values(as_activation("erf"), s), erf, atol=3e-7)
    sine = np.exp(-0.5 * (np.diag(s)[:, None] + np.diag(s)[None])) * np.sinh(s)
    np.testing.assert_allclose(kernel_values(as_activation("sine"), s), sine, atol=3e-6)


@pytest.mark.parametrize("name", ["tanh", "gelu", "silu", "hard_tanh", "leaky_relu"])
def test_equal_variances_are_the_correlation_map(name: str) -> None:
    phi = as_activation(name)
    for q, c in ((0.5, 0.1), (1.3, 0.6), (1.3, 0.97)):
        s = q * np.array([[1.0, c], [c, 1.0]])
        assert kernel_values(phi, s)[0, 1] == pytest.approx(value_pair(phi, q, c), rel=1e-5)
        assert kernel_slopes(phi, s)[0, 1] == pytest.approx(slope_pair(phi, q, c), rel=2e-3 if phi.kinks else 1e-6)


@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_the_slopes_are_the_derivative_by_the_covariance(name: str) -> None:
    """Price's theorem: d E phi(u) phi(v) / d cov(u, v) = E phi'(u) phi'(v)."""
    phi, s, h = as_activation(name), covariance(2), 1e-4
    up, down = s.copy(), s.copy()
    for i, j in ((0, 2), (3, 4)):
        up[[i, j], [j, i]] += h
        down[[i, j], [j, i]] -= h
    numeric = (kernel_values(phi, up) - kernel_values(phi, down)) / (2 * h)
    exact = kernel_slopes(phi, s)
    for i, j in ((0, 2), (3, 4)):
        assert numeric[i, j] == pytest.approx(exact[i, j], abs=1e-5)


def test_a_linear_network_has_the_sum_of_its_layers() -> None:
    """Theta = K_0 sum_l n_(l-1) prod_(k != l) sigma_k^2, and 1 + sigma_2^2 + ... for biases."""
    gram = covariance(3)
    layers = (Layer(8, 20, None, 1.5), Layer(20, 30, None, 0.7), Layer(30, 2, None, 1.1))
    kernel = wide_kernel(Architecture(layers), gram)
    a, b, c = 1.5**2, 0.7**2, 1.1**2
    np.testing.assert_allclose(kernel.signal, a * b * c * gram, rtol=1e-12)
    np.testing.assert_allclose(
        kernel.tangent, gram * (8 * b * c + 20 * a * c + 30 * a * b) + (1 + c + b * c), rtol=1e-12
    )
    without = wide_kernel(Architecture(layers), gram, biases=[False, True, False])
    np.testing.assert_allclose(kernel.tangent - without.tangent, 1 + b * c, rtol=1e-9)


def drawn(name: str, width: int, sigma_w: float, sigma_b: float, seed: int, orthogonal: bool) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(8, width), MODULES[name](), nn.Linear(width, width), MODULES[name](), nn.Linear(width, 3)
    ).double()
    for module in net:
        if isinstance(module, nn.Linear):
            if orthogonal and module.in_features == module.out_features:
                nn.init.orthogonal_(module.weight, sigma_w, generator=generator)
            else:
                nn.init.normal_(module.weight, 0.0, sigma_w / module.in_features**0.5, generator=generator)
            nn.init.normal_(module.bias, 0.0, sigma_b, generator=generator)
    return net


@pytest.mark.parametrize(("name", "orthogonal"), [("tanh", False), ("relu", False), ("gelu", True)])
def test_drawn_networks_tend_to_it_as_one_over_the_root_of_the_width(name: str, orthogonal: bool) -> None:
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.standard_normal((6, 8)) * np.linspace(0.6, 1.4, 6)[:, None])
    gram = (x @ x.T / 8).numpy()
    errors, means = [], []
    for width in (32, 128, 512):
        chain = Architecture.mlp(
            depth=2, width=width, activation=name, sigma_w=1.3, sigma_b=0.2, n_in=8, n_out=3,
            ensemble="orthogonal" if orthogonal else "gaussian",
        )  # fmt: skip
        predicted = wide_kernel(chain, gram)
        scale = np.linalg.norm(predicted.tangent)
        kernels = []
        for seed in range(16):
            net = drawn(name, width, 1.3, 0.2, seed, orthogonal)
            slopes = [torch.autograd.grad(out, net.parameters(), retain_graph=True) for out in net(x).flatten()]
            rows = torch.stack([torch.cat([g.flatten() for g in one]) for one in slopes]).reshape(6, 3, -1)
            kernels.append(torch.einsum("scp,ucp->su", rows, rows).numpy() / 3)
        one = float(np.mean([np.linalg.norm(k - predicted.tangent) for k in kernels]) / scale)
        errors.append(one)
        means.append(float(np.linalg.norm(np.mean(kernels, 0) - predicted.tangent)) / scale)
        noise = kernel_noise(chain, gram, np.broadcast_to(np.eye(3), (6, 3, 3)))
        assert 0.5 * noise.mean < one < 2.0 * noise.largest
    assert means[-1] < 0.06
    assert 0.25 < np.log(errors[0] / errors[-1]) / np.log(16) < 0.75  # 0.5, and the errors of 16 draws


def test_outputs_have_the_covariance_of_the_signal() -> None:
    rng = np.random.default_rng(1)
    x = torch.tensor(rng.standard_normal((4, 8)))
    chain = Architecture.mlp(depth=2, width=200, activation="tanh", sigma_w=1.3, sigma_b=0.2, n_in=8, n_out=3)
    predicted = wide_kernel(chain, (x @ x.T / 8).numpy()).signal
    with torch.no_grad():
        out = torch.cat([drawn("tanh", 200, 1.3, 0.2, seed, False)(x) for seed in range(300)], 1).numpy()
    error = np.abs(out @ out.T / out.shape[1] - predicted)
    assert (error < 5 * np.diag(predicted).max() * np.sqrt(2 / out.shape[1])).all()


def test_what_it_does_not_know_is_refused() -> None:
    gram = np.eye(3)
    dense_layer = Layer(8, 8, None, 1.0)
    with pytest.raises(ValueError, match="dropout or normalisation"):
        wide_kernel(Architecture((Layer(8, 8, None, 1.0, normalisation="layer"), dense_layer)), gram)
    with pytest.raises(ValueError, match="residual"):
        wide_kernel(Architecture((Residual((dense_layer,)), dense_layer)), gram)
    with pytest.raises(ValueError, match="activation behind"):
        wide_kernel(Architecture((Layer(8, 8, as_activation("tanh"), 1.0),)), gram)
    with pytest.raises(ValueError, match="symmetric"):
        wide_kernel(Architecture((dense_layer,)), np.triu(np.ones((2, 2))))
    with pytest.raises(ValueError, match="biases"):
        wide_kernel(Architecture((dense_layer,)), gram, biases=[True, False])
    with pytest.raises(ValueError, match="positive variances"):
        wide_kernel(Architecture.mlp(depth=1, width=4, activation="tanh", sigma_w=1.0, n_out=2), np.zeros((2, 2)))
