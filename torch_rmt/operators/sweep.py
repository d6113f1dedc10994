"""Jacobians of every layer in one sweep: forward from one source or backward from one target, many samples.

Samples stand along the first dimension. A tangent `e_i` is put on every sample at the same time and read
apart afterwards, so a batch costs one pass for each input coordinate, not for each sample; a model that mixes
its samples (batch normalisation in train mode) is found out and refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_rmt.operators.batches import sample_count
from torch_rmt.operators.engines import FIRST_ORDER, Differentiable, Products
from torch_rmt.operators.ladder import climb
from torch_rmt.operators.losses import Loss, checked_loss
from torch_rmt.operators.memory import Footprint, saved_bytes
from torch_rmt.operators.places import Place, check_called, find_place, hooked, leaves, replace_first, tensor_at
from torch_rmt.operators.pure import PureModel
from torch_rmt.operators.shifts import by_shifts
from torch_rmt.operators.trees import first_tensor

# Forward mode first: one pass carries the tangents of all layers.
_FORWARD_FIRST = tuple(sorted(FIRST_ORDER, key=lambda rung: rung[0] != "forward mode"))
_CHUNK = 256


@dataclass(frozen=True)
class LayerNorms:
    """Averaged partial Jacobian norms `1/n_l E ||d h_l / d h_0||_F^2` with standard errors.

    Fields:
        layers: names of the layers.
        values: one norm a layer.
        errors: one standard error a layer; over samples alone when `exact`.
        exact: whether every column of the Jacobian was computed.
    """

    layers: tuple[str, ...]
    values: Float[Tensor, " layers"]
    errors: Float[Tensor, " layers"]
    exact: bool


def _gaussian(like: Tensor) -> Tensor:
    """Gaussian tensor of a generator of its own: the random state outside is not touched."""
    generator = torch.Generator(device=like.device).manual_seed(6)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _note(place: Place, caught: list[Tensor], output: Any) -> None:
    caught.append(tensor_at(place, output).clone())  # the next module may work in place


def _note_shape(place: Place, shapes: list[torch.Size], output: Any) -> None:
    shapes.append(tensor_at(place, output).shape)


class _Passes:
    """The network seen from one source place: values at many places as one function."""

    def __init__(self, model: nn.Module, inputs: Any, layers: Sequence[str] | None, source: str | None) -> None:
        self.pure = PureModel(model, "*")
        self.inputs = self.pure.prepare(inputs)
        self.samples = sample_count(self.inputs)
        self.source = None if source is None else find_place(self.pure.module, source)
        self.places = self._places(layers)
        first = first_tensor(self.inputs)
        assert first is not None
        found: list[Tensor] = [first] if self.source is None else []
        self.shapes: list[torch.Size] = []
        with self.pure.guarded(), torch.no_grad(), ExitStack() as stack:
            for place in self.places:
                stack.enter_context(hooked(place, partial(_note_shape, place, self.shapes)))
            if self.source is not None:
                here = self.source
                calls = stack.enter_context(hooked(here, partial(_note, here, found)))
            output = self.pure.raw(self.pure.params, self.inputs)
            if self.source is not None:
                check_called(here, calls[0], source or "")
        self.output = output
        self.point = found[0].detach()
        if not self.point.is_floating_point():
            raise TypeError(
                f"the source is {self.point.dtype}, which has no derivative; name a later module as source, "
                "for example source='embedding'"
            )
        stand = [bool(shape) and shape[0] == self.samples for shape in self.shapes]
        if layers is None:  # packed sequences and the like are left out
            self.places = [place for place, kept in zip(self.places, stand, strict=True) if kept]
            self.shapes = [shape for shape, kept in zip(self.shapes, stand, strict=True) if kept]
        elif not all(stand):
            index = stand.index(False)
            raise ValueError(
                f"module {str(self.places[index])!r} returns {tuple(self.shapes[index])}: its first dimension is not "
                "the samples"
            )

    def _places(self, layers: Sequence[str] | None) -> list[Place]:
        """Places in the order in which the forward pass reaches them; by default of all leaves."""
        module = self.pure.module
        asked = None if layers is None else [find_place(module, name) for name in layers]
        names = {m: name for name, m in reversed(list(module.named_modules()))}
        wanted = leaves(names) if asked is None else [p.module for p in asked]
        order: list[nn.Module] = []
        with self.pure.guarded(), torch.no_grad(), ExitStack() as stack:
            for m in set(wanted):
                handle = m.register_forward_hook(lambda m, _args, _output: order.append(m))
                stack.callback(handle.remove)
            self.pure.raw(self.pure.params, self.inputs)
        seen: dict[nn.Module, int] = {}
        places = []
        for m in order:
            seen[m] = seen.get(m, 0) + 1
            places.append(Place(names[m], m, seen[m] - 1))
        if asked is None:
            return places
        for place, name in zip(asked, layers or (), strict=True):
            check_called(place, seen.get(place.module, 0), name)
        return [p for p in places if any(p.module is a.module and p.call == a.call for a in asked)]

    def label(self, place: Place) -> str:
        """Name of a place, with the call where the module is called more than once."""
        several = sum(p.module is place.module for p in self.places) > 1 or place.call > 0
        return f"{place.name}#{place.call + 1}" if several else place.name

    def values(self, point: Tensor) -> Tensor:
        """Values at all places, side by side, `(samples, sum of sizes)`."""
        caught: list[Tensor] = []
        point = point.clone()  # the next module may work in place
        with ExitStack() as stack:
            if self.source is not None:
                stack.enter_context(hooked(self.source, lambda output: replace_first(output, point)))
            for place in self.places:
                stack.enter_context(hooked(place, partial(_note, place, caught)))
            self.pure.raw(self.pure.params, self.inputs if self.source else replace_first(self.inputs, point))
        return torch.cat([t.reshape(self.samples, -1) for t in caught], dim=1)

    def prove(self, f: Differentiable, kind: str) -> Products:
        """Products with the derivative of a function of the network, proved as every engine is."""
        modes = tuple(training for _, training in self.pure.modes)
        key = (kind, str(self.source), tuple(map(str, self.places)), modes, self.pure.dtype)
        return climb(f, _FORWARD_FIRST, self.pure.module, key)[0]

    def forward_products(self) -> Products:
        """Tangents at all places from tangents at the source."""
        f = Differentiable(
            self.values, (self.point,), self.pure.guarded, lambda _, thunk: self.pure.within(self.pure.params, thunk)
        )
        products = self.prove(f, "sweep forward")
        if self.samples > 1:
            only = torch.zeros_like(self.point)
            only[0] = _gaussian(only[0])
            image = products.push((only.unsqueeze(0),))[0][0]
            self.refuse_coupling(image)
        return products

    def refuse_coupling(self, image: Tensor) -> None:
        """ValueError where a tangent of the first sample reaches another sample."""
        if float(image[1:].abs().max()) > 1e-6 * float(image[0].abs().max()):
            raise ValueError(
                "the samples of this batch depend on one another (batch normalisation in train mode?); call "
                "model.eval(), or use Jacobian(..., sample=i), which holds the other samples fixed"
            )

    def at_once(self, columns: int, max_memory: int | None) -> int:
        """How many of so many tangents go through the network at the same time."""
        if max_memory is None:
            return min(columns, _CHUNK)
        vector = self.samples * sum(self.sizes()) * self.point.element_size()
        saved = saved_bytes(self.pure, self.inputs) + vector
        footprint = Footprint(saved, saved, vector, vmapped=True)
        width = footprint.width(0, max_memory - columns * vector)
        if width == 0:
            raise ValueError(
                f"the Jacobians of {len(self.places)} layers and {self.samples} samples take "
                f"{columns * vector + footprint.product(0)} bytes, {max_memory} are allowed: name fewer layers, take "
                "fewer samples, or estimate their norms with partial_jacobian_norms"
            )
        return min(columns, width, _CHUNK)

    def sizes(self) -> list[int]:
        """Number of scalars a sample at each place."""
        return [shape.numel() // self.samples for shape in self.shapes]


def input_to_layers(
    model: nn.Module,
    inputs: Any,
    layers: Sequence[str] | None = None,
    *,
    source: str | None = None,
    max_memory: int | None = None,
) -> dict[str, Float[Tensor, "samples _ source"]]:
    """Jacobians from one source to every layer, `{layer: (samples, layer size, source size)}`, in one sweep.

    `source` is a module name (its output), None the input; `layers` are module names, None every leaf module
    in the order of the forward pass whose output has the samples first. One tangent pass for each source
    coordinate, whatever the number of layers. `max_memory` bounds the bytes, result included.

    Raises:
        ValueError: unknown names, an empty batch, samples that depend on one another, too few bytes.
        TypeError: an integer source.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
        >>> J = input_to_layers(net, torch.randn(5, 3))
        >>> torch.allclose(J["1"][4], net[1].weight @ net[0].weight, atol=1e-6)
        True
    """
    passes = _Passes(model, inputs, layers, source)
    products = passes.forward_products()
    n = passes.point[0].numel()
    columns = passes.point.new_empty(n, passes.samples, sum(passes.sizes()))
    width = passes.at_once(n, max_memory)
    for start in range(0, n, width):
        basis = torch.zeros(min(width, n - start), n, dtype=passes.point.dtype, device=passes.point.device)
        basis[:, start:].fill_diagonal_(1.0)
        tangents = basis.reshape(-1, 1, *passes.point.shape[1:]).expand(-1, *passes.point.shape)
        columns[start : start + width] = products.push((tangents,))[0]
    pieces = torch.split(columns, passes.sizes(), dim=2)
    return {passes.label(p): t.permute(1, 2, 0) for p, t in zip(passes.places, pieces, strict=True)}


def layers_to_output(
    model: nn.Module,
    inputs: Any,
    layers: Sequence[str] | None = None,
    *,
    loss: Loss | None = None,
    targets: Any = None,
    max_memory: int | None = None,
) -> dict[str, Float[Tensor, "samples target _"]]:
    """Jacobians from every layer to the output, `{layer: (samples, output size, layer size)}`.

    With a `loss` and `targets` the target is the loss instead: one row, the gradient of the batch's loss by
    each sample's layer output. `max_memory` bounds the bytes, result included.

    Raises:
        ValueError: unknown names, an empty batch, coupled samples, a non-finite loss, too few bytes.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
        >>> J = layers_to_output(net, torch.randn(5, 3))
        >>> torch.allclose(J["0"][4], net[1].weight, atol=1e-6)
        True
    """
    passes = _Passes(model, inputs, layers, None)
    passes.pure.require_tensor(passes.output)

    def finish(output: Tensor) -> Tensor:
        return output if loss is None else checked_loss(loss(output, targets)).reshape(1)

    zeros = tuple(torch.zeros(s, dtype=passes.point.dtype, device=passes.point.device) for s in passes.shapes)
    f = by_shifts(passes.pure, passes.inputs, passes.places, zeros, finish)
    products = passes.prove(f, "sweep backward")
    value = products.value
    if loss is not None:
        cotangents = torch.ones_like(value).unsqueeze(0)
    else:
        n = value[0].numel()
        basis = torch.eye(n, dtype=value.dtype, device=value.device).reshape(n, 1, *value.shape[1:])
        cotangents = basis.expand(n, *value.shape)
        if passes.samples > 1:
            only = torch.zeros_like(value)
            only[0] = _gaussian(only[0])
            passes.refuse_coupling(products.pull((only.unsqueeze(0),))[0][0])
    count = len(cotangents)
    found = [passes.point.new_empty(count, passes.samples, size) for size in passes.sizes()]
    width = passes.at_once(count, max_memory)
    for start in range(0, count, width):
        some = slice(start, start + width)
        for rows, part in zip(found, products.pull((cotangents[some],)), strict=True):
            rows[some] = part.reshape(part.shape[0], passes.samples, -1)
    return {passes.label(place): rows.transpose(0, 1) for place, rows in zip(passes.places, found, strict=True)}


def single_layers(model: nn.Module, inputs: Any, layers: Sequence[str]) -> dict[str, Float[Tensor, "samples _ _2"]]:
    """Jacobian of each named layer by the one before it (the first by the input); their product is the whole.

    Raises:
        ValueError: unknown names, or layers out of the order of the forward pass.
    """
    ordered = [_Passes(model, inputs, [name], None).places[0] for name in layers]
    results = {}
    for before, place, name in zip([None, *map(str, ordered)], ordered, layers, strict=False):
        results[name] = next(iter(input_to_layers(model, inputs, [str(place)], source=before).values()))
    return results


def activation_slopes(
    model: nn.Module, inputs: Any, layers: Sequence[str] | None = None
) -> dict[str, Float[Tensor, "samples _"]]:
    """Diagonals `D_l = phi'(h_l)` of the elementwise modules, `{module: (samples, size)}`.

    Without `layers` every leaf module that acts on each entry alone is taken (dropout and identities left
    out).

    Raises:
        ValueError: a named module that is not elementwise.
    """
    passes = _Passes(model, inputs, layers, None)
    found: dict[int, list[Tensor]] = {}
    results: dict[str, Tensor] = {}
    with passes.pure.guarded(), ExitStack() as stack:

        def keep(m: nn.Module, args: tuple[Any, ...]) -> None:
            t = first_tensor(args)
            if t is not None:
                found.setdefault(id(m), []).append(t.detach().clone())

        for m in {p.module for p in passes.places}:
            stack.callback(m.register_forward_pre_hook(keep).remove)
        passes.pure.raw(passes.pure.params, passes.inputs)
    with passes.pure.guarded():
        for place, shape in zip(passes.places, passes.shapes, strict=True):
            entered = found[id(place.module)][place.call].requires_grad_()
            diagonal = None
            if entered.shape == shape and entered.is_floating_point():
                diagonal = _diagonal(place.module, entered)
            if diagonal is None:
                if layers is not None:
                    raise ValueError(f"module {str(place)!r} is not elementwise; use Jacobian for its full matrix")
            elif layers is not None or not isinstance(place.module, (nn.Identity, nn.modules.dropout._DropoutNd)):
                results[passes.label(place)] = diagonal.reshape(passes.samples, -1)
    return results


def _diagonal(module: nn.Module, entered: Tensor) -> Tensor | None:
    """Derivative of an elementwise module, or None: the ones vector must tell the whole Jacobian."""
    first = first_tensor(module(entered.clone()))
    if first is None or not first.requires_grad:
        return None
    (d,) = torch.autograd.grad(first, entered, torch.ones_like(first), retain_graph=True)
    u = _gaussian(first)
    (product,) = torch.autograd.grad(first, entered, u)
    return d.detach() if torch.allclose(product, d * u, rtol=1e-4, atol=1e-6) else None


def partial_jacobian_norms(
    model: nn.Module,
    inputs: Any,
    layers: Sequence[str] | None = None,
    *,
    source: str | None = None,
    probes: int = 16,
    generator: torch.Generator | None = None,
) -> LayerNorms:
    """Averaged partial Jacobian norms of every layer in one sweep, with error bars.

    `1/n_l E_x ||d h_l / d h_0||_F^2`: exact when the source has no more coordinates than `probes`, otherwise
    from random signs v, `E ||J v||^2 = ||J||_F^2`, drawn from `generator` (None: one of its own, seed 0). At
    criticality it stays of order one with depth.

    Raises:
        ValueError: fewer than two probes, unknown names, samples that depend on one another.

    Source: Doshi, He, Gromov 2023, eq. 3.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU())
        >>> partial_jacobian_norms(net, torch.ones(1, 4)).values
        tensor([1., 1.])
    """
    if probes < 2:
        raise ValueError(f"probes must be at least 2 for an error bar, not {probes}")
    passes = _Passes(model, inputs, layers, source)
    products = passes.forward_products()
    shape, n = passes.point.shape[1:], passes.point[0].numel()
    exact = n <= probes
    if exact:
        tangents = torch.eye(n, dtype=passes.point.dtype, device=passes.point.device).reshape(n, 1, *shape)
    else:
        own = torch.Generator().manual_seed(0) if generator is None else generator
        signs = torch.randint(0, 2, (probes, 1, *shape), generator=own, device=own.device)
        tangents = 2.0 * signs.to(passes.point) - 1.0
    (image,) = products.push((tangents.expand(-1, *passes.point.shape).contiguous(),))
    values, errors = [], []
    for piece in torch.split(image, passes.sizes(), dim=2):
        squares = piece.double().square().mean(2)  # (probes, samples), already divided by n_l
        draws = squares.sum(0) if exact else squares.mean(1)
        values.append(draws.mean())
        count = draws.numel()
        errors.append(draws.std() / count**0.5 if count > 1 else draws.new_zeros(()))
    names = tuple(passes.label(p) for p in passes.places)
    return LayerNorms(names, torch.stack(values).float(), torch.stack(errors).float(), exact)
