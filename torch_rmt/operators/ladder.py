"""Which rung to stand on: engines are tried in order, and none is trusted before another agrees with it.

Silently wrong derivatives exist. In torch 2.13 reverse over forward through LayerNorm is off by a quarter
with no error, and both reverse-over-reverse engines agree on a wrong, asymmetric Hessian through the fused
weight_norm. So an engine must satisfy the adjoint identity `<u, A v> = <A^T u, v>` on random vectors and
agree on one vector with another engine. What was proved for a module is remembered, so that measuring it at
the next step does not pay again.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torch_rmt.operators.engines import (
    Block,
    Differentiable,
    EngineError,
    Products,
    Tensors,
    batched,
    stacked,
    unguarded,
)
from torch_rmt.operators.memory import is_out_of_memory
from torch_rmt.operators.tape import length
from torch_rmt.operators.taped import taped

Engine = tuple[str, Callable[[Differentiable, Block], Products]]
# Engines that run plain autograd: a checkpointed forward pass that runs again must see plain tensors, so no
# vmap.
_LOOPED = ("double backward", "central differences")
# Scalars from which one CPU core is busy with one vector, so that a block only costs memory: on an MLP of 269k
# and a GPT of 1M parameters vmap over 16 took 1.1 and 1.2 times as long a vector as one by one, and plain
# autograd 0.85 times as long as torch.func. Not timed at run time, since the choice changes the last bits.
_LARGE = 50_000
# The same for any device. Not timed, for want of a GPU: so many parameters take a GPU longer to multiply by than to be
# told to, and of a network of 1.1 billion the proof of a block took 19 vectors' bytes, which 80 GB do not hold.
_LARGE_ANYWHERE = 20_000_000
_NO_RULE = "not yet implemented the batching rule for"
_PLAIN = "double backward"
_FORWARD = "forward mode"
_BLOCKS: dict[str, Block] = {"vmap": batched, "loop": stacked, "plain loop": unguarded, "tape": taped}


@dataclass(frozen=True)
class Choice:
    """The engine chosen, how blocks are run, the proof in words, and an operation that vmap runs one by one."""

    engine: str
    block: str
    proof: str
    one_by_one: str = ""

    def __str__(self) -> str:
        slow = f"; {self.one_by_one} has no rule for blocks and runs vector by vector" if self.one_by_one else ""
        return f"{self.engine} ({self.proof}{slow})"

    @property
    def run(self) -> Block:
        """How a block of vectors is run; torch's warning of the missing rule is said by `str` instead."""
        return _silent(_BLOCKS[self.block]) if self.one_by_one else _BLOCKS[self.block]


_proved: weakref.WeakKeyDictionary[nn.Module, dict[object, Choice]] = weakref.WeakKeyDictionary()


def climb(
    f: Differentiable, engines: Sequence[Engine], module: nn.Module, key: object, *, kept: bool = False
) -> tuple[Products, Choice]:
    """Prepare products with the first engine that runs and is confirmed by another.

    `kept` says that the products will serve many vectors, so that writing a tape pays.

    Raises:
        EngineError: no engine runs, or no two agree; with what each of them said.
    """
    key = (key, kept, f.point[0].device.type)
    known = _proved.setdefault(module, {}).get(key)
    if known is not None:
        try:
            return dict(engines)[known.engine](f, known.run), known
        except (RuntimeError, NotImplementedError, TypeError) as problem:
            if is_out_of_memory(problem):
                raise
            del _proved[module][key]
    refusals: list[str] = []
    # Images, not products: no two graphs are held at the same time.
    prepared: list[tuple[str, Tensor]] = []
    direction = _direction(f)
    for name, engine in engines:
        try:
            image, gap = _tried(f, engine, direction)
        except (RuntimeError, NotImplementedError, TypeError) as problem:
            if is_out_of_memory(problem):
                raise
            refusals.append(
                f"{name}: {str(problem).strip().splitlines()[0] if str(problem) else type(problem).__name__}"
            )
            continue
        if not torch.isfinite(image).all():
            refusals.append(f"{name}: the product is not finite")
            continue
        if gap > _adjoint_tolerance(f, name):
            refusals.append(f"{name}: silently wrong here, the adjoint identity fails")
            continue
        vetoed = False
        for other, reference in prepared:
            gap, allowed = _gap(reference, image), _tolerance(f, other, name)
            vetoed = gap <= allowed and _vetoed(f, dict(engines), direction, image)
            if gap <= allowed and not vetoed:
                if _busy(f) and name == _PLAIN:
                    played = _on_tape(f, engine, direction, image) if kept else None
                    if played is not None:
                        choice = Choice(name, "tape", f"agrees with {other} to {gap:.0e}; played from a tape")
                        _proved.setdefault(module, {})[key] = choice
                        return played, choice
                    if _forward_pays(f, engines, module, direction, reference):
                        choice = Choice(_FORWARD, "loop", f"agrees with {other}; forward passes are cheap here")
                        _proved.setdefault(module, {})[key] = choice
                        return dict(engines)[_FORWARD](f, stacked), choice
                    choice = Choice(name, "plain loop", f"agrees with {other} to {gap:.0e}")
                    _proved.setdefault(module, {})[key] = choice
                    return engine(f, unguarded), choice
                choice = Choice(other, "loop", f"agrees with {name} to {gap:.0e}")
                return _with_blocks(f, dict(engines)[other], choice, direction, reference, module, key)
            reason = f"differ by {gap:.1e}" if gap > allowed else "share a custom backward that is wrong"
            refusals.append(f"{other} and {name} {reason}")
        prepared = [] if vetoed else [*prepared, (name, image)]
    if len(prepared) == 1:
        name, image = prepared[0]
        choice = Choice(name, "loop", "no second engine to be trusted; the adjoint identity holds")
        return _with_blocks(f, dict(engines)[name], choice, direction, image, module, key)
    raise EngineError(
        f"{type(module).__name__} cannot be differentiated reliably: " + "; ".join(refusals) + ". Remedies: use "
        "operations with a second derivative (no EmbeddingBag, checkpointing with use_reentrant=False), or "
        "measure the part of the network that can (params=..., source=..., target=...)"
    )


def _tried(
    f: Differentiable, engine: Callable[[Differentiable, Block], Products], direction: Tensors
) -> tuple[Tensor, float]:
    """Image of one vector, and how far the adjoint identity is missed; the graph is let go."""
    products = engine(f, stacked)
    return _flat(products.push(direction)), _adjoint_gap(f, products, direction)


def _busy(f: Differentiable) -> bool:
    """Whether one vector keeps the device busy."""
    return sum(p.numel() for p in f.point) > _LARGE and f.point[0].device.type == "cpu"


def _on_tape(
    f: Differentiable, engine: Callable[[Differentiable, Block], Products], direction: Tensors, image: Tensor
) -> Products | None:
    """Products played from a tape that was written for other vectors, if they are those of the graph."""
    products = engine(f, taped)
    u = products.push(tuple(t.roll(1, -1) + 0.5 for t in direction))[0]
    if products.pull is not products.push:
        products.pull((torch.ones_like(u),))
    right = _gap(_flat(products.push(direction)), image) <= _tolerance(f, _PLAIN, _PLAIN)
    right = right and _adjoint_gap(f, products, direction) <= _adjoint_tolerance(f, _PLAIN)
    return products if right else None


def _forward_pays(
    f: Differentiable, engines: Sequence[Engine], module: nn.Module, direction: Tensors, reference: Tensor
) -> bool:
    """Whether forward mode serves a network of convolutions, and agrees with an engine that was confirmed.

    A convolution's second derivative takes longer than the forward pass again: on a ResNet-20 a product with the
    Jacobian took 1.6 gradients from the kept graph and 1.1 in forward mode; on MLP and GPT the graph was faster.
    """
    if _FORWARD not in dict(engines) or not any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules()):
        return False
    try:
        image, gap = _tried(f, dict(engines)[_FORWARD], direction)
    except (RuntimeError, NotImplementedError, TypeError) as problem:
        if is_out_of_memory(problem):
            raise
        return False
    return gap <= _adjoint_tolerance(f, _FORWARD) and _gap(image, reference) <= _tolerance(f, _FORWARD, _PLAIN)


def _vetoed(
    f: Differentiable,
    engines: dict[str, Callable[[Differentiable, Block], Products]],
    direction: Tensors,
    image: Tensor,
) -> bool:
    """Whether central differences contradict engines that share a user's `autograd.Function`.

    A backward that detaches what it should not loses a symmetric term, which no two reverse engines can
    notice. On built-in operations differences have no say: across the kinks of a ReLU network they are wrong
    themselves.
    """
    if not _has_custom_backward(f):
        return False
    try:
        witness = _flat(engines["central differences"](f, stacked).push(direction))
    except (RuntimeError, NotImplementedError, TypeError) as problem:
        if is_out_of_memory(problem):
            raise
        return False
    return _gap(image, witness) > _tolerance(f, "central differences", "")


def _has_custom_backward(f: Differentiable) -> bool:
    leaves = tuple(p.detach().clone().requires_grad_() for p in f.point)
    with f.guard():
        value = f.within(leaves, lambda: f.call(*leaves))
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        waiting.extend(parent for parent, _ in node.next_functions)
    return False


def _with_blocks(
    f: Differentiable,
    engine: Callable[[Differentiable, Block], Products],
    choice: Choice,
    direction: Tensors,
    image: Tensor,
    module: nn.Module,
    key: object,
) -> tuple[Products, Choice]:
    """Use vmap over blocks where it runs and gives what the loop gave."""
    if choice.engine not in _LOOPED and not _busy(f) and sum(p.numel() for p in f.point) <= _LARGE_ANYWHERE:
        try:
            pair = tuple(torch.stack((v, -2.0 * v)) for v in (t[0] for t in direction))
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                quick = engine(f, batched)
                images = quick.push(pair)
                if quick.pull is not quick.push:
                    quick.pull(images)
            both = torch.cat([t.reshape(2, -1) for t in images], dim=1)
            if _gap(torch.stack((image, -2.0 * image)), both) <= _tolerance(f, choice.engine, choice.engine):
                choice = replace(choice, block="vmap", one_by_one=_without_rule(said))
                if choice.one_by_one:
                    quick = engine(f, choice.run)
                _proved.setdefault(module, {})[key] = choice
                return quick, choice
        except (RuntimeError, NotImplementedError, TypeError) as problem:
            if is_out_of_memory(problem):
                raise
    _proved.setdefault(module, {})[key] = choice
    return engine(f, stacked), choice


def _without_rule(said: Sequence[warnings.WarningMessage]) -> str:
    """The operation of which torch says that it has no batching rule, or nothing."""
    words = [str(w.message) for w in said if _NO_RULE in str(w.message)]
    return words[0].partition(_NO_RULE)[2].strip().partition(". ")[0] if words else ""


def _silent(block: Block) -> Block:
    """Blocks without torch's warning of a missing batching rule, which comes back at every product."""

    def quiet(one: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
        run = block(one)

        def many(vectors: Tensors) -> Tensors:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=f".*{_NO_RULE}")
                return run(vectors)

        return many

    return quiet


def _direction(f: Differentiable) -> Tensors:
    generator = torch.Generator(device=f.point[0].device).manual_seed(0)
    return tuple(torch.randn((1, *p.shape), generator=generator, dtype=p.dtype, device=p.device) for p in f.point)


def _flat(block: Tensors) -> Tensor:
    return torch.cat([t.flatten() for t in block])


def _gap(a: Tensor, b: Tensor) -> float:
    scale = max(float(a.norm()), float(b.norm()))
    return float((a - b).norm()) / scale if scale > 0 else 0.0


def _tolerance(f: Differentiable, one: str, other: str) -> float:
    double = f.point[0].dtype == torch.float64
    if "central differences" in (one, other):
        return 1e-3 if double else 3e-2
    return 1e-8 if double else 2e-3


def _adjoint_gap(f: Differentiable, products: Products, v: Tensors) -> float:
    image = products.push(v)
    generator = torch.Generator(device=image[0].device).manual_seed(1)
    u = tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device) for t in image)
    back = products.pull(u)
    left = sum(float((a.double() * b.double()).sum()) for a, b in zip(u, image, strict=True))
    right = sum(float((a.double() * b.double()).sum()) for a, b in zip(back, v, strict=True))
    # A random u meets a random error of size e in |u| e / sqrt(n), so that is the unit, not |u| |Av|.
    size = float(length(u) * length(image)) / sum(t.numel() for t in u) ** 0.5
    # Both sides count: a backward that is cut off gives an image of zero.
    scale = max(size, abs(left), abs(right))
    return abs(left - right) / scale if scale > 0 else 0.0


def _adjoint_tolerance(f: Differentiable, name: str) -> float:
    double = f.point[0].dtype == torch.float64
    if name == "central differences":
        return 1e-2 if double else 0.2
    return 1e-7 if double else 2e-2
