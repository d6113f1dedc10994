"""`LinearOperator`: a matrix that one can only multiply by, and sums of such matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor


class LinearOperator(ABC):
    """A real matrix of shape `(rows, columns)`, known by its products.

    `symmetric` is declared by the class, never guessed from numbers. The adjoint of a symmetric operator is
    itself. `positive` is declared where the operator is positive semi-definite by construction; estimators then
    keep their nodes at zero or above, and refuse products that say otherwise.

    Operators add, subtract and take numbers as factors, as matrices do: `hessian - gauss_newton`, `0.5 * hessian`. `@`
    multiplies a vector or the columns of a matrix.
    """

    symmetric: bool = False
    positive: bool = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Return `(rows, columns)`."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where vectors must live."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The floating type of vectors."""

    @abstractmethod
    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
        """Multiply the operator by the k columns of V."""

    @abstractmethod
    def adjoint(self) -> LinearOperator:
        """Return the transposed operator."""

    def product_bytes(self, columns: int) -> int:
        """Bytes that a product with so many columns takes beside those given: graphs, where known, and vectors."""
        return 2 * columns * self._vector_bytes

    def within(self, max_memory: int | None, columns: int = 1) -> AbstractContextManager[None]:
        """Context in which products with so many columns take at most so many bytes, where that can be had."""
        return nullcontext()

    @property
    def _vector_bytes(self) -> int:
        return max(self.shape) * self.dtype.itemsize

    def __matmul__(self, V: Tensor) -> Tensor:
        """Multiply by a vector `(columns,)` or by the columns of `(columns, k)`.

        Raises:
            ValueError: V has another length or more than two dimensions.
        """
        if V.ndim not in (1, 2) or V.shape[0] != self.shape[1]:
            raise ValueError(f"an operator of shape {self.shape} does not multiply a tensor of shape {tuple(V.shape)}")
        return self.matmat(V) if V.ndim == 2 else self.matmat(V[:, None])[:, 0]

    def __add__(self, other: LinearOperator) -> Combination:
        """Return A + B."""
        return _combined(self, other, 1.0)

    def __sub__(self, other: LinearOperator) -> Combination:
        """Return A - B."""
        return _combined(self, other, -1.0)

    def __mul__(self, factor: float) -> Combination:
        """Return c A."""
        return Combination((self,), (float(factor),)) if isinstance(factor, int | float) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> Combination:
        """Return -A."""
        return self * -1.0


def _combined(a: LinearOperator, b: LinearOperator, sign: float) -> Combination:
    return Combination((a, b), (1.0, sign)) if isinstance(b, LinearOperator) else NotImplemented


class Like(LinearOperator):
    """Shape, device and type taken from another operator, through which every product goes."""

    copies = 2  # of every column, held beside that operator's own
    _own_notes: tuple[str, ...] = ()

    def __init__(self, like: LinearOperator) -> None:
        self._like = like

    @property
    def shape(self) -> tuple[int, int]:
        """As the operator it is made from."""
        return self._like.shape

    @property
    def device(self) -> torch.device:
        """As the operator it is made from."""
        return self._like.device

    @property
    def dtype(self) -> torch.dtype:
        """As the operator it is made from."""
        return self._like.dtype

    @property
    def notes(self) -> tuple[str, ...]:
        """What was replaced or given up here, and by the operator that it is made from."""
        return (*self._own_notes, *getattr(self._like, "notes", ()))

    @notes.setter
    def notes(self, own: tuple[str, ...]) -> None:
        self._own_notes = own

    def product_bytes(self, columns: int) -> int:
        """Bytes of the operator that it is made from, and of vectors in between."""
        return self._like.product_bytes(columns) + self.copies * columns * self._vector_bytes

    def within(self, max_memory: int | None, columns: int = 1) -> AbstractContextManager[None]:
        """Keep the operator that it is made from to what is left of so many bytes."""
        own = self.copies * columns * self._vector_bytes
        return self._like.within(None if max_memory is None else max(0, max_memory - own), columns)


class Combination(Like):
    """Linear combination `sum_i c_i A_i`, what `H - G` makes.

    Raises:
        ValueError: no operators, or unequal shapes.

    Example:
        >>> from torch_rmt.operators import Dense
        >>> A = Dense(torch.eye(2), symmetric=True)
        >>> (A - 0.5 * A) @ torch.ones(2)
        tensor([0.5000, 0.5000])
    """

    def __init__(self, operators: Sequence[LinearOperator], coefficients: Sequence[float]) -> None:
        if not operators or len(operators) != len(coefficients):
            raise ValueError("give as many coefficients as operators, and at least one")
        if len({op.shape for op in operators}) != 1:
            raise ValueError(f"operators of unequal shapes cannot be added: {[op.shape for op in operators]}")
        super().__init__(operators[0])
        self.operators, self.coefficients = tuple(operators), tuple(coefficients)
        self.symmetric = all(op.symmetric for op in operators)
        self.positive = all(op.positive for op in operators) and all(c >= 0 for c in coefficients)

    @property
    def notes(self) -> tuple[str, ...]:
        """What any part replaced or gave up."""
        return tuple(dict.fromkeys(note for op in self.operators for note in getattr(op, "notes", ())))

    @notes.setter
    def notes(self, own: tuple[str, ...]) -> None:
        raise AttributeError("the notes of a combination are those of its parts")

    def product_bytes(self, columns: int) -> int:
        """Bytes of all parts' graphs, and of vectors."""
        graphs = [op.product_bytes(0) for op in self.operators]
        vectors = max(op.product_bytes(columns) - g for op, g in zip(self.operators, graphs, strict=True))
        return sum(graphs) + vectors + self.copies * columns * self._vector_bytes

    @contextmanager
    def within(self, max_memory: int | None, columns: int = 1) -> Iterator[None]:
        """Share so many bytes among the parts, by what each takes."""
        with ExitStack() as stack:
            if max_memory is not None:
                left = max(0, max_memory - self.copies * columns * self._vector_bytes)
                needs = [op.product_bytes(columns) for op in self.operators]
                for op, need in zip(self.operators, needs, strict=True):
                    stack.enter_context(op.within(left * need // max(1, sum(needs)), columns))
            yield

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
        """Columns `sum_i c_i A_i v`."""
        products = (c * op.matmat(V) for c, op in zip(self.coefficients, self.operators, strict=True))
        total = next(products)
        for product in products:
            total += product
        return total

    def adjoint(self) -> LinearOperator:
        """Return the combination of the adjoints."""
        return self if self.symmetric else Combination([op.adjoint() for op in self.operators], self.coefficients)
