"""Ways to differentiate: each rung of the ladder as one function.

A rung takes a `Differentiable` and prepares products. First order: `push` is `V -> J V` and `pull` is
`U -> J^T U`. Second order: `push` is `V -> H V` (H symmetric, so `pull` is the same). Vectors come in blocks,
with one leading dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from torch_rmt.guard import full_precision
from torch_rmt.operators.tape import length
from torch_rmt.operators.taped import taped

Tensors = tuple[Tensor, ...]


class EngineError(RuntimeError):
    """The model cannot be differentiated reliably; the message says what was tried and what to do."""


@dataclass(frozen=True)
class Differentiable:
    """A function of tensors at a point, with the world it must run in.

    Fields:
        call: `call(*point) -> Tensor`.
        point: where derivatives are taken.
        guard: context in which `call` may run without disturbing training.
        within: `within(point, thunk)` runs the thunk with the module's parameters held at `point`;
        checkpointed
            modules run their forward pass again inside the backward pass and must find the same parameters.
    """

    call: Callable[..., Tensor]
    point: Tensors
    guard: Callable[[], AbstractContextManager[None]]
    within: Callable[[Tensors, Callable[[], Any]], Any]


@dataclass(frozen=True)
class Products:
    """What a rung prepared: products with blocks of vectors, and the value (or gradient) at the point."""

    push: Callable[[Tensors], Tensors]
    pull: Callable[[Tensors], Tensors]
    value: Tensor


def stacked(one: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
    """Apply a product to each vector of a block in turn."""

    def many(block: Tensors) -> Tensors:
        if block[0].shape[0] == 1:
            return tuple(t.unsqueeze(0) for t in one(tuple(t[0] for t in block)))
        results = [one(tuple(t[i] for t in block)) for i in range(block[0].shape[0])]
        return tuple(torch.stack(column) for column in zip(*results, strict=True))

    return many


def unguarded(one: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
    """As `stacked`, for a graph in whose products the module does not run again, so no guard is needed.

    Where `torch.func` has run as well nothing is checkpointed: it refuses saved-tensor hooks.
    """
    return stacked(one)


def batched(one: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
    """Apply a product to a block at once by vmap; a block of one goes directly."""

    def many(block: Tensors) -> Tensors:
        if block[0].shape[0] == 1:
            return tuple(t.unsqueeze(0) for t in one(tuple(t[0] for t in block)))
        return tuple(vmap(one, randomness="same")(block))

    return many


Block = Callable[[Callable[[Tensors], Tensors]], Callable[[Tensors], Tensors]]


def double_vjp(f: Differentiable, block: Block) -> Products:
    """First order by `torch.func.vjp` and the vjp of that: both graphs are kept, no forward pass again."""
    with f.guard():
        value, pull = vjp(f.call, *f.point)[:2]
        push = vjp(lambda u: pull(u), torch.zeros_like(value))[1]

    def pull_one(u: Tensors) -> Tensors:
        return tuple(pull(u[0]))

    def push_one(v: Tensors) -> Tensors:
        return tuple(push(tuple(v)))

    return Products(_quiet(block(push_one)), _quiet(block(pull_one)), value.detach())


def autograd_first(f: Differentiable, block: Block) -> Products:
    """First order by `torch.autograd.grad` twice on cloned leaves; for what torch.func refuses."""
    leaves = tuple(p.detach().clone().requires_grad_() for p in f.point)

    def build() -> tuple[Tensor, Tensor, Tensors]:
        value = f.call(*leaves)
        seed = torch.zeros_like(value, requires_grad=True)
        return (
            value,
            seed,
            torch.autograd.grad(value, leaves, seed, create_graph=True, materialize_grads=True),
        )

    with f.guard():
        value, seed, gradients = f.within(leaves, build)

    def pull_one(u: Tensors) -> Tensors:
        return torch.autograd.grad(value, leaves, u[0], retain_graph=True, materialize_grads=True)

    def push_one(v: Tensors) -> Tensors:
        pairs = [(g, t) for g, t in zip(gradients, v, strict=True) if g.requires_grad]
        if not pairs:
            return (torch.zeros_like(seed),)
        outputs, vectors = zip(*pairs, strict=True)
        return tuple(torch.autograd.grad(outputs, seed, vectors, retain_graph=True, materialize_grads=True))

    # No vmap here: a checkpointed forward pass that runs again inside must see plain tensors.
    return Products(_plain(f, leaves, push_one, block), _plain(f, leaves, pull_one, block), value.detach())


def forward_mode(f: Differentiable, block: Block) -> Products:
    """First order with `push` by `torch.func.jvp`, the forward pass anew for each block; `pull` by vjp."""
    with f.guard():
        value, pull = vjp(f.call, *f.point)[:2]

    def push_one(v: Tensors) -> Tensors:
        return (jvp(f.call, f.point, tuple(v))[1],)

    def push(v: Tensors) -> Tensors:
        with f.guard(), torch.no_grad():
            return tuple(t.detach() for t in block(push_one)(v))

    return Products(push, _quiet(block(lambda u: tuple(pull(u[0])))), value.detach())


def _step(point: Tensors, v: Tensors) -> float:
    """Central differences lose least at `eps^(1/3)` relative to point and direction."""
    eps = torch.finfo(point[0].dtype).eps ** (1 / 3)
    return float(eps * (1.0 + float(length(point))) / max(float(length(v)), 1e-30))


def _moved(point: Tensors, v: Tensors, h: float) -> Tensors:
    return tuple(p + h * t for p, t in zip(point, v, strict=True))


def differences_first(f: Differentiable, block: Block) -> Products:
    """First order with `push` by central differences, `pull` by one backward pass; checked before use."""
    with f.guard(), torch.no_grad():
        value = f.call(*f.point)

    def push_one(v: Tensors) -> Tensors:
        def slope(h: float) -> Tensor:
            with f.guard(), torch.no_grad():
                return (f.call(*_moved(f.point, v, h)) - f.call(*_moved(f.point, v, -h))) / (2 * h)

        h = _step(f.point, v)
        return (_consistent((slope(h),), (slope(2 * h),))[0],)

    def pull_one(u: Tensors) -> Tensors:
        return gradient(f, f.point, u[0])[1]

    return Products(stacked(push_one), stacked(pull_one), value)


def gradient(f: Differentiable, point: Tensors, seed: Tensor | None = None) -> tuple[Tensor, Tensors]:
    """Value and gradient by one plain `backward()`; the least that a model must bear."""
    leaves = tuple(p.detach().clone().requires_grad_() for p in point)

    def run() -> Tensor:
        value = f.call(*leaves)
        if value.requires_grad:
            torch.autograd.backward(value, seed)
        return value.detach()

    with f.guard():
        value = f.within(leaves, run)
    return value, tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in leaves)


def vjp_of_grad(f: Differentiable, block: Block) -> Products:
    """Second order: `torch.func.vjp` of `torch.func.grad`, the graph kept. The front door."""
    arguments = tuple(range(len(f.point)))
    with f.guard():
        gradients, pull = vjp(grad(f.call, argnums=arguments), *f.point)[:2]

    def push_one(v: Tensors) -> Tensors:
        return tuple(pull(tuple(v)))

    push = _quiet(block(push_one))
    return Products(push, push, torch.cat([g.detach().flatten() for g in gradients]))


def double_backward(f: Differentiable, block: Block) -> Products:
    """Second order: `torch.autograd.grad` of a gradient with its graph, on cloned leaves."""
    leaves = tuple(p.detach().clone().requires_grad_() for p in f.point)

    def build() -> Tensors:
        return torch.autograd.grad(f.call(*leaves), leaves, create_graph=True, materialize_grads=True)

    with f.guard():
        gradients = f.within(leaves, build)

    def push_one(v: Tensors) -> Tensors:
        pairs = [(g, t) for g, t in zip(gradients, v, strict=True) if g.requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(t) for t in leaves)
        outputs, vectors = zip(*pairs, strict=True)
        return tuple(torch.autograd.grad(outputs, leaves, vectors, retain_graph=True, materialize_grads=True))

    push = _plain(f, leaves, push_one, block)
    return Products(push, push, torch.cat([g.detach().flatten() for g in gradients]))


def differences_second(f: Differentiable, block: Block) -> Products:
    """Second order: central differences of the gradient, refused where two steps disagree (ReLU)."""

    def slope(v: Tensors, h: float) -> Tensors:
        above, below = gradient(f, _moved(f.point, v, h))[1], gradient(f, _moved(f.point, v, -h))[1]
        return tuple((a - b) / (2 * h) for a, b in zip(above, below, strict=True))

    def push_one(v: Tensors) -> Tensors:
        h = _step(f.point, v)
        return _consistent(slope(v, h), slope(v, 2 * h))

    push = stacked(push_one)
    return Products(push, push, torch.cat([g.flatten() for g in gradient(f, f.point)[1]]))


def _consistent(fine: Tensors, coarse: Tensors) -> Tensors:
    """The finer of two difference quotients, if they agree; error h^2 makes them differ by 3 errors."""
    gap, size = length(tuple(a - b for a, b in zip(fine, coarse, strict=True))), length(fine)
    tolerance = 0.02 if fine[0].dtype == torch.float32 else 1e-3
    if gap > tolerance * size and size > 0:
        raise EngineError(
            f"central differences with two steps differ by {float(gap / size):.1%}: the model is not "
            "smooth here (ReLU, max-pooling); use float64, or operations with a second derivative"
        )
    return fine


def _quiet(product: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
    """Products from a kept graph: the module does not run again, so a light guard is enough.

    Without gradients enabled `torch.func` builds no graph of the product itself, which is a third of its
    time.
    """

    def run(v: Tensors) -> Tensors:
        plainly = torch.autocast(v[0].device.type, enabled=False)
        with full_precision(), torch.inference_mode(False), torch.no_grad(), plainly:
            return tuple(t.detach() for t in product(v))

    return run


def _plain(
    f: Differentiable, leaves: Tensors, one: Callable[[Tensors], Tensors], block: Block
) -> Callable[[Tensors], Tensors]:
    """Products of plain autograd; they may run the module again (checkpointing) unless `block` knows better."""
    product = block(one)
    if block in (unguarded, taped):
        return _quiet(product)

    def run(v: Tensors) -> Tensors:
        with f.guard():
            return tuple(t.detach() for t in f.within(leaves, lambda: product(v)))

    return run


FIRST_ORDER: tuple[tuple[str, Callable[[Differentiable, Block], Products]], ...] = (
    ("double vjp", double_vjp),
    ("double backward", autograd_first),
    ("forward mode", forward_mode),
    ("central differences", differences_first),
)
SECOND_ORDER: tuple[tuple[str, Callable[[Differentiable, Block], Products]], ...] = (
    ("vjp of grad", vjp_of_grad),
    ("double backward", double_backward),
    ("central differences", differences_second),
)
