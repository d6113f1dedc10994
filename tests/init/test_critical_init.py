"""`critical_init_` on real modules: chi comes out at one, what it must not touch it leaves alone and names."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_rmt.describe import describe, describe_between
from torch_rmt.init import critical_init_, isometry_q, signals
from torch_rmt.init.critical import draw_weight_
from torch_rmt.init.signal import chi_per_layer
from torch_rmt.operators import Jacobian
from torch_rmt.spectra import exact
from torch_rmt.theory import as_activation, gaussian_expectation


def mlp(activation: type[nn.Module] = nn.Tanh, depth: int = 40, width: int = 64, inputs: int = 64) -> nn.Sequential:
    first = nn.Linear(inputs, width)
    rest = [m for _ in range(depth - 1) for m in (nn.Linear(width, width), activation())]
    return nn.Sequential(first, activation(), *rest, nn.Linear(width, 10))


def chi_noise(depth: int, width: int) -> float:
    """Standard deviation of chi a layer: log |J u|^2 has a variance of about 5 depth / width, chi a depth-th of it."""
    return math.sqrt(5 * depth / width) / depth


@pytest.mark.parametrize("ensemble", ["orthogonal", "gaussian"])
@pytest.mark.parametrize("width", [64, 160])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_forty_tanh_layers_become_critical(seed: int, width: int, ensemble: str) -> None:
    torch.manual_seed(seed)
    net = mlp(width=width)
    report = critical_init_(net, torch.rand(32, 64), ensemble=ensemble)
    assert report.chi_before < 0.5
    assert abs(report.chi_after - 1) < 3 * chi_noise(40, width)
    assert report.left_alone == ()
    assert "41 layers drawn" in report.verdict
    ratio = report.after[0].gradient / report.after[-1].gradient
    assert report.scalars()["gradient_ratio_after"] == pytest.approx(ratio)
    assert report.scalars()["chi_after"] == pytest.approx(ratio ** (2 / 40))
    # and q is where it was aimed, from the first layer to the last hidden one
    q = np.array([s.q for s in report.after[:-1]])
    aim = report.layers[0].q
    assert q[0] == pytest.approx(aim, rel=0.05)  # scaled to it, but for the biases' draw
    assert np.all((q > aim / 3) & (q < 3 * aim))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU, nn.Hardtanh, nn.LeakyReLU, nn.Softsign])
def test_other_activations(activation: type[nn.Module]) -> None:
    chis = []
    for seed in range(3):
        torch.manual_seed(seed)
        report = critical_init_(mlp(activation, 20, 128), torch.randn(32, 64))
        assert report.chi_before < 0.6
        chis.append(report.chi_after)
    assert abs(np.mean(chis) - 1) < 3 * chi_noise(20, 128)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_the_scale_of_the_data_does_not_matter(scale: float) -> None:
    torch.manual_seed(0)
    net = mlp(depth=10)
    report = critical_init_(net, scale * torch.randn(64, 64) + scale)
    assert report.after[0].q == pytest.approx(report.layers[0].q, rel=0.05)
    assert abs(report.chi_after - 1) < 3 * chi_noise(10, 64)


def test_weights_are_what_theory_asks_for() -> None:
    torch.manual_seed(0)
    net = mlp(depth=6, width=96)
    critical_init_(net, torch.randn(32, 64), sigma_b=0.05)
    layers = describe(net, torch.randn(1, 64)).layers
    assert layers[2].sigma_w == pytest.approx(1.122539, rel=1e-5)  # Schoenholz et al.: tanh at sigma_b = 0.05
    assert layers[2].ensemble == "orthogonal"
    assert np.mean([layer.sigma_b for layer in layers[:-1]]) == pytest.approx(0.05, rel=0.15)
    assert layers[-1].sigma_b == 0.0


def test_q_star_can_be_chosen() -> None:
    torch.manual_seed(0)
    report = critical_init_(mlp(depth=8, width=128), torch.randn(32, 64), q_star=0.3)
    assert report.layers[3].q == pytest.approx(0.3)
    phi = as_activation("tanh")
    slope = gaussian_expectation(lambda h: phi.derivative(h) ** 2, 0.3)
    assert report.layers[3].sigma_w == pytest.approx(slope**-0.5, rel=1e-5)


@pytest.mark.parametrize("activation", [nn.ELU, nn.SELU])
@pytest.mark.parametrize("q_star", [None, 0.5])
def test_exponential_linear_units(activation: type[nn.Module], q_star: float | None) -> None:
    torch.manual_seed(0)
    report = critical_init_(mlp(activation, 8, 128), torch.randn(32, 64), q_star=q_star)
    assert abs(report.chi_after - 1) < 3 * chi_noise(8, 128)
    assert all(0.2 < s.q / report.layers[0].q < 5 for s in report.after[:-1])
    assert report.layers[0].q == pytest.approx(q_star or report.layers[0].q)
    assert report.layers[0].q > 1e-3


@pytest.mark.parametrize("depth", [10, 100])
def test_isometry_q_bounds_the_spread_of_the_jacobian(depth: int) -> None:
    """At q*(depth) squared singular values of orthogonal networks spread by a variance of 1/4 at any depth."""
    phi = as_activation("tanh")
    q = isometry_q(phi, depth)
    first, second = (gaussian_expectation(lambda h, k=k: phi.derivative(h) ** k, q) for k in (2, 4))
    assert depth * (second / first**2 - 1) == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_measured_jacobian_has_the_variance_aimed_at(seed: int) -> None:
    torch.manual_seed(seed)
    net = mlp(depth=40, width=128)
    critical_init_(net, torch.randn(64, 64))
    spectrum = exact(Jacobian(net, torch.randn(1, 64), "0", "78"))
    mean = spectrum.moment(1)[0]
    assert mean == pytest.approx(1.0, abs=0.2)
    assert spectrum.moment(2)[0] - mean**2 == pytest.approx(0.25, rel=0.5)


def test_orthogonal_draws_are_haar() -> None:
    """E (tr W)^2 = 1 and E tr W = 0 for Haar orthogonal matrices; a QR without the sign fix has E tr W away from 0."""
    traces = []
    torch.manual_seed(0)
    weight = nn.Parameter(torch.empty(6, 6))
    for _ in range(1000):
        draw_weight_(weight, "orthogonal", 1, 1.0)
        traces.append(float(weight.trace()))
    assert abs(np.mean(traces)) < 4 / math.sqrt(1000)
    assert np.mean(np.square(traces)) == pytest.approx(1.0, abs=4 * math.sqrt(2 / 1000))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shape", [(8, 8), (16, 8), (8, 16), (8, 8, 3, 5), (16, 4, 3)])
def test_every_group_of_a_weight_is_orthogonal_at_its_centre_tap(shape: tuple[int, ...], groups: int) -> None:
    """And fan-in times the mean square is sigma_w^2, whatever the widths and the kernel."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.empty(shape, dtype=torch.float64))
    draw_weight_(weight, "orthogonal", groups, 1.5)
    assert weight[0].numel() * float(weight.detach().square().mean()) == pytest.approx(1.5**2, rel=1e-5)
    centre = (slice(None), slice(None), *(k // 2 for k in shape[2:]))
    assert float(weight.detach()[centre].abs().sum()) == pytest.approx(float(weight.detach().abs().sum()))
    for block in weight.detach()[centre].split(shape[0] // groups):
        gram = block @ block.T if block.shape[0] <= block.shape[1] else block.T @ block
        torch.testing.assert_close(gram, gram[0, 0] * torch.eye(len(gram)).double(), atol=1e-5, rtol=0)
    draw_weight_(weight, "gaussian", groups, 1.5)
    noise = 1.5**2 * math.sqrt(2 / weight.numel())
    assert weight[0].numel() * float(weight.detach().square().mean()) == pytest.approx(1.5**2, abs=4 * noise)


def test_biases_are_drawn_too_unless_they_are_frozen() -> None:
    torch.manual_seed(0)
    net = mlp(nn.ReLU, depth=4)
    net[4].bias.requires_grad_(False).fill_(0.3)
    critical_init_(net, torch.randn(32, 64))
    assert [bool((m.bias == 0).all()) for m in net if isinstance(m, nn.Linear)] == [True, True, False, True, True]
    assert bool((net[4].bias == 0.3).all())


def test_it_draws_from_the_global_generator() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        net = mlp(depth=3)
        torch.manual_seed(seed)
        critical_init_(net, torch.ones(4, 64))
        weights.append(net[2].weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    before = torch.get_rng_state()
    critical_init_(net, torch.ones(4, 64))
    assert not torch.equal(before, torch.get_rng_state())


def cnn(activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    body = [m for _ in range(6) for m in (nn.Conv2d(12, 12, 3, padding=1, padding_mode="circular"), activation())]
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), activation(), *body, nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1), activation(), nn.Flatten(), nn.Linear(256, 5),
    )  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_convolutions_are_delta_orthogonal_and_critical(seed: int) -> None:
    torch.manual_seed(seed)
    net = cnn()
    x = torch.rand(16, 1, 8, 8)
    report = critical_init_(net, x)
    weight = net[4].weight.detach()
    centre = weight[:, :, 1, 1]
    assert float(weight.abs().sum()) == pytest.approx(float(centre.abs().sum()))
    gram = centre @ centre.T
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(12), atol=1e-5, rtol=0)
    jacobian = exact(Jacobian(net, x[:1], "2", "12"))
    assert jacobian.moment(1)[0] == pytest.approx(1.0, abs=0.4)  # twelve channels
    assert report.left_alone == ()
    assert report.after[7].q == pytest.approx(report.layers[7].q, rel=0.1)  # behind the pool: scaled as measured


class Shared(nn.Module):
    """One weight used three times, one frozen, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied = nn.Linear(32, 32), nn.Linear(32, 32)
        self.frozen, self.last = nn.Linear(32, 32), nn.Linear(32, 4, bias=False)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for _ in range(3):
            x = torch.tanh(self.tied(x))
        return self.last(torch.tanh(self.frozen(x)))


def test_tied_weights_are_drawn_once_and_frozen_ones_never() -> None:
    torch.manual_seed(0)
    net = Shared()
    kept = net.frozen.weight.clone()
    report = critical_init_(net, torch.randn(16, 32))
    assert [layer.name for layer in report.layers] == ["first", "tied", "last"]
    assert torch.equal(net.frozen.weight, kept)
    assert report.left_alone == ("frozen: frozen",)
    gram = net.tied.weight @ net.tied.weight.T
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(32), atol=1e-5, rtol=0)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.randn(48, 48)) for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        for w in self.w:
            x = functional.gelu(functional.linear(x, w))
        return x


def test_functional_networks_without_modules() -> None:
    torch.manual_seed(0)
    report = critical_init_(Functional(), torch.randn(32, 48), ensemble="orthogonal")
    assert [layer.name for layer in report.layers] == [f"w.{i}" for i in range(8)]
    assert abs(report.chi_after - 1) < 3 * chi_noise(8, 48)


def test_rectangular_layers_keep_signal_and_gradient() -> None:
    """Widths up and down: entries have variance sigma_w^2 / fan-in, so q and chi do not see the widths."""
    torch.manual_seed(0)
    widths = [200, 100, 150, 120, 180, 150]
    net = nn.Sequential(*[m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())])
    for ensemble in ("orthogonal", "gaussian"):
        report = critical_init_(net, torch.randn(64, 200), ensemble=ensemble)
        q = np.array([s.q for s in report.after])
        assert np.all(np.abs(q / report.layers[0].q - 1) < 0.4)
        gains = [layer.sigma_w for layer in report.layers[1:]]
        assert np.ptp(gains) / np.mean(gains) < 0.03


def test_two_activations_in_one_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 96), nn.Tanh(),
        nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 3),
    )  # fmt: skip
    report = critical_init_(net, torch.randn(64, 96))
    for signal, layer in zip(report.after[:-1], report.layers[:-1], strict=True):
        assert signal.q == pytest.approx(layer.q, rel=0.4)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_behind_a_dropout_the_network_is_critical_with_it(activation: type[nn.Module], seed: int) -> None:
    torch.manual_seed(seed)
    hidden = [m for _ in range(20) for m in (nn.Linear(128, 128), activation(), nn.Dropout(0.2))]
    net = nn.Sequential(*hidden, nn.Linear(128, 10))
    report = critical_init_(net, torch.randn(64, 128))
    assert report.chi_after == pytest.approx(1.0, abs=0.05)  # 1 / (1 - p) = 1.25 if the dropout were forgotten


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


@pytest.mark.parametrize("ensemble", ["orthogonal", "gaussian"])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_block_of_a_trunk_adds_its_share_and_no_less(seed: int, ensemble: str) -> None:
    """Three blocks, a change of width, nine blocks: each multiplies the mean square by 1 + 1/12."""
    torch.manual_seed(seed)
    rows = [nn.Sequential(*[Block(width) for _ in range(count)]) for width, count in ((200, 3), (160, 9))]
    net = nn.Sequential(nn.Linear(64, 200), rows[0], nn.Linear(200, 160), rows[1], nn.Linear(160, 4))
    x = torch.randn(64, 64)
    report = critical_init_(net, x, ensemble=ensemble)
    assert len(report.branches) == 12
    for place, count in ((1, 3), (3, 9)):
        before, after = (float(net[:k](x).detach().square().mean()) for k in (place, place + 1))
        assert after / before == pytest.approx((1 + 1 / 12) ** count, rel=0.12)


def test_state_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8), nn.BatchNorm1d(8)).train()
    net[3].eval()
    net(torch.randn(4, 8)).sum().backward()
    gradient = net[0].weight.grad.clone()
    running = net[4].running_mean.clone()
    critical_init_(net, torch.randn(4, 8))
    assert torch.equal(net[0].weight.grad, gradient)
    assert torch.equal(net[4].running_mean, running)
    assert net.training
    assert not net[3].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_signals_are_the_gradients_of_autograd() -> None:
    torch.manual_seed(0)
    net = mlp(depth=3, width=12, inputs=5).double()
    x = torch.randn(1, 5, dtype=torch.float64)
    found = signals(net, x, seed=3)
    u = torch.randn(1, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u = (u / u.norm())[0]
    for i, signal in enumerate(found):
        rows = Jacobian(net, x, str(2 * i), None).adjoint().matmat(u[:, None])
        assert signal.gradient == pytest.approx(float(rows.norm()), rel=1e-9)
    assert chi_per_layer(found) == pytest.approx((found[0].gradient / found[-1].gradient) ** (2 / 3), rel=1e-12)


def test_signals_of_many_samples_are_their_mean_squares() -> None:
    torch.manual_seed(0)
    net = mlp(depth=3, width=12, inputs=5).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    u = torch.randn(6, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u = u / u.norm(dim=1, keepdim=True)  # one direction for each sample
    for i, signal in enumerate(signals(net, x, seed=3)):
        J = [Jacobian(net, x, str(2 * i), None, sample=n).adjoint() for n in range(6)]
        squares = [float(J[n].matmat(u[n][:, None]).square().sum()) for n in range(6)]
        assert signal.gradient == pytest.approx(np.mean(squares) ** 0.5, rel=1e-9)
        assert signal.q == pytest.approx(float(net[: 2 * i + 1](x).detach().square().mean()), rel=1e-6)


def test_the_first_layer_of_a_measured_chain_is_described_critical() -> None:
    torch.manual_seed(1)
    net = mlp(depth=12, width=100)
    critical_init_(net, torch.randn(64, 64))
    chain = describe_between(net, torch.randn(1, 64), "0", "22")
    assert all(layer.ensemble == "orthogonal" for layer in chain.layers[1:])


def test_bad_input_is_refused_before_anything_is_drawn() -> None:
    net = mlp(depth=3)
    before = net[2].weight.clone()
    for error, match, call in (
        ((ValueError, TypeError), "orthogonal", lambda: critical_init_(net, torch.ones(2, 64), ensemble="uniform")),
        (ValueError, "not both", lambda: critical_init_(net, torch.ones(2, 64), sigma_b=0.1, q_star=0.1)),
        (ValueError, "sigma_b", lambda: critical_init_(net, torch.ones(2, 64), sigma_b=-1.0)),
        (ValueError, "zero or not finite", lambda: critical_init_(net, torch.zeros(2, 64))),
        (ValueError, "not finite", lambda: critical_init_(net, torch.full((2, 64), float("nan")))),
        (ValueError, "empty", lambda: critical_init_(net, torch.ones(0, 64))),
        (ValueError, "relu", lambda: critical_init_(mlp(nn.ReLU, 3), torch.ones(2, 64), sigma_b=0.3)),
        (ValueError, "frozen", lambda: critical_init_(mlp(depth=3).requires_grad_(False), torch.ones(2, 64))),
    ):
        with pytest.raises(error, match=match):
            call()
    assert torch.equal(net[2].weight, before)


def test_complex_weights_are_refused_by_name() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.head = nn.Linear(8, 16, dtype=torch.cfloat), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inside(x.to(torch.cfloat)).abs())

    model = Complex()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(TypeError, match="'inside' is complex"):
        critical_init_(model, torch.randn(4, 8))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
