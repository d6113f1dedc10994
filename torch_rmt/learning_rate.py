"""`suggest_lr`: the largest learning rate that the curvature of the loss allows, with its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_rmt.operators import GaussNewton, Hessian, LinearOperator
from torch_rmt.spectra import top_eigenvalues

_TOLERANCE = 1e-2  # of an eigenvalue: a learning rate needs no more


@dataclass(frozen=True)
class TopEigenvalue:
    """The largest eigenvalue of a curvature matrix; the interval value +- error holds one.

    Fields:
        value, error: Rayleigh quotient and residual.
        matvecs: products spent.
        converged: whether the error is below 1 % of the value.
    """

    value: float
    error: float
    matvecs: int
    converged: bool


@dataclass(frozen=True)
class LearningRateReport:
    """Bounds on the learning rate of plain gradient descent on this batch.

    Fields:
        hessian, gauss_newton: largest eigenvalues; of the second None where the model returns more than a tensor.
        max_lr: 2 / (largest of the two), beyond which a quadratic model of the loss diverges.
        low, high: max_lr over the error of the eigenvalue.
        suggested: half of `low`, at which the stiffest direction contracts fastest.
        advice: in words.
    """

    hessian: TopEigenvalue
    gauss_newton: TopEigenvalue | None
    max_lr: float
    low: float
    high: float
    suggested: float
    advice: str

    def __str__(self) -> str:
        return self.advice

    def scalars(self) -> dict[str, float]:
        """Finite numbers worth a curve."""
        out = {
            "max_lr": self.max_lr,
            "suggested_lr": self.suggested,
            "hessian/largest": self.hessian.value,
            "gauss_newton/largest": math.nan if self.gauss_newton is None else self.gauss_newton.value,
        }
        return {key: value for key, value in out.items() if math.isfinite(value)}


def suggest_lr(
    model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor], *, seed: int = 0
) -> LearningRateReport:
    """Bound the learning rate by 2 / lambda_max of the Hessian and of the Gauss-Newton matrix.

    Gradient descent on a quadratic of curvature lambda diverges for rates above 2 / lambda. The Gauss-Newton
    matrix (the Fisher matrix, for cross-entropy and squared loss) has no negative part and is the bound of
    Karakida et al.; the larger of the two eigenvalues counts. Both are measured on this batch: noise of small
    batches and growing curvature early in training (Cohen et al. 2021) both argue for a rate below it.

    Args:
        model: measured as it is, in its present mode, undisturbed.
        batch: (inputs, targets), a list of pairs, or a loader.
        loss: loss(output, target) -> scalar, a mean over the batch.
        seed: of the start vectors.

    Raises:
        ValueError: the loss is not finite, the batch is empty, nothing requires a gradient.
        TypeError: the batch is no pair.

    Source: LeCun et al. 1993; Karakida, Akaho and Amari 2019, section 4.

    >>> _ = torch.manual_seed(0)
    >>> net, x = nn.Linear(2, 1, bias=False), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> report = suggest_lr(net, (x, torch.zeros(2, 1)), nn.functional.mse_loss)  # Hessian diag(4, 1)
    >>> round(report.max_lr, 4)
    0.5
    """
    hessian = largest_eigenvalue(Hessian(model, loss, batch), seed)
    gauss_newton = None
    try:
        gauss_newton = largest_eigenvalue(GaussNewton(model, loss, batch), seed)
    except TypeError as error:
        if "not a tensor" not in str(error):
            raise
    measured = [hessian] if gauss_newton is None else [hessian, gauss_newton]
    top = max(measured, key=lambda e: e.value)
    if top.value <= top.error:
        return LearningRateReport(
            hessian, gauss_newton, math.inf, math.inf, math.inf, math.inf,
            "The loss has no positive curvature on this batch: it is flat or saturated, and no rate can be "
            "suggested. Look for gradients that vanish (diagnose), or initialise with critical_init_.",
        )  # fmt: skip
    low, high = 2 / (top.value + top.error), 2 / (top.value - top.error)
    advice = (
        f"Plain gradient descent on this batch is stable below {2 / top.value:.3g} (between {low:.3g} and "
        f"{high:.3g}); start near {low / 2:.3g}. With momentum m the bound is (1 + m) times as large. For "
        "Adam it does not hold: its steps are rescaled."
    )
    if gauss_newton is not None and gauss_newton.value > 1.1 * max(hessian.value, 0.0):
        alone = f"allows up to {2 / hessian.value:.3g} here" if hessian.value > 0 else "sets no bound here"
        advice += f" The Gauss-Newton matrix sets this bound; the Hessian alone {alone}, where its negative part helps."
    if gauss_newton is not None and gauss_newton.value > 0 and hessian.value > 2 * gauss_newton.value:
        advice += (
            f" The Hessian's top eigenvalue is {hessian.value / gauss_newton.value:.2g} times that of the "
            "Gauss-Newton matrix: curvature comes from the network bending, not from the fit; it falls as "
            "the error falls."
        )
    if not all(one.converged for one in measured):
        advice += " The eigenvalue is not converged to 1 %: the interval says how far."
    return LearningRateReport(hessian, gauss_newton, 2 / top.value, low, high, low / 2, advice)


def largest_eigenvalue(operator: LinearOperator, seed: int = 0) -> TopEigenvalue:
    """Largest algebraic eigenvalue of a symmetric operator, to 1 %."""
    generator = torch.Generator(operator.device).manual_seed(seed)  # millions of numbers a probe are drawn there
    found = top_eigenvalues(operator, 1, generator, tolerance=_TOLERANCE, end="largest")
    return TopEigenvalue(float(found.values[0]), float(found.residuals[0]), found.matvecs, found.converged)
