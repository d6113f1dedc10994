"""Operators made of others: `Gram`, A^T A; `Complement`, A with known eigenvectors taken out."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from torch_rmt.operators.base import LinearOperator


class Gram(LinearOperator):
    """The symmetric operator A^T A; its eigenvalues are the squared singular values of A.

    One product costs one with A and one with its adjoint.
    """

    symmetric = True
    positive = True

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator
        self._adjoint = operator.adjoint()

    @property
    def shape(self) -> tuple[int, int]:
        """Return `(columns, columns)`."""
        return self.operator.shape[1], self.operator.shape[1]

    @property
    def device(self) -> torch.device:
        """Where vectors must live."""
        return self.operator.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of vectors."""
        return self.operator.dtype

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
        """Multiply A^T A by the k columns of V."""
        return self._adjoint.matmat(self.operator.matmat(V))

    def adjoint(self) -> LinearOperator:
        """Return itself."""
        return self


class Complement(LinearOperator):
    """A P for P = 1 - V V^T, V orthonormal columns; P A P for a symmetric A.

    If V holds eigenvectors (right singular vectors), these are taken out of the spectrum and nothing else is.
    """

    def __init__(self, operator: LinearOperator, vectors: Float[Tensor, "columns known"]) -> None:
        self.operator = operator
        self.vectors, _ = torch.linalg.qr(vectors)
        self.symmetric = operator.symmetric
        self.positive = operator.positive

    @property
    def shape(self) -> tuple[int, int]:
        """Return `(rows, columns)`."""
        return self.operator.shape

    @property
    def device(self) -> torch.device:
        """Where vectors must live."""
        return self.operator.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of vectors."""
        return self.operator.dtype

    def project(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
        """Take the known vectors out of the k columns of V."""
        rest: Tensor = V - self.vectors @ (self.vectors.T @ V)
        return rest

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
        """Multiply A P, or P A P for a symmetric A, by the k columns of V."""
        image = self.operator.matmat(self.project(V))
        return self.project(image) if self.symmetric else image

    def adjoint(self) -> LinearOperator:
        """Return P A^T, or itself for a symmetric A."""
        return self if self.symmetric else _ComplementAdjoint(self)


class _ComplementAdjoint(LinearOperator):
    """P A^T, the adjoint of A P."""

    def __init__(self, complement: Complement) -> None:
        self.complement = complement
        self._adjoint = complement.operator.adjoint()

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.complement.shape
        return columns, rows

    @property
    def device(self) -> torch.device:
        return self.complement.device

    @property
    def dtype(self) -> torch.dtype:
        return self.complement.dtype

    def matmat(self, V: Float[Tensor, "rows k"]) -> Float[Tensor, "columns k"]:
        return self.complement.project(self._adjoint.matmat(V))

    def adjoint(self) -> LinearOperator:
        return self.complement
