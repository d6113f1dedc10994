"""Bytes that live: how much a computation keeps, and its peak, seen below autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SLACK = 1.02  # of the peak: between two counts it may be higher by so much


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that are made inside; `now()` are the bytes of those that live, `peak` the most there were.

    Example:
        >>> import torch
        >>> with Live() as live:
        ...     kept = torch.ones(1000) + torch.ones(1000)
        >>> live.now(), 12000 <= live.peak <= 12240
        (4000, True)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[StorageWeakRef, int] = {}
        self._most = self._upper = 0

    @property
    def peak(self) -> int:
        """The most bytes that lived at a time, or up to 2 % more."""
        return int(_SLACK * self._most)

    def now(self) -> int:
        """Bytes that live."""
        self._made = {ref: size for ref, size in self._made.items() if not ref.expired()}  # type: ignore[no-untyped-call]
        self._upper = sum(self._made.values())
        return self._upper

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given:
                storage = t.untyped_storage()
                self._made[StorageWeakRef(storage)] = storage.nbytes()  # type: ignore[no-untyped-call]
                self._upper += storage.nbytes()
        if self._upper > _SLACK * self._most:
            self._most = max(self._most, self.now())
        return result
