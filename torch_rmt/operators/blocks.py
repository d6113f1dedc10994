"""Curvature layer by layer: all diagonal blocks from one shared graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from torch_rmt.operators.base import LinearOperator
from torch_rmt.operators.batches import Batch
from torch_rmt.operators.curvature import Curvature, GaussNewton, Hessian
from torch_rmt.operators.engines import Tensors, stacked
from torch_rmt.operators.memory import KEPT_OVER_FORWARD
from torch_rmt.operators.pure import select
from torch_rmt.operators.tape_rules import Pool
from torch_rmt.operators.taped import taped


def layer_blocks(
    operator: Hessian | GaussNewton, groups: Mapping[str, str | Sequence[str]] | None = None
) -> dict[str, LinearOperator]:
    """Diagonal blocks of a Hessian, Gauss-Newton or Fisher operator, one for each group of parameters.

    `groups` maps a label to parameter names or globs; by default a group is a module with parameters of its
    own. The gradient's graph is built once and every block multiplies through it: a product with a block
    reaches back no further than its own layer. The graph is checked against the operator on one vector, group by
    group; where it does not agree, cannot be built or does not fit, blocks multiply through the whole operator.

    Raises:
        ValueError: a group that matches no parameter of the operator.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> H = Hessian(net, torch.nn.functional.mse_loss, (torch.randn(4, 2), torch.randn(4, 1)))
        >>> {name: block.shape for name, block in layer_blocks(H).items()}
        {'0': (9, 9), '1': (4, 4)}
    """
    indices = _grouped(operator, groups)
    if not operator.keep:  # shared graphs are kept graphs, and they do not fit
        return {name: _Restricted(operator, index) for name, index in indices.items()}
    try:
        graphs = _SharedGraphs(operator)
        blocks: dict[str, LinearOperator] = {name: _Block(graphs, index) for name, index in indices.items()}
        if _agrees(operator, graphs, list(indices.values())):
            return blocks
    except (RuntimeError, NotImplementedError, MemoryError):
        pass  # what plain autograd refuses, or what memory has no room for, the operator may still do
    return {name: _Restricted(operator, index) for name, index in indices.items()}


def _grouped(operator: Curvature, groups: Mapping[str, str | Sequence[str]] | None) -> dict[str, list[int]]:
    names = operator.pure.names
    if groups is None:
        found: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            found.setdefault(name.rpartition(".")[0] or name, []).append(i)
        return found
    result = {}
    for label, patterns in groups.items():
        chosen = set(select(operator.pure.module, patterns))
        result[label] = [i for i, name in enumerate(names) if name in chosen]
        if not result[label]:
            raise ValueError(f"group {label!r} matches parameters that this operator does not differentiate by")
    return result


class _SharedGraphs:
    """One gradient graph a batch, on leaves that all blocks share."""

    def __init__(self, operator: Hessian | GaussNewton) -> None:
        self.operator = operator
        self.pure = operator.pure
        self.pool = Pool()
        self.leaves = tuple(p.clone().requires_grad_() for p in self.pure.params)
        self.weights = [operator.share(b) for b in operator.batches]
        build = self._output if isinstance(operator, GaussNewton) else self._loss
        self.graphs = [build(b, i) for i, b in enumerate(operator.batches)]

    def _loss(self, batch: Batch, index: int) -> tuple[Tensor, ...]:
        def run() -> tuple[Tensor, ...]:
            loss = self.operator.loss(self.pure.raw(self.leaves, batch.inputs), batch.targets)
            return torch.autograd.grad(loss, self.leaves, create_graph=True, materialize_grads=True)

        with self.pure.guarded():
            return tuple(self.pure.within(self.leaves, run))

    def _output(self, batch: Batch, index: int) -> tuple[Tensor, ...]:
        assert isinstance(self.operator, GaussNewton)

        def run() -> tuple[Tensor, ...]:
            output = self.pure(self.leaves, batch.inputs)
            seed = torch.zeros_like(output, requires_grad=True)
            pulled = torch.autograd.grad(output, self.leaves, seed, create_graph=True, materialize_grads=True)
            return (output, seed, *pulled)

        with self.pure.guarded():
            graph = tuple(self.pure.within(self.leaves, run))
        self.middles = getattr(self, "middles", [])
        self.middles.append(self.operator._middle(graph[0].detach(), batch, index))
        return graph

    def product(self, index: list[int], pieces: Tensors) -> Tensors:
        """Block of one group times one vector, in the shapes of its parameters."""
        leaves = [self.leaves[i] for i in index]
        total: Tensors = ()
        for b, (graph, weight) in enumerate(zip(self.graphs, self.weights, strict=True)):
            if isinstance(self.operator, GaussNewton):
                output, seed, *gradients = graph
                image = _pull([gradients[i] for i in index], [seed], pieces)[0]
                columns = _pull([output], leaves, [self.middles[b](image.unsqueeze(0))[0]])
            else:
                columns = _pull([graph[i] for i in index], leaves, pieces)
            if len(self.graphs) > 1:
                columns = tuple(weight * c for c in columns)
            total = columns if not total else tuple(t + c for t, c in zip(total, columns, strict=True))
        return total


def _pull(outputs: Sequence[Tensor], leaves: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensors:
    pairs = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(t) for t in leaves)
    heads, weights = zip(*pairs, strict=True)
    return tuple(torch.autograd.grad(heads, leaves, weights, retain_graph=True, materialize_grads=True))


class _Part(LinearOperator):
    """A diagonal block: shape from its parameters, the rest from the whole."""

    symmetric = True

    def __init__(self, whole: Curvature, index: list[int]) -> None:
        self.whole, self.index = whole, index
        self.positive = whole.positive  # of Gauss-Newton only once it has multiplied
        self.sizes = [whole.pure.sizes[i] for i in index]

    @property
    def shape(self) -> tuple[int, int]:
        """Parameters of the group, twice."""
        return (sum(self.sizes), sum(self.sizes))

    @property
    def device(self) -> torch.device:
        """As the whole."""
        return self.whole.device

    @property
    def dtype(self) -> torch.dtype:
        """As the whole."""
        return self.whole.dtype

    @property
    def notes(self) -> tuple[str, ...]:
        """As the whole."""
        return self.whole.notes

    def adjoint(self) -> LinearOperator:
        """Return itself: symmetric."""
        return self


class _Block(_Part):
    def __init__(self, graphs: _SharedGraphs, index: list[int]) -> None:
        super().__init__(graphs.operator, index)
        self.graphs: _SharedGraphs | None = graphs
        self.many: Callable[[Tensors], Tensors] | None = None

    def product_bytes(self, columns: int) -> int:
        """Bytes of the shared graphs, of those of the whole that proved them, and of vectors."""
        shared = KEPT_OVER_FORWARD * self.whole.footprint(keep=True).kept
        return shared + self.whole.product_bytes(0) + super().product_bytes(columns)

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
        """Columns of the block times v."""
        if V.shape[1] == 0:
            return V.clone()
        if self.many is None:
            self.many = self._product()
        shapes = [self.whole.pure.params[i].shape for i in self.index]
        rows = torch.split(V.detach().T, self.sizes, dim=1)
        with self.whole.pure.light():
            pieces = self.many(tuple(p.reshape(len(p), *s) for p, s in zip(rows, shapes, strict=True)))
        return self.whole.rows_of(pieces).T

    def _product(self) -> Callable[[Tensors], Tensors]:
        """From a tape where the whole operator, which has multiplied by now, uses one; the tape lets the graphs go."""
        graphs, self.graphs = self.graphs, None
        assert graphs is not None
        one, pool = partial(graphs.product, self.index), graphs.pool
        del graphs
        return taped(one, pool) if self.whole.on_tape else stacked(one)


class _Restricted(_Part):
    """Rows and columns of the whole operator: the vector is padded with zeros."""

    def product_bytes(self, columns: int) -> int:
        """Bytes of a product with the whole, and of the vectors that are padded for it."""
        return self.whole.product_bytes(columns) + self._padded(columns) + super().product_bytes(columns)

    def within(self, max_memory: int | None, columns: int = 1) -> AbstractContextManager[None]:
        """Keep the whole to what is left of so many bytes."""
        own = self._padded(columns) + super().product_bytes(columns)
        return self.whole.within(None if max_memory is None else max(0, max_memory - own), columns)

    def _padded(self, columns: int) -> int:
        return columns * self.whole.shape[0] * self.dtype.itemsize

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
        """Columns of the block times v."""
        rows = V.new_zeros(self.whole.shape[0], V.shape[1])
        places = _places(self.whole, self.index)
        for place, piece in zip(places, torch.split(V, self.sizes), strict=True):
            rows[place] = piece
        return _at(self.whole.matmat(rows), places)


def _places(operator: Curvature, index: list[int]) -> list[slice]:
    starts = [sum(operator.pure.sizes[:i]) for i in index]
    return [slice(s, s + operator.pure.sizes[i]) for s, i in zip(starts, index, strict=True)]


def _at(rows: Tensor, places: list[slice]) -> Tensor:
    return torch.cat([rows[place] for place in places])


def _agrees(operator: Curvature, graphs: _SharedGraphs, groups: list[list[int]]) -> bool:
    """One vector over all parameters through the shared graph and through the operator, in each group by itself."""
    generator = torch.Generator(device=operator.device).manual_seed(5)
    v = torch.randn(operator.shape[0], 1, generator=generator, dtype=operator.dtype, device=operator.device)
    expected = operator.matmat(v)[:, 0]
    with operator.pure.light():
        pieces = graphs.product(list(range(len(operator.pure.names))), operator.pure.split(v[:, 0]))
    gap = torch.cat([p.flatten() for p in pieces]) - expected
    double = operator.dtype == torch.float64
    tolerance, rounding = (1e-8, 1e-13) if double else (2e-3, 1e-5)
    slack = rounding * float(expected.norm())  # a group whose part is next to nothing is all rounding
    parts = [_places(operator, index) for index in groups]
    return all(float(_at(gap, p).norm()) <= tolerance * float(_at(expected, p).norm()) + slack for p in parts)
