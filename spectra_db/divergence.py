"""Distances between many spectra at once: Jensen-Shannon divergence, Wasserstein-1 distance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy
from numpy.typing import NDArray

from spectra_db.densities import POINTS_PER_SIGMA, Array

# Lattice points handled at a time: as measured on models of 40 blocks.
_CHUNK = 1024
# Below it halves are denormal, which logarithms lose.
_LEAST = 4 * np.finfo(np.float64).tiny
# Step of the Wasserstein grid in asinh(θ / core): 2 % of θ away from the core.
_W1_SPACING = 0.02
_W1_EXACT = 4096


def js_divergences(
    densities: scipy.sparse.csr_array, owners: NDArray[np.intp], num_references: int
) -> Array:
    """Return the Jensen-Shannon divergence of every density from each of the first ones, in nats.

    JSD(p, q) = ∫ ½ p ln p + ½ q ln q − m ln m dt with m = (p + q) / 2, in [0, ln 2]. Where only
    one of p and q is positive the integrand is ½ ln 2 times it, so that points that no other
    block reaches count by their mass alone.

    Args:
        densities: Densities times σ at points σ/3 apart, as `lattice_densities` gives them.
        owners: Per density the index of the reference that it is a version of; the first K
            densities are the references, of owners 0 ... K − 1.
        num_references: Number K of references.

    Returns:
        Shape (len(owners), K); 0 between a density and its owner's reference.
    """
    # Sums over points σ/3 apart of densities times σ are integrals times 3.
    mass = np.asarray(densities.sum(axis=1)).ravel()
    columns = scipy.sparse.csc_array(densities)
    # A point is shared if densities of two owners reach it: at others all has one owner.
    owner = owners[columns.indices]
    point = np.repeat(np.arange(columns.shape[1]), np.diff(columns.indptr))
    low = np.full(columns.shape[1], np.iinfo(np.int64).max)
    high = np.full(columns.shape[1], -1)
    np.minimum.at(low, point, owner)
    np.maximum.at(high, point, owner)
    columns = columns[:, np.flatnonzero(low < high)]
    total = 0.5 * np.log(2) * (mass[:, None] + mass[None, :num_references])
    for start in range(0, columns.shape[1], _CHUNK):
        _add_chunk(total, columns[:, start : start + _CHUNK].toarray())
    total[np.arange(len(owners)), owners] = 0.0
    return np.clip(total / POINTS_PER_SIGMA, 0.0, np.log(2))


def _add_chunk(total: Array, P: Array) -> None:
    """Replace what points that only one density reaches would count by the integrand itself.

    Args:
        total: Sums so far, shape (densities, references); changed in place.
        P: Densities at some lattice points, shape (densities, points).
    """
    positive = P > _LEAST
    densities, points = np.nonzero(positive)
    # Per density: its part of the integrand less what it counts where it is alone.
    p, own = P[densities, points], np.zeros_like(P)
    own[densities, points] = 0.5 * p * (np.log(p) - np.log(2))
    active = np.flatnonzero(positive.any(axis=1))
    references = active[active < total.shape[1]]
    # Where a density is 0 the reference is alone, and nothing is replaced.
    beside = positive.astype(np.float64) @ own[references].T
    half = np.ascontiguousarray(0.5 * P.T)
    Q = np.ascontiguousarray(half[:, references])
    for d in active:
        at = np.flatnonzero(positive[d])
        m = Q.take(at, axis=0)
        m += half[at, d, None]
        cross = np.einsum("gk,gk->k", m, np.log(m))
        total[d, references] += own[d].sum() + beside[d] - cross


def w1_distances(
    rules: Sequence[tuple[Array, Array]], owners: NDArray[np.intp], num_references: int
) -> Array:
    """Return Wasserstein-1 distances ∫ |F − G| dt of every rule from each of the first ones.

    Exact for up to 4,096 nodes. More are put on a grid that is asinh-spaced, 2 % at large |θ|: a
    node's weight is shared between its two neighbours so that its mean stays, which leaves an
    error below 1e-3 of the distance between spectra of networks.

    Args:
        rules: (nodes, weights) of each spectrum.
        owners: As in `js_divergences`.
        num_references: Number K of references.

    Returns:
        Shape (len(rules), K); 0 between a rule and its owner's reference.
    """
    nodes = np.concatenate([nodes for nodes, _ in rules])
    weights = np.concatenate([w for _, w in rules])
    grid = np.unique(nodes)
    if len(grid) > _W1_EXACT or len(grid) == 1:
        core = 0.02 * float(weights @ np.abs(nodes)) / len(rules) or 1.0
        ends = np.arcsinh(grid[[0, -1]] / core) / _W1_SPACING
        grid = core * np.sinh(np.arange(np.floor(ends[0]), np.ceil(ends[1]) + 2) * _W1_SPACING)
    left = np.clip(np.searchsorted(grid, nodes, side="right") - 1, 0, len(grid) - 2)
    share = np.clip((nodes - grid[left]) / (grid[left + 1] - grid[left]), 0.0, 1.0)
    row = np.repeat(np.arange(len(rules)), [len(nodes) for nodes, _ in rules]) * len(grid)
    mass = np.bincount(row + left, weights * (1 - share), minlength=len(rules) * len(grid))
    mass += np.bincount(row + left + 1, weights * share, minlength=len(rules) * len(grid))
    F = np.cumsum(mass.reshape(len(rules), len(grid)), axis=1)[:, :-1]
    width = np.diff(grid)
    distances = np.stack([np.abs(F - F[k]) @ width for k in range(num_references)], axis=1)
    distances[np.arange(len(owners)), owners] = 0.0
    return distances
