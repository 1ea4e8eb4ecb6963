from __future__ import annotations

import math

import pytest

from harness.training import climb


def climbed(loss, reference=10.0):
    """Run a climb on a loss of k; return the scores."""
    scores: dict[int, climb.Score] = {}
    while todo := climb.next_rates(scores):
        for k in todo:
            assert k not in scores
            scores[k] = climb.score(loss(k), reference)
    return scores


@pytest.mark.parametrize("optimum", [-13, -4, -1, 0, 3, 9, 20])
def test_the_best_is_found_wherever_it_is_and_has_worse_neighbours(optimum):
    scores = climbed(lambda k: 1 + 0.01 * (k - optimum) ** 2)
    best = climb.best(scores)
    assert best == optimum
    lower, higher = [k for k in scores if k < best], [k for k in scores if k > best]
    assert len(lower) >= 2
    assert len(higher) >= 2
    assert min(scores[k] for k in lower + higher) > scores[best]


def test_two_half_decades_on_each_side_of_the_best_half_decade_were_tried():
    scores = climbed(lambda k: abs(k - 6))
    assert {2, 4, 5, 6, 7, 8, 10} <= set(scores)


def test_a_diverged_run_counts_as_the_reference_and_is_never_preferred():
    assert climb.score(None, 2.3) == (2.3, math.inf)
    scores = climbed(lambda k: None if k > 0 else 2.5 + abs(k + 6) / 100, reference=2.3)
    assert climb.best(scores) == -6  # all count as 2.3: the loss itself decides


def test_a_loss_above_the_reference_counts_as_the_reference():
    assert climb.score(3.0, 2.3)[0] == 2.3
    assert climb.score(2.0, 2.3) == (2.0, 2.0)


def test_a_loss_that_falls_with_the_rate_for_ever_has_no_best_rate():
    with pytest.raises(climb.NoBestRate, match=r"7\.5 decades"):
        climbed(lambda k: 1.0 + 0.001 * k)


def test_of_equal_runs_the_smaller_rate_is_best():
    assert climb.best({0: (1.0, 1.0), 2: (1.0, 1.0)}) == 0


def test_the_climb_of_means_goes_on_until_the_best_has_two_worse_neighbours():
    scores = climbed(lambda k: abs(k - 3))
    means: dict[int, climb.Score] = {}
    while todo := climb.next_of_means(scores, means):
        means |= {k: climb.mean([scores.get(k, (9.0, 9.0)), (abs(k + 1.0) * 5, 0.0)]) for k in todo}
    best = climb.best(means)
    assert {best - 1, best, best + 1} <= set(means)
    assert best < 3


def test_means_without_a_best_rate_fail():
    with pytest.raises(climb.NoBestRate):
        climb.next_of_means({}, {k: (1.0 + 0.001 * k, 0.0) for k in range(-40, 1)})
