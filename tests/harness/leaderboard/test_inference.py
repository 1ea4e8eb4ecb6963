from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from harness.leaderboard import inference

X = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0])
Y = np.array([2.0, 0.5, 2.0, 0.1, -0.3, 2.0, 0.7])  # three tied at the top


def test_the_permutation_test_of_few_entries_is_exact():
    x, y = stats.rankdata(X), stats.rankdata(Y)
    expected = stats.permutation_test(
        (x,), lambda x, axis: (x * y).sum(axis), permutation_type="pairings",
        alternative="greater", n_resamples=np.inf, vectorized=True,
    )  # fmt: skip
    rho, p = inference.permutation_test(X, Y)
    assert rho == pytest.approx(stats.spearmanr(X, Y).statistic)
    assert p == pytest.approx(expected.pvalue, abs=1e-12)


def test_the_permutation_test_of_many_entries_is_near_the_exact_one_and_never_0():
    y = np.arange(18.0)
    rho, p = inference.permutation_test(y, y)
    assert (rho, p) == (1, 1 / inference.NUM_ORDERS)
    # Zar, Biostatistical analysis, table of Spearman's ρ: one-sided 0.025 at 0.472 for n = 18.
    null = inference.under_no_relation(y, y)
    assert (null >= 0.472).mean() == pytest.approx(0.025, abs=0.002)


def test_a_constant_has_no_correlation_and_no_p():
    assert np.isnan(inference.permutation_test(np.ones(7), Y)).all()
    assert np.isnan(inference.critical_value(np.ones(7), Y))


def test_the_critical_values_are_those_of_the_tables():
    # Smallest significant ρ, one-sided 0.05: 0.714 at n = 7, 0.429 at n = 16.
    for n, below, reached in ((7, 0.678, 0.714), (16, 0.42, 0.4295)):
        assert below < inference.critical_value(np.arange(n), np.arange(n)) < reached
        assert inference.power(np.arange(n), 0.0) == pytest.approx(0.05, abs=0.008)


def test_holm_is_that_of_a_hand_example_and_counts_what_is_missing():
    assert inference.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert inference.holm([0.02, np.nan, 0.5]) == pytest.approx([0.06, 1, 1])


def test_the_partial_correlation_is_that_of_the_ranks_given_the_third():
    z = np.array([1.0, 0, 1, 0, 1, 0, 0])
    xy, xz, yz = (stats.spearmanr(a, b).statistic for a, b in ((X, Y), (X, z), (Y, z)))
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert inference.partial(X, Y, z) == pytest.approx(expected)
    assert inference.partial(X, Y, np.ones(7)) == pytest.approx(xy)
    assert np.isnan(inference.partial(z, Y, z))


def test_an_entry_drawn_twice_counts_as_two():
    weights = np.array([[2.0, 1, 0, 3, 1, 1, 0]])
    x, y = (np.repeat(v, weights[0].astype(int)) for v in (X, Y))
    found = inference.weighted_spearman(X, Y, weights)
    assert found[0] == pytest.approx(stats.spearmanr(x, y).statistic)


@pytest.mark.parametrize(
    ("decided", "right"),
    [(16, 12), (14, 11), (12, 10), (8, 7), (6, 6), (5, 5), (4, None), (0, None)],
)
def test_the_right_pairs_asked_for_are_those_of_a_binomial_p_below_005(decided, right):
    assert inference.pairs_needed(decided) == right
    if right is not None:
        p = stats.binomtest(right, decided, alternative="greater").pvalue
        assert inference.binomial_p(right, decided) == pytest.approx(p)


def test_drawn_predictors_have_the_true_correlation_with_y():
    y = np.random.default_rng(0).permutation(150)
    drawn = inference.spearman(inference.related(y, 0.6, num_samples=400), y)
    assert drawn.mean() == pytest.approx(0.6, abs=0.01)


def test_the_constants_of_the_protocol_are_those_of_the_simulation():
    y = np.arange(18)
    drawn = inference.spearman(inference.related(y, 0.6), y)
    assert (drawn > 0.40).mean() == pytest.approx(0.84, abs=0.01)
    assert np.quantile(drawn, 0.05) == pytest.approx(0.25, abs=0.02)
    null = inference.under_no_relation(y, y)
    assert (null > 0.40).mean() == pytest.approx(0.05, abs=0.003)
    assert inference.power(np.arange(7), 0.6) == pytest.approx(0.37, abs=0.01)
