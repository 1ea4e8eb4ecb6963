"""Models drawn anew by family: the draws, intervals of them, and thresholds left a family out.

Arrays are of shape (B, n): B draws of n models, of which draw b counts model i weights[b, i] times.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from harness.leaderboard.ranks import Array

LEVEL = 0.95
NUM_DRAWS = 4000  # another seed then moves the ends of intervals by about 0.02
MIN_MODELS = 4


def resampled(
    families: pd.Series, generator: np.random.Generator, num_draws: int
) -> tuple[npt.NDArray[np.intp], pd.Index, Array]:
    """Draw as many families as there are with replacement, all models of a family together.

    Returns:
        Number of each model's family, names of the families, and how often each draw holds a
        model, shape (num_draws, n).
    """
    numbers, names = pd.factorize(families, sort=True)
    count = len(names)
    picked = generator.multinomial(count, np.full(count, 1 / count), size=num_draws)
    return numbers, pd.Index(names), picked[:, numbers].astype(np.float64)


def interval(values: Array) -> tuple[float, float]:
    """Return the 95 % interval of draws; nan where most leave the statistic undefined."""
    known = values[~np.isnan(values)]
    if 2 * len(known) < len(values):
        return np.nan, np.nan
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(known, [tail, 100 - tail])
    return float(low), float(high)


def left_out_accuracy(
    x: Array, needed: Array, families: npt.NDArray[np.intp], weights: Array
) -> tuple[Array, Array]:
    """Return how often a threshold set on the other families tells whether Adam is needed.

    Adam is predicted where x is at or above the threshold: the direction is the paper's and not
    fitted. The threshold makes the fewest errors on the other families; of several, the one in the
    widest gap.

    Args:
        x: The metric in B draws, shape (B, n).
        needed: 1 where Adam is needed, shape (B, n).
        families: Number of each model's family, shape (n,).
        weights: How often each model counts, shape (B, n).

    Returns:
        The accuracy, and that of the majority of the other families; both of shape (B,), nan in
        draws of one family, which has no others.
    """
    order = np.argsort(x, axis=1, kind="stable")
    xs, labels, w = (np.take_along_axis(a, order, axis=1) for a in (x, needed, weights))
    family = families[order]
    right, of_majority, several = np.zeros((3, len(x)))
    for f in np.unique(families):
        drawn = np.flatnonzero(weights[:, families == f].any(axis=1))
        of_f = family[drawn] == f
        own, others = np.where(of_f, w[drawn], 0), np.where(of_f, 0, w[drawn])
        values, truth = xs[drawn], labels[drawn]
        threshold = _threshold(values, truth, others)
        right[drawn] += (own * ((values >= threshold[:, None]) == truth)).sum(axis=1)
        majority = (others * (2 * truth - 1)).sum(axis=1, keepdims=True) > 0
        of_majority[drawn] += (own * (majority == truth)).sum(axis=1)
        several[drawn] = others.any(axis=1)
    total = np.where(several > 0, w.sum(axis=1), np.nan)
    return right / total, of_majority / total


def _threshold(x: Array, needed: Array, weights: Array) -> Array:
    """Return the threshold of fewest errors of each draw, of equals the one in the widest gap.

    Args:
        x: Values, ascending, shape (B, n).
        needed: 1 where Adam is needed.
        weights: How often each counts; a threshold lies in the middle between two that do.
    """
    places = len(x), x.shape[1] + 1
    # With the threshold before place t: those needed below it, and false alarms at or above.
    errors, under, above = np.empty((3, *places))
    errors[:, 0] = (weights * (1 - needed)).sum(axis=1)
    np.cumsum(weights * (2 * needed - 1), axis=1, out=errors[:, 1:])
    errors[:, 1:] += errors[:, :1]
    under[:, 0], above[:, -1] = -np.inf, np.inf
    np.maximum.accumulate(np.where(weights > 0, x, -np.inf), axis=1, out=under[:, 1:])
    backwards = np.where(weights > 0, x, np.inf)[:, ::-1]
    np.minimum.accumulate(backwards, axis=1, out=above[:, -2::-1])
    gap = above - under
    margin = np.where(np.isfinite(gap), gap, 0.0)
    widest = np.maximum(margin.max(axis=1, keepdims=True), 1e-300)
    score = np.where(gap > 0, errors - 0.5 * margin / widest, np.inf)
    best = score.argmin(axis=1, keepdims=True)
    low, high = (np.take_along_axis(side, best, axis=1)[:, 0] for side in (under, above))
    inside = np.isfinite(low) & np.isfinite(high)
    middle = np.where(inside, low, 0.0) + np.where(inside, high - low, 0.0) / 2
    return np.where(inside, middle, np.where(np.isfinite(high), -np.inf, np.inf))
