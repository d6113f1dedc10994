"""`Architecture`: all that theory may know of a network; no torch in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch_rmt.measures.base import SpectralMeasure
from torch_rmt.theory.activation import Activation

Ensemble = Literal["gaussian", "orthogonal"]


@dataclass(frozen=True)
class Layer:
    """One map h -> activation(W h + b), W of shape (n_out, n_in).

    Fields:
        n_in, n_out: fan-in and fan-out.
        activation: None for a layer without one.
        sigma_w: W has entry variance sigma_w^2 / n_in (Gaussian), or is sigma_w times a Haar orthogonal matrix.
        sigma_b: standard deviation of the biases.
        ensemble: "gaussian", "orthogonal", or the measured law of W^T W.
        q: mean square of the pre-activation where it is known; None leaves it to the mean-field recursion.
        name: the module's name where the layer was read off a module.
    """

    n_in: int
    n_out: int
    activation: Activation | None
    sigma_w: float
    sigma_b: float = 0.0
    ensemble: Ensemble | SpectralMeasure = "gaussian"
    q: float | None = None
    name: str = ""


@dataclass(frozen=True)
class Architecture:
    """A chain of layers.

    Fields:
        layers: from the input to the output.
        input_second_moment: mean square of the entries of the network's input; None puts every pre-activation at
            the fixed point q* of its layer.
        unknown: names of the modules that were not understood, with the reason; a prediction states them.
    """

    layers: tuple[Layer, ...]
    input_second_moment: float | None = None
    unknown: tuple[str, ...] = ()
