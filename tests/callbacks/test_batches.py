from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.callbacks.runs import Classifier, mlp
from torch_rmt.callbacks.batches import find_loss, find_model, split_pair
from torch_rmt.callbacks.blame import failing_module, first_not_finite
from torch_rmt.callbacks.lightning_base import defines_forward


def test_pairs_are_split() -> None:
    assert split_pair((1, 2), mlp()) == (1, 2)
    assert split_pair([1, 2], mlp()) == (1, 2)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (torch.ones(2), "a Tensor"),
        ({"x": 1, "y": 2}, r"keys \['x', 'y'\], without 'labels'"),
        ((1, 2, 3), "a tuple of 3"),
        (None, "NoneType"),
    ],
)
def test_other_batches_are_refused_with_the_remedy(batch: object, said: str) -> None:
    with pytest.raises(TypeError, match=f"{said}.*batch=lambda"):
        split_pair(batch, mlp())


@pytest.mark.parametrize("name", ["loss_fn", "criterion", "loss_func", "loss_function", "loss"])
def test_losses_are_found_by_name(name: str) -> None:
    module = nn.Module()
    setattr(module, name, nn.MSELoss())
    assert find_loss(module) is getattr(module, name)


def test_numbers_called_loss_are_none() -> None:
    module = nn.Module()
    module.loss = 0.3
    assert find_loss(module) is None


def test_model_is_the_module_with_forward_or_its_only_network() -> None:
    module = Classifier(mlp())
    assert defines_forward(module)
    assert find_model(module, None, has_forward=True) is module
    assert find_model(module, None, has_forward=False) is module.net
    assert find_model(module, "net.2", has_forward=True) is module.net[2]


def test_no_choice_is_made_between_two_networks() -> None:
    module = nn.Module()
    module.generator, module.critic = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"2 children with parameters.*'generator', 'critic'"):
        find_model(module, None, has_forward=False)
    with pytest.raises(ValueError, match=r"no module 'genrator'.*'generator'"):
        find_model(module, "genrator", has_forward=False)


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("no")


def test_the_innermost_failing_layer_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh(), Broken()))
    with pytest.raises(ArithmeticError) as caught:
        model(torch.ones(1, 2))
    assert failing_module(caught.value, model) == "1.1"
    assert failing_module(caught.value, nn.Linear(2, 2)) is None


def test_the_first_layer_with_nan_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    assert first_not_finite(model, lambda: model(torch.ones(1, 2))) is None
    assert first_not_finite(model, lambda: model(torch.full((1, 2), torch.nan))) == "0"
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    assert first_not_finite(model, lambda: model(torch.ones(1, 2))) == "2.weight"
    assert not model[0]._forward_hooks
