"""Curvature of a model whose parameters are sharded (FSDP2), by central differences: no rank holds the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from torch_rmt.guard import undisturbed
from torch_rmt.operators.base import LinearOperator
from torch_rmt.operators.batches import as_pairs, sample_count
from torch_rmt.operators.engines import EngineError
from torch_rmt.operators.losses import (
    Loss,
    adds_up,
    checked_loss,
    count_terms,
    known_likelihood,
    label_seed,
    output_curvature,
)
from torch_rmt.operators.memory import saved_during
from torch_rmt.operators.outputs import unread_targets
from torch_rmt.operators.pure import MASK_SEED, arguments, require_tensor, select
from torch_rmt.operators.trees import tensors_of, tree_map

T = TypeVar("T")
_GRAPH_OVER_SAVED = 1.25  # a graph while it is walked backward, in units of what its forward pass saves


class ShardedHessian(LinearOperator):
    """Hessian over every rank's batches by the parameters of a model under `fully_shard`, shards in place.

    `H v = (g(theta + h v) - g(theta - h v)) / 2h` with plain `backward()`, which FSDP reduces; parameters, gradients
    and graphs stay sharded, and are put back bit for bit. Vectors are whole on every rank, those of rank 0 count,
    and all ranks must multiply together. The first product is made with two steps, and refused where these disagree.
    About 1e-4 off in float32; where the whole model fits on a rank `Hessian(unsharded(...), ...)` is exact and
    faster. It takes no `max_memory`, for it cuts nothing: one batch has a graph at a time, and a rank holds a few whole
    vectors. `product_bytes` counts both, so that an estimator's own `max_memory` is kept to, or refused.

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
        ValueError: ranks with different numbers of batches, a name that matches nothing, a non-finite loss.
        EngineError: at the first product, where the model is not smooth.
    """

    symmetric = True
    _output_copies = 5  # that the loss and its gradient make; measured as live bytes, as all in `product_bytes`

    def __init__(self, model: nn.Module, loss: Loss, batch: Any, params: str | Sequence[str] | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed is not initialised; in one process use Hessian")
        self.model, self.loss, self.pairs = model, loss, as_pairs(batch, model)
        _reshard(model)
        self.names = select(model, params)
        named = dict(model.named_parameters())
        self._params = [named[name] for name in self.names]
        self._sizes = [p.numel() for p in self._params]
        ranks = dist.get_world_size()
        if _over_ranks(self.device, len(self.pairs))[0] != ranks * len(self.pairs):
            raise ValueError("every rank needs the same number of batches, or the ranks wait for one another for ever")
        self._weights = [1.0] * len(self.pairs)
        self._saved = self._output_bytes = 0
        self.summed, unread = self._looked_at()
        terms = [count_terms(loss, y, sample_count(x), unread) for x, y in self.pairs]
        (total,) = _over_ranks(self.device, sum(terms))
        # FSDP averages gradients over the ranks.
        self._weights = [float(ranks) if self.summed else t * ranks / total for t in terms]
        self._size = torch.stack([_whole(p.detach().norm()) for p in self._params]).norm().item()
        self._checked = False
        self.notes: tuple[str, ...] = ("central differences on sharded parameters",)

    def _looked_at(self) -> tuple[bool, int]:
        """Whether the loss sums over samples and how many targets of a row it does not read, by any rank's batches.

        What a forward pass saves is counted, too. Every rank raises where one has no finite loss.
        """
        found, unread, problem = False, None, None
        with undisturbed(self.model):
            for (inputs, _), (output, targets, _) in zip(self.pairs, self._counted_outputs(), strict=True):
                try:
                    checked_loss(self.loss(output, targets))
                    found = found or adds_up(self.loss, output, targets, sample_count(inputs)) is True
                    unread = unread_targets(self.loss, output, targets) if unread is None else unread
                except (TypeError, ValueError) as wrong:
                    problem = problem or wrong
            _reshard(self.model)
        told = (found, problem is not None, unread is not None, unread or 0)
        somewhere, failed, tellers, unread_of_all = _over_ranks(self.device, *told)
        if problem is not None:
            raise problem
        if failed:
            raise ValueError("the loss of another rank is not finite or no scalar; its own message says which")
        return somewhere > 0, round(unread_of_all / max(1.0, tellers))

    def _counted_outputs(self) -> Iterator[tuple[Tensor, Any, float]]:
        """Outputs without graphs; how many bytes the largest graph would keep, and all outputs, is noted."""
        outputs, found = self._outputs(), []
        for _ in self.pairs:
            with torch.enable_grad():
                self._saved = max(self._saved, saved_during(lambda: found.append(next(outputs)), ()))
            output, targets, weight = found.pop()
            self._output_bytes += sum(t.nbytes for t in tensors_of(output))
            yield tree_map(Tensor.detach, output), targets, weight

    @property
    def shape(self) -> tuple[int, int]:
        """Parameters by parameters, of the whole model."""
        return (sum(self._sizes), sum(self._sizes))

    @property
    def device(self) -> torch.device:
        """Where this rank's shards live."""
        return self._params[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return self._params[0].dtype

    def product_bytes(self, columns: int) -> int:
        """The most on any rank: a graph, the parameters gathered for it, the loss, whole vectors; to be asked on all.

        Estimators with a `max_memory` refuse where that is more; nothing is cut, so pass smaller batches then.
        """
        graph = int(_GRAPH_OVER_SAVED * self._saved) + self._output_copies * self._output_bytes
        own = graph + (2 * columns + 6) * self._vector_bytes
        most = torch.tensor(own, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def adjoint(self) -> LinearOperator:
        """Return itself: symmetric."""
        return self

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
        """Columns `H v`, two gradients each (four for the first)."""
        V = V.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(V, 0)
        columns = []
        with undisturbed(self.model):
            for v in V.T:
                norm = float(v.norm())
                if norm == 0:
                    columns.append(torch.zeros_like(v))
                    continue
                h = torch.finfo(self.dtype).eps ** (1 / 3) * (1.0 + self._size) / norm
                image = self._slope(v, h)
                if not self._checked:
                    self._check(image, self._slope(v, 2 * h))
                columns.append(image)
        return torch.stack(columns, dim=1) if columns else V

    def _check(self, fine: Tensor, coarse: Tensor) -> None:
        gap = float((fine - coarse).norm()) / max(float(fine.norm()), 1e-30)
        if gap > (1e-3 if self.dtype == torch.float64 else 0.02):
            raise EngineError(
                f"central differences with two steps differ by {gap:.1%}: the model is not smooth here (ReLU, "
                "max-pooling) or its precision is too low; gather it with unsharded() and use Hessian"
            )
        self._checked = True

    def _slope(self, v: Tensor, h: float) -> Tensor:
        above, below = self._on_both_sides(v, h, self._gradient)
        return (above - below) / (2 * h)

    def _on_both_sides(self, v: Tensor, h: float, value: Callable[[], T]) -> tuple[T, T]:
        """A value at `theta + h v` and at `theta - h v`; the parameters are put back bit for bit."""
        own = [_local(p.data) for p in self._params]
        saved = [t.clone() for t in own]
        pieces = [t.reshape(p.shape) for t, p in zip(torch.split(v, self._sizes), self._params, strict=True)]
        shards = [_local(_like(t, p)) for t, p in zip(pieces, self._params, strict=True)]
        values = []
        try:
            for sign in (1.0, -1.0):
                with torch.no_grad():
                    for t, before, step in zip(own, saved, shards, strict=True):
                        torch.add(before, step, alpha=sign * h, out=t)
                values.append(value())
                _reshard(self.model)
        finally:
            with torch.no_grad():
                for t, before in zip(own, saved, strict=True):
                    t.copy_(before)
            _reshard(self.model)
        return values[0], values[1]

    def _outputs(self) -> Iterator[tuple[Tensor, Any, float]]:
        """Output, targets and weight of each batch, from the same random state; buffers are put back."""
        torch.manual_seed(MASK_SEED)
        buffers = [(b, b.detach().clone()) for b in self.model.buffers()]
        for (inputs, targets), weight in zip(self.pairs, self._weights, strict=True):
            args, keywords = arguments(inputs)
            yield self.model(*args, **keywords), targets, weight
            with torch.no_grad():
                for b, before in buffers:
                    b.copy_(before)

    def _gradient(self) -> Tensor:
        """Gradient of the loss over all ranks: their mean weighted by terms, or their sum."""
        for output, targets, weight in self._outputs():
            torch.autograd.backward(weight * checked_loss(self.loss(output, targets)))
        return self._gathered()

    def _gathered(self) -> Tensor:
        """What `backward()` left in the parameters, gathered one parameter at a time."""
        pieces = []
        for p in self._params:
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            whole = _whole(gradient.detach())
            if whole is gradient:  # not sharded, so FSDP has not reduced it
                dist.all_reduce(whole)
                whole /= dist.get_world_size()
            pieces.append(whole.flatten())
        for p in self.model.parameters():
            p.grad = None
        return torch.cat(pieces)


class ShardedGaussNewton(ShardedHessian):
    """Gauss-Newton matrix `J^T H_out J` over every rank's batches, the parameters under `fully_shard` and in place.

    `J v = (f(theta + h v) - f(theta - h v)) / 2h` by two forward passes, off by h^2, then one forward and one backward
    pass with the cotangents `H_out J v`, which are exact; so products are off by h^2, about 1e-4 in float32.
    `kind="exact"` is the Fisher matrix too where the loss is a negative log-likelihood that `Fisher` knows;
    `kind="empirical"` is `1/N sum_n g_n g_n^T` over the samples of all ranks; `kind="sampled"` is Fisher's expectation
    over `draws` drawn labels per term, fixed by `seed` (as `Fisher` of one process draws them for the ranks' batches in
    a row). All else as for `ShardedHessian`.

    Raises:
        ValueError: an unknown kind, and as `ShardedHessian`.
        TypeError: a model that returns no tensor, the sampled Fisher of a loss that is no known likelihood.
    """

    positive = True
    _output_copies = 24

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
    ) -> None:
        if kind not in ("exact", "sampled", "empirical"):
            raise ValueError(f"kind must be 'exact', 'sampled' or 'empirical', not {kind!r}")
        if draws < 1:
            raise ValueError(f"draws must be at least 1, not {draws}")
        super().__init__(model, loss, batch, params)
        self.kind, self.draws, self.seed = kind, draws, seed
        (samples,) = _over_ranks(self.device, sum(sample_count(x) for x, _ in self.pairs))
        # Per-sample gradients of the whole mean: N times a batch's share of it times those of the batch's mean.
        self._samples = samples / dist.get_world_size()

    def _slope(self, v: Tensor, h: float) -> Tensor:
        above, below = self._on_both_sides(v, h, self._values)
        for index, (output, targets, weight) in enumerate(self._outputs()):
            image = (above[index] - below[index]) / (2 * h)
            torch.autograd.backward(output, weight * self._middle(output.detach(), index, targets, image))
        return self._gathered()

    def _values(self) -> list[Tensor]:
        with torch.no_grad():
            return [require_tensor(output, self.model).detach().clone() for output, _, _ in self._outputs()]

    def _middle(self, output: Tensor, index: int, targets: Any, image: Tensor) -> Tensor:
        """Curvature of a batch's loss by its output, times the image of a vector."""
        if self.kind == "exact":
            return output_curvature(self.loss, output, targets).product(image.unsqueeze(0))[0]
        factors, scale = self._factors(output, index, targets)
        rows, images = factors.reshape(len(factors), output.shape[0], -1), image.reshape(1, output.shape[0], -1)
        return (scale * rows * (rows * images).sum(-1, keepdim=True)).sum(0).reshape(output.shape)

    def _factors(self, output: Tensor, index: int, targets: Any) -> tuple[Tensor, float]:
        """Vectors z of each sample, and a factor, for `sum_n z_n z_n^T`."""
        if self.kind == "empirical":
            leaf = output.clone().requires_grad_()
            (r,) = torch.autograd.grad(checked_loss(self.loss(leaf, targets)), leaf)
            return r.unsqueeze(0), 1.0 if self.summed else self._samples * self._weights[index]
        draw = known_likelihood(self.loss, output, targets)
        place = dist.get_rank() * len(self.pairs) + index
        generator = torch.Generator(device=output.device).manual_seed(label_seed(self.seed, place))
        return torch.stack([draw(generator) for _ in range(self.draws)]), 1.0 / self.draws


def _over_ranks(device: torch.device, *numbers: float) -> list[float]:
    """Sums over the ranks."""
    totals = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return [float(t) for t in totals]


def _reshard(model: nn.Module) -> None:
    """Let gathered parameters go: after a forward pass without a backward pass the root keeps them, as they were."""
    from torch.distributed.fsdp import FSDPModule  # seconds to import

    for m in model.modules():
        if isinstance(m, FSDPModule):
            m.reshard()


def _whole(t: Tensor) -> Tensor:
    full: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return full


def _local(t: Tensor) -> Tensor:
    own: Tensor = t.to_local() if hasattr(t, "to_local") else t
    return own


def _like(t: Tensor, p: Tensor) -> Tensor:
    """The shard of a whole tensor that lies where the parameter's does; no communication."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(p, DTensor):
        return t
    return distribute_tensor(t.contiguous(), p.device_mesh, p.placements, src_data_rank=None)
