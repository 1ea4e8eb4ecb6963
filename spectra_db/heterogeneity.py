"""How much the blocks of a model differ: distances between them and metrics, with their errors."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scipy

from spectra_db.densities import SCALES, Array, BlockSpectrum, check_reading, lattice_densities
from spectra_db.divergence import js_divergences, w1_distances
from spectra_db.jackknife import Blocks, Estimate

# Widths of the two readings: ours, the paper's; raw eigenvalues take the authors' code's σ² = 1e-5.
SIGMA, PAPER_SIGMA, RAW_SIGMA = 0.05, 0.01, 1e-5**0.5
# (metric, scale, σ) of every reading of the Jensen-Shannon metrics; the first is the metric.
READINGS = tuple(
    (metric, scale, RAW_SIGMA if scale == "raw" else sigma)
    for metric, sigma in (("js0", SIGMA), ("js0_paper", PAPER_SIGMA))
    for scale in SCALES
)
# The paper's grid: 50,000 points over [min − 1, max + 1], summed without dx.
_PAPER_POINTS = 50_000
# The truncation error compares with a rule of three quarters of the steps.
TRUNCATION = 0.75


def js0(rows: pd.DataFrame, *, scale: str = "lambda10", sigma: float = SIGMA) -> Estimate:
    """Return the mean Jensen-Shannon distance between the spectra of the blocks, in [0, 1].

    js0 = mean over pairs k < l of √(max(0, JSD̂_kl) / ln 2), with JSD̂ the divergence between the
    smoothed densities, corrected for the bias of few probes (docs/protocol.md, Metrics). The
    metric is that of Zhang et al. (arXiv 2402.16788, section 2.2), normalised.

    Args:
        rows: Rows of table `spectra` of one model, stage and partition.
        scale: lambda10, raw, global_max, own_max or own_rms: what each block's eigenvalues are
            divided by.
        sigma: Width of the smoothing Gaussian, in units of the scale.

    Raises:
        ValueError: Unknown scale, rows of several spectra or of failed blocks, or fewer than two
            blocks that are not zero.
    """
    blocks = Blocks.of(rows)
    return _js_estimate(blocks, _Divergences.of(blocks, scale, sigma), _distance)


def js0_paper(
    rows: pd.DataFrame, *, scale: str = "lambda10", sigma: float = PAPER_SIGMA
) -> Estimate:
    """Return our reading of the paper's unnormalised JS⁰: the mean of JSD / dx over pairs.

    dx = (max − min + 2) / 50,000 over the scaled nodes of all blocks (docs/protocol.md, Metrics).

    Args:
        rows: As `js0`.
        scale: As `js0`.
        sigma: As `js0`.

    Raises:
        ValueError: As `js0`.
    """
    blocks = Blocks.of(rows)
    return _js_paper(blocks, _Divergences.of(blocks, scale, sigma))


def pairwise_js(
    rows: pd.DataFrame, *, scale: str = "lambda10", sigma: float = SIGMA
) -> pd.DataFrame:
    """Return the matrix of corrected Jensen-Shannon distances √(JSD̂ / ln 2) between blocks.

    Square, with the names of the blocks that are not zero as index and columns; the plug-in
    distances where a block has fewer than 3 probes.

    Args:
        rows: As `js0`.
        scale: As `js0`.
        sigma: As `js0`.

    Raises:
        ValueError: As `js0`.
    """
    blocks = Blocks.of(rows)
    distances = _distance(_Divergences.of(blocks, scale, sigma).corrected)
    names = [b.name for b in blocks.blocks]
    return pd.DataFrame(distances, index=names, columns=names)


def spread(rows: pd.DataFrame, statistic: str) -> Estimate:
    """Return the standard deviation over blocks of log10 of a statistic of the spectrum.

    The first two moments need one product per probe, v·Hv and |Hv|², which the coefficients of
    the first Lanczos step have (Golub & Meurant 2010, chapter 6); `num_products` says so.

    Args:
        rows: Rows of table `spectra` of one model, stage and partition.
        statistic: lambda_rms (√(Σ w̄ θ²)), lambda_max (largest |θ|) or trace (|Σ w̄ θ|).

    Raises:
        ValueError: As `js0`, or the statistic is unknown.
    """
    if statistic not in _STATISTICS:
        raise ValueError(f"unknown statistic {statistic!r}; choose one of {', '.join(_STATISTICS)}")
    return _spread(Blocks.of(rows), statistic)


def w1(rows: pd.DataFrame, *, scale: str = "lambda10") -> Estimate:
    """Return the mean pairwise Wasserstein-1 distance between scaled spectra.

    Args:
        rows: As `js0`.
        scale: As `js0`.

    Raises:
        ValueError: As `js0`.
    """
    return _w1(Blocks.of(rows), scale)


def measure(rows: pd.DataFrame, metric: str) -> tuple[Estimate, float]:
    """Return a metric at its first reading, and its truncation error.

    That is how much the last quarter of the steps changed the plug-in value.

    Args:
        rows: Rows of table `spectra` of one model, stage and partition.
        metric: One of SPECTRUM_METRICS.

    Raises:
        ValueError: As `js0`.
    """
    blocks = Blocks.of(rows)
    full, short = (_measure(b, metric) for b in (blocks, blocks.truncated(TRUNCATION)))
    return full, abs(short.value - full.value)


def metrics(
    rows: pd.DataFrame,
    *,
    block_rows: pd.DataFrame | None = None,
    names: Collection[str] | None = None,
) -> pd.DataFrame:
    """Return every metric that follows from a spectrum, as rows of table `heterogeneity`.

    js0 and js0_paper for each scale (raw eigenvalues with σ = √1e-5, as in the authors' code),
    w1, and the spreads of rms and largest eigenvalue and of the trace. The truncation error is
    the change of the plug-in value against rules of three quarters of the steps. The batch error
    needs spectra of both halves of the batch: the column is left null.

    Args:
        rows: Rows of table `spectra` of one model, stage and partition.
        block_rows: Rows of table `blocks` of the same blocks, for `gradient_rms_spread`.
        names: The metrics to return, for a spectrum that is too short for others; None: all.

    Raises:
        ValueError: As `js0`.
    """
    blocks = Blocks.of(rows)
    shorter = blocks.truncated(TRUNCATION)
    columns = ("model", "stage", "init_seed", "train_run", "partition", "protocol_version")
    identity = {c: rows.iloc[0][c] for c in columns if c in rows}
    table = []

    def add(metric: str, scale: str, sigma: float, full: Estimate, short: float) -> None:
        found = {
            "value": full.value,
            "corrected": full.corrected,
            "standard_error": full.standard_error,
            "truncation_error": abs(short - full.value),
            "batch_error": None,
            "num_blocks": full.num_blocks,
            "num_zero_blocks": full.num_zero_blocks,
            "num_products": full.num_products,
            "batch_size": int(rows["batch_size"].iloc[0]) if "batch_size" in rows else None,
        }
        table.append(identity | {"metric": metric, "scale": scale, "sigma": sigma} | found)

    divergences: dict[tuple[str, float], tuple[_Divergences, _Divergences]] = {}
    for metric, scale, sigma in READINGS:
        if names is not None and metric not in names:
            continue
        if (scale, sigma) not in divergences:
            pair = tuple(_Divergences.of(b, scale, sigma) for b in (blocks, shorter))
            divergences[scale, sigma] = (pair[0], pair[1])
        full, short = divergences[scale, sigma]
        if metric == "js0":
            both = (_js_estimate(blocks, full, _distance), _js_estimate(shorter, short, _distance))
        else:
            both = (_js_paper(blocks, full), _js_paper(shorter, short))
        add(metric, scale, sigma, both[0], both[1].value)
    for metric in SPECTRUM_METRICS:
        if not metric.startswith("js0") and (names is None or metric in names):
            scale = "lambda10" if metric == "w1" else "none"
            add(metric, scale, 0.0, _measure(blocks, metric), _measure(shorter, metric).value)
    if block_rows is not None:
        found = gradient_rms_spread(block_rows, [b.name for b in blocks.blocks])
        add("gradient_rms_spread", "none", 0.0, found, found.value)
        table[-1]["num_zero_blocks"] = blocks.num_zero_blocks
    return pd.DataFrame(table)


def gradient_rms_spread(block_rows: pd.DataFrame, names: list[str]) -> Estimate:
    """Return the standard deviation over blocks of log10 of the gradient's rms.

    One gradient on the Hessian's batch: no sampling error and no Hessian-vector products.

    Args:
        block_rows: Rows of table `blocks` of one model and stage.
        names: The blocks to take; those without a gradient (exactly 0) are left out.

    Raises:
        ValueError: A block has no row, or fewer than two have a gradient.
    """
    sizes = block_rows.drop_duplicates("block").set_index("block")["gradient_rms"]
    missing = [name for name in names if name not in sizes.index]
    if missing:
        raise ValueError(f"table blocks has no row of {missing[0]!r}")
    values = sizes.loc[names].dropna().to_numpy(dtype=np.float64)
    positive = values[values > 0]
    if len(positive) < 2:
        raise ValueError(f"{len(positive)} blocks have a gradient; a spread needs at least two")
    value = float(np.log10(positive).std())
    return Estimate(value, value, 0.0, float("inf"), len(positive), 0, 0)


@dataclass(frozen=True)
class _Divergences:
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
    def of(cls, blocks: Blocks, scale: str, sigma: float) -> _Divergences:
        """Compute them; densities are linear in the probes, so each probe's is made only once.

        Raises:
            ValueError: Unknown scale or sigma not positive.
        """
        check_reading(scale, sigma)
        deletions, count = blocks.deletions, len(blocks)
        scales = blocks.scales(scale)
        moved = blocks.moved_scales(scale, scales)
        scaled = [(k, n / scales[k], w) for k, b in enumerate(blocks.blocks) for n, w in _probes(b)]
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
        bias = np.zeros((count, count))
        of_deletion = owners[count : count + len(deletions)]
        for k in np.unique(of_deletion):
            mine = fixed[of_deletion == k]
            bias[k] = (len(mine) - 1) * (mine.mean(axis=0) - full[k])
        ends = [(nodes.min(), nodes.max()) for nodes, _ in rules[: len(scaled)]]
        span = max(high for _, high in ends) - min(low for low, _ in ends)
        return cls(full, left_out, bias, float(span + 2) / _PAPER_POINTS)


def _probes(block: BlockSpectrum) -> zip[tuple[Array, Array]]:
    return zip(block.nodes, block.weights, strict=True)


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


def _js_paper(blocks: Blocks, divergences: _Divergences) -> Estimate:
    return _js_estimate(blocks, divergences, lambda jsd: jsd / divergences.dx)


def _js_estimate(blocks: Blocks, d: _Divergences, transform: Callable[[Array], Array]) -> Estimate:
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
        num_probes = len(blocks.blocks[k].nodes)
        new = transform(row - d.bias[k] * num_probes / (num_probes - 1) - d.bias[:, k])
        new[k] = 0.0
        changed.append(mean + float((new - pair_values[k]).sum()) / pairs)
    return blocks.estimate(value, mean, changed)


def _measure(blocks: Blocks, metric: str) -> Estimate:
    """Return a metric at its first reading."""
    if metric == "js0":
        return _js_estimate(blocks, _Divergences.of(blocks, "lambda10", SIGMA), _distance)
    if metric == "js0_paper":
        return _js_paper(blocks, _Divergences.of(blocks, "lambda10", PAPER_SIGMA))
    if metric == "w1":
        return _w1(blocks, "lambda10")
    return _spread(blocks, metric.removesuffix("_spread"))


def _spread(blocks: Blocks, statistic: str) -> Estimate:
    function, one_product = _STATISTICS[statistic]

    def log_statistic(nodes: Array, weights: Array) -> float:
        return float(np.log10(max(function(nodes, weights), np.finfo(np.float64).tiny)))

    spectra = [b.with_second_moments() if one_product else b for b in blocks.blocks]
    full = np.array([log_statistic(*b.average()) for b in spectra])
    changed = []
    for k, i in blocks.deletions:
        others = full.copy()
        others[k] = log_statistic(*spectra[k].average(i))
        changed.append(float(others.std()))
    estimate = blocks.jackknife(float(full.std()), changed, changed)
    if not one_product:
        return estimate
    spent = sum(b.num_products if b.exact else len(b.nodes) for b in blocks.blocks)
    return replace(estimate, num_products=spent)


def _w1(blocks: Blocks, scale: str) -> Estimate:
    check_reading(scale, 1.0)
    count, deletions = len(blocks), blocks.deletions
    scales = blocks.scales(scale)
    rules = [(n / scales[k], w) for k, (n, w) in enumerate(b.average() for b in blocks.blocks)]
    for left_out in (
        np.array([scales[k] for k, _ in deletions]),
        blocks.moved_scales(scale, scales),
    ):
        for (k, i), divisor in zip(deletions, left_out, strict=True):
            nodes, weights = blocks.blocks[k].average(i)
            rules.append((nodes / divisor, weights))
    owners = np.array([*range(count), *(k for k, _ in deletions), *(k for k, _ in deletions)])
    distances = w1_distances(rules, owners, count)
    pairs = count * (count - 1) / 2
    value = float(distances[:count].sum()) / 2 / pairs
    sums = distances.sum(axis=1)
    changed = value + (sums[count:] - sums[owners[count:]]) / pairs
    return blocks.jackknife(value, changed[: len(deletions)], changed[len(deletions) :])


def _distance(divergence: Array) -> Array:
    """Return √(max(0, JSD) / ln 2), in [0, 1]."""
    return np.sqrt(np.clip(divergence, 0.0, np.log(2)) / np.log(2))


# Per statistic its value and whether one product per probe gives it.
_STATISTICS: dict[str, tuple[Callable[[Array, Array], float], bool]] = {
    "lambda_rms": (lambda nodes, weights: float(np.sqrt(weights @ nodes**2)), True),
    "lambda_max": (lambda nodes, weights: float(np.abs(nodes).max()), False),
    "trace": (lambda nodes, weights: float(abs(weights @ nodes)), True),
}
# What `measure` knows, and what one product per probe is enough for.
SPECTRUM_METRICS = ("js0", "js0_paper", "w1", *(f"{name}_spread" for name in _STATISTICS))
MOMENT_METRICS = tuple(f"{n}_spread" for n, (_, one_product) in _STATISTICS.items() if one_product)
