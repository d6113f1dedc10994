"""A CUDA device that is none: tensors that say `cuda:0`, hold their numbers on the CPU and meet no tensor from there.

What a GPU would refuse (tensors or generators of two devices) raises here too, and what would make the host wait for
it (numbers read, tensors fetched, shapes that depend on values) is counted. Numbers are those of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_aten = torch.ops.aten
#: Operations whose result the host must have before it goes on.
_WAITING = {
    _aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal, _aten._unique2, _aten.unique_dim,
    _aten.is_nonzero, _aten.repeat_interleave, _aten._linalg_eigh, _aten._linalg_svd, _aten._linalg_check_errors,
}  # fmt: skip
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index}
_Generator = torch.Generator


class OnDevice(Tensor):
    """A tensor of the pretended device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        if held._is_zerotensor():  # zeros without memory, of forward mode
            held = torch.zeros(held.shape, dtype=held.dtype)
        place = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, device=_CPU, **place)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, kwargs = func.overloadpacket, kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        strangers = [t for t in tensors if not isinstance(t, OnDevice) and t.ndim]
        if packet is _aten.copy_:
            Pretence.now.waits += not isinstance(args[0], OnDevice)
        elif packet in _INDEXING and all(not t.is_floating_point() for t in strangers):
            Pretence.now.waits += len(strangers)  # an index may come from the host, which copies it
        elif strangers:
            raise RuntimeError(f"{func}: expected all tensors on one device, found cuda:0 and cpu {strangers[0].shape}")
        if packet in _WAITING or (packet in _INDEXING and any(t.dtype == torch.bool for t in tensors)):
            Pretence.now.waits += 1
        owners = {id(t.held): t for t in tensors if isinstance(t, OnDevice)}
        plain = tree_map(lambda t: t.held if isinstance(t, OnDevice) else t, (args, kwargs))
        result = func(*plain[0], **plain[1])

        def labelled(t: Any) -> Any:
            return (owners[id(t)] if id(t) in owners else OnDevice(t)) if isinstance(t, Tensor) else t

        return tree_map(labelled, result)


def _lowest(t: Tensor) -> Tensor:
    """The tensor below the wrappers of `torch.func`."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        t = functorch.get_unwrapped(t)
    return t


def _place(t: Tensor) -> torch.device:
    return DEVICE if isinstance(_lowest(t), OnDevice) else _CPU


class _AnyGenerator(type(_Generator)):  # type: ignore[misc]
    def __instancecheck__(cls, thing: Any) -> bool:
        return type.__instancecheck__(_Generator, thing)


class DeviceGenerator(_Generator, metaclass=_AnyGenerator):
    """A generator that says on which device it draws."""

    def __new__(cls, device: Any = "cpu") -> DeviceGenerator:
        made = _Generator.__new__(cls)
        made.where = torch.device(device)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        """Where it draws."""
        return DEVICE if self.where.type == "cuda" else self.where


class Pretence(TorchFunctionMode):
    """The pretended device while it is there; `waits` counts how often the host would have waited for it."""

    now: Pretence

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0
        self.inside = False  # an operation on the device: tensors that it makes within lie there, too
        self.seeded = 0
        Pretence.now = self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return _place(args[0])
        if func == Tensor.is_cuda.__get__:
            return _place(args[0]) == DEVICE
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._move(func, args, kwargs)
        here = bool(args) and isinstance(args[0], Tensor) and _place(args[0]) == DEVICE
        if here and func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
        if here and func is Tensor.tolist:
            self.waits += 1
            return args[0].held.tolist()
        asked = kwargs.pop("device", None)
        where = (DEVICE if here else _CPU) if asked is None else torch.device(asked)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != where.type:
            raise RuntimeError(f"expected a {where.type} device type for generator but found {generator.device}")
        outside, self.inside = (
            self.inside,
            where == DEVICE or any(isinstance(t, Tensor) and _place(t) == DEVICE for t in tree_leaves((args, kwargs))),
        )
        try:
            result = func(*args, **kwargs)
        finally:
            self.inside = outside
        return tree_map(lambda t: _moved(t, where) if isinstance(t, Tensor) else t, result) if asked else result

    def _move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        t, rest = args[0], args[1:]
        if func is not Tensor.to:
            where = DEVICE if func is Tensor.cuda else _CPU
            asked: dict[str, Any] = {}
        elif rest and isinstance(rest[0], Tensor):
            where, asked = _place(rest[0]), {"dtype": rest[0].dtype}
        else:
            device, dtype, _, memory_format = torch._C._nn._parse_to(*rest, **kwargs)
            where = _place(t) if device is None else device
            asked = {"dtype": t.dtype if dtype is None else dtype, "copy": kwargs.get("copy", False)}
            asked |= {} if memory_format is None else {"memory_format": memory_format}
        if where.type == "cpu" and _place(t) == DEVICE:
            self.waits += 1
        moved = _moved(t, where)
        return moved.to(**asked) if asked else moved


def _moved(t: Tensor, where: torch.device) -> Tensor:
    if where.type == _place(t).type:
        return t
    if t.requires_grad or t is not _lowest(t):
        raise NotImplementedError("a tensor with a gradient moves between devices")
    return OnDevice(t) if where.type == "cuda" else t.held


class _Made(TorchDispatchMode):
    """Tensors that an operation makes from nothing lie on the device of that operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        from_nothing = isinstance(result, Tensor) and not any(
            isinstance(t, Tensor) for t in tree_leaves((args, kwargs))
        )
        return _moved(result, DEVICE) if from_nothing and Pretence.now.inside else result


@contextmanager
def pretended_device() -> Iterator[Pretence]:
    """Inside, `device="cuda"` may be asked for."""
    pretence = Pretence()

    def seed(_: int) -> None:
        pretence.seeded += 1

    cuda = {"manual_seed_all": seed, "empty_cache": lambda: None, "synchronize": lambda *_: None}
    cuda |= {
        "mem_get_info": lambda *_: (2**36, 2**36),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
    }
    with mock.patch("torch.Generator", DeviceGenerator), mock.patch.multiple("torch.cuda", **cuda), pretence, _Made():
        yield pretence


def on_device(model: nn.Module) -> nn.Module:
    """Move a module's parameters and buffers, in place."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(OnDevice(p.detach().clone()), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = OnDevice(b.detach().clone())
    return model
