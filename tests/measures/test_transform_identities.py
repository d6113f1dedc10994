"""The transforms: what they are, that their inverses invert them, and that closed forms are the general rule."""

from __future__ import annotations

import numpy as np
import pytest

from torch_rmt.measures import (
    Bernoulli,
    FussCatalan,
    MarchenkoPastur,
    PointMass,
    Semicircle,
    SpectralMeasure,
    Uniform,
    eta_transform,
    inverse_m,
    inverse_stieltjes,
    m_transform,
    r_transform,
    s_transform,
)

LAWS = {
    "uniform": Uniform(0.5, 2.0),
    "Marchenko-Pastur": MarchenkoPastur(0.4, 3.0),
    "Bernoulli": Bernoulli(0.3, high=2.0),
    "shifted semicircle": Semicircle(0.5, mean=1.5),
    "Fuss-Catalan": FussCatalan(1.5),
}


@pytest.mark.parametrize("name", LAWS)
def test_definitions_and_inverses(name: str) -> None:
    law = LAWS[name]
    z = law.bounds()[1] * np.array([3.0, -2.0, 1.3 + 0.4j, 1.3 - 0.4j, -1.1 + 0.2j, 60.0 - 9.0j])
    m = z * law.stieltjes(z) - 1
    assert np.allclose(m_transform(law, z), m, rtol=1e-11, atol=0.0)
    assert np.allclose(eta_transform(law, 1 / z), m / (1 + m), rtol=1e-11, atol=0.0)
    assert np.allclose(inverse_stieltjes(law, law.stieltjes(z)), z, rtol=1e-10, atol=0.0)
    assert np.allclose(inverse_m(law, m), z, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("law", [PointMass(2.0), *LAWS.values()], ids=["point", *LAWS])
def test_closed_forms_are_the_general_rule(law: SpectralMeasure) -> None:
    u = np.array([0.0, 0.02, -0.05, 0.03 + 0.04j, 0.03 - 0.04j]) / law.bounds()[1]
    assert np.allclose(r_transform(law, u), r_transform.dispatch(object)(law, u), rtol=1e-11, atol=0.0)
    assert np.allclose(s_transform(law, u), s_transform.dispatch(object)(law, u), rtol=1e-11, atol=0.0)
    assert r_transform(law, 0.0) == pytest.approx(law.mean, rel=1e-13)
    assert s_transform(law, 0.0) == pytest.approx(1 / law.mean, rel=1e-13)


def test_no_mean_no_inverse() -> None:
    with pytest.raises(ValueError, match="mean zero"):
        s_transform(Semicircle(), 0.1)
