"""Torch functions and modules as activations that theory can take: value, derivative and kinks in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from types import BuiltinFunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_rmt.theory import Activation, activation_names, as_activation

_GRID = np.linspace(-7.3, 7.3, 401)


def from_torch(function: Callable[[Tensor], Tensor], name: str | None = None) -> Activation:
    """Wrap an elementwise torch function; value and derivative in float64, the derivative by autograd.

    A function that equals one that theory knows by name becomes that one, with its closed forms.
    """

    def value(h: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            out = function(torch.tensor(np.asarray(h, dtype=np.float64)))
        return np.asarray(out.numpy(), dtype=np.float64)

    def derivative(h: np.ndarray) -> np.ndarray:
        with torch.enable_grad():
            t = torch.tensor(np.asarray(h, dtype=np.float64), requires_grad=True)
            (slope,) = torch.autograd.grad(function(t).sum(), t)
        return np.asarray(slope.numpy(), dtype=np.float64)

    here = value(_GRID)
    for known, there in _known_values().items():
        if np.allclose(here, there, rtol=1e-9, atol=1e-11):
            return as_activation(known)
    numeric = as_activation(value)  # checks it, finds the kinks
    label = name or str(getattr(function, "__name__", type(function).__name__))
    try:
        slopes = derivative(_GRID)
    except RuntimeError:
        return Activation(label, value, numeric.derivative, numeric.kinks)
    away = np.abs(_GRID[:, None] - np.array([*numeric.kinks, np.inf])).min(axis=1) > 1e-3
    if not np.allclose(slopes[away], numeric.derivative(_GRID)[away], rtol=1e-4, atol=1e-4):
        label += ", its own backward"
    return Activation(label, value, derivative, numeric.kinks)


@cache
def _known_values() -> dict[str, np.ndarray]:
    return {name: as_activation(name).value(_GRID) for name in activation_names()}


@as_activation.register
def _(activation: nn.Module) -> Activation:
    # A copy: the measured network keeps its type and its mode.
    return from_torch(copy.deepcopy(activation).double().eval(), type(activation).__name__)


@as_activation.register
def _(activation: BuiltinFunctionType) -> Activation:
    return from_torch(activation) if (activation.__module__ or "").startswith("torch") else _by_trial(activation)


def _by_trial(function: Callable[..., Any]) -> Activation:
    return as_activation.dispatch(object)(function)
