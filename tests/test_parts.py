"""The Jacobian taken apart: its factors multiply to it, and at initialisation they are free of one another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torch_rmt import critical_init_
from torch_rmt.describe import SlopePart, parts_between
from torch_rmt.diagnose import diagnose, freeness_report, jacobian_report
from torch_rmt.operators import Jacobian


def dense(module: nn.Module, x: Tensor, source: str | None = None, target: str | None = None) -> Tensor:
    jacobian = Jacobian(module, x, source, target)
    return jacobian.matmat(torch.eye(jacobian.shape[1], dtype=jacobian.dtype)).double()


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(9, 12), nn.ELU(inplace=True), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 4)]
    return nn.Sequential(*layers), torch.randn(1, 9)


def cnn() -> tuple[nn.Module, Tensor]:
    first = nn.Conv2d(2, 3, 3, padding=1, groups=1)
    second = nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3)
    return nn.Sequential(first, nn.GELU(), second, nn.Tanh(), nn.Flatten(), nn.Linear(96, 5)), torch.randn(1, 2, 8, 8)


def circular() -> tuple[nn.Module, Tensor]:
    convs = [nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular") for _ in range(3)]
    return nn.Sequential(convs[0], nn.Tanh(), convs[1], nn.ReLU(inplace=True), convs[2]), torch.randn(1, 3, 5, 5)


@pytest.mark.parametrize("make", [mlp, cnn, circular])
@pytest.mark.parametrize("ends", [(None, None), ("0", None), ("0", "2"), (None, "2"), ("1", "3")], ids=str)
def test_the_factors_multiply_to_the_jacobian(make, ends: tuple[str | None, str | None]) -> None:
    torch.manual_seed(0)
    net, x = make()
    product = None
    for part in parts_between(net, x, *ends):
        factor = part.slopes.diag() if isinstance(part, SlopePart) else dense(part.module, part.example)
        product = factor if product is None else factor @ product
    torch.testing.assert_close(product, dense(net, x, *ends), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ensemble", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_the_factors_of_a_drawn_network_are_free(seed: int, ensemble: str, activation: type[nn.Module]) -> None:
    torch.manual_seed(seed)
    hidden = [m for _ in range(6) for m in (nn.Linear(96, 96), activation())]
    net = nn.Sequential(*hidden, nn.Linear(96, 10))
    critical_init_(net, torch.randn(16, 96), ensemble=ensemble)
    report = freeness_report(net, torch.randn(1, 96))
    assert report.agrees, report.verdict
    assert report.verdict.startswith("The parts are free of each other")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_aligned_layers_are_told_though_each_keeps_its_spectrum(seed: int) -> None:
    """W_2 = W_1^T: the singular vectors meet, and |W_2 W_1|^2 has the squares, not the free product."""
    torch.manual_seed(seed)
    first, second = nn.Linear(96, 96), nn.Linear(96, 96)
    net = nn.Sequential(nn.Linear(96, 96), first, second)  # from the output of the first to that of the last
    free = freeness_report(net, torch.randn(1, 96))
    second.weight.data = first.weight.data.T.clone()
    aligned = freeness_report(net, torch.randn(1, 96))
    assert free.agrees, free.verdict
    assert aligned.agrees is False
    assert aligned.verdict.startswith("The parts are aligned")
    assert aligned.distance("kolmogorov").value > 4 * free.distance("kolmogorov").value


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_active_dropout_is_a_factor_with_its_law(seed: int) -> None:
    torch.manual_seed(seed)
    hidden = [m for _ in range(5) for m in (nn.Linear(128, 128), nn.Tanh(), nn.Dropout(0.1))]
    report = freeness_report(nn.Sequential(*hidden, nn.Linear(128, 10)), torch.randn(1, 128))
    assert report.agrees, report.verdict
    assert sum(mass for x, mass in report.prediction.measure.atoms() if x == 0.0) == pytest.approx(0.1)


@pytest.mark.parametrize("padding_mode", ["circular", "zeros"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize(("channels", "side"), [(4, 8), (16, 5)])
def test_drawn_convolutions_are_free_and_as_predicted(
    channels: int, side: int, activation: type[nn.Module], padding_mode: str
) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(channels, channels, 3, padding=1, padding_mode=padding_mode) for _ in range(4)]
        for conv in layers:
            nn.init.normal_(conv.weight, std=(2 / (9 * channels)) ** 0.5)
        net = nn.Sequential(*[m for conv in layers for m in (conv, activation())])
        x = torch.randn(1, channels, side, side)
        for report in (freeness_report(net, x, "0", "6"), jacobian_report(net, x, "0", "6")):
            assert report.agrees is not False, (report.name, report.verdict)
            assert report.prediction is not None, report.verdict


def test_rectangular_factors_and_a_bottleneck_are_free_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(120, 160), nn.Tanh(), nn.Linear(160, 40), nn.Tanh(), nn.Linear(40, 200))
    report = freeness_report(net, torch.randn(1, 120))
    assert report.agrees, report.verdict
    assert sum(mass for x, mass in report.prediction.measure.atoms() if x == 0.0) == pytest.approx(2 / 3)


def test_what_cannot_be_taken_apart_is_measured_only_and_says_why() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 8))
    assert "softmax" in freeness_report(net, torch.randn(1, 8)).verdict
    with pytest.raises(ValueError, match="batch of one"):
        parts_between(net[:1], torch.randn(2, 8))
    found = diagnose(net, (torch.randn(4, 8), torch.arange(4)), nn.functional.cross_entropy, what=("freeness",))
    assert [report.name for report in found.reports] == ["freeness"]
