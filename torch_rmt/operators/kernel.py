"""Kernels over samples: the neural tangent kernel and the conjugate kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_rmt.guard import full_precision
from torch_rmt.operators.batches import sample_count
from torch_rmt.operators.engines import FIRST_ORDER, Differentiable, Products
from torch_rmt.operators.jacobian import in_blocks
from torch_rmt.operators.ladder import climb
from torch_rmt.operators.memory import Footprint, saved_bytes
from torch_rmt.operators.of_model import SymmetricOfModel
from torch_rmt.operators.places import check_called, find_place, hooked, tensor_at
from torch_rmt.operators.pure import PureModel


class NeuralTangentKernel(SymmetricOfModel):
    """Empirical neural tangent kernel `Theta = J J^T` of a batch, `(samples x outputs)` squared.

    J is the Jacobian of all outputs by the parameters, rows in the order of `output.flatten()`. No
    normalisation.

    Raises:
        ValueError: an empty batch, a parameter name that matches nothing (with the nearest names).
        TypeError: an output that is no tensor.
        EngineError: at the first product, when no engine can be trusted on this model.

    Source: Jacot, Gabriel, Hongler 2018.

    Example:
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> NeuralTangentKernel(torch.nn.Linear(2, 1, bias=False), x).matmat(torch.ones(1, 1))
        tensor([[25.]])
    """

    symmetric = True
    positive = True
    chunk = 16

    def __init__(self, model: nn.Module, inputs: Any, params: str | Sequence[str] | None = None) -> None:
        self.pure = PureModel(model, params)
        self.inputs = self.pure.prepare(inputs)
        sample_count(self.inputs)
        with self.pure.guarded(), torch.no_grad():
            self._output_shape = self.pure(self.pure.params, self.inputs).shape
        self._products: Products | None = None
        self._saved = 0
        self.notes = self.pure.notes

    @property
    def shape(self) -> tuple[int, int]:
        """(samples x outputs) twice."""
        return (self._output_shape.numel(), self._output_shape.numel())

    def _chosen(self) -> None:
        self._prepared()

    def _prepared(self) -> Products:
        if self._products is None:
            f = Differentiable(
                lambda *params: self.pure(params, self.inputs),
                self.pure.params,
                self.pure.guarded,
                self.pure.within,
            )
            modes = tuple(training for _, training in self.pure.modes)
            key = ("ntk", modes, self.dtype, tuple(self.pure.names))
            self._products, self._choice = climb(f, FIRST_ORDER, self.pure.module, key, kept=True)
        return self._products

    def footprint(self) -> Footprint:
        """Bytes of products with one vector or many."""
        if not self._saved:
            self._saved = saved_bytes(self.pure, self.inputs)
        vmapped = self._choice is not None and self._choice.block == "vmap"
        return Footprint(self._saved, self._saved, self.pure.n_params * self.dtype.itemsize, vmapped)

    @contextmanager
    def within(self, max_memory: int | None, columns: int = 1) -> Iterator[None]:
        """Multiply so few vectors at a time inside as keep to so many bytes, where one vector does."""
        before = self.chunk
        if max_memory is not None:
            self._prepared()
            self.chunk = max(1, min(before, self.footprint().width(before, max_memory)))
        try:
            yield
        finally:
            self.chunk = before

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
        """Columns `J J^T u`."""
        products = self._prepared()
        return in_blocks(V, self._output_shape, lambda u: products.push(products.pull(u)), self.chunk, self.shape[0])


@full_precision()
def conjugate_kernel(model: nn.Module, inputs: Any, layer: str | None = None) -> Float[Tensor, "n n"]:
    """Gram matrix of the features of a batch at one layer, `K = X X^T / width`, `(samples, samples)`.

    `layer` is a module name (its output); None the network's output.

    Raises:
        ValueError: an empty batch, an unknown or unused module.

    Source: Fan, Wang 2020.

    Example:
        >>> conjugate_kernel(torch.nn.Flatten(), torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
        tensor([[1., 1.],
                [1., 2.]])
    """
    pure = PureModel(model, "*")
    inputs = pure.prepare(inputs)
    samples = sample_count(inputs)
    found: list[Tensor] = []
    with pure.guarded(), torch.no_grad():
        if layer is None:
            found.append(pure(pure.params, inputs))
        else:
            place = find_place(pure.module, layer)
            with hooked(place, lambda output: found.append(tensor_at(place, output))) as calls:
                pure.raw(pure.params, inputs)
            check_called(place, calls[0], layer)
    rows = found[0].reshape(samples, -1)
    gram: Tensor = rows @ rows.T / rows.shape[1]
    return gram
