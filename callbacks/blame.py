"""Which layer a failed measurement failed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def failing_module(error: BaseException, model: nn.Module) -> str | None:
    """Return the name of the innermost submodule of `model` whose code the error was raised in.

    The traceback tells: its frames hold the modules as `self`. None if the error came from elsewhere, the
    derivative of an operation for instance.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: str | None = None
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and names.get(id(owner)):
            found = names[id(owner)]
        trace = trace.tb_next
    return found


def first_not_finite(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """Return the first place with inf or nan: a parameter's name, else the submodule whose output has it.

    `run` runs the model, once; the caller guards it.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.detach()).all():
            return name
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(tensor, torch.Tensor) and not torch.isfinite(tensor.detach()).all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            run()
    except Exception:  # the run only serves a better message
        return None
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
