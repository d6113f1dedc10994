"""`CriticalInit`: the critical initialisation as a callback."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import nn

from torch_rmt.callbacks.batches import BatchFunction, find_model, split_pair
from torch_rmt.callbacks.lightning_base import LightningCallback, defines_forward
from torch_rmt.init import InitReport, critical_init_
from torch_rmt.operators.trees import tree_map


class CriticalInit(LightningCallback):
    """Draws the network's weights at their critical point, once, just before the first batch is trained on.

    What `critical_init_` does, on that batch: no data are read for it, so that workers, samplers and streams stay
    as they are. A run that is resumed keeps its weights. With several processes the first one's weights are sent to
    all. The measured effect goes to the loggers as `critical_init/...`, and the whole report is in `report`.

    Args:
        ensemble, sigma_b, q_star: as for `critical_init_`.
        model: name of the submodule to draw; the default is the module itself, or its only child with weights
            where it has no `forward`.
        batch: takes a batch, returns `(inputs, targets)`; the default takes batches that are such pairs, and mappings
            with "labels".
        example_input: used instead of the first batch.

    Attributes:
        report: the `InitReport`; None before training starts.

    Raises:
        ValueError: as `critical_init_`, at the first batch.
        RuntimeError: the parameters are sharded over processes.
    """

    def __init__(
        self,
        *,
        ensemble: Literal["orthogonal", "gaussian"] = "orthogonal",
        sigma_b: float | None = None,
        q_star: float | None = None,
        model: str | None = None,
        batch: BatchFunction | None = None,
        example_input: Any = None,
    ) -> None:
        if sigma_b is not None and q_star is not None:
            raise ValueError("give sigma_b or q_star, not both: each alone picks the critical point.")
        self.ensemble: Literal["orthogonal", "gaussian"] = ensemble
        self.sigma_b = sigma_b
        self.q_star = q_star
        self.model = model
        self.batch = batch
        self.example_input = example_input
        self.report: InitReport | None = None
        self._done = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a module without a network to draw, or one whose parameters no process holds whole."""
        model = self._model(pl_module)
        if any(hasattr(p, "full_tensor") for p in model.parameters()):
            raise RuntimeError(
                "CriticalInit cannot draw parameters that are sharded over processes: call "
                "torch_rmt.critical_init_(model, example_input) before the model is sharded."
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Draw the weights, unless that is done or the run is resumed."""
        if self._done:
            return
        self._done = True
        if trainer.global_step > 0:
            warnings.warn(
                "CriticalInit leaves the weights alone: the run is resumed from step "
                f"{trainer.global_step}; start without a checkpoint to draw them anew.",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        model = self._model(pl_module)
        example = self.example_input
        if example is None:
            batch = tree_map(torch.clone, batch)  # what runs here cannot reach the batch to be trained on
            example = (split_pair(batch, model) if self.batch is None else self.batch(batch))[0]
        else:
            example = pl_module.transfer_batch_to_device(example, pl_module.device, 0)
        self.report = critical_init_(model, example, ensemble=self.ensemble, sigma_b=self.sigma_b, q_star=self.q_star)
        if trainer.world_size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                torch.distributed.broadcast(tensor.detach(), 0)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                prefix = f"critical_init{logger.group_separator}"
                logger.log_metrics({prefix + key: v for key, v in self.report.scalars().items()}, step=0)

    def state_dict(self) -> dict[str, Any]:
        """Whether the weights have been drawn."""
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the weights of a resumed run."""
        self._done = bool(state_dict["done"])

    def _model(self, module: nn.Module) -> nn.Module:
        return find_model(module, self.model, has_forward=defines_forward(module))
