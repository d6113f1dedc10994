"""`describe` reads real modules: every kind of layer found, nothing guessed, nothing disturbed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_rmt.describe import default_ends, describe, describe_between, from_torch, record
from torch_rmt.measures import PointMass
from torch_rmt.operators import Jacobian
from torch_rmt.theory import as_activation, jacobian_spectrum

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(7))


def mlp(activation: type[nn.Module] = nn.Tanh, depth: int = 3, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), activation())]
    return nn.Sequential(*layers, nn.Linear(width, 5))


class Functional(nn.Module):
    """No activation modules, weights as bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.randn(16, 16) / 4) for _ in range(3)])
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for w in self.w:
            h = functional.linear(x, w)
            x = h * torch.sigmoid(1.702 * h)
        return self.out(x)


class Nested(nn.Module):
    """Blocks in blocks, one activation module called everywhere, an in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Identity()) for _ in range(3)])
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.act(block(x))
        return self.head(x.reshape(len(x), 4, 4))


class WithBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.b(torch.tanh(self.a(self.norm(x))))
        return self.head(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def names(architecture) -> list[tuple[str, str | None]]:
    return [(layer.name, layer.activation and layer.activation.name) for layer in architecture.layers]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Tanh, "tanh"), (nn.ReLU, "relu"), (nn.GELU, "gelu"), (nn.SiLU, "silu"), (nn.Hardtanh, "hard_tanh"),
        (nn.ELU, "elu"), (nn.SELU, "selu"), (nn.Softplus, "softplus"), (nn.LeakyReLU, "leaky_relu"),
        (nn.Mish, "mish"), (nn.Sigmoid, "sigmoid"), (nn.Hardswish, "hard_swish"), (nn.ReLU6, "relu6"),
    ],
)  # fmt: skip
def test_activation_modules_become_theorys_own(module: type[nn.Module], name: str) -> None:
    assert [n for _, n in names(describe(mlp(module), X))] == [name] * 3 + [None]
    assert as_activation(module()) is as_activation(name)


@pytest.mark.parametrize("function", [torch.tanh, torch.relu, torch.erf, torch.sin], ids=lambda f: f.__name__)
def test_torch_functions_are_activations(function) -> None:
    assert as_activation(function) is as_activation(function.__name__)


def test_prelu_and_other_modules_keep_their_kinks_and_derivative() -> None:
    prelu = as_activation(nn.PReLU(init=0.3))
    assert prelu.kinks == (0.0,)
    np.testing.assert_allclose(prelu.derivative(np.array([-2.0, 2.0])), [0.3, 1.0], rtol=1e-6)
    h = np.linspace(-3, 3, 50)
    celu = as_activation(nn.CELU(2.0))
    np.testing.assert_allclose(celu.derivative(h), np.where(h > 0, 1, np.exp(h / 2)), rtol=1e-12)
    assert celu.kinks == (0.0,)  # its second derivative jumps


def test_array_callables_still_go_to_theory() -> None:
    assert as_activation(lambda h: np.maximum(h, -1.0)).kinks == (-1.0,)


def test_a_straight_through_gradient_is_said() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.tanh(x)

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    activation = from_torch(lambda h: Double.apply(h) * 1.0001, "odd")
    assert "its own backward" in activation.name


def test_sequential_functional_nested_and_tied() -> None:
    assert names(describe(mlp(), X)) == [("0", "tanh"), ("2", "tanh"), ("4", "tanh"), ("6", None)]
    found = describe(Functional(), X)
    assert [n for n, _ in names(found)] == ["w.0", "w.1", "w.2", "out"]
    quick_gelu = found.layers[0].activation
    h = np.linspace(-4, 4, 33)
    np.testing.assert_allclose(quick_gelu.value(h), h / (1 + np.exp(-1.702 * h)), rtol=1e-12, atol=1e-15)
    nested = describe(Nested(), X)
    assert names(nested) == [
        ("blocks.0.0", "relu"), ("blocks.1.0", "relu"), ("blocks.2.0", "relu"), ("head.1", None),
    ]  # fmt: skip
    assert nested.unknown == ()
    assert [layer.name for layer in describe(Tied(), X).layers] == ["one", "one"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sigmas_are_those_that_were_drawn(seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 100))
    nn.init.normal_(net[0].weight, 0, 1.3 / math.sqrt(300))
    nn.init.normal_(net[0].bias, 0, 0.2)
    nn.init.orthogonal_(net[2].weight, gain=0.9)
    first, second = describe(net, torch.randn(5, 300)).layers
    assert (first.n_in, first.n_out, first.ensemble) == (300, 200, "gaussian")
    # relative error of a standard deviation from N draws: sqrt(1 / (2 N)); four of them
    assert first.sigma_w == pytest.approx(1.3, rel=4 / math.sqrt(2 * 60_000))
    assert first.sigma_b == pytest.approx(0.2, rel=4 / math.sqrt(2 * 200))
    assert second.ensemble == "orthogonal"
    assert second.sigma_w == pytest.approx(0.9, rel=1e-5)


def test_input_second_moment_is_measured() -> None:
    assert describe(mlp(), 3 * X).input_second_moment == pytest.approx(9 * float(X.square().mean()), rel=1e-6)


def cnn(mode: str = "circular") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, padding_mode=mode), nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode), nn.Tanh(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip


def test_cnn_layers_count_channels_times_positions() -> None:
    net, x = cnn(), torch.randn(2, 1, 8, 8)
    found = describe(net, x)
    assert names(found) == [("0", "tanh"), ("2", None)]
    assert [(layer.n_in, layer.n_out) for layer in found.layers] == [(64, 512), (512, 512)]
    assert found.layers[1].sigma_w == pytest.approx(
        math.sqrt(72 * float(net[2].weight.detach().double().square().mean())), rel=1e-6
    )
    assert any("pools" in text for text in found.unknown)
    assert any("6: outside" in text for text in found.unknown)
    zero = describe(cnn("zeros"), x)
    assert any("zero padding" in text for text in zero.unknown)
    assert default_ends(net, x) == ("0", "2")


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv2d(3, 5, 3, padding=1), (1, 3, 6, 7)),
        (nn.Conv2d(4, 6, (3, 5), padding="same", dilation=2, groups=2), (1, 4, 9, 8)),
        (nn.Conv1d(2, 3, 4, padding=2, stride=3), (1, 2, 11)),
        (nn.Conv3d(1, 2, 3, padding=(1, 0, 2), stride=(1, 2, 2)), (1, 1, 4, 5, 6)),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (1, 2, 5, 5)),
    ],
    ids=["padded", "dilated and grouped", "strided", "three dimensions", "circular"],
)
def test_taps_on_zero_padding_are_counted(conv: nn.Module, shape: tuple[int, ...]) -> None:
    """Against the matrix of the convolution with all weights one: its share of entries that are not zero."""
    nn.init.ones_(conv.weight)
    use = record(conv, torch.randn(shape)).weights[0]
    jacobian = Jacobian(conv, torch.randn(shape))
    dense = jacobian.matmat(torch.eye(jacobian.shape[1]))
    assert use.kept == pytest.approx(float((dense != 0).sum()) / (dense.shape[0] * use.fan_in), rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_zero_padding_is_in_the_mean_of_the_law(seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(*[m for _ in range(4) for m in (nn.Conv2d(24, 24, 3, padding=1), nn.Tanh())])
    x = torch.randn(1, 24, 5, 5)
    law = jacobian_spectrum(describe_between(net, x, "0", "6")).measure
    jacobian = Jacobian(net, x, "0", "6")
    mean = float(jacobian.matmat(torch.eye(600)).double().square().sum()) / 600
    assert mean == pytest.approx(law.mean, rel=0.2)  # without the share of taps: 2.4 times too large


def test_delta_orthogonal_convolutions_are_orthogonal() -> None:
    net = cnn()
    with torch.no_grad():
        net[2].weight.zero_()
        net[2].weight[:, :, 1, 1] = 1.2 * nn.init.orthogonal_(torch.empty(8, 8))
    layer = describe(net, torch.randn(2, 1, 8, 8)).layers[1]
    assert layer.ensemble == "orthogonal"
    assert layer.sigma_w == pytest.approx(1.2, rel=1e-5)


def test_what_is_not_understood_is_named_with_the_reason() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.out = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return functional.softmax(self.out(self.mix(x, x, x)[0] @ torch.eye(16)), -1)

    text = "; ".join(describe(Attention(), torch.randn(2, 3, 16)).unknown)
    assert "mix: attention" in text
    assert "matmul" in text
    assert "softmax" in text


def test_active_dropout_is_a_field_where_it_follows_the_activation_and_a_note_elsewhere() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.5), nn.Dropout(0.2), nn.Linear(16, 2))
    found = describe(net, X)
    assert [layer.dropout for layer in found.layers] == [pytest.approx(0.6), 0.0]
    assert found.unknown == ()
    assert describe(net.eval(), X).layers[0].dropout == 0.0
    before = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 2))
    assert "dropout is active" in describe(before, X).unknown[0]
    assert describe(before, X).layers[0].dropout == 0.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_law_with_dropout_is_the_jacobians(seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(200, 200), nn.Tanh(), nn.Dropout(0.1))])
    x = torch.randn(1, 200)
    chain = describe_between(net, x, "0", "9")
    assert [layer.dropout for layer in chain.layers] == pytest.approx([0.1, 0.1, 0.1, 0.0])
    law = jacobian_spectrum(chain).measure
    jacobian = Jacobian(net, x, "0", "9")
    values = torch.linalg.svdvals(jacobian.matmat(torch.eye(200)).double()).square().numpy()
    at_zero = sum(mass for place, mass in law.atoms() if place == 0.0)
    assert at_zero == pytest.approx(0.1)
    assert float((values < 1e-10 * values.max()).mean()) == pytest.approx(0.1, abs=0.06)
    assert values.mean() == pytest.approx(law.mean, rel=0.15)  # without the dropout: 27 % less


ENDS = [("0", "4"), ("1", "4"), ("0", "5"), ("1", "5"), (None, "2"), ("2", None), (None, None)]


@pytest.mark.parametrize(("source", "target"), ENDS)
def test_the_chain_between_two_names_is_the_jacobians(source: str | None, target: str | None) -> None:
    """Multiplying the layers' own weights and slopes along the chain gives the measured Jacobian."""
    net = mlp(nn.Tanh, 3).double()
    x = X[:1].double()
    chain = describe_between(net, x, source, target)
    values: dict[str, Tensor] = {}
    h = x
    for name, module in net.named_children():
        h = values[name] = module(h)
    matrix = torch.eye(16, dtype=torch.float64)
    at = values[source] if source is not None else x
    for layer in chain.layers:
        if isinstance(layer.ensemble, PointMass):
            assert layer.q == pytest.approx(float(at.detach().square().mean()), rel=0.7)  # one for all layers
        else:
            linear = net.get_submodule(layer.name)
            at, matrix = linear(at), linear.weight @ matrix
        if layer.activation is not None:
            slope = torch.from_numpy(layer.activation.derivative(at.detach().numpy()[0]))
            at, matrix = torch.tanh(at), slope[:, None] * matrix
        assert layer.n_out == matrix.shape[0]
    jacobian = Jacobian(net, x, source, target)
    torch.testing.assert_close(jacobian.matmat(torch.eye(16, dtype=torch.float64)), matrix)


def test_default_ends_take_the_longest_run_of_one_width() -> None:
    assert default_ends(mlp(depth=4), X) == ("0", "6")
    net = nn.Sequential(
        nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 12), nn.Tanh(),
        nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2),
    )  # fmt: skip
    assert default_ends(net, X) == ("4", "8")
    assert default_ends(nn.Linear(16, 2), X) == (None, None)
    assert default_ends(WithBlock(), X) == (None, None)  # all of it was understood, and the sum has no name


def test_calls_of_a_reused_module_are_told_apart() -> None:
    net = Nested()
    assert [layer.name for layer in describe_between(net, X, "act#1", "act#3").layers] == [
        "blocks.1.0",
        "blocks.2.0",
    ]
    with pytest.raises(ValueError, match="called 3 times"):
        describe_between(net, X, "act", "head")


def test_nothing_is_disturbed() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))
    net(X).sum().backward()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    gradients = [p.grad.clone() for p in net.parameters()]
    state = torch.get_rng_state()
    describe(net, X)
    default_ends(net, X)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
    assert all(m.training for m in net.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


def test_inputs_of_other_kinds() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    assert names(describe(Two(), (X, 2.0))) == [("a", "tanh"), ("b", None)]
    assert names(describe(Two(), {"x": X})) == [("a", "tanh"), ("b", None)]
    with torch.inference_mode():
        frozen = X + 0
    assert names(describe(Two(), frozen)) == [("a", "tanh"), ("b", None)]


def test_bad_input_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match="'2'"):
        describe(mlp(), X, "22", "4")
    with pytest.raises(ValueError, match="empty"):
        describe(mlp(), torch.zeros(0, 16))
    with pytest.raises(TypeError, match="Module"):
        describe(lambda x: x, X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no weights"):
        describe(nn.Sequential(nn.Tanh()), X)
    with pytest.raises(ValueError, match="way to the target"):
        describe(mlp(), X, "4", "0")

    class Words(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "logits"

    with pytest.raises(TypeError, match="holds no tensor"):
        describe(Words(), X)


class Split(nn.Module):
    """Tensors taken apart in a call that gives several, as attention does with queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.into(x).view(-1, 3, 16).permute(1, 0, 2)
        d, e = (a * b + c).chunk(2, -1)
        return self.out(torch.cat([d, e], -1))


def test_calls_that_give_several_tensors_are_said_not_to_be_understood() -> None:
    described = describe(Split(), X)
    assert any("joins" in line or "elementwise" in line for line in described.unknown)
    assert default_ends(Split(), X[:1]) == (None, None)
