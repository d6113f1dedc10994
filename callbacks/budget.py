"""What measuring may cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


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
            raise ValueError(
                f"max_seconds = {self.seconds} is negative; 0 leaves the fraction of the run alone."
            )
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"max_fraction = {self.fraction} must be between 0 and 1.")

    def start(self) -> None:
        """Let the clock of the run begin."""
        self._start = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds that the run has taken so far."""
        return self.elapsed_before + (0.0 if self._start is None else time.monotonic() - self._start)

    def affords(self, cost: float) -> bool:
        """Whether `cost` more seconds stay within what is granted by now."""
        return self.spent + cost <= max(self.seconds, self.fraction * self.elapsed)

    @contextmanager
    def charged(self) -> Iterator[None]:
        """Charge the time of the block."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.spent += time.monotonic() - begin
