"""`Architecture`: all that theory may know of a network; no torch in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from torch_rmt.measures import PointMass
from torch_rmt.measures.base import SpectralMeasure
from torch_rmt.theory.activation import Activation, Number, as_activation
from torch_rmt.theory.mean_field import checked_dropout, checked_sigma, mean_field
from torch_rmt.theory.moments import is_scale_invariant, mean_value, second_moment

Ensemble = Literal["gaussian", "orthogonal"]
Normalisation = Literal["layer", "rms", "batch"]


def checked_normalisation(normalisation: Normalisation | None) -> None:
    """Raise unless it is one that is known."""
    if normalisation not in (None, "layer", "rms", "batch"):
        raise ValueError(f"normalisation is 'layer', 'rms', 'batch' or None, not {normalisation!r}.")


def checked_mean_square(q: Number | None) -> None:
    """Raise unless q is unknown or a mean square."""
    if q is not None and not (np.isfinite(q) and q >= 0):
        raise ValueError(f"q is a mean square: it must be finite and >= 0, got {q}.")


@dataclass(frozen=True)
class Layer:
    """One map x -> dropout(activation(norm(W x + b))), W of shape (n_out, n_in).

    Fields:
        n_in, n_out: fan-in and fan-out.
        activation: None for a layer without one.
        sigma_w: W has entry variance sigma_w^2 / n_in (Gaussian), or is sigma_w times a Haar orthogonal matrix: for
            n_out <= n_in W W^T = sigma_w^2 I, for n_out > n_in W^T W = sigma_w^2 (n_out / n_in) I, so that the entry
            variance is sigma_w^2 / n_in in every case.
        sigma_b: standard deviation of the biases.
        ensemble: "gaussian", "orthogonal", or the measured law of W^T W; a law carries its own scale, and sigma_w
            then only enters where q is left to the fixed point.
        q: mean square of the pre-activation W x + b where it is known; None leaves it to the mean-field recursion.
        name: the module's name where the layer was read off a module.
        dropout: probability that a unit is dropped after the activation, the others divided by 1 - dropout, as
            torch.nn.Dropout in training mode; one mask is one network.
        normalisation: of W x + b, to mean square one: "layer" and "rms" over the units, "batch" over a large batch of
            inputs that are independent of each other, bias and mean over the batch taken off. A norm that follows an
            activation is a layer of its own with ensemble=PointMass(1.0) and no activation.
    """

    n_in: int
    n_out: int
    activation: Activation | None
    sigma_w: Number
    sigma_b: Number = 0.0
    ensemble: Ensemble | SpectralMeasure = "gaussian"
    q: Number | None = None
    name: str = ""
    dropout: Number = 0.0
    normalisation: Normalisation | None = None

    def __post_init__(self) -> None:
        checked_dropout(self.dropout)
        checked_normalisation(self.normalisation)
        if self.n_in < 1 or self.n_out < 1:
            raise ValueError(f"a layer needs widths of at least 1, got {self.n_in} -> {self.n_out}.")
        checked_sigma("sigma_w", self.sigma_w)
        checked_sigma("sigma_b", self.sigma_b)
        if isinstance(self.ensemble, str) and self.ensemble not in ("gaussian", "orthogonal"):
            raise ValueError(f"ensemble is 'gaussian', 'orthogonal' or a measure, not {self.ensemble!r}.")
        checked_mean_square(self.q)


@dataclass(frozen=True)
class Residual:
    """One block x -> dropout(activation(norm(s(x) + branch(x)))), s the shortcut; s(x) and branch(x) have one size.

    Fields:
        branch: from x to branch(x); a branch may hold blocks itself.
        shortcut: () for the identity; else the layers of a projection.
        activation: of the sum (post-activation networks); None without one.
        q: mean square of what the activation sees, where it is known; None leaves it to the recursion.
        name: the module's name where the block was read off a module.
        dropout: behind the activation, as in `Layer`.
        normalisation: of the sum, in front of the activation (post-norm transformers), as in `Layer`.

    Raises:
        ValueError: an empty branch, widths that do not fit, a negative q.

    Example:
        >>> tanh = as_activation("tanh")
        >>> Residual((Layer(64, 64, tanh, 1.0), Layer(64, 64, None, 0.2))).n_out
        64
    """

    branch: tuple[Layer | Residual, ...]
    shortcut: tuple[Layer, ...] = ()
    activation: Activation | None = None
    q: Number | None = None
    name: str = ""
    dropout: Number = 0.0
    normalisation: Normalisation | None = None

    def __post_init__(self) -> None:
        what = f"residual block {self.name!r}" if self.name else "a residual block"
        if not self.branch:
            raise ValueError(f"{what} needs a branch: x + nothing is x.")
        checked_chain(self.branch)
        checked_chain(self.shortcut)
        for end, first, last in (
            ("takes", self.n_in, self.branch[0].n_in),
            ("gives", self.n_out, self.branch[-1].n_out),
        ):
            if first != last:
                way = "shortcut" if self.shortcut else "identity shortcut"
                raise ValueError(f"{what} does not add up: its {way} {end} {first} values and its branch {last}.")
        checked_dropout(self.dropout)
        checked_normalisation(self.normalisation)
        checked_mean_square(self.q)

    @property
    def n_in(self) -> int:
        """Size of x."""
        return self.shortcut[0].n_in if self.shortcut else self.branch[0].n_in

    @property
    def n_out(self) -> int:
        """Size of the sum."""
        return self.shortcut[-1].n_out if self.shortcut else self.n_in


def checked_chain(layers: Sequence[Layer | Residual]) -> None:
    """Raise unless each takes what the one before gives."""
    for before, after in pairwise(layers):
        if before.n_out != after.n_in:
            raise ValueError(
                f"layers do not fit: {before.name or 'one'} gives {before.n_out} values and "
                f"{after.name or 'the next'} takes {after.n_in}."
            )


def plain_layers(architecture: Architecture) -> tuple[Layer, ...]:
    """The layers of a chain without residual blocks.

    Raises:
        ValueError: a block is in the chain.
    """
    layers = tuple(layer for layer in architecture.layers if isinstance(layer, Layer))
    if len(layers) < len(architecture.layers):
        block = next(layer for layer in architecture.layers if isinstance(layer, Residual))
        raise ValueError(
            f"residual block {block.name!r} is no plain layer, and no formula here covers it: take a stretch without "
            "blocks, or what `jacobian_spectrum` gives."
        )
    return layers


@dataclass(frozen=True)
class Architecture:
    """A chain of layers and residual blocks.

    Fields:
        layers: from the input to the output.
        input_second_moment: mean square of the entries of the network's input; None puts every pre-activation at
            the fixed point q* of its layer.
        unknown: names of the modules that were not understood, with the reason; a prediction states them.
    """

    layers: tuple[Layer | Residual, ...]
    input_second_moment: Number | None = None
    unknown: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("an architecture needs at least one layer.")
        checked_chain(self.layers)
        moment = self.input_second_moment
        if moment is not None and not (np.isfinite(moment) and moment >= 0):
            raise ValueError(f"the input's second moment must be finite and >= 0, got {moment}.")

    @classmethod
    def mlp(
        cls,
        *,
        depth: int,
        width: int,
        activation: object,
        sigma_w: Number,
        sigma_b: Number = 0.0,
        ensemble: Ensemble = "gaussian",
        n_in: int | None = None,
        n_out: int | None = None,
        q: Number | None = None,
        input_second_moment: Number | None = None,
        dropout: Number = 0.0,
        normalisation: Normalisation | None = None,
    ) -> Architecture:
        """`depth` layers of one width, each followed by the activation; n_in and n_out change the two ends.

        Args:
            depth: number of weight matrices.
            width: of every layer.
            activation: a name, an `Activation`, a callable, or None for a linear network.
            sigma_w, sigma_b, ensemble: as in `Layer`.
            n_in: width of the input; `width` if None.
            n_out: width of an extra last layer without activation; no such layer if None.
            q: mean square of every pre-activation; None leaves it to the recursion.
            input_second_moment: as in `Architecture`.
            dropout, normalisation: as in `Layer`; an extra last layer has neither.

        Raises:
            ValueError: depth or a width below one, a negative sigma, an unknown activation.

        Example:
            >>> Architecture.mlp(depth=3, width=100, activation="tanh", sigma_w=1.1).layers[2].n_in
            100
        """
        if depth < 1:
            raise ValueError(f"depth counts the weight matrices: it must be at least 1, got {depth}.")
        phi = None if activation is None else as_activation(activation)
        if phi is not None and phi.name == "linear":
            phi = None
        first = width if n_in is None else n_in
        layers = [
            Layer(
                first if index == 0 else width,
                width,
                phi,
                sigma_w,
                sigma_b,
                ensemble,
                q,
                f"{index}",
                dropout,
                normalisation,
            )
            for index in range(depth)
        ]
        if n_out is not None:
            layers.append(Layer(width, n_out, None, sigma_w, sigma_b, ensemble, None, f"{depth}"))
        return cls(tuple(layers), input_second_moment)


@dataclass(frozen=True)
class Signal:
    """What arrives at a layer's activation.

    Fields:
        q: its mean square.
        divisor: what the normalisation divided the mean square by; one without normalisation.
    """

    q: float
    divisor: float = 1.0


def pre_activation_moments(architecture: Architecture) -> tuple[float, ...]:
    """q of every layer, as the activation sees it: one behind a normalisation; else as in `propagate`."""
    return tuple(signal.q for signal in propagate(architecture))


def propagate(architecture: Architecture) -> tuple[Signal, ...]:
    """The signal at every layer: what the layer states, else the recursion from the input, else its fixed point.

    v <- E phi(sqrt(q) Z)^2 / (1 - dropout) after a layer with pre-activation q = gain v + sigma_b^2; a normalisation
    divides by q less the square of the mean that it takes off, and passes on one.

    Raises:
        ValueError: a layer whose length map has no finite fixed point, when no input moment is given; a
            normalisation with nothing to normalise.
    """
    result: list[Signal] = []
    known: dict[tuple[int, float, float, float], float] = {}
    second, mean = architecture.input_second_moment, 0.0
    layers = plain_layers(architecture)
    needs_mean = any(layer.normalisation is not None for layer in layers)
    for layer in layers:
        incoming, keep = second, 1.0 - float(layer.dropout)
        if layer.normalisation is not None and incoming is None:
            # As if a like layer came before.
            incoming = 1.0 if layer.activation is None else second_moment(layer.activation, 1.0) / keep
            mean = 0.0 if layer.activation is None else mean_value(layer.activation, 1.0)
        gain, identity = _gain(layer), isinstance(layer.ensemble, PointMass)
        if layer.q is not None:
            q = float(layer.q)
        elif incoming is not None:
            q = gain * incoming + layer.sigma_b**2
        else:
            key = id(layer.activation), float(layer.sigma_w), float(layer.sigma_b), keep
            q = known[key] = known[key] if key in known else _fixed_point(layer)
        divisor = 1.0
        if layer.normalisation is None:
            mean = mean * gain**0.5 if identity else 0.0
        else:
            taken_off = 0.0
            if layer.normalisation == "batch":
                taken_off = gain * mean**2 + layer.sigma_b**2
            elif layer.normalisation == "layer" and identity:
                taken_off = gain * mean**2
            divisor = q - taken_off
            if divisor <= 1e-12 * q:
                raise ValueError(f"layer {layer.name!r} leaves nothing to normalise: its pre-activations do not vary.")
            mean = mean * (gain / divisor) ** 0.5 if identity and layer.normalisation == "rms" else 0.0
        normalised = layer.normalisation is not None
        result.append(Signal(1.0 if normalised else float(q), divisor))
        if incoming is not None or layer.q is not None or normalised:
            second = result[-1].q / keep
            if layer.activation is not None:
                second = second_moment(layer.activation, result[-1].q) / keep
                mean = mean_value(layer.activation, result[-1].q) if needs_mean else 0.0
    return tuple(result)


def _gain(layer: Layer) -> float:
    """Mean square out over mean square in of the weights alone."""
    if isinstance(layer.ensemble, SpectralMeasure):
        return layer.ensemble.mean * layer.n_in / layer.n_out
    return float(layer.sigma_w) ** 2


def _fixed_point(layer: Layer) -> float:
    if layer.activation is None or is_scale_invariant(layer.activation):
        return 1.0  # the slopes do not depend on it
    q = mean_field(layer.activation, layer.sigma_w, layer.sigma_b, dropout=layer.dropout).q_star
    if not np.isfinite(q):
        raise ValueError(
            f"the signal of layer {layer.name!r} ({layer.activation.name}, sigma_w = {layer.sigma_w:g}) grows without "
            "end: give input_second_moment or the layer's q, or a smaller sigma_w."
        )
    return q
