"""`Report`: a measured spectrum and its prediction side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from torch_rmt.measures import SpectralMeasure
from torch_rmt.spectra import Spectrum
from torch_rmt.theory import Prediction


@dataclass(frozen=True)
class Distance:
    """A distance between the measured spectrum and the law, with the value that noise alone would give.

    Fields:
        kind: "wasserstein", "kolmogorov" or "shape" (Kolmogorov distance with the scale taken out).
        value: the distance; in units of eigenvalues for "wasserstein", a probability for the others.
        noise: what finite width and probe noise would give if the law were right.
    """

    kind: str
    value: float
    noise: float

    @property
    def ratio(self) -> float:
        """Distance in units of its noise floor."""
        if self.noise > 0:
            return self.value / self.noise
        return math.inf if self.value > 0 else 0.0


@dataclass(frozen=True)
class Outlier:
    """An eigenvalue beyond the law's edge.

    Fields:
        location: the eigenvalue.
        mass: the share of the spectrum that sits there.
        edge: the end of the law's support that it lies beyond.
        margin: (distance beyond the edge) / (what noise moves an extreme eigenvalue by); 3 and more is
            significant.
    """

    location: float
    mass: float
    edge: float
    margin: float


@dataclass(frozen=True)
class Report:
    """A measured spectrum beside its law; the only thing that a sink or a callback receives.

    Fields:
        name: what was measured ("jacobian", "hessian/fc1", ...); the tag in every log.
        spectrum: the measurement.
        prediction: the law; None where theory has none for this model, and `verdict` says why.
        distances: each with its noise floor; empty without a prediction.
        outliers: significant eigenvalues beyond the law's edges, the farthest first.
        verdict: in words, with what to do.
        agrees: whether what was predicted (the law, or a scale alone) holds within noise; None without a prediction, or
            where noise hides the answer.
        facts: numbers measured on the way ("chi", "gradient_ratio", ...); they join `scalars()`.

    The JSON is strict: no NaN or infinity in it, they become null.
    """

    name: str
    spectrum: Spectrum
    prediction: Prediction | None
    distances: tuple[Distance, ...] = ()
    outliers: tuple[Outlier, ...] = ()
    verdict: str = ""
    agrees: bool | None = None
    facts: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {self.verdict}"

    def distance(self, kind: str) -> Distance | None:
        """Return the distance of that kind, or None where it was not taken."""
        return next((d for d in self.distances if d.kind == kind), None)

    def scalars(self) -> dict[str, float]:
        """Return the finite numbers worth a curve over training, keyed without the report's name."""
        measure = self.spectrum.measure()
        low, high = measure.bounds()
        out = {"mean": measure.mean, "variance": measure.variance, "smallest": low, "largest": high}
        for d in self.distances:
            out[f"distance/{d.kind}"] = d.value
            out[f"distance/{d.kind}_noise"] = d.noise
        if self.prediction is not None:
            out["outliers"] = float(len(self.outliers))
            out |= {f"predicted/{key}": float(value) for key, value in self.prediction.scalars.items()}
        out |= {key: float(value) for key, value in self.facts.items()}
        return {key: float(value) for key, value in out.items() if math.isfinite(value)}

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts: what `to_json` writes."""
        spectrum = {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in ((f, getattr(self.spectrum, f)) for f in self.spectrum.__dataclass_fields__)
        }
        law: dict[str, Any] | None = None
        if self.prediction is not None:
            x, density = density_curve(self.prediction.measure)
            law = {
                "x": x.tolist(),
                "density": density.tolist(),
                "support": self.prediction.measure.support(),
                "atoms": self.prediction.measure.atoms(),
                "scalars": dict(self.prediction.scalars),
                "assumptions": self.prediction.assumptions,
                "reference": self.prediction.reference,
                "finite_size_error": self.prediction.finite_size_error,
            }
        plain: dict[str, Any] = _plain(
            {
                "name": self.name,
                "spectrum": spectrum,
                "prediction": law,
                "distances": [asdict(d) for d in self.distances],
                "outliers": [asdict(o) for o in self.outliers],
                "verdict": self.verdict,
                "agrees": self.agrees,
                "facts": dict(self.facts),
                "scalars": self.scalars(),
            }
        )
        return plain

    def to_json(self) -> str:
        """Return `as_dict()` as one line of strict JSON."""
        return json.dumps(self.as_dict(), allow_nan=False)


def density_curve(
    measure: SpectralMeasure, points: int = 400
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Tabulate the continuous part of a law for drawing: `(x, density)`, atoms left out.

    The points lie denser at the edges of each interval of the support, and geometrically where a positive
    interval spans more than two decades; a density that is infinite at a hard edge is left out there.
    """
    xs: list[Float[np.ndarray, " n"]] = []
    intervals = measure.support()
    for low, high in intervals:
        n = max(points // len(intervals), 16)
        t = 0.5 - 0.5 * np.cos(np.pi * (np.arange(n) + 0.5) / n)
        linear = low + (high - low) * t
        if low >= 0 and high > 100 * max(low, 0.0):
            start = max(low, 1e-8 * high)
            xs.append(np.concatenate([linear[::2], start * (high / start) ** t[1::2]]))
        else:
            xs.append(linear)
    if not xs:
        return np.zeros(0), np.zeros(0)
    x = np.unique(np.concatenate(xs))
    density = np.asarray(measure.density(x), dtype=float)
    fine = np.isfinite(density)
    return x[fine], density[fine]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
