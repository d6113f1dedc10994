"""The spherical p-spin glass, the model of loss surfaces of Choromanska et al. 2015."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.optimize import brentq

from torch_rmt.measures import Semicircle
from torch_rmt.theory.expected_error import rigid_error
from torch_rmt.theory.prediction import Prediction
from torch_rmt.theory.sizes import whole_number


@dataclass(frozen=True)
class SphericalSpinGlass:
    """H(x) = N^(-(p-1)/2) sum of J_(i1..ip) x_i1 ... x_ip on the sphere |x|^2 = N, J standard Gaussian; p >= 3.

    Energies are per spin, u = H/N. The expected number of critical points of energy at most N u grows as
    exp(N complexity(u)); those with k negative directions as exp(N complexity(u, index=k)). Below the threshold
    -E_inf only low indices occur, arranged in bands between -E_0 and -E_inf: minima alone, then minima and saddles of
    index one, and so on. Above it critical points have a positive fraction of negative directions.

    Source: Auffinger, Ben Arous and Cerny 2013, Theorems 2.1, 2.5 and 2.8; Choromanska et al. 2015.

    >>> glass = SphericalSpinGlass(3)
    >>> round(glass.ground_state_energy, 7), round(glass.threshold_energy, 7)
    (1.6569984, 1.6329932)
    """

    p: int

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, int) or self.p < 3:
            raise ValueError(
                f"p, the number of spins in a term (layers), must be an integer of at least 3, got {self.p}; at p = 2 "
                "the critical points are the eigenvectors of a GOE matrix"
            )

    @classmethod
    def of_relu_network(cls, depth: int) -> SphericalSpinGlass:
        """The model of a ReLU network with `depth` layers of weights: p = depth spins, one weight a layer on each path.

        Holds under assumptions that no real network meets; see `assumptions`.
        """
        if whole_number("depth", depth) < 3:
            raise ValueError(f"a network of {depth} layers maps to a p = {depth} spin model; the theory needs p >= 3")
        return cls(whole_number("depth", depth))

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the map from a network takes for granted (Choromanska et al. 2015, section 3)."""
        return (
            "fully connected, no biases, ReLU; each path is active equally often, independently of the input",
            "the input along each path is an independent standard Gaussian",
            "weights are reused uniformly over the paths (redundancy), and as many distinct weights as spins N",
            "the weights lie on a sphere, of radius sqrt(N)",
            "absolute or hinge loss",
        )

    @property
    def threshold_energy(self) -> float:
        """E_inf = 2 sqrt((p - 1)/p): critical points of finite index lie below -E_inf."""
        return 2.0 * float(np.sqrt((self.p - 1.0) / self.p))

    @cached_property
    def ground_state_energy(self) -> float:
        """E_0: minus the lowest energy per spin, the zero of the complexity of minima below -E_inf."""
        return self.band_edge(0)

    def band_edge(self, index: int) -> float:
        """E_k: below -E_k there are no critical points of index k; E_0 > E_1 > ... -> E_inf."""
        index = _checked_index(index)
        top = self.threshold_energy
        # at k the first term, at most log(p - 1)/2, must fall to zero: by 3 E_inf + 3 it has for every k >= 0
        root = brentq(lambda e: float(self.complexity(np.array(-e), index=index)), top, 3.0 * top + 3.0, xtol=1e-15)
        return float(root)

    def complexity(self, u: ArrayLike, *, index: int | None = None) -> Float[np.ndarray, "..."]:
        """Exponential rate, per spin, of the expected number of critical points of energy at most N u.

        With e = E_inf, I(u) = -(u sqrt(u^2 - e^2))/e^2 - log((-u + sqrt(u^2 - e^2))/e) for u <= -e:
        theta_k(u) = log(p - 1)/2 - (p - 2) u^2/(4 (p - 1)) - (k + 1) I(u) for u <= -e and constant beyond;
        all indices together: theta_0 for u <= -e, the same without I for -e <= u <= 0, log(p - 1)/2 for u >= 0.

        Args:
            u: energy per spin, scalar or array.
            index: number of negative directions; None counts all critical points. Negative values mean: none expected.
        """
        point = np.asarray(u, dtype=float)
        e = self.threshold_energy
        if index is None:
            return np.asarray(
                self._rate(np.asarray(np.minimum(point, 0.0))) - self._cost(np.asarray(np.minimum(point, -e)))
            )
        index = _checked_index(index)
        below = np.asarray(np.minimum(point, -e))
        return np.asarray(self._rate(below) - (index + 1.0) * self._cost(below))

    def complexity_at_fraction(self, u: ArrayLike, fraction: float) -> Float[np.ndarray, "..."]:
        """Rate of the number of critical points of energy at most N u of which a fraction of the directions falls.

        Their energy concentrates at u_f = -E_inf s, s the point of the semicircle on [-1, 1] with mass `fraction`
        above it.
        """
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"fraction lies strictly between 0 and 1, got {fraction}; at 0 use complexity(u, index=0)")
        at = -self.threshold_energy * float(Semicircle(variance=0.25).quantile(np.array(1.0 - fraction)))
        point = np.asarray(u, dtype=float)
        return np.asarray(np.where(point < at, -np.inf, self._rate(np.full(point.shape, at))))

    def _rate(self, u: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        return np.asarray(0.5 * np.log(self.p - 1.0) - (self.p - 2.0) / (4.0 * (self.p - 1.0)) * u**2)

    def _cost(self, u: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """I(u) = (2/e^2) times the integral of sqrt(z^2 - e^2) from e to -u: one eigenvalue held beyond the edge."""
        e = self.threshold_energy
        x = np.maximum(-u / e, 1.0)
        return np.asarray(x * np.sqrt(x**2 - 1.0) - np.arccosh(x))

    def hessian_law(self, u: float) -> Semicircle:
        """Limit law of the Riemannian Hessian of H at a point of energy N u: GOE of variance p (p - 1), shifted by -p
        u."""
        return Semicircle(variance=float(self.p * (self.p - 1)), mean=-self.p * float(u))

    def hessian_spectrum(self, u: float, *, dim: int | None = None) -> Prediction:
        """Predict the spectrum of the Riemannian Hessian of H at a point of energy N u.

        Args:
            u: energy per spin; 0 is that of a point drawn at random.
            dim: N - 1, the number of eigenvalues, if known: for the expected finite-size error.

        Returns:
            Prediction with scalars "index", "mean", "smallest_eigenvalue" and "largest_eigenvalue".

        Raises:
            ValueError: u not finite, dim not a whole number of at least 1.

        >>> round(SphericalSpinGlass(3).hessian_spectrum(0.0, dim=99).scalars["index"], 12)
        0.5
        """
        if not np.isfinite(u):
            raise ValueError(f"u is an energy per spin and must be finite, got {u}")
        law = self.hessian_law(u)
        low, high = law.bounds()
        return Prediction(
            measure=law,
            scalars={
                "index": self.index_fraction(u),
                "mean": law.mean,
                "smallest_eigenvalue": low,
                "largest_eigenvalue": high,
            },
            assumptions=(
                f"independent Gaussian couplings of {self.p} spins each, many spins, on the sphere of radius sqrt(N)",
                f"one point of energy {u:g} a spin, drawn at random among those (critical or not)",
            ),
            reference="Auffinger, Ben Arous and Cerny 2013, Lemma 3.2",
            finite_size_error=None if dim is None else rigid_error(whole_number("dim", dim)),
        )

    def index_fraction(self, u: float) -> float:
        """Fraction of falling directions at a critical point of energy N u: the Hessian's mass below zero."""
        return float(self.hessian_law(u).cdf(np.array(0.0)))

    def expected_energy_of_index(self, fraction: float) -> float:
        """Energy per spin at which critical points with this fraction of falling directions concentrate."""
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fraction lies between 0 and 1, got {fraction}")
        return -self.threshold_energy * float(Semicircle(variance=0.25).quantile(np.array(1.0 - fraction)))

    def bands(self, count: int = 5) -> tuple[tuple[float, float, int], ...]:
        """The layered picture: (low, high, k) such that between these energies no index above k occurs.

        The last band ends at -E_inf, where the indices are unbounded.

        >>> [k for _, _, k in SphericalSpinGlass(3).bands(3)]
        [0, 1, 2]
        """
        count = whole_number("count", count)
        edges = [-self.band_edge(k) for k in range(count + 1)]
        return tuple((edges[k], edges[k + 1], k) for k in range(count))

    def verdict(self, u: float) -> str:
        """What an energy per spin says of the critical points found there."""
        if u < -self.ground_state_energy:
            return "below the ground state: no configuration is expected here"
        if u < -self.threshold_energy:
            highest = 0
            while highest < 1000 and u >= -self.band_edge(highest + 1):
                highest += 1
            return f"low-energy band: local minima and saddles of index at most {highest}"
        return f"above the threshold: saddles, about {self.index_fraction(u):.1%} of the directions fall"


def _checked_index(index: int) -> int:
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise ValueError(f"index is a number of negative directions, an integer of at least 0, got {index}")
    return index
