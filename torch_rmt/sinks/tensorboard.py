"""`TensorBoardSink`: scalars, a histogram, a figure and a place in the Spectra tab for every report."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from torch_rmt.compare import Report
from torch_rmt.sinks.drawing import Drawing, draw
from torch_rmt.sinks.figures import figure
from torch_rmt.sinks.spectra_tab import tab_record, tab_summary

_BUCKETS = 64


class TensorBoardSink:
    """Writes reports to TensorBoard.

    Each report gives, under its name: its scalars, a histogram of its eigenvalues (their log10 where they
    are squared singular values, zeros left out), a figure with the law over the measured density, and the same
    picture as numbers (5 to 10 kB) for the Spectra tab, which `tensorboard` shows wherever torch_rmt is installed.
    The figure needs matplotlib; without it one warning says what to install, and the rest is written.

    Args:
        target: a log directory, or a `SummaryWriter` that is open already.
    """

    def __init__(self, target: Any) -> None:
        if isinstance(target, str | Path):
            from torch.utils.tensorboard import SummaryWriter

            target = SummaryWriter(str(target))
        if not hasattr(target, "add_histogram_raw"):
            raise TypeError(f"TensorBoardSink takes a log directory or a SummaryWriter, not {type(target).__name__}.")
        self.writer: Any = target
        self._figures = True
        self._tab = True

    def write(self, report: Report, step: int) -> None:
        """Write scalars, histogram and figure."""
        for key, value in report.scalars().items():
            self.writer.add_scalar(f"{report.name}/{key}", value, step)
        self.write_pictures(report, step)

    def write_pictures(self, report: Report, step: int) -> None:
        """Write all but the scalars, where someone else logs those."""
        self._histogram(report, step)
        drawing = draw(report)
        self._spectra_tab(report, drawing, step)
        if not self._figures:
            return
        try:
            image = rgb(figure(report, drawing))
        except ImportError as error:
            self._figures = False
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
            return
        self.writer.add_image(f"{report.name}/spectrum", image, step, dataformats="HWC")

    def _histogram(self, report: Report, step: int) -> None:
        used = report.spectrum.weights > 0
        nodes = report.spectrum.nodes[used].astype(np.float64)
        counts = (report.spectrum.weights / report.spectrum.weights.shape[0])[used] * report.spectrum.dim
        tag = f"{report.name}/eigenvalues"
        if not report.spectrum.symmetric:
            tag = f"{report.name}/log10_eigenvalues"
            counts, nodes = counts[nodes > 0], np.log10(nodes[nodes > 0])
        if nodes.size == 0:
            return
        low, high = float(nodes.min()), float(nodes.max())
        pad = 1e-6 * max(abs(low), abs(high), 1e-30)
        heights, edges = np.histogram(nodes, bins=_BUCKETS, range=(low - pad, high + pad), weights=counts)
        self.writer.add_histogram_raw(
            tag,
            min=low,
            max=high,
            num=float(counts.sum()),
            sum=float((counts * nodes).sum()),
            sum_squares=float((counts * nodes**2).sum()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=heights.tolist(),
            global_step=step,
        )

    def _spectra_tab(self, report: Report, drawing: Drawing, step: int) -> None:
        if not self._tab:
            return
        summary = tab_summary(f"{report.name}/beside_its_law", tab_record(report, drawing))
        try:
            # SummaryWriter has no public method for a summary of one's own making.
            self.writer._get_file_writer().add_summary(summary, step)
        except (AttributeError, TypeError) as error:
            self._tab = False
            kind = f"{type(self.writer).__module__}.{type(self.writer).__name__}"
            warnings.warn(
                f"{kind} takes no summaries of ours ({error}), so that TensorBoard's Spectra tab stays empty; use "
                "torch.utils.tensorboard.SummaryWriter.",
                RuntimeWarning,
                stacklevel=3,
            )

    def flush(self) -> None:
        """Put everything on disk."""
        self.writer.flush()

    def close(self) -> None:
        """Close the writer."""
        self.writer.close()


def rgb(made: Any) -> Any:
    """Render a figure to an array of bytes, `(height, width, 3)`, without pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(made)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
