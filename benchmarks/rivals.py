"""Products of other people's libraries, those that can be imported, on one model and batch.

curvlinops 3, BackPACK 1.7 (products by automatic differentiation), hessian-eigenthings 1.0 and PyHessian 0.1. Each is
called as its own documentation does; a graph is kept where the library keeps one.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[], Callable[[], Any]]


def _found(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _math(run: Callable[[], Any]) -> Callable[[], Any]:
    """None of them can differentiate the fused attention kernels twice."""

    def wrapped() -> Any:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return run()

    return wrapped


def rivals(model: nn.Module, x: Tensor, y: Tensor, v: Tensor) -> Iterator[tuple[str, Build]]:
    """Label, and a function that builds what is kept and returns the product to time."""
    loss, params = nn.CrossEntropyLoss(), list(model.parameters())
    sizes = [p.numel() for p in params]
    pieces = [t.reshape(p.shape) for t, p in zip(torch.split(v, sizes), params, strict=True)]
    if curvlinops := _found("curvlinops"):
        kinds = {"Hessian": curvlinops.HessianLinearOperator, "Gauss-Newton": curvlinops.GGNLinearOperator}
        for label, kind in kinds.items():

            def build(kind: Any = kind) -> Callable[[], Any]:
                operator = kind(model, loss, params, [(x, y)], check_deterministic=False)
                return _math(lambda: operator @ v)

            yield f"curvlinops {label} product", build
    if _found("backpack"):
        hvp = importlib.import_module("backpack.hessianfree.hvp").hessian_vector_product
        ggnvp = importlib.import_module("backpack.hessianfree.ggnvp").ggn_vector_product_from_plist

        def gauss_newton() -> Any:
            output = model(x)
            return ggnvp(loss(output, y), output, params, pieces)

        yield "BackPACK Hessian product", lambda: _math(lambda: hvp(loss(model(x), y), params, pieces))
        yield "BackPACK Gauss-Newton product", lambda: _math(gauss_newton)
    if things := _found("hessian_eigenthings.operators"):
        losses = importlib.import_module("hessian_eigenthings.loss_fns")
        criterion = nn.CrossEntropyLoss()

        def hessian() -> Callable[[], Any]:
            operator = things.HessianOperator(model, [(x, y)], losses.supervised_loss(criterion))
            return _math(lambda: operator.matvec(v))

        def ggn() -> Callable[[], Any]:
            of_output = losses.supervised_loss_of_output(criterion)
            operator = things.GGNOperator(model, [(x, y)], losses.supervised_forward, of_output)
            return _math(lambda: operator.matvec(v))

        yield "hessian-eigenthings Hessian product", hessian
        yield "hessian-eigenthings Gauss-Newton product", ggn
    if pyhessian := _found("pyhessian"):
        utils = importlib.import_module("pyhessian.utils")

        def kept() -> Callable[[], Any]:
            own = copy.deepcopy(model)  # it puts gradients with graphs into `.grad`
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                measured = pyhessian.hessian(own, loss, data=(x, y), cuda=x.is_cuda)
            return _math(lambda: utils.hessian_vector_product(measured.gradsH, measured.params, pieces))

        yield "PyHessian Hessian product", kept
