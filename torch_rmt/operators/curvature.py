"""Curvature of a loss in parameter space: Hessian, Gauss-Newton, Fisher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_rmt.operators.base import LinearOperator
from torch_rmt.operators.pure import PureModel, first_tensor

Loss = Callable[[Any, Any], Tensor]


def checked_loss(value: Any) -> Tensor:
    """A scalar finite loss, or an error that says what to do."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"the loss must return one scalar tensor, not {shape}; use reduction='mean'")
    if not torch.isfinite(value.detach()).all():
        raise ValueError(
            f"the loss is {value.item()} on this batch; look for inf or nan in the inputs and weights, or measure before "
            "the divergence"
        )
    return value.reshape(())


class _Curvature(LinearOperator):
    symmetric = True

    def __init__(
        self, model: nn.Module, loss: Loss, batch: tuple[Any, Any], params: str | Sequence[str] | None = None
    ) -> None:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise TypeError("batch must be a pair (inputs, targets)")
        self.pure = PureModel(model, params)
        self.loss = loss
        self.inputs, self.targets = self.pure.prepare(batch[0]), self.pure.prepare(batch[1])
        sample = first_tensor(self.inputs)
        if sample is None or sample.numel() == 0:
            raise ValueError("the batch is empty; pass at least one sample")
        self.batch_size = sample.shape[0] if sample.ndim else 1
        with self.pure.guarded():
            output = self.pure(self.pure.params, self.inputs).detach()
            checked_loss(self.loss(output, self.targets))
        self.output_shape = output.shape

    @property
    def shape(self) -> tuple[int, int]:
        """Parameters by parameters."""
        return (self.pure.n_params, self.pure.n_params)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.pure.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters (float32 for half precision)."""
        return self.pure.dtype

    def adjoint(self) -> LinearOperator:
        """Symmetric: itself."""
        return self

    def _flat(self, pieces: Sequence[Tensor], k: int) -> Tensor:
        return torch.cat([p.reshape(k, -1) for p in pieces], dim=1).T


class Hessian(_Curvature):
    """Hessian of the loss by the parameters, `H = d^2 loss / d theta^2`, in `named_parameters()` order."""

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
        """Columns `H v`."""

        def scalar(params: tuple[Tensor, ...]) -> Tensor:
            return checked_loss(self.loss(self.pure(params, self.inputs), self.targets))

        with self.pure.guarded():
            _, pull = torch.func.vjp(torch.func.grad(scalar), self.pure.params)
            columns = [pull(self.pure.split(v))[0] for v in V.T]
            return torch.stack([torch.cat([p.flatten() for p in c]) for c in columns], dim=1).detach()


class GaussNewton(_Curvature):
    """Generalised Gauss-Newton matrix `J^T H_out J`, J the Jacobian of the output by the parameters."""

    def _output_product(self, output: Tensor) -> Callable[[Tensor], Tensor]:
        _, pull = torch.func.vjp(torch.func.grad(lambda f: self.loss(f, self.targets)), output)
        return lambda u: pull(u)[0]

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
        """Columns `J^T H_out J v`."""
        with self.pure.guarded():
            output, pull = torch.func.vjp(lambda p: self.pure(p, self.inputs), self.pure.params)
            _, push = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(output))
            middle = self._output_product(output)
            columns = [pull(middle(push(self.pure.split(v))[0]))[0] for v in V.T]
            return torch.stack([torch.cat([p.flatten() for p in c]) for c in columns], dim=1).detach()


class Fisher(GaussNewton):
    """Fisher information of the model's likelihood: exact, sampled or empirical."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batch: tuple[Any, Any],
        params: str | Sequence[str] | None = None,
        *,
        kind: Literal["exact", "sampled", "empirical"] = "exact",
    ) -> None:
        super().__init__(model, loss, batch, params)
        self.kind = kind

    def _output_product(self, output: Tensor) -> Callable[[Tensor], Tensor]:
        if self.kind == "exact":
            return super()._output_product(output)
        targets = self.targets
        if self.kind == "sampled":
            generator = torch.Generator(device=output.device).manual_seed(0)
            if targets.is_floating_point():
                targets = output + torch.randn(output.shape, generator=generator, dtype=output.dtype)
            else:
                p = output.flatten(1).softmax(1)
                targets = torch.multinomial(p, 1, generator=generator)[:, 0]
        residual = torch.func.grad(lambda f: self.loss(f, targets))(output).flatten(1)
        n = residual.shape[0]
        return lambda u: (n * residual * (residual * u.flatten(1)).sum(1, keepdim=True)).reshape(u.shape)
