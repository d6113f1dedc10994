"""The Fisher and Gauss-Newton matrices of real networks beside the scale of wide ones on the same batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from torch_rmt.diagnose.reports import curvature_report
from torch_rmt.diagnose.wide import wide_scale
from torch_rmt.init import critical_init_
from torch_rmt.operators import Fisher, GaussNewton


def digits(count: int) -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x[:count], dtype=torch.float32)
    return (x - x.mean()) / x.std(), torch.tensor(y[:count])


def network(width: int, seed: int, *, bias: bool = True, outputs: int = 10) -> nn.Sequential:
    torch.manual_seed(seed)
    hidden = [nn.Linear(64, width, bias=bias), nn.ReLU(), nn.Linear(width, width, bias=bias), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, outputs, bias=bias))


@pytest.mark.parametrize(("kind", "bias"), [("fisher", True), ("gauss_newton", False)])
def test_untrained_networks_are_as_predicted_at_every_width(kind: Any, bias: bool) -> None:
    x, y = digits(24)
    apart = []
    for width in (64, 256):
        for seed in range(3):
            net = network(width, seed, bias=bias)
            if seed:
                critical_init_(net, x, ensemble="gaussian")
            report = curvature_report(net, (x, y), F.cross_entropy, kind, seed=seed)
            assert report.agrees
            assert "As predicted" in report.verdict
            apart.append(abs(report.spectrum.moment(1)[0] / report.facts["wide/mean"] - 1))
    assert sum(apart[3:]) / 3 < 0.15, apart  # a third of that is the noise to expect


def test_a_wider_batch_of_losses_has_its_mean_over_draws() -> None:
    """Mean square error: H = 2/(N C), so the prediction holds exactly on average over networks as widths grow."""
    x, _ = digits(20)
    y = torch.zeros(20, 3)
    ratios: list[float] = []
    for seed in range(6):
        net = network(400, seed, outputs=3)
        operator = GaussNewton(net, F.mse_loss, (x, y))
        scale = wide_scale(net, x, operator)
        gradients = [torch.autograd.grad(out, net.parameters(), retain_graph=True) for out in net(x).flatten()]
        trace = sum(float(g.square().sum()) for one in gradients for g in one) * 2 / 60
        ratios.append(trace / (scale.mean * operator.shape[0]))
    mean = sum(ratios) / 6
    spread = (sum((r - mean) ** 2 for r in ratios) / 5) ** 0.5
    assert abs(mean - 1) < 3 * spread / 6**0.5 + 0.02
    assert spread < 0.2


@pytest.mark.parametrize("seed", [0, 1])
def test_a_narrow_network_of_many_outputs_can_be_told(seed: int) -> None:
    """Its mean is over all outputs and has far less noise than one output's gradient norm, 0.6 at this width."""
    x, y = digits(16)
    torch.manual_seed(seed)
    sizes = (64, 24, 24, 24, 24)
    hidden = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    net = nn.Sequential(*hidden, nn.Linear(24, 10))
    critical_init_(net, x, ensemble="gaussian")
    report = curvature_report(net, (x, y), F.cross_entropy, "fisher")
    assert report.agrees, report.verdict
    assert report.facts["wide/mean_noise"] < 0.25  # a factor of two would be seen
    assert report.facts["wide/mean_noise"] < 0.8 * report.facts["wide/largest_eigenvalue_noise"]


def test_training_leaves_the_prediction_and_the_report_says_so() -> None:
    x, y = digits(512)
    net = network(64, 0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    report = curvature_report(net, (x[:64], y[:64]), F.cross_entropy, "fisher")
    assert report.agrees is False
    assert "what training has built" in report.verdict


def test_an_unknown_likelihood_speaks_of_the_empirical_matrix() -> None:
    x, y = digits(32)

    def robust(output: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(output, F.one_hot(target, 10).float())

    report = curvature_report(network(512, 1), (x, y), robust, "fisher")
    assert "empirical Fisher" in report.verdict
    assert "learning rate" not in report.verdict
    assert report.agrees


@pytest.mark.parametrize("case", ["convolution", "frozen", "tied", "norm", "tokens"])
def test_other_networks_are_measured_only_and_the_reason_is_said(case: str) -> None:
    x, y = digits(16)
    net: nn.Module = network(16, 0)
    if case == "convolution":
        net = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
        )
    elif case == "frozen":
        next(net.parameters()).requires_grad_(False)
    elif case == "tied":
        shared = nn.Linear(64, 64)
        net = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(64, 10))
    elif case == "norm":
        net = nn.Sequential(nn.Linear(64, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 10))
    elif case == "tokens":
        net = nn.Sequential(nn.Embedding(100, 8), nn.Flatten(), nn.Linear(512, 10))
        x = (x.abs() * 10).long().clamp(0, 99)
    report = curvature_report(net, (x, y), F.cross_entropy, "fisher")
    assert report.agrees is None
    assert report.verdict.startswith("Measured only: theory has no law for it in such a network (")
    assert "wide/mean" not in report.facts


def test_a_batch_that_is_too_large_is_refused_before_the_work() -> None:
    net = network(8, 0)
    x = torch.zeros(1025, 64)
    with pytest.raises(ValueError, match="at most 1024"):
        wide_scale(net, x, Fisher(net, F.cross_entropy, (x, torch.zeros(1025, dtype=torch.long))))
