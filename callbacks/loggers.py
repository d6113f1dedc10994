"""A report to one of Lightning's loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch_rmt.compare import Report
from torch_rmt.sinks import JsonLinesSink, TensorBoardSink


def log_report(logger: Any, report: Report, step: int) -> None:
    """Log a report's scalars to any logger, and its pictures where the logger has a place for them.

    Scalars, those of single layers left out, go to every logger under the report's name, joined by the
    logger's own separator. TensorBoard gets a histogram and a figure too, a CSV logger the whole report as a
    line of `spectra.jsonl` in its folder.
    """
    separator = logger.group_separator
    charts = {f"{report.name}/{key}": value for key, value in report.scalars().items() if not _of_a_layer(key)}
    logger.log_metrics({key.replace("/", separator): value for key, value in charts.items()}, step=step)
    experiment = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_histogram_raw"):
        _tensorboard(experiment).write_pictures(report, step)
    elif type(logger).__name__ == "CSVLogger":
        JsonLinesSink(Path(logger.log_dir) / "spectra.jsonl").write(report, step)


def _of_a_layer(key: str) -> bool:
    """Whether a scalar is of one layer: a chart for each would bury the others ("predicted/chi/net.12")."""
    return key.count("/") > 1


def _tensorboard(writer: Any) -> TensorBoardSink:
    """One sink a writer, so that a missing matplotlib is said once."""
    sink = getattr(writer, "_torch_rmt_sink", None)
    if not isinstance(sink, TensorBoardSink):
        sink = TensorBoardSink(writer)
        writer._torch_rmt_sink = sink
    return sink
