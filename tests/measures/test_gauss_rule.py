"""A law on few nodes for one on many."""

from __future__ import annotations

import numpy as np
import pytest

from torch_rmt.measures.gauss_rule import gauss_rule


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_polynomials_up_to_degree_2m_minus_1_are_exact(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=300) + 3.0, rng.exponential(size=300)
    nodes, weights = gauss_rule(x, w, size)
    assert (weights > 0).all()
    assert x.min() < nodes.min()
    assert nodes.max() < x.max()
    scaled, at = (x - x.mean()) / np.ptp(x), (nodes - x.mean()) / np.ptp(x)
    for k in range(2 * size):
        assert weights @ at**k == pytest.approx(w @ scaled**k, rel=1e-11, abs=1e-11 * w.sum() * 0.5**k)
    missed = weights @ at ** (2 * size) - w @ scaled ** (2 * size)
    assert abs(missed) > 1e-12 * w.sum() * 0.5 ** (2 * size), "a Gauss rule is not exact one degree further"


def test_a_law_on_few_points_is_its_own_rule() -> None:
    nodes, weights = gauss_rule(np.array([3.0, -1.0, 3.0, 0.5]), np.array([1.0, 2.0, 1.0, 0.0]), 10)
    assert nodes == pytest.approx([-1.0, 3.0])
    assert weights == pytest.approx([2.0, 2.0])


def test_the_stieltjes_transform_converges_geometrically() -> None:
    x = np.log(np.random.default_rng(0).chisquare(1, size=500))
    w = np.full(500, 1 / 500)
    z = np.array([0.5 + 4.0j, 8.0 + 0.5j])
    truth = (w / (z[:, None] - x)).sum(1)
    errors = []
    for size in (4, 8, 16):
        nodes, weights = gauss_rule(x, w, size)
        errors.append(np.abs((weights / (z[:, None] - nodes)).sum(1) - truth).max())
    assert errors[1] < 0.3 * errors[0]
    assert errors[2] < 0.1 * errors[1]


def test_no_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one node"):
        gauss_rule(np.ones(3), np.ones(3), 0)
