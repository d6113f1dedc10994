"""How orthogonal Lanczos vectors still are, foretold from the recurrence's own coefficients."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


class OrthogonalityForecast:
    """Estimates omega_{j,k} = |q_j . q_k| of a Lanczos run without forming a single inner product.

    beta_j omega_{j+1,k} = beta_k omega_{j,k+1} + (alpha_k - alpha_j) omega_{j,k}
                           + beta_{k-1} omega_{j,k-1} - beta_{j-1} omega_{j-1,k} + rounding
    (Simon 1984). Orthogonality kept at the square root of eps makes the Lanczos matrix that of exact
    arithmetic to eps: reorthogonalising two vectors each time omega grows to that leaves no ghosts.
    """

    def __init__(self, probes: int, steps: int, dim: int, eps: float) -> None:
        self.eps = eps
        self.limit = eps**0.5
        self.local = eps * dim**0.5
        # One place of padding on the left, so that k - 1 exists for k = 0.
        self.latest = np.zeros((probes, steps + 3))
        self.earlier = np.zeros((probes, steps + 3))
        self.latest[:, 1] = 1.0
        self.alphas = np.zeros((probes, 0))
        self.betas = np.zeros((probes, 0))
        self.twice = False

    def must_reorthogonalise(self, alpha: Float[np.ndarray, " probes"], beta: Float[np.ndarray, " probes"]) -> bool:
        """Take in alpha_j and beta_j; say whether q_{j+1} is to be made orthogonal to all before it."""
        self.alphas = np.concatenate([self.alphas, alpha[:, None]], axis=1)
        self.betas = np.concatenate([self.betas, beta[:, None]], axis=1)
        seen = self.alphas.shape[1]
        with np.errstate(invalid="ignore", over="ignore"):  # a product that is not finite is told at the end
            self._step(seen - 1)
        lost = float(np.abs(self.latest[:, 1 : seen + 1]).max()) > self.limit
        if lost or self.twice:
            self.latest[:, 1 : seen + 1] = self.local
        self.twice, now = lost, lost or self.twice
        return now

    def _step(self, j: int) -> None:
        alphas, betas, now, before = self.alphas, self.betas, self.latest, self.earlier
        beta = betas[:, j : j + 1]
        alive = beta > 0
        fresh = np.zeros_like(now)
        if j:
            k = np.arange(j)
            below = np.where(k > 0, betas[:, np.maximum(k - 1, 0)], 0.0)
            change = betas[:, k] * now[:, k + 2] + (alphas[:, k] - alphas[:, j : j + 1]) * now[:, k + 1]
            change += below * now[:, k] - betas[:, j - 1 : j] * before[:, k + 1]
            change += np.copysign(self.eps * (betas[:, k] + beta), change)
            fresh[:, k + 1] = np.divide(change, beta, out=np.zeros_like(change), where=alive)
        scale = (np.abs(alphas) + betas).max(axis=1, keepdims=True)
        local = self.local * np.divide(scale, beta, out=np.zeros_like(beta), where=alive)
        fresh[:, j + 1] = np.minimum(local, 1.0)[:, 0]
        fresh[:, j + 2] = 1.0
        self.earlier, self.latest = now, np.where(alive, fresh, 0.0)
