"""What the Spectra tab of TensorBoard shows of a report, as a JSON text in a tensor summary."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from jaxtyping import Float

from torch_rmt.compare import Report
from torch_rmt.sinks.drawing import Drawing

PLUGIN_NAME = "torch_rmt_spectra"
RECORD_VERSION = 1
"""What `torch_rmt.tensorboard_plugin`, which is loaded without torch_rmt, says too; raise both when records change."""

_MOST_OUTLIERS = 50
_MOST_LETTERS = 2000  # of a verdict; bounds the file, and no verdict is a quarter as long


def tab_record(report: Report, drawing: Drawing) -> dict[str, Any]:
    """Return plain numbers, strings, lists and dicts: the drawing in its own axis coordinate, and the words.

    The bars are equally wide, from "low" to "high"; "curve" holds the two rows of the law's continuous part, null in
    its gaps, and is empty where "law_bars" holds the mass of a law in very many pieces in the same bins. Coordinates
    are rounded to a 100,000th of the axis, heights to five digits, so that a record has a few thousand letters
    whatever the size of the network.
    """
    prediction = report.prediction
    curve_x, curve_y = drawing.curve_x, drawing.curve_y
    law_bars = None
    if curve_x.size == 2 * drawing.heights.size and np.array_equal(curve_x, np.repeat(drawing.edges, 2)[1:-1]):
        law_bars, curve_x, curve_y = curve_y[::2], curve_x[:0], curve_y[:0]
    scalars = report.scalars()
    return {
        "version": RECORD_VERSION,
        "name": report.name,
        "axis": {"scale": drawing.axis.scale, "unit": drawing.axis.unit},
        "label": drawing.label,
        "positive": not report.spectrum.symmetric,
        "low": drawing.low,
        "high": drawing.high,
        "bars": [_digits(height) for height in drawing.heights.tolist()],
        "curve": [_places(curve_x, drawing), [_digits(height) for height in curve_y.tolist()]],
        "law_bars": None if law_bars is None else [_digits(height) for height in law_bars.tolist()],
        "atoms": [[place, mass] for place, mass in drawing.atoms],
        "outliers": list(drawing.outliers[:_MOST_OUTLIERS]),
        "outlier_count": len(report.outliers),
        "notes": list(drawing.notes),
        "verdict": report.verdict[:_MOST_LETTERS],
        "agrees": report.agrees,
        "law": None
        if prediction is None
        else {"reference": prediction.reference, "assumptions": list(prediction.assumptions)},
        "distances": {d.kind: [_digits(d.value), _digits(d.noise)] for d in report.distances},
        "scalars": {key: _digits(scalars[key]) for key in ("largest", "smallest", "mean") if key in scalars},
        "measured": {
            "dim": report.spectrum.dim,
            "method": report.spectrum.method,
            "matvecs": report.spectrum.matvecs,
        },
    }


def tab_summary(tag: str, record: dict[str, Any]) -> Any:
    """Return TensorBoard's `Summary` of a record: a scalar tensor of one string under the name of our plugin."""
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    text = json.dumps(record, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    metadata = SummaryMetadata(
        plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME),
        display_name=record["name"],
        data_class=DATA_CLASS_TENSOR,
    )
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=TensorShapeProto(), string_val=[text])
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])


def _digits(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _places(x: Float[np.ndarray, " n"], drawing: Drawing) -> list[float | None]:
    decimals = max(0, 5 - math.floor(math.log10(drawing.high - drawing.low)))
    return [round(u, decimals) if math.isfinite(u) else None for u in x.tolist()]
