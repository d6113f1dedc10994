"""Fisher information and gradient covariance: sums of rank-one matrices over samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_rmt.operators.batches import Batch
from torch_rmt.operators.curvature import GaussNewton, Product
from torch_rmt.operators.engines import gradient
from torch_rmt.operators.losses import Loss, checked_loss, known_likelihood, label_seed
from torch_rmt.operators.outputs import as_rows, check_taken, loss_gradients, places_by_sample
from torch_rmt.operators.trees import tensors_of


class PerSample(GaussNewton):
    """`sum_n (J_n^T z_n)(J_n^T z_n)^T` over samples n, with z_n the gradient of the loss or drawn from the model."""

    kind: Literal["exact", "sampled", "empirical"] = "empirical"
    draws = 1
    seed = 0
    _places: tuple[int, ...] | None = None  # of what the loss takes from an output that is no tensor

    def _known_likelihood(self, output: Tensor, batch: Batch) -> Callable[[torch.Generator], Tensor]:
        with self.pure.guarded():
            return known_likelihood(self.loss, output, batch.targets)

    def _accept(self, output: Any, batch: Batch) -> None:
        if isinstance(output, Tensor) or self.kind != "empirical":
            super()._accept(output, batch)
            return
        check_taken(self.loss, output, batch.targets)
        places = places_by_sample(self.loss, output, batch.targets, batch.samples)

        def read(tree: Any) -> Tensor:
            tensors = tensors_of(tree)
            return as_rows([tensors[i] for i in places])

        self._places, self.pure.read = places, read

    def _middle(self, output: Tensor, batch: Batch, index: int) -> Product:
        if self.kind == "exact":
            return super()._middle(output, batch, index)
        factors = self.residuals(output, batch, index)
        self.output_form = "rank one per sample"

        def product(u: Tensor) -> Tensor:
            flat_u = u.reshape(u.shape[0], 1, batch.samples, -1)
            overlap = (factors * flat_u).sum(-1, keepdim=True)
            return (factors * overlap).sum(1).reshape(u.shape)

        return product

    def residuals(self, output: Tensor, batch: Batch, index: int) -> Float[Tensor, "draws samples outputs"]:
        """Vectors z with `F = sum_draws sum_n (J_n^T z_n)(J_n^T z_n)^T` for this batch."""
        if self.kind == "empirical":
            with self.pure.guarded():
                r = self._loss_gradient(output, batch)
            scale = 1.0 if self.summed else (self.samples * self.share(batch)) ** 0.5
            scaled: Tensor = scale * r.reshape(1, batch.samples, -1)
            return scaled
        draw = self._known_likelihood(output, batch)
        generator = torch.Generator(device=self.device).manual_seed(label_seed(self.seed, index))
        drawn: Tensor = torch.stack([draw(generator) for _ in range(self.draws)]) / self.draws**0.5
        return drawn.reshape(self.draws, batch.samples, -1)

    def _loss_gradient(self, output: Tensor, batch: Batch) -> Tensor:
        """Gradient of a batch's loss by its output; to be used inside `guarded`."""
        if self._places is None:
            leaf = output.detach().clone().requires_grad_()
            return torch.autograd.grad(checked_loss(self.loss(leaf, batch.targets)), leaf)[0]
        with torch.no_grad():
            whole = self.pure.raw(self.pure.params, batch.inputs)
        tensors, found = tensors_of(whole), loss_gradients(self.loss, whole, batch.targets)
        return as_rows([found.get(i, torch.zeros_like(tensors[i])) for i in self._places])


class Fisher(PerSample):
    """Fisher information matrix of the likelihood whose negative logarithm is the loss.

    * `kind="exact"`: `E_y [g g^T]` over the model's own predictions; equals Gauss-Newton for categorical,
      Gaussian and Bernoulli likelihoods, and is refused for losses that are none of these.
    * `kind="sampled"`: the expectation over `draws` drawn labels per term, fixed by `seed`.
    * `kind="empirical"`: `1/N sum_n g_n g_n^T`, `g_n` the gradient of sample n's loss with the true target
      (for models that treat samples apart; batch normalisation in train mode does not). Without `1/N` for a loss
      that sums over samples.

    Other arguments and errors as for `Hessian`.

    Raises:
        ValueError: an unknown kind.
        TypeError: exact or sampled Fisher of a loss that is no known negative log-likelihood, or of a model that
            returns no tensor (the empirical one takes what the loss takes, but no mean that the model computed itself).

    Source: Martens 2020; Kunstner, Balles, Hennig 2019 (why empirical is another matrix).

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [0.0]])
        >>> Fisher(model, torch.nn.functional.mse_loss, (x, y)).matmat(torch.ones(1, 1))
        tensor([[5.]])
    """

    positive = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batch: Any,
        params: str | Sequence[str] | None = None,
        *,
        kind: Literal["exact", "sampled", "empirical"] = "exact",
        draws: int = 1,
        seed: int = 0,
        max_memory: int | None = None,
    ) -> None:
        if kind not in ("exact", "sampled", "empirical"):
            raise ValueError(f"kind must be 'exact', 'sampled' or 'empirical', not {kind!r}")
        if draws < 1:
            raise ValueError(f"draws must be at least 1, not {draws}")
        self.kind, self.draws, self.seed = kind, draws, seed
        super().__init__(model, loss, batch, params, max_memory=max_memory)
        if kind != "empirical":
            first = self.batches[0]
            with self.pure.guarded(), torch.no_grad():
                output = self.pure(self.pure.params, first.inputs)
            self._known_likelihood(output, first)


class GradientCovariance(PerSample):
    """Covariance of per-sample gradients, `1/N sum_n (g_n - g)(g_n - g)^T`: the noise of SGD.

    Arguments and errors as for `Hessian`.

    Raises:
        ValueError: a loss that sums over samples: its gradients have no mean.

    Source: McCandlish et al. 2018 (gradient noise scale).
    """

    of_a_mean = True
    _mean: Tensor | None = None

    def gradient(self) -> Float[Tensor, " columns"]:
        """Mean gradient over all batches."""
        if self._mean is None:
            total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
            for b in self.batches:
                pieces = gradient(self._loss_of(b), self.pure.params)[1]
                total += self.share(b) * torch.cat([g.flatten() for g in pieces])
            self._mean = total
        return self._mean

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
        """Columns `F_emp v - g (g . v)`."""
        g = self.gradient()
        return super().matmat(V).addmm_(g[:, None], (g @ V)[None], alpha=-1.0)
