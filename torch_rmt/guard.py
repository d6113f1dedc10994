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
        # Batch normalisation writes its running statistics without raising the version.
        if not torch.equal(self.tensor, self.copy):
            self.tensor.copy_(self.copy)


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Measure inside; leave no trace outside.

    Restored on leaving, also after an exception: train/eval mode, hooks, buffers and plain attributes of
    every submodule, `requires_grad` and `.grad` of every parameter, the random state of torch (CPU and
    every CUDA device), numpy and Python, grad mode and the cuDNN flags. Inside: gradients are enabled,
    inference mode and autocast are off, compiled modules run eagerly (`force_eager`), and attention runs
    on the MATH kernel, the one that can be differentiated twice, and `.grad` of every parameter is None.
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
    flags = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    try:
        for p in parameters:
            p.grad = None  # out of reach, which costs no copy
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import would cost two seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast("cpu", enabled=False))
            if torch.cuda.is_available():
                stack.enter_context(torch.autocast("cuda", enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield
    finally:
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
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = flags
