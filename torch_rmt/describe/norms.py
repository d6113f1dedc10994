"""Normalisations in a recorded pass: torch's own by their calls, hand-written ones by trial."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torch_rmt.describe.forward_graph import WEIGHT_CALLS, Call, ForwardGraph, Ref
from torch_rmt.describe.stretch import SHAPING, replay, walk_back

_SIGNATURES = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
}
_UNEVEN = 0.1  # relative variance of the divisors' squares from which one number is no longer them; a convention


@dataclass(frozen=True)
class Found:
    """A norm: its kind (None for a fixed diagonal map), input, weights (None: ones), and what speaks against it."""

    kind: Literal["layer", "rms", "batch"] | None
    input: int
    scale: Tensor | None
    problem: str = ""


def read_norm(graph: ForwardGraph, call: Call) -> Found | None:
    """Torch's functions; None for any other call."""
    if call.name not in _SIGNATURES:
        return None
    given: dict[str, Any] = dict(zip(_SIGNATURES[call.name], call.args, strict=False)) | call.kwargs
    data = given.get("input")
    if not isinstance(data, Ref) or data.number not in graph.data:
        return None

    def tensor(name: str) -> Tensor | None:
        ref = given.get(name)
        return graph.tensors[ref.number].detach().double() if isinstance(ref, Ref) else None

    scale = tensor("weight")
    own_statistics = given.get("training" if call.name == "batch_norm" else "use_input_stats", True)
    if call.name in ("batch_norm", "instance_norm") and not own_statistics:
        variance = tensor("running_var")
        assert variance is not None
        factor = (variance + given.get("eps", 1e-5)).rsqrt() * (1.0 if scale is None else scale)
        return Found(None, data.number, factor.reshape(-1, *(1,) * (len(graph.shapes[data.number]) - 2)))
    if scale is not None and bool((scale == 1).all()):
        scale = None
    if call.name == "batch_norm":
        one = graph.shapes[data.number][:1] == (1,)
        problem = f"{call.where}: normalises over a batch of one; pass a batch, or call model.eval()" if one else ""
        return Found("batch", data.number, scale, problem)
    kind: Literal["layer", "rms"] = "rms" if call.name == "rms_norm" else "layer"
    shape = graph.shapes[data.number]
    if call.name == "group_norm":
        rows = int(given["num_groups"])
    elif call.name == "instance_norm":
        rows = int(shape[1])
    else:
        rows = shape[1:].numel() // torch.Size(given["normalized_shape"]).numel()
    problem = _uneven(graph, call.where, kind, data.number, rows)
    return Found(kind, data.number, scale if scale is None else scale.flatten(), problem)


def _uneven(graph: ForwardGraph, where: str, kind: str, number: int, rows: int) -> str:
    """Say so where the `rows` sets that are normalised on their own in the first sample are of unlike size."""
    value = graph.values.get(number, graph.tensors[number]).detach()
    if number not in graph.values and not torch.equal(
        value.flatten()[:1024], graph.samples.get(number, value.new_zeros(0))
    ):
        return ""  # overwritten since: not looked at
    sets = value[:1].double().reshape(max(rows, 1), -1)
    squares = sets.square().mean(1) if kind == "rms" else sets.var(1, unbiased=False)
    relative = float(squares.var(unbiased=False) / squares.mean().square().clamp_min(1e-300))
    if relative <= _UNEVEN:
        return ""
    return (
        f"{where}: normalises places of unlike size, by divisors whose squares vary by {relative**0.5:.0%}, so that "
        "its map is no multiple of a projection"
    )


def hand_written_norm(graph: ForwardGraph, start: int, end: int) -> Found | None:
    """A module whose map is w * x / rms(x) or w * (x - mean) / std + b over its last axis, by trial on three inputs."""
    if start not in graph.data or start >= end or graph.shapes[start] != graph.shapes[end]:
        return None
    calls, sources = walk_back(graph, end, {start, *graph.inputs})
    acting = [call for call in calls if call.name not in SHAPING]
    if sources != {start} or not 2 < len(acting) < 30 or any(call.name in WEIGHT_CALLS for call in acting):
        return None
    shape = graph.shapes[start]
    if len(shape) < 2 or shape[-1] < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1 for _ in range(3)]
    inputs = [x.to(graph.tensors[start].device) for x in inputs]
    try:
        with torch.no_grad():
            one, two, three = (replay(graph, calls, start, end, x) for x in inputs)
    except Exception:  # any call at all is tried here, in another type: whatever it raises, it says no
        return None
    if one.shape != shape:
        return None
    kinds: tuple[Literal["rms", "layer"], ...] = ("rms", "layer")
    for kind in kinds:
        z = [x / x.square().mean(-1, keepdim=True).sqrt() for x in inputs]
        if kind == "layer":
            z = [(x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, unbiased=False) for x in inputs]
        weight = (one - two) / (z[0] - z[1])
        shift = one - weight * z[0]
        if torch.allclose(weight * z[2] + shift, three, rtol=1e-3, atol=1e-3 * float(three.abs().max())):
            scale = weight.flatten()[: shape[-1]]
            unbiased = (1 - 1 / shape[-1]) ** 0.5  # a standard deviation over n - 1 is one too
            even = any(torch.allclose(scale, torch.full_like(scale, c), rtol=1e-3) for c in (1.0, unbiased))
            rows = shape[1:-1].numel()
            where = graph.calls[end].where
            return Found(kind, start, None if even else scale, _uneven(graph, where, kind, start, rows))
    return None
