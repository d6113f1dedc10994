"""What curvatures and kernels of a module have in common: a device, a type, and an engine that was proved."""

from __future__ import annotations

from abc import abstractmethod

import torch

from torch_rmt.operators.base import LinearOperator
from torch_rmt.operators.ladder import Choice
from torch_rmt.operators.memory import Footprint
from torch_rmt.operators.pure import PureModel


class SymmetricOfModel(LinearOperator):
    """A symmetric operator made of products with a module; subclasses set `pure` at construction."""

    symmetric = True
    pure: PureModel
    _choice: Choice | None = None

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
            self._chosen()
        return str(self._choice)

    @abstractmethod
    def footprint(self) -> Footprint:
        """Bytes of products with one vector or many."""

    def product_bytes(self, columns: int) -> int:
        """Bytes of graphs and vectors of a product with so many columns."""
        return self.footprint().product(columns)

    @abstractmethod
    def _chosen(self) -> None:
        """Prepare products, so that `_choice` is set."""

    def adjoint(self) -> LinearOperator:
        """Return itself: symmetric."""
        return self
