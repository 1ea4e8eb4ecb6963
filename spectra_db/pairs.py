"""Divergences between all pairs of blocks, without each probe in turn, and their mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from spectra_db.densities import Array, check_reading, lattice_densities
from spectra_db.divergence import js_divergences
from spectra_db.jackknife import Blocks, Estimate

# The paper's grid: 50,000 points over [min − 1, max + 1], summed without dx.
_PAPER_POINTS = 50_000


@dataclass(frozen=True)
class Divergences:
    """All divergences that a Jensen-Shannon metric and its jackknife need.

    Attributes:
        full: Shape (K, K), all probes.
        moved: Shape (D, K): block k without probe i, its scale that of the probes that are left,
            against every block, in the order of `Blocks.deletions`.
        bias: Shape (K, K): row k is what sampling block k adds to its divergence from each block;
            zero where the errors are not known.
        dx: Step of the paper's grid.
    """

    full: Array
    moved: Array
    bias: Array
    dx: float

    @property
    def corrected(self) -> Array:
        """JSD̂_kl = JSD_kl − b_kl − b_lk, shape (K, K)."""
        return self.full - self.bias - self.bias.T

    @classmethod
    def of(cls, blocks: Blocks, scale: str, sigma: float) -> Divergences:
        """Compute them; densities are linear in the probes, so each probe's is made only once.

        Raises:
            ValueError: Unknown scale or sigma not positive.
        """
        check_reading(scale, sigma)
        deletions, count = blocks.deletions, len(blocks)
        scales = blocks.scales(scale)
        moved = blocks.moved_scales(scale, scales)
        scaled = [(k, n / scales[k], w) for k, b in enumerate(blocks.blocks) for n, w in b.rules]
        rules = [(nodes, weights) for _, nodes, weights in scaled]
        # A scale that does not move leaves the density as it is without moving.
        moves = [d for d, (k, _) in enumerate(deletions) if moved[d] != scales[k]]
        for d in moves:
            k, i = deletions[d]
            nodes, weights = blocks.blocks[k].average(i)
            rules.append((nodes / moved[d], weights))
        _, densities = lattice_densities(rules, sigma)
        per_probe, after = densities[: len(scaled)], densities[len(scaled) :]
        mix = _mixtures([k for k, _, _ in scaled], deletions)
        stacked = scipy.sparse.vstack([mix @ per_probe, after], format="csr")
        owners = np.array([*range(count), *(k for k, _ in deletions)], dtype=np.intp)
        owners = np.append(owners, owners[count:][moves])
        all_of_them = js_divergences(stacked, owners, count)
        full, fixed = all_of_them[:count], all_of_them[count : count + len(deletions)]
        left_out = fixed.copy()
        left_out[moves] = all_of_them[count + len(deletions) :]
        full = (full + full.T) / 2
        bias = bias_of(full, fixed, deletions)
        ends = [(nodes.min(), nodes.max()) for nodes, _ in rules[: len(scaled)]]
        span = max(high for _, high in ends) - min(low for low, _ in ends)
        return cls(full, left_out, bias, float(span + 2) / _PAPER_POINTS)


def bias_of(full: Array, fixed: Array, deletions: Sequence[tuple[int, int]]) -> Array:
    """Return b_kl = (P − 1) (mean_i JSD(k without i, l) − JSD(k, l)), `fixed` without i: (D, K)."""
    bias, owners = np.zeros_like(full), np.array([k for k, _ in deletions])
    for k in np.unique(owners):
        mine = fixed[owners == k]
        bias[k] = (len(mine) - 1) * (mine.mean(axis=0) - full[k])
    return bias


def _mixtures(owners: list[int], deletions: list[tuple[int, int]]) -> scipy.sparse.csr_array:
    """Return the matrix that makes, of the probes' densities, the blocks' and the deletions'."""
    owner = np.array(owners)
    starts = np.searchsorted(owner, np.arange(owner[-1] + 1))
    counts = np.bincount(owner)
    rows: list[tuple[int, int, int | None]] = [(starts[k], k, None) for k in range(len(counts))]
    rows += [(starts[k], k, i) for k, i in deletions]
    columns, values, ends = [], [], [0]
    for start, k, left_out in rows:
        kept = [start + j for j in range(counts[k]) if j != left_out]
        columns += kept
        values += [1 / len(kept)] * len(kept)
        ends.append(len(columns))
    return scipy.sparse.csr_array((values, columns, ends), shape=(len(rows), len(owner)))


def mean_of_pairs(blocks: Blocks, d: Divergences, transform: Callable[[Array], Array]) -> Estimate:
    """Average a transform of the corrected divergences over pairs, with its jackknife error.

    The correction is applied to the divergence, not to its square root, which is not smooth at
    zero: JSD̂_kl = JSD_kl − b_kl − b_lk, b_kl being (P − 1) (mean_i JSD_kl without probe i of k −
    JSD_kl), at the scales of all probes: what λ10 adds by jumping between nodes would be magnified
    P − 1 times. For the standard error probe i of block k is left out of the whole chain, scale
    included. Its pairs are then averages over P − 1 probes, whose bias is P / (P − 1) times as
    large.
    """
    upper = np.triu_indices(len(blocks), 1)
    pairs = len(upper[0])
    value = float(transform(d.full)[upper].mean())
    pair_values = transform(d.corrected)
    np.fill_diagonal(pair_values, 0.0)
    mean = float(pair_values[upper].mean())
    changed = []
    for (k, _), row in zip(blocks.deletions, d.moved, strict=True):
        num_probes = len(blocks.blocks[k].rules)
        new = transform(row - d.bias[k] * num_probes / (num_probes - 1) - d.bias[:, k])
        new[k] = 0.0
        changed.append(mean + float((new - pair_values[k]).sum()) / pairs)
    return blocks.estimate(value, mean, changed)


def js_distance(divergence: Array) -> Array:
    """Return √(max(0, JSD) / ln 2), in [0, 1]."""
    return np.sqrt(np.clip(divergence, 0.0, np.log(2)) / np.log(2))
