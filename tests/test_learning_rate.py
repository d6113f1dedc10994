from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from torch_rmt.learning_rate import suggest_lr


def test_a_quadratic_diverges_just_above_the_bound_and_not_below() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        x, y = torch.randn(50, 8, dtype=torch.float64), torch.randn(50, 1, dtype=torch.float64)
        net = nn.Linear(8, 1, bias=False).double()
        report = suggest_lr(net, (x, y), functional.mse_loss)
        top = float(torch.linalg.eigvalsh(2 * x.T @ x / 50)[-1])
        assert report.max_lr == pytest.approx(2 / top, rel=0.02)
        assert report.low <= 2 / top * (1 + 1e-9) <= report.high * (1 + 1e-6)
        for rate, grows in ((0.95 * report.low, False), (1.05 * report.high, True)):
            weight = net.weight.detach().clone() + 1
            start = float(functional.mse_loss(x @ weight.T, y))
            for _ in range(400):
                weight -= rate * 2 * ((x @ weight.T - y).T @ x) / 50
            assert (float(functional.mse_loss(x @ weight.T, y)) > start) is grows
        assert report.suggested == pytest.approx(report.low / 2)


def test_gauss_newton_bounds_where_the_hessian_is_smaller() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 3))
    report = suggest_lr(net, (torch.randn(30, 10), torch.arange(30) % 3), functional.cross_entropy)
    assert report.max_lr == pytest.approx(2 / max(report.hessian.value, report.gauss_newton.value))
    assert set(report.scalars()) == {"max_lr", "suggested_lr", "hessian/largest", "gauss_newton/largest"}
    assert "Plain gradient descent" in report.advice


def test_a_flat_loss_gets_no_rate() -> None:
    net = nn.Linear(4, 2)
    report = suggest_lr(net, (torch.randn(5, 4), torch.zeros(5, 2)), lambda out, y: out.mean())
    assert math.isinf(report.max_lr)
    assert "no positive curvature" in report.advice


def test_bad_input_is_refused() -> None:
    net = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"empty|sample"):
        suggest_lr(net, (torch.randn(0, 4), torch.zeros(0, 2)), functional.mse_loss)
    with pytest.raises(ValueError, match=r"(?i)nan|inf|finite"):
        suggest_lr(net, (torch.full((2, 4), float("inf")), torch.zeros(2, 2)), functional.mse_loss)
