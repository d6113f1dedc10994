"""Real residual and normalised networks against their laws, and drawn critical."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.describe.nets import Gpt, HandWrittenRms, PreActivationResNet, ResidualPerceptron, ResNet, identity
from torch_rmt.compare import compare
from torch_rmt.diagnose import freeness_report, jacobian_report
from torch_rmt.init import critical_init_


def pre_norm(width: int) -> nn.Module:
    return ResidualPerceptron(width, 4, nn.LayerNorm, nn.ReLU)


def scaled_by_hand(width: int) -> nn.Module:
    return ResidualPerceptron(width, 3, HandWrittenRms, nn.Tanh, 0.5)


NETWORKS = {
    "pre-norm perceptron": (pre_norm, (32, 96)),
    "scaled, hand-written norm": (scaled_by_hand, (32, 96)),
    "ResNet-20": (lambda width: ResNet(width, 3, "A"), (4, 8)),
    "pre-activation ResNet": (lambda width: PreActivationResNet(width, 3), (8,)),
    "transformer": (lambda width: Gpt(width, depth=1, length=8), (32,)),
}


def inputs_of(net: nn.Module) -> torch.Tensor:
    if isinstance(net, Gpt):
        return torch.randint(0, 50, (2, 8))
    return torch.randn(8, net.stem.in_features) if isinstance(net, ResidualPerceptron) else torch.randn(32, 1, 6, 6)


CASES = [(name, 0) for name in NETWORKS]
CASES += [(name, seed) for name in ("pre-norm perceptron", "ResNet-20") for seed in (1, 2)]


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_the_jacobian_has_the_predicted_law_and_free_parts(name: str, seed: int) -> None:
    make, widths = NETWORKS[name]
    distances = []
    for width in widths if seed == 0 else widths[:1]:
        torch.manual_seed(seed)
        net = make(width)
        x = inputs_of(net)
        report = jacobian_report(net, x)
        assert report.prediction is not None, report.verdict
        assert report.agrees, report.verdict
        mean = report.spectrum.moment(1)[0]
        assert mean == pytest.approx(report.prediction.measure.mean, rel=0.5)
        distances.append(report.distance("kolmogorov").value)
        if seed == 0:
            free = freeness_report(net, x)
            assert free.agrees, free.verdict
    assert distances[-1] < 0.08 if seed == 0 else distances[-1] < 0.2


@pytest.mark.parametrize("seed", [0])
def test_a_law_without_the_blocks_would_be_refused(seed: int) -> None:
    """The same measurement beside the product of the branches' weights alone: the test above can fail."""
    torch.manual_seed(seed)
    net = pre_norm(64)
    plain = nn.Sequential(*[m for block in net.blocks for m in (block.norm, block.up, block.act, block.down)])
    x = torch.randn(1, 64)
    whole, wrong = jacobian_report(net, x), jacobian_report(plain, x, None, None)
    assert compare(whole.spectrum, wrong.prediction).agrees is False
    assert compare(wrong.spectrum, whole.prediction).agrees is False


def test_inside_of_a_branch_no_advice_is_given_about_gradients() -> None:
    torch.manual_seed(0)
    net = Gpt(32)
    report = jacobian_report(net, torch.randint(0, 50, (2, 16)))
    assert "chi" not in report.facts
    assert "critical_init_" not in report.verdict
    blocks = jacobian_report(ResidualPerceptron(32, 3, nn.LayerNorm, nn.ReLU), torch.randn(1, 32))
    assert blocks.facts["depth"] == blocks.facts["blocks"] == 3
    assert "over 3 blocks" in blocks.verdict


@pytest.mark.parametrize(
    ("seed", "activation", "ensemble"),
    [(0, nn.ReLU, "orthogonal"), (1, nn.ReLU, "gaussian"), (2, nn.Tanh, "orthogonal")],
)
def test_fifty_residual_blocks_keep_signal_and_gradient(seed: int, activation: type[nn.Module], ensemble: str) -> None:
    torch.manual_seed(seed)
    net = ResidualPerceptron(96, 50, identity, activation)
    for block in net.blocks:  # as if each weight were drawn critical by itself: 2^50
        for layer in (block.up, block.down):
            nn.init.normal_(layer.weight, std=(2.0 if activation is nn.ReLU else 1.0) ** 0.5 / math.sqrt(96))
    x = torch.randn(32, 96)
    report = critical_init_(net, x, ensemble=ensemble)
    assert len(report.branches) == 50
    assert report.left_alone == ()
    out: list[float] = []
    handle = net.norm.register_forward_hook(lambda _m, _i, o: out.append(float(o.detach().square().mean())))
    net(x)
    handle.remove()
    assert 0.8 * math.e <= out[0] / report.after[0].q <= math.e * 1.2  # 1 + 1/50 fifty times
    gradients = [s.gradient for s in report.after]
    assert 0.5 < gradients[0] / gradients[-1] < math.e  # the square grows by at most e
    if activation is nn.ReLU:
        assert report.before[-2].q > 1e6 * report.before[0].q


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_with_norms_signals_and_gradients_stay_too(norm: type[nn.Module]) -> None:
    torch.manual_seed(0)
    report = critical_init_(ResidualPerceptron(64, 20, norm, nn.GELU), torch.randn(32, 64))
    gradients = np.array([s.gradient for s in report.after])
    assert 0.3 < gradients[0] / gradients[-1] < 3
    assert all(0.1 < s.q < 10 for s in report.after if "up" in s.name)


def test_what_a_norm_takes_off_is_not_drawn_and_what_attention_needs_neither() -> None:
    torch.manual_seed(0)
    net = ResNet(8, 1, "B")
    before = {name: p.clone() for name, p in net.named_parameters()}
    report = critical_init_(net, torch.randn(8, 1, 8, 8))
    assert [layer.name for layer in report.layers] == ["fc"]
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters() if "fc" not in name)
    text = "; ".join(report.left_alone)
    assert "layer1.0.conv1: its scale is taken off by the norm" in text
    assert "layer1.0.bn2: sets the share of its residual branch" in text
    gpt = Gpt(32)
    embedding = gpt.wte.weight.clone()
    report = critical_init_(gpt, torch.randint(0, 50, (4, 16)))
    assert torch.equal(gpt.wte.weight, embedding)
    assert {layer.name for layer in report.layers} == {f"h.{i}.mlp.{k}" for i in (0, 1) for k in (0, 2)}
    assert any(text.startswith("wte: its weight is also used by embedding") for text in report.left_alone)
    assert report.branches == ("h.0.mlp.2", "h.1.mlp.2")
    factors = critical_init_(ResidualPerceptron(32, 3, factor=0.1), torch.randn(8, 32))
    assert factors.branches == ()
    assert "Left alone: blocks.0, blocks.1, blocks.2: sets the share" in factors.verdict
