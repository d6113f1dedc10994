"""One matrix of a model, measured and put beside its law."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from torch_rmt.compare import Report, compare, freeness_gap
from torch_rmt.describe import architecture_between, in_a_branch, independent_size_of, start_of
from torch_rmt.diagnose.measuring import measure, one_sample
from torch_rmt.diagnose.wide import beside_a_wide_network, wide_scale
from torch_rmt.learning_rate import largest_eigenvalue
from torch_rmt.operators import Fisher, GaussNewton, Hessian, Jacobian, LinearOperator
from torch_rmt.spectra import Spectrum
from torch_rmt.theory import Layer, Residual, jacobian_spectrum

_ONE_TENSOR = "not a tensor"  # as operators refuse a model that returns a tuple or a dict of several


def jacobian_report(
    model: nn.Module,
    inputs: Any,
    source: str | None = None,
    target: str | None = None,
    *,
    seed: int = 0,
    name: str = "jacobian",
) -> Report:
    """Compare the Jacobian between two modules, for the first sample, with the law of its architecture.

    With neither end given, over the longest run of equally wide hidden layers and residual blocks. Batch norm in
    training mode is held at the statistics of the whole batch, for measurement and law alike: the Jacobian is that of
    the map of one sample, whatever it does to the statistics left out. In evaluation mode the running statistics are
    used, as the network does. "chi" is the factor a layer in the mean square of a gradient that goes back through J,
    |J|_F^2 / (rows of J), a block counted as one; left out inside of a branch, which gradients pass by.

    Raises:
        ValueError: a name is wrong, or a batch norm in training mode has no batch to speak of or is called twice.
    """
    one = one_sample(model, inputs, source, target)
    operator = Jacobian(one.model, one.sample, one.source, one.target)
    spectrum = measure(operator, seed)
    facts: dict[str, float] = {}
    try:
        architecture = architecture_between(one.graph, one.model, one.source, one.target)
        blocks = float(sum(isinstance(layer, Residual) for layer in architecture.layers))
        depth = blocks + sum(isinstance(x, Layer) and isinstance(x.ensemble, str) for x in architecture.layers)
        # Gradients live at the rows: the mean over the columns, squared singular values, is another in a bottleneck.
        mean = spectrum.moment(1)[0] * operator.shape[1] / operator.shape[0]
        # Gradients take the other way past a branch: what it does to them is no advice.
        if mean > 0 and not in_a_branch(one.graph, start_of(one.graph, one.model, one.source)):
            facts |= {"depth": depth} | ({"blocks": blocks} if blocks else {})
            facts["chi"] = math.exp(math.log(mean) / max(depth, 1.0))
        size = independent_size_of(one.graph, one.model, one.source, one.target)
        prediction = jacobian_spectrum(architecture)
        # The law's entries may be half layers, a slope at the source or a weight at the end: count as measured.
        chi = prediction.scalars["chi"] ** (len(architecture.layers) / max(depth, 1.0))
        prediction = replace(
            prediction,
            assumptions=(*one.assumptions(model), *prediction.assumptions),
            scalars={**prediction.scalars, "chi": chi},
        )
        report = compare(spectrum, prediction, name=name, facts=facts, size=size)
    except (ValueError, ArithmeticError) as error:
        report = compare(spectrum, None, name=name, facts=facts, reason=str(error).rstrip("."))
    return replace(report, verdict=f"{report.verdict} This is {one.ends}.")


def hessian_report(
    model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor], *, seed: int = 0, name: str = "hessian"
) -> Report:
    """Compare the Hessian with the free sum of its two measured parts, H = Gauss-Newton + residual.

    Where the free sum cannot be computed, or the model returns no plain tensor so that there is no Gauss-Newton
    matrix, the report is without a law and says so. Fact "largest_eigenvalue"
    is converged, unlike the ends of the estimated spectrum; "gauss_newton/largest" and "residual/largest" are the
    largest sizes that the estimates of the parts found.
    """
    hessian = Hessian(model, loss, batch)
    try:
        gauss_newton = GaussNewton(model, loss, batch)
    except TypeError as error:
        if _ONE_TENSOR not in str(error):
            raise
        reason = "the model returns no plain tensor, so there is no Gauss-Newton part"
        whole = measure(hessian, seed)
        report = compare(whole, None, name=name, facts=_top(hessian, whole, seed), reason=reason)
        return replace(report, verdict=report.verdict + _top_in_words(report.facts))
    residual = hessian - gauss_newton
    parts = [measure(gauss_newton, seed + 1), measure(residual, seed + 2)]
    whole = measure(hessian, seed)
    facts = _top(hessian, whole, seed)
    for part, spectrum in zip(("gauss_newton", "residual"), parts, strict=True):
        facts[f"{part}/largest"] = max(abs(end) for end in spectrum.measure().bounds())
    try:
        report = freeness_gap(parts, whole, kind="sum", name=name, facts=facts)
    except (ValueError, ArithmeticError) as error:
        reason = f"the free sum of Gauss-Newton and residual part was not found ({error})"
        report = compare(whole, None, name=name, facts=facts, reason=reason)
    return replace(report, verdict=report.verdict + _top_in_words(facts))


def curvature_report(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor],
    name: Literal["gauss_newton", "fisher"],
    *,
    seed: int = 0,
) -> Report:
    """Compare the scale of a Gauss-Newton or Fisher matrix with that of a wide network drawn at random.

    Theory has no law for the whole spectrum in a general network; its mean and largest eigenvalue follow from the
    tangent kernel on this batch where the network is a chain of dense layers. The Fisher matrix of a loss that is no
    likelihood that we know is the empirical one, and the report says so.
    """
    reason, note = "theory has no law for it in such a network", ""
    operator: GaussNewton
    try:
        operator = (GaussNewton if name == "gauss_newton" else Fisher)(model, loss, batch)
        spectrum = measure(operator, seed)
    except TypeError as error:
        unknown, several = "not recognised" in str(error), _ONE_TENSOR in str(error)
        if name != "fisher" or not (unknown or several):
            raise
        operator = Fisher(model, loss, batch, kind="empirical")
        spectrum = measure(operator, seed)
        why = "the loss is no likelihood that we know" if unknown else "the model returns no plain tensor"
        reason = f"{why}, so this is the empirical Fisher matrix"
        note = f"{reason[0].upper()}{reason[1:]}."
    facts = _top(operator, spectrum, seed)
    try:
        scale = wide_scale(model, batch[0], operator)
    except (ValueError, ArithmeticError, RuntimeError) as error:
        why = str(error).rstrip(".")
        reason = why if "no curvature" in why else f"{reason} ({why})"
        return compare(spectrum, None, name=name, facts=facts, reason=reason)
    return beside_a_wide_network(compare(spectrum, None, name=name, facts=facts, reason=reason), scale, note=note)


def _top_in_words(facts: Mapping[str, float]) -> str:
    """Where the largest eigenvalue of a Hessian comes from, and what it means for the learning rate."""
    text = f" Largest eigenvalue {facts['largest_eigenvalue']:.3g}"
    if "residual/largest" in facts:
        text += (
            f"; {facts['gauss_newton/largest']:.3g} in the Gauss-Newton part, {facts['residual/largest']:.3g} in size "
            "in the residual part"
        )
    text += "."
    if "max_lr" in facts:
        text += f" Plain gradient descent is stable below a learning rate of {facts['max_lr']:.3g}."
    return text


def _top(operator: LinearOperator, spectrum: Spectrum, seed: int) -> dict[str, float]:
    """From the spectrum where that is exact, else by Lanczos."""
    if spectrum.eigenvalues is not None:
        value, error = float(spectrum.eigenvalues[-1]), 0.0
    else:
        top = largest_eigenvalue(operator, seed)
        value, error = top.value, top.error
    facts = {"largest_eigenvalue": value, "largest_eigenvalue_error": error}
    if value > 0:
        facts["max_lr"] = 2 / value
    return facts
