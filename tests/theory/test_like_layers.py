"""A deep network of slightly different layers is gathered into few kinds without a visible change of its law."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from torch_rmt.theory import Architecture, factors, jacobian_spectrum
from torch_rmt.theory.like_layers import representative_moments


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("spread", [1e-7, 1e-3, 0.1, 1.0])
def test_the_rule_integrates_low_degrees(seed: int, spread: float) -> None:
    q = 0.3 + spread * np.random.default_rng(seed).random(50)
    rule = representative_moments(tuple(q))
    nodes, counts = (np.array(part) for part in zip(*rule, strict=True))
    assert len(rule) <= 50
    assert (counts > 0).all()
    assert q.min() - 1e-9 <= nodes.min()
    assert nodes.max() <= q.max() + 1e-9
    for degree in range(min(2 * len(rule), 8)):
        assert counts @ np.log1p(nodes) ** degree == pytest.approx((np.log1p(q) ** degree).sum(), rel=1e-12)


def unlike(depth: int, sigma_w: float, seed: int) -> Architecture:
    generator = np.random.default_rng(seed)
    network = Architecture.mlp(depth=depth, width=100, activation="tanh", sigma_w=sigma_w, sigma_b=0.05)
    layers = tuple(
        dataclasses.replace(layer, sigma_w=layer.sigma_w * (1 + 0.005 * generator.standard_normal()))
        for layer in network.layers
    )
    return dataclasses.replace(network, layers=layers, input_second_moment=1.0)


@pytest.mark.parametrize(("depth", "sigma_w", "seed"), [(8, 0.7, 0), (12, 1.1, 1), (12, 1.6, 2)])
def test_the_law_is_that_of_all_layers(depth: int, sigma_w: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each q taken as a kind of its own is the reference; q falls by orders of magnitude along the first network."""
    network = unlike(depth, sigma_w, seed)
    gathered = jacobian_spectrum(network)
    monkeypatch.setattr(factors, "representative_moments", lambda q: factors._counted(list(q)))
    apart = jacobian_spectrum(network)
    levels = [0.2, 0.5, 0.8, 0.99]
    np.testing.assert_allclose(
        np.log(gathered.measure.quantile(levels)), np.log(apart.measure.quantile(levels)), rtol=0, atol=1e-7
    )
    assert gathered.scalars["mean"] == pytest.approx(apart.scalars["mean"], rel=1e-12)
    assert gathered.scalars["variance"] == pytest.approx(apart.scalars["variance"], rel=1e-8)
