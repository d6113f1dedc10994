"""`undisturbed`: whatever happens inside, the training run outside does not notice."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_CONTAINERS = (dict, list, set)
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
    if before == (lifted := _lifted(before)):
        yield
        return
    try:
        _set_precision(lifted)
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


class _Snapshot:
    """The attributes of one submodule (mode, hooks, buffers, counters), to be put back where they changed."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(module.__dict__)
        self.contents: dict[str, Any] = {
            name: value.copy() for name, value in self.attributes.items() if isinstance(value, _CONTAINERS)
        }

    def restore(self) -> None:
        """Put attributes and the contents of dicts, lists and sets back."""
        now = self.module.__dict__
        if now.keys() != self.attributes.keys() or any(now[k] is not v for k, v in self.attributes.items()):
            now.clear()
            now.update(self.attributes)
        for name, content in self.contents.items():
            held = self.attributes[name]
            if isinstance(held, dict):
                if held.keys() != content.keys() or any(held[k] is not v for k, v in content.items()):
                    held.clear()
                    held.update(content)
            elif isinstance(held, list):
                if len(held) != len(content) or any(a is not b for a, b in zip(held, content, strict=True)):
                    held[:] = content
            elif held != content:
                held.clear()
                held.update(content)


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


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Measure inside; leave no trace outside.

    Restored on leaving, also after an exception: train/eval mode, hooks, buffers and plain attributes of
    every submodule, `requires_grad` and `.grad` of every parameter, the random state of torch (CPU and
    every CUDA device), numpy and Python, grad mode, the cuDNN flags and the precision of float32. Inside: gradients
    are enabled, inference mode and autocast are off, float32 is multiplied as such (`full_precision`), compiled
    modules run eagerly (`force_eager`), attention runs on the MATH kernel, the one that can be differentiated
    twice, and `.grad` of every parameter is None.
    Parameters are not copied: do not write into them.

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
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    buffers = {id(b): b for module in modules for b in module.buffers()}.values()
    snapshots = [_Snapshot(m) for m in submodules]
    gradients = [(p, p.requires_grad, p.grad) for p in parameters]
    with torch.no_grad():
        values = [_Values(b) for b in buffers]
    python_state, cpu_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global state is what training code draws from
    cuda_states = _accelerator_states()
    cudnn = torch.backends.cudnn
    flags = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic)
    precision = _precision()
    try:
        for p in parameters:
            p.grad = None  # out of reach, which costs no copy
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import would cost two seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(full_precision())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast("cpu", enabled=False))
            if torch.cuda.is_available():
                stack.enter_context(torch.autocast("cuda", enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield
    finally:
        _set_precision(precision)
        for snapshot in snapshots:
            snapshot.restore()
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
