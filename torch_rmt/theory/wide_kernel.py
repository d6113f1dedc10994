"""The tangent kernel of a wide network on given inputs, and what it says of the Fisher matrix on a real batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from torch_rmt.theory.activation import Activation
from torch_rmt.theory.architecture import Architecture, Layer
from torch_rmt.theory.pair_maps import kernel_slopes, kernel_values


@dataclass(frozen=True)
class WideKernel:
    """What becomes of the kernels of a chain of dense layers as its widths grow.

    Fields:
        signal: E f_c(x_s) f_c(x_t) of one output over draws of the network.
        tangent: Theta_st = grad f_c(x_s) . grad f_c(x_t), by the weights as torch keeps them; those of two outputs are
            orthogonal.
    """

    signal: Float[np.ndarray, "n n"]
    tangent: Float[np.ndarray, "n n"]


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
    orthogonal weights.

    >>> chain = Architecture.mlp(depth=1, width=50, activation="relu", sigma_w=2**0.5, n_out=3)
    >>> kernel = wide_kernel(chain, np.eye(2), biases=[False, False])
    >>> [round(float(v), 6) for v in (kernel.tangent[0, 0], kernel.signal[0, 1])]     # 50 + 50, and 2 / (2 pi) * 2
    [100.0, 0.63662]
    """
    layers = kernel_layers(architecture, gram, biases)
    return WideKernel(layers[-1].covariance, np.sum([one.tangent for one in layers], axis=0))


@dataclass(frozen=True)
class KernelLayer:
    """One layer of a wide chain: what goes into it, and what comes back to it.

    Fields:
        fan_in, fan_out: widths.
        variance: sigma_w^2.
        orthogonal: whether its weights are.
        activation: behind it.
        forward: n_in K_(l-1) + [it has biases], what the gradient by its parameters owes to its inputs.
        covariance: S_l of its outputs.
        slopes: G_l.
        backward: D_l, covariance of the gradients of one output by its outputs.
    """

    fan_in: int
    fan_out: int
    variance: float
    orthogonal: bool
    activation: Activation | None
    forward: Float[np.ndarray, "n n"]
    covariance: Float[np.ndarray, "n n"]
    slopes: Float[np.ndarray, "n n"]
    backward: Float[np.ndarray, "n n"]

    @property
    def tangent(self) -> Float[np.ndarray, "n n"]:
        """Its share of Theta."""
        share: Float[np.ndarray, "n n"] = self.forward * self.backward
        return share

    @property
    def kept_forward(self) -> float:
        """Share of the fluctuation of |W x|^2 that orthogonal weights leave out."""
        return min(1.0, self.fan_out / self.fan_in) if self.orthogonal else 0.0

    @property
    def kept_backward(self) -> float:
        """Share of the fluctuation of |W^T x|^2 that orthogonal weights leave out."""
        return min(1.0, self.fan_in / self.fan_out) if self.orthogonal else 0.0


def kernel_layers(
    architecture: Architecture, gram: Float[np.ndarray, "n n"], biases: Sequence[bool] | None
) -> tuple[KernelLayer, ...]:
    """The kernels of every layer; arguments, errors and formulas are those of `wide_kernel`."""
    layers = [_dense(layer) for layer in architecture.layers]
    has_bias = [True] * len(layers) if biases is None else list(biases)
    if len(has_bias) != len(layers):
        raise ValueError(f"{len(has_bias)} answers on biases were given for {len(layers)} layers.")
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not np.allclose(gram, gram.T):
        raise ValueError(f"the inputs' Gram matrix must be square and symmetric, got shape {gram.shape}.")
    if layers[-1].activation is not None:
        raise ValueError("the kernel is taken of outputs without an activation behind them.")
    kernel, forward, covariances, slopes = gram, [], [], []
    for layer, bias in zip(layers, has_bias, strict=True):
        forward.append(layer.n_in * kernel + bias)
        covariance = layer.sigma_w**2 * kernel + layer.sigma_b**2
        if layer.activation is None:
            kernel, slope = covariance, np.ones_like(covariance)
        else:
            kernel, slope = kernel_values(layer.activation, covariance), kernel_slopes(layer.activation, covariance)
        covariances.append(covariance)
        slopes.append(slope)
    backward = [np.ones_like(gram)]
    for layer, slope in zip(layers[:0:-1], slopes[-2::-1], strict=True):
        backward.insert(0, slope * layer.sigma_w**2 * backward[0])
    return tuple(
        KernelLayer(
            layer.n_in, layer.n_out, layer.sigma_w**2, layer.ensemble == "orthogonal", layer.activation, *matrices
        )
        for layer, *matrices in zip(layers, forward, covariances, slopes, backward, strict=True)
    )


def _dense(layer: object) -> Layer:
    if not isinstance(layer, Layer):
        raise ValueError("the kernel of a residual block is not known here.")
    if not isinstance(layer.ensemble, str):
        raise ValueError(f"layer {layer.name!r} has no random weights.")
    if layer.dropout or layer.normalisation is not None:
        raise ValueError(f"layer {layer.name!r} has dropout or normalisation: its tangent kernel is not known here.")
    return layer
