"""A loss that sums, one with class weights: many batches are the one batch that they make up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from torch_rmt.operators import Fisher, GaussNewton, GradientCovariance, Hessian, dense, dual_gram

_WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "sum by a function": lambda output, target: F.cross_entropy(output, target, reduction="sum"),
    "class weights": nn.CrossEntropyLoss(weight=_WEIGHT),
    "class weights, summed": nn.CrossEntropyLoss(weight=_WEIGHT, reduction="sum"),
    "class weights, smoothed": nn.CrossEntropyLoss(weight=_WEIGHT, label_smoothing=0.2),
    "ignored": nn.CrossEntropyLoss(ignore_index=1),
}


def _setting(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return net, torch.randn(11, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 0, 1, 0, 2, 1, 2, 0])


@pytest.mark.parametrize("kind", [Hessian, GaussNewton, Fisher])
@pytest.mark.parametrize("name", list(LOSSES))
def test_uneven_batches_are_the_whole_for_every_reduction(name: str, kind: Any) -> None:
    net, x, y = _setting(0)
    loss = LOSSES[name]
    batches = [(x[:1], y[:1]), (x[1:4], y[1:4]), (x[4:9], y[4:9]), (x[9:], y[9:])]
    torch.testing.assert_close(dense(kind(net, loss, batches)), dense(kind(net, loss, (x, y))))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_summed_loss_is_n_times_the_mean_in_every_matrix(seed: int) -> None:
    net, x, y = _setting(seed)
    kinds: dict[str, Callable[..., Any]] = {
        "hessian": Hessian,
        "exact": lambda *given: Fisher(*given),
        "empirical": lambda *given: Fisher(*given, kind="empirical"),
        "sampled": lambda *given: Fisher(*given, kind="sampled", seed=3),
    }
    for make in kinds.values():
        mean, total = make(net, LOSSES["mean"], (x, y)), make(net, LOSSES["sum by a function"], (x, y))
        torch.testing.assert_close(dense(total), len(x) * dense(mean))
    empirical = Fisher(net, LOSSES["sum"], [(x[:5], y[:5]), (x[5:], y[5:])], kind="empirical")
    torch.testing.assert_close(dense(empirical), dense(Fisher(net, LOSSES["sum"], (x, y), kind="empirical")))
    gram = dual_gram(Fisher(net, LOSSES["sum"], (x, y), kind="empirical"))
    torch.testing.assert_close(gram.eigenvalues()[-5:], torch.linalg.eigvalsh(dense(empirical))[-5:])


def test_the_covariance_of_a_summed_loss_is_refused() -> None:
    net, x, y = _setting(0)
    with pytest.raises(ValueError, match="reduction='mean'"):
        GradientCovariance(net, LOSSES["sum"], (x, y))


def test_a_perfect_fit_is_no_sum() -> None:
    """Where the loss is zero its halves add up to the whole, whether it sums or averages."""
    net, x, _ = _setting(0)
    nn.init.zeros_(net[2].weight), nn.init.zeros_(net[2].bias)
    y = torch.zeros(11, 3, dtype=torch.float64)
    batches = [(x[:2], y[:2]), (x[2:5], y[2:5]), (x[5:], y[5:])]
    G = GaussNewton(net, F.mse_loss, batches)
    assert float(F.mse_loss(net(x[:2]).detach(), y[:2])) == 0.0
    torch.testing.assert_close(dense(G), dense(GaussNewton(net, F.mse_loss, (x, y))))
    torch.testing.assert_close(dense(G), dense(GaussNewton(net, F.mse_loss, (x, y + 1.0))))  # of a linear residual
