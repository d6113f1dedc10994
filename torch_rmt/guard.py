"""`undisturbed`: whatever happens inside, the training run outside does not notice."""

from __future__ import annotations

import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

_SEARCHED = 1000  # longer containers are put back, but what stands in them is not looked at: that would take its time
_CONTAINERS = (dict, list, set, deque)
_PLAIN = {bool, int, float, str, tuple, type(None)}
_TABLES = {name for name, value in vars(nn.Module()).items() if isinstance(value, _CONTAINERS)}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Whose functions and objects keep nothing of the user's.
_FOREIGN = {*sys.stdlib_module_names, "torch", "numpy", "lightning", "pytorch_lightning"}
_FULL = ("ieee", "none")
# Where torch 2.9 and later say how float32 is multiplied, those that the others inherit from first.
_PRECISIONS = (
    ("generic", "all"),
    ("cuda", "all"),
    ("cuda", "matmul"),
    ("cuda", "conv"),
    ("cuda", "rnn"),
    ("mkldnn", "all"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
    ("mkldnn", "rnn"),
)


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, float32 is multiplied as float32, whatever the training run allows (TF32, bf16).

    `torch.set_float32_matmul_precision("high" | "medium")`, which speeds training up, leaves 10 or 7 bits of each
    factor: products with a Hessian are then 0.1 to 1 % off, eigenvectors orthogonal to 3 digits and small residuals out
    of reach; convolutions on CUDA do so unless told otherwise. Outside all is as it was.

    Example:
        >>> torch.set_float32_matmul_precision("medium")
        >>> with full_precision():
        ...     torch.get_float32_matmul_precision()
        'highest'
        >>> torch.get_float32_matmul_precision()
        'medium'
        >>> torch.set_float32_matmul_precision("highest")
    """
    before = _precision()
    try:
        _set_precision(_lifted(before))
        yield
    finally:
        _set_precision(before)


_Precision = tuple[str | None, bool | None, tuple[str, ...]]


def _precision() -> _Precision:
    """How float32 is multiplied: flags of torch before 2.9 (None where they have no answer), and later ones."""
    try:
        matmul: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # the later flags say what these cannot
        matmul = None
    try:
        convolution: bool | None = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        convolution = None
    read = getattr(torch._C, "_get_fp32_precision_getter", None)
    return matmul, convolution, () if read is None else tuple(read(*place) for place in _PRECISIONS)


def _lifted(precision: _Precision) -> _Precision:
    matmul, convolution, places = precision
    return matmul and "highest", convolution and False, tuple(p if p in _FULL else "ieee" for p in places)


def _set_precision(precision: _Precision) -> None:
    """Write where something else stands: a value that is inherited stays so."""
    matmul, convolution, places = precision
    now = _precision()
    if matmul is not None and now[0] != matmul:
        torch.set_float32_matmul_precision(matmul)
    if convolution is not None and now[1] != convolution:
        torch.backends.cudnn.allow_tf32 = convolution
    for place, value in zip(_PRECISIONS, places, strict=False):
        if torch._C._get_fp32_precision_getter(*place) != value:
            torch._C._set_fp32_precision_setter(*place, value)


def _accelerator_states() -> list[tuple[int, Tensor]]:
    """RNG state of every CUDA device; a driver that sleeps is not woken."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
        return []
    return [(i, torch.cuda.get_rng_state(i)) for i in range(torch.cuda.device_count())]


_Restore = Callable[[], Any]


def _keep(value: Any, kept: list[_Restore], seen: set[int]) -> None:
    """Add what puts the contents of containers, and the states of random generators in them, back."""
    if isinstance(value, _CONTAINERS):
        if id(value) in seen:
            return
        seen.add(id(value))
        content = dict(value) if isinstance(value, dict) else list(value)
        kept.append(functools.partial(_refill, value, content))
        if len(content) <= _SEARCHED:
            for item in content.values() if isinstance(content, dict) else content:
                if type(item) not in _PLAIN:
                    _keep(item, kept, seen)
    elif isinstance(value, torch.Generator):
        kept.append(functools.partial(value.set_state, value.get_state()))
    elif isinstance(value, random.Random):
        kept.append(functools.partial(value.setstate, value.getstate()))
    elif isinstance(value, np.random.RandomState):
        kept.append(functools.partial(value.set_state, value.get_state()))
    elif isinstance(value, np.random.Generator):
        kept.append(functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state))


def _refill(held: Any, content: Any) -> None:
    """Put the contents back where they changed, so that who looks at the container meanwhile sees no empty one."""
    if isinstance(held, dict):
        if held.keys() != content.keys() or any(held[k] is not v for k, v in content.items()):
            held.clear()
            held.update(content)
    elif len(held) != len(content) or any(a is not b for a, b in zip(held, content, strict=True)):
        held.clear()
        held.update(content) if isinstance(held, set) else held.extend(content)


def _refill_all(pairs: list[tuple[Any, Any]]) -> None:
    for held, content in pairs:
        if held or content:
            _refill(held, content)


def _keep_written(hook: Any, kept: list[_Restore], seen: set[int]) -> None:
    """Add what puts back that which a hook writes to: its object, what it closes over, globals.

    A hook may be part of the network, so it runs while measuring; what it counts or collects is the user's.
    """
    reached: list[Any] = [hook]
    if isinstance(hook, functools.partial):
        reached = [*hook.args, *hook.keywords.values(), hook.func]
    elif isinstance(hook, MethodType):
        reached = [hook.__self__, hook.__func__]
    elif isinstance(hook, FunctionType):
        if _foreign(hook.__module__) or id(hook) in seen:
            return
        seen.add(id(hook))
        cells = [cell for cell in hook.__closure__ or () if cell != CellType()]
        kept += [functools.partial(setattr, cell, "cell_contents", cell.cell_contents) for cell in cells]
        names = {name: hook.__globals__[name] for name in hook.__code__.co_names if name in hook.__globals__}
        kept.append(functools.partial(hook.__globals__.update, names))
        reached = [*(cell.cell_contents for cell in cells), *names.values()]
    for thing in reached:
        if isinstance(thing, (FunctionType, MethodType, functools.partial)):
            _keep_written(thing, kept, seen)
        elif hasattr(thing, "__dict__") and not isinstance(thing, type) and not _foreign(type(thing).__module__):
            _keep(vars(thing), kept, seen)
        _keep(thing, kept, seen)


def _foreign(module: str | None) -> bool:
    return str(module).partition(".")[0] in _FOREIGN


def _state_of(modules: Iterable[nn.Module]) -> list[_Restore]:
    """What puts back the attributes of modules (mode, hooks, buffers, counters) and what their hooks write to."""
    seen: set[int] = set()
    kept: list[_Restore] = []
    hooks = [*(table for name in _HOOKS if (table := getattr(torch_module, f"_global{name}", None)))]
    for module in modules:
        attributes = vars(module)
        kept.append(functools.partial(_refill, attributes, dict(attributes)))
        tables = [attributes[name] for name in _TABLES & attributes.keys()]  # nearly all are empty, and stay so
        kept.append(functools.partial(_refill_all, [(table, table.copy()) for table in tables if table is not None]))
        for name, value in attributes.items():
            if name not in _TABLES and type(value) not in _PLAIN:
                _keep(value, kept, seen)
        hooks += [table for name in _HOOKS if (table := getattr(module, name, None))]
    for hook in [hook for table in hooks for hook in table.values()]:
        _keep_written(hook, kept, seen)
    return kept


class _Values:
    """A tensor whose values must survive."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.copy = tensor.detach().clone()

    def restore(self) -> None:
        """Write the values back if they were changed in place."""
        if self.tensor.device.type != "cpu":
            # To ask would wait for the device, as often as there are buffers. `.data` has a version of its own: a graph
            # of the training run that holds the buffer stays usable.
            self.tensor.data.copy_(self.copy)
        # Batch normalisation writes its running statistics without raising the version.
        elif not torch.equal(self.tensor, self.copy):
            self.tensor.copy_(self.copy)


def _first_lazy(modules: Iterable[nn.Module]) -> str:
    named = [(m, *pair) for m in modules for pair in (*m.named_parameters(), *m.named_buffers())]
    return next(f"{name!r} of {type(m).__name__}" for m, name, tensor in named if is_lazy(tensor))


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Measure inside; leave no trace outside.

    Restored on leaving, also after an exception: train/eval mode, hooks, buffers and plain attributes of
    every submodule (what stands in containers and random generators among them), what hooks count and collect,
    `requires_grad` and `.grad` of every parameter, the random state of torch (CPU and
    every CUDA device), numpy and Python, grad mode, the cuDNN flags and the precision of float32. Inside: gradients
    are enabled, inference mode and autocast are off, float32 is multiplied as such (`full_precision`), compiled
    modules run eagerly (`force_eager`), attention runs on the MATH kernel, the one that can be differentiated
    twice, and `.grad` of every parameter is None.
    Not copied: parameters, and tensors that are plain attributes; do not write into them (a tensor that `forward`
    writes into is restored where it is a buffer).

    Raises:
        ValueError: a lazy module has not seen a batch yet; to run it here would settle its shapes for good.

    Example:
        >>> import torch
        >>> layer = torch.nn.Dropout()
        >>> before = torch.get_rng_state()
        >>> with undisturbed(layer):
        ...     _ = layer.eval(), torch.rand(3)
        >>> layer.training, torch.equal(before, torch.get_rng_state())
        (True, True)
    """
    submodules = {id(m): m for module in modules for m in module.modules()}.values()
    python_state, cpu_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global state is what training code draws from
    cuda_states = _accelerator_states()
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    buffers = {id(b): b for module in modules for b in module.buffers()}.values()
    if any(is_lazy(tensor) for tensor in (*parameters, *buffers)):
        raise ValueError(f"{_first_lazy(modules)} has no shape yet: run the lazy modules on one batch first.")
    states = _state_of(submodules)
    gradients = [(p, p.requires_grad, p.grad) for p in parameters]
    with torch.no_grad():
        values = [_Values(b) for b in buffers]
    cudnn = torch.backends.cudnn
    flags = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic)
    try:
        for p in parameters:
            p.grad = None  # out of reach, which costs no copy
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import would cost two seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(full_precision())
            stack.enter_context(torch.inference_mode(False))  # which enables gradients too
            stack.enter_context(torch.autocast("cpu", enabled=False))
            if torch.cuda.is_available():
                stack.enter_context(torch.autocast("cuda", enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield
    finally:
        for restore in states:
            restore()
        for p, requires_grad, grad in gradients:
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
            if p.grad is not grad:
                p.grad = grad
        with torch.no_grad():
            for value in values:
                value.restore()
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(cpu_state)
        for index, state in cuda_states:
            torch.cuda.set_rng_state(state, index)
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = flags
