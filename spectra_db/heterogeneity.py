"""How much the blocks of a model differ: the metrics, with their errors.

A metric is one entry of METRICS, with its function; all else reads that table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd

from spectra_db.densities import SCALE, SCALES, SIGMA, Array, check_reading
from spectra_db.divergence import w1_distances
from spectra_db.jackknife import MIN_PROBES, Blocks, Estimate
from spectra_db.pairs import Divergences, js_distance, mean_of_pairs
from spectra_db.schema import SPECTRUM, VERSIONS
from spectra_db.truncation import parts_of, truncation_error

# Width of the smoothing in the paper's reading; raw eigenvalues take the authors' code's σ² = 1e-5.
PAPER_SIGMA, RAW_SIGMA = 0.01, 1e-5**0.5
# Columns of table `heterogeneity` that an estimate has.
_FROM_ESTIMATE = (
    *("value", "corrected", "standard_error"),
    *("num_blocks", "num_zero_blocks", "num_products"),
)


class Need(NamedTuple):
    """What of a spectrum a metric needs: about ten products, three times as many of whole ones.

    Attributes:
        num_probes: Probes per block to begin with.
        num_steps: Steps per probe to begin with; 0: no products at all.
    """

    num_probes: int
    num_steps: int


# v·Hv and |Hv|²: one product a probe (Golub & Meurant 2010, chapter 6).
MOMENTS = Need(10, 1)
# The largest eigenvalue settles first.
EXTREMES = Need(MIN_PROBES, 4)
# Continued rules are near the truth from here on: docs/accuracy.md, Rules that are continued.
WHOLE = Need(MIN_PROBES, 10)
# One gradient.
GRADIENT = Need(0, 0)


@dataclass(frozen=True)
class Metric:
    """A measure of how much blocks differ.

    Attributes:
        meaning: A few words, as tables name it.
        needs: Of a spectrum.
        estimate: (blocks, scale, σ) ↦ the metric with its errors; of one that needs GRADIENT
            (rows of table `blocks`, names of blocks) ↦ it.
        scales: What eigenvalues may be divided by, the metric's own first; `none` if by nothing.
        sigma: Width of the smoothing, 0 if none; that of raw eigenvalues is RAW_SIGMA.
    """

    meaning: str
    needs: Need
    estimate: Callable[..., Estimate]
    scales: tuple[str, ...] = ("none",)
    sigma: float = 0.0

    @property
    def readings(self) -> list[tuple[str, float]]:
        """(scale, σ) of each reading, the metric's own first."""
        raw = RAW_SIGMA if self.sigma else 0.0
        return [(scale, raw if scale == "raw" else self.sigma) for scale in self.scales]


def js0(
    rows: pd.DataFrame,
    *,
    scale: str = SCALE,
    sigma: float | None = None,
    extend: bool = True,
) -> Estimate:
    """Return the mean Jensen-Shannon distance between the spectra of the blocks, in [0, 1].

    js0 = mean over pairs k < l of √(max(0, JSD̂_kl) / ln 2), with JSD̂ the divergence between the
    smoothed densities, corrected for the bias of few probes (docs/protocol.md, Metrics). The
    metric is that of Zhang et al. (arXiv 2402.16788, section 2.2), normalised.

    Args:
        rows: Rows of table `spectra` of one model, stage and partition.
        scale: One of SCALES: what each block's eigenvalues are divided by.
        sigma: Width of the smoothing Gaussian, in units of the scale; None: that of the metric's
            reading, √1e-5 of raw eigenvalues, else 0.05.
        extend: Continue each T by the mean of its last coefficients (docs/protocol.md, Metrics);
            False for the Gauss rules of the steps that were taken.

    Raises:
        ValueError: Unknown scale, rows of several spectra or of failed blocks, or fewer than two
            blocks that are not zero.
    """
    return _js0(Blocks.of(rows, extend=extend), scale, _width("js0", scale, sigma))


def js0_paper(rows: pd.DataFrame, *, scale: str = "raw", sigma: float | None = None) -> Estimate:
    """Return our reading of the paper's unnormalised JS⁰: the mean of JSD / dx over pairs.

    dx = (max − min + 2) / 50,000 over the scaled nodes of all blocks (docs/protocol.md, Metrics).

    Args:
        rows: As `js0`.
        scale: As `js0`.
        sigma: As `js0`; None: that of the metric's reading, 0.0032 of raw eigenvalues, else 0.01.

    Raises:
        ValueError: As `js0`.
    """
    return _js0_paper(Blocks.of(rows), scale, _width("js0_paper", scale, sigma))


def pairwise_js(
    rows: pd.DataFrame, *, scale: str = SCALE, sigma: float | None = None
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
    width = _width("js0", scale, sigma)
    distances = js_distance(Divergences.of(blocks, scale, width).corrected)
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
    return _spread(statistic, Blocks.of(rows))


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
    """Return a metric at its first reading, and its truncation error (docs/protocol.md, Error).

    Args:
        rows: Rows of table `spectra` of one model, stage and partition.
        metric: One of those of METRICS that need products.

    Raises:
        ValueError: As `js0`.
    """
    blocks, reading = Blocks.of(rows), METRICS[metric].readings[0]
    full = METRICS[metric].estimate(blocks, *reading)
    fewer = {
        part: METRICS[metric].estimate(blocks.truncated(part), *reading).value
        for part in parts_of(reading[0])
    }
    return full, truncation_error(full.value, fewer)


def settled(rows: pd.DataFrame, metric: str, allowed: float) -> set[str]:
    """Return the blocks that need no more steps for a metric's truncation error to be allowed.

    Those whose own steps, cut as for the error, would leave a truncation error below their share:
    of K blocks one K-th of what is allowed, by the same rule as `measure`. To first order the
    changes of blocks add up.

    Args:
        rows: As `measure`.
        metric: As `measure`.
        allowed: The largest truncation error of the metric.

    Raises:
        ValueError: As `js0`.
    """
    blocks, reading = Blocks.of(rows), METRICS[metric].readings[0]
    full = replace(blocks, errors_known=False)  # values alone
    value = METRICS[metric].estimate(full, *reading).value
    found = set(rows["block"]) - {b.name for b in blocks.blocks}
    shorter = {part: blocks.truncated(part).blocks for part in parts_of(reading[0])}
    for k, block in enumerate(full.blocks):
        fewer = {}
        for part, cut in shorter.items():
            others = [*full.blocks[:k], cut[k], *full.blocks[k + 1 :]]
            fewer[part] = METRICS[metric].estimate(replace(full, blocks=others), *reading).value
        if truncation_error(value, fewer) <= allowed / len(full):
            found.add(block.name)
    return found


def metrics(
    rows: pd.DataFrame,
    *,
    block_rows: pd.DataFrame | None = None,
    names: Collection[str] | None = None,
    version: int = VERSIONS["heterogeneity"],
) -> pd.DataFrame:
    """Return every metric that follows from a spectrum, as rows of table `heterogeneity`.

    Each metric of METRICS in each of its readings. The batch error needs spectra of both halves of
    the batch: the column is left null.

    Args:
        rows: Rows of table `spectra` of one model, stage and partition.
        block_rows: Rows of table `blocks` of the same blocks, for `gradient_rms_spread`.
        names: The metrics to return, for a spectrum that is too short for others; None: all.
        version: Of the protocol: 1 has the rules of the steps that were taken, later ones continue
            them; CHANGES has what else differs.

    Raises:
        ValueError: As `js0`.
    """
    blocks = Blocks.of(rows, extend=version > 1)
    shorter = {part: blocks.truncated(part) for part in parts_of("raw", version)}
    identity = {c: rows.iloc[0][c] for c in SPECTRUM if c in rows} | {"protocol_version": version}
    batch_size = int(rows["batch_size"].iloc[0]) if "batch_size" in rows else None
    table = []
    for name, metric in METRICS.items():
        of_gradient = metric.needs is GRADIENT
        if block_rows is None if of_gradient else names is not None and name not in names:
            continue
        for scale, sigma in metric.readings:
            if of_gradient:
                found = metric.estimate(block_rows, [b.name for b in blocks.blocks])
                full, stated = replace(found, num_zero_blocks=blocks.num_zero_blocks), 0.0
            else:
                full = metric.estimate(blocks, scale, sigma)
                parts = parts_of(scale, version)
                fewer = {p: metric.estimate(shorter[p], scale, sigma).value for p in parts}
                stated = truncation_error(full.value, fewer, version)
            reading = {"metric": name, "scale": scale, "sigma": sigma}
            errors: dict[str, float | None] = {"truncation_error": stated}
            errors |= {"batch_error": None, "batch_size": batch_size}
            numbers = {column: getattr(full, column) for column in _FROM_ESTIMATE}
            table.append(identity | reading | numbers | errors)
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


def _width(metric: str, scale: str, sigma: float | None) -> float:
    """Return the width that is given, or that of the metric's reading at a scale."""
    of_readings = dict(METRICS[metric].readings)
    return of_readings.get(scale, METRICS[metric].sigma) if sigma is None else sigma


def _js0(blocks: Blocks, scale: str, sigma: float) -> Estimate:
    return mean_of_pairs(blocks, _divergences(blocks, scale, sigma), js_distance)


def _js0_paper(blocks: Blocks, scale: str, sigma: float) -> Estimate:
    divergences = _divergences(blocks, scale, sigma)
    return mean_of_pairs(blocks, divergences, lambda jsd: jsd / divergences.dx)


def _divergences(blocks: Blocks, scale: str, sigma: float) -> Divergences:
    """Return them, computed once for both metrics: raw eigenvalues have one width."""
    if (scale, sigma) not in blocks.divergences:
        blocks.divergences[scale, sigma] = Divergences.of(blocks, scale, sigma)
    return blocks.divergences[scale, sigma]


def _spread(statistic: str, blocks: Blocks, scale: str = "none", sigma: float = 0.0) -> Estimate:
    function = _STATISTICS[statistic]
    one_product = METRICS[f"{statistic}_spread"].needs is MOMENTS

    def log_statistic(nodes: Array, weights: Array) -> float:
        return float(np.log10(max(function(nodes, weights), np.finfo(np.float64).tiny)))

    # The largest node is T's own: a chain that goes on smears the edge of a spectrum.
    spectra = [
        b.with_second_moments() if one_product else b.ruled(extend=False) for b in blocks.blocks
    ]
    full = np.array([log_statistic(*b.average()) for b in spectra])
    changed = []
    for k, i in blocks.deletions:
        others = full.copy()
        others[k] = log_statistic(*spectra[k].average(i))
        changed.append(float(others.std()))
    estimate = blocks.jackknife(float(full.std()), changed, changed)
    if not one_product:
        return estimate
    spent = sum(b.num_products if b.exact else len(b.rules) for b in blocks.blocks)
    return replace(estimate, num_products=spent)


def _w1(blocks: Blocks, scale: str, sigma: float = 0.0) -> Estimate:
    check_reading(scale, 1.0)
    count, deletions = len(blocks), blocks.deletions
    scales = blocks.scales(scale)
    rules = [(n / scales[k], w) for k, (n, w) in enumerate(b.average() for b in blocks.blocks)]
    without = np.array([k for k, _ in deletions], dtype=np.intp)
    for divisors in (scales[without], blocks.moved_scales(scale, scales)):
        for (k, i), divisor in zip(deletions, divisors, strict=True):
            nodes, weights = blocks.blocks[k].average(i)
            rules.append((nodes / divisor, weights))
    owners = np.concatenate([np.arange(count), without, without])
    distances = w1_distances(rules, owners, count)
    pairs = count * (count - 1) / 2
    value = float(distances[:count].sum()) / 2 / pairs
    sums = distances.sum(axis=1)
    changed = value + (sums[count:] - sums[owners[count:]]) / pairs
    return blocks.jackknife(value, changed[: len(deletions)], changed[len(deletions) :])


_STATISTICS: dict[str, Callable[[Array, Array], float]] = {
    "lambda_rms": lambda nodes, weights: float(np.sqrt(weights @ nodes**2)),
    "lambda_max": lambda nodes, weights: float(np.abs(nodes).max()),
    "trace": lambda nodes, weights: float(abs(weights @ nodes)),
}
# The authors' code compares eigenvalues as they are.
_PAPER_SCALES = ("raw", *(scale for scale in SCALES if scale != "raw"))
METRICS = {
    "js0": Metric("JS⁰", WHOLE, _js0, tuple(SCALES), SIGMA),
    "js0_paper": Metric("JS⁰ as in the paper", WHOLE, _js0_paper, _PAPER_SCALES, PAPER_SIGMA),
    "w1": Metric("Wasserstein-1", WHOLE, _w1, ("lambda10",)),
    "lambda_rms_spread": Metric(
        "spread of rms eigenvalue", MOMENTS, partial(_spread, "lambda_rms")
    ),
    "lambda_max_spread": Metric(
        "spread of largest eigenvalue", EXTREMES, partial(_spread, "lambda_max")
    ),
    "trace_spread": Metric("spread of trace", MOMENTS, partial(_spread, "trace")),
    "gradient_rms_spread": Metric("spread of gradient rms", GRADIENT, gradient_rms_spread),
}


# The scale that each metric is judged at; the others are further readings.
LEADING = {name: metric.scales[0] for name, metric in METRICS.items()}


def is_leading(rows: pd.DataFrame) -> pd.Series:
    """Tell which rows are of a metric at the scale that it is judged at.

    Args:
        rows: With columns metric and scale; what is no metric of METRICS has no scale.
    """
    return rows["scale"] == rows["metric"].map(LEADING).fillna("none")


def that_need(*needs: Need) -> tuple[str, ...]:
    """Return the names of the metrics that need no more than one of these."""
    return tuple(name for name, metric in METRICS.items() if metric.needs in needs)
