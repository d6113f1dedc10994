"""The difference between a measurement and its law in words, with what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from torch_rmt.compare.distances import Tabulated
from torch_rmt.compare.report import Distance, Outlier

_BAND = 10.0  # gradients that change by less than this over the whole chain do no harm
_SAME_SIZE = 0.05  # of |log of that change|, in words none
_NEAR_ONE = 0.1  # |log chi| up to which a layer is called critical
AGREES_UP_TO = 2.5  # in units of the noise floor
WHY_ANOTHER_SHAPE = (
    "At initialisation: weights are not independent, or a layer is not what it was read as; later: what training has "
    "built. "
)
# diagnose and the callbacks choose the steps themselves and have no argument for them: the parts below have.
MORE_STEPS = (
    "More probes and Lanczos steps resolve more: measure spectra.SLQ(probes=..., depth=...)(operator, generator) and "
    "hand that to compare or freeness_gap."
)
WHY_ANOTHER_SCALE = "At initialisation: q or sigma_w of some layer is not the one assumed. "


def agreement_in_words(
    *,
    agrees: bool | None,
    kolmogorov: Distance,
    shape: Distance | None,
    scale: float,
    zeros: tuple[float, float],
    spread: tuple[float, float],
    outliers: tuple[Outlier, ...],
    blind: float | None = None,
    estimated: bool = True,
) -> str:
    """Say whether the law holds and, if not, in what the measurement differs.

    Args:
        agrees: the decision; None where the noise is too large for one.
        kolmogorov, shape: the distances it rests on.
        scale: measured over predicted scale.
        zeros: share of numerical zeros, measured and predicted.
        spread: standard deviation of log eigenvalue (or of the eigenvalue), scale out, measured and
            predicted.
        outliers: beyond the edges.
        blind: size below which nearly all eigenvalues lie and are not told from zero, where that is why nothing is
            decided.
        estimated: whether more probes and Lanczos steps would lower the noise; else the matrix itself is the limit.
    """
    numbers = f"Kolmogorov distance {kolmogorov.value:.2g}, noise {kolmogorov.noise:.2g}"
    tail = ""
    if outliers:
        first = outliers[0]
        count = "one outlier" if len(outliers) == 1 else f"{len(outliers)} outliers"
        tail = (
            f" {count} beyond the law, the farthest at {first.location:.3g} (edge {first.edge:.3g}, "
            f"{first.margin:.0f} times the noise): a direction that independent weights do not make."
        )
        tail = tail[:1] + tail[1].upper() + tail[2:]
    if agrees is None and blind is not None:
        return (
            f"Too coarse to tell: {zeros[0]:.1%} of the eigenvalues lie below {blind:.2g}, which this measurement does "
            f"not tell from zero ({numbers}). {MORE_STEPS}" + tail
        )
    if agrees is None and estimated:
        return f"Too coarse to tell ({numbers}). {MORE_STEPS}" + tail
    if agrees is None:
        return (
            f"Too small to tell ({numbers}): drawn networks of this size differ by as much, wider ones by less." + tail
        )
    if agrees:
        return f"As predicted{' inside the edges' if outliers else ''} ({numbers})." + tail
    text = ""
    if abs(zeros[0] - zeros[1]) > max(AGREES_UP_TO * kolmogorov.noise, 0.02):
        more = "dead units or a bottleneck" if zeros[0] > zeros[1] else "fewer dead units than the law has"
        text += f"{zeros[0]:.0%} of the eigenvalues are zero, the law has {zeros[1]:.0%}: {more}. "
    same_shape = shape is not None and shape.value <= AGREES_UP_TO * shape.noise
    if same_shape and math.isfinite(scale):
        direction = "larger" if scale > 1 else "smaller"
        factor = scale if scale > 1 else 1 / scale
        text += f"Right shape, but {factor:.3g} times {direction} than predicted ({numbers}). "
        text += WHY_ANOTHER_SCALE
    else:
        measured, predicted = spread
        if predicted > 0 and measured > 1.1 * predicted:
            text += f"Wider than predicted: spread {measured:.3g} against {predicted:.3g} ({numbers}). "
        elif predicted > 0 and measured < predicted / 1.1:
            text += f"Narrower than predicted: spread {measured:.3g} against {predicted:.3g} ({numbers}). "
        else:
            text += f"Not as predicted ({numbers}). "
        text += WHY_ANOTHER_SHAPE
    return text.rstrip() + tail


def gradients_in_words(facts: Mapping[str, float]) -> str:
    """Say what chi means for this depth; "" where `facts` has no chi or all is well.

    Reads "chi", the factor that the squared gradient takes in one layer, "depth", the number of layers, and "blocks",
    how many of them are residual blocks: their scale is that of the branch, and not one weight's.
    """
    chi, depth = facts.get("chi", math.nan), facts.get("depth", math.nan)
    if not (math.isfinite(chi) and math.isfinite(depth) and chi > 0 and depth >= 1):
        return ""
    total = float(np.exp(np.clip(0.5 * depth * math.log(chi), -690, 690)))
    change = f"grow {_times(total)}" if total > 1 else f"shrink {_times(1 / total)}"
    change = "keep their size" if abs(math.log(total)) < _SAME_SIZE else change
    blocks = facts.get("blocks", 0.0)
    kind = "block" if blocks == depth else "layer or block" if blocks else "layer"
    several = "blocks" if blocks == depth else "layers and blocks" if blocks else "layers"
    over = f"over {depth:.0f} {kind if depth == 1 else several}."
    said = f"chi is {chi:.4g}, gradients {change} {over}"
    if 1 / _BAND < total < _BAND:
        return f" Critical: {said}" if abs(math.log(chi)) <= _NEAR_ONE else f" Shallow enough: {said}"
    if total > 1 and blocks:
        return (
            f" Chaotic: {said} Scale the branches down: the weight of the norm that ends each, or "
            "critical_init_(model, batch) where none does."
        )
    if total > 1:
        return f" Chaotic: {said} Lower sigma_w by {1 - chi**-0.5:.1%}, or call critical_init_(model, batch)."
    return f" Ordered: {said} Raise sigma_w {_by(chi**-0.5)}, or call critical_init_(model, batch)."


def _by(factor: float) -> str:
    return f"by {factor - 1:.1%}" if factor < _BAND else f"to {factor:.3g} times what it is"


def _times(factor: float) -> str:
    return f"{factor:.2g} times"


def spreads(nodes: np.ndarray, weights: np.ndarray, table: Tabulated, scale: float, zero: float) -> tuple[float, float]:
    """Standard deviation of log eigenvalue over what is not zero, measured and predicted.

    Where either has negative eigenvalues: of the eigenvalue itself, the measured one divided by `scale`.
    """
    if table.law.bounds()[0] >= -zero and nodes[0] >= -zero:
        up = nodes > zero
        if not up.any():
            return 0.0, table.log_deviation(zero)
        w = weights[up] / weights[up].sum()
        logs = np.log(nodes[up])
        return float(np.sqrt((w * (logs - (w * logs).sum()) ** 2).sum())), table.log_deviation(zero)
    mean = (weights * nodes).sum()
    measured = float(np.sqrt((weights * (nodes - mean) ** 2).sum()))
    factor = scale if math.isfinite(scale) and scale > 0 else 1.0
    return measured / factor, float(np.sqrt(max(table.law.variance, 0.0)))
