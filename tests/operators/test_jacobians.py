"""Jacobians between places, and all layers in one sweep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.operators.module_kinds import MODULE_KINDS, Calls
from torch_rmt.operators import (
    Jacobian,
    activation_slopes,
    dense,
    input_to_layers,
    layers_to_output,
    partial_jacobian_norms,
    single_layers,
)

FLOAT_INPUT = [
    k for k in MODULE_KINDS if k not in {"tied_gpt_ignored_tokens", "embedding_bag", "two_inputs", "batchnorm_train"}
]
pytestmark = pytest.mark.filterwarnings("ignore")


def _deep(seed: int) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    act = nn.Tanh()
    parts = [nn.Linear(4, 6), act, nn.Linear(6, 5), act, nn.LayerNorm(5), nn.Linear(5, 3)]
    return nn.Sequential(*parts).double(), torch.randn(3, 4, dtype=torch.float64)


@pytest.mark.parametrize("kind", FLOAT_INPUT)
def test_jacobian_is_the_derivative_of_the_output_by_the_input(kind: str) -> None:
    torch.manual_seed(sum(map(ord, kind)))
    model, inputs, _, _ = MODULE_KINDS[kind]()
    model.eval()
    x = inputs[:1]
    J = Jacobian(model, x)
    columns = []
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        saved = {name: b.clone() for name, b in model.named_buffers()}
        for i in range(x.numel()):
            step = torch.zeros(x.numel(), dtype=x.dtype)
            step[i] = 1e-5
            both = []
            for sign in (1, -1):
                both.append(model(x + sign * step.reshape(x.shape)).flatten())
                for name, b in model.named_buffers():
                    b.copy_(saved[name])
            columns.append((both[0] - both[1]) / 2e-5)
    reference = torch.stack(columns, dim=1)
    if kind == "numpy_in_forward":  # the scale is detached, which differences do not know
        scale = float(x.abs().mean())
        h = model.a(x / scale)
        reference = model.b.weight @ torch.diag(1 - torch.tanh(h)[0] ** 2) @ model.a.weight / scale
    if kind == "moving_average_buffer":  # so is the mean
        reference = dense(J)
    assert J.shape == reference.shape
    assert float((dense(J) - reference).norm()) < 1e-6 * max(float(reference.norm()), 1e-6)
    # <u, J v> = <J^T u, v> for three pairs at once
    U, V = torch.randn(J.shape[0], 3, dtype=x.dtype), torch.randn(J.shape[1], 3, dtype=x.dtype)
    torch.testing.assert_close((U * J.matmat(V)).sum(0), (J.adjoint().matmat(U) * V).sum(0), rtol=1e-6, atol=1e-9)
    assert J.adjoint().adjoint() is J


@pytest.mark.parametrize("seed", [0, 1])
def test_chain_rule_between_named_modules(seed: int) -> None:
    net, x = _deep(seed)
    one = x[:1]
    whole = dense(Jacobian(net, one))
    parts = dense(Jacobian(net, one, "2")) @ dense(Jacobian(net, one, "0", "2")) @ dense(Jacobian(net, one, None, "0"))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(dense(Jacobian(net, one, "act#2".replace("act", "1"), "4")).shape, torch.Size((5, 5)))
    torch.testing.assert_close(dense(Jacobian(net, one, "2", "2")), torch.eye(5, dtype=x.dtype))


def test_one_sample_of_a_batch_under_batchnorm_in_train_mode() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double().train()
    x = torch.randn(5, 3, dtype=torch.float64)
    J = dense(Jacobian(net, x, sample=2))
    full = torch.autograd.functional.jacobian(lambda t: net(t)[2], x)[:, 2]
    torch.testing.assert_close(J, full, rtol=1e-10, atol=1e-12)
    for sample in (0, 4):  # between named places, too, with the rest of the batch around it
        middle = torch.autograd.functional.jacobian(lambda h, i=sample: net[1:3](h)[i], net[0](x))[:, sample]
        torch.testing.assert_close(dense(Jacobian(net, x, "0", "2", sample=sample)), middle, rtol=1e-10, atol=1e-12)


def test_one_sample_without_a_batch_and_no_columns_at_all() -> None:
    net, x = _deep(0)
    torch.testing.assert_close(dense(Jacobian(net, x[0])), dense(Jacobian(net, x[:1])))
    J = Jacobian(net, x[:1])
    assert J.matmat(torch.zeros(4, 0, dtype=x.dtype)).shape == (3, 0)
    assert J.adjoint().matmat(torch.zeros(3, 0, dtype=x.dtype)).shape == (4, 0)


@pytest.mark.parametrize("seed", [0, 1])
def test_one_sweep_equals_the_jacobians_one_by_one(seed: int) -> None:
    net, x = _deep(seed)
    forward, backward = input_to_layers(net, x), layers_to_output(net, x)
    assert list(forward) == ["0", "1#1", "2", "1#2", "4", "5"]
    for name in forward:
        for i in range(3):
            torch.testing.assert_close(
                forward[name][i], dense(Jacobian(net, x[i : i + 1], None, name)), rtol=1e-10, atol=1e-12
            )
            torch.testing.assert_close(
                backward[name][i], dense(Jacobian(net, x[i : i + 1], name)), rtol=1e-10, atol=1e-12
            )
    # from a layer in the middle, and the product of single layers
    middle = input_to_layers(net, x, ["5"], source="2")["5"]
    torch.testing.assert_close(middle, backward["2"], rtol=1e-10, atol=1e-12)
    assert list(input_to_layers(net, x, ["1#2"])) == ["1#2"]
    torch.testing.assert_close(input_to_layers(net, x, ["1#2"])["1#2"], forward["1#2"])
    single = single_layers(net, x, ["0", "2", "4", "5"])
    torch.testing.assert_close(single["5"] @ single["4"] @ single["2"] @ single["0"], forward["5"])


def test_sweep_to_the_loss_is_the_gradient_by_the_activations() -> None:
    net, x = _deep(0)
    y = torch.randint(0, 3, (3,))
    rows = layers_to_output(net, x, ["2"], loss=nn.functional.cross_entropy, targets=y)["2"]
    hidden = net[:3](x).detach().requires_grad_()
    nn.functional.cross_entropy(net[3:](hidden), y).backward()
    torch.testing.assert_close(rows[:, 0], hidden.grad)


@pytest.mark.parametrize("kind", ["cnn_maxpool", "batchnorm_eval", "transformer_encoder", "lstm", "checkpointed"])
def test_sweeps_on_real_modules_agree_with_the_whole_jacobian(kind: str) -> None:
    torch.manual_seed(3)
    model, inputs, _, _ = MODULE_KINDS[kind]()
    model.eval()
    last = list(input_to_layers(model, inputs).values())[-1]
    for i in range(inputs.shape[0]):
        torch.testing.assert_close(last[i], dense(Jacobian(model, inputs[i : i + 1])), rtol=1e-9, atol=1e-11)


def test_slopes_are_the_derivatives_of_elementwise_modules() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Softmax(1), nn.Linear(4, 4), nn.ReLU(), nn.Dropout()).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    slopes = activation_slopes(net.eval(), x)
    assert list(slopes) == ["1", "4"]
    torch.testing.assert_close(slopes["1"], 1 - torch.tanh(net[0](x)) ** 2)
    torch.testing.assert_close(slopes["4"], (net[:4](x) > 0).double())
    with pytest.raises(ValueError, match="not elementwise"):
        activation_slopes(net, x, ["2"])


def test_slopes_of_one_module_called_twice_are_each_of_its_own_call() -> None:
    net, x = _deep(0)
    slopes = activation_slopes(net, x)
    assert list(slopes) == ["1#1", "1#2"]
    torch.testing.assert_close(slopes["1#1"], 1 - net[:2](x) ** 2)
    torch.testing.assert_close(slopes["1#2"], 1 - net[:4](x) ** 2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_partial_norms_are_the_squared_norms_and_the_sketch_covers_them(seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20)).double()
    x = torch.randn(4, 40, dtype=torch.float64)
    jacobians = input_to_layers(net, x)
    truth = torch.stack([j.square().sum((1, 2)).mean() / j.shape[1] for j in jacobians.values()]).float()
    exact = partial_jacobian_norms(net, x, probes=40)
    assert exact.exact
    torch.testing.assert_close(exact.values, truth)
    sketch = partial_jacobian_norms(net, x, probes=24, generator=torch.Generator().manual_seed(seed))
    assert not sketch.exact
    assert bool(((sketch.values - truth).abs() < 4.5 * sketch.errors).all())
    assert bool((sketch.errors < 0.3 * truth).all())


def test_errors_of_partial_norms_are_standard_errors() -> None:
    """Of an exact norm those of the mean over samples; of a sketch such that z-scores have unit spread."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20)).double()
    x = torch.randn(4, 40, dtype=torch.float64)
    exact = partial_jacobian_norms(net, x, probes=40)
    for name, error in zip(exact.layers, exact.errors, strict=True):
        norms = input_to_layers(net, x)[name].square().mean((1, 2)) * 40
        torch.testing.assert_close(error, (norms.std() / 2).float())
    z = []
    for seed in range(20):
        sketch = partial_jacobian_norms(net, x, probes=24, generator=torch.Generator().manual_seed(seed))
        z.append((sketch.values - exact.values) / sketch.errors)
    scores = torch.stack(z)
    assert len(scores.unique()) == scores.numel()  # the generator that is given is the one that draws
    assert 0.7 < float(scores.square().mean().sqrt()) < 1.4


def test_samples_that_mix_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    for sweep in (input_to_layers, layers_to_output):
        with pytest.raises(ValueError, match="depend on one another"):
            sweep(net, torch.randn(5, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": "layr"}, ValueError, "nearest: 'layer'"),
        ({"target": "unused"}, ValueError, "not called"),
        ({"target": "twice"}, ValueError, r"twice#1.*twice#2"),
        ({"target": "twice#3"}, ValueError, "called only 2 times"),
        ({"source": "head", "target": "layer"}, ValueError, "exchange the two"),
        ({"inputs": torch.randn(2, 3)}, ValueError, "pass inputs"),
        ({"inputs": torch.randn(0, 3)}, ValueError, "empty"),
        ({"inputs": torch.zeros(1, 3, dtype=torch.long)}, TypeError, "name the module whose output"),
        ({"sample": 1}, ValueError, "not in the batch"),
        ({"sample": -1}, ValueError, "not in the batch"),
    ],
)
def test_bad_input_says_what_to_do(arguments: dict, error: type[Exception], message: str) -> None:
    net = Calls(
        lambda m, x: m.head(m.twice(m.twice(m.layer(x)))),
        layer=nn.Linear(3, 3),
        twice=nn.Linear(3, 3),
        unused=nn.Linear(3, 3),
        head=nn.Linear(3, 2),
    )
    with pytest.raises(error, match=message):
        Jacobian(net, **{"inputs": torch.randn(1, 3), **arguments})
