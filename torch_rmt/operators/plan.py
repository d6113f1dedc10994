"""What a measurement will cost, said before it is done."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from torch_rmt.operators.curvature import Curvature
from torch_rmt.operators.memory import KEPT_OVER_FORWARD, saved_bytes


@dataclass(frozen=True)
class Cost:
    """What one product with an operator costs.

    Fields:
        flops: of one product, twice the multiplications, counted on one gradient.
        bytes: of the kept graphs, estimated from what a forward pass saves.
        seconds: of one product, measured once the graph was built.
    """

    flops: float
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """How many products to spend, and which way.

    Fields:
        products: that fit the limits; the rest of those wished were given up.
        seconds: that they will take.
        bytes: that they will hold, blocks included.
        block: vectors at once.
        notes: what was given up, in words.
    """

    products: int
    seconds: float
    bytes: int
    block: int
    notes: tuple[str, ...]


# A kept second-order graph runs once for a product where a gradient runs forward and backward.
_PRODUCT_OVER_GRADIENT = 1.5
_RECOMPUTED_OVER_GRADIENT = 3.5


def cost(operator: Curvature) -> Cost:
    """Measure and count one product (the first one builds the graph and is not timed)."""
    pure, total = operator.pure, 0.0
    for b in operator.batches:
        leaves = tuple(p.detach().clone().requires_grad_() for p in pure.params)
        with pure.guarded(), FlopCounterMode(display=False) as counter:
            output = pure(leaves, b.inputs)
            torch.autograd.backward(output, torch.ones_like(output))
        total += counter.get_total_flops()
    ratio = _PRODUCT_OVER_GRADIENT if operator.keep else _RECOMPUTED_OVER_GRADIENT
    kept = sum(saved_bytes(pure, b.inputs) for b in operator.batches) if operator.keep else 0
    vector = torch.ones(operator.shape[1], 1, dtype=operator.dtype, device=operator.device)
    operator.matmat(vector)
    start = time.perf_counter()
    operator.matmat(vector).sum().item()
    return Cost(ratio * total, KEPT_OVER_FORWARD * kept, time.perf_counter() - start)


def plan(
    operator: Curvature, products: int, *, max_seconds: float | None = None, max_memory: int | None = None
) -> Plan:
    """Fit a wish for products into limits of seconds and bytes, and say what was given up.

    Raises:
        ValueError: not even one product fits.

    Example:
        >>> from torch_rmt.operators import Hessian
        >>> batch = torch.randn(4, 2), torch.randn(4, 1)
        >>> H = Hessian(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, batch)
        >>> plan(H, 30, max_seconds=60.0).products
        30
    """
    each = cost(operator)
    notes: list[str] = []
    fit = products
    if max_seconds is not None and products * each.seconds > max_seconds:
        fit = int(max_seconds / each.seconds)
        if fit < 1:
            raise ValueError(
                f"one product takes {each.seconds:.3g} s and {max_seconds:.3g} s are allowed; use fewer "
                "samples, or fewer parameters (params=...)"
            )
        notes.append(f"{fit} of {products} products: {max_seconds:.3g} s allow no more")
    block, vector = operator.chunk, operator.shape[0] * operator.dtype.itemsize
    if max_memory is not None:
        room = (max_memory - each.bytes) // max(1, 3 * vector)
        if room < 1:
            raise ValueError(
                f"graph and one vector take {each.bytes + 3 * vector} bytes, {max_memory} are allowed; build "
                "the operator with that max_memory so that graphs are recomputed, or use fewer samples"
            )
        if room < block:
            block = int(room)
            notes.append(f"blocks of {block} vectors: {max_memory} bytes allow no more")
    return Plan(fit, fit * each.seconds, each.bytes + 3 * block * vector, block, tuple(notes))


def prefers_dual(parameters: int, samples: int, columns: int, products: int, backward_flops: float) -> bool:
    """Whether the Gram matrix of a batch costs less than that many products, by counting flops.

    Dual: `columns` backward passes, a Gram matrix of at most `rows^2 parameters` and its eigenvalues in
    float64, `4/3 rows^3` with `rows = samples x columns` (at a quarter of the rate of a product).

    Example:
        >>> prefers_dual(10**6, samples=128, columns=10, products=800, backward_flops=1e9)
        True
        >>> prefers_dual(10**6, samples=4096, columns=1000, products=800, backward_flops=1e9)
        False
    """
    rows = samples * columns
    # A Hadamard product of two Gram matrices costs rows^2 (width in + width out), about rows^2
    # sqrt(parameters).
    dual: float = columns * backward_flops + 2 * rows**2 * parameters**0.5 + 4 * (4 / 3) * rows**3
    return dual < products * _PRODUCT_OVER_GRADIENT * 1.5 * backward_flops
