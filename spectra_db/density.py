"""Spectra of blocks, their scales, and their smoothed densities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import eigh_tridiagonal

Array = NDArray[np.float64]

SCALES = ("lambda10", "raw", "global_max", "own_max", "own_rms")
# Lattice points per width: a sum over a Gaussian at spacing σ/3 is exact to 1e-38, and over the
# entropy of mixtures of them to about 1e-6 (tests/spectra_db/test_divergence.py).
POINTS_PER_SIGMA = 3
# Half-width of a node's window in widths; the mass outside is 6e-7.
_WINDOW = 5
# What identifies one spectrum; rows that differ here belong to different ones.
GROUP = (
    "model",
    "stage",
    "init_seed",
    "train_run",
    "partition",
    "operator",
    "norm_mode",
    "dtype",
    "probe_distribution",
    "batch_hash",
    "protocol_version",
)


@dataclass(frozen=True)
class BlockSpectrum:
    """The rules of one block, one per probe.

    Attributes:
        name: Name of the block.
        num_params: Number of parameters n.
        nodes: Per probe the nodes θ, ascending.
        weights: Per probe the weights, sum 1.
        exact: The one rule is the spectrum itself: no sampling error.
        zero: The block is exactly zero.
        tridiagonals: Per probe (alphas, betas); empty if exact.
        num_products: Products spent on the block.
    """

    name: str
    num_params: int
    nodes: tuple[Array, ...]
    weights: tuple[Array, ...]
    exact: bool
    zero: bool
    tridiagonals: tuple[tuple[Array, Array], ...]
    num_products: int

    def average(self, leave_out: int | None = None) -> tuple[Array, Array]:
        """Return the probe-averaged rule (θ, w̄), without one probe if asked."""
        kept = [i for i in range(len(self.nodes)) if i != leave_out]
        nodes = np.concatenate([self.nodes[i] for i in kept])
        return nodes, np.concatenate([self.weights[i] for i in kept]) / len(kept)

    def truncated(self, fraction: float) -> BlockSpectrum:
        """Return the block as it would be after that fraction of the Lanczos steps."""
        rules = []
        for alphas, betas in self.tridiagonals:
            m = max(1, int(len(alphas) * fraction))
            nodes, vectors = eigh_tridiagonal(alphas[:m], betas[: m - 1])
            rules.append((nodes, vectors[0] ** 2))
        if not rules:
            return self
        nodes, weights = zip(*rules, strict=True)
        return replace(self, nodes=nodes, weights=weights)


def blocks_of(rows: pd.DataFrame) -> list[BlockSpectrum]:
    """Gather rows of table `spectra` into one spectrum per block, in the order of the rows.

    Raises:
        ValueError: No rows, rows of several spectra, or rows without a spectrum (failed, pending).
    """
    if len(rows) == 0:
        raise ValueError("there are no rows; check the filters")
    varying = [c for c in GROUP if c in rows and len(rows[c].unique()) > 1]
    if varying:
        values = "; ".join(f"{c}: {', '.join(map(str, rows[c].unique()[:4]))}" for c in varying)
        raise ValueError(f"the rows are of several spectra ({values}); select one")
    missing = rows[~rows["status"].isin(["ok", "zero"])]
    if len(missing):
        first = missing.iloc[0]
        raise ValueError(
            f"{missing['block'].nunique()} blocks have no spectrum, the first {first['block']!r} "
            f"({first['status']}: {first['reason']}); a metric over the others would be another"
        )
    return [_block(str(name), group) for name, group in rows.groupby("block", sort=False)]


def _block(name: str, group: pd.DataFrame) -> BlockSpectrum:
    exact = bool((group["method"] == "exact").all())
    arrays = {
        column: tuple(np.asarray(v, dtype=np.float64) for v in group[column])
        for column in ("nodes", "weights", "alphas", "betas")
    }
    return BlockSpectrum(
        name=name,
        num_params=int(group["num_params"].iloc[0]),
        nodes=arrays["nodes"],
        weights=arrays["weights"],
        exact=exact,
        zero=bool((group["status"] == "zero").any()),
        tridiagonals=() if exact else tuple(zip(arrays["alphas"], arrays["betas"], strict=True)),
        num_products=int(group["num_products"].sum()),
    )


def lambda10(nodes: Array, weights: Array, num_params: int) -> float:
    """Return the 10th largest |eigenvalue| by mass: the largest t with n Σ_{|θ|≥t} w̄ ≥ 10.

    max |θ| for fewer than 10 parameters or where no t has that mass (docs/protocol.md).
    """
    sizes = np.abs(nodes)
    order = np.argsort(sizes)[::-1]
    mass = num_params * np.cumsum(weights[order])
    # 10 eigenvalues of an exact block have mass 10 up to rounding.
    enough = np.flatnonzero(mass >= 10 * (1 - 1e-9))
    return float(sizes[order[enough[0]]] if len(enough) else sizes[order[0]])


def scale_of(rule: tuple[Array, Array], num_params: int, scale: str, global_max: float) -> float:
    """Return what a block's eigenvalues are divided by, positive."""
    nodes, weights = rule
    if scale == "lambda10":
        value = lambda10(nodes, weights, num_params)
    elif scale == "own_max":
        value = float(np.abs(nodes).max())
    elif scale == "own_rms":
        value = float(np.sqrt(weights @ nodes**2))
    elif scale == "global_max":
        value = global_max
    else:
        value = 1.0
    return value or 1.0


def lattice_densities(
    rules: Sequence[tuple[Array, Array]], sigma: float
) -> tuple[Array, sparse.csr_array]:
    """Evaluate Gaussian mixtures p(t) = Σ w N(t; θ, σ²) on a lattice near the nodes.

    Args:
        rules: Scaled (nodes, weights) of each density.
        sigma: Width σ of the Gaussians.

    Returns:
        The lattice points, shape (G,), ascending, spaced σ/3 where they are neighbours, and the
        densities times σ at them, sparse of shape (len(rules), G). The points are those within
        5 σ of a node of any density.
    """
    half = _WINDOW * POINTS_PER_SIGMA
    offsets = np.arange(-half, half + 1)
    counts = [len(nodes) for nodes, _ in rules]
    nodes = np.concatenate([nodes for nodes, _ in rules]) / sigma * POINTS_PER_SIGMA
    weights = np.concatenate([w for _, w in rules])
    centres = np.rint(nodes).astype(np.int64)
    starts = np.unique(centres) - half
    # The union of the windows: a step up where one starts, down where it ends.
    lattice = np.unique((starts[:, None] + np.arange(2 * half + 1)).ravel())
    first = np.searchsorted(lattice, centres - half)
    distance = (centres - nodes)[:, None] + offsets
    values = np.exp(-0.5 * (distance / POINTS_PER_SIGMA) ** 2)
    values *= weights[:, None] / np.sqrt(2 * np.pi)
    columns = first[:, None] + np.arange(2 * half + 1)
    row_ends = np.cumsum([0, *counts]) * (2 * half + 1)
    shape = (len(rules), len(lattice))
    matrix = sparse.csr_array((values.ravel(), columns.ravel(), row_ends), shape=shape)
    matrix.sum_duplicates()
    return lattice * (sigma / POINTS_PER_SIGMA), matrix


def density(rows: pd.DataFrame, *, scale: str = "lambda10", sigma: float = 0.05) -> pd.DataFrame:
    """Return the smoothed spectral density of each block, averaged over probes.

    p_l(t) = Σ w̄ N(t; θ/s_l, σ²), with s_l the block's scale (docs/protocol.md, Metrics).

    Args:
        rows: Rows of table `spectra` of one spectrum.
        scale: lambda10, raw, global_max, own_max or own_rms.
        sigma: Width of the Gaussian, in units of the scale.

    Returns:
        One column per block; the index is the scaled eigenvalue, spaced σ/3 within 5 σ of the
        nodes of any block, without what lies farther (densities below 4e-6 / σ).

    Raises:
        ValueError: Unknown scale, sigma not positive, or rows of several spectra.
    """
    check_reading(scale, sigma)
    blocks = blocks_of(rows)
    top = global_max(blocks)
    rules = []
    for block in blocks:
        nodes, weights = block.average()
        s = scale_of((nodes, weights), block.num_params, scale, top)
        rules.append((nodes / s, weights))
    x, matrix = lattice_densities(rules, sigma)
    return pd.DataFrame(
        (matrix.toarray() / sigma).T,
        index=pd.Index(x, name="eigenvalue"),
        columns=[b.name for b in blocks],
    )


def global_max(blocks: Sequence[BlockSpectrum]) -> float:
    """Return the largest |node| of all blocks and probes."""
    return max(float(np.abs(nodes).max()) for block in blocks for nodes in block.nodes)


def check_reading(scale: str, sigma: float) -> None:
    """Raise ValueError unless the scale is known and sigma positive."""
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; choose one of {', '.join(SCALES)}")
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma is {sigma}; it must be a positive number")
