"""Free convolutions: sums, products, powers and compressions of free variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from torch_rmt.measures.base import SpectralMeasure
from torch_rmt.measures.classical import Semicircle
from torch_rmt.measures.composite import Affine, affine, dilate
from torch_rmt.measures.convolution import FreeConvolution, FreeProduct, FreeSum
from torch_rmt.measures.discrete import Discrete, PointMass
from torch_rmt.measures.geometry import Factor


def _point(measure: SpectralMeasure) -> float | None:
    """Location of a law that is one point, else None."""
    if isinstance(measure, Discrete):
        return float(measure.nodes[0]) if measure.nodes.size == 1 else None
    if isinstance(measure, FreeConvolution):
        return None
    low, high = measure.bounds()
    return low if low == high else None


def _merge(factors: list[Factor]) -> tuple[Factor, ...]:
    """Join equal laws into one with a larger count."""
    merged: dict[tuple[int, float], Factor] = {}
    for f in factors:
        key = (id(f.law), f.dimension)
        count = f.count + (merged[key].count if key in merged else 0.0)
        merged[key] = Factor(f.law, count, f.dimension)
    return tuple(merged.values())


def _sum(terms: list[tuple[SpectralMeasure, float]]) -> SpectralMeasure:
    shift, gaussian, factors = 0.0, 0.0, []
    queue = list(terms)
    while queue:
        law, count = queue.pop(0)
        location = _point(law)
        if location is not None:
            shift += count * location
        elif isinstance(law, Semicircle):
            shift, gaussian = shift + count * law.mean, gaussian + count * law.variance
        elif isinstance(law, FreeSum):
            queue = [(f.law, f.count * count) for f in law.factors] + queue
        elif isinstance(law, Affine) and law.scale == 1.0:
            shift += count * law.shift
            queue.insert(0, (law.base, count))
        else:
            factors.append(Factor(law, count))
    if gaussian > 0:
        factors.append(Factor(Semicircle(gaussian)))
    if not factors:
        return PointMass(shift)
    merged = _merge(factors)
    if len(merged) == 1 and merged[0].count == 1.0:
        return affine(merged[0].law, 1.0, shift)
    return affine(FreeSum(merged), 1.0, shift)


def free_add(*measures: SpectralMeasure) -> SpectralMeasure:
    """Free additive convolution: the law of a sum of free variables (large matrices in general position).

    All summands are solved for at once; sums of sums are flattened, so that error does not nest.
    Source: Voiculescu 1986; subordination after Belinschi and Bercovici 2007.

    Raises:
        ValueError: without a measure.

    >>> free_add(Semicircle(1.0), Semicircle(2.0, mean=1.0))
    Semicircle(variance=3.0, mean=1.0)
    """
    if not measures:
        raise ValueError("free_add needs at least one measure")
    return _sum([(measure, 1.0) for measure in measures])


def _product(terms: list[tuple[SpectralMeasure, float]]) -> SpectralMeasure:
    scale, factors = 1.0, []
    signed: SpectralMeasure | None = None
    queue = list(terms)
    while queue:
        law, count = queue.pop(0)
        location = _point(law)
        if location is not None:
            if location < 0 and count != round(count):
                raise ValueError("a real power of a negative number is no law: use an integer power")
            scale *= location**count
        elif isinstance(law, FreeProduct) and all(f.dimension == 1.0 for f in law.factors):
            queue = [(f.law, f.count * count) for f in law.factors] + queue
        elif isinstance(law, Affine) and law.shift == 0.0 and law.scale > 0:
            scale *= law.scale**count
            queue.insert(0, (law.base, count))
        elif law.bounds()[0] < 0:
            if signed is not None or count != 1.0:
                raise ValueError(
                    "a free multiplicative convolution needs all laws but one on [0, infinity); "
                    f"{law!r} is a second one with negative support: square it, or symmetrise the product"
                )
            signed = law
        else:
            factors.append(Factor(law, count))
    if scale == 0.0:
        return PointMass(0.0)
    merged = _merge(factors)
    if signed is not None:
        merged = (Factor(signed), *merged)
    if not merged:
        return PointMass(scale)
    if len(merged) == 1 and merged[0].count == 1.0:
        return dilate(merged[0].law, scale)
    return dilate(FreeProduct(merged), scale)


def free_mul(*measures: SpectralMeasure) -> SpectralMeasure:
    """Free multiplicative convolution: the law of A^(1/2) B A^(1/2) for free A >= 0 and B; at most one may be signed.

    Source: Voiculescu 1987; subordination after Belinschi and Bercovici 2007.

    Raises:
        ValueError: without a measure, or with two laws that reach below zero.

    >>> from torch_rmt.measures.classical import MarchenkoPastur
    >>> round(free_mul(MarchenkoPastur(1.0), MarchenkoPastur(1.0)).moment(2), 10)
    3.0
    """
    if not measures:
        raise ValueError("free_mul needs at least one measure")
    return _product([(measure, 1.0) for measure in measures])


def free_power(
    measure: SpectralMeasure,
    n: float | int,
    *,
    kind: Literal["multiplicative", "additive"] = "multiplicative",
) -> SpectralMeasure:
    """Convolution of a law with itself n times, for any real n >= 1.

    Source: Nica and Speicher 1996 (additive), Belinschi and Bercovici 2005 (multiplicative, n real).

    Raises:
        ValueError: for n < 1, an unknown kind, or a multiplicative power of a law with negative support.

    >>> free_power(Semicircle(), 2.5, kind="additive")
    Semicircle(variance=2.5, mean=0.0)
    """
    if not (np.isfinite(n) and n >= 1):
        raise ValueError(
            f"a free power needs a finite exponent n >= 1 (below one the result need not be a law), got {n}"
        )
    if kind == "additive":
        return _sum([(measure, float(n))])
    if kind == "multiplicative":
        return measure if n == 1 else _product([(measure, float(n))])
    raise ValueError(f'kind must be "multiplicative" or "additive", got {kind!r}')


def free_compress(measure: SpectralMeasure, fraction: float | int) -> SpectralMeasure:
    """Law of a corner: P X P seen in the range of a free projection P of rank `fraction`.

    Equals the additive power 1 / fraction, dilated by fraction. Source: Nica and Speicher 1996.

    Raises:
        ValueError: for a fraction outside (0, 1].

    >>> free_compress(Semicircle(), 0.25)
    Semicircle(variance=0.25, mean=0.0)
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction that is kept must lie in (0, 1], got {fraction}")
    return dilate(free_power(measure, 1.0 / fraction, kind="additive"), fraction)


def rectangular_product(laws: Sequence[SpectralMeasure], widths: Sequence[int | float]) -> SpectralMeasure:
    """Law of J^T J for J = A_L ... A_1 with free rectangular factors, in the dimension of the input.

    `laws[l]` is the law of A_(l+1)^T A_(l+1), a matrix of the dimension of its own input, `widths[l]`; `widths[-1]` is
    the dimension of the output. All factors are solved for at once: M_l(w_l) = (n_0 / n_(l-1)) M(z).
    Source: Benaych-Georges 2009; Pennington, Schoenholz and Ganguli 2018.

    Raises:
        ValueError: if there is not one width more than laws, a width is not positive, a law reaches below zero, or its
            atom at 0 is smaller than its shape forces (a factor to a narrower layer has a kernel).

    >>> from torch_rmt.measures.classical import MarchenkoPastur
    >>> law = MarchenkoPastur(0.5)  # of A^T A, A of shape (200, 100) with variance 1/200
    >>> round(rectangular_product([law, dilate(MarchenkoPastur(2.0), 2.0)], [100, 200, 100]).mean, 12)
    2.0
    """
    if len(widths) != len(laws) + 1 or not laws:
        raise ValueError(f"{len(laws)} factors need {len(laws) + 1} widths, from input to output; got {len(widths)}")
    if any(not (np.isfinite(width) and width > 0) for width in widths):
        raise ValueError(f"widths must be positive, got {list(widths)}")
    scale, factors = 1.0, []
    for law, here, after in zip(laws, widths[:-1], widths[1:], strict=True):
        if law.bounds()[0] < 0:
            raise ValueError(f"{law!r} is no law of A^T A: it reaches below zero")
        kernel = sum(mass for location, mass in law.atoms() if location == 0.0)
        if kernel < 1.0 - after / here - 1e-9:
            raise ValueError(
                f"{law!r} has mass {kernel:g} at 0, but a factor from width {here} to {after} has at least "
                f"{1 - after / here:g}: pass the law of A^T A, of the dimension of its input"
            )
        location = _point(law)
        if location is not None and widths[0] == here:
            scale *= location
        else:
            factors.append(Factor(law, 1.0, widths[0] / here))
    if scale == 0.0:
        return PointMass(0.0)
    merged = _merge(factors)
    if not merged:
        return PointMass(scale)
    if len(merged) == 1 and merged[0].count == 1.0 and merged[0].dimension == 1.0:
        return dilate(merged[0].law, scale)
    return dilate(FreeProduct(merged), scale)
