"""Curvature of a loss in parameter space: Hessian and Gauss-Newton."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_rmt.operators.batches import Batch, counted_again, cut, read_batches
from torch_rmt.operators.engines import FIRST_ORDER, SECOND_ORDER, Differentiable, Products, Tensors
from torch_rmt.operators.ladder import climb
from torch_rmt.operators.losses import Loss, adds_up, checked_loss, output_curvature
from torch_rmt.operators.memory import Footprint, free_bytes, is_out_of_memory, saved_bytes
from torch_rmt.operators.of_model import SymmetricOfModel
from torch_rmt.operators.outputs import as_rows, check_taken, unread_targets
from torch_rmt.operators.pure import PureModel
from torch_rmt.operators.taped import rows_of
from torch_rmt.operators.trees import tensors_of

Product = Callable[[Tensor], Tensor]  # a block of rows (k, n) to a block of rows (k, n)
Pieces = Callable[[Tensor], Tensors]  # the same, the result in the shapes of the parameters


class Curvature(SymmetricOfModel):
    """A symmetric matrix over the parameters, of the loss over all batches; base of Hessian and Gauss-Newton.

    A mean loss is averaged over the batches, each weighted by its terms; one that sums over samples is summed. Where a
    loss of logits shifts its tokens, the first ones that it does not read are no terms; where the model itself computes
    such a loss, set the labels that are not read to -100.

    The parameters, modes and data are those at construction. Graphs are built at the first product and kept
    while they fit; `engine` says how products are made and what proved it, `notes` what was replaced or given
    up. `max_memory` bounds the bytes of graphs, temporaries and vectors (not those given to `matmat`): vectors are
    multiplied fewer at a time, the graphs are built anew in every product, and batches are cut into parts (where the
    parts' losses average to the whole's). The same is done whenever a product runs out of memory.
    """

    chunk = 16
    has_images = False  # whether each vector of a block has an image in output space, which is held as well
    of_a_mean = False  # whether the matrix has no meaning for a loss that sums over samples

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
        self.batches = read_batches(batch, self.pure, loss)
        self.samples = sum(b.samples for b in self.batches)
        summed: bool | None = None
        unread: int | None = None
        with self.pure.guarded(), torch.no_grad():
            for i, b in enumerate(self.batches):
                output = self.pure.raw(self.pure.params, b.inputs)
                if i == 0:
                    self._accept(output, b)
                checked_loss(loss(output, b.targets))
                summed = adds_up(loss, output, b.targets, b.samples) if summed is None else summed
                unread = unread_targets(loss, output, b.targets) if unread is None else unread
        self.summed, self.unread = summed is True, unread or 0
        self.given = self.batches = counted_again(self.batches, loss, self.unread)
        self.terms = sum(b.terms for b in self.batches)
        if self.summed and self.of_a_mean:
            raise ValueError("the covariance is that of a mean over samples; use a loss with reduction='mean'")
        self.notes = self.pure.notes
        self.output_form = ""
        self._jacobian: Products | None = None
        self._kept: dict[int, Pieces] = {}
        self.keep = True
        self.max_memory = max_memory
        self._saved: list[int] = []
        if max_memory is not None or len(self.batches) > 1:
            self._fit(max_memory)

    def _accept(self, output: Any, batch: Batch) -> None:
        """Decide how the model's output is read; refuse one that cannot be."""
        self.pure.require_tensor(output)

    def share(self, batch: Batch) -> float:
        """Factor of a batch's loss in the loss of all: one for a sum over samples."""
        return 1.0 if self.summed else batch.terms / self.terms

    def _fit(self, max_memory: int | None) -> None:
        """Choose what to keep and how far to cut the batches, within bytes."""
        room = free_bytes(self.device) // 2 if max_memory is None else max_memory
        self.keep = self.keep and self.footprint(keep=True).product(1) <= room
        if self.keep:
            return
        self._forget()
        self.notes += ("the graphs of all batches do not fit: recomputed in every product",)
        if max_memory is None:
            return
        while (need := self.footprint().product(1)) > room and self._halve_batches():
            pass
        if need > room:
            self.notes += (
                f"max_memory={max_memory} is not kept to: a product with one part of a batch takes about {need} bytes "
                "and cannot be cut further; use smaller batches, or fewer parameters (params=...)",
            )

    def footprint(self, *, keep: bool | None = None) -> Footprint:
        """Bytes of products with one vector or many; `keep` overrides what was decided about graphs."""
        if len(self._saved) != len(self.batches):
            self._saved = [saved_bytes(self.pure, b.inputs) for b in self.batches]
        kept = sum(self._saved) if (self.keep if keep is None else keep) else max(self._saved)
        vmapped = self._choice is not None and self._choice.block == "vmap"
        return Footprint(kept, max(self._saved), self.shape[0] * self.dtype.itemsize, vmapped)

    @contextmanager
    def within(self, max_memory: int | None, columns: int = 1) -> Iterator[None]:
        """Keep to so many bytes inside; what was decided before holds again outside."""
        before = (self.max_memory, self.keep, self.batches, self.notes, self._saved)
        tighter = max_memory is not None and (self.max_memory is None or max_memory < self.max_memory)
        if tighter:
            self.max_memory = max_memory
            self._fit(max_memory)
        try:
            yield
        finally:
            if tighter:
                self.max_memory, self.keep, self.batches, self.notes, self._saved = before

    def _forget(self) -> None:
        """Let kept graphs go."""
        self._kept.clear()
        self._jacobian = None

    def _halve_batches(self) -> bool:
        """Cut every batch in two, if the parts' losses average to the loss of the whole."""
        parts: list[Batch] = []
        for b in self.batches:
            halves = cut(b, (b.samples + 1) // 2, self.loss, self.unread) if b.samples > 1 else [b]
            if halves is None:
                return False
            with self.pure.guarded(), torch.no_grad():
                losses = [float(self.loss(self.pure.raw(self.pure.params, h.inputs), h.targets)) for h in (b, *halves)]
            mean = sum(self.share(h) * value for h, value in zip(halves, losses[1:], strict=True)) / self.share(b)
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

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
        """Multiply by the k columns of V, in blocks; out of memory, in the next smaller way."""
        if V.shape[1] == 0:
            return V.clone()
        width = self._at_once(V.shape[1])
        if V.shape[1] <= width:
            return self._in_memory(V.detach().T.contiguous()).T
        image = V.new_empty(V.shape[1], V.shape[0])
        for start in range(0, V.shape[1], width):
            block = slice(start, start + width)
            image[block] = self._in_memory(V[:, block].detach().T.contiguous())
        return image.T

    def _at_once(self, columns: int) -> int:
        """How many columns `max_memory` allows to be multiplied at a time."""
        if self.max_memory is None or columns < 2:
            return columns
        if self._choice is None:
            self._in_memory(torch.ones(1, self.shape[0], dtype=self.dtype, device=self.device))
        width = min(columns, self.footprint().width(columns, self.max_memory))
        if width < columns:
            how = f"{max(1, width)} at a time" + (", and the result alone is too large" if width == 0 else "")
            self._note("max_memory: vectors", f"are multiplied {how}")
        return max(1, width)

    def _in_memory(self, rows: Tensor) -> Tensor:
        while True:
            try:
                return self._multiply(rows)
            except (RuntimeError, MemoryError) as problem:
                if not is_out_of_memory(problem):
                    raise
                problem.__traceback__ = None  # its frames hold the graph
                if not self._gave_up(rows.shape[0]):
                    raise

    def _multiply(self, rows: Tensor) -> Tensor:
        total: Tensor | None = None
        for index, batch in enumerate(self.batches):
            product, share = self._product(index), self.share(batch)
            width = self._together(rows.shape[0], first=index == 0)
            if index == 0 and rows.shape[0] <= width:
                total = self.rows_of(product(rows))
                if share != 1.0:
                    total.mul_(share)
                continue
            total = torch.empty_like(rows) if total is None else total
            for start in range(0, rows.shape[0], width):
                block = slice(start, start + width)
                if index == 0:
                    torch.cat(_rows(product(rows[block])), dim=1, out=total[block])
                    if share != 1.0:
                        total[block].mul_(share)
                else:
                    total[block].add_(self.rows_of(product(rows[block])), alpha=share)
        assert total is not None  # there is a batch
        return total

    def _together(self, columns: int, *, first: bool) -> int:
        """How many vectors go through the graph at a time: a block of them only where that takes no more memory."""
        if self.on_tape and first and not self.has_images:
            return columns
        return self.chunk if self._choice is not None and self._choice.block == "vmap" else 1

    def rows_of(self, pieces: Tensors) -> Tensor:
        """Rows of parameter-shaped tensors; a tape's results are memory of their own, other engines' may be V's."""
        return rows_of(pieces) if self.on_tape else flat(pieces)

    @property
    def on_tape(self) -> bool:
        """Whether products are played from a tape; known after the first."""
        return self._choice is not None and self._choice.block == "tape"

    def _gave_up(self, columns: int) -> bool:
        """Fall back to the next smaller plan after running out of memory; False where there is none."""
        vmapped = self._choice is not None and self._choice.block == "vmap"
        if vmapped and min(self.chunk, columns) > 1:
            self.chunk = min(self.chunk, columns) // 2
            self._note("out of memory: blocks", f"of {self.chunk} vectors from here on")
        elif self.keep and len(self.batches) > 1:
            self._note("out of memory: graphs", "are recomputed in every product from here on")
            self.keep = False
        elif self._halve_batches():
            self._note("out of memory: graphs", "of parts of the batches are recomputed in every product from here on")
            self.keep = False
        else:
            return False
        self._forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def _product(self, index: int) -> Pieces:
        if index in self._kept:
            return self._kept[index]
        product = self._prepare(self.batches[index], index)
        if self.keep:
            self._kept[index] = product
        return product

    def _chosen(self) -> None:
        self._product(0)

    @abstractmethod
    def _prepare(self, batch: Batch, index: int) -> Pieces:
        """Build the product for one batch."""

    def _key(self, order: str) -> object:
        modes = tuple(training for _, training in self.pure.modes)
        name = getattr(self.loss, "__qualname__", type(self.loss).__qualname__)
        code = getattr(self.loss, "__code__", None)  # all lambdas of a function share its name
        return (order, name, code, modes, self.dtype, tuple(self.pure.names))

    def _loss_of(self, batch: Batch) -> Differentiable:
        """Loss of one batch by the parameters."""
        return Differentiable(
            # Found to be a finite scalar at construction; to ask again would hold the device up in every product.
            lambda *params: self.loss(self.pure.raw(params, batch.inputs), batch.targets).reshape(()),
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
        products, self._choice = climb(f, FIRST_ORDER, self.pure.module, self._key("first"), kept=self.keep)
        return products


class Hessian(Curvature):
    """Hessian of a loss by the parameters, `H = d^2 L / d theta^2`, in `named_parameters()` order.

    `loss(output, target)` returns a scalar mean. `batch` is `(inputs, targets)`, a list of such pairs, or a
    loader (each batch weighs as many terms as it has); mappings with "labels" are batches too, with keywords
    for the model. The model may return a dict, dataclass or tuple: the loss gets what it returns. `params` are
    names or globs; None takes all that require a gradient. The matrix is symmetric, `(P, P)`, in units of loss
    per squared parameter.

    Raises:
        ValueError: a non-finite loss, an empty batch, a name that matches nothing (with the nearest names).
        TypeError: a loss that is no scalar.
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

    def _accept(self, output: Any, batch: Batch) -> None:
        if not isinstance(output, Tensor):
            check_taken(self.loss, output, batch.targets)
            self.pure.read = lambda tree: as_rows(tensors_of(tree))

    def _prepare(self, batch: Batch, index: int) -> Pieces:
        f = self._loss_of(batch)
        products, self._choice = climb(f, SECOND_ORDER, self.pure.module, self._key("second"), kept=self.keep)
        return lambda rows: products.push(self.pure.split(rows))


class GaussNewton(Curvature):
    """Generalised Gauss-Newton matrix `G = J^T H_out J`, positive semi-definite for a convex loss.

    J is the Jacobian of the output by the parameters, `H_out` the Hessian of the loss by the output, in
    closed form for cross-entropy and elementwise losses. Arguments and errors as for `Hessian`, and:

    Raises:
        TypeError: an output that is no tensor.

    Source: Schraudolph 2002; Martens 2020, section 8.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> G = GaussNewton(model, torch.nn.functional.mse_loss, (x, torch.zeros(2, 1)))
        >>> G.matmat(torch.eye(2))
        tensor([[5., 3.],
                [3., 2.]])
    """

    has_images = True

    def first_order_products(self) -> Products:
        """Products with the Jacobian of the first batch's output by the parameters, from the kept graph."""
        if len(self.batches) > len(self.given):  # cut into parts: the whole batch has no graph of its own
            return self._first_order(self.given[0])
        return self._first(self.batches[0])

    def _first(self, batch: Batch) -> Products:
        if self._jacobian is None:
            products = self._first_order(batch)
            self._jacobian = products if self.keep else None
            return products
        return self._jacobian

    def _prepare(self, batch: Batch, index: int) -> Pieces:
        products = self._first(batch) if index == 0 else self._first_order(batch)
        middle = self._middle(products.value, batch, index)

        def product(rows: Tensor) -> Tensors:
            (image,) = products.push(self.pure.split(rows))
            return products.pull((middle(image),))

        return product

    def _middle(self, output: Tensor, batch: Batch, index: int) -> Product:
        with self.pure.guarded():
            curvature = output_curvature(self.loss, output, batch.targets)
        self.output_form = curvature.form
        self.positive = (index == 0 or self.positive) and curvature.root is not None
        return curvature.product


def flat(pieces: Tensors) -> Tensor:
    """Concatenate a block of parameter-shaped tensors to rows `(k, n)`."""
    return torch.cat(_rows(pieces), dim=1)


def _rows(pieces: Tensors) -> list[Tensor]:
    return [p.reshape(p.shape[0], -1) for p in pieces]
