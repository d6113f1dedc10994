"""The noise that is stated for a tangent kernel, beside that of networks drawn by torch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torch_rmt.theory import Architecture, Layer, kernel_noise, wide_kernel

DRAWS = 160


def inputs(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 16, generator=generator) + 0.5 * torch.randn(16, generator=generator)
    return x if seed else x * torch.linspace(0.7, 1.3, 8)[:, None]


def drawn_kernel(x: Tensor, sizes: list[int], name: str, gain: float, ensemble: str, generator: Any) -> np.ndarray:
    """Theta of all samples and outputs, by the weights."""
    kept, slopes, weights = [x], [], []
    for fan_in, fan_out in itertools.pairwise(sizes):
        weight = torch.empty(fan_out, fan_in)
        if ensemble == "orthogonal":
            nn.init.orthogonal_(weight, gain * max(1.0, (fan_out / fan_in) ** 0.5), generator=generator)
        else:
            nn.init.normal_(weight, 0.0, gain / fan_in**0.5, generator=generator)
        u = kept[-1] @ weight.T
        slopes.append((u > 0).float() if name == "relu" else 1 - u.tanh() ** 2)
        kept.append(u.relu() if name == "relu" else u.tanh())
        weights.append(weight)
    samples, outputs = len(x), sizes[-1]
    back = torch.eye(outputs).expand(samples, outputs, outputs)
    total = torch.zeros(samples * outputs, samples * outputs)
    for index in range(len(weights) - 1, -1, -1):
        rows = back.reshape(samples * outputs, -1)
        forward = (kept[index] @ kept[index].T).repeat_interleave(outputs, 0).repeat_interleave(outputs, 1)
        total += (rows @ rows.T) * forward
        if index:
            back = (back @ weights[index]) * slopes[index - 1][:, None, :]
    return total.double().numpy()


@pytest.mark.parametrize(
    ("name", "depth", "width", "outputs", "ensemble", "seed"),
    [
        ("relu", 2, 64, 1, "gaussian", 0),
        ("relu", 4, 128, 10, "gaussian", 1),
        ("tanh", 2, 64, 10, "gaussian", 1),
        ("tanh", 4, 64, 3, "gaussian", 0),
        ("tanh", 6, 128, 1, "gaussian", 1),
        ("tanh", 3, 64, 10, "orthogonal", 0),
        ("relu", 3, 64, 3, "orthogonal", 1),
    ],
)
def test_drawn_networks_fluctuate_by_as_much(
    name: str, depth: int, width: int, outputs: int, ensemble: Any, seed: int
) -> None:
    """The error of a standard deviation from so many draws is 6 %, more where logarithms have heavy tails."""
    x, gain = inputs(seed), 2**0.5 if name == "relu" else 1.2
    gram = (x @ x.T / 16).double().numpy()
    chain = Architecture.mlp(
        depth=depth, width=width, activation=name, sigma_w=gain, n_in=16, n_out=outputs, ensemble=ensemble
    )
    none = [False] * (depth + 1)
    limit = wide_kernel(chain, gram, biases=none).tangent
    stated = kernel_noise(chain, gram, np.broadcast_to(np.eye(outputs), (8, outputs, outputs)), biases=none)
    generator = torch.Generator().manual_seed(seed)
    sizes = [16, *[width] * depth, outputs]
    kernels = [drawn_kernel(x, sizes, name, gain, ensemble, generator) for _ in range(DRAWS)]
    means = np.log([np.trace(k) / outputs / np.trace(limit) for k in kernels])
    tops = np.log([np.linalg.eigvalsh(k)[-1] for k in kernels]) - np.log(np.linalg.eigvalsh(limit)[-1])
    assert 0.75 < means.std() / stated.mean < 1.3
    assert 0.7 < tops.std() / stated.largest < 1.35
    assert abs(tops.mean() - np.log(stated.raised)) < 0.5 * stated.largest
    far = (np.abs(means) > 3 * stated.mean) | (np.abs(tops - np.log(stated.raised)) > 3 * stated.largest)
    assert far.mean() <= 0.03


@pytest.mark.parametrize("outputs", [1, 4])
def test_a_linear_network_has_its_closed_form(outputs: int) -> None:
    """f = V W x: Theta = |W x|^2 1 + |x|^2 V V^T, and Var |Wx|^2 = Var of a row of V = 2/n; V V^T has chi squares."""
    n, size = 400, 3.0
    chain = Architecture((Layer(20, n, None, 1.0), Layer(n, outputs, None, 1.0)))
    noise = kernel_noise(chain, np.array([[size]]), np.eye(outputs)[None], biases=[False, False])
    # means: n size and 20 size
    shared, own = 2 / n * (n / (n + 20)) ** 2, 2 / n * (20 / (n + 20)) ** 2
    assert noise.mean == pytest.approx((shared + own / outputs) ** 0.5, rel=0.06)


def test_orthogonal_weights_leave_a_linear_network_no_noise() -> None:
    square = [Layer(50, 50, None, 1.1, ensemble="orthogonal") for _ in range(3)]
    noise = kernel_noise(Architecture(tuple(square)), np.eye(3) + 0.2, np.broadcast_to(np.eye(50), (3, 50, 50)))
    assert noise.mean < 1e-9
    assert noise.largest < 1e-6
    assert noise.raised == pytest.approx(1.0, abs=1e-6)


def test_noise_falls_as_the_root_of_the_width() -> None:
    gram, h = np.eye(4) + 0.3, np.broadcast_to(np.eye(3), (4, 3, 3))
    noises = [
        kernel_noise(Architecture.mlp(depth=3, width=w, activation="tanh", sigma_w=1.2, n_in=w, n_out=3), gram, h)
        for w in (100, 1600)
    ]
    assert noises[0].mean / noises[1].mean == pytest.approx(4.0, rel=0.02)
    assert 1 < noises[1].raised < noises[0].raised


def test_a_loss_without_curvature_is_refused() -> None:
    chain = Architecture.mlp(depth=1, width=8, activation="tanh", sigma_w=1.0, n_out=2)
    with pytest.raises(ValueError, match="no curvature"):
        kernel_noise(chain, np.eye(2), np.zeros((2, 2, 2)))
