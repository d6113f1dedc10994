"""Jacobians between named places of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_rmt.operators.base import LinearOperator
from torch_rmt.operators.pure import PureModel, first_tensor, nearest, tree_map


class _Reached(Exception):  # noqa: N818 - no error: the target is computed, the rest of the forward pass is not needed
    def __init__(self, value: Tensor) -> None:
        self.value = value


def _replace_first(tree: Any, value: Tensor) -> Any:
    done: list[bool] = []

    def swap(t: Tensor) -> Tensor:
        if done:
            return t
        done.append(True)
        return value

    return tree_map(swap, tree)


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that name; ValueError with the nearest names."""
    modules = dict(model.named_modules())
    if name not in modules:
        known = [n for n in modules if n]
        raise ValueError(f"{type(model).__name__} has no module {name!r}; {nearest(name, known)}")
    return modules[name]


class Jacobian(LinearOperator):
    """Jacobian of one module's output by another's, for one sample."""

    def __init__(
        self, model: nn.Module, inputs: Any, source: str | None = None, target: str | None = None
    ) -> None:
        self.pure = PureModel(model, "*")
        self.source, self.target = source, target
        module = self.pure.module
        self._source_module = None if source is None else find_module(module, source)
        self._target_module = None if target is None else find_module(module, target)
        self.inputs = self.pure.prepare(inputs)
        first = first_tensor(self.inputs)
        if first is None or first.numel() == 0:
            raise ValueError("the inputs are empty; pass one sample, for example x[:1]")
        if first.ndim > 1 and first.shape[0] != 1:
            raise ValueError(f"a Jacobian is of one sample, the batch has {first.shape[0]}; pass inputs[:1]")
        if source is None and not first.is_floating_point():
            raise TypeError("the inputs are integers, which have no derivative; name the embedding as source")
        with self.pure.guarded():
            self._point = self._record(first)
            value = self._run(self._point).detach()
        self._shape = (value.numel(), self._point.numel())
        self._value = value

    def _record(self, first: Tensor) -> Tensor:
        if self._source_module is None:
            return first
        found: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            t = first_tensor(output)
            if t is None:
                raise TypeError(f"module {self.source!r} returns no tensor")
            found.append(t.detach())

        handle = self._source_module.register_forward_hook(keep)
        try:
            self.pure.raw(self.pure.params, self.inputs)
        finally:
            handle.remove()
        if not found:
            raise ValueError(f"module {self.source!r} is not called in this forward pass")
        return found[0]

    def _run(self, point: Tensor) -> Tensor:
        def insert(_module: nn.Module, _args: Any, output: Any) -> Any:
            return _replace_first(output, point)

        def stop(_module: nn.Module, _args: Any, output: Any) -> None:
            t = first_tensor(output)
            if t is None:
                raise TypeError(f"module {self.target!r} returns no tensor")
            raise _Reached(t)

        inputs = self.inputs if self._source_module is not None else _replace_first(self.inputs, point)
        handles = []
        if self._source_module is not None:
            handles.append(self._source_module.register_forward_hook(insert))
        if self._target_module is not None:
            handles.append(self._target_module.register_forward_hook(stop))
        try:
            output = self.pure(self.pure.params, inputs)
        except _Reached as reached:
            return reached.value
        finally:
            for handle in handles:
                handle.remove()
        if self._target_module is not None:
            raise ValueError(f"module {self.target!r} is not called in this forward pass")
        return output

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
        return self._value.dtype

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
        """Columns `J v`."""
        with self.pure.guarded():
            value, pull = torch.func.vjp(self._run, self._point)
            _, push = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(value))
            return torch.stack([push(v.reshape(self._point.shape))[0].flatten() for v in V.T], dim=1).detach()

    def adjoint(self) -> LinearOperator:
        """The transposed Jacobian."""
        return _Adjoint(self)

    def rmatmat(self, U: Float[Tensor, "rows k"]) -> Float[Tensor, "columns k"]:
        """Columns `J^T u`."""
        with self.pure.guarded():
            value, pull = torch.func.vjp(self._run, self._point)
            return torch.stack([pull(u.reshape(value.shape))[0].flatten() for u in U.T], dim=1).detach()


class _Adjoint(LinearOperator):
    def __init__(self, forward: Jacobian) -> None:
        self.forward = forward

    @property
    def shape(self) -> tuple[int, int]:
        """Source size by target size."""
        return self.forward.shape[1], self.forward.shape[0]

    @property
    def device(self) -> torch.device:
        """As the Jacobian."""
        return self.forward.device

    @property
    def dtype(self) -> torch.dtype:
        """As the Jacobian."""
        return self.forward.dtype

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
        """Columns `J^T u`."""
        return self.forward.rmatmat(V)

    def adjoint(self) -> LinearOperator:
        """The Jacobian."""
        return self.forward


class NeuralTangentKernel(LinearOperator):
    """`Theta = J J^T`, J the Jacobian of all outputs of a batch by the parameters."""

    symmetric = True

    def __init__(self, model: nn.Module, inputs: Any, params: str | Sequence[str] | None = None) -> None:
        self.pure = PureModel(model, params)
        self.inputs = self.pure.prepare(inputs)
        with self.pure.guarded():
            self._output_shape = self.pure(self.pure.params, self.inputs).shape

    @property
    def shape(self) -> tuple[int, int]:
        """(samples x outputs) twice."""
        return (self._output_shape.numel(), self._output_shape.numel())

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.pure.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return self.pure.dtype

    def adjoint(self) -> LinearOperator:
        """Symmetric: itself."""
        return self

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
        """Columns `J J^T u`."""
        with self.pure.guarded():
            output, pull = torch.func.vjp(lambda p: self.pure(p, self.inputs), self.pure.params)
            push: Callable[..., Any]
            _, push = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(output))
            columns = [push(pull(u.reshape(output.shape))[0])[0].flatten() for u in V.T]
            return torch.stack(columns, dim=1).detach()
