"""Maps of networks that are no plain chain: residual branches, normalisation layers, convolutions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from torch_rmt.measures import PointMass
from torch_rmt.theory.activation import Number, as_activation
from torch_rmt.theory.architecture import Architecture, Ensemble, Layer, Normalisation, Residual
from torch_rmt.theory.jacobian import jacobian_spectrum
from torch_rmt.theory.mean_field import checked_sigma
from torch_rmt.theory.moments import mean_value, second_moment, slope_moment
from torch_rmt.theory.prediction import Prediction
from torch_rmt.theory.propagation import branch_gain, propagate


def residual_spectrum(
    activation: object,
    *,
    depth: int,
    width: int,
    sigma_w: Number,
    sigma_b: Number = 0.0,
    scale: Number = 1.0,
    input_second_moment: Number = 1.0,
) -> Prediction:
    """Predict the law of J^T J of x <- x + scale * phi(W x + b), Gaussian W: `depth` `Residual` blocks.

    Scalars: "mean" = prod (1 + c_l), c_l = scale^2 sigma_w^2 E phi'(h_l)^2; "variance" = mean^2 sum (2 c_l + r_l c_l^2)
    / (1 + c_l)^2, r_l = E phi'^4 / (E phi'^2)^2, since a branch with R-diagonal X has the moments of |1 + X|^2 and
    relative variances of free factors add up; "chi", "cumulated_branch" = sum log(1 + c_l), "q_final",
    "largest_eigenvalue", "condition".

    In the limit of many small branches S(u) = exp(-c (1 + 2u)), c the cumulated branch: one number for all activations.
    An activation with a mean adds one outlier to this bulk. For x + W phi(x), x + W_2 phi(W_1 x) and blocks with
    normalisation write the `Residual` blocks themselves.

    Source: Tarnowski et al. 2019, eq. (20) for the limit; the law at finite depth and the variance derived here; Yang
    and Schoenholz 2017 for the length map v <- v + 2 scale m E phi + scale^2 E phi^2, m <- m + scale E phi,
    h ~ N(0, sigma_w^2 v + sigma_b^2), m the mean over the units.

    Raises:
        ValueError: branches without slope, depth or width below one, a negative sigma.

    Example:
        >>> law = residual_spectrum("tanh", depth=100, width=500, sigma_w=1.0, scale=0.1)
        >>> 1.0 < law.scalars["mean"] < 2.72
        True
    """
    phi = as_activation(activation)
    if depth < 1 or width < 1:
        raise ValueError(f"depth and width must be at least 1, got {depth} and {width}.")
    sigma_w, sigma_b, scale = (
        checked_sigma("sigma_w", sigma_w), checked_sigma("sigma_b", sigma_b), checked_sigma("scale", scale)
    )  # fmt: skip
    if sigma_w * scale == 0.0:
        raise ValueError("the branches have no slope: the Jacobian is the identity.")
    weights = Layer(width, width, phi, sigma_w, sigma_b)
    block = Residual((weights, Layer(width, width, None, 1.0, ensemble=PointMass(scale**2))))
    architecture = Architecture((block,) * depth, input_second_moment=input_second_moment)
    law, signals = jacobian_spectrum(architecture), propagate(architecture)
    shares = [branch_gain(block, signal) for signal in signals]
    cumulated = float(np.sum(np.log1p(shares)))
    scalars = {key: value for key, value in law.scalars.items() if "/" not in key}
    scalars |= {"cumulated_branch": cumulated, "q_final": sigma_w**2 * signals[-1].q + sigma_b**2}
    return replace(law, scalars=scalars)


def normalised_chi(
    activation: object, normalisation: Normalisation, *, sigma_w: Number = 1.0, sigma_b: Number = 0.0
) -> float:
    """chi of one layer h = norm(W phi + b), the normalisation in front of the activation, in a wide network.

    Layer and RMS norm: q = 1, chi = sigma_w^2 E phi'^2 / (sigma_w^2 E phi^2 + sigma_b^2), Z ~ N(0, 1).
    Batch norm, large batch: E phi'^2 / Var phi, which is >= 1 by Poincare's inequality with equality for linear
    activations only: gradients explode whatever sigma is (ReLU: pi / (pi - 1)).

    Source: Yang et al. 2019, theorem 3.10 (batch); Doshi, He and Gromov 2021 (layer). In a wide network h has mean
    zero over the units, so that centring (layer norm) and not centring (RMS norm) agree.

    Example:
        >>> round(normalised_chi("relu", "batch") * (np.pi - 1) / np.pi, 12)
        1.0
        >>> round(normalised_chi("relu", "layer", sigma_w=3.0), 12)
        1.0
    """
    phi = as_activation(activation)
    sigma_w, sigma_b = checked_sigma("sigma_w", sigma_w), checked_sigma("sigma_b", sigma_b)
    slope, square = slope_moment(phi, 1.0), second_moment(phi, 1.0)
    if normalisation == "batch":
        return slope / (square - mean_value(phi, 1.0) ** 2)
    if normalisation not in ("layer", "rms"):
        raise ValueError(f"normalisation is 'layer', 'rms' or 'batch', not {normalisation!r}.")
    before = sigma_w**2 * square + sigma_b**2
    if before == 0.0:
        raise ValueError("sigma_w = sigma_b = 0 leaves nothing to normalise.")
    return sigma_w**2 * slope / before


def convolution_layer(
    channels_in: int,
    channels_out: int,
    positions: int,
    activation: object | None,
    *,
    sigma_w: Number,
    sigma_b: Number = 0.0,
    ensemble: Ensemble = "gaussian",
    q: Number | None = None,
    name: str = "",
) -> Layer:
    """The `Layer` that a circular convolution of stride one is, as far as its spectrum goes.

    A circular convolution is block diagonal in Fourier space, one channels_out x channels_in block a frequency. With
    Gaussian taps of variance sigma_w^2 / fan-in every block is Gaussian with variance sigma_w^2 / channels_in; a
    delta-orthogonal kernel is sigma_w times one Haar matrix at every position. Either way the law of W^T W is that of
    a dense layer, and the slopes, free of the channels' basis, see no difference.

    Source: Xiao et al. 2018, section 3.

    Example:
        >>> convolution_layer(16, 32, 64, "tanh", sigma_w=1.0).n_out
        2048
    """
    if min(channels_in, channels_out, positions) < 1:
        raise ValueError(f"channels and positions must be at least 1, got {channels_in}, {channels_out}, {positions}.")
    phi = None if activation is None else as_activation(activation)
    return Layer(
        channels_in * positions, channels_out * positions, phi, sigma_w, sigma_b, ensemble, q, name
    )  # fmt: skip
