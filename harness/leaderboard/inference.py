"""Rank tests for few models: permutations, bootstraps, power. Arrays in, numbers out.

docs/verdict.md says what they are used for. Ties have the mean of their ranks everywhere.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import scipy  # its stats take a second to import, and only where they are used

from harness.leaderboard.ranks import Array, pearson, signs
from harness.leaderboard.ranks import ranks as weighted_ranks

ALPHA = 0.05
EXACT_UP_TO = 8  # 40,320 orders
NUM_ORDERS = 100_000  # a p of 0.05 is then known to 0.0007
NUM_SAMPLES = 20_000  # a power of 0.84 is then known to 0.003


def ranks(x: npt.ArrayLike) -> Array:
    """Return twice the ranks along the last axis, centred: integers that sum to 0."""
    return 2 * scipy.stats.rankdata(x, axis=-1) - (np.shape(x)[-1] + 1)


def spearman(x: npt.ArrayLike, y: npt.ArrayLike) -> Array:
    """Return Spearman's ρ along the last axis, broadcast; nan where one of both is constant."""
    return _correlation(ranks(x), ranks(y))


def partial(x: npt.ArrayLike, y: npt.ArrayLike, given: npt.ArrayLike) -> Array:
    """Return Spearman's partial correlation of x and y along the last axis, given one variable.

    The correlation of what is left of both ranks after the regression on the ranks of `given`,
    (ρ_xy - ρ_xg ρ_yg) / √((1 - ρ_xg²)(1 - ρ_yg²)): Kendall & Gibbons, Rank correlation methods,
    1990, chapter 8. nan where nothing is left; ρ_xy where `given` is constant.
    """
    g = ranks(given)
    left = []
    for r in (ranks(x), ranks(y)):
        slope = (r * g).sum(-1, keepdims=True) / max((g * g).sum(), 1.0)
        rest = r - slope * g
        size = np.linalg.norm(rest, axis=-1, keepdims=True)
        left.append(np.where(size > 1e-9 * np.linalg.norm(r, axis=-1, keepdims=True), rest, 0.0))
    return _correlation(*left)


@lru_cache(maxsize=8)
def orders(n: int) -> npt.NDArray[np.intp]:
    """Return orders of n things, the first as they are: all n! up to n = 8, else 100,000 draws.

    With the order of the data among the draws, the share of orders that reach a value is a valid
    p: it is never 0 (Phipson & Smyth 2010, section 4).
    """
    if n <= EXACT_UP_TO:
        return np.array(list(itertools.permutations(range(n))), dtype=np.intp)
    drawn = np.tile(np.arange(n), (NUM_ORDERS, 1))
    np.random.default_rng(n).permuted(drawn[1:], axis=1, out=drawn[1:])
    return drawn


def under_no_relation(x: npt.ArrayLike, y: npt.ArrayLike) -> Array:
    """Return ρ when x is permuted, in every order; the first is the data's own."""
    r, other = ranks(x), ranks(y)
    scale = math.sqrt((r @ r) * (other @ other)) or math.nan
    return r[orders(len(r))] @ other / scale


def permutation_test(x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[float, float]:
    """Return Spearman's ρ and its one-sided permutation p: the share of orders with a ρ as large.

    Exact up to n = 8, by seeded draws above. Both nan where x or y is constant.
    """
    null = under_no_relation(x, y)
    if np.isnan(null[0]):
        return math.nan, math.nan
    return float(null[0]), float((null >= null[0]).mean())


def critical_value(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Return the ρ to exceed for a permutation p below 0.05, given the ties; nan where undefined.

    The largest ρ that is not enough: 0.679 at n = 7, 0.427 at 16, 0.40 at 18, without ties.
    """
    values, counts = np.unique(under_no_relation(x, y), return_counts=True)
    tail = counts[::-1].cumsum()[::-1] / counts.sum()
    return float(values[tail >= ALPHA].max())


def holm(p: npt.ArrayLike) -> Array:
    """Return p-values adjusted for their number (Holm 1979); a missing one counts as 1.

    The i-th smallest of m becomes max_{j <= i} min(1, (m - j + 1) p_j).
    """
    known = np.nan_to_num(np.asarray(p, dtype=np.float64), nan=1.0)
    order = np.argsort(known, kind="stable")
    steps = np.maximum.accumulate(known[order] * np.arange(len(known), 0, -1))
    adjusted = np.empty_like(known)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


def pairs_needed(decided: int) -> int | None:
    """Return how many of the decided pairs must be right for a binomial one-sided p < 0.05.

    12 of 16, 10 of 12, 7 of 8, 5 of 5; None below 5, where even all would not do.
    """
    enough = (right for right in range(decided + 1) if binomial_p(right, decided) < ALPHA)
    return next(enough, None)


def binomial_p(right: int, decided: int) -> float:
    """Return the chance of so many right ones or more, each right with probability 1/2."""
    return float(scipy.stats.binom.sf(right - 1, decided, 0.5))


def weighted_spearman(x: npt.ArrayLike, y: npt.ArrayLike, weights: Array) -> Array:
    """Return Spearman's ρ in B draws that hold entry i weights[b, i] times, shape (B,).

    Args:
        x: Shape (n,).
        y: Likewise.
        weights: Shape (B, n).
    """
    own = [weighted_ranks(signs(np.asarray(v)[None]), weights) for v in (x, y)]
    return pearson(own[0], own[1], weights)


def related(y: npt.ArrayLike, rho: float, *, num_samples: int = NUM_SAMPLES) -> Array:
    """Draw predictors whose true Spearman's ρ with the outcome is given: a Gaussian copula.

    The outcome's normal is drawn, sorted into the order of y (ties in random order), and a
    predictor of correlation r = 2 sin(π ρ / 6) with it is drawn (Kruskal 1958, section 5).

    Args:
        y: Outcomes, shape (n,), their ties kept; np.arange(n) for n without ties.
        rho: True Spearman's ρ.
        num_samples: Draws.

    Returns:
        Shape (num_samples, n).
    """
    order = ranks(y)
    generator = np.random.default_rng(len(order))
    shape = (num_samples, len(order))
    r = 2 * math.sin(math.pi * rho / 6)
    places = (order + generator.random(shape)).argsort(axis=1).argsort(axis=1)
    latent = np.take_along_axis(np.sort(generator.standard_normal(shape), axis=1), places, axis=1)
    return r * latent + math.sqrt(1 - r * r) * generator.standard_normal(shape)


def power(y: npt.ArrayLike, rho: float) -> float:
    """Return how often the permutation test finds a true ρ at 0.05, by simulation of `related`.

    For a true ρ of 0.6: 0.84 at n = 18, 0.79 at 16, 0.37 at 7.

    Args:
        y: Outcomes, shape (n,), their ties kept; np.arange(n) for n without ties.
        rho: True Spearman's ρ.
    """
    critical = critical_value(np.arange(len(ranks(y))), y)
    return float((spearman(related(y, rho), y) > critical).mean())


def _correlation(a: Array, b: Array) -> Array:
    """Return the correlation of centred vectors along the last axis."""
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    product = (a * b).sum(-1)
    return np.divide(product, scale, out=np.full(np.shape(product), np.nan), where=scale > 0)
