"""Jensen-Shannon divergences between many smoothed spectra at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from spectra_db.density import POINTS_PER_SIGMA, lattice_densities

Array = NDArray[np.float64]

# Lattice points handled at a time: 100 densities of them stay in a core's cache.
_CHUNK = 512


def js_divergences(
    rules: Sequence[tuple[Array, Array]], sigma: float, num_references: int
) -> Array:
    """Return the Jensen-Shannon divergence of every density from each of the first ones, in nats.

    JSD(p, q) = ∫ ½ p ln p + ½ q ln q − m ln m dt with m = (p + q) / 2, in [0, ln 2], for Gaussian
    mixtures p and q. Where only one of them is positive the integrand is ½ ln 2 times it, so that
    points that no other density reaches count by their mass alone.

    Args:
        rules: Scaled (nodes, weights) of each density.
        sigma: Width of the Gaussians.
        num_references: Number K of densities to compare with: the first K.

    Returns:
        Shape (len(rules), K).
    """
    _, densities = lattice_densities(rules, sigma)
    # Densities times σ at points σ/3 apart: sums over points are integrals times 3.
    mass = np.asarray(densities.sum(axis=1)).ravel()
    columns = sparse.csc_array(densities)
    reached = np.diff(sparse.csc_array(densities[:num_references]).indptr)
    everyone = np.diff(columns.indptr)
    shared = np.flatnonzero((reached > 0) & (everyone > 1))
    columns = columns[:, shared]
    apart = mass - np.asarray(columns.sum(axis=1)).ravel()
    total = 0.5 * np.log(2) * (apart[:, None] + apart[None, :num_references])
    np.fill_diagonal(total, 0.0)  # no density lies apart from itself
    for start in range(0, len(shared), _CHUNK):
        total += _chunk(columns[:, start : start + _CHUNK].toarray(), num_references)
    return np.clip(total / POINTS_PER_SIGMA, 0.0, np.log(2))


def _chunk(P: Array, num_references: int) -> Array:
    """Sum the integrand over some lattice points, for P of shape (densities, points)."""
    entropy = _x_log_x(P).sum(axis=1)
    total = np.zeros((len(P), num_references))
    mass = P.sum(axis=1)
    active = np.flatnonzero(mass > 0)
    references = active[active < num_references]
    Q = 0.5 * P[references]
    for d in active:
        cross = _x_log_x(Q + 0.5 * P[d]).sum(axis=1)
        total[d, references] = 0.5 * (entropy[d] + entropy[references]) - cross
    silent = np.ones_like(total, dtype=bool)
    silent[np.ix_(active, references)] = False
    alone = 0.5 * np.log(2) * (mass[:, None] + mass[None, :num_references])
    return np.where(silent, alone, total)


def _x_log_x(x: Array) -> Array:
    """Return x ln x, 0 at 0; a denormal x counts as 0, where logarithms would lose it."""
    return x * np.log(np.maximum(x, np.finfo(np.float64).tiny))
