"""`diagnose`: spectra, laws, gradients and advice for a model and a batch, in one call, without a trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from torch_rmt.compare import Report
from torch_rmt.describe import unwrapped
from torch_rmt.diagnose.parts import freeness_report
from torch_rmt.diagnose.reports import curvature_report, hessian_report, jacobian_report
from torch_rmt.init import LayerSignal, chi_per_layer, gradient_ratio, signals
from torch_rmt.operators.batches import labelled

WHAT = ("jacobian", "freeness", "hessian", "gauss_newton", "fisher")


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Fields:
        reports: one a matrix, in the order asked for.
        signals: q and gradient norm at every weight, on the batch.
    """

    reports: tuple[Report, ...]
    signals: tuple[LayerSignal, ...]

    @property
    def chi(self) -> float:
        """Factor that the squared gradient takes from one weight to the one before it; NaN where unknown."""
        return chi_per_layer(self.signals)

    @property
    def gradient_ratio(self) -> float:
        """Gradient norm at the first weight over that at the last."""
        return gradient_ratio(self.signals) if self.signals else math.nan

    def __getitem__(self, name: str) -> Report:
        """Return the report of that name."""
        for report in self.reports:
            if report.name == name:
                return report
        raise KeyError(f"no report {name!r}; there are {', '.join(r.name for r in self.reports)}")

    def __str__(self) -> str:
        return "\n".join([self.summary(), *map(str, self.reports)])

    def scalars(self) -> dict[str, float]:
        """All reports' numbers, keyed by report, and those of the gradients."""
        out = {f"{report.name}/{key}": value for report in self.reports for key, value in report.scalars().items()}
        out |= {"chi": self.chi, "gradient_ratio": self.gradient_ratio}
        return {key: value for key, value in out.items() if math.isfinite(value)}

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells, its headings first."""
        rows: list[tuple[str, ...]] = [("spectrum", "mean", "largest", "distance to law", "noise", "verdict")]
        for report in self.reports:
            scalars, ks = report.scalars(), report.distance("kolmogorov")
            none = "scale only" if "wide/mean" in report.facts else "no law"
            distance = (none, "") if ks is None else (f"{ks.value:.3g}", f"{ks.noise:.3g}")
            largest = scalars.get("largest_eigenvalue", scalars["largest"])
            rows.append((report.name, f"{scalars['mean']:.3g}", f"{largest:.3g}", *distance, report.verdict))
        return rows

    def table(self) -> Table:
        """The reports as a rich table; print it with rich.print."""
        headings, *rows = self.rows()
        table = Table(title=self.summary(), title_justify="left", show_lines=True)
        for heading in headings:
            table.add_column(heading, overflow="fold", ratio=5 if heading == "verdict" else None)
        for row in rows:
            table.add_row(*row)
        return table

    def summary(self) -> str:
        """One line on the gradients."""
        if not self.signals:
            return "no weights were read: gradients are not followed through the layers"
        if len(self.signals) == 1:
            return f"one weight was read ({self.signals[0].name!r}): there are no layers to follow gradients through"
        if self.gradient_ratio == 0:
            return (
                f"no gradient reaches the first of {len(self.signals)} weights ({self.signals[0].name!r}): units are "
                "dead or saturated, or it does not act on the output"
            )
        return (
            f"chi {self.chi:.4g} a layer over {len(self.signals)} weights, gradient norm first/last "
            f"{self.gradient_ratio:.3g}"
        )

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page with every spectrum beside its law."""
        from torch_rmt.sinks import write_html

        return write_html(path, self.reports, summary=(self.summary(),), table=self.rows())


def diagnose(
    model: nn.Module,
    batch: tuple[Any, Any] | Mapping[str, Any],
    loss: Callable[[Any, Any], Tensor],
    *,
    what: Sequence[str] = ("jacobian", "hessian", "fisher"),
    seed: int = 0,
) -> Diagnosis:
    """Measure the spectra of a model on a batch and put each beside its law; the model is not disturbed.

    "jacobian": of the first sample, over the longest run of equally wide hidden layers (input to output where
    there is none), against the law for the architecture that was read off; valid at initialisation.
    "freeness": the same matrix against the free product of its measured factors, valid at any step of training:
    the distance is what training has aligned. "hessian": of the loss, against the free sum of its measured
    parts, Gauss-Newton and residual. "gauss_newton", "fisher": mean and largest eigenvalue against those of a wide
    network drawn at random on this batch, for chains of dense layers; measured alone for others.

    Args:
        model: in the mode that it is in.
        batch: (inputs, targets), or a mapping with "labels", whose entries the model takes as keywords.
        loss: loss(output, target) -> scalar, a mean over the batch.
        what: any of "jacobian", "freeness", "hessian", "gauss_newton", "fisher".
        seed: of all probes.

    Raises:
        ValueError: an unknown name in `what`, an empty batch, a loss that is not finite.
        TypeError: the batch is no pair, the model returns no tensor.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(16, 16), nn.Tanh())], nn.Linear(16, 3))
    >>> found = diagnose(net, (torch.randn(32, 16), torch.arange(32) % 3), nn.functional.cross_entropy)
    >>> [report.name for report in found.reports], found.chi < 0.6
    (['jacobian', 'hessian', 'fisher'], True)
    """
    unknown = [name for name in what if name not in WHAT]
    if unknown or isinstance(what, str) or not what:
        raise ValueError(f"what is a tuple of names out of {WHAT}, got {what!r}")
    if isinstance(batch, Mapping):
        batch = labelled(batch, model)
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise TypeError(f"the batch is a pair (inputs, targets), got {type(batch).__name__}")
    model, inputs = unwrapped(model), batch[0]
    try:
        return Diagnosis(_reports(model, batch, loss, tuple(what), seed), _signals(model, inputs))
    except Exception as error:
        why = _unmeasurable(model)
        if why is None:
            raise
        raise why from error


def _signals(model: nn.Module, inputs: Any) -> tuple[LayerSignal, ...]:
    try:
        return signals(model, inputs)
    except ValueError as error:
        if "no weights" not in str(error):
            raise
        return ()


def _reports(
    model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor], what: tuple[str, ...], seed: int
) -> tuple[Report, ...]:
    reports = []
    for name in what:
        try:
            reports.append(_report(name, model, batch, loss, seed))
        except TypeError as error:
            if isinstance(batch[0], tuple | list) and "positional argument" in str(error):
                raise TypeError(
                    f"{error}: inputs that are a tuple or list are the model's arguments one by one; if it takes the "
                    "tuple itself, the batch is ((inputs,), targets)"
                ) from error
            others = tuple(other for other in what if other != name)
            if not others:
                raise
            raise TypeError(f"{name}: {error}. For the other matrices alone: what={others}") from error
    return tuple(reports)


def _report(name: str, model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor], seed: int) -> Report:
    if name == "jacobian":
        return jacobian_report(model, batch[0], seed=seed)
    if name == "freeness":
        return freeness_report(model, batch[0], seed=seed)
    if name == "hessian":
        return hessian_report(model, batch, loss, seed=seed)
    kind: Literal["gauss_newton", "fisher"] = "gauss_newton" if name == "gauss_newton" else "fisher"
    return curvature_report(model, batch, loss, kind, seed=seed)


def _unmeasurable(model: nn.Module) -> Exception | None:
    """What is wrong with the weights, where a measurement failed and they are why."""
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            return TypeError(
                f"parameter {name!r} is complex, and spectra are of real maps: keep it as a real tensor and use "
                "torch.view_as_complex in forward"
            )
        if not isinstance(parameter, UninitializedParameter) and not bool(torch.isfinite(parameter.detach()).all()):
            return ValueError(
                f"parameter {name!r} has values that are not finite: training has diverged, or it was loaded so; "
                "measure before that step, or lower the learning rate"
            )
    return None
