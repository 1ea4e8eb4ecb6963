"""How much the blocks of a model differ: pairwise distances and metrics, with their errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t as student_t
from scipy.stats import wasserstein_distance

from spectra_db.density import (
    SCALES,
    Array,
    BlockSpectrum,
    blocks_of,
    check_reading,
    global_max,
    scale_of,
)
from spectra_db.divergence import js_divergences

# Widths of the two readings: ours, the paper's; raw eigenvalues take the authors' code's σ² = 1e-5.
SIGMA, PAPER_SIGMA, RAW_SIGMA = 0.05, 0.01, 1e-5**0.5
# The paper's grid: 50,000 points over [min − 1, max + 1], summed without dx.
_PAPER_POINTS = 50_000
# The truncation error compares with a rule of three quarters of the steps.
TRUNCATION = 0.75
MIN_PROBES = 3


@dataclass(frozen=True)
class Estimate:
    """A metric of one model at one stage.

    Attributes:
        value: Plug-in estimate, biased upwards when probes are few.
        corrected: After the jackknife's correction; nan with fewer than 3 probes.
        standard_error: Jackknife standard error over probes; nan with fewer than 3 probes.
        dof: Degrees of freedom of the standard error (Welch-Satterthwaite); inf if exact.
        num_blocks: Blocks that entered.
        num_zero_blocks: Exactly zero blocks, left out.
        num_products: Hessian-vector products spent on all blocks.
    """

    value: float
    corrected: float
    standard_error: float
    dof: float
    num_blocks: int
    num_zero_blocks: int
    num_products: int

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """Return the two-sided Student's t interval of the corrected value."""
        if not self.standard_error > 0:
            return self.corrected, self.corrected
        half = float(student_t.ppf((1 + level) / 2, self.dof)) * self.standard_error
        return self.corrected - half, self.corrected + half


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
    return _js0(_Blocks.of(rows), scale, sigma)


def js0_paper(
    rows: pd.DataFrame, *, scale: str = "lambda10", sigma: float = PAPER_SIGMA
) -> Estimate:
    """Return our reading of the paper's unnormalised JS⁰: the mean of JSD / dx over pairs.

    dx = (max − min + 2) / 50,000 over the scaled nodes of all blocks (docs/protocol.md, Metrics).
    """
    return _js0_paper(_Blocks.of(rows), scale, sigma)


def pairwise_js(
    rows: pd.DataFrame, *, scale: str = "lambda10", sigma: float = SIGMA
) -> pd.DataFrame:
    """Return the matrix of corrected Jensen-Shannon distances √(JSD̂ / ln 2) between blocks.

    With fewer than 3 probes the plug-in distances.
    """
    blocks = _Blocks.of(rows)
    d = _Divergences.of(blocks, scale, sigma)
    distances = _distance(d.full - d.bias - d.bias.T)
    np.fill_diagonal(distances, 0.0)
    names = [b.name for b in blocks.blocks]
    return pd.DataFrame(distances, index=names, columns=names)


def spread(rows: pd.DataFrame, statistic: str) -> Estimate:
    """Return the standard deviation over blocks of log10 of a statistic of the spectrum.

    Args:
        rows: Rows of table `spectra` of one model, stage and partition.
        statistic: lambda_rms (√(Σ w̄ θ²)), lambda_max (largest |θ|) or trace (|Σ w̄ θ|).

    Raises:
        ValueError: As `js0`, or the statistic is unknown.
    """
    if statistic not in _STATISTICS:
        raise ValueError(f"unknown statistic {statistic!r}; choose one of {', '.join(_STATISTICS)}")
    return _spread(_Blocks.of(rows), statistic)


def w1(rows: pd.DataFrame, *, scale: str = "lambda10") -> Estimate:
    """Return the mean pairwise Wasserstein-1 distance between scaled spectra."""
    return _w1(_Blocks.of(rows), scale)


def metrics(rows: pd.DataFrame) -> pd.DataFrame:
    """Return every metric that follows from a spectrum, as rows of table `heterogeneity`.

    js0 and js0_paper for each scale (raw eigenvalues with σ = √1e-5, as in the authors' code),
    w1, and the spreads of rms and largest eigenvalue and of the trace. The truncation error is
    the change of the plug-in value against rules of three quarters of the steps.

    Args:
        rows: Rows of table `spectra` of one model, stage and partition.

    Raises:
        ValueError: As `js0`.
    """
    columns = ("model", "stage", "init_seed", "train_run", "partition", "protocol_version")
    identity = {c: rows.iloc[0][c] for c in columns} if len(rows) else {}
    blocks = _Blocks.of(rows)
    shorter = blocks.truncated(TRUNCATION)
    readings: list[tuple[str, str, float, Callable[[_Blocks], Estimate]]] = []
    for scale in SCALES:
        raw = scale == "raw"
        ours, paper = (RAW_SIGMA, RAW_SIGMA) if raw else (SIGMA, PAPER_SIGMA)
        readings.append(("js0", scale, ours, partial(_js0, scale=scale, sigma=ours)))
        readings.append(("js0_paper", scale, paper, partial(_js0_paper, scale=scale, sigma=paper)))
    readings.append(("w1", "lambda10", 0.0, partial(_w1, scale="lambda10")))
    for name in _STATISTICS:
        readings.append((f"{name}_spread", "none", 0.0, partial(_spread, statistic=name)))
    table = []
    for metric, scale, sigma, function in readings:
        estimate = function(blocks)
        table.append(
            identity
            | {"metric": metric, "scale": scale, "sigma": sigma}
            | {
                "value": estimate.value,
                "corrected": estimate.corrected,
                "standard_error": estimate.standard_error,
                "truncation_error": abs(function(shorter).value - estimate.value),
                "batch_error": None,
                "num_blocks": estimate.num_blocks,
                "num_zero_blocks": estimate.num_zero_blocks,
                "num_products": estimate.num_products,
            }
        )
    return pd.DataFrame(table)


@dataclass(frozen=True)
class _Blocks:
    """The nonzero blocks of one spectrum."""

    blocks: list[BlockSpectrum]
    num_zero_blocks: int
    errors_known: bool

    @property
    def top(self) -> float:
        """The largest |node| of all blocks."""
        return global_max(self.blocks)

    def truncated(self, fraction: float) -> _Blocks:
        """Return the blocks after that fraction of the Lanczos steps, for plug-in values alone."""
        return _Blocks(
            [b.truncated(fraction) for b in self.blocks], self.num_zero_blocks, errors_known=False
        )

    @classmethod
    def of(cls, rows: pd.DataFrame) -> _Blocks:
        every = blocks_of(rows)
        blocks = [b for b in every if not b.zero]
        if len(blocks) < 2:
            raise ValueError(
                f"{len(blocks)} of the {len(every)} blocks are not zero; a distance between "
                "blocks needs at least two"
            )
        enough = all(b.exact or len(b.nodes) >= MIN_PROBES for b in blocks)
        return cls(blocks, len(every) - len(blocks), errors_known=enough)

    def rule(self, k: int, scale: str, leave_out: int | None = None) -> tuple[Array, Array]:
        """Return a block's scaled rule; the scale is that of the probes that are left.

        The global maximum is that of all probes always: one probe hardly moves it.
        """
        block = self.blocks[k]
        nodes, weights = block.average(leave_out)
        return nodes / scale_of((nodes, weights), block.num_params, scale, self.top), weights

    def rules(self, scale: str) -> list[tuple[Array, Array]]:
        return [self.rule(k, scale) for k in range(len(self.blocks))]

    def deletions(self) -> list[tuple[int, int]]:
        """Return (block, probe) of every probe that the jackknife leaves out."""
        return [
            (k, i) for k, b in enumerate(self.blocks) if not b.exact for i in range(len(b.nodes))
        ]

    def estimate(self, value: float, corrected: float, changed: Sequence[Array]) -> Estimate:
        """Finish an estimate from the values with each probe of each sampled block left out."""
        # (n − 1)/n Σ (x_i − x̄)² per block; blocks are sampled independently (Efron & Stein 1981).
        variances = np.array([(len(x) - 1) * float(np.var(x)) for x in changed])
        dofs = np.array([len(x) - 1 for x in changed])
        total = float(variances.sum())
        nan = float("nan")
        return Estimate(
            value=value,
            corrected=corrected if self.errors_known else nan,
            standard_error=total**0.5 if self.errors_known else nan,
            dof=total**2 / float((variances**2 / dofs).sum()) if total > 0 else float("inf"),
            num_blocks=len(self.blocks),
            num_zero_blocks=self.num_zero_blocks,
            num_products=sum(b.num_products for b in self.blocks),
        )


@dataclass(frozen=True)
class _Divergences:
    """All divergences that a Jensen-Shannon metric and its jackknife need.

    Attributes:
        full: Shape (K, K), all probes.
        left_out: Shape (D, K): block k without probe i against every block, in the order of
            `_Blocks.deletions`.
        bias: Shape (K, K): row k is what sampling block k adds to its divergence from each block;
            zero where the errors are not known.
    """

    full: Array
    left_out: Array
    bias: Array

    @classmethod
    def of(cls, blocks: _Blocks, scale: str, sigma: float) -> _Divergences:
        count = len(blocks.blocks)
        deletions = blocks.deletions() if blocks.errors_known else []
        rules = blocks.rules(scale) + [blocks.rule(k, scale, i) for k, i in deletions]
        divergences = js_divergences(rules, sigma, count)
        full, left_out = divergences[:count], divergences[count:]
        full = (full + full.T) / 2
        bias = np.zeros((count, count))
        owners = np.array([k for k, _ in deletions], dtype=int)
        for k in np.unique(owners):
            mine = left_out[owners == k]
            bias[k] = (len(mine) - 1) * (mine.mean(axis=0) - full[k])
        return cls(full, left_out, bias)


def _js0(blocks: _Blocks, scale: str, sigma: float) -> Estimate:
    return _js_estimate(blocks, scale, sigma, _distance)


def _js0_paper(blocks: _Blocks, scale: str, sigma: float) -> Estimate:
    check_reading(scale, sigma)
    nodes = np.concatenate([n for n, _ in blocks.rules(scale)])
    dx = (nodes.max() - nodes.min() + 2) / _PAPER_POINTS
    return _js_estimate(blocks, scale, sigma, lambda jsd: jsd / dx)


def _spread(blocks: _Blocks, statistic: str) -> Estimate:
    function = _STATISTICS[statistic]

    def log_statistic(nodes: Array, weights: Array) -> float:
        return float(np.log10(max(function(nodes, weights), np.finfo(np.float64).tiny)))

    full = np.array([log_statistic(*b.average()) for b in blocks.blocks])

    def without(k: int, i: int) -> float:
        changed = full.copy()
        changed[k] = log_statistic(*blocks.blocks[k].average(i))
        return float(changed.std())

    return _jackknife(blocks, float(full.std()), without)


def _w1(blocks: _Blocks, scale: str) -> Estimate:
    check_reading(scale, 1.0)
    rules = blocks.rules(scale)

    def total(k: int, rule: tuple[Array, Array]) -> float:
        """Sum the distances of one block's rule from the other blocks."""
        others = [other for j, other in enumerate(rules) if j != k]
        return float(sum(wasserstein_distance(rule[0], x, rule[1], w) for x, w in others))

    sums = [total(k, rule) for k, rule in enumerate(rules)]
    pairs = len(rules) * (len(rules) - 1) / 2
    value = sum(sums) / 2 / pairs

    def without(k: int, i: int) -> float:
        return value + (total(k, blocks.rule(k, scale, i)) - sums[k]) / pairs

    return _jackknife(blocks, value, without)


def _js_estimate(
    blocks: _Blocks, scale: str, sigma: float, transform: Callable[[Array], Array]
) -> Estimate:
    """Average a transform of the corrected divergences over pairs, with its jackknife error.

    The correction is applied to the divergence, not to its square root, which is not smooth at
    zero: JSD̂_kl = JSD_kl − b_kl − b_lk, b_kl being (n_k − 1) (mean_i JSD_kl without probe i of k −
    JSD_kl). For the standard error probe i of block k is left out of the whole chain. Its pairs
    are then averages over n − 1 probes, whose bias is n / (n − 1) times as large.
    """
    check_reading(scale, sigma)
    d = _Divergences.of(blocks, scale, sigma)
    count = len(blocks.blocks)
    upper = np.triu_indices(count, 1)
    pairs = len(upper[0])
    value = float(transform(d.full)[upper].mean())
    if not blocks.errors_known:
        return blocks.estimate(value, float("nan"), [])
    corrected = transform(d.full - d.bias - d.bias.T)
    np.fill_diagonal(corrected, 0.0)
    mean = float(corrected[upper].mean())
    changed: dict[int, list[float]] = {}
    for (k, _), row in zip(blocks.deletions(), d.left_out, strict=True):
        n = len(blocks.blocks[k].nodes)
        pair_values = transform(row - d.bias[k] * n / (n - 1) - d.bias[:, k])
        pair_values[k] = 0.0
        shift = float((pair_values - corrected[k]).sum()) / pairs
        changed.setdefault(k, []).append(mean + shift)
    return blocks.estimate(value, mean, [np.array(x) for x in changed.values()])


def _jackknife(blocks: _Blocks, value: float, without: Callable[[int, int], float]) -> Estimate:
    """Correct a smooth metric and give its error from the values without probe i of block k."""
    if not blocks.errors_known:
        return blocks.estimate(value, float("nan"), [])
    changed: dict[int, list[float]] = {}
    for k, i in blocks.deletions():
        changed.setdefault(k, []).append(without(k, i))
    arrays = [np.array(x) for x in changed.values()]
    bias = sum((len(x) - 1) * (float(x.mean()) - value) for x in arrays)
    return blocks.estimate(value, value - bias, arrays)


def _distance(divergence: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return √(max(0, JSD) / ln 2), in [0, 1]."""
    return np.sqrt(np.clip(divergence, 0.0, np.log(2)) / np.log(2))


_STATISTICS: dict[str, Callable[[Array, Array], float]] = {
    "lambda_rms": lambda nodes, weights: float(np.sqrt(weights @ nodes**2)),
    "lambda_max": lambda nodes, weights: float(np.abs(nodes).max()),
    "trace": lambda nodes, weights: float(abs(weights @ nodes)),
}
