"""The climb to the best learning rate. Pure: losses in, rates out.

Rates are r_k = r_0 · 10^(k/4), k an integer: even ones are half a decade apart. From k = 0 the
climb goes on until the best of the even ones has two worse neighbours on each side, with no cap,
and then tries the two odd neighbours of the best. So the best is never at an edge. What is best of
one seed may be too much for another: `next_of_means` goes on by the mean over several.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

PER_DECADE = 4
HALF = 2  # quarter-decades in half a decade
# Where nothing is learnt at any rate there is no best one: fifteen decades are enough to see it.
LIMIT = 30

# What a run is chosen by: its loss, R if that is more, and among equals its loss as it is.
Score = tuple[float, float]


class NoBestRate(ValueError):  # noqa: N818
    """The loss has no minimum over the learning rates."""


def rate(start: float, k: int) -> float:
    """Return a rate of the climb, rounded to 6 digits, so that it is the same key in every table.

    >>> [rate(0.1, k) for k in (-2, 0, 1, 4)]
    [0.0316228, 0.1, 0.177828, 1.0]
    """
    return float(f"{start * 10 ** (k / PER_DECADE):.6g}")


def score(loss: float | None, reference: float) -> Score:
    """Return what a run is chosen by; a diverged one, whose loss is None, counts as R."""
    return (reference, math.inf) if loss is None else (min(loss, reference), loss)


def mean(scores: Sequence[Score]) -> Score:
    """Return the mean score of several runs."""
    losses, ties = zip(*scores, strict=True)
    return sum(losses) / len(scores), sum(ties) / len(scores)


def best(scores: Mapping[int, Score]) -> int:
    """Return the k of the best run, the smallest of equals."""
    return min(sorted(scores), key=lambda k: scores[k])


def next_rates(scores: Mapping[int, Score]) -> list[int]:
    """Return the k to run next; none when the climb has ended.

    Args:
        scores: Of the runs so far, by k.

    Raises:
        NoBestRate: The climb went `LIMIT` quarter-decades from where it began.
    """
    if 0 not in scores:
        return [0]
    top = _top({k: scores[k] for k in scores if k % HALF == 0})
    for distance in (HALF, 2 * HALF, 1):
        missing = [k for k in (top - distance, top + distance) if k not in scores]
        if missing:
            return missing
    return []


def next_of_means(scores: Mapping[int, Score], means: Mapping[int, Score]) -> list[int]:
    """Return the k to run on more seeds; none when the best mean has two worse neighbours.

    Args:
        scores: Of a climb that has ended.
        means: Over the seeds, by k, of those that all of them have run.

    Raises:
        NoBestRate: The best mean is `LIMIT` quarter-decades from where the climb began.
    """
    top = _top(means or scores)
    return [k for k in (top - 1, top, top + 1) if k not in means]


def _top(scores: Mapping[int, Score]) -> int:
    top = best(scores)
    if abs(top) > LIMIT:
        raise NoBestRate(f"the best learning rate is more than {LIMIT / PER_DECADE:g} decades off")
    return top
