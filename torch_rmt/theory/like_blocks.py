"""Many residual blocks that differ only in the signal they meet, as few: a Gauss rule along the signal."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from torch_rmt.measures import PointMass
from torch_rmt.theory.architecture import Layer, Residual
from torch_rmt.theory.like_layers import representative_moments
from torch_rmt.theory.moments import is_scale_invariant
from torch_rmt.theory.propagation import BlockSignal, Signal

_DEGREE = 7  # of the polynomials that the signals are along the leading one, in logarithms
_SMOOTH = 1e-8  # what the blocks' signals may be off from them
# For `representative_moments`; found by tuning: 3e-7 of the distribution function on 16 blocks of ReLU and tanh whose
# signal grows to 4 and to 9 times the first.
_RADIUS, _TOLERANCE = 2.0, 1e-6

Numbers = Float[np.ndarray, " signals"]


def gathered(pairs: list[tuple[Residual, BlockSignal]]) -> list[tuple[Residual, BlockSignal, float]]:
    """(block, signal, count): blocks of one structure by the Gauss rule of `representative_moments` over their signals.

    The signals of such blocks, as they come one after the other, are smooth functions of one of them, and so is log S.
    Blocks whose signals are no such functions, as measured ones, stay as they are; equal ones are counted.
    """
    groups: dict[Hashable, list[tuple[Residual, BlockSignal]]] = {}
    for block, signal in pairs:
        groups.setdefault(_structure(replace(block, activation=None)), []).append((block, signal))
    result: list[tuple[Residual, BlockSignal, float]] = []
    for group in groups.values():
        # What stands behind the sum is no matter of the block's own law.
        block = replace(group[0][0], activation=None)
        bare = [replace(signal, divisor=1.0) for _, signal in group]
        logs = np.log([[max(x, 1e-300) for x in _numbers(block, signal)] for signal in bare])
        for row, count in _rule(logs):
            values = iter(np.exp(row))
            signal = _rebuilt(block, group[0][1], values)
            result.append((block, signal, count))
    return result


def _rule(logs: Float[np.ndarray, "blocks signals"]) -> list[tuple[Numbers, float]]:
    rows, counts = np.unique(np.round(logs, 12), axis=0, return_counts=True)
    listed = [(row, float(count)) for row, count in zip(rows, counts, strict=True)]
    if len(rows) <= 3:
        return listed
    spread = np.ptp(rows, axis=0)
    leading = rows[:, int(np.argmax(spread))]
    low, high = leading.min(), leading.max()
    place = (2.0 * leading - low - high) / (high - low)
    degree = min(_DEGREE, len(np.unique(leading)) - 2)
    smooth = np.polynomial.Chebyshev.fit
    fits = [smooth(place, rows[:, k], degree, domain=[-1.0, 1.0]) for k in range(rows.shape[1])]
    if max(float(np.abs(fit(place) - rows[:, k]).max()) for k, fit in enumerate(fits)) > _SMOOTH:
        return listed
    # In units of the least, so that log(1 + q) is as good as log q.
    every = np.repeat(np.exp(leading - low), counts)
    nodes = representative_moments(tuple(float(x) for x in every), radius=_RADIUS, tolerance=_TOLERANCE)
    places = [(2.0 * (np.log(q) + low) - low - high) / (high - low) for q, _ in nodes]
    return [
        (np.array([float(fit(x)) for fit in fits]), count) for x, (_, count) in zip(places, nodes, strict=True)
    ]  # fmt: skip


def _structure(layer: Layer | Residual) -> Hashable:
    """What makes two blocks alike but for their signals."""
    common: tuple[Hashable, ...] = id(layer.activation), float(layer.dropout), layer.normalisation
    if isinstance(layer, Residual):
        inner = tuple(_structure(part) for part in layer.branch), tuple(_structure(part) for part in layer.shortcut)
        return (*common, *inner)
    ensemble: Hashable = layer.ensemble if isinstance(layer.ensemble, str) else id(layer.ensemble)
    if isinstance(layer.ensemble, PointMass):
        ensemble = layer.ensemble.location
    return (*common, layer.n_in, layer.n_out, float(layer.sigma_w), ensemble)


def _numbers(layer: Layer | Residual, signal: Signal) -> Iterator[float]:
    """All that the law of a block depends on in its signal, in order."""
    if isinstance(layer, Residual) and isinstance(signal, BlockSignal):
        for part, one in zip((*layer.branch, *layer.shortcut), (*signal.branch, *signal.shortcut), strict=True):
            yield from _numbers(part, one)
    if layer.activation is not None:
        yield 1.0 if is_scale_invariant(layer.activation) else signal.q
    yield signal.divisor


def _rebuilt(block: Residual, like: BlockSignal, values: Iterator[float]) -> BlockSignal:
    """The signal with these numbers in the order of `_numbers`."""

    def one(layer: Layer | Residual, signal: Signal) -> Signal:
        if isinstance(layer, Residual) and isinstance(signal, BlockSignal):
            return _rebuilt(layer, signal, values)
        q = next(values) if layer.activation is not None else signal.q
        return Signal(float(q), float(next(values)))

    branch = tuple(one(layer, signal) for layer, signal in zip(block.branch, like.branch, strict=True))
    shortcut = tuple(one(layer, signal) for layer, signal in zip(block.shortcut, like.shortcut, strict=True))
    q = next(values) if block.activation is not None else like.q
    return BlockSignal(float(q), float(next(values)), branch, shortcut, like.incoming)
