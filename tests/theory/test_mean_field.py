from __future__ import annotations

import numpy as np
import pytest
import torch

from torch_rmt.theory import (
    Activation,
    Architecture,
    as_activation,
    critical_point,
    jacobian_spectrum,
    mean_field,
    normalised_chi,
)
from torch_rmt.theory.correlation import pair_expectation
from torch_rmt.theory.critical import critical_curve, half_stable_point
from torch_rmt.theory.moments import length_slope, second_moment, slope_moment
from torch_rmt.theory.phase import critical_line, phase_diagram

POINTS = [("tanh", 1.5, 0.05), ("tanh", 32.0, 3.0), ("erf", 3.0, 0.1), ("hard_tanh", 2.0, 0.3), ("elu", 1.3, 0.1),
          ("sigmoid", 5.0, 0.1), ("gelu", 1.4, 0.1), ("sin", 3.0, 0.1)]  # fmt: skip


@pytest.mark.parametrize(("name", "sigma_w", "sigma_b"), POINTS)
def test_fixed_points_are_fixed(name: str, sigma_w: float, sigma_b: float) -> None:
    phi, field = as_activation(name), mean_field(name, sigma_w, sigma_b)
    q, c = field.q_star, field.c_star
    assert sigma_w**2 * second_moment(phi, q) + sigma_b**2 == pytest.approx(q, rel=1e-12)
    pair = sigma_w**2 * pair_expectation(phi.value, q, c, phi.kinks) + sigma_b**2
    assert pair / q == pytest.approx(c, abs=1e-12)
    assert field.chi == pytest.approx(sigma_w**2 * slope_moment(phi, q), rel=1e-13)
    # The slopes against differences of the maps themselves.
    step = 1e-4 * q
    difference = (second_moment(phi, q + step) - second_moment(phi, q - step)) / (2 * step)
    assert field.slope_q == pytest.approx(sigma_w**2 * difference, rel=1e-5, abs=1e-9)
    if c < 1:
        change = [pair_expectation(phi.value, q, c + e, phi.kinks) for e in (1e-5, -1e-5)]
        # c* comes from the Hermite series, this from the integral: two derivations.
        direct = sigma_w**2 * pair_expectation(phi.derivative, q, c, phi.kinks)
        assert field.slope_c == pytest.approx(direct, rel=1e-11)
        assert field.slope_c == pytest.approx(sigma_w**2 * (change[0] - change[1]) / (2e-5 * q), rel=1e-6)
    assert field.phase == ("ordered" if field.chi < 1 else "chaotic")
    assert field.depth_scale_c == pytest.approx(-1 / np.log(field.slope_c))


def test_erf_in_closed_form() -> None:
    q = mean_field("erf", 3.0, 0.1).q_star
    assert 9 * 2 / np.pi * np.arcsin(2 * q / (1 + 2 * q)) + 0.01 == pytest.approx(q, rel=1e-13)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_drawn_network_follows_the_maps(seed: int) -> None:
    """q and c of two inputs after each layer, at two widths: the error falls with the width."""
    generator = torch.Generator().manual_seed(seed)
    phi, sigma_w, sigma_b = as_activation("tanh"), 1.5, 0.3
    errors = []
    for width in (500, 4000):
        x = torch.randn(width, 2, generator=generator, dtype=torch.float64)
        q, c = float(x.pow(2).mean()), 0.0
        h = x
        error = 0.0
        for layer in range(8):
            weights = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
            bias = torch.randn(width, 1, generator=generator, dtype=torch.float64)
            h = sigma_w * weights @ (h if layer == 0 else torch.tanh(h)) + sigma_b * bias
            if layer == 0:
                q = sigma_w**2 * q + sigma_b**2
                c = sigma_b**2 / q
            else:
                new = sigma_w**2 * second_moment(phi, q) + sigma_b**2
                c = (sigma_w**2 * pair_expectation(phi.value, q, c) + sigma_b**2) / new
                q = new
            measured = (h.T @ h / width).numpy()
            error = max(
                error, abs(measured[0, 0] / q - 1), abs(measured[0, 1] / np.sqrt(measured[0, 0] * measured[1, 1]) - c)
            )
        errors.append(error)
    assert errors[1] < 0.08
    assert errors[1] < errors[0]


def test_several_fixed_points_with_their_stability() -> None:
    points = mean_field("gelu", 1.45, 0.1).fixed_points
    assert [p.stability for p in points] == ["stable", "unstable"]
    assert [p.stability for p in mean_field("tanh", 1.2, 0.0).fixed_points] == ["unstable", "stable"]
    assert mean_field("relu", 2**0.5).fixed_points[0].stability == "neutral"
    assert mean_field("relu", 2.0, 0.1).q_star == np.inf
    assert mean_field("tanh", 0.8, 0.0).q_star == 0.0


@pytest.mark.parametrize(("name", "sigma_w", "sigma_b"), [("tanh", 1.5, 0.1), ("relu", 1.1, 0.3), ("gelu", 0.9, 0.2)])
def test_dropout(name: str, sigma_w: float, sigma_b: float) -> None:
    """q and chi are those of sigma_w / sqrt(keep); c* < 1 is the fixed point of the map between two masks."""
    phi, keep = as_activation(name), 0.8
    field, other = mean_field(name, sigma_w, sigma_b, dropout=0.2), mean_field(name, sigma_w / keep**0.5, sigma_b)
    assert (field.q_star, field.chi, field.slope_q) == (other.q_star, other.chi, other.slope_q)
    c = (sigma_w**2 * pair_expectation(phi.value, field.q_star, field.c_star, phi.kinks) + sigma_b**2) / field.q_star
    assert field.c_star == pytest.approx(c, abs=1e-12)
    assert field.c_star < 1
    assert np.isfinite(field.depth_scale_c)
    assert mean_field(name, sigma_w, sigma_b, dropout=0.0) == mean_field(name, sigma_w, sigma_b)
    point = critical_point(name, dropout=0.2)
    if name == "gelu":  # half-stable: rounding moves a tangential root by its square root
        assert point.sigma_w == pytest.approx(keep**0.5 * critical_point(name).sigma_w, rel=1e-14)
        return
    assert mean_field(name, point.sigma_w, point.sigma_b, dropout=0.2).chi == pytest.approx(1.0, abs=1e-9)


def test_normalised_layers_follow_the_formula_of_one_layer() -> None:
    for norm in ("layer", "batch"):
        arch = Architecture.mlp(
            depth=6, width=50, activation="gelu", sigma_w=1.7, sigma_b=0.2, normalisation=norm, input_second_moment=3.0
        )
        scalars = jacobian_spectrum(arch).scalars
        assert scalars["q/4"] == 1.0
        chi = normalised_chi("gelu", norm, sigma_w=1.7, sigma_b=0.2)
        assert scalars["chi/4"] == pytest.approx(chi, rel=1e-12)
        # The weights' scale drops out where there is no bias.
        same = [
            Architecture.mlp(depth=3, width=50, activation="gelu", sigma_w=s, normalisation=norm) for s in (0.5, 5.0)
        ]
        means = [jacobian_spectrum(a).scalars["mean"] for a in same]
        assert means[0] == pytest.approx(means[1], rel=1e-12)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_bad_dropout(dropout: float) -> None:
    with pytest.raises(ValueError, match="dropout"):
        mean_field("tanh", 1.0, dropout=dropout)
    with pytest.raises(ValueError, match="dropout"):
        critical_point("tanh", dropout=dropout)
    with pytest.raises(ValueError, match="dropout"):
        Architecture.mlp(depth=2, width=10, activation="tanh", sigma_w=1.0, dropout=dropout)
    with pytest.raises(ValueError, match="nothing to normalise"):
        jacobian_spectrum(Architecture.mlp(depth=2, width=9, activation="tanh", sigma_w=0.0, normalisation="rms"))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="sigma_w"):
        mean_field("tanh", -1.0, 0.0)
    with pytest.raises(ValueError, match="sigma_b"):
        mean_field("tanh", 1.0, np.nan)
    fast = Activation("exp h^2", lambda h: np.exp(h**2), lambda h: 2 * h * np.exp(h**2))
    with pytest.raises(ValueError, match="diverge"):
        mean_field(fast, 1.0, 0.0)


# --- critical points


def test_printed_values() -> None:
    """Schoenholz 2017 for tanh; Roberts, Yaida and Hanin 2022, section 5.3 for GELU and SiLU, to the digits printed."""
    assert critical_point("tanh", sigma_b=0.05).sigma_w == pytest.approx(1.122539, abs=1e-6)
    gelu, silu = critical_point("gelu"), critical_point("silu")
    assert (gelu.sigma_w**2, gelu.sigma_b**2) == pytest.approx((1.983058, 0.172922), abs=1e-6)
    assert (silu.sigma_w**2, silu.sigma_b**2) == pytest.approx((1.988005, 0.555143), abs=1e-6)
    assert silu.q_star == pytest.approx(14.32017, abs=1e-5)
    assert critical_point("relu").sigma_w == pytest.approx(2**0.5, rel=1e-14)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("linear", "scale-invariant"), ("relu", "scale-invariant"), ("leaky_relu", "scale-invariant"), ("tanh", "line"),
     ("erf", "line"), ("hard_tanh", "line"), ("gelu", "half-stable"), ("silu", "half-stable"), ("mish", "half-stable"),
     ("relu_squared", "none")],
)  # fmt: skip
def test_kinds(name: str, kind: str) -> None:
    point = critical_point(name)
    assert point.kind == kind
    assert bool(point.advice) == (kind == "none")


@pytest.mark.parametrize(("name", "why"), [("softplus", "negative"), ("relu_squared", "not return")])
def test_no_advice_leads_in_a_circle(name: str, why: str) -> None:
    phi, point = as_activation(name), critical_point(name)
    assert "No q_star serves" in point.advice
    assert why in point.advice
    for q in np.logspace(-4, 4, 9):
        assert critical_point(name, q_star=float(q)).kind == "none"
        bias, slope = critical_curve(phi, q)[1], critical_point(name, q_star=float(q)).slope_q
        assert (bias < 0) if why == "negative" else (slope > 1)


@pytest.mark.parametrize("name", ["tanh", "erf", "hard_tanh", "gelu", "silu", "sigmoid"])
def test_critical_points_are_critical(name: str) -> None:
    phi = as_activation(name)
    for q in (0.3, 2.0, 60.0):
        point = critical_point(name, q_star=q)
        if point.kind == "none":
            assert critical_curve(phi, q)[1] < 0 or point.slope_q > 1
            continue
        field = mean_field(phi, point.sigma_w, point.sigma_b)
        assert field.q_star == pytest.approx(q, rel=1e-8)
        assert field.chi == pytest.approx(1, rel=1e-10)
        by_bias = critical_point(name, sigma_b=point.sigma_b)
        if name in ("tanh", "erf", "hard_tanh"):
            assert by_bias.sigma_w == pytest.approx(point.sigma_w, rel=1e-10)


def test_half_stable_points_are_tangential() -> None:
    point = half_stable_point("gelu")
    assert point is not None
    phi = as_activation("gelu")
    weight, q = point.sigma_w**2, point.q_star
    assert weight * slope_moment(phi, q) == pytest.approx(1, rel=1e-12)
    assert weight * length_slope(phi, q) == pytest.approx(1, rel=1e-10)
    # Half-stable: the map stays on one side of the diagonal.
    gaps = [weight * second_moment(phi, x) + point.sigma_b**2 - x for x in (0.98 * q, 1.02 * q)]
    assert np.sign(gaps[0]) == np.sign(gaps[1])


def test_phase_diagram() -> None:
    diagram = phase_diagram("tanh", [0.8, 1.0, 1.3], [0.0, 0.05])
    assert diagram.phase()[0].tolist() == ["ordered", "critical", "chaotic"]
    assert diagram.critical_sigma_w[1] == pytest.approx(1.122539, abs=1e-6)
    q, sigma_w, sigma_b = critical_line("tanh", [0.2, 1.0])
    for point in zip(q, sigma_w, sigma_b, strict=True):
        assert mean_field("tanh", point[1], point[2]).chi == pytest.approx(1, abs=1e-10)
    with pytest.raises(ValueError, match="sigma_b"):
        phase_diagram("tanh", [1.0], [-0.1])


def test_bad_input_critical() -> None:
    with pytest.raises(ValueError, match="at most one"):
        critical_point("tanh", sigma_b=0.1, q_star=1.0)
    with pytest.raises(ValueError, match="q_star"):
        critical_point("tanh", q_star=-1.0)
    assert critical_point("relu", sigma_b=0.1).kind == "none"
    assert "half-stable" in critical_point("gelu", sigma_b=0.0).advice
