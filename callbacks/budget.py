"""What measuring may cost, and what it will."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_rmt.operators.trees import tensors_of


@dataclass
class Budget:
    """Seconds that measurements may take: `seconds` in all, or `fraction` of the run where that is more.

    Fields:
        seconds: granted in any case.
        fraction: of the time since `start`, measurements included.
        spent: seconds spent so far, those of earlier runs that were resumed among them.
        elapsed_before: seconds that earlier runs took.

    Example:
        >>> budget = Budget(seconds=1.0, fraction=0.0, spent=0.7)
        >>> budget.affords(0.2), budget.affords(0.5)
        (True, False)
    """

    seconds: float
    fraction: float
    spent: float = 0.0
    elapsed_before: float = 0.0
    _start: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.seconds < 0:
            raise ValueError(f"max_seconds = {self.seconds} is negative; 0 leaves the fraction of the run alone.")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"max_fraction = {self.fraction} must be between 0 and 1.")

    def start(self) -> None:
        """Let the clock of the run begin."""
        self._start = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds that the run has taken so far."""
        return self.elapsed_before + (0.0 if self._start is None else time.monotonic() - self._start)

    def affords(self, cost: float, *, reserve: float | None = None) -> bool:
        """Whether `cost` more seconds can be spent now.

        Args:
            cost: of the measurement.
            reserve: kept for the end of the run. With it, one measurement takes a quarter of what is left at most, so
                that what is cheap goes on when what is dear has to stop. None at the end itself.
        """
        left = max(self.seconds, self.fraction * self.elapsed) - self.spent
        return cost <= left if reserve is None else cost <= 0.25 * (left - reserve)

    @contextmanager
    def charged(self) -> Iterator[None]:
        """Charge the time of the block."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.spent += time.monotonic() - begin


def gradient_seconds(point: Any) -> float:
    """Time one forward and backward pass, the fastest of three; of the output's norm where there is no loss.

    0 if the pass fails: the measurement itself will say why. Differentiated by aliases of the parameters, since those
    may have hooks that are waiting for the gradients of training.
    """
    seconds = math.inf
    for _ in range(3):
        begin = time.monotonic()
        try:
            aliases = {n: p.detach().requires_grad_() for n, p in point.model.named_parameters() if p.requires_grad}
            output = point.output(aliases)
            value = point.loss(output, point.targets) if point.loss is not None else _first(output).norm()
            gradients = torch.autograd.grad(value, list(aliases.values()), allow_unused=True)
        except Exception:
            return 0.0
        # Reading a number waits for the device.
        sum(float(g.flatten()[0]) for g in gradients[:1] if g is not None)
        seconds = min(seconds, time.monotonic() - begin)
    return seconds


def _first(output: Any) -> Tensor:
    return tensors_of(output)[0]
