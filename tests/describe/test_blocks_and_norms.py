"""Residual networks and norms: read as blocks, measured and predicted as one and the same map."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.describe.nets import (
    Gpt,
    HandWrittenLayerNorm,
    HandWrittenRms,
    PreActivationResNet,
    ResidualPerceptron,
    ResNet,
    identity,
)
from torch_rmt.describe import SlopePart, default_ends, describe, describe_between, parts_between
from torch_rmt.diagnose.batch_statistics import with_batch_statistics
from torch_rmt.measures import Discrete, PointMass
from torch_rmt.operators import Jacobian
from torch_rmt.theory import Layer, Residual

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(4))
TOKENS = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(5))


def shape(items) -> list[object]:
    """Names and activations; a block as (branch, shortcut)."""
    return [
        (shape(item.branch), shape(item.shortcut))
        if isinstance(item, Residual)
        else (item.name.split(".")[-1], item.normalisation, item.activation and item.activation.name)
        for item in items
    ]


@pytest.mark.parametrize(
    ("norm", "kind"),
    [(nn.LayerNorm, "layer"), (nn.RMSNorm, "rms"), (HandWrittenRms, "rms"), (HandWrittenLayerNorm, "layer")],
)
def test_pre_norm_blocks_are_read(norm, kind: str) -> None:
    torch.manual_seed(0)
    net = ResidualPerceptron(depth=3, norm=norm)
    assert default_ends(net, X) == ("stem", "blocks.2")
    block = [("norm", kind, None), ("up", None, "gelu"), ("down", None, None)]
    found = describe_between(net, X, "stem", "blocks.2")
    assert shape(found.layers) == [(block, [])] * 3
    assert [item.name for item in found.layers] == ["blocks.0", "blocks.1", "blocks.2"]
    whole = describe(net, X)
    assert shape(whole.layers) == [("stem", None, None), *[(block, [])] * 3, ("norm", kind, None), ("head", None, None)]
    assert whole.unknown == ()


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, HandWrittenLayerNorm])
def test_a_norms_own_weights_are_read(norm) -> None:
    net = ResidualPerceptron(depth=1, norm=norm)
    weight = next(iter(net.blocks[0].norm.parameters()))
    nn.init.constant_(weight, 1.5)
    (block,) = describe_between(net, X, "stem", "blocks.0").layers
    assert isinstance(block.branch[1].ensemble, PointMass)
    assert block.branch[1].ensemble.mean == pytest.approx(2.25, rel=0.02)  # 1/n for a standard deviation over n - 1
    nn.init.uniform_(weight, 0.0, 3.0)
    (block,) = describe_between(net, X, "stem", "blocks.0").layers
    law = block.branch[1].ensemble
    assert isinstance(law, Discrete)
    assert law.mean == pytest.approx(float(weight.detach().square().mean()), rel=0.02)
    assert law.variance == pytest.approx(float(weight.detach().square().var()), rel=0.1)


@pytest.mark.parametrize("factor", [0.25, torch.full((64,), 0.25)], ids=["number", "vector"])
def test_a_scaled_branch_is_a_smaller_last_weight(factor) -> None:
    net = ResidualPerceptron(depth=2, norm=identity, activation=nn.Tanh, factor=factor)
    for block in describe_between(net, X, "stem", "norm").layers:
        up, down = block.branch
        root = math.sqrt(float(net.get_submodule(down.name).weight.detach().double().square().mean()) * 64)
        assert down.sigma_w == pytest.approx(root / 4, rel=1e-6)
        assert up.activation.name == "tanh"
    silent = ResidualPerceptron(depth=2, factor=torch.zeros(64))
    assert shape(describe(silent, X).layers) == [
        ("stem", "layer", None), ("head", None, None),
    ]  # fmt: skip


@pytest.mark.parametrize("option", ["A", "B"])
@pytest.mark.parametrize("training", [True, False])
def test_a_resnet_is_read_stage_by_stage(option: str, training: bool) -> None:
    torch.manual_seed(0)
    net = ResNet(8, 2, option).train(training)
    assert default_ends(net, IMAGES) == ("bn1", "layer1")
    kind = "batch" if training else None
    found = describe_between(net, IMAGES, "bn1", "layer1")
    block = [("conv1", kind, "relu"), ("conv2", kind, None)]
    assert shape(found.layers) == [
        ("source", None, "relu"),
        *[entry for i in range(2) for entry in ((block, []), (f"{i}", None, None))],
    ]
    for item in found.layers[2::2]:  # behind a sum, what the slopes were; a sum of what is >= 0 opens over half
        assert item.ensemble.atoms()[1][0] == 1.0
        assert item.ensemble.mean > 0.55
    if option == "A":
        with pytest.raises(ValueError, match=r"layer2.0: joins 2 branches.*__getitem__"):
            describe_between(net, IMAGES, "bn1", "layer2")
    else:
        first = describe_between(net, IMAGES, "layer1", "layer2").layers[0]
        assert shape([first]) == [(block, [("0 reads", None, None), ("0", kind, None)])]
        assert (first.n_in, first.n_out) == (8 * 64, 16 * 16)


def test_a_pre_activation_resnet_is_read() -> None:
    net = PreActivationResNet(8, 3)
    assert default_ends(net, IMAGES) == ("stem", "blocks")
    block = [("bn1", "batch", "relu"), ("conv1", "batch", "relu"), ("conv2", None, None)]
    assert shape(describe_between(net, IMAGES, "stem", "blocks").layers) == [(block, [])] * 3


def test_attention_is_unknown_and_the_perceptron_beside_it_is_not() -> None:
    net = Gpt()
    assert default_ends(net, TOKENS) == ("h.0.ln_2", "h.0.mlp")
    assert shape(describe_between(net, TOKENS, "h.0.ln_2", "h.0.mlp").layers) == [
        ("0", None, "gelu"),
        ("2", None, None),
    ]
    with pytest.raises(ValueError, match=r"joins 2 branches.*attention"):
        describe_between(net, TOKENS, "h.0", "h.1")
    assert any("attention" in text for text in describe(net, TOKENS).unknown)


def test_a_way_into_a_branch_or_out_of_it_is_refused() -> None:
    net = ResidualPerceptron(depth=2)
    with pytest.raises(ValueError, match="lies inside of a branch"):
        describe_between(net, X, "blocks.0.up", "blocks.1")
    inside = describe_between(net, X, "blocks.0.norm", "blocks.0.down")
    assert shape(inside.layers) == [("up", None, "gelu"), ("down", None, None)]


def test_places_of_unlike_size_are_no_common_factor() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    x = torch.randn(1, 5, 8) * torch.tensor([1.0, 1.0, 1.0, 1.0, 9.0])[:, None]
    with pytest.raises(ValueError, match="places of unlike size"):
        describe_between(net, x, "0", "2")


def dense(module: nn.Module, x: Tensor, source: str | None = None, target: str | None = None) -> Tensor:
    jacobian = Jacobian(module, x, source, target)
    return jacobian.matmat(torch.eye(jacobian.shape[1], dtype=jacobian.dtype)).double()


MAPS = {
    "resnet": (lambda: ResNet(4, 2), IMAGES, "bn1", "layer1"),
    "inside a branch": (lambda: ResNet(4, 2), IMAGES, "layer1.0.conv1", "layer1.0.bn2"),
    "projection": (lambda: ResNet(4, 1, "B"), IMAGES, "layer1", "layer2"),
    "pre-activation": (lambda: PreActivationResNet(4, 2), IMAGES, "stem", "norm"),
    "perceptron": (lambda: ResidualPerceptron(16, 2, HandWrittenLayerNorm, nn.Tanh, 0.3), X[:, :16], None, None),
    "transformer": (lambda: Gpt(16), TOKENS, "h.0.ln_2", "h.0.mlp"),
}


@pytest.mark.parametrize(("name", "training"), [*((name, True) for name in MAPS), ("resnet", False)])
def test_norms_and_blocks_multiply_to_the_jacobian(name: str, training: bool) -> None:
    torch.manual_seed(0)
    make, inputs, source, target = MAPS[name]
    net = make().train(training)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    net, x = with_batch_statistics(net, inputs), inputs[:1]
    product = None
    for part in parts_between(net, x, source, target):
        factor = part.slopes.diag() if isinstance(part, SlopePart) else dense(part.module, part.example)
        product = factor if product is None else factor @ product
    torch.testing.assert_close(product, dense(net, x, source, target), rtol=1e-4, atol=1e-5)


def test_batch_statistics_are_those_of_training_and_the_model_keeps_its_own() -> None:
    torch.manual_seed(0)
    net = ResNet(4, 1, "B").double()
    x = IMAGES.double()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    fixed = with_batch_statistics(net, x)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert {id(p) for p in fixed.parameters()} == {id(p) for p in net.parameters()}
    torch.testing.assert_close(fixed(x[:1]), net(x)[:1], rtol=1e-9, atol=1e-9)
    # Against the derivative with all statistics free: the sample moves them by one part in the batch.
    gaps = []
    for repeats in (1, 4):
        batch = torch.cat([x, *[x + 0.1 * torch.randn_like(x) for _ in range(repeats - 1)]])
        held = dense(with_batch_statistics(net, batch), x[:1], "bn1", "layer1")
        free = Jacobian(net, batch, "bn1", "layer1", sample=0).matmat(torch.eye(held.shape[1], dtype=torch.float64))
        gaps.append(float((held - free).norm() / held.norm()))
    assert gaps[0] < 0.2
    assert gaps[1] == pytest.approx(gaps[0] / 4, rel=0.5)
    evaluated = net.eval()
    assert with_batch_statistics(evaluated, x) is evaluated


def test_what_stands_for_no_batch_is_refused() -> None:
    norm = nn.BatchNorm1d(8)
    twice = nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8), norm)
    with pytest.raises(ValueError, match="called 2 times"):
        with_batch_statistics(twice, torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"batch of one|more than 1 value"):
        describe_between(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), IMAGES[:1], None, "1")
    assert np.isfinite(describe(twice.eval(), torch.randn(4, 8)).layers[0].sigma_w)


def test_layers_of_a_chain_with_norms_between_weight_and_activation() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 16), nn.RMSNorm(16), nn.ReLU())
    layers = describe_between(net, X[:, :16], None, None).layers
    assert shape(layers) == [("0", "layer", "tanh"), ("3", "rms", "relu")]
    assert all(isinstance(layer, Layer) and layer.q is not None for layer in layers)
