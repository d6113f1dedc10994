"""`undisturbed`: whatever happens inside, the training run outside does not notice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def _accelerator_states() -> list[tuple[int, torch.Tensor]]:
    """RNG state of every CUDA device that has been used; an untouched driver is not woken."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return []
    return [(i, torch.cuda.get_rng_state(i)) for i in range(torch.cuda.device_count())]


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Measure inside; leave no trace outside.

    Restored on leaving, also after an exception: train/eval mode of every submodule, `requires_grad` and `.grad` of
    every parameter, values of buffers, forward hooks, the random state of torch (CPU and every CUDA device), numpy
    and Python, grad mode and the cuDNN flags. Inside: gradients are enabled, inference mode and autocast are off,
    compiled modules run eagerly (`force_eager`), and attention runs on the MATH kernel, the one that can be
    differentiated twice.

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
    modes = [(m, m.training) for m in submodules]
    hooks = [
        (m, name, dict(getattr(m, name)))
        for m in submodules
        for name in (
            "_forward_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_hooks_always_called",
            "_forward_pre_hooks",
            "_forward_pre_hooks_with_kwargs",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    ]
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    gradients = [(p, p.requires_grad, p.grad, None if p.grad is None else p.grad._version) for p in parameters]
    copies = {id(p): p.grad.detach().clone() for p in parameters if p.grad is not None}
    with torch.no_grad():
        buffers = [(b, b.detach().clone()) for module in modules for b in module.buffers()]
    python_state, numpy_state, cpu_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = _accelerator_states()
    cudnn = torch.backends.cudnn
    flags = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast("cpu", enabled=False))
            if torch.cuda.is_available():
                stack.enter_context(torch.autocast("cuda", enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield
    finally:
        for m, training in modes:
            m.training = training
        for m, name, content in hooks:
            current = getattr(m, name)
            if dict(current) != content:
                current.clear()
                current.update(content)
        with torch.no_grad():
            for p, requires_grad, grad, version in gradients:
                if p.requires_grad != requires_grad:
                    p.requires_grad_(requires_grad)
                p.grad = grad
                if grad is not None and grad._version != version:
                    grad.copy_(copies[id(p)])
            for b, value in buffers:
                if b._version and not torch.equal(b, value):
                    b.copy_(value)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        for index, state in cuda_states:
            torch.cuda.set_rng_state(state, index)
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = flags
