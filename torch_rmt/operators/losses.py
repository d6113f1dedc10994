"""The curvature of a loss by the network's output: recognised by what it does, not by its name.

A loss may be a module, a function or a lambda. Its Hessian by the output is compared with two closed forms on
two random vectors; a form is used where it fits, and automatic differentiation where none does. So label
smoothing, class weights, ignored tokens and either reduction are covered by the same two lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class OutputCurvature:
    """Hessian of the loss by the output at one output.

    Fields:
        form: "softmax": `H = s (diag p - p p^T)` on each row of classes; "elementwise": `H = diag(d)`;
            "general": by automatic differentiation.
        product: `U -> H U` on a block `(k, *output)`.
        draw: `generator -> z` with `E z z^T = H`, where the loss is a negative log-likelihood that we know
            (categorical, Gaussian, Bernoulli); None otherwise.
        root: `U -> Z U` with `Z Z^T = H`, on a block; None where no closed form is known.
    """

    form: Literal["softmax", "elementwise", "general"]
    product: Callable[[Tensor], Tensor]
    draw: Callable[[torch.Generator], Tensor] | None
    root: Callable[[Tensor], Tensor] | None


def checked_loss(value: Any) -> Tensor:
    """Return a scalar finite loss.

    Raises:
        TypeError: the loss is no scalar tensor.
        ValueError: it is not finite.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"the loss must return one scalar tensor, not {shape}; use reduction='mean'")
    if not torch.isfinite(value.detach()).all():
        raise ValueError(
            f"the loss is {float(value.detach())} on this batch; look for inf or nan in inputs and weights, "
            "or measure before the divergence"
        )
    return value.reshape(())


def _hessian_by_autograd(loss: Loss, output: Tensor, targets: Any) -> Callable[[Tensor], Tensor]:
    leaf = output.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, targets), leaf, create_graph=True)

    def product(block: Tensor) -> Tensor:
        if not gradient.requires_grad:
            return torch.zeros_like(block)
        return torch.stack(
            [torch.autograd.grad(gradient, leaf, u, retain_graph=True, materialize_grads=True)[0] for u in block]
        )

    return product


def output_curvature(loss: Loss, output: Tensor, targets: Any) -> OutputCurvature:
    """Find the form of `d^2 loss / d output^2` at `output` (to be called with gradients enabled)."""
    reference = _hessian_by_autograd(loss, output, targets)
    generator = torch.Generator(device=output.device).manual_seed(2)
    probe = torch.randn((2, *output.shape), generator=generator, dtype=output.dtype, device=output.device)
    probe = probe.sign() * (0.5 + probe.abs())
    image = reference(probe)
    tolerance = 1e-9 if output.dtype == torch.float64 else 1e-4

    def fits(form: Callable[[Tensor], Tensor]) -> bool:
        return float((form(probe[1:]) - image[1:]).norm()) <= tolerance * float(image[1:].norm())

    d = image[0] / probe[0]
    if fits(lambda u: d * u):
        draw = _elementwise_draw(loss, output, targets, d)
        square_root = None if bool((d < 0).any()) else d.sqrt()
        root = None if square_root is None else lambda u: square_root * u
        return OutputCurvature("elementwise", lambda u: d * u, draw, root)
    for dim in sorted({1, output.ndim - 1}) if output.ndim > 1 else (0,):
        p = output.softmax(dim)

        def base(u: Tensor, p: Tensor = p, dim: int = dim) -> Tensor:
            pu = p * u
            return pu - p * pu.sum(dim + 1, keepdim=True)

        b = base(probe[:1])[0]
        size = (b * b).sum(dim, keepdim=True)
        s = torch.where(size > 0, (image[0] * b).sum(dim, keepdim=True) / size.clamp_min(1e-38), 0.0)

        def form(u: Tensor, s: Tensor = s, base: Callable[[Tensor], Tensor] = base) -> Tensor:
            return s * base(u)

        if fits(form):
            if bool((s < 0).any()):
                return OutputCurvature("softmax", form, None, None)

            def half(u: Tensor, p: Tensor = p, s: Tensor = s, dim: int = dim) -> Tensor:
                ru = p.sqrt() * u
                return s.sqrt() * (ru - p * ru.sum(dim + 1, keepdim=True))

            return OutputCurvature("softmax", form, _categorical_draw(p, s, dim), half)
    return OutputCurvature("general", reference, None, None)


def _categorical_draw(p: Tensor, s: Tensor, dim: int) -> Callable[[torch.Generator], Tensor]:
    def draw(generator: torch.Generator) -> Tensor:
        rows = p.movedim(dim, -1).reshape(-1, p.shape[dim])
        chosen = torch.multinomial(rows, 1, generator=generator)[:, 0]
        one_hot = torch.nn.functional.one_hot(chosen, p.shape[dim]).to(p.dtype)
        one_hot = one_hot.reshape(p.movedim(dim, -1).shape).movedim(-1, dim)
        return s.sqrt() * (p - one_hot)

    return draw


def _elementwise_draw(
    loss: Loss, output: Tensor, targets: Any, d: Tensor
) -> Callable[[torch.Generator], Tensor] | None:
    """Gaussian if the curvature does not depend on the output, Bernoulli if it goes as sigmoid'."""
    if not bool((d > 0).any()) or bool((d < 0).any()):
        return None
    generator = torch.Generator(device=output.device).manual_seed(3)
    noise = torch.randn(output.shape, generator=generator, dtype=output.dtype, device=output.device)
    elsewhere = output.detach() + noise * (1.0 + 3.0 * output.detach().std(correction=0))
    moved = _hessian_by_autograd(loss, elsewhere, targets)(torch.ones_like(output).unsqueeze(0))[0]
    tolerance = 1e-8 if output.dtype == torch.float64 else 1e-3

    def same(a: Tensor, b: Tensor) -> bool:
        return float((a - b).norm()) <= tolerance * float(b.norm())

    if same(moved, d):
        return lambda g: d.sqrt() * torch.randn(d.shape, generator=g, dtype=d.dtype, device=d.device)
    p, q = output.detach().sigmoid(), elsewhere.sigmoid()
    s = d / (p * (1 - p))
    if same(s * q * (1 - q), moved):
        return lambda g: s.sqrt() * (p - torch.bernoulli(p, generator=g))
    return None


def count_terms(loss: Loss, targets: Any, batch_size: int) -> int:
    """Number of terms that a mean loss averages over: what batches are weighted by.

    Integer targets count one by one without those that the loss ignores (`ignore_index`, -100 unless the loss
    says otherwise); anything else counts by samples.
    """
    if isinstance(targets, Tensor) and not targets.is_floating_point() and targets.dtype != torch.bool:
        ignored = getattr(loss, "ignore_index", -100)
        return int((targets != ignored).sum())
    return batch_size
