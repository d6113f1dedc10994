"""Sizes that make no sense are refused by name. (The laws hand theirs on; a type checker stands before them here.)"""

from __future__ import annotations

import math

import numpy as np
import pytest

from torch_rmt.measures import MarchenkoPastur, PointMass, Semicircle
from torch_rmt.theory import gradient_norm_law, gram_law, largest_eigenvalue_law, spike_in_product, spike_in_sum
from torch_rmt.theory.sizes import checked_widths, one_of, whole_number


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, -math.inf, 2.5, None, "3", True, np.float64("nan"), [3]])
def test_what_is_not_a_size_is_refused_with_its_name(bad: object) -> None:
    with pytest.raises(ValueError, match=r"n_in must be a whole number"):
        whole_number("n_in", bad)
    with pytest.raises(ValueError, match=r"widths \("):
        checked_widths([10, bad])


def test_what_is_a_size_comes_back_as_an_int() -> None:
    for good in (7, 7.0, np.int64(7), np.float32(7)):
        assert whole_number("n", good) == 7
        assert type(whole_number("n", good)) is int
    assert checked_widths(np.array([3, 4])) == (3, 4)
    with pytest.raises(ValueError, match="two"):
        checked_widths([3])
    with pytest.raises(ValueError, match="2"):
        whole_number("depth", 1, least=2)


def test_choices_are_named() -> None:
    one_of("residual", "relu", ("relu", "wigner"))
    with pytest.raises(ValueError, match="relu, wigner"):
        one_of("residual", "goe", ("relu", "wigner"))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_ratios_and_levels_of_the_laws(bad: float) -> None:
    with pytest.raises(ValueError, match="psi"):
        gram_law(1.0, 0.5, psi=bad, phi=1.0)
    with pytest.raises(ValueError, match="phi"):
        gram_law(1.0, 0.5, psi=1.0, phi=bad)
    # a homogeneous activation has no use for q; nonsense is refused all the same
    with pytest.raises(ValueError, match="q is"):
        gradient_norm_law([10, 10], "relu", q=bad)


def test_spikes_and_edges_that_make_no_sense() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"finite|positive"):
            spike_in_sum(Semicircle(), Semicircle(), bad)
        with pytest.raises(ValueError, match=r"finite|positive"):
            spike_in_product(MarchenkoPastur(0.3), MarchenkoPastur(0.3), bad)
    with pytest.raises(ValueError, match="continuous part"):
        largest_eigenvalue_law(PointMass(1.0), 10)
    for bad in (1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="one_in"):
            gradient_norm_law([10, 10], "relu").factor_at_risk(bad)
