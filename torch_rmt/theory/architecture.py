"""`Architecture`: all that theory may know of a network; no torch in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from torch_rmt.measures.base import SpectralMeasure
from torch_rmt.theory.activation import Activation, Number, as_activation
from torch_rmt.theory.mean_field import checked_dropout, checked_sigma

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
