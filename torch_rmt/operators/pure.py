"""A module as a pure function of its parameters: the world that the operators differentiate."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch_rmt.guard import full_precision, undisturbed
from torch_rmt.operators.trees import entries_of, picked, tree_map

_HALF = (torch.float16, torch.bfloat16)
MASK_SEED = 0x5EED  # dropout draws from this state in every call, so that all products see the same mask


def nearest(name: str, names: Sequence[str]) -> str:
    """Say which of `names` are spelled most like `name`."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    shown = close or list(names)[:5]
    return "nearest: " + ", ".join(repr(c) for c in shown) if shown else "there are none"


def select(model: nn.Module, params: str | Sequence[str] | None) -> list[str]:
    """Names of the parameters to differentiate by, in `named_parameters()` order.

    `params` holds names of parameters, names of modules (all below) or globs; None means every parameter that
    requires a gradient.

    Raises:
        ValueError: nothing matches a pattern (with the nearest names), or nothing requires a gradient.
    """
    named = dict(model.named_parameters())
    if params is None:
        chosen = [name for name, p in named.items() if p.requires_grad]
        if not chosen:
            raise ValueError(
                f"no parameter of {type(model).__name__} requires a gradient; unfreeze some with "
                "requires_grad_(True), or name the ones you want: params=['*']"
            )
        return chosen
    patterns = [params] if isinstance(params, str) else list(params)
    if patterns == ["*"] and not named:
        return []
    hit: set[str] = set()
    aliases = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    first = {id(p): name for name, p in reversed(list(named.items()))}
    for pattern in patterns:
        found = {
            first[id(p)]
            for name, p in aliases.items()
            if fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".")
        }
        if not found:
            raise ValueError(
                f"params: {pattern!r} matches no parameter of {type(model).__name__}; {nearest(pattern, list(aliases))}"
            )
        hit |= found
    return [name for name in named if name in hit]


class PureModel:
    """A module at one moment, as a function `parameters -> output` without side effects.

    Parameters, buffers and modes are those at construction. Inside every call the buffers are clones, so
    BatchNorm in train mode uses the batch's statistics and moves none, and the random generator starts from
    one fixed seed, so dropout draws the same mask in every product. Parameters in half precision are measured
    in float32 copies; `notes` says so. A call returns a tensor: `read` makes it of what the module returns, and refuses
    what is no tensor unless it is replaced.
    """

    def __init__(self, model: nn.Module, params: str | Sequence[str] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
        self.module = getattr(model, "_orig_mod", model)
        if isinstance(self.module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            self.module = self.module.module
        self.names = select(self.module, params)
        tensors = dict(self.module.named_parameters())
        if twofold := [n for n in self.names if tensors[n].is_complex()]:
            raise TypeError(
                f"parameter {twofold[0]!r} is complex, and curvature is over real numbers: keep it as a real tensor "
                "and use torch.view_as_complex in forward, or name the real parameters (params=...)"
            )
        floating = [p for p in tensors.values() if p.is_floating_point()]
        dtype = floating[0].dtype if floating else torch.get_default_dtype()
        for p in floating:
            dtype = torch.promote_types(dtype, p.dtype)
        self.notes: tuple[str, ...] = ()
        if dtype in _HALF:
            self.notes = (f"parameters are {dtype}: measured in float32 copies",)
            dtype = torch.float32
        self.dtype: torch.dtype = dtype
        self.device: torch.device = next(
            (t.device for t in (*tensors.values(), *self.module.buffers())), torch.device("cpu")
        )
        with torch.no_grad(), torch.inference_mode(False):
            self.params = tuple(self._float(tensors[n]).detach().clone() for n in self.names)
            chosen = set(self.names)
            self.frozen = {n: self._float(p).detach().clone() for n, p in tensors.items() if n not in chosen}
            self.buffers = {n: self._float(b).detach().clone() for n, b in self.module.named_buffers()}
        self.modes = [(m, m.training) for m in self.module.modules()]
        self.seed = MASK_SEED
        self.weight_normed = any(
            type(part).__name__ in ("_WeightNorm", "WeightNorm")
            for m in self.module.modules()
            for part in (m, *m._forward_pre_hooks.values())
        )
        self.sizes = [p.numel() for p in self.params]
        self.read: Callable[[Any], Tensor] = self.require_tensor
        self.draws: bool | None = None  # whether the forward pass draws random numbers; known after the first

    def _float(self, t: Tensor) -> Tensor:
        return t.to(self.dtype) if t.dtype in _HALF else t

    @property
    def n_params(self) -> int:
        """Number of scalars that are differentiated by."""
        return sum(self.sizes)

    def split(self, v: Tensor) -> tuple[Tensor, ...]:
        """Cut `(..., n_params)` into tensors of the parameters' shapes (leading dimensions stay)."""
        pieces = torch.split(v, self.sizes, dim=-1)
        return tuple(piece.reshape(*v.shape[:-1], *p.shape) for piece, p in zip(pieces, self.params, strict=True))

    def prepare(self, inputs: Any) -> Any:
        """Detach inputs, out of inference mode and out of half precision."""
        with torch.inference_mode(False):
            return tree_map(lambda t: self._float(t.detach().clone() if t.is_inference() else t.detach()), inputs)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Everything that runs the module runs in here: nothing outside is disturbed."""
        with undisturbed(self.module):
            for m, training in self.modes:
                m.training = training
                if getattr(m, "sparse", False) is True:
                    m.sparse = False  # an embedding's sparse gradient has no second derivative; restored with the rest
            yield

    @contextmanager
    def light(self) -> Iterator[None]:
        """For products from a kept graph, in which the module does not run again."""
        plainly = torch.autocast(self.device.type, enabled=False)
        with full_precision(), torch.inference_mode(False), torch.no_grad(), plainly:
            yield

    def raw(self, params: Sequence[Tensor], inputs: Any) -> Any:
        """Call the module; to be used inside `guarded`."""
        torch.default_generator.manual_seed(self.seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed_all(self.seed)
        tensors = {**self.frozen, **dict(zip(self.names, params, strict=True))}
        tensors.update({name: b.clone() for name, b in self.buffers.items()})
        args, kwargs = arguments(tree_map(torch.clone, inputs))  # a first layer may work in place
        with ExitStack() as stack:
            if self.weight_normed:
                stack.enter_context(_ComposedWeightNorm())
            order = stack.enter_context(_LogicalOrder()) if self.draws is not False else None  # type: ignore[no-untyped-call]
            output = functional_call(self.module, tensors, args, kwargs)
        if order is not None:
            self.draws = order.used
        return output

    def within(self, params: Sequence[Tensor], thunk: Callable[[], Any]) -> Any:
        """Run a thunk while the module holds these parameters; to be used inside `guarded`.

        A checkpointed module runs its forward pass again inside the backward pass, and must then find the
        tensors that are differentiated by, or second derivatives are silently wrong.
        """
        tensors = {**self.frozen, **dict(zip(self.names, params, strict=True))}
        tensors = {f"module.{name}": t for name, t in tensors.items()}
        return functional_call(_Within(self.module), tensors, (thunk,))

    def __call__(self, params: Sequence[Tensor], inputs: Any) -> Tensor:
        """Return the output as a tensor; to be used inside `guarded`."""
        return self.read(self.raw(params, inputs))

    def require_tensor(self, output: Any) -> Tensor:
        """The output; TypeError, with the remedy, for a model that returns something else than a tensor."""
        return require_tensor(output, self.module)


def require_tensor(output: Any, module: nn.Module) -> Tensor:
    """The output; TypeError, with the remedy, for a model that returns something else than a tensor."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the output of {type(module).__name__} is a {type(output).__name__}{entries_of(output)}, not a tensor: "
            "wrap the model in a module whose forward returns the tensor that the loss takes (such as "
            f"`return {picked('self.model(x)', output)}`); Hessian and Fisher(kind='empirical') take the model as it is"
        )
    return output


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model is called with: a mapping holds keywords, a tuple or list arguments, all else is the only one."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


class _ComposedWeightNorm(TorchFunctionMode):
    """Weight normalisation from plain operations.

    The second derivative of the fused kernel is wrong without an error in torch 2.13: it takes the norm for a
    constant (the Hessian comes out asymmetric by 70 %).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._weight_norm:
            v, g, dim = (*args, 0)[:3] if kwargs is None else (*args, kwargs.get("dim", 0))[:3]
            return v * (g / torch.norm_except_dim(v, 2, dim))
        return func(*args, **(kwargs or {}))


class _LogicalOrder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Random numbers fall on entries in logical order, however a tensor lies in memory.

    Plain autograd and `torch.func` lay transposed tensors out differently, so that one seed gave them two dropout
    masks, and the Hessian was that of another network than the Gauss-Newton matrix.
    """

    used = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self.used = True
        if not (args and isinstance(args[0], Tensor)) or args[0].is_contiguous():
            return func(*args, **kwargs)
        straight = args[0].contiguous()
        drawn = func(straight, *args[1:], **kwargs)
        return args[0].copy_(drawn) if drawn is straight else drawn


class _Within(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, thunk: Callable[[], Any]) -> Any:
        return thunk()
