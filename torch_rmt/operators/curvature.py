"""Curvature of a loss in parameter space: Hessian, Gauss-Newton, Fisher, gradient covariance."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_rmt.operators.base import LinearOperator
from torch_rmt.operators.batches import Batch, cut, read_batches
from torch_rmt.operators.engines import FIRST_ORDER, SECOND_ORDER, Differentiable, Products, Tensors, gradient
from torch_rmt.operators.ladder import Choice, climb
from torch_rmt.operators.losses import Loss, checked_loss, output_curvature
from torch_rmt.operators.memory import graph_bytes, is_out_of_memory, room_for_graphs
from torch_rmt.operators.pure import PureModel

Product = Callable[[Tensor], Tensor]  # a block of rows (k, n) to a block of rows (k, n)


class Curvature(LinearOperator):
    """A symmetric matrix over the parameters, an average over batches; base of Hessian and Gauss-Newton.

    The parameters, modes and data are those at construction. Graphs are built at the first product and kept
    while they fit; `engine` says how products are made and what proved it, `notes` what was replaced or given
    up. `max_memory` bounds the bytes of graphs and vectors: first the graphs are built anew in every product,
    then batches are cut into parts (where the parts' losses average to the whole's). The same is done, after
    smaller blocks of vectors, whenever a product runs out of memory.
    """

    symmetric = True
    chunk = 16

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batch: Any,
        params: str | Sequence[str] | None = None,
        *,
        max_memory: int | None = None,
    ) -> None:
        if not callable(loss):
            raise TypeError(f"loss must be callable as loss(output, target), not {type(loss).__name__}")
        self.pure = PureModel(model, params)
        self.loss = loss
        self.given = self.batches = read_batches(batch, self.pure, loss)
        self.samples = sum(b.samples for b in self.batches)
        self.terms = sum(b.terms for b in self.batches)
        with self.pure.guarded(), torch.no_grad():
            for b in self.batches:
                checked_loss(loss(self.pure(self.pure.params, b.inputs), b.targets))
        self.notes = self.pure.notes
        self.output_form = ""
        self._jacobian: Products | None = None
        self._kept: dict[int, Product] = {}
        self._choice: Choice | None = None
        self.keep = True
        if max_memory is not None or len(self.batches) > 1:
            self._fit(max_memory)

    def _fit(self, max_memory: int | None) -> None:
        """Choose what to keep and how far to cut the batches, within bytes."""
        room = room_for_graphs(self.pure, max_memory)
        sizes = [graph_bytes(self.pure, b) for b in self.batches]
        self.keep = sum(sizes) <= room
        if self.keep:
            return
        self.notes += ("the graphs of all batches do not fit: recomputed in every product",)
        largest = max(sizes)
        while max_memory is not None and largest > room and self._halve_batches():
            largest = max(graph_bytes(self.pure, b) for b in self.batches)
        if max_memory is not None and largest > room:
            self.notes += (
                f"max_memory={max_memory} is not kept to: one part of a batch takes about {largest} bytes and cannot "
                "be cut further; use smaller batches",
            )

    def _halve_batches(self) -> bool:
        """Cut every batch in two, if the parts' losses average to the loss of the whole."""
        parts: list[Batch] = []
        for b in self.batches:
            halves = cut(b, (b.samples + 1) // 2, self.loss) if b.samples > 1 else [b]
            if halves is None:
                return False
            with self.pure.guarded(), torch.no_grad():
                losses = [float(self.loss(self.pure(self.pure.params, h.inputs), h.targets)) for h in (b, *halves)]
            mean = sum(h.terms * value for h, value in zip(halves, losses[1:], strict=True)) / b.terms
            if not abs(mean - losses[0]) <= (1e-10 if self.dtype == torch.float64 else 1e-5) * (1e-3 + abs(losses[0])):
                return False
            parts += halves
        if len(parts) == len(self.batches):
            return False
        self.batches = parts
        largest = max(b.samples for b in parts)
        self._note("batches are cut", f"into parts of at most {largest} samples")
        return True

    def _note(self, what: str, how: str) -> None:
        """Say what was given up, in place of what was said about it before."""
        self.notes = (*(n for n in self.notes if not n.startswith(what)), f"{what} {how}")

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

    @property
    def engine(self) -> str:
        """How products are made, and what confirmed it."""
        if self._choice is None:
            self._product(0)
        return str(self._choice)

    def adjoint(self) -> LinearOperator:
        """Return itself: symmetric."""
        return self

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
        """Multiply by the k columns of V, in blocks; out of memory, in the next smaller way."""
        rows = V.detach().T.contiguous()
        while True:
            try:
                return self._multiply(rows).T
            except (RuntimeError, MemoryError) as problem:
                if not is_out_of_memory(problem):
                    raise
                problem.__traceback__ = None  # its frames hold the graph
                if not self._gave_up(problem):
                    raise

    def _multiply(self, rows: Tensor) -> Tensor:
        if len(self.batches) == 1 and rows.shape[0] == 1:
            return self._product(0)(rows)
        total = torch.zeros_like(rows)
        for index, batch in enumerate(self.batches):
            product = self._product(index)
            width = self.chunk if self._choice is not None and self._choice.block == "vmap" else 1
            for start in range(0, rows.shape[0], width):
                block = slice(start, start + width)
                total[block].add_(product(rows[block]), alpha=batch.terms / self.terms)
        return total

    def _gave_up(self, problem: BaseException) -> bool:
        """Fall back to the next smaller plan after running out of memory; False where there is none."""
        vmapped = self._choice is not None and self._choice.block == "vmap"
        if vmapped and self.chunk > 1:
            self.chunk //= 2
            self._note("out of memory: blocks", f"of {self.chunk} vectors from here on")
        elif self.keep and len(self.batches) > 1:
            self._note("out of memory: graphs", "are recomputed in every product from here on")
            self.keep = False
        elif self._halve_batches():
            self._note("out of memory: graphs", "of parts of the batches are recomputed in every product from here on")
            self.keep = False
        else:
            return False
        self._kept.clear()
        self._jacobian = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def _product(self, index: int) -> Product:
        if index in self._kept:
            return self._kept[index]
        product = self._prepare(self.batches[index], index)
        if self.keep:
            self._kept[index] = product
        return product

    @abstractmethod
    def _prepare(self, batch: Batch, index: int) -> Product:
        """Build the product for one batch."""

    def _key(self, order: str) -> object:
        modes = tuple(training for _, training in self.pure.modes)
        name = getattr(self.loss, "__qualname__", type(self.loss).__qualname__)
        return (order, name, modes, self.dtype, tuple(self.pure.names))

    def _loss_of(self, batch: Batch) -> Differentiable:
        """Loss of one batch by the parameters."""
        return Differentiable(
            lambda *params: checked_loss(self.loss(self.pure(params, batch.inputs), batch.targets)),
            self.pure.params,
            self.pure.guarded,
            self.pure.within,
        )

    def _first_order(self, batch: Batch) -> Products:
        """Products with the Jacobian of the output by the parameters."""
        f = Differentiable(
            lambda *params: self.pure(params, batch.inputs),
            self.pure.params,
            self.pure.guarded,
            self.pure.within,
        )
        products, self._choice = climb(f, FIRST_ORDER, self.pure.module, self._key("first"))
        return products


class Hessian(Curvature):
    """Hessian of a loss by the parameters, `H = d^2 L / d theta^2`, in `named_parameters()` order.

    `loss(output, target)` returns a scalar mean. `batch` is `(inputs, targets)`, a list of such pairs, or a
    loader (each batch weighs as many terms as it has). `params` are names or globs; None takes all that
    require a gradient. The matrix is symmetric, `(P, P)`, in units of loss per squared parameter.

    Raises:
        ValueError: a non-finite loss, an empty batch, a name that matches nothing (with the nearest names).
        TypeError: an output that is no tensor, a loss that is no scalar.
        EngineError: at the first product, when no engine can be trusted on this model.

    Source: Pearlmutter 1994 (fast exact multiplication by the Hessian).

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> H = Hessian(model, torch.nn.functional.mse_loss, (x, torch.zeros(2, 1)))
        >>> H.matmat(torch.eye(2))
        tensor([[5., 3.],
                [3., 2.]])
    """

    def _prepare(self, batch: Batch, index: int) -> Product:
        f = self._loss_of(batch)
        products, self._choice = climb(f, SECOND_ORDER, self.pure.module, self._key("second"))
        return lambda rows: flat(products.push(self.pure.split(rows)))


class GaussNewton(Curvature):
    """Generalised Gauss-Newton matrix `G = J^T H_out J`, positive semi-definite for a convex loss.

    J is the Jacobian of the output by the parameters, `H_out` the Hessian of the loss by the output, in
    closed form for cross-entropy and elementwise losses. Arguments and errors as for `Hessian`.

    Source: Schraudolph 2002; Martens 2020, section 8.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> G = GaussNewton(model, torch.nn.functional.mse_loss, (x, torch.zeros(2, 1)))
        >>> G.matmat(torch.eye(2))
        tensor([[5., 3.],
                [3., 2.]])
    """

    def first_order_products(self) -> Products:
        """Products with the Jacobian of the first batch's output by the parameters, from the kept graph."""
        if len(self.batches) > len(self.given):  # cut into parts: the whole batch has no graph of its own
            return self._first_order(self.given[0])
        return self._first(self.batches[0])

    def _first(self, batch: Batch) -> Products:
        if self._jacobian is None or not self.keep:
            self._jacobian = None
            products = self._first_order(batch)
            self._jacobian = products if self.keep else None
            return products
        return self._jacobian

    def _prepare(self, batch: Batch, index: int) -> Product:
        products = self._first(batch) if index == 0 else self._first_order(batch)
        middle = self._middle(products.value, batch, index)

        def product(rows: Tensor) -> Tensor:
            (image,) = products.push(self.pure.split(rows))
            return flat(products.pull((middle(image),)))

        return product

    def _middle(self, output: Tensor, batch: Batch, index: int) -> Product:
        with self.pure.guarded():
            curvature = output_curvature(self.loss, output, batch.targets)
        self.output_form = curvature.form
        return curvature.product


class Fisher(GaussNewton):
    """Fisher information matrix of the likelihood whose negative logarithm is the loss.

    * `kind="exact"`: `E_y [g g^T]` over the model's own predictions; equals Gauss-Newton for categorical,
      Gaussian and Bernoulli likelihoods, and is refused for losses that are none of these.
    * `kind="sampled"`: the expectation over `draws` drawn labels per term, fixed by `seed`.
    * `kind="empirical"`: `1/N sum_n g_n g_n^T`, `g_n` the gradient of sample n's loss with the true target
    (for
      models that treat samples apart; batch normalisation in train mode does not).

    Other arguments and errors as for `Hessian`.

    Raises:
        ValueError: an unknown kind.
        TypeError: exact or sampled Fisher of a loss that is no known negative log-likelihood.

    Source: Martens 2020; Kunstner, Balles, Hennig 2019 (why empirical is another matrix).

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [0.0]])
        >>> Fisher(model, torch.nn.functional.mse_loss, (x, y)).matmat(torch.ones(1, 1))
        tensor([[5.]])
    """

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
        super().__init__(model, loss, batch, params, max_memory=max_memory)
        self.kind, self.draws, self.seed = kind, draws, seed
        if kind != "empirical":
            first = self.batches[0]
            with self.pure.guarded():
                output = self.pure(self.pure.params, first.inputs).detach()
            self._known_likelihood(output, first)

    def _known_likelihood(self, output: Tensor, batch: Batch) -> Callable[[torch.Generator], Tensor]:
        with self.pure.guarded():
            draw = output_curvature(self.loss, output, batch.targets).draw
        if draw is None:
            raise TypeError(
                "this loss is not recognised as the negative log-likelihood of a categorical, Gaussian or "
                "Bernoulli output (cross-entropy, mean square error, binary cross-entropy with logits); "
                "use GaussNewton, or Fisher(..., kind='empirical')"
            )
        return draw

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
            leaf = output.detach().clone().requires_grad_()
            with self.pure.guarded():
                (r,) = torch.autograd.grad(checked_loss(self.loss(leaf, batch.targets)), leaf)
            scale = (self.samples * batch.terms / self.terms) ** 0.5
            scaled: Tensor = scale * r.reshape(1, batch.samples, -1)
            return scaled
        draw = self._known_likelihood(output, batch)
        generator = torch.Generator(device=self.device).manual_seed(self.seed * 1_000_003 + index)
        drawn: Tensor = torch.stack([draw(generator) for _ in range(self.draws)]) / self.draws**0.5
        return drawn.reshape(self.draws, batch.samples, -1)


class GradientCovariance(Fisher):
    """Covariance of per-sample gradients, `1/N sum_n (g_n - g)(g_n - g)^T`: the noise of SGD.

    Arguments and errors as for `Hessian`.

    Source: McCandlish et al. 2018 (gradient noise scale).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batch: Any,
        params: str | Sequence[str] | None = None,
        *,
        max_memory: int | None = None,
    ) -> None:
        super().__init__(model, loss, batch, params, kind="empirical", max_memory=max_memory)
        self._mean: Tensor | None = None

    def gradient(self) -> Float[Tensor, " columns"]:
        """Mean gradient over all batches."""
        if self._mean is None:
            total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
            for b in self.batches:
                pieces = gradient(self._loss_of(b), self.pure.params)[1]
                total += b.terms / self.terms * torch.cat([g.flatten() for g in pieces])
            self._mean = total
        return self._mean

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
        """Columns `F_emp v - g (g . v)`."""
        g = self.gradient()
        return super().matmat(V) - torch.outer(g, g @ V)


def flat(pieces: Tensors) -> Tensor:
    """Concatenate a block of parameter-shaped tensors to rows `(k, n)`."""
    return torch.cat([p.reshape(p.shape[0], -1) for p in pieces], dim=1)
