"""Gram matrices of per-sample gradients of one module, from its inputs and output gradients.

With inputs `a_{n t}` and output gradients `g_{n c t}` (sample n, column c, position t of a shared weight) the
gradient of a weight matrix is `M_{nc} = sum_t g_{nct} a_{nt}^T`, and its Gram matrix is either of

    K[(n,c),(m,d)] = sum_{t,s} (a_{nt} . a_{ms}) (g_{nct} . g_{mds})      (pairs; a Hadamard product when t =
    1)
                   = <M_{nc}, M_{md}>                                       (explicit, a slab of rows at a
                   time)

whichever takes fewer multiplications. No per-sample gradient of the whole weight is ever stored.

Source: Goodfellow 2015 (T = 1); Rochette et al. 2019 (convolutions); Dangel et al. 2022, ViViT.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float
from torch import Tensor, nn

# Scalars in one slab of work where memory allows: 64 MiB of float32.
SLAB = 1 << 24


def outer_multiplications(n: int, c: int, t: int, i: int, o: int) -> tuple[int, int]:
    """Multiplications of the two contractions: by pairs of positions, and explicit."""
    rows = n * c
    return (n * t) ** 2 * i + (rows * t) ** 2 * (o + 1), rows * t * o * i + rows**2 * o * i


def module_multiplications(module: nn.Module, entered: torch.Size, left: torch.Size, columns: int) -> int | None:
    """Multiplications of `module_gram` for one call with these shapes, or None for a kind it does not know."""
    n, rows = left[0], left[0] * columns
    if type(module) is nn.Linear:
        return min(outer_multiplications(n, columns, left[1:-1].numel(), entered[-1], left[-1]))
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        into = module.in_channels // module.groups * math.prod(module.kernel_size)
        out = module.out_channels // module.groups
        return module.groups * min(outer_multiplications(n, columns, left[2:].numel(), into, out))
    if type(module) is nn.Embedding:
        return (rows * left[1:-1].numel()) ** 2 * (left[-1] + 1)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)):
        return sum(p.numel() for p in module.parameters(recurse=False)) * rows**2
    return None


def outer_gram(
    a: Float[Tensor, "samples positions into"], g: Float[Tensor, "samples columns positions out"], work: int = SLAB
) -> Float[Tensor, "rows rows"]:
    """Gram matrix of `sum_t g_t a_t^T`, rows ordered (sample, column)."""
    n, c, t, o = g.shape
    i, rows = a.shape[2], n * c
    pairs, explicit = outer_multiplications(n, c, t, i, o)
    if pairs <= explicit:
        return _pairs(lambda lo, hi: torch.einsum("nti,msi->ntms", a[lo:hi], a), g, work)
    gram = g.new_zeros(rows, rows)
    slab = max(1, work // (rows * i))
    for lo in range(0, o, slab):
        m = torch.einsum("ncto,nti->ncoi", g[..., lo : lo + slab], a).reshape(rows, -1)
        gram += m @ m.T
    return gram


def _pairs(inputs: Callable[[int, int], Tensor], g: Tensor, work: int) -> Tensor:
    """Sum over pairs of positions, a slab of samples at a time; `inputs(lo, hi)` is `(hi - lo, t, n, t)`."""
    n, c, t, o = g.shape
    if t == 1:
        flat = g.reshape(n * c, o)
        weights = inputs(0, n).reshape(n, n)
        return (flat @ flat.T).reshape(n, c, n, c).mul_(weights[:, None, :, None]).reshape(n * c, n * c)
    gram = g.new_empty(n, c, n, c)
    slab = max(1, work // (c * t * n * c * t))
    flat = g.reshape(n * c * t, o)
    for lo in range(0, n, slab):
        products = (g[lo : lo + slab].reshape(-1, o) @ flat.T).reshape(-1, c, t, n, c, t)
        gram[lo : lo + slab] = torch.einsum("nctmds,ntms->ncmd", products, inputs(lo, lo + slab))
    return gram.reshape(n * c, n * c)


def vector_gram(v: Float[Tensor, "samples columns size"]) -> Float[Tensor, "rows rows"]:
    """Gram matrix of gradients that are short vectors (biases, scales)."""
    flat = v.reshape(-1, v.shape[2])
    return flat @ flat.T


def lookup_gram(
    same: Bool[Tensor, "samples positions samples positions"],
    g: Float[Tensor, "samples columns positions out"],
    work: int = SLAB,
) -> Float[Tensor, "rows rows"]:
    """Gram matrix of an embedding's gradient: positions meet where their tokens are the same."""
    return _pairs(lambda lo, hi: same[lo:hi].to(g.dtype), g, work)


def _positions(g: Tensor) -> Tensor:
    """`(columns, samples, ..., out)` to `(samples, columns, positions, out)`."""
    return g.transpose(0, 1).reshape(g.shape[1], g.shape[0], -1, g.shape[-1])


def module_gram(
    module: nn.Module, inputs: list[Tensor], gradients: list[Tensor], names: set[str], work: int = SLAB
) -> Float[Tensor, "rows rows"] | None:
    """Gram matrix of one module's own parameters, or None if this kind of module is not known.

    Args:
        module: with parameters of its own.
        inputs: one tensor a call, `(samples, ...)`.
        gradients: one a call, by the module's output, `(columns, samples, ...)`.
        names: which of its parameters to differentiate by.
        work: scalars in one slab of work.
    """
    if not names <= {"weight", "bias"} or len(inputs) != len(gradients):
        return None
    total: Tensor | None = None

    def add(gram: Tensor) -> None:
        nonlocal total
        total = gram if total is None else total.add_(gram)

    if type(module) is nn.Linear:
        g = torch.cat([_positions(t) for t in gradients], dim=2)
        if "weight" in names:
            add(outer_gram(torch.cat([x.reshape(x.shape[0], -1, x.shape[-1]) for x in inputs], dim=1), g, work))
        if "bias" in names:
            add(vector_gram(g.sum(2)))
    elif isinstance(module, (nn.Conv1d, nn.Conv2d)) and type(module) in (nn.Conv1d, nn.Conv2d):
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            return None
        for group in range(module.groups):
            parts = [_patches(module, x, t, group) for x, t in zip(inputs, gradients, strict=True)]
            a, g = torch.cat([p[0] for p in parts], dim=1), torch.cat([p[1] for p in parts], dim=2)
            if "weight" in names:
                add(outer_gram(a, g, work))
            if "bias" in names:
                add(vector_gram(g.sum(2)))
    elif type(module) is nn.Embedding and len(inputs) == 1:
        tokens = inputs[0].reshape(inputs[0].shape[0], -1)
        same = tokens[:, :, None, None] == tokens[None, None]
        if module.padding_idx is not None:
            same &= (tokens != module.padding_idx)[:, :, None, None]
        if module.max_norm is not None or module.scale_grad_by_freq:
            return None
        add(lookup_gram(same, _positions(gradients[0]), work))
    else:
        scaled = [_normalised(module, x) for x in inputs]
        if any(s is None for s in scaled):
            return None
        weight = sum(_per_channel(module, t * s) for s, t in zip(scaled, gradients, strict=True) if s is not None)
        bias = sum(_per_channel(module, t) for t in gradients)
        if "weight" in names and isinstance(weight, Tensor):
            add(vector_gram(weight))
        if "bias" in names and isinstance(bias, Tensor):
            add(vector_gram(bias))
    return total


def _patches(module: nn.Conv1d | nn.Conv2d, x: Tensor, t: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients of a convolution as positions of a linear map, for one group."""
    if isinstance(module, nn.Conv1d):
        x, t = x.unsqueeze(2), t.unsqueeze(3)
        kernel, dilation = (1, module.kernel_size[0]), (1, module.dilation[0])
        padding, stride = (0, int(module.padding[0])), (1, module.stride[0])
    else:
        kernel, dilation = _pair(module.kernel_size), _pair(module.dilation)
        stride, padding = _pair(module.stride), (int(module.padding[0]), int(module.padding[1]))
    width_in, width_out = module.in_channels // module.groups, module.out_channels // module.groups
    part = x[:, group * width_in : (group + 1) * width_in]
    a = F.unfold(part, kernel, dilation=dilation, padding=padding, stride=stride).transpose(1, 2)
    g = t[:, :, group * width_out : (group + 1) * width_out].flatten(3)  # (columns, samples, out, positions)
    return a, g.permute(1, 0, 3, 2)


def _pair(size: tuple[int, ...]) -> tuple[int, int]:
    return (size[0], size[1])


def _normalised(module: nn.Module, x: Tensor) -> Tensor | None:
    """What a normalisation layer multiplies its weight by; None for other modules."""
    if type(module) is nn.LayerNorm:
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if type(module) is nn.RMSNorm:
        return F.rms_norm(x, module.normalized_shape, None, module.eps)
    if type(module) is nn.GroupNorm:
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.training:
        mean, variance = module.running_mean, module.running_var
        if mean is not None:  # without running statistics the batch's own count, and samples mix
            return F.batch_norm(x, mean, variance, None, None, False, 0.0, module.eps)
    return None


def _per_channel(module: nn.Module, t: Tensor) -> Tensor:
    """Sum `(columns, samples, ...)` over all that shares a scale, to `(samples, columns, size)`."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        kept = len(module.normalized_shape)
        return t.reshape(*t.shape[:2], -1, t.shape[-kept:].numel()).sum(2).transpose(0, 1)
    return t.reshape(*t.shape[:3], -1).sum(3).transpose(0, 1)
