"""Exact spectra by duality: `A A^T` over the parameters has the eigenvalues of `A^T A` over the samples.

Gauss-Newton and Fisher matrices are `F = A A^T` with `A = J^T Z`, one column for each sample and output (or
draw), so all non-zero eigenvalues of a matrix over a million parameters come from a Gram matrix `K = A^T A`
of the size samples x outputs. K is a sum over modules, each built from the module's inputs and output
gradients in one pass over the network; parameters of modules without a contraction go by products. Every K is
checked against the operator.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_rmt.guard import full_precision
from torch_rmt.operators.contractions import module_gram
from torch_rmt.operators.curvature import GaussNewton, flat
from torch_rmt.operators.dual_counts import Room, dual_counts, own_parameters, room_for
from torch_rmt.operators.engines import FIRST_ORDER, Differentiable, Products
from torch_rmt.operators.fisher import GradientCovariance, PerSample
from torch_rmt.operators.kernel import NeuralTangentKernel
from torch_rmt.operators.ladder import climb
from torch_rmt.operators.losses import output_curvature
from torch_rmt.operators.memory import is_out_of_memory
from torch_rmt.operators.places import Place, tensor_at
from torch_rmt.operators.pure import PureModel
from torch_rmt.operators.shifts import by_shifts
from torch_rmt.operators.trees import first_tensor

_PRODUCTS = "by products"


@dataclass(frozen=True)
class DualGram:
    """Gram matrix of a Gauss-Newton, Fisher or tangent-kernel operator over samples x columns.

    Fields:
        matrix: `K = A^T A`, rows ordered (sample, column).
        layers: the same for each module alone (the dual of each diagonal block), when asked for; the entry
            "by products" holds all parameters of modules without a contraction.
        dim: size of the operator, whose other `dim - rows` eigenvalues are zero (negative: K has the zeros).
        method: how it was built, in words.
        passes: backward passes of the whole batch that it took.
    """

    matrix: Float[Tensor, "rows rows"]
    layers: dict[str, Float[Tensor, "rows rows"]]
    dim: int
    method: str
    passes: int = 0

    def eigenvalues(self) -> Float[Tensor, " dim"]:
        """All eigenvalues of the operator, ascending, zeros included, in float64."""
        return _padded(self.matrix, self.dim)

    def layer_eigenvalues(self) -> dict[str, Float[Tensor, " kept"]]:
        """Non-zero eigenvalues (at most as many as rows) of each layer's diagonal block, ascending."""
        return {name: _padded(gram, gram.shape[0]) for name, gram in self.layers.items()}


def _padded(gram: Tensor, dim: int) -> Tensor:
    values: Tensor = torch.linalg.eigvalsh(gram.double()).clamp_min(0.0)
    if values.shape[0] > dim:
        return values[-dim:]
    return torch.cat([values.new_zeros(dim - values.shape[0]), values])


@full_precision()
def dual_gram(
    operator: GaussNewton | NeuralTangentKernel, *, by_layer: bool = False, max_memory: int | None = None
) -> DualGram:
    """Build the Gram matrix of a Gauss-Newton, Fisher (any kind) or neural tangent kernel operator.

    Costs one backward pass of the batch for each output (for each draw of a sampled or empirical Fisher) and
    the Gram matrices themselves.

    Raises:
        ValueError: batches of several (concatenate them), a loss whose Hessian by the output is not positive,
        a
            Gram matrix that does not fit `max_memory` bytes (by default half of what is free).
        EngineError: the model cannot be differentiated.

    Example:
        >>> net = torch.nn.Linear(100, 2)
        >>> x, y = torch.randn(3, 100), torch.randn(3, 2)
        >>> gram = dual_gram(GaussNewton(net, torch.nn.functional.mse_loss, (x, y)))
        >>> gram.matrix.shape, gram.eigenvalues().shape
        (torch.Size([6, 6]), torch.Size([202]))
    """
    pure, inputs = operator.pure, _inputs(operator)
    counts = dual_counts(operator)
    room = room_for(operator, counts, max_memory)
    with pure.guarded(), torch.no_grad():
        output = pure(pure.params, inputs)
    factors = _factors(operator, output)
    layers: dict[str, Tensor] = {}
    try:
        layers, rest = _by_modules(pure, inputs, factors, room, together=not by_layer)
    except RuntimeError as problem:  # hooks and checkpointing do not mix; EngineError is a RuntimeError too
        if is_out_of_memory(problem):
            raise
        reason = str(problem).strip().splitlines()[0]
    else:
        if rest:
            layers[_PRODUCTS] = _by_products(pure, inputs, rest, factors, room)
        total = torch.stack(list(layers.values())).sum(0) if by_layer else _summed(layers)
        if isinstance(operator, GradientCovariance):
            total, layers = _centred(total), {name: _centred(gram) for name, gram in layers.items()}
        if _confirmed(operator, total, factors):
            passes = factors.shape[0] * max(1, room.groups) + (total.shape[0] if rest else 0)
            method = "Gram matrices of the modules" + (f"; {len(rest)} parameters by products" if rest else "")
            method += f"; modules in {room.groups} groups for memory" if room.groups > 1 else ""
            return DualGram(total, layers if by_layer else {}, operator.shape[0], method, passes)
        # Samples that mix (batch normalisation in train mode) have no per-sample gradients.
        reason = "the samples of this batch depend on one another"
    total = _by_products(pure, inputs, list(pure.names), factors, room)
    if isinstance(operator, GradientCovariance):
        total = _centred(total)
    return DualGram(total, {}, operator.shape[0], f"products with every column ({reason})", total.shape[0])


def _centred(gram: Tensor) -> Tensor:
    """Gram matrix of the columns less their mean, which makes a second moment a covariance."""
    left = gram - gram.mean(0, keepdim=True)
    return left - left.mean(1, keepdim=True)


def _summed(grams: dict[str, Tensor]) -> Tensor:
    total = torch.zeros_like(next(iter(grams.values())))
    for name in list(grams):
        total += grams.pop(name)
    return total


def _by_modules(
    pure: PureModel, inputs: Any, factors: Tensor, room: Room, *, together: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Gram matrix of each module (or of all together), and the names of the parameters that none covers."""
    modules, rest = own_parameters(pure)
    layers: dict[str, Tensor] = {}
    waiting = list(modules)
    while waiting:
        group: list[str] = []
        held = 0
        while waiting and (not group or held + room.by_module.get(waiting[0], 0) <= room.gradients):
            held += room.by_module.get(waiting[0], 0)
            group.append(waiting.pop(0))
        room.groups += 1
        caught, gradients = _pass(pure, inputs, {name: modules[name] for name in group}, factors, room.columns)
        for name in group:
            module, names = modules[name]
            entered, left = caught.pop(name), gradients.pop(name)
            # A module whose weight is used without a call has entered nothing; one that all samples share (an embedding
            # of positions) has no gradient for each.
            own = all(g.shape[1] == factors.shape[1] for g in left)
            gram = module_gram(module, entered, left, set(names), room.work) if entered and own else None
            if gram is None:
                rest += list(names.values())
            elif together and layers:
                next(iter(layers.values())).add_(gram)
            else:
                layers[name] = gram
    return layers, rest


def output_factors(operator: GaussNewton | NeuralTangentKernel) -> Float[Tensor, "columns samples *output"]:
    """Z with A = J^T Z Z^T J: a root of the loss's curvature by the outputs, or the residuals of a Fisher matrix.

    Raises:
        ValueError: batches of several, or a loss whose Hessian by the output is not positive.
    """
    inputs = _inputs(operator)
    with operator.pure.guarded(), torch.no_grad():
        output = operator.pure(operator.pure.params, inputs)
    return _factors(operator, output)


def _inputs(operator: GaussNewton | NeuralTangentKernel) -> Any:
    """Inputs of the only batch."""
    if isinstance(operator, NeuralTangentKernel):
        return operator.inputs
    if len(operator.given) > 1:
        raise ValueError("the dual needs one batch: concatenate the batches, or use SLQ on the operator")
    return operator.given[0].inputs


def _factors(operator: GaussNewton | NeuralTangentKernel, output: Tensor) -> Tensor:
    """`Z` as cotangents, `(columns, samples, *output)`: column c of every sample at once."""
    n, size = output.shape[0], output[0].numel()
    if isinstance(operator, PerSample) and operator.kind != "exact":
        return operator.residuals(output, operator.given[0], 0).reshape(-1, *output.shape)
    basis = torch.eye(size, dtype=output.dtype, device=output.device).reshape(size, 1, *output.shape[1:])
    basis = basis.expand(size, *output.shape).contiguous()
    if isinstance(operator, NeuralTangentKernel):
        return basis
    with operator.pure.guarded():
        curvature = output_curvature(operator.loss, output, operator.given[0].targets)
        if curvature.root is not None:
            return curvature.root(basis)
        hessians = curvature.product(basis).reshape(size, n, size).permute(1, 2, 0)
    values, vectors = torch.linalg.eigh((hessians + hessians.mT) / 2)
    if float(values.min()) < -1e-5 * float(values.max().clamp_min(0)):
        raise ValueError("the loss is not convex in the output here, so J^T H J has no dual; use SLQ or Lanczos")
    roots: Tensor = vectors * values.clamp_min(0).sqrt()[:, None, :]
    return roots.permute(2, 0, 1).reshape(size, *output.shape)


def _pass(
    pure: PureModel, inputs: Any, modules: dict[str, tuple[nn.Module, dict[str, str]]], factors: Tensor, width: int
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Inputs of every call of every module, and gradients by their outputs for all columns."""
    caught: dict[str, list[Tensor]] = {name: [] for name in modules}
    places: list[Place] = []
    shapes: list[Tensor] = []
    with pure.guarded(), torch.no_grad(), ExitStack() as stack:

        def keep(name: str, args: tuple[Any, ...], output: Any) -> None:
            entered = first_tensor(args)
            if entered is None:
                return
            caught[name].append(entered.detach())
            place = Place(name, modules[name][0], len(caught[name]) - 1)
            places.append(place)
            shapes.append(tensor_at(place, output).detach())

        for name, (module, _) in modules.items():
            handle = module.register_forward_hook(lambda _m, args, output, name=name: keep(name, args, output))
            stack.callback(handle.remove)
        pure.raw(pure.params, inputs)

    gradients: dict[str, list[Tensor]] = {name: [] for name in modules}
    if not places:  # attention uses its projection's weight without calling it
        return caught, gradients

    f = by_shifts(pure, inputs, places, tuple(torch.zeros_like(t) for t in shapes), lambda output: output)
    products, _ = climb(f, FIRST_ORDER, pure.module, ("dual", tuple(map(str, places)), tuple(t for _, t in pure.modes)))
    if width >= factors.shape[0]:
        found = list(products.pull((factors,)))
    else:
        found = [t.new_empty(factors.shape[0], *t.shape) for t in shapes]
        for start in range(0, factors.shape[0], width):
            for whole, part in zip(found, products.pull((factors[start : start + width],)), strict=True):
                whole[start : start + width] = part
    for place, g in zip(places, found, strict=True):
        gradients[place.name].append(g)
    return caught, gradients


def _by_products(pure: PureModel, inputs: Any, names: list[str], factors: Tensor, room: Room) -> Tensor:
    """`Z^T J J^T Z` for some parameters, sample by sample and column by column; right for any model."""
    index = [pure.names.index(n) for n in names]

    def output(*chosen: Tensor) -> Tensor:
        params = list(pure.params)
        for i, p in zip(index, chosen, strict=True):
            params[i] = p
        return pure(params, inputs)

    def within(chosen: tuple[Tensor, ...], thunk: Any) -> Any:
        params = list(pure.params)
        for i, p in zip(index, chosen, strict=True):
            params[i] = p
        return pure.within(params, thunk)

    f = Differentiable(output, tuple(pure.params[i] for i in index), pure.guarded, within)
    products, _ = climb(f, FIRST_ORDER, pure.module, ("dual rest", tuple(names), tuple(t for _, t in pure.modes)))
    columns, samples = factors.shape[:2]
    gram = factors.new_empty(samples * columns, samples * columns)
    flat_factors = factors.reshape(columns, samples, -1)
    for n in range(samples):
        for start in range(0, columns, room.columns):
            some = slice(start, start + room.columns)
            only = torch.zeros_like(factors[some])
            only[:, n] = factors[some, n]
            (image,) = products.push(products.pull((only,)))  # (some columns, samples, *output)
            block = torch.einsum("kno,cno->nck", image.reshape(len(image), samples, -1), flat_factors)
            gram[:, n * columns : (n + 1) * columns][:, some] = block.reshape(samples * columns, -1)
    return gram


def _confirmed(operator: GaussNewton | NeuralTangentKernel, gram: Tensor, factors: Tensor) -> bool:
    """One random vector w through the operator: `|K w|^2 = x . F x` with `x = A w`, and `w . K w = x . x`."""
    columns, samples = factors.shape[:2]
    generator = torch.Generator(device=gram.device).manual_seed(4)
    w = torch.randn(gram.shape[0], generator=generator, dtype=gram.dtype, device=gram.device)
    if isinstance(operator, GradientCovariance):
        w -= w.mean()
    image = gram @ w
    if isinstance(operator, NeuralTangentKernel):
        expected = operator.matmat(w.unsqueeze(1))[:, 0]
        return float((image - expected).norm()) <= _tolerance(gram) * float(expected.norm())
    products: Products = operator.first_order_products()
    cotangent = torch.einsum("nc,cn...->n...", w.reshape(samples, columns), factors)
    x = flat(products.pull((cotangent.unsqueeze(0),)))[0]
    left, right = float(w @ image), float(x @ x)
    above, below = float(image @ image), float(x @ operator.matmat(x.unsqueeze(1))[:, 0])
    tolerance = _tolerance(gram)
    return abs(left - right) <= tolerance * abs(right) and abs(above - below) <= tolerance * abs(below)


def _tolerance(gram: Tensor) -> float:
    return 1e-8 if gram.dtype == torch.float64 else 1e-3
