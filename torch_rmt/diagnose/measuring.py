"""How much to spend on one operator, and on which sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_rmt.describe import ForwardGraph, ends_of, record
from torch_rmt.diagnose.batch_statistics import with_batch_statistics
from torch_rmt.operators import Curvature, Jacobian, LinearOperator
from torch_rmt.spectra import Spectrum, affordable_spectrum, exact, spectrum_within

_DENSE = 512  # up to this size a dense decomposition costs less than an estimate
_DEPTH = 48  # products a probe
_SAMPLES = 20_000  # probes times dimension: sqrt(2 / (dim probes)) is then below the resolution of so many steps


def measure(operator: LinearOperator, seed: int = 0) -> Spectrum:
    """Exact spectrum of a small operator and of one whose dual is small, a Lanczos estimate of any other."""
    if min(operator.shape) <= _DENSE:
        return exact(operator)
    generator = torch.Generator(operator.device).manual_seed(seed)  # millions of numbers a probe are drawn there
    products = _DEPTH * max(1, min(8, _SAMPLES // min(operator.shape)))
    if isinstance(operator, Curvature):
        return affordable_spectrum(operator, generator, products=products)
    return spectrum_within(operator, generator, matvecs=products if operator.symmetric else 2 * products)


@dataclass(frozen=True)
class OneSample:
    """A network as a map of single samples, one forward pass of it, and the ends of the Jacobian to look at."""

    model: nn.Module
    sample: Any
    graph: ForwardGraph
    source: str | None
    target: str | None

    @property
    def ends(self) -> str:
        """Which Jacobian it is, in words."""
        target = repr(self.target) if self.target else "the output"
        source = repr(self.source) if self.source else "the input"
        return f"the Jacobian of {target} by {source}"

    def assumptions(self, model: nn.Module) -> tuple[str, ...]:
        """Which matrix it is, for the reader of a report on `model`."""
        ends = f"{self.ends}, for one sample"
        held = "batch norm held at the mean and variance of this batch"
        return (ends,) if self.model is model else (ends, held)


def one_sample(model: nn.Module, inputs: Any, source: str | None, target: str | None) -> OneSample:
    """Take the first sample of a batch, batch norms in training mode fixed at the batch's statistics.

    With neither end given, they are those of `default_ends`.

    Raises:
        ValueError: as `with_batch_statistics` and `record` do.
    """
    model, sample = with_batch_statistics(model, inputs), first_sample(inputs)
    graph = record(model, sample, keep=True)
    if source is None and target is None:
        source, target = ends_of(graph)
        if target is None:
            target = _of_several(model, sample, graph)
    return OneSample(model, sample, graph, source, target)


def _of_several(model: nn.Module, sample: Any, graph: ForwardGraph) -> str | None:
    """The module that made the first of several outputs; None where the output is one, or made by no module."""
    try:
        Jacobian(model, sample)
    except TypeError:
        made = [name for name, numbers in graph.module_outputs.items() if name and numbers == [graph.output]]
        return max(made, key=lambda name: name.count("."), default=None)
    return None


def first_sample(inputs: Any) -> Any:
    """The first sample of every tensor in the inputs, as a batch of one."""
    if isinstance(inputs, Tensor):
        return inputs[:1]
    if isinstance(inputs, dict):
        return {key: first_sample(value) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(first_sample(value) for value in inputs)
    return inputs
