"""Modules that overwrite what they are given: no place is read after it was overwritten, no batch is changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from torch_rmt.operators import (
    Hessian,
    Jacobian,
    activation_slopes,
    input_to_layers,
    layers_to_output,
    partial_jacobian_norms,
    single_layers,
)


def nets() -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """One network with activations in place, the same without, and a batch; ELU, whose slope tells h from phi(h)."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.ELU(), nn.Linear(5, 6), nn.ELU(), nn.Linear(6, 4), nn.ELU(), nn.Linear(4, 3))
    here = copy.deepcopy(plain)
    for module in here:
        if isinstance(module, nn.ELU):
            module.inplace = True
    return here, plain, torch.randn(7, 5)


@pytest.mark.parametrize("ends", [(None, None), ("1", "3"), (None, "1"), ("1", None), ("3", "5"), ("0", "3")], ids=str)
def test_jacobians_are_those_of_the_network_that_overwrites_nothing(ends: tuple[str | None, str | None]) -> None:
    here, plain, x = nets()
    before = x.clone()
    a, b = (Jacobian(net, x[:1], *ends) for net in (here, plain))
    eye = torch.eye(b.shape[1])
    torch.testing.assert_close(a.matmat(eye), b.matmat(eye))
    assert torch.equal(x, before)


def test_sweeps_and_slopes_are_those_of_the_network_that_overwrites_nothing() -> None:
    here, plain, x = nets()
    before = x.clone()
    names = ["1", "3", "5"]
    for sweep in (input_to_layers, layers_to_output, single_layers):
        a, b = sweep(here, x, names), sweep(plain, x, names)
        assert list(a) == list(b)
        for name in a:
            torch.testing.assert_close(a[name], b[name], msg=f"{sweep.__name__} {name}")
    a, b = input_to_layers(here, x, ["3", "5"], source="1"), input_to_layers(plain, x, ["3", "5"], source="1")
    for name in a:
        torch.testing.assert_close(a[name], b[name])
    a, b = activation_slopes(here, x), activation_slopes(plain, x)
    for name in b:
        torch.testing.assert_close(a[name], b[name])
    a_norms, b_norms = partial_jacobian_norms(here, x, names), partial_jacobian_norms(plain, x, names)
    torch.testing.assert_close(a_norms.values, b_norms.values)
    assert torch.equal(x, before)


def test_curvature_leaves_the_batch_as_it_was() -> None:
    here, plain, x = nets()
    before, target = x.clone(), torch.arange(7) % 3
    v = torch.randn(Hessian(plain, nn.functional.cross_entropy, (x, target)).shape[0], 2)
    a, b = (Hessian(net, nn.functional.cross_entropy, (x, target)).matmat(v) for net in (here, plain))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)
