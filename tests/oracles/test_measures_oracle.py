"""Our laws against those of other people's libraries."""

from __future__ import annotations

import numpy as np
import pytest

from torch_rmt.measures import (
    Discrete,
    MarchenkoPastur,
    Semicircle,
    SpectralMeasure,
    free_add,
    free_compress,
    free_mul,
)

POINTS = np.array([-1.3, 0.31, 0.9, 1.7, 2.9, 4.1]) + 1j * np.array([0.02, 0.3, 0.001, 0.1, 0.01, 1.0])


def nearest_root(polynomial: object, z: complex, value: complex) -> float:
    """Distance from a value of m = -G to the nearest root of L(m, z) = 0."""
    import sympy
    from rmtool import symbols

    row = sympy.Poly(polynomial.subs(symbols.z, sympy.nsimplify(z, rational=True)), symbols.m)  # type: ignore[attr-defined]
    roots = np.roots([complex(c) for c in row.all_coeffs()])
    return float(np.min(np.abs(roots - value)))


@pytest.mark.parametrize("name", ["sum of atoms", "sum with a Wishart", "product", "corner", "sum with a semicircle"])
def test_the_algebraic_curve_of_rmtool_passes_through_our_values(name: str) -> None:
    rmtool = pytest.importorskip("rmtool", reason="rmtool (PyPI) is not installed")
    import sympy

    half = sympy.Rational(1, 2)
    atoms = rmtool.atomLmz([0, 2, 3], [half, sympy.Rational(1, 4), sympy.Rational(1, 4)])
    three = Discrete([0.0, 2.0, 3.0], [0.5, 0.25, 0.25])
    wishart, semicircle = rmtool.wishartpol(half), rmtool.wignerpol()
    made: dict[str, tuple[object, SpectralMeasure]] = {
        "sum of atoms": (
            rmtool.AplusB(atoms, rmtool.atomLmz([-1, 1], [half, half])),
            free_add(three, Discrete([-1, 1])),
        ),
        "sum with a Wishart": (rmtool.AplusB(atoms, wishart), free_add(three, MarchenkoPastur(0.5))),
        "product": (rmtool.AtimesB(atoms, wishart), free_mul(three, MarchenkoPastur(0.5))),
        "corner": (rmtool.compressA(atoms, sympy.Rational(3, 5)), free_compress(three, 0.6)),
        "sum with a semicircle": (rmtool.AplusB(atoms, semicircle), free_add(three, Semicircle())),
    }
    polynomial, law = made[name]
    values = -law.stieltjes(POINTS)
    for z, value in zip(POINTS.tolist(), values.tolist(), strict=True):
        assert nearest_root(polynomial, z, value) < 1e-9 * max(1.0, abs(value))


def test_marchenko_pastur_and_kesten_mckay_of_freealg() -> None:
    freealg = pytest.importorskip("freealg", reason="freealg (PyPI) is not installed")
    from torch_rmt.measures import KestenMcKay

    laws = pytest.importorskip("freealg.distributions", reason="freealg without distributions")
    assert freealg is not None
    pairs = [(laws.MarchenkoPastur(0.5), MarchenkoPastur(0.5)), (laws.KestenMcKay(3.0), KestenMcKay(3.0))]
    for theirs, ours in pairs:
        low, high = ours.bounds()
        x = np.linspace(low, high, 41)[1:-1]
        assert np.allclose(np.ravel(theirs.density(x)), ours.density(x), rtol=1e-10, atol=1e-12)
