"""Bytes of deep networks: what a forward pass saves is counted tensor by tensor, though memory is used again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from tests.operators.test_memory import _peak
from torch_rmt.operators import Hessian
from torch_rmt.operators.memory import saved_bytes
from torch_rmt.operators.pure import PureModel


def _deep(depth: int, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[part for _ in range(depth) for part in (nn.Linear(width, width), nn.Tanh())])


@pytest.mark.parametrize("depth", [4, 40])
def test_every_layer_is_counted(depth: int) -> None:
    """Each layer saves its input, which the one before saved as its output; the network's input comes on top."""
    x = torch.randn(500, 16)
    assert saved_bytes(PureModel(_deep(depth)), x) == (depth + 1) * x.numel() * 4


def test_products_of_a_deep_network_keep_to_their_bytes() -> None:
    net, batch = _deep(16, width=8), (torch.randn(1000, 8), torch.randint(0, 8, (1000,)))
    V = torch.randn(sum(p.numel() for p in net.parameters()), 2)
    limit = Hessian(net, F.cross_entropy, batch).footprint().product(2) // 3

    def run() -> Hessian:
        operator = Hessian(net, F.cross_entropy, batch, max_memory=limit)
        operator.matmat(V)
        return operator

    used, operator = _peak(run)
    assert used <= limit
    assert any("cut into parts" in note for note in operator.notes)
