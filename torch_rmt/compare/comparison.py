"""`compare`: one measured spectrum, one law, one report."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from torch_rmt.compare.distances import (
    Tabulated,
    kolmogorov,
    numerical_zero,
    points,
    relative_scale,
    wasserstein,
)
from torch_rmt.compare.outliers import find_outliers
from torch_rmt.compare.report import Distance, Report
from torch_rmt.compare.verdict import AGREES_UP_TO, agreement_in_words, gradients_in_words, spreads
from torch_rmt.spectra import Spectrum
from torch_rmt.theory import Prediction

# sup |B| of a Brownian bridge has mean 0.869, its standard deviation in the middle is 1/2.
_SUP_OVER_MIDDLE = 1.74
# Kolmogorov distance times dimension of Jacobians of drawn tanh networks of depth 5 to 40, orthogonal and
# Gaussian: 2 to 6 at widths 64 and 256. Wigner, Wishart, products of eight Gaussian matrices, sums of rotated
# projections: medians of 1.6 to 2.8 at sizes 32 to 200, no false alarm in 464. Found by simulation.
_RIGID = 4.0
# A law that is this far off is no match, whatever noise could excuse: there the measurement is too coarse to tell.
_TOO_COARSE = 0.2


def compare(
    spectrum: Spectrum,
    prediction: Prediction | None,
    *,
    name: str = "spectrum",
    facts: Mapping[str, float] | None = None,
    reason: str = "",
    zero: float = 0.0,
    size: float | None = None,
) -> Report:
    """Put a measured spectrum beside its law: distances with noise floors, outliers, a verdict in words.

    Three distances: "kolmogorov", sup |F_n - F|; "wasserstein", integral of |F_n - F|, in units of
    eigenvalues; "shape", the Kolmogorov distance once the measured eigenvalues are divided by the ratio of
    their middle quantiles (of the root mean squares where eigenvalues are negative), or before, if that is less:
    the common fluctuation of q moves all eigenvalues of one drawn network together, and should not hide or feign
    a difference of form.

    The noise floor of "kolmogorov" is the prediction's `finite_size_error` (if it has none, 4/dim and the binomial
    noise of its atoms) and the probes' sampling error, added in squares, and half a step of the measured
    distribution function. "shape" has the same without what `finite_size_error` allows for the scale, and
    "wasserstein" the same times the width of the law from its 1 % to its 99 % point, joined by its standard deviation
    over sqrt(dim). The law "agrees" up to 2.5 times the floor of both Kolmogorov distances; a law that is a point is
    judged by the Wasserstein distance. Beyond a distance of 0.2 that noise alone could excuse, where the floor would
    excuse any distance, and where nearly all eigenvalues lie below a given `zero`, nothing is decided.

    Args:
        spectrum: the measurement.
        prediction: None where there is no law; the report then only says what was measured, and `reason`.
        name: tag of the report in every log.
        facts: further numbers; with "chi" and "depth" the verdict says what becomes of gradients.
        reason: why there is no prediction.
        size: number of independent units where that is less than the dimension, as for weights that places share.
        zero: size below which eigenvalues count as zero, of the law as of the measurement; rounding if that is more.

    >>> from torch_rmt.measures import MarchenkoPastur
    >>> values = MarchenkoPastur(1.0).quantile((np.arange(200) + 0.5) / 200)
    >>> measured = Spectrum(values[None], np.full((1, 200), 1 / 200), dim=200, matvecs=200, method="exact")
    >>> compare(measured, Prediction(MarchenkoPastur(1.0), finite_size_error=0.01)).verdict.split(" (")[0]
    'As predicted'
    """
    facts = dict(facts or {})
    if prediction is None:
        low, high = spectrum.measure().bounds()
        verdict = f"Measured only{': ' + reason if reason else ''}. Eigenvalues from {low:.3g} to {high:.3g}."
        return Report(name, spectrum, None, verdict=verdict + gradients_in_words(facts), facts=facts)
    law = prediction.measure
    zero = max(zero, numerical_zero(spectrum))
    nodes, weights = points(spectrum)
    table = Tabulated(law, nodes, zero)
    noise, rigid = (noise_floor(spectrum, prediction, shape=shape, zero=zero, size=size) for shape in (False, True))
    ks = Distance("kolmogorov", table.kolmogorov(nodes, weights), noise)
    w1 = Distance("wasserstein", wasserstein(nodes, weights, table), _moved(table, noise, spectrum.dim) + zero)
    scale = relative_scale(nodes, weights, table, zero)
    shape = None
    if math.isfinite(scale) and scale > 0:
        # At an edge where the density is infinite a scale that is off by 1/n moves 1/sqrt(n) of the mass.
        apart = min(ks.value, kolmogorov(nodes / scale, weights, law, zero=zero / scale))
        shape = Distance("shape", apart, min(rigid, noise))
        facts.setdefault("scale", scale)
    outliers = find_outliers(nodes, weights, table, dim=spectrum.dim, noise=noise, zero=zero)
    if len(law.atoms()) == 1 and not law.support():
        w1 = Distance(w1.kind, w1.value, max(w1.noise, abs(law.mean) * max(noise, 1e-5)))
        agrees = w1.ratio <= AGREES_UP_TO
    else:
        agrees = all(d is None or d.ratio <= AGREES_UP_TO for d in (ks, shape))
    zeros = _zeros(nodes, weights, prediction, zero)
    blind = zero > numerical_zero(spectrum) and 1.0 - min(zeros) <= AGREES_UP_TO * noise
    # A floor that no distance between two laws could exceed tests nothing.
    hopeless = all(d is None or AGREES_UP_TO * d.noise >= 1.0 for d in (ks, shape))
    decision = None if agrees and (ks.value > _TOO_COARSE or blind or hopeless) else agrees
    verdict = agreement_in_words(
        agrees=decision,
        kolmogorov=ks,
        shape=shape,
        scale=scale,
        zeros=zeros,
        spread=spreads(nodes, weights, table, scale, zero),
        outliers=outliers,
        blind=zero if blind else None,
        estimated=spectrum.probes > 0 and noise > 2.0 * _width_noise(spectrum, prediction, size),
    )
    distances = tuple(d for d in (w1, ks, shape) if d is not None)
    words = {key: float(value) for key, value in prediction.scalars.items()} | facts
    return Report(
        name,
        spectrum,
        prediction,
        distances,
        outliers,
        verdict + gradients_in_words(words),
        decision,
        facts,
    )


def noise_floor(
    spectrum: Spectrum, prediction: Prediction, *, shape: bool = False, zero: float = 0.0, size: float | None = None
) -> float:
    """Kolmogorov distance to expect if the law were right: finite width, probes, steps of the data beyond `zero`."""
    width = _width_noise(spectrum, prediction, size, shape=shape)
    nodes, _ = points(spectrum)
    probe = probe_noise(spectrum)
    # A uniform error on [-w/2, w/2] has standard deviation w / sqrt(12) and supremum w / 2.
    beyond = nodes[np.abs(nodes) > zero] if (np.abs(nodes) > zero).any() else nodes
    step = math.sqrt(3.0) * float(spectrum.cdf_resolution(beyond, zero).max())
    return float(np.hypot(width, probe) + max(step, 0.5 / spectrum.dim))


def _width_noise(spectrum: Spectrum, prediction: Prediction, size: float | None, *, shape: bool = False) -> float:
    """The part of the noise floor that no better measurement lowers: networks of this size differ by as much."""
    stated = prediction.finite_size_error
    if shape or stated is None or not math.isfinite(stated):
        stated = None
    width = 0.0 if stated is None else stated
    if stated is None or (size is not None and size < spectrum.dim):
        # Eigenvalues are rigid, but how many sit on an atom is a binomial number.
        binomial = max((m * (1 - m) for _, m in prediction.measure.atoms()), default=0.0)
        units = spectrum.dim if size is None else min(size, spectrum.dim)
        width = max(width, _RIGID / units + math.sqrt(max(binomial, 0.0) / units))
    return width


def probe_noise(spectrum: Spectrum) -> float:
    """Kolmogorov distance that the sampling of probes gives; zero for an exact spectrum."""
    return _SUP_OVER_MIDDLE * float(spectrum.cdf_standard_error(points(spectrum)[0]).max())


def _moved(table: Tabulated, noise: float, dim: int) -> float:
    """Wasserstein distance to expect: of the shape, and of the mean, which wanders too."""
    shape = noise * (table.quantile(0.99) - table.quantile(0.01))
    return float(np.hypot(shape, math.sqrt(max(table.law.variance, 0.0) / dim)))


def _zeros(
    nodes: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], prediction: Prediction, zero: float
) -> tuple[float, float]:
    law = prediction.measure
    ends = np.asarray(law.cdf(np.array([-zero, zero])), dtype=np.float64)
    at_low_end = sum(mass for location, mass in law.atoms() if location == -zero)
    return float(weights[np.abs(nodes) <= zero].sum()), float(ends[1] - ends[0] + at_low_end)
