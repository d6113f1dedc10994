"""Graphs that fit a limit are kept across it; results are memory of their own; kinks are no custom backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from torch_rmt.operators import GaussNewton, Hessian, dense
from torch_rmt.spectra import SLQ


def _setting() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return net, (torch.randn(12, 5, dtype=torch.float64), torch.randint(0, 3, (12,)))


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_within_a_limit_that_fits_no_graph_is_built_again(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, batch = _setting()
    operator = kind(net, F.cross_entropy, batch)
    expected, built, prepare = dense(operator), [], operator._prepare
    monkeypatch.setattr(operator, "_prepare", lambda *given: (built.append(given), prepare(*given))[1])
    need = operator.footprint().product(3)
    with operator.within(need, 3):
        torch.testing.assert_close(operator.matmat(torch.eye(len(expected), 2, dtype=torch.float64)), expected[:, :2])
    SLQ(2, 3, max_memory=10**9)(operator, torch.Generator().manual_seed(0))
    assert not built
    with operator.within(need // 3, 1):
        assert not operator.keep
        torch.testing.assert_close(operator.matmat(torch.eye(len(expected), 2, dtype=torch.float64)), expected[:, :2])
        assert not operator._kept
        assert operator._jacobian is None
    assert len(built) >= 2
    assert operator.keep
    torch.testing.assert_close(operator.matmat(torch.eye(len(expected), 2, dtype=torch.float64)), expected[:, :2])


class _Spread(nn.Module):
    """A parameter of which only the sum counts: products with it are one number, spread out without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.sum().expand(x.shape[0], 1)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_results_are_memory_of_their_own(kind: Any, columns: int, batches: int) -> None:
    pair = torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    operator = kind(_Spread(), F.mse_loss, [pair] * batches)
    V = torch.randn(6, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given, image = V.clone(), operator.matmat(V)
    expected = 2.0 * torch.ones(6, 6, dtype=torch.float64) @ given
    assert torch.equal(V, given)
    V.zero_(), operator.matmat(given + 1.0)
    torch.testing.assert_close(image, expected)
    image.add_(1.0)
    torch.testing.assert_close(operator.matmat(given), expected)


def test_differences_across_a_kink_veto_nothing() -> None:
    """Half the units stand on their kinks, where central differences are wrong and nobody's backward is."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3)).double()
    with torch.no_grad():
        net[0].bias.zero_()
        net[0].weight.mul_(1e-7)
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randint(0, 3, (7,))
    H = Hessian(net, F.cross_entropy, (x, y))
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(point: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, point, (x,)), y)

    blocks = torch.func.hessian(loss)(parameters)
    sizes = {name: p.numel() for name, p in parameters.items()}
    rows = [torch.cat([blocks[a][b].reshape(sizes[a], sizes[b]) for b in sizes], dim=1) for a in sizes]
    torch.testing.assert_close(dense(H), torch.cat(rows))
    assert "central differences" not in str(H.engine)
