"""Spectra of blocks, their scales, and their smoothed densities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scipy
from numpy.typing import NDArray

from spectra_db.quadrature import LENGTH, MIN_STEPS, extended, gauss_rule
from spectra_db.schema import KEYS
from spectra_db.truncation import TRUNCATION
from spectra_db.words import WITH_RULE

Array = NDArray[np.float64]

# Lattice points per width: a sum over a Gaussian at spacing σ/3 is exact to 1e-38, and over the
# entropy of mixtures of them to about 1e-6 (tests/spectra_db/test_divergence.py).
POINTS_PER_SIGMA = 3
# Width of the smoothing, in units of the scale.
SIGMA = 0.05
# Half-width of a node's window, 5 widths, in lattice points; the mass outside is 6e-7.
_HALF = 5 * POINTS_PER_SIGMA
# λ10 is the 10th largest |eigenvalue|.
_RANK = 10
# Eigenvalues this small next to the largest are rounding of products in float32 (eps 1.2e-7).
_ROUNDING = 1.2e-7
# What identifies one spectrum; rows that differ here belong to different ones.
GROUP = tuple(column for column in KEYS["spectra"] if column not in ("block", "probe"))
# What is read of each row beside.
_COLUMNS = (
    *("block", "probe", "method", "status", "reason", "num_params", "num_products"),
    *("breakdown", "nodes", "weights", "alphas", "betas"),
)


@dataclass(frozen=True)
class Recurrence:
    """The Lanczos steps of a probe.

    Attributes:
        alphas: Diagonal of T.
        betas: Off-diagonal, the residual last.
        breakdown: The residual is zero to rounding (docs/protocol.md): no further step would change
            the rule by more.
    """

    alphas: Array
    betas: Array
    breakdown: bool

    @property
    def can_go_on(self) -> bool:
        """Whether T is continued: not where it ended or tells too little."""
        return not self.breakdown and MIN_STEPS <= len(self.alphas) < LENGTH

    def rule(self, *, extend: bool) -> tuple[Array, Array]:
        """Return nodes and weights, T being continued if asked and it can be."""
        T = self.alphas, self.betas
        return gauss_rule(*(extended(*T) if extend and self.can_go_on else T))

    def cut(self, num_steps: int) -> Recurrence:
        """Return it after at most so many steps."""
        ended = self.breakdown and num_steps >= len(self.alphas)
        return Recurrence(self.alphas[:num_steps], self.betas[:num_steps], ended)


@dataclass(frozen=True)
class BlockSpectrum:
    """The rules of one block, one per probe.

    Attributes:
        name: Name of the block.
        num_params: Number of parameters n.
        rules: Per probe the nodes θ, ascending, and their weights, of sum 1.
        exact: The one rule is the spectrum itself: no sampling error.
        zero: The block is exactly zero.
        recurrences: Per probe the steps behind its rule; empty if exact or zero.
        num_products: Products spent on the block.
    """

    name: str
    num_params: int
    rules: tuple[tuple[Array, Array], ...]
    exact: bool
    zero: bool
    recurrences: tuple[Recurrence, ...]
    num_products: int

    def average(self, leave_out: int | None = None) -> tuple[Array, Array]:
        """Return the probe-averaged rule (θ, w̄), without one probe if asked."""
        kept = [rule for i, rule in enumerate(self.rules) if i != leave_out]
        nodes, weights = map(np.concatenate, zip(*kept, strict=True))
        return nodes, weights / len(kept)

    def extended(self) -> BlockSpectrum:
        """Return the block with the rules of T continued where it is, as metrics take them."""
        pairs = zip(self.recurrences, self.rules, strict=False)
        return self._with([r.rule(extend=True) if r.can_go_on else rule for r, rule in pairs])

    def truncated(self, num_steps: int, fraction: float, *, extend: bool) -> BlockSpectrum:
        """Return the block as it would be after a fraction of the Lanczos steps.

        Args:
            num_steps: Steps that were asked for: a probe that broke down before three quarters of
                them keeps its rule, which further steps would not change but for rounding.
            fraction: Share of a probe's steps to keep; of one that broke down at least ¾.
            extend: Continue what is kept of T.
        """
        shorter = []
        for r in self.recurrences:
            if r.breakdown:  # no smaller part: more steps would change nothing
                kept = max(num_steps, len(r.alphas)) * max(fraction, TRUNCATION)
            else:
                kept = len(r.alphas) * fraction
            shorter.append(r.cut(max(1, int(kept))))
        return replace(self, recurrences=tuple(shorter)).ruled(extend=extend)

    def ruled(self, *, extend: bool) -> BlockSpectrum:
        """Return the block with the rules of its recurrences, T being continued or not."""
        return self._with([r.rule(extend=extend) for r in self.recurrences])

    def _with(self, rules: Sequence[tuple[Array, Array]]) -> BlockSpectrum:
        return replace(self, rules=tuple(rules)) if rules else self

    def with_second_moments(self) -> BlockSpectrum:
        """Return the block with rules of one step replaced by ones that have |Hv|², too.

        The one node α has v·Hv alone; nodes α ± β of equal weight have α² + β² = |Hv|² besides.
        """
        rules = list(self.rules)
        for i, r in enumerate(self.recurrences):
            if len(rules[i][0]) == 1:
                rules[i] = r.alphas[0] + np.array([-r.betas[0], r.betas[0]]), np.array([0.5, 0.5])
        return replace(self, rules=tuple(rules))


def blocks_of(rows: pd.DataFrame) -> list[BlockSpectrum]:
    """Gather rows of table `spectra` into one spectrum per block, in the order of the rows.

    Raises:
        ValueError: No rows, rows of several spectra, rows without a spectrum (failed, pending),
            a row twice, or a rule that is none.
    """
    if len(rows) == 0:
        raise ValueError("there are no rows; check the filters")
    check_columns(rows, "spectra", *_COLUMNS)
    varying = [c for c in GROUP if c in rows and len(rows[c].unique()) > 1]
    if varying:
        found = {column: map(repr, rows[column].unique().tolist()) for column in varying}
        values = "; ".join(f"{column}: {', '.join(values)}" for column, values in found.items())
        raise ValueError(f"the rows are of several spectra ({values}); select one")
    repeated = rows[rows.duplicated(["block", "probe"])]
    if len(repeated):  # would count as further probes
        first = repeated.iloc[0]
        raise ValueError(
            f"probe {first['probe']} of block {first['block']!r} is there twice; keep one"
        )
    missing = rows[~rows["status"].isin(WITH_RULE)]
    if len(missing):
        first = missing.iloc[0]
        raise ValueError(
            f"{missing['block'].nunique()} blocks have no spectrum, the first {first['block']!r} "
            f"({first['status']}: {first['reason']}); a metric over the others would be another"
        )
    return [_block(str(name), group) for name, group in rows.groupby("block", sort=False)]


def _block(name: str, group: pd.DataFrame) -> BlockSpectrum:
    zero = bool((group["status"] == "zero").any())
    exact = zero or bool((group["method"] == "exact").all())
    arrays = {
        column: tuple(np.asarray(v, dtype=np.float64) for v in group[column])
        for column in ("nodes", "weights", "alphas", "betas")
    }
    rules = tuple(zip(arrays["nodes"], arrays["weights"], strict=True))
    for nodes, weights in rules:
        if not (np.isfinite(nodes).all() and np.isclose(weights.sum(), 1.0)):
            raise ValueError(
                f"a rule of block {name!r} is none: its nodes must be finite, its weights sum to 1"
            )
    recurrences = arrays["alphas"], arrays["betas"], group["breakdown"].astype(bool)
    return BlockSpectrum(
        name=name,
        num_params=int(group["num_params"].iloc[0]),
        rules=rules,
        exact=exact,
        zero=zero,
        recurrences=() if exact else tuple(map(Recurrence, *recurrences)),
        num_products=int(group["num_products"].sum()),
    )


def lambda10(nodes: Array, weights: Array, num_params: int) -> float:
    """Return the 10th largest |eigenvalue| by mass: the largest t with n Σ_{|θ|≥t} w̄ ≥ 10.

    max |θ| for fewer than 10 parameters, where no t has that mass, or where t is rounding error
    next to max |θ| (fewer than 10 eigenvalues are not zero).
    """
    sizes, mass = _from_the_top(nodes, weights, num_params)
    # 10 eigenvalues of an exact block have mass 10 up to rounding.
    enough = np.flatnonzero(mass >= _RANK * (1 - 1e-9))
    if len(enough) and sizes[enough[0]] > _ROUNDING * sizes[0]:
        return float(sizes[enough[0]])
    return float(sizes[0])


def smooth_log_lambda10(nodes: Array, weights: Array, num_params: int, num_probes: int) -> float:
    """Return the mean of log |θ| over masses near the 10th: a smooth version of log λ10.

    The mass Σ n w̄ of the 10 largest eigenvalues varies between samples of P Gaussian probes with
    a variance of 20 / P; the mean is over as much on both sides. λ10 itself jumps from one node to
    another, and the jackknife of a quantile is known to be inconsistent (Efron 1982, section 3.4).
    """
    sizes, mass = _from_the_top(nodes, weights, num_params)
    half = (2 * _RANK / num_probes) ** 0.5
    share = np.diff(np.clip(mass, _RANK - half, _RANK + half), prepend=_RANK - half)
    if not share.sum() > 0:
        return float(np.log(sizes[0]))
    return float(share @ np.log(np.maximum(sizes, _ROUNDING * sizes[0])) / share.sum())


def lambda10_ratio(nodes: Array, weights: Array, num_params: int, num_probes: int) -> float:
    """Return how many times as large |θ| is at the low as at the high end of the masses near 10.

    The ends are those of `smooth_log_lambda10`; 1 where the block has no so many eigenvalues.
    """
    sizes, mass = _from_the_top(nodes, weights, num_params)
    half = (2 * _RANK / num_probes) ** 0.5
    low, high = np.searchsorted(mass, [_RANK - half, _RANK + half])
    if high >= len(sizes) or sizes[high] <= _ROUNDING * sizes[0]:
        return 1.0
    return float(sizes[low] / sizes[high])


def _from_the_top(nodes: Array, weights: Array, num_params: int) -> tuple[Array, Array]:
    """Return |nodes|, descending, and how many eigenvalues are as large, by mass."""
    sizes = np.abs(nodes)
    order = np.argsort(-sizes, kind="stable")
    return sizes[order], num_params * np.cumsum(weights[order])


@dataclass(frozen=True)
class Scale:
    """What a block's eigenvalues may be divided by.

    Attributes:
        meaning: In words.
        short: For a column of a table.
        of: (nodes, weights, number of parameters, largest |node| of all blocks) ↦ the divisor.
    """

    meaning: str
    short: str
    of: Callable[[Array, Array, int, float], float]


# The first is what metrics lead with: the number of a block's parameters does not enter it, as it
# does λ10, the quantile 10 / n, and three probes tell it within a few per cent (docs/accuracy.md).
SCALES = {
    "own_rms": Scale(
        "the block's rms eigenvalue",
        "by the block's rms",
        lambda nodes, weights, n, top: float(np.sqrt(weights @ nodes**2)),
    ),
    "raw": Scale("1", "raw eigenvalues", lambda nodes, weights, n, top: 1.0),
    "lambda10": Scale(
        "10th largest |eigenvalue|",
        "by the 10th largest",
        lambda nodes, weights, n, top: lambda10(nodes, weights, n),
    ),
    "global_max": Scale(
        "largest |eigenvalue| of all blocks",
        "by the largest of all blocks",
        lambda nodes, weights, n, top: top,
    ),
    "own_max": Scale(
        "the block's largest |eigenvalue|",
        "by the block's largest",
        lambda nodes, weights, n, top: float(np.abs(nodes).max()),
    ),
}
SCALE = next(iter(SCALES))


def scale_of(rule: tuple[Array, Array], num_params: int, scale: str, global_max: float) -> float:
    """Return what a block's eigenvalues are divided by, positive."""
    return SCALES[scale].of(*rule, num_params, global_max) or 1.0


def lattice_densities(
    rules: Sequence[tuple[Array, Array]], sigma: float
) -> tuple[Array, scipy.sparse.csr_array]:
    """Evaluate Gaussian mixtures p(t) = Σ w N(t; θ, σ²) on a lattice near the nodes.

    Args:
        rules: Scaled (nodes, weights) of each density.
        sigma: Width σ of the Gaussians.

    Returns:
        The lattice points, shape (G,), ascending, spaced σ/3 where they are neighbours, and the
        densities times σ at them, sparse of shape (len(rules), G). The points are those within
        5 σ of a node of any density.
    """
    centres = np.unique(np.concatenate([_centres(nodes, sigma) for nodes, _ in rules]))
    # Overlapping windows merge into stretches of neighbouring points.
    ends = np.append(np.flatnonzero(np.diff(centres) > 2 * _HALF), len(centres) - 1)
    first = centres[np.append(0, ends[:-1] + 1)] - _HALF
    lengths = centres[ends] + _HALF + 1 - first
    before = np.cumsum(lengths) - lengths
    lattice = np.repeat(first - before, lengths) + np.arange(lengths.sum())
    step = 64  # rules at a time: their windows take 30 MB at 1,000 nodes each
    parts = [
        _windows(rules[start : start + step], sigma, lattice)
        for start in range(0, len(rules), step)
    ]
    return lattice * (sigma / POINTS_PER_SIGMA), scipy.sparse.vstack(parts, format="csr")


def _centres(nodes: Array, sigma: float) -> NDArray[np.int64]:
    """Return the lattice point next to each node; beyond 1e18 widths the last that int64 holds."""
    return np.rint(np.clip(nodes / sigma * POINTS_PER_SIGMA, -1e18, 1e18)).astype(np.int64)


def _windows(
    rules: Sequence[tuple[Array, Array]], sigma: float, lattice: NDArray[np.int64]
) -> scipy.sparse.csr_array:
    """Evaluate some densities, times σ, at the points of the lattice in their nodes' windows."""
    nodes = np.concatenate([nodes for nodes, _ in rules])
    weights = np.concatenate([w for _, w in rules]) / np.sqrt(2 * np.pi)
    centres = _centres(nodes, sigma)
    offsets = np.arange(-_HALF, _HALF + 1)
    shift = np.clip(centres - nodes / sigma * POINTS_PER_SIGMA, -0.5, 0.5)
    values = np.exp(-0.5 * ((shift[:, None] + offsets) / POINTS_PER_SIGMA) ** 2)
    values *= weights[:, None]
    columns = np.searchsorted(lattice, centres).astype(np.int32)[:, None] + offsets.astype(np.int32)
    ends = np.cumsum([0, *(len(nodes) * len(offsets) for nodes, _ in rules)], dtype=np.int32)
    shape = (len(rules), len(lattice))
    matrix = scipy.sparse.csr_array((values.ravel(), columns.ravel(), ends), shape=shape)
    by_point = matrix.tocsc()  # sorts by counting, where sum_duplicates of rows would compare
    by_point.sum_duplicates()
    return by_point.tocsr()


def global_max(blocks: Sequence[BlockSpectrum]) -> float:
    """Return the largest |node| of all blocks and probes."""
    return max(float(np.abs(nodes).max()) for block in blocks for nodes, _ in block.rules)


def check_columns(rows: pd.DataFrame, table: str, *columns: str) -> None:
    """Raise ValueError if rows are not whole rows of a table."""
    if absent := [column for column in columns if column not in rows]:
        raise ValueError(f"the rows have no column {absent[0]!r}; pass whole rows of table {table}")


def check_reading(scale: str, sigma: float) -> None:
    """Raise ValueError unless the scale is known and sigma positive."""
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; choose one of {', '.join(SCALES)}")
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma is {sigma}; it must be a positive number")


def density(rows: pd.DataFrame, *, scale: str = SCALE, sigma: float = SIGMA) -> pd.DataFrame:
    """Return the smoothed spectral density of each block, averaged over probes.

    p_l(t) = Σ w̄ N(t; θ/s_l, σ²), with s_l the block's scale, of rules that are continued where
    Lanczos stopped (docs/protocol.md, Metrics).

    Args:
        rows: Rows of table `spectra` of one spectrum.
        scale: One of SCALES.
        sigma: Width of the Gaussian, in units of the scale.

    Returns:
        One column per block; the index is the scaled eigenvalue, spaced σ/3 within 5 σ of the
        nodes of any block, without what lies farther (densities below 4e-6 / σ).

    Raises:
        ValueError: Unknown scale, sigma not positive, or rows of several spectra.
    """
    check_reading(scale, sigma)
    blocks = [block.extended() for block in blocks_of(rows)]
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
