"""The tangent kernel of a wide network on given inputs, and what it says of the Fisher matrix on a real batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from torch_rmt.theory.architecture import Architecture, Layer
from torch_rmt.theory.isometry import slope_variance
from torch_rmt.theory.pair_maps import kernel_slopes, kernel_values


@dataclass(frozen=True)
class WideKernel:
    """What becomes of the kernels of a chain of dense layers as its widths grow.

    Fields:
        signal: E f_c(x_s) f_c(x_t) of one output over draws of the network.
        tangent: Theta_st = grad f_c(x_s) . grad f_c(x_t), by the weights as torch keeps them; those of two outputs are
            orthogonal.
        fluctuation: relative standard deviation of Theta's entries that is to be expected at these widths.
    """

    signal: Float[np.ndarray, "n n"]
    tangent: Float[np.ndarray, "n n"]
    fluctuation: float


def wide_kernel(
    architecture: Architecture, gram: Float[np.ndarray, "n n"], *, biases: Sequence[bool] | None = None
) -> WideKernel:
    """Follow the kernel of real inputs through the layers and the gradients back.

    K_0 = gram, S_l = sigma_w^2 K_(l-1) + sigma_b^2, K_l = E phi(u) phi(v), G_l = E phi'(u) phi'(v) for (u, v) ~
    N(0, S_l); Theta = sum_l (n_(l-1) K_(l-1) + [layer l has biases]) D_l, entry by entry, with D_L = 1 and D_l =
    G_l sigma_w(l+1)^2 D_(l+1). Gaussian and orthogonal weights have the same limit.

    Args:
        architecture: dense layers, the last without an activation; each its own sigma_w, sigma_b, widths.
        gram: x_s . x_t / n_0 of the inputs.
        biases: which layers have biases that are differentiated; all if None.

    Raises:
        ValueError: normalisation, dropout, residual blocks, a measured law of weights or an activation behind the last
            layer; a Gram matrix that does not fit.

    Source: Jacot, Gabriel and Hongler 2018, with the parametrisation of torch.nn.Linear; Huang, Du and Xu 2021 for
    orthogonal weights. `fluctuation`: the square root of sum_l (3 mu_2/mu_1^2 - 1) / n_l, the variance of a logarithmic
    gradient norm (Hanin and Nica 2018), to whose order the kernel fluctuates (Hanin and Nica 2020).

    >>> chain = Architecture.mlp(depth=1, width=50, activation="relu", sigma_w=2**0.5, n_out=3)
    >>> kernel = wide_kernel(chain, np.eye(2), biases=[False, False])
    >>> [round(float(v), 6) for v in (kernel.tangent[0, 0], kernel.signal[0, 1])]     # 50 + 50, and 2 / (2 pi) * 2
    [100.0, 0.63662]
    """
    layers = [_dense(layer) for layer in architecture.layers]
    has_bias = [True] * len(layers) if biases is None else list(biases)
    if len(has_bias) != len(layers):
        raise ValueError(f"{len(has_bias)} answers on biases were given for {len(layers)} layers.")
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not np.allclose(gram, gram.T):
        raise ValueError(f"the inputs' Gram matrix must be square and symmetric, got shape {gram.shape}.")
    if layers[-1].activation is not None:
        raise ValueError("the kernel is taken of outputs without an activation behind them.")
    kernel, kernels, slopes, variance = gram, [gram], [], 0.0
    for layer in layers:
        covariance = layer.sigma_w**2 * kernel + layer.sigma_b**2
        if layer.activation is None:
            kernel, slope = covariance, np.ones_like(covariance)
        else:
            kernel, slope = kernel_values(layer.activation, covariance), kernel_slopes(layer.activation, covariance)
            variance += (3.0 * slope_variance(layer.activation, float(np.diag(covariance).mean())) + 2.0) / layer.n_out
        kernels.append(kernel)
        slopes.append(slope)
    tangent, backward = np.zeros_like(gram), np.ones_like(gram)
    for index in range(len(layers) - 1, -1, -1):
        layer = layers[index]
        tangent += (layer.n_in * kernels[index] + has_bias[index]) * backward
        if index:
            backward = slopes[index - 1] * layer.sigma_w**2 * backward
    return WideKernel(kernels[-1], tangent, float(np.sqrt(variance)))


def _dense(layer: object) -> Layer:
    if not isinstance(layer, Layer):
        raise ValueError("the kernel of a residual block is not known here.")
    if not isinstance(layer.ensemble, str):
        raise ValueError(f"layer {layer.name!r} has no random weights.")
    if layer.dropout or layer.normalisation is not None:
        raise ValueError(f"layer {layer.name!r} has dropout or normalisation: its tangent kernel is not known here.")
    return layer
