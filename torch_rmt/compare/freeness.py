"""The freeness gap: a measured whole against the law that its measured parts would give if they were free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from torch_rmt.compare.comparison import compare, probe_noise
from torch_rmt.compare.distances import numerical_zero, points
from torch_rmt.compare.report import Report
from torch_rmt.compare.verdict import WHY_ANOTHER_SCALE, WHY_ANOTHER_SHAPE
from torch_rmt.measures import Discrete, SpectralMeasure, free_add
from torch_rmt.measures.gauss_rule import gauss_rule
from torch_rmt.spectra import Spectrum
from torch_rmt.theory import Architecture, Layer, Prediction, jacobian_spectrum

# Kolmogorov distance times dimension of drawn A + O B O^T, at dimensions 60 to 200: below 3. Found by simulation.
_RIGID = 2.0
_ATOMS = 128  # of a part's law: the convolution's cost grows with them, its error is below 1 / _ATOMS
_NODES = (24, 16)  # of a factor's Gauss rule; 16 gave the law of ten factors to 1e-9. Found by tuning


def freeness_gap(
    parts: Sequence[Spectrum],
    whole: Spectrum,
    *,
    kind: Literal["sum", "product"],
    name: str = "freeness",
    facts: Mapping[str, float] | None = None,
    size: float | None = None,
) -> Report:
    """Compare a spectrum with the free convolution of its parts' spectra; valid at any step of training.

    For a sum of symmetric matrices, whole = A + B + ..., the law is the free additive convolution of the
    parts' laws; for a product, whole = the law of |... B A|^2, the free multiplicative one of the laws of A^T
    A, B^T B, ..., given in the order in which they act on a vector; they may be rectangular. The parts of random
    weights are free; what training aligns is not, and the distance says how much.

    `size` is the number of independent units where that is less than the dimension, as for weights that places share.

    Raises:
        ValueError: fewer than two parts, a product with a part that has negative eigenvalues, parts of which one
            has more nonzero eigenvalues than the next can take.
        ArithmeticError: the law was not found.

    Source: Pennington and Bahri 2017, section 4; Collins and Hayase 2023.

    >>> import numpy as np
    >>> coin = Spectrum(np.array([[-1.0, 1.0]]), np.array([[0.5, 0.5]]), dim=2, matvecs=2, method="exact")
    >>> report = freeness_gap([coin, coin], coin, kind="sum")
    >>> report.prediction.measure.support()                       # the arcsine law on [-2, 2]
    ((-2.0, 2.0),)
    """
    if len(parts) < 2:
        raise ValueError(f"a whole has at least two parts, got {len(parts)}")
    # What is rounding in one part is rounding in the sum.
    rounding = max(numerical_zero(part) for part in parts)
    units = min(size or whole.dim, whole.dim)
    # The zeros of an estimated part lie somewhere within its reach, and the law of the sum moves with them.
    zero = sum(spectrum.reach for spectrum in (*parts, whole)) if kind == "sum" else 0.0

    def against(law: SpectralMeasure) -> Report:
        prediction = Prediction(
            law,
            scalars={"parts": float(len(parts))},
            assumptions=("the measured parts are free of each other",),
            reference="Pennington and Bahri 2017, section 4" if kind == "sum" else "Collins and Hayase 2023",
            finite_size_error=math.hypot(_RIGID / units, *(probe_noise(part) for part in parts)),
        )
        return compare(whole, prediction, name=name, facts=facts, zero=zero, size=size)

    if kind == "sum":
        report = against(free_add(*(coarse(part, rounding) for part in parts)))
    else:
        try:
            report = against(_chain(parts, _NODES[0]))
        except ArithmeticError:  # nodes of next to no weight crowd at the ends of a wide law: take fewer
            report = against(_chain(parts, _NODES[1]))
    if report.agrees is None:
        return report
    if report.agrees:
        return replace(report, verdict=report.verdict.replace("As predicted", "The parts are free of each other", 1))
    words = report.verdict
    for why in (WHY_ANOTHER_SHAPE, WHY_ANOTHER_SCALE):
        words = words.replace(why.rstrip(), "").replace("predicted", "free parts would make it")
    return replace(report, verdict=" ".join(f"The parts are aligned. {words}".split()))


def _chain(parts: Sequence[Spectrum], nodes: int) -> SpectralMeasure:
    """The law of |A_K ... A_1|^2 from those of A_k^T A_k, each on so many nodes of its Gauss rule.

    The master equation sees a law only through E[s / (w - s)] at complex w. As a function of log s that is analytic up
    to the distance |arg w| from the real line, so the rule over log s converges geometrically, whatever the spread; the
    zeros are kept apart.
    """
    ends = [*(part.dim for part in parts[1:]), parts[-1].dim]  # of the last part its law has the rank
    layers = []
    for part, end in zip(parts, ends, strict=True):
        squares, weights = points(part)
        zero = numerical_zero(part)
        if squares[0] < -zero:
            raise ValueError("a product takes the law of A^T A for each part, which has no negative eigenvalue")
        kernel = squares <= zero
        if kernel.all():
            raise ValueError("a part is zero, and so is the whole")
        logs, masses = gauss_rule(np.log(squares[~kernel]), weights[~kernel], nodes)
        law = Discrete(np.append(0.0, np.exp(logs)), np.append(weights[kernel].sum(), masses))
        layers.append(Layer(part.dim, end, None, 1.0, ensemble=law))
    return jacobian_spectrum(Architecture(tuple(layers))).measure


def coarse(spectrum: Spectrum, rounding: float) -> Discrete:
    """The measured law with neighbours merged into their mean, at most some 2 * 128 atoms; the mean stays exact.

    Nodes that `rounding` alone may hold apart are one atom. If more than 256 are left, neighbours merge while their
    share of the mass and of the range stay below 1/128, so that outliers stay apart.
    """
    nodes, weights = points(spectrum)
    nodes, weights = _merged(nodes, weights, reach=rounding, mass=1.0)
    nodes = np.where(np.abs(nodes) <= rounding, 0.0, nodes)
    if nodes.size > 2 * _ATOMS:
        nodes, weights = _merged(nodes, weights, reach=(nodes[-1] - nodes[0]) / _ATOMS, mass=1 / _ATOMS)
    return Discrete(nodes, weights / weights.sum())


def _merged(
    nodes: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], *, reach: float, mass: float
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    starts = [0]
    gathered = weights[0]
    for i in range(1, nodes.size):
        if gathered + weights[i] > mass or nodes[i] - nodes[starts[-1]] > reach:
            starts.append(i)
            gathered = 0.0
        gathered += weights[i]
    total = np.add.reduceat(weights, starts)
    return np.add.reduceat(weights * nodes, starts) / total, total
