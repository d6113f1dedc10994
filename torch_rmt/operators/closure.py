"""Hessian of a plain closure, and the scaling that an optimiser applies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_rmt.operators.base import LinearOperator
from torch_rmt.operators.engines import EngineError
from torch_rmt.operators.live import Live
from torch_rmt.operators.losses import checked_loss


class ClosureHessian(LinearOperator):
    """Hessian of `closure() -> scalar` by tensors it uses, in the order given; no module and no batch needed.

    The closure is called once with gradients enabled, its graph is kept, and products go through it by
    double backward; the adjoint identity is checked on random vectors. The tensors' `.grad` is not touched.

    Raises:
        ValueError: no tensors, a tensor that does not require a gradient, a non-finite value.
        TypeError: the closure returns no scalar.
        EngineError: the adjoint identity fails (an operation with a wrong second derivative).

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> ClosureHessian(lambda: (x**3).sum(), [x]).matmat(torch.eye(2))
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """

    symmetric = True

    def __init__(self, closure: Callable[[], Tensor], tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)
        if not self.tensors or not all(t.requires_grad for t in self.tensors):
            raise ValueError("give the tensors to differentiate by, each with requires_grad=True")
        self.sizes = [t.numel() for t in self.tensors]
        with torch.inference_mode(False), torch.enable_grad(), Live() as live:
            value = checked_loss(closure())
            self._gradients = torch.autograd.grad(value, self.tensors, create_graph=True, materialize_grads=True)
            del value
            graph = live.now()
        with Live() as live:
            self.matmat(torch.ones(sum(self.sizes), 1, dtype=self.dtype, device=self.device))
        self._bytes: int = graph + live.peak
        generator = torch.Generator(device=self.device).manual_seed(0)
        u, v = torch.randn(2, sum(self.sizes), 1, generator=generator, dtype=self.dtype, device=self.device)
        left, right = float((u * self.matmat(v)).sum()), float((v * self.matmat(u)).sum())
        size = float(u.norm() * self.matmat(v).norm()) / u.numel() ** 0.5
        if abs(left - right) > (1e-7 if self.dtype == torch.float64 else 2e-2) * max(size, abs(left), 1e-30):
            raise EngineError(
                "the Hessian of this closure is not symmetric: an operation has a wrong second derivative"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Scalars in the tensors, twice."""
        return (sum(self.sizes), sum(self.sizes))

    @property
    def device(self) -> torch.device:
        """Where the first tensor lives."""
        return self.tensors[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first tensor."""
        return self.tensors[0].dtype

    def adjoint(self) -> LinearOperator:
        """Return itself: symmetric."""
        return self

    def product_bytes(self, columns: int) -> int:
        """Bytes of the graph and of a product, counted when it was made, and of the columns."""
        return self._bytes + super().product_bytes(columns)

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
        """Columns `H v`."""
        columns = []
        with torch.inference_mode(False):
            for v in V.detach().T:
                pieces = torch.split(v, self.sizes)
                pairs = [
                    (g, p.reshape(g.shape)) for g, p in zip(self._gradients, pieces, strict=True) if g.requires_grad
                ]
                if not pairs:
                    columns.append(torch.zeros_like(v))
                    continue
                heads, weights = zip(*pairs, strict=True)
                rows = torch.autograd.grad(heads, self.tensors, weights, retain_graph=True, materialize_grads=True)
                columns.append(torch.cat([r.flatten() for r in rows]))
        return torch.stack(columns, dim=1) if columns else V.clone()


def adam_scale(optimizer: torch.optim.Optimizer, model: nn.Module, names: Sequence[str]) -> Float[Tensor, " n"]:
    """Diagonal `1 / sqrt(sqrt(v_hat) + eps)` of Adam's preconditioner for parameters by name, for `Scaled`.

    `Scaled(H, adam_scale(optimizer, model, H.pure.names))` is the curvature that Adam's steps see: its
    largest eigenvalue bounds Adam's learning rate as that of H bounds plain gradient descent's.

    Raises:
        ValueError: a parameter without second-moment state (no step yet, or an optimiser without
        `exp_avg_sq`).

    Source: Cohen et al. 2022 (adaptive edge of stability), with Adam's bias correction.
    """
    named = dict(model.named_parameters())
    pieces = []
    groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    for name in names:
        p = named[name]
        state = optimizer.state.get(p, {})
        if "exp_avg_sq" not in state or id(p) not in groups:
            raise ValueError(
                f"the optimiser has no second moment for {name!r}; take one step first, or use Adam or AdamW"
            )
        group = groups[id(p)]
        beta, eps = group["betas"][1], group["eps"]
        corrected = state["exp_avg_sq"] / (1 - beta ** float(state["step"]))
        pieces.append((corrected.sqrt() + eps).rsqrt().flatten())
    return torch.cat(pieces).detach()
