"""`JsonLinesSink`: reports in a text file, one JSON object a line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

from torch_rmt.compare import Report


@runtime_checkable
class Sink(Protocol):
    """Whatever takes a report at a step of training."""

    def write(self, report: Report, step: int) -> None:
        """Take a report."""
        ...


class JsonLinesSink:
    """Appends `{"step": ..., "name": ..., "spectrum": ..., ...}` to a file, one line a report.

    Each line is complete in the file before `write` returns, and a part of a line is taken back (a full disk raises
    `OSError`) or, where the process was killed meanwhile, dropped by the next write: the file stays readable.
    Read it back with `[json.loads(line) for line in open(path)]`, or `pandas.read_json(path, lines=True)`.

    Args:
        path: the file; its folder is made if it is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, report: Report, step: int) -> None:
        """Append one line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"step": step} | report.as_dict(), allow_nan=False).encode() + b"\n"
        self.path.touch()
        with self.path.open("r+b", buffering=0) as file:
            end = file.truncate(_end_of_lines(file))
            try:
                file.seek(end)
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(end)
                raise


def _end_of_lines(file: BinaryIO) -> int:
    """Where the last whole line of a file ends."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        begin = max(0, end - 65_536)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0
