"""The Jacobian against the free product of its measured factors: what training has aligned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from torch_rmt.compare import Report, compare, freeness_gap
from torch_rmt.describe import SlopePart, WeightPart, independent_size_of, parts_of
from torch_rmt.diagnose.measuring import measure, one_sample
from torch_rmt.operators import Jacobian
from torch_rmt.spectra import Spectrum


def freeness_report(
    model: nn.Module,
    inputs: Any,
    source: str | None = None,
    target: str | None = None,
    *,
    seed: int = 0,
    name: str = "freeness",
) -> Report:
    """Compare the Jacobian between two modules, for the first sample, with the free product of its measured factors.

    J = D_L W_L ... D_1 W_1: each weight's squared singular values and each activation's squared slopes are measured
    where the network is now, and combined as if they were free of one another. At initialisation they are, up to
    finite width; the distance that grows from there is the alignment between layers that training has built. A norm is
    a factor, and a residual block is one as a whole: freeness is tested between blocks, and inside of a branch where
    both ends lie there. Ends and batch norm as in `jacobian_report`. Where the way was not understood, or has one part,
    the report is without a law and says so.

    Source: Collins and Hayase 2023 for the freeness at initialisation.
    """
    one = one_sample(model, inputs, source, target)
    whole = measure(Jacobian(one.model, one.sample, one.source, one.target), seed)
    try:
        found = parts_of(one.graph, one.model, one.source, one.target)
        if len(found) < 2:
            raise ValueError("this Jacobian is a single factor, and freeness is between two or more; name other ends")
        parts = [_spectrum(part, seed) for part in found]
        size = independent_size_of(one.graph, one.model, one.source, one.target)
        report = freeness_gap(parts, whole, kind="product", name=name, size=size)
        assert report.prediction is not None
        assumptions = (*one.assumptions(model), *report.prediction.assumptions)
        report = replace(report, prediction=replace(report.prediction, assumptions=assumptions))
    except (ValueError, ArithmeticError) as error:
        report = compare(whole, None, name=name, reason=str(error).rstrip("."))
    return replace(report, verdict=f"{report.verdict} This is {one.ends}.")


def _spectrum(part: WeightPart | SlopePart, seed: int) -> Spectrum:
    if isinstance(part, WeightPart):
        return measure(Jacobian(part.module, part.example), seed)
    keep = 1.0 - part.dropout
    squares = np.sort(part.slopes.cpu().numpy() ** 2) / keep**2
    weights = np.full(squares.size, keep / squares.size)
    if part.dropout > 0:  # by its law, not by the mask of this one measurement
        squares, weights = np.append(0.0, squares), np.append(part.dropout, weights)
    return Spectrum(squares[None], weights[None], part.slopes.numel(), matvecs=0, method="exact", symmetric=False)
