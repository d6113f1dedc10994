"""The Lightning classes, from whichever of its two packages are installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytorch_lightning import Callback

    class LightningCallback(Callback):
        """For the type checker, one of the two will do."""
else:

    def _installed() -> tuple[list[type], list[type]]:
        callbacks, modules = [], []
        for package in ("lightning.pytorch", "pytorch_lightning"):
            try:
                found = __import__(package, fromlist=["Callback", "LightningModule"])
            except ImportError:
                continue
            callbacks.append(found.Callback)
            modules.append(found.LightningModule)
        if not callbacks:
            raise ImportError(
                "torch_rmt.callbacks needs Lightning: pip install pytorch-lightning (or lightning); "
                "without a trainer use torch_rmt.diagnose."
            )
        return callbacks, modules

    _CALLBACKS, _MODULES = _installed()

    class LightningCallback(*_CALLBACKS):
        """A callback for the Trainers of both packages: their Callback classes are two."""


def defines_forward(module: Any) -> bool:
    """Whether a LightningModule has a `forward` of its own (the inherited one only raises)."""
    own = type(module).forward
    return all(own is not base.forward for base in _module_classes())


def _module_classes() -> list[Any]:
    classes: list[Any] = globals()["_MODULES"]
    return classes


def logged_step(trainer: Any) -> int:
    """Return the x that `self.log` uses: batches that stepped, whichever optimiser stepped.

    `global_step` counts every optimiser of a manual loop and would put our points beside the loss curve.
    """
    loop = trainer.fit_loop.epoch_loop
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))
