"""The curvature of a loss by the network's output: recognised by what it does, not by its name.

A loss may be a module, a function or a lambda. Its Hessian by the output is compared with two closed forms on
two random vectors; a form is used where it fits, and automatic differentiation where none does. So label
smoothing, class weights, ignored tokens and either reduction are covered by the same two lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from torch_rmt.operators.trees import part_of

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
    """Find the form of `d^2 loss / d output^2` at `output` (to be called with gradients enabled).

    In float64 where the loss takes it: in float32 the curvature of a network that is sure of its classes is rounding.
    """
    wide = _wide(loss, output, targets)
    generator = torch.Generator(device=output.device).manual_seed(2)
    probe = torch.randn((2, *output.shape), generator=generator, dtype=wide.dtype, device=output.device)
    probe = probe.sign() * (0.5 + probe.abs())
    image = _hessian_by_autograd(loss, wide, targets)(probe)
    tolerance = 1e-6 if wide.dtype == torch.float64 else 1e-4

    def fits(form: Tensor, slack: float = 0.0) -> bool:
        return float((form - image[1:]).norm()) <= tolerance * float(image[1:].norm()) + slack

    # What the loss is shows at small logits: where the network is sure, its curvature is rounding, or zero.
    mild = wide / max(1.0, float(wide.abs().max()) / 3.0)
    try:
        reference = _hessian_by_autograd(loss, mild, targets)(probe)
    except (RuntimeError, ValueError):  # a loss that is not defined there
        mild, reference = wide, image
    slopes, at_mild = image[0] / probe[0], reference[0] / probe[0]
    diagonal = float((at_mild * probe[1] - reference[1]).norm()) <= tolerance * float(reference[1].norm())
    if fits(slopes * probe[1:]) and (diagonal or bool(image[1:].any())):
        d = slopes.to(output.dtype)
        draw = _elementwise_draw(loss, wide, targets, slopes, mild, at_mild, output.dtype)
        square_root = None if bool((d < 0).any()) else d.sqrt()
        root = None if square_root is None else lambda u: square_root * u
        return OutputCurvature("elementwise", lambda u: d * u, draw, root)
    slack = 1e-14 * float(reference.norm())
    for dim in sorted({1, output.ndim - 1}) if output.ndim > 1 else (0,):
        b = _softmax_base(mild.softmax(dim), probe, dim)
        size = (b[0] * b[0]).sum(dim, keepdim=True)
        s = (reference[0] * b[0]).sum(dim, keepdim=True) / size.clamp_min(1e-300)
        p = wide.softmax(dim)
        there = float((s * b[1] - reference[1]).norm()) <= tolerance * float(reference[1].norm())
        if there and fits(s * _softmax_base(p, probe[1:], dim), slack):
            return _softmax_curvature(p.to(output.dtype), s.to(output.dtype), dim)
    return OutputCurvature("general", _hessian_by_autograd(loss, output, targets), None, None)


def _wide(loss: Loss, output: Tensor, targets: Any) -> Tensor:
    """The output in float64, or as it is for a loss that wants its own type (class weights in float32)."""
    wide = output.detach().double()
    try:
        _hessian_by_autograd(loss, wide, targets)
    except RuntimeError:
        return output.detach()
    return wide


def _softmax_base(p: Tensor, u: Tensor, dim: int) -> Tensor:
    """(diag p - p p^T) u, exact to rounding also where one p is nearly 1: u is measured from that class on."""
    top = p.argmax(dim, keepdim=True).expand(u.shape[0], *p.shape[:dim], 1, *p.shape[dim + 1 :])
    v = u - u.gather(dim + 1, top)
    return p * (v - (p * v).sum(dim + 1, keepdim=True))


def _softmax_curvature(p: Tensor, s: Tensor, dim: int) -> OutputCurvature:
    def form(u: Tensor) -> Tensor:
        return s * _softmax_base(p, u, dim)

    if bool((s < 0).any()):
        return OutputCurvature("softmax", form, None, None)
    top = torch.zeros_like(p).scatter(dim, p.argmax(dim, keepdim=True), 1.0)
    others = p * (1.0 - top)
    left = others + top * others.sum(dim, keepdim=True)  # p, but 1 - p for the likeliest class, without cancellation

    def half(u: Tensor) -> Tensor:
        """(diag sqrt p - p sqrt p^T) u."""
        ru = p.sqrt() * u
        all_of_them = (ru * (1.0 - top)).sum(dim + 1, keepdim=True)
        mine = (ru * top).sum(dim + 1, keepdim=True)
        likeliest = ru * left - p * all_of_them
        return s.sqrt() * (top * likeliest + (1.0 - top) * (ru - p * (all_of_them + mine)))

    return OutputCurvature("softmax", form, _categorical_draw(p, s, dim), half)


def _categorical_draw(p: Tensor, s: Tensor, dim: int) -> Callable[[torch.Generator], Tensor]:
    def draw(generator: torch.Generator) -> Tensor:
        rows = p.movedim(dim, -1).reshape(-1, p.shape[dim])
        chosen = torch.multinomial(rows, 1, generator=generator)[:, 0]
        one_hot = torch.nn.functional.one_hot(chosen, p.shape[dim]).to(p.dtype)
        one_hot = one_hot.reshape(p.movedim(dim, -1).shape).movedim(-1, dim)
        return s.sqrt() * (p - one_hot)

    return draw


def _elementwise_draw(
    loss: Loss, output: Tensor, targets: Any, d: Tensor, mild: Tensor, at_mild: Tensor, dtype: torch.dtype
) -> Callable[[torch.Generator], Tensor] | None:
    """Gaussian if the curvature does not depend on the output, Bernoulli if it goes as sigmoid'."""
    if not bool((at_mild > 0).any()) or bool((at_mild < 0).any()):
        return None
    generator = torch.Generator(device=output.device).manual_seed(3)
    noise = torch.randn(output.shape, generator=generator, dtype=output.dtype, device=output.device)
    elsewhere = mild + noise * (1.0 + 3.0 * mild.std(correction=0))
    try:
        moved = _hessian_by_autograd(loss, elsewhere, targets)(torch.ones_like(output).unsqueeze(0))[0]
    except (RuntimeError, ValueError):  # a loss of probabilities refuses numbers outside [0, 1]
        return None
    tolerance = 1e-8 if output.dtype == torch.float64 else 1e-3

    def same(a: Tensor, b: Tensor) -> bool:
        return float((a - b).norm()) <= tolerance * float(b.norm())

    if same(moved, at_mild) and same(d, at_mild):
        root = d.sqrt().to(dtype)
        return lambda g: root * torch.randn(root.shape, generator=g, dtype=dtype, device=root.device)
    s = at_mild / _bernoulli_variance(mild)
    if same(s * _bernoulli_variance(elsewhere), moved) and same(s * _bernoulli_variance(output), d):
        p, size = output.sigmoid().to(dtype), s.sqrt().to(dtype)
        return lambda g: size * (p - torch.bernoulli(p, generator=g))
    return None


def _bernoulli_variance(logits: Tensor) -> Tensor:
    return logits.sigmoid() * (-logits).sigmoid()


def known_likelihood(loss: Loss, output: Tensor, targets: Any) -> Callable[[torch.Generator], Tensor]:
    """`generator -> z` with `E z z^T` the curvature of a known negative log-likelihood; TypeError otherwise."""
    draw = output_curvature(loss, output, targets).draw
    if draw is None:
        raise TypeError(
            "this loss is not recognised as the negative log-likelihood of a categorical, Gaussian or "
            "Bernoulli output (cross-entropy, mean square error, binary cross-entropy with logits); "
            "use GaussNewton, or Fisher(..., kind='empirical')"
        )
    return draw


def label_seed(seed: int, batch: int) -> int:
    """Seed of the labels drawn for one batch."""
    return seed * 1_000_003 + batch


def count_terms(loss: Loss, targets: Any, batch_size: int, unread: int = 0) -> float:
    """Number of terms that a mean loss averages over: what batches are weighted by.

    Integer targets count one by one, by their class's weight where the loss has weights, without those that the
    loss ignores (`ignore_index`, -100 unless the loss says otherwise) and without the first `unread` of each row;
    anything else counts by samples.
    """
    if are_classes(targets):
        counted = targets[:, unread:] if unread else targets
        counted = counted[counted != ignored_class(loss)]
        weight = getattr(loss, "weight", None)
        return float(counted.numel() if weight is None else weight[counted].sum())
    return float(batch_size)


def are_classes(targets: Any) -> TypeGuard[Tensor]:
    """Whether targets are a tensor of integers."""
    return isinstance(targets, Tensor) and not targets.is_floating_point() and targets.dtype != torch.bool


def ignored_class(loss: Loss) -> int:
    """The class whose targets a loss leaves out."""
    return int(getattr(loss, "ignore_index", -100))


def adds_up(loss: Loss, output: Any, targets: Any, samples: int) -> bool | None:
    """Whether a batch's loss is the sum over its samples, and not their mean: tried on some samples taken twice.

    The first half of the batch, or the second where the loss of the first is zero or not finite (its targets may all be
    ignored). None where that does not tell: zero again, or a loss that knows the size of its batch. Such a loss is a
    sum if it has the attribute `reduction = "sum"`.
    """
    if getattr(loss, "reduction", "mean") == "sum":
        return True
    middle = (samples + 1) // 2
    for half in (slice(0, middle), slice(middle, samples)):
        with torch.no_grad():
            try:
                once, twice = (float(loss(*part_of((output, targets), samples, half, times))) for times in (1, 2))
            except (RuntimeError, ValueError, IndexError):
                return None
        if once != 0.0 and math.isfinite(once):
            return next((factor == 2 for factor in (1, 2) if abs(twice - factor * once) <= 1e-4 * abs(once)), None)
    return None
