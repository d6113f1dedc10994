"""`SpectralCallback`: when to measure, what it may cost, where to log; what to measure its children say."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torch_rmt.callbacks.batches import BatchFunction, LossFunction, find_loss, find_model, split_pair
from torch_rmt.callbacks.blame import failing_module, first_not_finite
from torch_rmt.callbacks.budget import Budget, gradient_seconds
from torch_rmt.callbacks.critical import CriticalInit
from torch_rmt.callbacks.lightning_base import LightningCallback, defines_forward, logged_step
from torch_rmt.callbacks.loggers import log_report
from torch_rmt.callbacks.schedule import Schedule, logarithmic_then_regular
from torch_rmt.compare import Report
from torch_rmt.guard import undisturbed
from torch_rmt.operators.pure import arguments
from torch_rmt.operators.trees import tree_map
from torch_rmt.sinks import Sink

_SAME_LOSS = 0.1  # mixed precision moves a loss by a few per cent, another loss by more


@dataclass(frozen=True)
class Point:
    """What there is to measure at one step of training.

    Fields:
        model: the network, on its device, in eval mode.
        inputs, targets: of the batch that is about to be trained on.
        loss: `loss(output, target) -> scalar`; None where it is not known.
    """

    model: nn.Module
    inputs: Any
    targets: Any
    loss: LossFunction | None

    def output(self, parameters: Mapping[str, Tensor] | None = None) -> Any:
        """What the network returns, with `parameters` for its own; of copies of the inputs: layers work in place."""
        args, keywords = arguments(tree_map(torch.clone, self.inputs))
        return functional_call(self.model, dict(parameters or {}), args, keywords)


@dataclass(frozen=True)
class Measurement:
    """A function from a point of training to reports, and what it costs.

    Fields:
        take: the function.
        gradients: how many gradients of the loss take as long, roughly: the forecast before the first one.
    """

    take: Callable[[Point], Sequence[Report]]
    gradients: float


class SpectralCallback(LightningCallback):
    """Measures on a schedule, within a budget, without disturbing the run, and logs to every logger.

    A measurement takes place just before a batch is trained on, so that its point at x belongs to the same
    weights and the same batch as the loss that `self.log` puts at x; step 0 is the initialisation. One more
    is made when training ends. All processes measure (a model's forward pass may hold collectives), the
    first logs.

    The network is measured in eval mode, dropout off and BatchNorm with its running statistics: a Jacobian
    is of one sample, which has no batch statistics.

    A measurement that fails warns once, names the layer and a remedy, and training goes on.

    Args:
        schedule: `step -> bool`, step = optimiser steps done.
        max_seconds: what measuring may take in all. Points are skipped when it runs out, dear measurements
            first; enough is kept for the end.
        max_fraction: the share of the run's time that it may take, where that is more.
        batch: takes a batch, returns `(inputs, targets)`; the default takes batches that are such pairs, and mappings
            with "labels", whose entries the network takes as keywords.
        loss: takes `(output, target)`, returns a scalar; the default is the module's attribute `loss_fn`,
            `criterion`, `loss_func`, `loss_function` or `loss`.
        model: name of the submodule to measure; the default is the module itself, or its only child with
            weights where it has no `forward`.
        name: stands before the names in the logs ("critic" makes "critic/jacobian/mean"), for two callbacks of one
            kind in one run.
        sinks: take the reports as well, besides the trainer's loggers.

    Attributes:
        first, latest: the first and the newest report of each name, for use in code.
    """

    def __init__(
        self,
        *,
        schedule: Schedule = logarithmic_then_regular,
        max_seconds: float = 40.0,
        max_fraction: float = 0.05,
        batch: BatchFunction | None = None,
        loss: LossFunction | None = None,
        model: str | None = None,
        name: str = "",
        sinks: Sequence[Sink] = (),
    ) -> None:
        if not callable(schedule):
            raise TypeError(f"schedule must be a function step -> bool, not {schedule!r}; for every 100: regular(100).")
        self.schedule = schedule
        self.budget = Budget(max_seconds, max_fraction)
        self.batch = batch
        self.loss = loss
        self.model = model
        self.name = name
        self.sinks = tuple(sinks)
        self.first: dict[str, Report] = {}
        self.latest: dict[str, Report] = {}
        self._costs: dict[str, float] = {}
        self._gradient: float | None = None  # seconds that one takes, timed at the first point
        self._last_step = -1
        self._last_batch: Any = None
        self._warned: set[str] = set()
        self._guessed_loss: float | None = None

    @abstractmethod
    def measurements(self, has_loss: bool) -> Mapping[str, Measurement]:
        """Return what to measure, by name; `has_loss` says whether a `Point` will have one."""

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the state."""
        return f"{type(self).__qualname__}{self.name and f'({self.name})'}"

    # Lightning's hooks, in the order in which they are called.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a trainer that has nowhere to write to, and two callbacks that would write the same."""
        if stage == "fit" and not trainer.loggers and not self.sinks:
            raise ValueError(
                f"{type(self).__name__} has nowhere to write to: give the Trainer a logger, or the callback "
                "sinks=[JsonLinesSink('spectra.jsonl')]."
            )
        for other in trainer.callbacks:
            if isinstance(other, SpectralCallback) and other is not self and other.name == self.name:
                both = self.measurements(True).keys() & other.measurements(True).keys()
                if both:
                    raise ValueError(
                        f"{type(self).__name__} and {type(other).__name__} both log {', '.join(sorted(both))}: give "
                        "one of them a name=..., which then stands before it, or leave one out."
                    )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a module without a network to measure or a loss that is needed."""
        self._model(pl_module)
        self.measurements(self._loss(pl_module) is not None)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self.budget.start()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure if the schedule says so; with accumulated gradients once a step."""
        for other in trainer.callbacks:
            if isinstance(other, CriticalInit):  # first, wherever it stands in the list
                other.on_train_batch_start(trainer, pl_module, batch, batch_idx)
        step = logged_step(trainer)
        self._last_batch = batch
        if step != self._last_step and self.schedule(step):
            self._measure(trainer, pl_module, batch, step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare the loss that was guessed with the one that `training_step` returned, once."""
        expected, self._guessed_loss = self._guessed_loss, None
        returned = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if expected is None or not isinstance(returned, Tensor) or returned.numel() != 1:
            return
        # Lightning hands over the loss divided by the batches that are accumulated.
        actual = float(returned.detach()) * trainer.accumulate_grad_batches
        if abs(expected - actual) > _SAME_LOSS * abs(actual):
            self._warn(
                trainer,
                "loss",
                f"measures the curvature of a loss of {expected:.4g}, but training_step returned {actual:.4g}. "
                "Pass the loss that you train as loss=lambda output, target: ...",
            )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the end of training on the last batch."""
        step = logged_step(trainer)
        if step != self._last_step and self._last_batch is not None:
            self._measure(trainer, pl_module, self._last_batch, step, last=True)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the last batch."""
        self._last_batch = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain numbers."""
        return {
            "last_step": self._last_step,
            "spent": self.budget.spent,
            "elapsed": self.budget.elapsed,
            "costs": dict(self._costs),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where the earlier run stopped."""
        self._last_step = int(state_dict["last_step"])
        self.budget.spent = float(state_dict["spent"])
        self.budget.elapsed_before = float(state_dict["elapsed"])
        self._costs = {str(name): float(cost) for name, cost in state_dict["costs"].items()}

    # What the hooks call.

    def _model(self, module: nn.Module) -> nn.Module:
        return find_model(module, self.model, has_forward=defines_forward(module))

    def _loss(self, module: nn.Module) -> LossFunction | None:
        return find_loss(module) if self.loss is None else self.loss

    def _measure(self, trainer: Any, module: nn.Module, batch: Any, step: int, *, last: bool = False) -> None:
        self._last_step = step
        model, loss = self._model(module), self._loss(module)
        wanted = self.measurements(loss is not None)
        if self._gradient is not None and not any([self._affords(trainer, *w, last=last) for w in wanted.items()]):
            return  # before anything is copied or run
        point: Point | None = None
        reason = ""
        with ExitStack() as guard:
            try:
                guard.enter_context(undisturbed(module, *([loss] if isinstance(loss, nn.Module) else [])))
                batch = tree_map(torch.clone, batch)  # nothing that runs here can reach the batch to be trained on
                pair = split_pair(batch, model) if self.batch is None else self.batch(batch)
                point = Point(model, *pair, loss)
            except Exception as error:
                reason = _said(error)
            if trainer.world_size > 1 and not trainer.strategy.reduce_boolean_decision(point is not None, all=True):
                # One that goes on alone would wait for the others.
                reason, point = reason or "Another process could not read its batch.", None
            if point is None:
                self._warn(trainer, "batch", f"measures nothing at step {step}. {reason} This is said once.")
                return
            _silence(module)
            _freeze_untrained(trainer, module)
            with self.budget.charged():
                if self.loss is None and not self.latest and not last:
                    self._guessed_loss = _loss_at(point)
                module.eval()
                if self._gradient is None:
                    self._gradient = gradient_seconds(point)
            for name, measurement in wanted.items():
                if not self._affords(trainer, name, measurement, last=last):
                    continue
                before = self.budget.spent
                with self.budget.charged():
                    reports = self._take(trainer, name, measurement, point, step)
                    self.latest |= {report.name: report for report in reports}
                    self.first = self.latest | self.first
                    if trainer.is_global_zero:
                        self._log(trainer, reports, step)
                self._costs[name] = self.budget.spent - before

    def _affords(self, trainer: Any, name: str, measurement: Measurement, *, last: bool) -> bool:
        first = name not in self._costs
        cost = measurement.gradients * (self._gradient or 0.0) if first else self._costs[name]
        # The first of its kind may take all that is left, and tells what the next will take.
        reserve = None if first or last else math.fsum(self._costs.values())
        allowed = self.budget.affords(cost, reserve=reserve)
        if trainer.world_size > 1:
            # Processes that disagree would wait for each other inside the model's collectives.
            allowed = bool(trainer.strategy.broadcast(allowed))
        if not allowed:
            self._warn(
                trainer,
                f"budget/{name}",
                f"skips a {name} spectrum: one takes about {cost:.2g} s, and measuring has taken "
                f"{self.budget.spent:.2g} s so far. To have more, raise max_seconds "
                f"(now {self.budget.seconds:g}) or max_fraction (now {self.budget.fraction:g}).",
            )
        return allowed

    def _take(self, trainer: Any, name: str, measurement: Measurement, point: Point, step: int) -> Sequence[Report]:
        try:
            return measurement.take(point)
        except Exception as error:
            where = failing_module(error, point.model)
            spoilt = None
            if isinstance(error, (ValueError, ArithmeticError)):
                spoilt = first_not_finite(point.model, point.output)
            where = where or spoilt
            place = f"{f'in layer {where!r} ' if where else ''}of {type(point.model).__name__}"
            self._warn(
                trainer,
                name,
                f"could not measure the {name} spectrum at step {step} {place}: {_said(error)} Training goes on; "
                f"this is said once. {_remedy(error, name, spoilt)}",
            )
            return ()

    def _log(self, trainer: Any, reports: Sequence[Report], step: int) -> None:
        for report in reports:
            if self.name:
                report = replace(report, name=f"{self.name}/{report.name}")
            for target in (*trainer.loggers, *self.sinks):
                try:
                    if isinstance(target, Sink):
                        target.write(report, step)
                    else:
                        log_report(target, report, step)
                except Exception as error:
                    place = type(target).__name__
                    self._warn(trainer, f"log/{place}", f"could not write to {place}: {_said(error)}")

    def _warn(self, trainer: Any, key: str, text: str) -> None:
        if key not in self._warned and trainer.is_global_zero:
            warnings.warn(f"{type(self).__name__} {text}", RuntimeWarning, stacklevel=3)
        self._warned.add(key)


def _silence(module: nn.Module) -> None:
    """Make `self.log` do nothing: inside a transform it would store tensors that die with it. The guard undoes it."""
    for owner in module.modules():
        if hasattr(owner, "log_dict"):
            vars(owner).update(log=_nothing, log_dict=_nothing)


def _freeze_untrained(trainer: Any, module: nn.Module) -> None:
    """What no optimiser holds is no parameter of the training problem: moving averages. The guard undoes it."""
    trained = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    parameters = list(module.parameters())
    if any(id(p) in trained for p in parameters):  # a strategy may hand the optimiser others, which hold these
        for p in parameters:
            if id(p) not in trained:
                p.requires_grad_(False)


def _loss_at(point: Point) -> float | None:
    """The loss before training does its step; it draws the same dropout masks, for the random state is restored."""
    if point.loss is None:
        return None
    try:
        with torch.no_grad():
            return float(point.loss(point.output(), point.targets))
    except Exception:  # the measurement itself will say why
        return None


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def _said(error: Exception) -> str:
    text = str(error).strip().split("\n")[0][:400]
    return f"{type(error).__name__}: {text}{'' if text.endswith('.') else '.'}"


def _remedy(error: Exception, name: str, spoilt: str | None) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "Measure a smaller batch (batch=) or a part of the network (model=)."
    if spoilt is not None:
        return (
            f"{spoilt!r} is not finite: if the reports before were sound the run has diverged since, so lower the "
            "learning rate, clip gradients or draw the weights with CriticalInit; else look at the data."
        )
    if name in ("jacobian", "freeness"):
        kind = "JacobianSpectrum" if name == "jacobian" else "FreenessGap"
        return (
            f"Choose other ends with {kind}(source=..., target=...), or say what the network takes with "
            "batch=lambda batch: (inputs, targets); or leave it out."
        )
    return (
        "If training_step makes the loss otherwise, pass loss=lambda output, target: ... and "
        "batch=lambda batch: (inputs, targets); or leave this out."
    )
