"""`critical_init_`: draw a network's weights at the edge between vanishing and exploding gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor, nn

from torch_rmt.describe import ForwardGraph, WeightUse, record, unwrapped
from torch_rmt.init.plan import Setting, make_plan
from torch_rmt.init.signal import LayerSignal, chi_per_layer, gradient_ratio, signals

InitEnsemble = Literal["orthogonal", "gaussian"]


@dataclass(frozen=True)
class LayerInit:
    """What was done to one weight.

    Fields:
        name: of the weight.
        activation: the one that follows, "" for none.
        sigma_w: sqrt(fan-in * mean square) of the weights now.
        sigma_b: standard deviation that the biases were drawn with.
        q: mean square of the pre-activation that was aimed at; NaN where it is a share of the signal's.
    """

    name: str
    activation: str
    sigma_w: float
    sigma_b: float
    q: float


@dataclass(frozen=True)
class InitReport:
    """What `critical_init_` did, and what a forward and a backward pass measure before and after.

    Fields:
        layers: the weights that were drawn, in the order of the calls.
        left_alone: weights and modules that were not touched, each with the reason.
        before, after: q and gradient norm at every weight.
        ensemble: "orthogonal" or "gaussian".
        branches: weights that end a residual branch and were scaled to its share of the signal.
    """

    layers: tuple[LayerInit, ...]
    left_alone: tuple[str, ...]
    before: tuple[LayerSignal, ...]
    after: tuple[LayerSignal, ...]
    ensemble: str
    branches: tuple[str, ...] = ()

    @property
    def chi_before(self) -> float:
        """Growth of the squared gradient a layer, before."""
        return chi_per_layer(self.before)

    @property
    def chi_after(self) -> float:
        """Growth of the squared gradient a layer, after; one when critical."""
        return chi_per_layer(self.after)

    @property
    def verdict(self) -> str:
        """In words: what the gradients did before and do now, and what was left alone."""
        was, now = gradient_ratio(self.before), gradient_ratio(self.after)
        text = (
            f"{_counted(len(self.layers), 'layer')} drawn ({self.ensemble}). Gradient norm first/last layer: {was:.3g} "
            f"before (chi {self.chi_before:.4g} a layer), {now:.3g} now (chi {self.chi_after:.4g})."
        )
        if self.branches:
            scaled = _counted(len(self.branches), "residual branch", "residual branches")
            text += f" {scaled} scaled: each adds one part in the number of blocks to the mean square of the signal."
        if self.left_alone:
            text += f" Left alone: {_by_reason(self.left_alone)}."
        return text

    def __str__(self) -> str:
        return self.verdict

    def scalars(self) -> dict[str, float]:
        """Numbers worth logging once."""
        out = {
            "chi_before": self.chi_before,
            "chi_after": self.chi_after,
            "gradient_ratio_before": gradient_ratio(self.before),
            "gradient_ratio_after": gradient_ratio(self.after),
        }
        return {key: value for key, value in out.items() if math.isfinite(value)}

    def table(self) -> Table:
        """One row a layer: what it was drawn with, q and gradient norm before and after."""
        table = Table(title=f"critical initialisation ({self.ensemble})")
        for column in (
            "layer",
            "activation",
            "sigma_w",
            "sigma_b",
            "q aimed",
            "q",
            "gradient before",
            "gradient",
        ):
            table.add_column(column, justify="left" if column in ("layer", "activation") else "right")
        drawn = {layer.name: layer for layer in self.layers}
        for was, now in zip(self.before, self.after, strict=True):
            layer = drawn.get(now.name)
            middle = (
                (layer.activation or "none", f"{layer.sigma_w:.4g}", f"{layer.sigma_b:.4g}", f"{layer.q:.4g}")
                if layer
                else ("left alone", "", "", "")
            )
            table.add_row(now.name, *middle, f"{now.q:.4g}", f"{was.gradient:.3e}", f"{now.gradient:.3e}")
        return table


def critical_init_(
    model: nn.Module,
    example_input: Any,
    *,
    ensemble: InitEnsemble = "orthogonal",
    sigma_b: float | None = None,
    q_star: float | None = None,
) -> InitReport:
    """Draw the weights and biases of a network anew, in place, at its critical point.

    Each weight gets sigma_w^2 = 1 / E phi'(sqrt(q) Z)^2 for the activation phi before it, so that chi = 1,
    and sigma_b^2 = q - sigma_w^2 E phi^2, so that q stays where it is. The first weight, and one behind a
    pooling layer, is scaled until the mean square of its output on `example_input` is the q aimed at,
    whatever the scale of the data. The last gets no bias. Convolutions are drawn delta-orthogonal: an
    orthogonal matrix at the centre tap, zero elsewhere. Behind a dropout that is active sigma_w^2 is times 1 - p, so
    that chi = 1 with it; call in the mode that you train in. Tied weights are drawn once.

    In a residual network the branches are drawn so too, each scaled by its last weight to 1 / L of the mean square of
    what enters its block, L the number of blocks in a row: signals and gradients then grow by at most e over all of
    them. A branch that ends in a norm or in a factor of its own keeps the share that this gives it. Weights behind a
    norm or a sum are scaled as measured, those in front of a norm not drawn: it takes their scale off again. Frozen
    and computed weights and those next to what was not understood (attention) are left alone and named in the report.

    Random numbers come from torch's global generator, as in torch.nn.init: call torch.manual_seed before.

    Args:
        model: changed in place; mode, gradients, buffers and hooks are left as they are.
        example_input: real data, a few dozen samples; batch first.
        ensemble: "orthogonal" (Haar; gradients of all directions survive) or "gaussian".
        sigma_b: standard deviation of the biases; picks the point of a critical line.
        q_star: mean square of the pre-activations to hold, instead of sigma_b. With neither, saturating
            activations get the q at which the whole depth spreads the Jacobian's squared singular values by a
            variance of 1/4, ReLU and its kin q = 1, and GELU and SiLU their only point.

    Raises:
        TypeError: not a module, or no tensor comes out.
        ValueError: the activation has no such critical point, the example is empty, zero or not finite, or no
            weight could be set.

    Source: Schoenholz et al. 2017; Pennington et al. 2017, 2018; Xiao et al. 2018 (delta-orthogonal); Hanin and Rolnick
    2018 and Hayou et al. 2021 (residual branches of variance 1 / L).

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(*[m for _ in range(20) for m in (nn.Linear(64, 64), nn.Tanh())])
    >>> report = critical_init_(net, torch.randn(32, 64))
    >>> report.chi_before < 0.7, abs(report.chi_after - 1) < 0.02
    (True, True)
    """
    if ensemble not in ("orthogonal", "gaussian"):
        raise ValueError(f"ensemble is 'orthogonal' or 'gaussian', got {ensemble!r}")
    if sigma_b is not None and q_star is not None:
        raise ValueError("give sigma_b or q_star, not both: each alone picks the critical point")
    model = unwrapped(model)
    before = signals(model, example_input)
    graph = record(model, example_input)
    settings, left = make_plan(model, graph, sigma_b=sigma_b, q_star=q_star)
    if not settings:
        reasons = _by_reason([f"{name}: {reason}" for name, reason in left.items()])
        raise ValueError(
            f"no weight could be set ({reasons}). The model is as it was: keep the initialisation that it has; norms "
            "set the scale themselves"
        )
    for setting in settings:
        if setting.sigma_w is None and not 0 < graph.mean_square.get(setting.link.use.input, 1.0) < math.inf:
            raise ValueError(
                f"what reaches {setting.link.use.name} is zero or not finite: pass a batch of real data as "
                "example_input"
            )
    parameters = dict(_parameters(model))
    for setting in settings:
        use = setting.link.use
        draw_weight_(parameters[use.parameter], ensemble, use.groups, setting.sigma_w or 1.0)
        bias = parameters.get(use.bias_parameter)
        if bias is not None and bias.requires_grad:
            nn.init.normal_(bias, 0.0, setting.sigma_b) if setting.sigma_b > 0 else nn.init.zeros_(bias)
    _scale_by_measurement(model, example_input, settings, parameters)
    layers = tuple(_layer(setting, parameters) for setting in settings)
    return InitReport(
        layers=layers,
        left_alone=tuple(f"{name}: {reason}" for name, reason in left.items()),
        before=before,
        after=signals(model, example_input),
        ensemble=ensemble,
        branches=tuple(s.link.use.name for s in settings if s.entry is not None and s.q < 1),
    )


def _by_reason(left_alone: Sequence[str]) -> str:
    """Lines `name: reason`, those of one reason together, three names of each."""
    names: dict[str, list[str]] = {}
    for line in left_alone:
        name, _, reason = line.partition(": ")
        names.setdefault(reason, []).append(name)
    return "; ".join(
        f"{', '.join(some[:3])}{f' and {len(some) - 3} more' if len(some) > 3 else ''}: {reason}"
        for reason, some in names.items()
    )


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


@torch.no_grad()
def draw_weight_(weight: nn.Parameter, ensemble: InitEnsemble, groups: int, sigma_w: float) -> None:
    """Fill a weight with fan-in * mean square = sigma_w^2."""
    fan_in = weight[0].numel()
    if ensemble == "gaussian":
        weight.normal_(0.0, sigma_w / math.sqrt(fan_in))
        return
    fresh = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    centre: tuple[slice | int, ...] = (slice(None), slice(None), *(k // 2 for k in weight.shape[2:]))
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    for block in torch.split(fresh, rows):
        # torch.nn.init.orthogonal_ fixes the signs of R, without which the draw is not Haar.
        matrix = nn.init.orthogonal_(torch.empty(rows, columns, device=weight.device))
        block[centre] = matrix * (sigma_w * math.sqrt(max(rows / columns, 1.0)))
    weight.copy_(fresh)


def _scale_by_measurement(
    model: nn.Module, example_input: Any, settings: list[Setting], parameters: dict[str, nn.Parameter]
) -> None:
    waiting = {s.link.use.parameter: s for s in settings if s.sigma_w is None}
    graph = ForwardGraph()

    def on_weight(use: WeightUse, call: Callable[[], Tensor]) -> Tensor:
        setting = waiting.pop(use.parameter, None)
        out = call()
        if setting is None:
            return out
        bias = parameters.get(use.bias_parameter)
        pure = out.double()
        if bias is not None:
            shape = (-1,) if use.kind == "linear" else (-1, *(1,) * (use.weight.ndim - 2))
            pure = pure - bias.double().reshape(shape)
        offset = 0.0 if bias is None else float(bias.double().square().mean())
        measured = float(pure.square().mean())
        if not 0 < measured < math.inf:
            raise ValueError(f"what reaches {use.name} is zero or not finite: pass a batch of real data")
        q = setting.q
        if setting.entry is not None:
            q *= float(graph.tensors[setting.entry].double().square().mean())
        aim = q - offset if offset < q else q
        # Through `.data`: a weight whose version rises would get a new number, and shift those of all entries.
        parameters[use.parameter].data.mul_(math.sqrt(aim / measured))
        return call()

    if waiting:
        record(model, example_input, on_weight=on_weight, graph=graph)


def _layer(setting: Setting, parameters: dict[str, nn.Parameter]) -> LayerInit:
    use = setting.link.use
    weight = parameters[use.parameter].detach().double()
    sigma_w = math.sqrt(float(weight.square().mean()) * use.fan_in)
    name = setting.activation.name if setting.activation else ""
    bias = setting.sigma_b if use.bias_parameter else 0.0
    return LayerInit(use.name, name, sigma_w, bias, setting.q if setting.entry is None else math.nan)
