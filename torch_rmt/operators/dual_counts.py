"""What building the dual takes, counted on shapes, and how it is shared out where bytes are few."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_rmt.operators.contractions import SLAB, module_multiplications
from torch_rmt.operators.curvature import GaussNewton
from torch_rmt.operators.fisher import PerSample
from torch_rmt.operators.kernel import NeuralTangentKernel
from torch_rmt.operators.memory import free_bytes
from torch_rmt.operators.pure import PureModel
from torch_rmt.operators.trees import first_tensor

# In units of what a forward pass saves: a kept graph by the modules' outputs with a backward pass, and each further
# column of the same backward pass.
_PASS_OVER_FORWARD = 6
_COLUMN_OVER_FORWARD = 2.2


@dataclass(frozen=True)
class DualCounts:
    """What building the dual takes, counted on shapes.

    Fields:
        rows: of the Gram matrix, samples x columns.
        columns: backward passes of the batch.
        outputs: scalars in the output of the batch.
        modules: with a contraction.
        multiplications: of all contractions.
        gradients: bytes of the inputs and output gradients of each module, by name.
        saved: bytes that the forward pass keeps for a backward pass.
        rows_by_products: `rows` if a parameter of no such module needs products with every row, else 0.
    """

    rows: int
    columns: int
    outputs: int
    modules: int
    multiplications: int
    gradients: dict[str, int]
    saved: int
    rows_by_products: int


def dual_counts(operator: GaussNewton | NeuralTangentKernel) -> DualCounts:
    """Count what `dual_gram` would do, by one forward pass without gradients."""
    pure = operator.pure
    inputs = operator.inputs if isinstance(operator, NeuralTangentKernel) else operator.given[0].inputs
    modules, rest = own_parameters(pure)
    sizes: list[tuple[str, torch.Size, torch.Size]] = []

    def note(name: str, args: tuple[Any, ...], output: Any) -> None:
        entered, left = first_tensor(args), first_tensor(output)
        if entered is not None and left is not None:
            sizes.append((name, entered.shape, left.shape))

    with pure.guarded(), torch.no_grad(), ExitStack() as stack:
        for name, (module, _) in modules.items():
            handle = module.register_forward_hook(lambda _m, args, output, name=name: note(name, args, output))
            stack.callback(handle.remove)
        output = pure(pure.params, inputs)
    columns = columns_of(operator, output)
    rows, item, total = output.shape[0] * columns, pure.dtype.itemsize, 0
    gradients = {name: 0 for name, _, _ in sizes}
    rest += [name for name in modules if name not in gradients]
    for name, entered, left in sizes:
        own = left[:1] == output.shape[:1]  # else all samples share it, as an embedding of positions
        here = module_multiplications(modules[name][0], entered, left, columns) if own else None
        rest += ["unknown"] * (here is None)
        total += here or 0
        gradients[name] += item * (entered.numel() + columns * left.numel())
    saved = operator.footprint().largest
    return DualCounts(rows, columns, output.numel(), len(sizes), total, gradients, saved, rows if rest else 0)


@dataclass
class Room:
    """How much is done at the same time: modules, columns of a backward pass, scalars of a contraction.

    Fields:
        gradients: bytes of the output gradients of one group of modules.
        by_module: those of each module.
        columns: of one backward pass.
        work: scalars in a slab of a contraction.
        groups: of modules, counted while they are made.
    """

    gradients: int
    by_module: dict[str, int]
    columns: int
    work: int
    groups: int = 0


def dual_bytes(operator: GaussNewton | NeuralTangentKernel, counts: DualCounts) -> int:
    """Bytes that the dual takes at least: module after module, column after column."""
    item = operator.dtype.itemsize
    # The sum, one module's part and what its contraction makes on the way; or the sum, its float64 copy and that of
    # the eigenvalues; cotangents at the output twice.
    fixed = counts.rows**2 * (3 * item + 16) + 2 * item * counts.columns * counts.outputs
    graph = operator.footprint()
    return fixed + graph.product(1) + _PASS_OVER_FORWARD * counts.saved + 4 * max(counts.gradients.values(), default=0)


def room_for(operator: GaussNewton | NeuralTangentKernel, counts: DualCounts, max_memory: int | None) -> Room:
    """Share out the bytes that are left.

    Raises:
        ValueError: even the least does not fit.
    """
    limit = max_memory if max_memory is not None else free_bytes(operator.device) // 2
    need, largest = dual_bytes(operator, counts), max(counts.gradients.values(), default=0)
    if need > limit:
        raise ValueError(
            f"the dual of {counts.rows} samples x columns would take {need / 2**30:.3g} GiB of "
            f"{limit / 2**30:.3g}; use fewer samples, Fisher(..., kind='sampled'), or SLQ on the operator"
        )
    spare = limit - need
    each = max(1.0, _COLUMN_OVER_FORWARD * counts.saved)
    return Room(
        largest + spare // 3,
        counts.gradients,
        max(1, min(counts.columns, 1 + int(spare / 3 / each))),
        max(1 << 16, min(SLAB, spare // (6 * operator.dtype.itemsize))),
    )


def columns_of(operator: GaussNewton | NeuralTangentKernel, output: Tensor) -> int:
    """Return the columns a sample: outputs, or the draws of a Fisher matrix."""
    if isinstance(operator, PerSample) and operator.kind != "exact":
        return operator.draws
    return output[0].numel()


def own_parameters(pure: PureModel) -> tuple[dict[str, tuple[nn.Module, dict[str, str]]], list[str]]:
    """Modules with parameters of their own that are used once each, and the parameters of no such module."""
    chosen = set(pure.names)
    uses: dict[int, int] = {}
    for _, p in pure.module.named_parameters(remove_duplicate=False):
        uses[id(p)] = uses.get(id(p), 0) + 1
    modules: dict[str, tuple[nn.Module, dict[str, str]]] = {}
    covered: set[str] = set()
    for name, module in pure.module.named_modules():
        own = {
            n: f"{name}.{n}" if name else n
            for n, p in module.named_parameters(recurse=False)
            if uses[id(p)] == 1 and (f"{name}.{n}" if name else n) in chosen
        }
        if own and not list(module.children()):
            modules[name] = (module, own)
            covered |= set(own.values())
    return modules, [n for n in pure.names if n not in covered]
