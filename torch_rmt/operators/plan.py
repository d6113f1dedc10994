"""What a measurement will cost, said before it is done, and the cheapest way to an exact spectrum."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from torch_rmt.operators.base import LinearOperator
from torch_rmt.operators.curvature import Curvature, GaussNewton
from torch_rmt.operators.dual_counts import dual_bytes, dual_counts
from torch_rmt.operators.kernel import NeuralTangentKernel
from torch_rmt.operators.memory import graph_bytes, is_out_of_memory
from torch_rmt.operators.pure import PureModel


@dataclass(frozen=True)
class Cost:
    """What one product with an operator costs.

    Fields:
        flops: of one product, twice the multiplications, counted on one gradient.
        bytes: of the kept graphs, estimated from what a forward pass saves.
        seconds: of one product, predicted from the time of one gradient of the first batch.
        moved: bytes that a product reads and writes, estimated.
    """

    flops: float
    bytes: int
    seconds: float
    moved: float

    @property
    def work(self) -> float:
        """Flops, each byte moved counted as `FLOPS_PER_BYTE` of them."""
        return self.flops + FLOPS_PER_BYTE * self.moved


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


@dataclass(frozen=True)
class Route:
    """One way to all eigenvalues, or to an estimate of them, with its predicted cost.

    Fields:
        name: "dense" (products with the identity), "dual" (Gram matrix over samples) or "lanczos" (products).
        flops: in all.
        moved: bytes read and written, estimated.
        bytes: held at the same time.
        seconds: predicted from the time of one gradient.
    """

    name: Literal["dense", "dual", "lanczos"]
    flops: float
    moved: float
    bytes: int
    seconds: float

    @property
    def work(self) -> float:
        """Flops, each byte moved counted as `FLOPS_PER_BYTE` of them: what routes are compared by."""
        return self.flops + FLOPS_PER_BYTE * self.moved

    def __str__(self) -> str:
        size = f"{self.flops:.1e} flops, {self.bytes / 2**20:.3g} MiB, {self.seconds:.2g} s predicted"
        return f"{self.name} ({size})"


# A kept second-order graph runs once for a product where a gradient runs forward and backward.
_PRODUCT_OVER_GRADIENT = 1.5
_RECOMPUTED_OVER_GRADIENT = 3.5
COLUMNS_AT_ONCE = 256  # of a matrix that is written out; found by tuning on 2 cores: wider only costs memory
# What a core or a GPU does while it fetches a byte: 100 Gflop/s over 10 GB/s, 30 Tflop/s over 3 TB/s.
FLOPS_PER_BYTE = 10.0
# Eigenvalues of a symmetric matrix in float64 take 4/3 n^3 flops at about a quarter of the rate of products.
_EIGENVALUES = 4 * 4 / 3


def cost(operator: Curvature | NeuralTangentKernel) -> Cost:
    """Count and predict one product from one gradient: no product is made and no graph kept."""
    pure, flops, seconds = operator.pure, 0.0, 0.0
    if isinstance(operator, NeuralTangentKernel):
        batches, kept = [operator.inputs], True
    else:
        batches, kept = [b.inputs for b in operator.batches], operator.keep
    leaves = tuple(p.detach().clone().requires_grad_() for p in pure.params)
    for index, inputs in enumerate(batches):
        with pure.guarded():
            here = _flops(pure, leaves, inputs)
            if index == 0:  # without the counter's own time
                seconds = min(_timed(pure, leaves, inputs) for _ in range(2)) / max(1.0, here)
        flops += here
    graphs = sum(graph_bytes(pure, inputs) for inputs in batches)
    ratio = _PRODUCT_OVER_GRADIENT if kept else _RECOMPUTED_OVER_GRADIENT
    moved = ratio * (graphs + 3 * pure.n_params * pure.dtype.itemsize)
    return Cost(ratio * flops, graphs if kept else 0, ratio * seconds * max(1.0, flops), moved)


def _flops(pure: PureModel, leaves: tuple[Tensor, ...], inputs: Any) -> float:
    """Flops of one gradient; three forward passes where the counter or `autograd.grad` is refused (checkpointing)."""
    try:
        with FlopCounterMode(display=False) as counter:
            _backward(pure, leaves, inputs)
        return float(counter.get_total_flops())
    except RuntimeError as problem:
        if is_out_of_memory(problem):
            raise
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pure(leaves, inputs)
    return 3.0 * float(counter.get_total_flops())


def _timed(pure: PureModel, leaves: tuple[Tensor, ...], inputs: Any) -> float:
    start = time.perf_counter()
    _backward(pure, leaves, inputs)
    return time.perf_counter() - start


def _backward(pure: PureModel, leaves: tuple[Tensor, ...], inputs: Any) -> None:
    """One gradient by plain `backward()`, the least that a model must bear; waits for the device."""

    def run() -> None:
        output = pure(leaves, inputs)
        if output.requires_grad:
            torch.autograd.backward(output, torch.ones_like(output))
        output.flatten()[:1].tolist()

    pure.within(leaves, run)
    for p in leaves:
        p.grad = None


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
    footprint = replace(operator.footprint(), vmapped=operator.chunk > 1)
    vector, block = footprint.vector, operator.chunk

    def held(width: int) -> int:
        return footprint.product(width, width) + width * vector  # with the vectors given

    if max_memory is not None:
        if held(1) > max_memory:
            raise ValueError(
                f"graph and one vector take {held(1)} bytes, {max_memory} are allowed; build "
                "the operator with that max_memory so that graphs are recomputed, or use fewer samples"
            )
        while held(block) > max_memory:
            block -= 1
        if block < operator.chunk:
            notes.append(f"blocks of {block} vectors: {max_memory} bytes allow no more")
    return Plan(fit, fit * each.seconds, held(block), block, tuple(notes))


def exact_routes(operator: Curvature | NeuralTangentKernel) -> tuple[Route, ...]:
    """Ways to all eigenvalues, cheapest first by counted flops and bytes (not by the clock: it must not matter).

    Dense is a product for each column and the eigenvalues of that matrix. Dual, for Gauss-Newton, Fisher and
    tangent kernel on one batch, is a backward pass for each output, the Gram matrices of the modules, and the
    eigenvalues of `samples x outputs` squared.

    Example:
        >>> from torch_rmt.operators import GaussNewton
        >>> batch = torch.randn(4, 400), torch.randn(4, 1)
        >>> G = GaussNewton(torch.nn.Linear(400, 1), torch.nn.functional.mse_loss, batch)
        >>> [route.name for route in exact_routes(G)]
        ['dual', 'dense']
    """
    each, n, item = cost(operator), operator.shape[0], operator.dtype.itemsize
    speed = machine_speed(operator.device)

    def route(name: Literal["dense", "dual"], passes: float, flops: float, moved: float, held: float) -> Route:
        seconds = passes * each.seconds + (flops + FLOPS_PER_BYTE * moved) / speed
        return Route(name, passes * each.flops + flops, passes * each.moved + moved, int(held), seconds)

    found = [route("dense", n, _EIGENVALUES * n**3, 0.0, dense_bytes(operator))]
    if isinstance(operator, NeuralTangentKernel) or (isinstance(operator, GaussNewton) and len(operator.given) == 1):
        counts = dual_counts(operator)
        passes = counts.columns / 2 + counts.rows_by_products  # a backward pass is half a product with J and J^T
        flops = 2 * counts.multiplications + _EIGENVALUES * counts.rows**3
        moved = 4 * item * counts.modules * counts.rows**2
        found.append(route("dual", passes, flops, moved, dual_bytes(operator, counts)))
    return tuple(sorted(found, key=lambda r: r.work))


def product_bytes(operator: LinearOperator, columns: int) -> int:
    """Bytes that a product with so many columns takes beside the vectors given, where that can be known."""
    return operator.product_bytes(columns)


def column_bytes(operator: LinearOperator) -> int:
    """Bytes that each column adds to a product."""
    return product_bytes(operator, 1) - product_bytes(operator, 0)


def dense_bytes(operator: LinearOperator) -> int:
    """Bytes of the whole matrix, its float64 copy, what its eigenvalues need, and the product that it is made by."""
    item, columns = operator.dtype.itemsize, min(*operator.shape, COLUMNS_AT_ONCE)
    entries = operator.shape[0] * operator.shape[1]
    made = product_bytes(operator, 1) + columns * column_bytes(operator)
    return made + entries * (item + 24)


def keeping_to(operator: LinearOperator, max_memory: int | None, columns: int = 1) -> AbstractContextManager[None]:
    """Context in which products with so many columns take at most so many bytes, where the operator can be told."""
    return operator.within(max_memory, columns)


def room_beside(operator: LinearOperator, max_memory: int) -> int:
    """Bytes left for an estimator's own vectors; batches are cut in thought where graphs take more than half."""
    spare = max_memory - product_bytes(operator, 0)
    if 2 * spare >= max_memory:
        return spare
    with keeping_to(operator, max_memory // 2):
        return max(spare, max_memory - product_bytes(operator, 0))


@cache
def machine_speed(device: torch.device) -> float:
    """Flops a second of a float32 matrix product of size 512 on this device, measured once a process."""
    a = torch.ones(512, 512, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        (a @ a)[:1, :1].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 512**3 / best


def lanczos_route(operator: Curvature | NeuralTangentKernel, products: int) -> Route:
    """Cost of so many products."""
    each = cost(operator)
    held = product_bytes(operator, 1) + 6 * operator.shape[0] * operator.dtype.itemsize
    return Route("lanczos", products * each.flops, products * each.moved, held, products * each.seconds)
