"""Weights that are computed in the forward pass, as weight, spectral and orthogonal normalisation compute them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from torch_rmt import critical_init_, describe
from torch_rmt.diagnose import freeness_report, jacobian_report
from torch_rmt.theory import Layer

KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


def net(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    made = KINDS[kind]
    return nn.Sequential(
        made(nn.Linear(24, 32)), nn.Tanh(), made(nn.Linear(32, 32)), nn.Tanh(), made(nn.Linear(32, 32)), nn.Tanh(),
        nn.Linear(32, 5),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_that_is_used_is_the_one_described(kind: str) -> None:
    model = net(kind).eval()
    found = describe(model, torch.randn(8, 24))
    assert [layer.name for layer in found.layers] == ["0", "2", "4", "6"]
    for layer in found.layers:
        weight = model.get_submodule(layer.name).weight.detach().double()
        assert isinstance(layer, Layer)
        assert layer.sigma_w == pytest.approx(math.sqrt(float(weight.square().mean()) * weight.shape[1]), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_measured_and_not_drawn(kind: str) -> None:
    model, x = net(kind), torch.randn(16, 24)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report, gap = jacobian_report(model, x), freeness_report(model, x)
    assert report.prediction is not None, report.verdict
    assert gap.prediction is not None, gap.verdict
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    made = critical_init_(model, x)
    assert "0, 2, 4: its weight is computed from others" in made.verdict
    assert made.verdict.startswith("1 layer drawn")
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith("6")}
    assert all(torch.equal(value, state[name]) for name, value in kept.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isfinite(model(x)).all()
