"""Real networks whose shortcuts change the width: read, predicted, and drawn critical."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from torch_rmt.describe import describe
from torch_rmt.diagnose import jacobian_report
from torch_rmt.init import critical_init_


class Sum(nn.Module):
    """shortcut(x) + second(tanh(first(x)))."""

    def __init__(self, first: nn.Module, second: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = first, second, shortcut
        for module in (first, second, shortcut):
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, module.weight[0].numel() ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.second(torch.tanh(self.first(x)))


def perceptron(n: int) -> tuple[nn.Sequential, Tensor]:
    def block(n_in: int, n_out: int) -> Sum:
        shortcut = nn.Identity() if n_in == n_out else nn.Linear(n_in, n_out, bias=False)
        return Sum(nn.Linear(n_in, n_out, bias=False), nn.Linear(n_out, n_out, bias=False), shortcut)

    widths = [2 * n, 2 * n, n, n, 2 * n]
    blocks = [block(a, b) for a, b in pairwise(widths)]
    return nn.Sequential(nn.Linear(n, 2 * n), *blocks, nn.Linear(2 * n, 10)), torch.randn(32, n)


def convolutions(c: int) -> tuple[nn.Sequential, Tensor]:
    def block(c_in: int, c_out: int, stride: int) -> Sum:
        first, second = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        return Sum(first, second, nn.Conv2d(c_in, c_out, 1, stride, bias=False) if stride > 1 else nn.Identity())

    blocks = [block(c, c, 1), block(c, 2 * c, 2), block(2 * c, 2 * c, 1)]
    return nn.Sequential(nn.Conv2d(1, c, 3, 1, 1), *blocks, nn.Flatten(), nn.Linear(32 * c, 10)), torch.randn(
        8, 1, 8, 8
    )


NETWORKS: dict[str, tuple[Callable[[int], tuple[nn.Sequential, Tensor]], tuple[int, int], str]] = {
    "perceptron": (perceptron, (24, 64), "4"),
    "strided 1x1 convolutions": (convolutions, (3, 9), "3"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_measured_law_is_the_predicted_one(name: str) -> None:
    """Across the change of width, at two widths: the distance falls like one over the width."""
    make, sizes, last = NETWORKS[name]
    distances = []
    for size in sizes:
        torch.manual_seed(1)
        net, x = make(size)
        report = jacobian_report(net, x, source="0", target=last)
        assert report.agrees, report.verdict
        distances.append(report.distance("kolmogorov").value)
    assert distances[0] < 0.08
    assert distances[1] < 0.6 * distances[0]


def test_a_strided_kernel_reads_a_part() -> None:
    net, x = convolutions(4)
    block = describe(net, x, source="1", target="2").layers[0]
    assert [(layer.n_in, layer.n_out, layer.ensemble) for layer in block.shortcut] == [
        (256, 64, "orthogonal"),
        (64, 128, "gaussian"),
    ]


def test_an_uneven_norm_in_a_shortcut_is_refused_in_words() -> None:
    torch.manual_seed(0)
    net, x = perceptron(16)
    norm = nn.BatchNorm1d(16).eval()
    norm.running_var.copy_(torch.linspace(0.05, 3.0, 16))
    net[2].shortcut = nn.Sequential(net[2].shortcut, norm)
    report = jacobian_report(net.eval(), x, source="0", target="4")
    assert report.prediction is None
    assert "scales its channels unevenly" in report.verdict


@pytest.mark.parametrize("ensemble", ["orthogonal", "gaussian"])
def test_critical_initialisation_keeps_the_mean_square_through_projections(ensemble: str) -> None:
    torch.manual_seed(0)
    net, x = perceptron(64)
    critical_init_(net, x, ensemble=ensemble)
    h = net[0](x)
    for block in net[1:5]:
        incoming = float(h.detach().square().mean())
        assert float(block.shortcut(h).detach().square().mean()) == pytest.approx(incoming, rel=1e-4)
        assert float((block(h) - block.shortcut(h)).detach().square().mean()) == pytest.approx(incoming / 4, rel=1e-4)
        h = block(h)
