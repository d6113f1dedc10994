"""`Prediction`: a law, the numbers that go with it, and what was assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch_rmt.measures.base import SpectralMeasure


@dataclass(frozen=True)
class Prediction:
    """What theory says of a spectrum.

    Fields:
        measure: the limiting law.
        scalars: numbers that belong to it ("chi", "q", "mean", "largest_eigenvalue", ...).
        assumptions: in words, each a condition under which the law holds.
        reference: paper and equation.
        finite_size_error: Kolmogorov distance to expect between the law and one draw of the thing at its actual
            size; None when not known.
    """

    measure: SpectralMeasure
    scalars: Mapping[str, float] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    reference: str = ""
    finite_size_error: float | None = None
