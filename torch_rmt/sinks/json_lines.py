"""`JsonLinesSink`: reports in a text file, one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch_rmt.compare import Report


@runtime_checkable
class Sink(Protocol):
    """Whatever takes a report at a step of training."""

    def write(self, report: Report, step: int) -> None:
        """Take a report."""
        ...


class JsonLinesSink:
    """Appends `{"step": ..., "name": ..., "spectrum": ..., ...}` to a file, one line a report.

    Each line is complete on disk before `write` returns, so that a run that dies leaves a readable file.
    Read it back with `[json.loads(line) for line in open(path)]`, or `pandas.read_json(path, lines=True)`.

    Args:
        path: the file; its folder is made if it is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, report: Report, step: int) -> None:
        """Append one line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"step": step} | report.as_dict(), allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
