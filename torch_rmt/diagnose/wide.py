"""The scale of a Fisher or Gauss-Newton matrix beside that of a wide network, drawn at random, on the same batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse.linalg
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_rmt.compare import Report
from torch_rmt.compare.verdict import WHY_ANOTHER_SHAPE
from torch_rmt.describe import describe_between
from torch_rmt.operators import GaussNewton, output_factors
from torch_rmt.theory import Architecture, kernel_noise, wide_kernel
from torch_rmt.theory.architecture import plain_layers

_MOST_SAMPLES = 1024  # the kernels of a layer are matrices over the samples
_MOST_FACTORS = 2**25  # numbers in the square root of the loss's curvature
_NOISE_SAMPLES = 64  # of the batch, by which the noise is told
_SURE = 3.0  # standard deviations; of two numbers, from drawn networks: one network in a hundred is beyond
_TOO_NARROW = 0.45  # noise beyond which a factor of three is no news


@dataclass(frozen=True)
class WideScale:
    """Mean and largest eigenvalue of J^T H J, with J drawn at random at these widths and H as measured.

    Fields:
        mean: of all eigenvalues.
        largest: eigenvalue, as it typically is at these widths.
        noise: of the logarithms of both, standard deviations from network to network.
    """

    mean: float
    largest: float
    noise: tuple[float, float]


def wide_scale(model: nn.Module, inputs: Any, operator: GaussNewton) -> WideScale:
    """Predict the scale of a Fisher or Gauss-Newton matrix from the architecture, the inputs and the loss's curvature.

    The matrix has the non-zero eigenvalues of Z^T (Theta x 1) Z, Z Z^T the curvature of the loss by the outputs, as
    it is at the measured outputs, Theta the tangent kernel of `theory.wide_kernel`.

    Raises:
        ValueError: the network is no chain of dense layers, or parameters outside it are differentiated, or too many
            samples.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise ValueError("the inputs are no tensor of real numbers")
    if len(operator.given) > 1 or len(inputs) > _MOST_SAMPLES:
        raise ValueError(f"the batch is not one of at most {_MOST_SAMPLES} samples")
    # Of one sample a batch norm in training mode has no statistics: that is no reason to give.
    normalised = any(isinstance(module, _BatchNorm) and module.training for module in model.modules())
    architecture = describe_between(model, inputs if normalised else inputs[:1], None, None)
    x = inputs.detach().reshape(len(inputs), -1).double().cpu().numpy()
    if architecture.layers[0].n_in != x.shape[1]:
        raise ValueError("the first layer does not act on all of the input at once")
    if len(x) * architecture.layers[-1].n_out ** 2 > _MOST_FACTORS:
        raise ValueError(f"{architecture.layers[-1].n_out} outputs are too many")
    gram = x @ x.T / x.shape[1]
    biases = _biases(model, architecture, operator.shape[0])
    kernel = wide_kernel(architecture, gram, biases=biases)
    factors = output_factors(operator)
    z = factors.reshape(*factors.shape[:2], -1).double().cpu().numpy()  # columns, samples, outputs
    shape = z.shape[:2]
    if not z.any():
        raise ValueError("the loss has no curvature by the outputs on this batch: it is sure of every sample")

    def product(v: np.ndarray) -> np.ndarray:
        pushed = kernel.tangent @ np.einsum("cno,cn->no", z, v.reshape(shape))
        image: np.ndarray = np.einsum("cno,no->cn", z, pushed)
        return image.ravel()

    size = shape[0] * shape[1]
    matrix = scipy.sparse.linalg.LinearOperator((size, size), matvec=product, dtype=np.float64)
    if size < 3:
        largest = float(np.linalg.eigvalsh(matrix @ np.eye(size))[-1])
    else:
        start = np.random.default_rng(0).standard_normal(size)
        largest = float(scipy.sparse.linalg.eigsh(matrix, 1, which="LA", v0=start, return_eigenvectors=False)[0])
    trace = float((np.diag(kernel.tangent) * (z**2).sum((0, 2))).sum())
    some = np.linspace(0, len(x) - 1, min(len(x), _NOISE_SAMPLES)).round().astype(int)
    curvatures = np.einsum("cno,cnp->nop", z[:, some], z[:, some])
    noise = kernel_noise(architecture, gram[np.ix_(some, some)], curvatures, biases=biases)
    return WideScale(trace / operator.shape[0], largest * noise.raised, (noise.mean, noise.largest))


def beside_a_wide_network(report: Report, scale: WideScale, *, note: str = "") -> Report:
    """Say in the report how mean and largest eigenvalue compare with those of a wide network drawn at random.

    `note` says that the matrix is not the curvature that a learning rate meets.
    """
    mean, largest = report.spectrum.moment(1)[0], report.facts["largest_eigenvalue"]
    facts: Mapping[str, float] = {
        **report.facts,
        "wide/mean": scale.mean,
        "wide/largest_eigenvalue": scale.largest,
        "wide/max_lr": 2.0 / scale.largest if scale.largest > 0 else math.inf,
        "wide/mean_noise": scale.noise[0],
        "wide/largest_eigenvalue_noise": scale.noise[1],
    }
    if not (mean > 0 and largest > 0 and scale.mean > 0 and scale.largest > 0):
        return replace(report, facts=facts)
    ratios = mean / scale.mean, largest / scale.largest
    near = all(abs(math.log(r)) <= _SURE * noise for r, noise in zip(ratios, scale.noise, strict=True))
    agrees = None if near and scale.noise[0] > _TOO_NARROW else near
    numbers = (
        f"mean {ratios[0]:.3g} times and largest eigenvalue {ratios[1]:.3g} times those of a wide network on this "
        f"batch (noise {scale.noise[0]:.2g} and {scale.noise[1]:.2g})"
    )
    opening = {None: "Too narrow to tell", True: "As predicted", False: "Not as predicted"}[agrees]
    why = "" if agrees is not False else WHY_ANOTHER_SHAPE
    rate = note or (
        f"By this matrix alone plain gradient descent would be stable below a learning rate of {2 / largest:.3g}, "
        f"predicted {2 / scale.largest:.3g}; the Hessian's residual part may allow less."
    )
    words = f"{opening}: {numbers}. {why}{rate}"
    return replace(report, verdict=words, agrees=agrees, facts=facts)


def _biases(model: nn.Module, architecture: Architecture, parameters: int) -> list[bool]:
    """Which layers have biases; with the weights they must be all that is differentiated."""
    layers, modules = plain_layers(architecture), dict(model.named_modules())
    normalised = [layer.name for layer in layers if layer.normalisation is not None]
    if normalised:
        raise ValueError(f"layer {normalised[0]!r} has a normalisation: its tangent kernel is not known here")
    has = [isinstance(getattr(modules.get(layer.name), "bias", None), Tensor) for layer in layers]
    counted = sum(layer.n_out * (layer.n_in + bias) for layer, bias in zip(layers, has, strict=True))
    if counted != parameters:
        raise ValueError(
            f"{parameters} parameters are differentiated, but the dense layers that were read have {counted}: weights "
            "are shared, frozen or outside the chain"
        )
    return has
