"""The rules for far arguments under the transformations of a law."""

from __future__ import annotations

import numpy as np
import pytest

from torch_rmt.theory import as_activation
from torch_rmt.theory.far_slopes import FarNodeLaw, far_slope_law
from torch_rmt.theory.slope_law import slope_law


@pytest.mark.parametrize(("factor", "drop"), [(1.0, 0.0), (3.0, 0.0), (0.2, 0.3)])
@pytest.mark.parametrize("activation", ["gelu", "tanh", "elu"])
def test_scaled_and_thinned_laws_keep_their_rules(activation: str, factor: float, drop: float) -> None:
    """On the real axis, where residual blocks ask, against all nodes of the path."""
    phi = as_activation(activation)
    law = far_slope_law(phi, 0.9, order=14).thinned(drop).scaled(factor)
    full = slope_law(phi, 0.9, order=14).thinned(drop).scaled(factor)
    assert isinstance(law, FarNodeLaw)
    top = max(high for _, high in law.ranges)
    distance = np.geomspace(1e-3, 1e4, 60)
    w = np.concatenate([top * (1.0 + distance), -top * distance]).astype(complex)
    assert (law._sizes(w) < 3).sum() > 40
    for mine, all_nodes in zip(law.transform(w), full.transform(w), strict=True):
        np.testing.assert_allclose(mine, all_nodes, rtol=1e-9)
    np.testing.assert_allclose(law.mean_log(w).real, full.mean_log(w).real, rtol=1e-9)
    assert law.transform(w[:0])[0].shape == (0,)
