"""Jacobians between named places of a network, for one sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_rmt.operators.arithmetic import Transposed
from torch_rmt.operators.base import LinearOperator
from torch_rmt.operators.engines import FIRST_ORDER, Differentiable, Products
from torch_rmt.operators.ladder import Choice, climb
from torch_rmt.operators.memory import Footprint, saved_during
from torch_rmt.operators.places import (
    Reached,
    check_called,
    find_place,
    hooked,
    replace_first,
    tensor_at,
)
from torch_rmt.operators.pure import PureModel
from torch_rmt.operators.trees import first_tensor


class Jacobian(LinearOperator):
    """Jacobian `J = d target / d source` for one sample, `(target size, source size)`.

    `source` and `target` are module names and mean the OUTPUTS of those modules; None is the network's input
    and output. A module that is called several times is written `"act#2"`. Where a module returns a tuple its
    first tensor counts. A batch larger than one is refused, unless `sample=i` asks for sample i's block with
    the rest of the batch held fixed (which is what batch normalisation in train mode needs).

    Raises:
        ValueError: an unknown or unused module (with the nearest names), a target that does not come after
        the source,
            an empty input, more than one sample.
        TypeError: an integer source (name the embedding instead), an output that is no tensor.
        EngineError: at the first product, when no engine can be trusted on this model.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False), torch.nn.ReLU())
        >>> J = Jacobian(model, torch.randn(1, 3), target="0")
        >>> torch.allclose(J.matmat(torch.eye(3)), model[0].weight)
        True
    """

    chunk = 256

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        source: str | None = None,
        target: str | None = None,
        *,
        sample: int | None = None,
    ) -> None:
        self.pure = PureModel(model, "*")
        self.source, self.target = source, target
        self._source = None if source is None else find_place(self.pure.module, source)
        self._target = None if target is None else find_place(self.pure.module, target)
        self.inputs = self.pure.prepare(inputs)
        first = first_tensor(self.inputs)
        if first is None or first.numel() == 0:
            raise ValueError("the inputs are empty; pass one sample, for example inputs[:1]")
        size = first.shape[0] if first.ndim > 1 else 1
        if sample is None and size != 1:
            raise ValueError(
                f"a Jacobian is of one sample and the batch has {size}; pass inputs[:1], or sample=0 to keep "
                "the rest of the batch fixed around it"
            )
        if sample is not None and not 0 <= sample < size:
            raise ValueError(f"sample={sample} is not in the batch of {size}")
        if self._source is None and not first.is_floating_point():
            raise TypeError(
                f"the input is {first.dtype}, which has no derivative; name the module whose output is the "
                "source, for example source='embedding'"
            )
        self.sample = sample
        with self.pure.guarded(), torch.no_grad():
            self._full = self._record(first).detach()
            self._point = self._own(self._full).clone()
            if not self._point.is_floating_point():
                raise TypeError(f"the output of {source!r} is {self._point.dtype}, which has no derivative")
            value = self._run(self._point)
        self._target_shape = value.shape
        self._shape = (value.numel(), self._point.numel())
        self._dtype = value.dtype
        self._products: Products | None = None
        self._saved: int | None = None
        self._choice: Choice | None = None
        self.notes = self.pure.notes

    def _own(self, t: Tensor) -> Tensor:
        return t if self.sample is None else t[self.sample : self.sample + 1]

    def _record(self, first: Tensor) -> Tensor:
        """Value at the source; both names are checked against one full pass."""
        found = [first]
        with ExitStack() as stack:
            counts = []
            for place, asked in ((self._source, self.source), (self._target, self.target)):
                if place is None or asked is None:
                    continue

                def keep(output: Any, place: Any = place) -> None:
                    t = tensor_at(place, output)
                    if place is self._source:
                        found.append(t.clone())  # the next module may work in place

                counts.append((place, asked, stack.enter_context(hooked(place, keep))))
            output = self.pure.raw(self.pure.params, self.inputs)
        for place, asked, calls in counts:
            check_called(place, calls[0], asked)
        if self._target is None:
            self.pure.require_tensor(output)
        return found[-1]

    def _run(self, point: Tensor) -> Tensor:
        full = point.clone()  # the next module may work in place
        if self.sample is not None:
            full = torch.cat([self._full[: self.sample], point, self._full[self.sample + 1 :]])
        inserted = [self._source is None]

        def insert(output: Any) -> Any:
            inserted[0] = True
            return replace_first(output, full)

        def stop(output: Any) -> None:
            if not inserted[0]:
                raise ValueError(f"target {self.target!r} is computed before source {self.source!r}; exchange the two")
            assert self._target is not None
            raise Reached(tensor_at(self._target, output))

        inputs = replace_first(self.inputs, full) if self._source is None else self.inputs
        try:
            with ExitStack() as stack:
                if self._source is not None:
                    stack.enter_context(hooked(self._source, insert))
                if self._target is not None:
                    stack.enter_context(hooked(self._target, stop))
                return self._own(self.pure(self.pure.params, inputs))
        except Reached as reached:
            return self._own(reached.value)

    @property
    def shape(self) -> tuple[int, int]:
        """Target size by source size."""
        return self._shape

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.pure.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the activations."""
        return self._dtype

    @property
    def engine(self) -> str:
        """How products are made, and what confirmed it."""
        self._prepared()
        return str(self._choice)

    def _prepared(self) -> Products:
        if self._products is None:
            f = Differentiable(
                self._run,
                (self._point,),
                self.pure.guarded,
                lambda _point, thunk: self.pure.within(self.pure.params, thunk),
            )
            modes = tuple(training for _, training in self.pure.modes)
            key = ("jacobian", self.source, self.target, self.sample is None, modes, self.dtype)
            self._products, self._choice = climb(f, FIRST_ORDER, self.pure.module, key)
        return self._products

    def footprint(self) -> Footprint:
        """Bytes of products with one vector or many."""
        if self._saved is None:
            leaf = self._point.detach().requires_grad_()
            with self.pure.guarded():
                self._saved = saved_during(lambda: self._run(leaf), self.pure.params)
        vmapped = self._choice is not None and self._choice.block == "vmap"
        copies = sum(t.nbytes for t in (*self.pure.params, *self.pure.buffers.values()))
        return Footprint(self._saved, self._saved, self._vector_bytes, vmapped, copies)

    def product_bytes(self, columns: int) -> int:
        """Bytes of graphs and vectors of a product with so many columns."""
        return self.footprint().product(columns)

    @contextmanager
    def within(self, max_memory: int | None, columns: int = 1) -> Iterator[None]:
        """Multiply so few vectors at a time inside as keep to so many bytes, where one vector does."""
        before = self.chunk, self.notes
        if max_memory is not None:
            self._prepared()
            self.chunk = max(1, min(self.chunk, self.footprint().width(columns, max_memory)))
            if self.chunk < min(columns, before[0]):
                self.notes += (f"max_memory: vectors are multiplied {self.chunk} at a time",)
        try:
            yield
        finally:
            self.chunk, self.notes = before

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
        """Columns `J v`."""
        products = self._prepared()
        return in_blocks(V, self._point.shape, lambda v: products.push(v), self.chunk, self._shape[0])

    def adjoint(self) -> LinearOperator:
        """Return `J^T`, of shape `(source size, target size)`."""
        return Transposed(self, self._rmatmat)

    def _rmatmat(self, U: Tensor) -> Tensor:
        products = self._prepared()
        return in_blocks(U, self._target_shape, lambda u: products.pull(u), self.chunk, self._shape[1])


def in_blocks(V: Tensor, shape: torch.Size, product: Any, chunk: int, rows: int) -> Tensor:
    """Run a product over blocks of columns, each shaped like the tensor it is a tangent of."""
    if V.shape[1] == 0:
        return V.new_zeros((rows, 0))
    whole: Tensor | None = None
    image: Tensor
    for start in range(0, V.shape[1], chunk):
        block = V[:, start : start + chunk].detach().T.contiguous()
        (image,) = product((block.reshape(block.shape[0], *shape),))
        image = image.reshape(block.shape[0], -1)
        if block.shape[0] == V.shape[1]:
            return image.T
        whole = image.new_empty(V.shape[1], rows) if whole is None else whole
        whole[start : start + chunk] = image
    assert whole is not None
    return whole.T
