"""What the callbacks measure: functions from a point of training to reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch_rmt.callbacks.base import Measurement, Point
from torch_rmt.compare import Report
from torch_rmt.diagnose import diagnose, freeness_report, jacobian_report

# Lanczos steps, times parts, times the cost of a product; seen on a 48-layer network.
_GRADIENTS = {"jacobian": 50.0, "freeness": 100.0, "hessian": 600.0, "gauss_newton": 200.0, "fisher": 200.0}
CURVATURES = ("hessian", "gauss_newton", "fisher")


def jacobian_measurement(source: str | None, target: str | None) -> Measurement:
    """Measure the Jacobian between two modules on the first sample of the batch."""

    def measure(point: Point) -> Sequence[Report]:
        return (jacobian_report(point.model, point.inputs, source, target),)

    return Measurement(measure, _GRADIENTS["jacobian"])


def freeness_measurement(source: str | None, target: str | None) -> Measurement:
    """Measure the Jacobian between two modules and, one by one, its factors."""

    def measure(point: Point) -> Sequence[Report]:
        return (freeness_report(point.model, point.inputs, source, target),)

    return Measurement(measure, _GRADIENTS["freeness"])


def curvature_measurement(what: Sequence[str]) -> Mapping[str, Measurement]:
    """Measure matrices in parameter space on the whole batch, one measurement a matrix.

    Raises:
        ValueError: a name that is none of the matrices.
    """
    unknown = [name for name in what if name not in CURVATURES]
    if unknown or isinstance(what, str):
        raise ValueError(f"what = {what!r}; it is a sequence of names out of {', '.join(CURVATURES)}.")

    def measurement(name: str) -> Measurement:
        def measure(point: Point) -> Sequence[Report]:
            assert point.loss is not None
            return diagnose(point.model, (point.inputs, point.targets), point.loss, what=(name,)).reports

        return Measurement(measure, _GRADIENTS[name])

    return {name: measurement(name) for name in what}
