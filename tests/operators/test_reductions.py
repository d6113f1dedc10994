"""A loss that sums, one with class weights: many batches are the one batch that they make up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from torch_rmt.operators import ClosureHessian, Fisher, GaussNewton, GradientCovariance, Hessian, dense, dual_gram

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


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_a_sum_is_known_by_a_later_batch_where_the_first_fits_perfectly(kind: Any) -> None:
    net, x, y = _setting(0)
    y = net(x).detach()
    y[2:] += torch.randn(9, 3, dtype=torch.float64)
    batches = [(x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:], y[3:])]
    loss = nn.functional.mse_loss
    for sure, reduction in ((False, "mean"), (True, "sum")):
        operator = kind(net, lambda o, t, how=reduction: loss(o, t, reduction=how), batches)
        assert operator.summed == sure
        torch.testing.assert_close(
            dense(operator), dense(kind(net, lambda o, t, how=reduction: loss(o, t, reduction=how), (x, y)))
        )


def test_half_a_batch_that_a_mean_leaves_out_makes_no_sum() -> None:
    """The loss of the half that is left out is zero, so the halves add up to the whole; a mean does not double."""
    net, x, y = _setting(0)
    y[:4] = 7

    def mean(output: Tensor, target: Tensor) -> Tensor:
        counts = target != 7
        each = F.cross_entropy(output, target.clamp(max=2), reduction="none")
        return (each * counts).sum() / counts.sum().clamp_min(1)

    operator = Hessian(net, mean, [(x[:8], y[:8]), (x[8:], y[8:])])
    assert not operator.summed
    assert Hessian(net, lambda o, t: mean(o, t) * (t != 7).sum(), (x[:8], y[:8])).summed


class _Tokens(nn.Module):
    def __init__(self, classes: int, last: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = (
            nn.Embedding(classes, 4),
            nn.GRU(4, 4, batch_first=True),
            nn.Linear(4, classes),
        )
        self.last = last
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.mix(self.embed(tokens))[0])
        return logits if self.last else logits.transpose(1, 2)


def _texts(shift: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of unequal padded length, their padding ignored; the last is as long as there are classes."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for lengths in ([9, 6, 4], [5, 3], [6, 6, 4, 6]):
        tokens = torch.randint(0, 6, (len(lengths), max(lengths)), generator=generator)
        labels = tokens.clone()
        for row, length in zip(labels, lengths, strict=True):
            row[max(length, shift + 1) :] = -100
        found.append((tokens, labels))
    return found


@pytest.mark.parametrize("last", [True, False], ids=["classes last", "classes second"])
@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_tokens_that_a_shifted_loss_does_not_read_are_no_terms(kind: Any, shift: int, last: bool) -> None:
    """The mean over all tokens that are predicted, as `reduction="sum"` over their number has it."""
    net, texts = _Tokens(6, last), _texts(shift)

    def loss(output: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        logits = output if last else output.transpose(1, 2)
        read = logits[:, : labels.shape[1] - shift].flatten(0, 1)
        return F.cross_entropy(read, labels[:, shift:].flatten(), reduction=reduction)

    count = sum(int((labels[:, shift:] != -100).sum()) for _, labels in texts)
    operator = kind(net, loss, texts)
    assert operator.terms == count
    v = torch.linspace(-1, 1, operator.shape[0], dtype=torch.float64)[:, None]
    total = kind(net, lambda o, t: loss(o, t, "sum") / count, texts)
    assert total.summed
    torch.testing.assert_close(operator.matmat(v), total.matmat(v))
    if kind is Hessian:
        closure = ClosureHessian(lambda: sum(loss(net(x), y, "sum") for x, y in texts) / count, list(net.parameters()))
        torch.testing.assert_close(operator.matmat(v), closure.matmat(v))
    quarter = kind(net, loss, [(t[:1], y[:1]) for t, y in texts]).footprint().product(1)
    parts = kind(net, loss, texts, max_memory=quarter)
    assert len(parts.batches) > 3
    torch.testing.assert_close(parts.matmat(v), operator.matmat(v), rtol=1e-9, atol=1e-11)
