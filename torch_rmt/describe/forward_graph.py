"""One real forward pass, recorded: which weights act on what, and what lies between them.

A `TorchFunctionMode` sees every torch call, forward hooks give the module names; tensors are followed by
identity and numbered anew when changed in place. What the mode cannot see (the inside of
nn.MultiheadAttention, custom autograd.Function, products written as `x @ W`) stays one opaque call and is
reported as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_rmt.guard import undisturbed

WEIGHT_CALLS = {"linear": "linear", "conv1d": "conv", "conv2d": "conv", "conv3d": "conv"}
_MEASURED = ("add", "sub", "mul", "div", "norm")  # calls whose output may be where a stretch ends


@dataclass(frozen=True)
class Call:
    """One torch call: `args` and `kwargs` hold `Ref(number)` where a tensor that was followed stood."""

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    output: int
    module: str

    @property
    def where(self) -> str:
        """Name for people: the module that made the call, or the function."""
        return self.module or f"{self.name}()"


@dataclass(frozen=True)
class Ref:
    """Stands for the tensor of that number."""

    number: int


@dataclass(frozen=True)
class WeightUse:
    """One application of a weight: F.linear or a convolution.

    Fields:
        name: the parameter's name without ".weight"; for computed weights the module's name.
        kind: "linear" or "conv".
        weight, bias: the tensors used.
        parameter, bias_parameter: their names in the model, "" if they are computed.
        input, output: numbers of the tensors before and after.
        groups: of a convolution.
        kept: share of a convolution's taps that fall on the input and not on its zero padding.
        read: share of the input's places that a convolution reads; a kernel smaller than its stride skips the others.
        note: what a law for circular, unstrided maps does not cover, in words; "" if nothing.
    """

    name: str
    kind: str
    weight: Tensor
    bias: Tensor | None
    parameter: str
    bias_parameter: str
    input: int
    output: int
    groups: int = 1
    kept: float = 1.0
    note: str = ""
    read: float = 1.0

    @property
    def fan_in(self) -> int:
        """Number of inputs that each output is a sum over."""
        return int(self.weight[0].numel())


@dataclass
class ForwardGraph:
    """What `record` found; tensors are kept alive by it, so let it go soon.

    `values` holds copies of what was computed, where `record` was asked to keep them; a tensor itself may have been
    overwritten since. `elements` is filled by `elements.elements_of`.
    """

    calls: dict[int, Call] = field(default_factory=dict)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    data: set[int] = field(default_factory=set)
    mean_square: dict[int, float] = field(default_factory=dict)
    samples: dict[int, Tensor] = field(default_factory=dict)
    shapes: dict[int, torch.Size] = field(default_factory=dict)
    weights: list[WeightUse] = field(default_factory=list)
    module_outputs: dict[str, list[int]] = field(default_factory=dict)
    module_inputs: dict[str, list[int]] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    elements: dict[int, Any] = field(default_factory=dict)
    inputs: tuple[int, ...] = ()
    output: int = -1

    def data_inputs(self, number: int) -> list[int]:
        """The tensors that this one was computed from, the parameters and other constants left out."""
        return [n for n in self.calls[number].inputs if n in self.data] if number in self.calls else []

    def size(self, number: int) -> int:
        """Entries per sample of a tensor whose first axis is the batch."""
        shape = self.shapes[number]
        return int(shape.numel() // shape[0]) if len(shape) > 1 else int(shape.numel())


class _Recorder(TorchFunctionMode):
    def __init__(
        self,
        parameters: dict[int, str],
        on_weight: Callable[[WeightUse, Callable[[], Tensor]], Tensor] | None,
        graph: ForwardGraph,
        keep: bool,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.keep = keep
        self.numbers: dict[int, int] = {}
        self.versions: dict[int, int] = {}
        self.parameters = parameters
        self.on_weight = on_weight
        self.stack: list[str] = []

    def number(self, t: Tensor, *, data: bool = False, fresh: bool = False) -> int:
        """The number of a tensor; a new one if it is new, or was changed in place since it was last seen."""
        key = id(t)
        with torch._C.DisableTorchFunction():  # from a hook, reading these is a call that would come back here
            version, shape = t._version, t.shape
        if fresh or key not in self.numbers or self.versions[key] != version:
            self.numbers[key] = n = len(self.graph.tensors)
            self.graph.tensors[n] = t
            self.versions[key] = version
            self.graph.shapes[n] = shape
            if data:
                self.graph.data.add(n)
        return self.numbers[key]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = list(_tensors((args, kwargs)))
        before = [(t, self.number(t), t._version) for t in tensors]
        template = _map((args, kwargs), lambda t: Ref(self.numbers[id(t)]))
        name = getattr(func, "__name__", "call")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", name)  # type: ignore[attr-defined]
        data = any(n in self.graph.data for _, n, _ in before)
        use = self._weight_use(name, args, kwargs, before) if data and name in WEIGHT_CALLS else None
        if use is not None and self.on_weight is not None:
            out = self.on_weight(use, lambda: func(*args, **kwargs))
        else:
            out = func(*args, **kwargs)
        changed = [t for t, _, version in before if t._version != version]
        for t in [*changed, *(t for t in _tensors(out) if not any(t is c for c in changed))]:
            if id(t) in self.numbers and self.versions[id(t)] == t._version:
                continue  # handed through as it came
            n = self.number(t, data=data, fresh=True)
            inputs = tuple(dict.fromkeys(m for _, m, _ in before))
            module = self.stack[-1] if self.stack else ""
            self.graph.calls[n] = Call(func, name, template[0], template[1], inputs, n, module)
            if data and t.is_floating_point() and t.numel():
                self.graph.samples[n] = t.detach().flatten()[:1024].clone()
                if self.keep:
                    self.graph.values[n] = t.detach().clone()
                if use is not None or any(part in name for part in _MEASURED):
                    self.graph.mean_square[n] = float(t.detach().double().square().mean())
                if use is not None:
                    self.graph.weights.append(replace(use, output=n))
        return out

    def _weight_use(
        self, call: str, args: tuple[Any, ...], kwargs: dict[str, Any], before: list[tuple[Tensor, int, int]]
    ) -> WeightUse | None:
        order = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(order, args, strict=False)) | kwargs
        data, weight, bias = given["input"], given["weight"], given.get("bias")
        numbers = {id(t): n for t, n, _ in before}
        if numbers[id(weight)] in self.graph.data or numbers[id(data)] not in self.graph.data:
            return None
        parameter = self.parameters.get(id(weight), "")
        module = self.stack[-1] if self.stack else call
        name = parameter.removesuffix(".weight").removesuffix("_weight") if parameter else module
        notes, kept, read = [], 1.0, 1.0
        if call != "linear":
            read = _places_read(data, weight, given)
            if any(s != 1 for s in _tuple(given.get("stride", 1))):
                notes.append("stride")
            kept = _kept_taps(data, weight, given)
            if kept < 1.0:
                notes.append("zero padding")
        return WeightUse(
            name=name,
            kind=WEIGHT_CALLS[call],
            weight=weight.detach(),
            bias=None if bias is None else bias.detach(),
            parameter=parameter,
            bias_parameter="" if bias is None else self.parameters.get(id(bias), ""),
            input=numbers[id(data)],
            output=-1,
            groups=int(given.get("groups", 1)),
            kept=kept,
            note=" and ".join(notes),
            read=read,
        )


def _places_read(data: Tensor, weight: Tensor, given: dict[str, Any]) -> float:
    """Share of the places that a convolution reads: less than one where its kernel is smaller than its stride."""
    dims, read = weight.ndim - 2, 1.0
    for d, stride in enumerate(_each(given.get("stride", 1), dims)):
        size, taps = data.shape[d - dims], weight.shape[d + 2]
        if taps < stride:
            read *= min(1.0, ((size - taps) // stride + 1) * taps / size)
    return read


def _kept_taps(data: Tensor, weight: Tensor, given: dict[str, Any]) -> float:
    """Share of the taps of a convolution that fall inside its input, over all places of the output."""
    dims = weight.ndim - 2
    stride, dilation = (_each(given.get(name, 1), dims) for name in ("stride", "dilation"))
    padding, kept = given.get("padding", 0), 1.0
    for d in range(dims):
        size, taps, reach = data.shape[d - dims], weight.shape[d + 2], dilation[d] * (weight.shape[d + 2] - 1)
        before, total = (reach // 2, reach) if padding == "same" else (0, 0)
        if not isinstance(padding, str):
            before = _each(padding, dims)[d]
            total = 2 * before
        starts = range(-before, size + total - before - reach, stride[d])
        inside = sum(0 <= start + dilation[d] * tap < size for start in starts for tap in range(taps))
        kept *= inside / max(len(starts) * taps, 1)
    return kept


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside of what torch.compile and data-parallel training put around it: they rename everything.

    >>> net = nn.Linear(2, 2)
    >>> unwrapped(torch.compile(net)) is net
    True
    """
    while True:
        parallel = isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
        inner = getattr(module, "module" if parallel else "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def record(
    module: nn.Module,
    example_input: Any,
    *,
    on_weight: Callable[[WeightUse, Callable[[], Tensor]], Tensor] | None = None,
    differentiate: Callable[[Tensor], None] | None = None,
    keep: bool = False,
    graph: ForwardGraph | None = None,
) -> ForwardGraph:
    """Run the module once on the example and return what was called; nothing outside is disturbed.

    Args:
        module: any nn.Module.
        example_input: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        on_weight: called with each use of a weight and the call itself; returns the output to go on with.
        differentiate: called with the output once it is there; with it, and only then, autograd follows.
        keep: also keep a copy of every value, for one small sample.
        graph: an empty one to fill, for an `on_weight` that looks at what has been recorded so far.

    Raises:
        ValueError: the example is empty.
        TypeError: the module is no nn.Module, or its output holds no tensor.
    """
    module = unwrapped(module)
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(module).__name__}; wrap a function in a module")
    args, kwargs = _call_arguments(example_input)
    tensors = list(_tensors((args, kwargs)))
    if not tensors or any(t.numel() == 0 for t in tensors):
        raise ValueError("the example input is empty: pass at least one sample, such as batch[0][:1]")
    if any(t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in tensors):
        raise ValueError("the example input is not finite: look for inf or nan in the data")
    parameters = {id(p): name for name, p in reversed(list(module.named_parameters(remove_duplicate=False)))}
    recorder = _Recorder(parameters, on_weight, ForwardGraph() if graph is None else graph, keep)
    with undisturbed(module), _named(module, recorder), torch.set_grad_enabled(differentiate is not None):
        args, kwargs = _map((args, kwargs), torch.clone)  # a first layer may work in place
        graph = recorder.graph
        graph.inputs = tuple(recorder.number(t, data=True) for t in _tensors((args, kwargs)))
        for n in graph.inputs:
            t = graph.tensors[n]
            if t.is_floating_point():
                graph.mean_square[n] = float(t.detach().double().square().mean())
                graph.samples[n] = t.detach().flatten()[:1024].clone()
                if keep:
                    graph.values[n] = t.detach().clone()
        with recorder:
            out = module(*args, **kwargs)
        first = next(_tensors(out), None)
        if first is None:
            raise TypeError(
                f"the output of {type(module).__name__} holds no tensor but {type(out).__name__}: wrap the "
                "model in a module that returns its logits"
            )
        graph.output = recorder.number(first)
        if differentiate is not None:
            # In here, since leaving the guard writes buffers back that the backward pass may need.
            differentiate(first)
    return graph


@contextmanager
def _named(module: nn.Module, recorder: _Recorder) -> Iterator[None]:
    handles = []

    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(_module: nn.Module, args: Any) -> None:
            recorder.stack.append(name)
            first = next(_tensors(args), None)
            recorder.graph.module_inputs.setdefault(name, []).append(-1 if first is None else recorder.number(first))

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            recorder.stack.pop()
            first = next(_tensors(output), None)
            if first is not None:
                number = recorder.number(first)
                recorder.graph.module_outputs.setdefault(name, []).append(number)
                if first.is_floating_point() and first.numel():
                    recorder.graph.mean_square[number] = float(first.detach().double().square().mean())

        return enter, leave

    try:
        for name, submodule in module.named_modules():
            enter, leave = hooks(name)
            handles.append(submodule.register_forward_pre_hook(enter, prepend=True))
            handles.append(submodule.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, tuple | list):
        return tuple(example), {}
    if isinstance(example, dict):
        return (), dict(example)
    return (example,), {}


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from _tensors(value)


def _map(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_map(value, function) for value in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(_map(value, function) for value in tree)
    return tree


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = _tuple(value)
    return values * dims if len(values) == 1 else values


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
