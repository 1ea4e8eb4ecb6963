"""How much the blocks of a model differ in where their curvature lies, on a logarithmic axis."""

from __future__ import annotations

import numpy as np
import pandas as pd

from spectra_db.densities import Array, lattice_densities
from spectra_db.divergence import js_divergences
from spectra_db.jackknife import Blocks, Estimate
from spectra_db.pairs import Divergences, bias_of, js_distance, mean_of_pairs

# Width of the smoothing Gaussian, in decades.
ENERGY_SIGMA = 0.1


def energy_js(rows: pd.DataFrame) -> Estimate:
    """Return the mean Jensen-Shannon distance between the blocks' energy distributions, in [0, 1].

    The energy of a block is tr H²/n = Σ w̄ θ². Its distribution over signs s and magnitudes
    x = log10 |θ| has, from the block's probe-averaged rule (θ, w̄), the density

        p(s, x) = Σ_{i: sign θ_i = s} e_i N(x; log10 |θ_i|, 0.1²),    e_i = w̄_i θ_i² / Σ_j w̄_j θ_j²,

    on {−, +} × ℝ. It is one distribution: the two signs' parts, which never overlap, have mass 1
    together. A node at 0 has no energy and drops out; blocks that are exactly zero are left out.
    With JSD(k, l) = Σ_s ∫ ½ p ln p + ½ q ln q − m ln m dx in nats, m = (p + q)/2,

        E = mean over pairs k < l of √(max(0, JSD̂_kl) / ln 2),

    JSD̂ being corrected for the bias of few probes, and the error found, as of `js0`
    (docs/protocol.md, Error). A divergence is a sum over points 0.1/3 decades apart, the same for
    all blocks, within 0.5 decades of a node.

    There is no scale to choose and no block size: n copies of a spectrum have the distribution of
    one, and a factor common to all blocks shifts all of them alike (up to 1e-4, from the points). A
    factor between two blocks counts, as does a difference in shape. Defined here; no paper has it.

    Args:
        rows: Rows of table `spectra` of one model, stage and partition.

    Raises:
        ValueError: As `js0`.
    """
    blocks = Blocks.of(rows, extend=False)  # as it was fixed in protocol 2
    deletions, count = blocks.deletions, len(blocks)
    rules = [block.average() for block in blocks.blocks]
    rules += [blocks.blocks[k].average(i) for k, i in deletions]
    owners = np.array([*range(count), *(k for k, _ in deletions)], dtype=np.intp)
    _, densities = lattice_densities(_signed_logs(rules), ENERGY_SIGMA)
    found = js_divergences(densities, owners, count)
    full, moved = (found[:count] + found[:count].T) / 2, found[count:]
    bias = bias_of(full, moved, deletions)
    return mean_of_pairs(blocks, Divergences(full, moved, bias, dx=1.0), js_distance)


def _signed_logs(rules: list[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
    """Return per rule the places and masses of its energy, negative nodes apart from positive."""
    # θ² must neither vanish nor overflow.
    top = max(float(np.abs(nodes).max()) for nodes, _ in rules)
    energies = [weights * (nodes / top) ** 2 for nodes, weights in rules]
    kept = [
        (nodes[e > 0], e[e > 0] / e.sum()) for (nodes, _), e in zip(rules, energies, strict=True)
    ]
    logs = [np.log10(np.abs(nodes)) for nodes, _ in kept]
    # Ten widths beyond the range, where windows of 5 widths don't meet.
    apart = max(map(np.max, logs)) - min(map(np.min, logs)) + 20 * ENERGY_SIGMA
    return [
        (np.where(nodes > 0, x, x - apart), e) for x, (nodes, e) in zip(logs, kept, strict=True)
    ]
