"""The whole chain, describe -> jacobian_spectrum -> measure -> compare, on networks drawn by torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from torch_rmt.compare import Report
from torch_rmt.diagnose import jacobian_report
from torch_rmt.init import critical_init_


def tanh_mlp(seed: int, width: int, depth: int = 20) -> nn.Sequential:
    torch.manual_seed(seed)
    hidden = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def critical(seed: int, width: int, ensemble: str = "orthogonal") -> Report:
    net = tanh_mlp(seed, width)
    critical_init_(net, torch.randn(32, width), ensemble=ensemble)
    return jacobian_report(net, torch.randn(1, width))


@pytest.mark.parametrize("ensemble", ["orthogonal", "gaussian"])
def test_drawn_networks_agree_and_the_distance_falls_like_one_over_width(ensemble: str) -> None:
    means = []
    for width in (48, 144):
        reports = [critical(seed, width, ensemble) for seed in range(4)]
        for report in reports:
            assert report.agrees, report.verdict
            assert report.outliers == ()
            assert "As predicted" in report.verdict
            assert "Critical" in report.verdict
        means.append(np.mean([report.distance("kolmogorov").value for report in reports]))
    slope = np.log(means[1] / means[0]) / np.log(3)
    assert -1.6 < slope < -0.5, (slope, means)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pytorchs_default_is_as_predicted_and_flagged_as_ordered(seed: int) -> None:
    net = tanh_mlp(seed, 96)
    report = jacobian_report(net, torch.randn(1, 96))
    assert "Ordered" in report.verdict
    assert "critical_init_" in report.verdict
    assert report.facts["chi"] == pytest.approx(1 / 3, rel=0.05)  # uniform weights on +-1/sqrt(n): sigma_w^2 = 1/3
    assert report.agrees, report.verdict


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("slope", "gain", "word"), [(0.0, 1.6, "Chaotic"), (1.0, 1.6, "Chaotic"), (1.0, 0.7, "Ordered")]
)
def test_off_critical_networks_are_flagged(seed: int, slope: float, gain: float, word: str) -> None:
    """ReLU (slope 0) and linear networks with weights off their critical scale: chi is the square of the gain."""
    torch.manual_seed(seed)
    hidden = [m for _ in range(20) for m in (nn.Linear(96, 96), nn.LeakyReLU(slope))]
    net = nn.Sequential(*hidden, nn.Linear(96, 10))
    critical_init_(net, torch.randn(32, 96))
    with torch.no_grad():
        for module in net[:-1]:
            if isinstance(module, nn.Linear):
                module.weight.mul_(gain)
    report = jacobian_report(net, torch.randn(1, 96))
    assert word in report.verdict
    assert "critical_init_" in report.verdict
    assert report.facts["chi"] == pytest.approx(gain**2, rel=0.1)
    assert report.agrees, report.verdict


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_correlated_weights_are_told_from_independent_ones(seed: int) -> None:
    """The same Gaussian matrix in all layers, symmetrised: every layer alone is as before, the product is not."""
    width = 96
    net = tanh_mlp(seed, width)
    critical_init_(net, torch.randn(32, width), ensemble="gaussian")
    g = net[2].weight.detach()
    with torch.no_grad():
        for module in net[2:-1]:
            if isinstance(module, nn.Linear):
                module.weight.copy_((g + g.T) / 2**0.5)
    report = jacobian_report(net, torch.randn(1, width))
    assert not report.agrees
    assert "As predicted" not in report.verdict


@pytest.mark.parametrize("seed", [0, 1])
def test_relu_atoms_are_counted(seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(128, 128), nn.ReLU())], nn.Linear(128, 10))
    critical_init_(net, torch.randn(32, 128), ensemble="gaussian")
    report = jacobian_report(net, torch.randn(1, 128))
    assert report.agrees, report.verdict
    assert report.prediction.measure.atoms()[0][1] == pytest.approx(0.5)
