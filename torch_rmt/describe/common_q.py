"""One q for the layers that share an activation: the law of many unlike layers takes long to solve."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from torch_rmt.theory import Activation, Layer, Residual
from torch_rmt.theory.gaussian import gaussian_rule


def pool_q(chain: list[Layer | Residual]) -> tuple[Layer | Residual, ...]:
    """Give layers of one activation a common q, that of their mean log E phi'^2, where it keeps scale and spread.

    Layers inside blocks and the blocks themselves are pooled with the others.

    The spread of the Jacobian's spectrum is sum_l (E phi'^4 / (E phi'^2)^2 - 1), and one more for a Gaussian weight.
    Where one q for all would move it by over a tenth, layers share theirs within a factor of 4 only: the law of many
    unlike layers takes long to solve.
    """
    layers = list(_flat(chain))
    pooled: dict[int, float] = {}
    gaussian = sum(isinstance(layer, Layer) and layer.ensemble == "gaussian" for layer in layers)
    for activation in {layer.activation.name: layer.activation for layer in layers if layer.activation}.values():
        measured = sorted(
            (layer.q, i)
            for i, layer in enumerate(layers)
            if layer.q and layer.activation is activation and layer.normalisation is None
        )
        groups = [measured] if measured else []
        if measured:
            q = _common_q(activation, [q for q, _ in measured])
            spread = math.fsum(_slope_moments(activation, q)[1] for q, _ in measured)
            if abs(len(measured) * _slope_moments(activation, q)[1] - spread) > 0.1 * (spread + gaussian):
                bins = {int(math.log(q / measured[0][0], 4)) for q, _ in measured}
                groups = [[m for m in measured if int(math.log(m[0] / measured[0][0], 4)) == k] for k in bins]
        for group in groups:
            q = _common_q(activation, [q for q, _ in group])
            for _, i in group:
                pooled[i] = q
    places = iter(range(len(layers)))
    return tuple(_with_q(item, places, pooled) for item in chain)


def _flat(chain: Iterable[Layer | Residual]) -> Iterator[Layer | Residual]:
    for item in chain:
        yield item
        if isinstance(item, Residual):
            yield from _flat((*item.branch, *item.shortcut))


def _with_q(item: Layer | Residual, places: Iterator[int], pooled: dict[int, float]) -> Layer | Residual:
    """The item with its q exchanged, and so inside of it, the places counted as in `_flat`."""
    q = pooled.get(next(places), item.q)
    if isinstance(item, Layer):
        return replace(item, q=q)
    branch = tuple(_with_q(inner, places, pooled) for inner in item.branch)
    shortcut = tuple(replace(inner, q=pooled.get(next(places), inner.q)) for inner in item.shortcut)
    return replace(item, q=q, branch=branch, shortcut=shortcut)


def _common_q(activation: Activation, measured: list[float]) -> float:
    """The q whose log E phi'^2 is the mean of that of the measured ones."""
    slopes = {q: _slope_moments(activation, q)[0] for q in measured}
    mean = math.fsum(slopes[q] for q in measured) / len(measured)
    low, high = math.log(min(slopes, key=slopes.__getitem__)), math.log(max(slopes, key=slopes.__getitem__))
    for _ in range(30):
        middle = (low + high) / 2
        below = _slope_moments(activation, math.exp(middle))[0] < mean
        low, high = (middle, high) if below else (low, middle)
    return math.exp((low + high) / 2)


def _slope_moments(activation: Activation, q: float) -> tuple[float, float]:
    """(log E phi'^2, E phi'^4 / (E phi'^2)^2 - 1)."""
    nodes, weights = gaussian_rule(q, activation.kinks)
    squares = np.asarray(activation.derivative(nodes)) ** 2
    first = max(float(weights @ squares), 1e-300)
    return math.log(first), float(weights @ squares**2) / first**2 - 1
