"""`SpectralMonitor` and its two parts, `JacobianSpectrum` and `CurvatureSpectrum`, and `FreenessGap`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch_rmt.callbacks.base import Measurement, SpectralCallback
from torch_rmt.callbacks.measure import curvature_measurement, freeness_measurement, jacobian_measurement

Curvature = Literal["hessian", "fisher", "gauss_newton"]


class JacobianSpectrum(SpectralCallback):
    """Logs the squared singular values of the Jacobian between two layers beside the law of the architecture.

    The law is that of the network with the weights' present scales; at initialisation it holds within the
    noise floor, and the distance that grows from there is structure that training has built. Widened or
    vanishing spectra say that gradients explode or die. The sample is the first of the batch.

    Args:
        source, target: module names; the Jacobian is of the target's output by the source's. The default is
            the longest run of equally wide layers, from its first pre-activation to its last.
        others: as for `SpectralCallback`.

    Example:
        >>> monitor = JacobianSpectrum(schedule=lambda step: step % 100 == 0, max_seconds=20)
    """

    def __init__(self, *, source: str | None = None, target: str | None = None, **others: Any) -> None:
        super().__init__(**others)
        self._measurement = jacobian_measurement(source, target)

    def measurements(self, has_loss: bool) -> Mapping[str, Measurement]:
        """Return the one measurement; it needs no loss."""
        return {"jacobian": self._measurement}


class FreenessGap(SpectralCallback):
    """Logs the same Jacobian beside the free product of its measured factors: the structure that training builds.

    Unlike the law of the architecture this one holds at every step as long as the layers stay free of one another;
    the distance is how far training has aligned them, whatever it did to each layer's own spectrum.

    Args:
        source, target: as for `JacobianSpectrum`.
        others: as for `SpectralCallback`.

    Example:
        >>> gap = FreenessGap(schedule=lambda step: step % 200 == 0)
    """

    def __init__(self, *, source: str | None = None, target: str | None = None, **others: Any) -> None:
        super().__init__(**others)
        self._measurement = freeness_measurement(source, target)

    def measurements(self, has_loss: bool) -> Mapping[str, Measurement]:
        """Return the one measurement; it needs no loss."""
        return {"freeness": self._measurement}


class CurvatureSpectrum(SpectralCallback):
    """Logs the spectra of the loss's Hessian, Fisher or Gauss-Newton matrix in parameter space.

    Args:
        what: which of "hessian", "fisher" and "gauss_newton".
        others: as for `SpectralCallback`.

    Raises:
        ValueError: an unknown name; when training starts, if no loss is given and the module has none.
    """

    def __init__(
        self,
        *,
        what: Sequence[Curvature] = ("hessian", "fisher"),
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self._measurements = curvature_measurement(what)

    def measurements(self, has_loss: bool) -> Mapping[str, Measurement]:
        """Return one measurement a matrix."""
        if not has_loss:
            raise ValueError(f"{type(self).__name__} knows no loss. {_HOW_TO_GIVE_A_LOSS}")
        return self._measurements


class SpectralMonitor(SpectralCallback):
    """Logs Jacobian, Hessian and Fisher spectra beside their laws; the defaults are meant to be enough.

    Steps 0, 10, 20, 40, ..., 320, then every 500; one chart group a spectrum, not one a layer; 40 seconds
    of measuring in all, or 5 % of the run where that is more. For a choice of layers, matrices or costs use
    `JacobianSpectrum` and `CurvatureSpectrum`, of which this is the sum.

    Args:
        others: as for `SpectralCallback`.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[SpectralMonitor()], accelerator="cpu")
    """

    def __init__(self, **others: Any) -> None:
        super().__init__(**others)
        self._measurements: dict[str, Measurement] = {
            "jacobian": jacobian_measurement(None, None),
            **curvature_measurement(("hessian", "fisher")),
        }

    def measurements(self, has_loss: bool) -> Mapping[str, Measurement]:
        """Return all three; without a loss the Jacobian alone, and say so once."""
        if has_loss:
            return self._measurements
        if "no loss" not in self._warned:
            self._warned.add("no loss")
            warnings.warn(
                f"SpectralMonitor measures the Jacobian only: it knows no loss. {_HOW_TO_GIVE_A_LOSS}",
                RuntimeWarning,
                stacklevel=2,
            )
        return {"jacobian": self._measurements["jacobian"]}


_HOW_TO_GIVE_A_LOSS = "Pass loss=lambda output, target: ..., or keep the loss as loss_fn or criterion of the module."
