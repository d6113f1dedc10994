"""How the mean square of a signal travels through an architecture: what every activation sees."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from torch_rmt.measures import PointMass
from torch_rmt.measures.base import SpectralMeasure
from torch_rmt.theory.activation import Activation, Number
from torch_rmt.theory.architecture import Architecture, Layer, Normalisation, Residual
from torch_rmt.theory.mean_field import mean_field
from torch_rmt.theory.moments import is_scale_invariant, mean_value, second_moment, slope_moment


@dataclass(frozen=True)
class Signal:
    """What arrives at a layer's activation.

    Fields:
        q: its mean square.
        divisor: what the normalisation divided the mean square by; one without normalisation.
    """

    q: float
    divisor: float = 1.0


@dataclass(frozen=True)
class BlockSignal(Signal):
    """What arrives at the activation of a block's sum, and what its layers see.

    Fields:
        branch, shortcut: the signals of their layers.
        incoming: mean square of x.
    """

    branch: tuple[Signal, ...] = ()
    shortcut: tuple[Signal, ...] = ()
    incoming: float = 1.0


@dataclass
class _Stream:
    """What runs along a chain: mean square, mean over the units, mean square of each unit's mean over a batch.

    `second` is None while nothing is known of it.
    """

    second: float | None
    mean: float = 0.0
    common: float = 0.0
    needs_mean: bool = False
    fixed_points: dict[tuple[int, float, float, float], float] = field(default_factory=dict)

    def through(self, activation: Activation | None, q: float, keep: float) -> None:
        """Behind an activation that sees N(0, q), and a dropout."""
        self.second = q / keep
        if activation is not None:
            self.second = second_moment(activation, q) / keep
            self.mean = mean_value(activation, q) if self.needs_mean else 0.0
            self.common = self.mean**2

    def split(self) -> _Stream:
        """The same stream for another way."""
        return _Stream(self.second, self.mean, self.common, self.needs_mean, self.fixed_points)


def propagate(architecture: Architecture) -> tuple[Signal, ...]:
    """The signal at every layer and block: what it states, else the recursion from the input, else its fixed point.

    v <- E phi(sqrt(q) Z)^2 / (1 - dropout) after a layer with pre-activation q = gain v + sigma_b^2; a normalisation
    divides by q less the square of the mean that it takes off, and passes on one. A block adds the mean squares of its
    shortcut and its branch, and twice the product of their means over the units: weights drawn for the branch leave
    no other correlation.

    Raises:
        ValueError: a layer whose length map has no finite fixed point, or a block, when no input moment is given; a
            normalisation with nothing to normalise.
    """
    return _along(architecture.layers, _Stream(architecture.input_second_moment, needs_mean=_needs_mean(architecture)))


def pre_activation_moments(architecture: Architecture) -> tuple[float, ...]:
    """q of every layer, as the activation sees it: one behind a normalisation; else as in `propagate`."""
    return tuple(signal.q for signal in propagate(architecture))


def weight_gain(layer: Layer) -> float:
    """Mean square out over mean square in of the weights alone."""
    if isinstance(layer.ensemble, SpectralMeasure):
        return layer.ensemble.mean * layer.n_in / layer.n_out
    return float(layer.sigma_w) ** 2


def gradient_gain(layer: Layer | Residual, signal: Signal) -> float:
    """chi: by what a layer or block multiplies the mean square of a gradient that is in general position to it.

    gain E phi'^2 / (divisor (1 - dropout)); the gain of a block's sum is that of its shortcut plus that of its branch.
    """
    gain = sum_gain(layer, signal) if isinstance(layer, Residual) else weight_gain(layer)
    slope = 1.0 if layer.activation is None else slope_moment(layer.activation, signal.q)
    return gain * slope / signal.divisor / (1.0 - float(layer.dropout))


def branch_gain(block: Residual, signal: Signal) -> float:
    """E|A|^2 of a block's branch, A its Jacobian."""
    inside = signal.branch if isinstance(signal, BlockSignal) else ()
    return float(np.prod([gradient_gain(part, one) for part, one in zip(block.branch, inside, strict=True)]))


def sum_gain(block: Residual, signal: Signal) -> float:
    """E|B + A|^2 of a block, B its shortcut and A the Jacobian of its branch."""
    beside = signal.shortcut if isinstance(signal, BlockSignal) else ()
    shortcut = float(np.prod([gradient_gain(part, one) for part, one in zip(block.shortcut, beside, strict=True)]))
    return shortcut + branch_gain(block, signal)


def _needs_mean(architecture: Architecture) -> bool:
    return any(isinstance(layer, Residual) or layer.normalisation is not None for layer in architecture.layers)


def _along(layers: tuple[Layer | Residual, ...], stream: _Stream) -> tuple[Signal, ...]:
    return tuple(_at_layer(layer, stream) if isinstance(layer, Layer) else _at_block(layer, stream) for layer in layers)


def _at_layer(layer: Layer, stream: _Stream) -> Signal:
    incoming, keep = stream.second, 1.0 - float(layer.dropout)
    if layer.normalisation is not None and incoming is None:
        # As if a like layer came before.
        incoming = 1.0 if layer.activation is None else second_moment(layer.activation, 1.0) / keep
        stream.mean = 0.0 if layer.activation is None else mean_value(layer.activation, 1.0)
        stream.common = stream.mean**2
    gain, identity = weight_gain(layer), isinstance(layer.ensemble, PointMass)
    if layer.q is not None:
        q = float(layer.q)
    elif incoming is not None:
        q = gain * incoming + layer.sigma_b**2
    else:
        key = id(layer.activation), float(layer.sigma_w), float(layer.sigma_b), keep
        if key not in stream.fixed_points:
            stream.fixed_points[key] = _fixed_point(layer)
        q = stream.fixed_points[key]
    stream.mean = stream.mean * gain**0.5 if identity else 0.0
    stream.common = gain * stream.common + layer.sigma_b**2
    signal = _normalised(q, layer.normalisation, stream, f"layer {layer.name!r}")
    if incoming is not None or layer.q is not None or layer.normalisation is not None:
        stream.through(layer.activation, signal.q, keep)
    return signal


def _at_block(block: Residual, stream: _Stream) -> BlockSignal:
    if stream.second is None:
        raise ValueError(
            f"how much residual block {block.name!r} adds depends on the signal that it meets, which grows from block "
            "to block: give the architecture's input_second_moment."
        )
    incoming, branch, shortcut = stream.second, stream.split(), stream.split()
    inside, beside = _along(block.branch, branch), _along(block.shortcut, shortcut)
    if branch.second is None or shortcut.second is None:
        raise ValueError(f"the signal of residual block {block.name!r} is not known.")
    cross = 2.0 * branch.mean * shortcut.mean
    q = branch.second + shortcut.second + cross if block.q is None else float(block.q)
    stream.mean, stream.common = branch.mean + shortcut.mean, branch.common + shortcut.common + cross
    signal = _normalised(q, block.normalisation, stream, f"residual block {block.name!r}")
    stream.through(block.activation, signal.q, 1.0 - float(block.dropout))
    return BlockSignal(signal.q, signal.divisor, inside, beside, incoming)


def _normalised(q: float, normalisation: Normalisation | None, stream: _Stream, name: str) -> Signal:
    """The signal behind a normalisation, the stream's means with it."""
    if normalisation is None:
        return Signal(float(q))
    taken_off = {"batch": stream.common, "layer": stream.mean**2, "rms": 0.0}[normalisation]
    divisor = q - taken_off
    if divisor <= 1e-12 * q:
        raise ValueError(f"{name} leaves nothing to normalise: its pre-activations do not vary.")
    if normalisation == "rms":
        stream.mean, stream.common = stream.mean / divisor**0.5, stream.common / divisor
    else:
        stream.mean, stream.common = 0.0, 0.0 if normalisation == "batch" else stream.common / divisor
    return Signal(1.0, float(divisor))


def _fixed_point(layer: Layer) -> Number:
    if layer.activation is None or is_scale_invariant(layer.activation):
        return 1.0  # the slopes do not depend on it
    q = mean_field(layer.activation, layer.sigma_w, layer.sigma_b, dropout=layer.dropout).q_star
    if not np.isfinite(q):
        raise ValueError(
            f"the signal of layer {layer.name!r} ({layer.activation.name}, sigma_w = {layer.sigma_w:g}) grows without "
            "end: give input_second_moment or the layer's q, or a smaller sigma_w."
        )
    return q
