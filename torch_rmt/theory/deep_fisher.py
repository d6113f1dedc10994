"""The Fisher matrix of a deep network: the law for one sample, and mean, second moment and largest eigenvalue for
many."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torch_rmt.theory.activation import Activation, as_activation
from torch_rmt.theory.deep_fisher_law import DeepFisherLaw, FisherStep
from torch_rmt.theory.expected_error import rigid_error, scale_or_shift_error
from torch_rmt.theory.far_slopes import far_slope_law
from torch_rmt.theory.gaussian import gaussian_expectation, gaussian_rule
from torch_rmt.theory.prediction import Prediction
from torch_rmt.theory.sizes import checked_widths, whole_number

_LARGEST = 1e30  # mean square of pre-activations (and 1/it), beyond which products of layers leave double precision


def deep_fisher_spectrum(
    activation: object,
    *,
    depth: int,
    width: int,
    sigma_w: float,
    sigma_b: float = 0.0,
    ensemble: str = "gaussian",
    input_second_moment: float = 1.0,
) -> Prediction:
    """Predict the spectrum of J J^T / width for one sample, J the (outputs, parameters) Jacobian: the Fisher's dual.

    Nonzero eigenvalues of the Fisher matrix J^T J of one sample, divided by the width. All `depth` layers of weights
    have the same width, the activation stands between them and not after the last. Each weight is trained by itself
    (the standard parametrisation); biases have variance sigma_b^2 and, where sigma_b > 0, are trained.
    Theta_l = (|x_{l-1}|^2/n + [biases]/n) I + W_l D_{l-1} Theta_{l-1} D_{l-1} W_l^T.

    Slopes without bound (ReLU squared) have a law without upper end: its upper edge, largest eigenvalue and learning
    rate are those of slopes cut at 9 standard deviations of the pre-activation.

    Args:
        ensemble: "gaussian" or "orthogonal".
        input_second_moment: mean square of the input's entries.

    Raises:
        ValueError: depth below 2, width below 1, another ensemble, a sigma out of range, lengths that explode or
            vanish.
        ArithmeticError: the law's edges were not found.

    Source: Hayase and Karakida 2020, equations 13-15.

    >>> p = deep_fisher_spectrum("linear", depth=3, width=100, sigma_w=1.0, ensemble="orthogonal")
    >>> round(p.scalars["mean"], 12)                # every layer adds one
    3.0
    """
    depth, width = whole_number("depth", depth, least=2), whole_number("width", width)
    if ensemble not in ("gaussian", "orthogonal"):
        raise ValueError(f'ensemble is "gaussian" or "orthogonal", got {ensemble!r}')
    _check(sigma_w, sigma_b, input_second_moment)
    phi = as_activation(activation)
    bias = 1.0 / width if sigma_b > 0.0 else 0.0
    second, steps = input_second_moment, []
    for _ in range(depth - 1):
        q = sigma_w**2 * second + sigma_b**2
        if not q < _LARGEST:
            raise ValueError(f"the lengths of {phi.name} explode at sigma_w = {sigma_w:g} and depth {depth}: take less")
        if not q > 1.0 / _LARGEST:
            raise ValueError(f"the lengths of {phi.name} vanish at sigma_w = {sigma_w:g} and depth {depth}: take more")
        nodes, weights = gaussian_rule(q, phi.kinks, order=8)
        second = float(weights @ phi.value(nodes) ** 2)
        steps.append(
            FisherStep(
                shift=second + bias,
                gain=sigma_w**2,
                slopes=far_slope_law(phi, q, order=8),
                gaussian=ensemble == "gaussian",
            )
        )
    law = DeepFisherLaw(start=input_second_moment + bias, steps=tuple(steps))
    high = law.bounds()[1]
    # The mean follows from the layers alone: bands that cannot hold it were misread.
    bands = law.support()
    if bands and not law.holds_mean(bands[0][0], bands[-1][1]):
        raise ArithmeticError(
            f"the edges of the law were not found: its mean {law.mean:.4g} lies outside of its bands. "
            f"Take another depth or sigma_w for {phi.name}."
        )
    return Prediction(
        measure=law,
        scalars={"mean": law.mean, "largest_eigenvalue": high, "max_stable_lr": 2.0 / (width * high)},
        assumptions=(
            "all widths equal and large, weights independent of one another, " + ensemble,
            "one sample; the derivatives of a layer are independent Gaussian functions, free of the weights",
        ),
        reference="Hayase and Karakida 2020, Fisher information of networks achieving dynamical isometry",
        finite_size_error=_expected_error(
            law, phi, depth, width, sigma_w**2, sigma_b**2, input_second_moment, ensemble == "orthogonal"
        ),
    )


def _expected_error(
    law: DeepFisherLaw,
    phi: Activation,
    depth: int,
    width: int,
    gain: float,
    bias: float,
    second: float,
    orthogonal: bool,
) -> float:
    """Rigid eigenvalues, and what one network's own lengths and slopes do: scale the law, and move its lower end."""
    scale, last = scale_and_shift(phi, depth, width, gain, bias, second, orthogonal)
    return float(min(1.0, np.hypot(rigid_error(width), scale_or_shift_error(law, scale, last))))


def scale_and_shift(
    phi: Activation, depth: int, width: int, gain: float, bias: float, second: float, orthogonal: bool
) -> tuple[float, float]:
    """Standard deviations over drawn networks of the log of the mean eigenvalue, and of the last |x|^2/n.

    To first order in 1/width. The mean eigenvalue is a sum over layers of |x_l|^2/n times the later mean slopes; what
    n units add to phi^2 and phi'^2 of layer k moves the terms from k on, and those below k. The lower end is the last
    |x_l|^2/n. For Haar weights less the part along h^2.
    """
    seconds, slopes, rules = [second], [], []
    for _ in range(depth - 1):
        q = gain * seconds[-1] + bias
        h, weights = gaussian_rule(q, phi.kinks, order=16)
        square, slope2 = phi.value(h) ** 2, phi.derivative(h) ** 2
        rules.append((h**2 / q - 1.0, weights, square, slope2, q))
        seconds.append(float(weights @ square))
        slopes.append(float(weights @ slope2))
    after = np.concatenate([np.cumprod(gain * np.array(slopes[::-1]))[::-1], [1.0]])
    terms = np.array(seconds) * after
    below = np.cumsum(terms) / terms.sum()

    def spread(lengths: Sequence[float], parts: Sequence[float]) -> float:
        """Standard deviation of the sum over k of lengths_k delta|x_k|^2/n + parts_k delta log(mean slope_k)."""
        variance, following = 0.0, 0.0
        for k in range(depth - 1, 0, -1):
            radial, weights, square, slope2, q = rules[k - 1]
            response = lengths[k] + gain * following
            mixed = parts[k - 1] * slope2 / slopes[k - 1] + response * square
            mixed = mixed - weights @ mixed
            along = float(weights @ (mixed * radial))
            variance += (float(weights @ mixed**2) - (0.5 * along**2 if orthogonal else 0.0)) / width
            # how q of this layer moves everything after: d/dq E f = E f (z^2 - 1)/(2 q)
            following = along / (2.0 * q)
        return float(np.sqrt(max(variance, 0.0)))

    scale = spread((terms / (terms.sum() * np.array(seconds))).tolist(), below.tolist())
    last = spread([0.0] * (depth - 1) + [1.0], [0.0] * depth)
    return scale, last


@dataclass(frozen=True)
class DeepFisherStatistics:
    """Mean-field numbers of the Fisher matrix F = (1/N) sum of J^T J of a deep network (Karakida, Akaho and Amari
    2019).

    Fields:
        mean: eigenvalue on average over all parameters.
        second_moment: mean square eigenvalue over all parameters.
        largest_eigenvalue: of F; as many of them as there are outputs.
        max_stable_lr: 2 / largest eigenvalue, the bound on the learning rate of gradient descent.
        diagonal, off_diagonal: the kernel J J^T at one input and between two independent ones, for each output.
        parameters: number of parameters.
    """

    mean: float
    second_moment: float
    largest_eigenvalue: float
    max_stable_lr: float
    diagonal: float
    off_diagonal: float
    parameters: int


def deep_fisher_statistics(
    activation: object,
    *,
    widths: Sequence[int],
    n_samples: int,
    sigma_w: float,
    sigma_b: float = 0.0,
    input_second_moment: float = 1.0,
    input_correlation: float = 0.0,
) -> DeepFisherStatistics:
    """Mean, second moment and largest eigenvalue of the Fisher matrix of a deep network, squared loss.

    widths (n_0, ..., n_L), activation after every layer but the last, Gaussian weights; biases trained where sigma_b
    > 0. The kernel J J^T of N samples is k_1 on the diagonal and k_2 off it, for each output apart:
    tr F = C k_1, tr F^2 = C (k_1^2 + (N - 1) k_2^2)/N, largest eigenvalue (k_1 + (N - 1) k_2)/N, with
    k = sum over l of (n_{l-1} E x x' + [bias]) prod_{k >= l} sigma_w^2 E phi'(h_k) phi'(h'_k). All pairs of inputs are
    taken as equally correlated. Independent inputs of n_0 entries are so to 1/sqrt(n_0) only: where k_2 is small (odd
    activations, weak biases), N/n_0 must be small too, or tr F^2 and the largest eigenvalue come out larger; that
    spectrum is `neural_tangent_spectrum`.

    Raises:
        ValueError: fewer than two widths, sizes below one, sigmas or correlation out of range.

    Source: Karakida, Akaho and Amari 2019, Universal statistics of Fisher information in deep neural networks,
    Theorems 1-3, without the limit of equal large widths.

    >>> s = deep_fisher_statistics("linear", widths=(50, 50, 1), n_samples=10, sigma_w=1.0)
    >>> round(s.diagonal, 9), round(s.off_diagonal, 9)
    (100.0, 0.0)
    """
    sizes, n_samples = checked_widths(widths), whole_number("n_samples", n_samples)
    if not -1.0 <= input_correlation <= 1.0:
        raise ValueError(f"a correlation lies in [-1, 1], got {input_correlation}")
    _check(sigma_w, sigma_b, input_second_moment)
    phi = as_activation(activation)
    bias = 1.0 if sigma_b > 0.0 else 0.0
    same, cross = input_second_moment, input_second_moment * input_correlation
    forward, slopes = [(same, cross)], []
    for _ in sizes[1:-1]:
        q, q_cross = sigma_w**2 * same + sigma_b**2, sigma_w**2 * cross + sigma_b**2
        same = gaussian_expectation(lambda h: phi.value(h) ** 2, q, phi.kinks)
        slope = gaussian_expectation(lambda h: phi.derivative(h) ** 2, q, phi.kinks)
        cross, slope_cross = _correlated(phi, q, q_cross)
        slopes.append((sigma_w**2 * slope, sigma_w**2 * slope_cross))
        forward.append((same, cross))
    one = two = 0.0
    back_one = back_two = 1.0
    for layer in range(len(sizes) - 2, -1, -1):
        one += (sizes[layer] * forward[layer][0] + bias) * back_one
        two += (sizes[layer] * forward[layer][1] + bias) * back_two
        if layer:
            back_one, back_two = back_one * slopes[layer - 1][0], back_two * slopes[layer - 1][1]
    parameters = sum(a * b + int(bias) * b for a, b in itertools.pairwise(sizes))
    outputs, n = sizes[-1], n_samples
    largest = max(one + (n - 1) * two, one - two) / n
    return DeepFisherStatistics(
        mean=outputs * one / parameters,
        second_moment=outputs * (one**2 + (n - 1) * two**2) / (n * parameters),
        largest_eigenvalue=largest,
        max_stable_lr=2.0 / largest,
        diagonal=one,
        off_diagonal=two,
        parameters=parameters,
    )


def _correlated(phi: Activation, q: float, q_cross: float) -> tuple[float, float]:
    """E phi(h) phi(h') and E phi'(h) phi'(h') for variance q and covariance q_cross: the second integral given the
    first."""
    c = float(np.clip(q_cross / q, -1.0, 1.0))
    h, weights = gaussian_rule(q, phi.kinks, order=16)
    rest = q * (1.0 - c**2)
    value, slope = np.empty_like(h), np.empty_like(h)
    for k, first in enumerate(h):
        # the inner kinks lie where c h + noise meets one
        noise, inner = gaussian_rule(rest, tuple(kink - c * first for kink in phi.kinks), order=12)
        value[k], slope[k] = inner @ phi.value(c * first + noise), inner @ phi.derivative(c * first + noise)
    return float(weights @ (phi.value(h) * value)), float(weights @ (phi.derivative(h) * slope))


def _check(sigma_w: float, sigma_b: float, input_second_moment: float) -> None:
    for name, value, low in (
        ("sigma_w", sigma_w, False),
        ("sigma_b", sigma_b, True),
        ("input_second_moment", input_second_moment, False),
    ):
        if not np.isfinite(value) or value < 0.0 or (value == 0.0 and not low):
            raise ValueError(f"{name} must be finite and {'>= 0' if low else 'positive'}, got {value}")
