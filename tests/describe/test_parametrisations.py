"""Weights that are computed in the forward pass, weights that were orthogonal once, networks inside of wrappers."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from torch_rmt import critical_init_, describe
from torch_rmt.diagnose import diagnose, freeness_report, jacobian_report
from torch_rmt.theory import Layer

X16 = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
Y4 = torch.arange(12) % 4
KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


def net(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    made = KINDS[kind]
    return nn.Sequential(
        made(nn.Linear(24, 32)), nn.Tanh(), made(nn.Linear(32, 32)), nn.Tanh(), made(nn.Linear(32, 32)), nn.Tanh(),
        nn.Linear(32, 5),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_that_is_used_is_the_one_described(kind: str) -> None:
    model = net(kind).eval()
    found = describe(model, torch.randn(8, 24))
    assert [layer.name for layer in found.layers] == ["0", "2", "4", "6"]
    for layer in found.layers:
        weight = model.get_submodule(layer.name).weight.detach().double()
        assert isinstance(layer, Layer)
        assert layer.sigma_w == pytest.approx(math.sqrt(float(weight.square().mean()) * weight.shape[1]), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_measured_and_not_drawn(kind: str) -> None:
    model, x = net(kind), torch.randn(16, 24)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report, gap = jacobian_report(model, x), freeness_report(model, x)
    assert report.prediction is not None, report.verdict
    assert gap.prediction is not None, gap.verdict
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    made = critical_init_(model, x)
    assert "0, 2, 4: its weight is computed from others" in made.verdict
    assert made.verdict.startswith("1 layer drawn")
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith("6")}
    assert all(torch.equal(value, state[name]) for name, value in kept.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_orthogonal_weights_stay_so_in_half_precision_and_in_the_first_steps(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(32, 32), nn.Tanh())], nn.Linear(32, 10))
    x, y = torch.randn(64, 32), torch.randint(0, 10, (64,))
    critical_init_(model, x)

    def ensembles() -> set[object]:
        return {layer.ensemble for layer in describe(model, x).layers}

    assert ensembles() == {"orthogonal"}
    assert {layer.ensemble for layer in describe(copy.deepcopy(model).bfloat16(), x.bfloat16()).layers} == {
        "orthogonal"
    }
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    before = jacobian_report(model, x)
    for _ in range(5):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    assert ensembles() == {"orthogonal"}
    after = jacobian_report(model, x)
    first, last = before.distance("kolmogorov"), after.distance("kolmogorov")
    assert first is not None
    assert last is not None
    assert last.value < first.value + 0.15, "five small steps build next to no structure"


@pytest.mark.parametrize("shape", [(8, 8), (32, 32), (10, 400), (400, 10), (64, 48)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gaussian_and_uniform_weights_are_not_taken_for_orthogonal(seed: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(*shape), nn.Tanh(), nn.Linear(shape[1], shape[0]))
    nn.init.normal_(model[2].weight)
    assert {layer.ensemble for layer in describe(model, torch.randn(2, shape[0])).layers} == {"gaussian"}


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["data parallel", "compiled"])
def test_a_network_inside_of_a_wrapper(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(16, 16), nn.Tanh())], nn.Linear(16, 4))
    batch, loss, what = (X16, Y4), nn.functional.cross_entropy, ("jacobian", "freeness", "fisher")
    plain, found = (diagnose(model, batch, loss, what=what) for model in (inner, wrap(inner)))
    assert str(found) == str(plain)
    assert [layer.name for layer in critical_init_(wrap(inner), X16).layers] == ["0", "2", "4", "6"]
