"""`LinearOperator`: a matrix that one can only multiply by."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor


class LinearOperator(ABC):
    """A real matrix of shape `(rows, columns)`, known by its products.

    `symmetric` is declared by the class, never guessed from numbers. The adjoint of a symmetric operator is
    itself. `positive` is declared where the operator is positive semi-definite by construction; estimators then
    keep their nodes at zero or above, and refuse products that say otherwise.
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
