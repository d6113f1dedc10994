"""Deep conjugate kernel and neural tangent kernel (Fan and Wang 2020), layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torch_rmt.measures import MarchenkoPastur
from torch_rmt.measures.base import SpectralMeasure
from torch_rmt.theory.activation import Activation, as_activation
from torch_rmt.theory.conjugate_kernel_law import KernelLayer, LayeredKernelLaw
from torch_rmt.theory.expected_error import quadratic_error, quadratic_share, rigid_error, scale_error
from torch_rmt.theory.gaussian import gaussian_expectation
from torch_rmt.theory.gram import NonlinearMoments, nonlinear_moments
from torch_rmt.theory.prediction import Prediction
from torch_rmt.theory.sizes import checked_widths, whole_number

_REFERENCE = "Fan and Wang 2020, Spectra of the conjugate kernel and neural tangent kernel"


def conjugate_kernel_spectrum(
    activation: object,
    *,
    widths: Sequence[int],
    n_samples: int,
    sigma_w: float = 1.0,
    sigma_x: float = 1.0,
    sigma_b: float = 0.0,
    input_law: SpectralMeasure | None = None,
) -> tuple[Prediction, ...]:
    """Predict the spectra of K_l = X_l^T X_l / n_l, (n_samples, n_samples), for every layer l = 1..L.

    X_l = phi(W_l X_{l-1}) with the activation centred at every layer, W_l of variance sigma_w^2 / n_{l-1}, no biases.

    Args:
        activation: as `as_activation` takes it.
        widths: (n_0, ..., n_L).
        n_samples: columns of X.
        sigma_w: scale of the weights.
        sigma_x: standard deviation of the inputs' entries.
        sigma_b: must be zero; see `_no_biases`.
        input_law: law of K_0 = X^T X / n_0 for inputs that are nearly orthogonal and of mean square sigma_x^2; None:
        for
            independent entries, Marchenko-Pastur.

    Returns:
        One Prediction a layer, with scalars "mean", "eta", "zeta", "q", "largest_eigenvalue", "activation_mean".

    Raises:
        ValueError: fewer than two widths, sizes below one, sigmas not positive, biases.

    Source: Fan and Wang 2020, Theorem 3.4.

    >>> first, second = conjugate_kernel_spectrum("tanh", widths=(80, 120, 100), n_samples=60)
    >>> round(second.measure.mean, 10) == round(second.scalars["eta"], 10)
    True
    """
    _no_biases(sigma_b)
    phi = as_activation(activation)
    sizes = _sizes(widths, n_samples)
    base = _input_law(input_law, sizes, n_samples, sigma_x)
    levels = _levels(phi, sizes, sigma_w, sigma_x)
    predictions = []
    for depth in range(1, len(sizes)):
        law = LayeredKernelLaw.of(
            base, _layers(sizes[: depth + 1], levels, n_samples, sigma_x), (0.0,) * depth + (1.0,)
        )
        q, moments = levels[depth - 1]
        predictions.append(
            Prediction(
                measure=law,
                scalars={
                    "mean": moments.eta,
                    "eta": moments.eta,
                    "zeta": moments.zeta,
                    "q": q,
                    "activation_mean": moments.mean,
                    "largest_eigenvalue": law.bounds()[1],
                },
                assumptions=_assumptions(moments, input_law),
                reference=_REFERENCE + ", Theorem 3.4",
                finite_size_error=_expected_error(phi, sizes[: depth + 1], levels, n_samples),
            )
        )
    return tuple(predictions)


def neural_tangent_spectrum(
    activation: object,
    *,
    widths: Sequence[int],
    n_samples: int,
    sigma_w: float = 1.0,
    sigma_x: float = 1.0,
    n_outputs: int = 1,
    sigma_b: float = 0.0,
    input_law: SpectralMeasure | None = None,
) -> Prediction:
    """Predict the spectrum of the neural tangent kernel J J^T over n_samples inputs.

    f(x) = w . x_L on top of x_l = phi(W_l x_{l-1}), all weights trained and of variance sigma_w^2 / fan-in, no factors
    taken out (the standard parametrisation, as PyTorch differentiates it). In the limit
    NTK = n_L K_L + sum over l of n_{l-1} [s_l K_{l-1} + (r_l - s_l) eta_{l-1} I], r_l and s_l the products over k >=
    l of sigma_w^2 E phi'^2 and sigma_w^2 (E phi')^2 at layer k. With C outputs J J^T is, in the limit, that matrix
    times the identity of C: the same law, every eigenvalue C times; the blocks between outputs are of relative norm
    1/sqrt(n_L).

    Arguments, errors: as `conjugate_kernel_spectrum`; widths (n_0, ..., n_L) leave out the output.

    Returns:
        Prediction with scalars "mean", "shift" (the multiple of the identity), "largest_eigenvalue", "max_stable_lr"
        (2 n_samples / largest eigenvalue, for half the square error, summed over outputs and averaged over samples),
        "smallest_eigenvalue" and "dim", the n_samples n_outputs eigenvalues there are.

    Source: Fan and Wang 2020, Theorem 3.7.

    >>> p = neural_tangent_spectrum("tanh", widths=(80, 120, 100), n_samples=60)
    >>> p.measure.bounds()[0] > p.scalars["shift"] > 0.0
    True
    """
    _no_biases(sigma_b)
    phi = as_activation(activation)
    sizes = _sizes(widths, n_samples)
    n_outputs = whole_number("n_outputs", n_outputs)
    base = _input_law(input_law, sizes, n_samples, sigma_x)
    levels = _levels(phi, sizes, sigma_w, sigma_x)
    depth = len(sizes) - 1
    traces = []
    weights, shift, full, linear = [float(sizes[depth])], 0.0, 1.0, 1.0
    for layer in range(depth, 0, -1):
        q, moments = levels[layer - 1]
        slope2 = gaussian_expectation(lambda h: phi.derivative(h) ** 2, q, phi.kinks)
        full *= sigma_w**2 * slope2
        linear *= sigma_w**2 * moments.zeta / q
        below = sigma_x**2 if layer == 1 else levels[layer - 2][1].eta
        weights.append(sizes[layer - 1] * linear)
        traces.append(sizes[layer - 1] * full * below)
        shift += sizes[layer - 1] * max(full - linear, 0.0) * below
    if shift <= 1e-12 * sum(weights):
        shift = 0.0
    law = LayeredKernelLaw.of(base, _layers(sizes, levels, n_samples, sigma_x), tuple(reversed(weights)), shift)
    low, high = law.bounds()
    return Prediction(
        measure=law,
        scalars={
            "mean": law.mean,
            "shift": shift,
            "smallest_eigenvalue": low,
            "largest_eigenvalue": high,
            "max_stable_lr": 2.0 * n_samples / high,
            "dim": float(n_samples * n_outputs),
        },
        assumptions=(
            *_assumptions(levels[-1][1], input_law),
            ("one linear output" if n_outputs == 1 else f"{n_outputs} linear outputs, few against the last width")
            + ", standard parametrisation",
        ),
        reference=_REFERENCE + ", Theorem 3.7",
        finite_size_error=min(
            1.0,
            float(
                np.hypot(
                    _expected_error(phi, sizes, levels, n_samples),
                    scale_error(law, _scale_deviation(sizes, traces[::-1], law.mean)),
                )
            ),
        ),
    )


def _scale_deviation(sizes: tuple[int, ...], traces: list[float], total: float) -> float:
    """Of the common scale of the gradients: the vector sent back through layer k has a chi-square of n_k in its length.

    The layers' shares of the mean eigenvalue that lie below k move together.
    """
    shares = np.cumsum(traces) / total
    return float(np.sqrt(sum(2.0 / n * share**2 for n, share in zip(sizes[1:], shares, strict=True))))


def _expected_error(
    phi: Activation, sizes: tuple[int, ...], levels: list[tuple[float, NonlinearMoments]], n_samples: int
) -> float:
    """Rigid eigenvalues, and the quadratic features of every layer."""
    count = min(sizes[-1], n_samples)
    error = rigid_error(count, n_samples)
    for n_in, (q, _) in zip(sizes[:-1], levels, strict=False):
        error += quadratic_error(quadratic_share(phi, q), n_in, count, n_samples)
    return min(1.0, error)


def _sizes(widths: Sequence[int], n_samples: int) -> tuple[int, ...]:
    whole_number("n_samples", n_samples)
    return checked_widths(widths)


def _no_biases(sigma_b: float) -> None:
    """Refuse biases, which the recursion does not cover.

    A neuron's bias is one number for all samples, so that its row has a covariance v(b) I + alpha(b) K + m(b)^2 1 1^T
    of its own: the coefficients of the recursion would become averages over b of its solution (as in `GramBiasLaw`, one
    layer), and averaging v and alpha over b first is wrong.
    """
    if sigma_b != 0.0:
        raise ValueError(
            f"there is no law of deep kernels with biases (sigma_b = {sigma_b}): set them to zero, or for one hidden "
            "layer take gram_spectrum(..., sigma_b=...)"
        )


def _input_law(
    given: SpectralMeasure | None, sizes: tuple[int, ...], n_samples: int, sigma_x: float
) -> SpectralMeasure:
    if not (np.isfinite(sigma_x) and sigma_x > 0.0):
        raise ValueError(f"sigma_x must be positive and finite, got {sigma_x}")
    return MarchenkoPastur(n_samples / sizes[0], sigma_x**2) if given is None else given


def _levels(
    phi: Activation, sizes: tuple[int, ...], sigma_w: float, sigma_x: float
) -> list[tuple[float, NonlinearMoments]]:
    """Pre-activation variance and moments of the centred activation, for each layer."""
    if not (np.isfinite(sigma_w) and sigma_w > 0.0):
        raise ValueError(f"sigma_w must be positive and finite, got {sigma_w}")
    levels = []
    second = sigma_x**2
    for _ in sizes[1:]:
        q = sigma_w**2 * second
        moments = nonlinear_moments(phi, q)
        levels.append((q, moments))
        second = moments.eta
    return levels


def _layers(
    sizes: tuple[int, ...], levels: list[tuple[float, NonlinearMoments]], n_samples: int, sigma_x: float
) -> tuple[KernelLayer, ...]:
    layers = []
    second = sigma_x**2
    for n, (_, moments) in zip(sizes[1:], levels, strict=False):
        layers.append(
            KernelLayer(ratio=n_samples / n, constant=moments.eta - moments.zeta, linear=moments.zeta / second)
        )
        second = moments.eta
    return tuple(layers)


def _assumptions(moments: NonlinearMoments, input_law: SpectralMeasure | None) -> tuple[str, ...]:
    assumptions = [
        "widths and samples large, in the proportions given; weights independent Gaussians, no biases",
        "inputs with independent entries"
        if input_law is None
        else "inputs of equal length, pairwise nearly orthogonal",
    ]
    if moments.mean != 0.0:
        assumptions.append("the activation is centred at every layer: its mean is subtracted before the next")
    return tuple(assumptions)
