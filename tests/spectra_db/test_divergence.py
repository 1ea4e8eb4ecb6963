from __future__ import annotations

import itertools
import time

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from spectra_db.densities import lattice_densities
from spectra_db.divergence import js_divergences, w1_distances
from spectra_db.heterogeneity import metrics, pairwise_js

from .synthetic import like_a_network, slq_rows


def divergences(rules, sigma):
    _, densities = lattice_densities(rules, sigma)
    return js_divergences(densities, np.arange(len(rules)), len(rules))


def mpmath_divergence(p, q, sigma):
    """Integrate the entropy form at 30 digits, node by node."""
    with mpmath.workdps(30):

        def density(rule, t):
            return mpmath.fsum(w * mpmath.npdf(t, x, sigma) for x, w in zip(*rule, strict=True))

        def integrand(t):
            a, b = density(p, t), density(q, t)
            return sum(x * mpmath.log(x / ((a + b) / 2)) / 2 for x in (a, b) if x > 0)

        nodes = sorted({float(x) for x in (*p[0], *q[0])})
        # Pieces of two widths around every node; the integrand is nothing beyond 9 widths.
        pieces = sorted({x + 2 * k * sigma for x in nodes for k in range(-4, 5)})
        total = mpmath.mpf(0)
        for left, right in itertools.pairwise(pieces):
            if right - left <= 2.001 * sigma:
                total += mpmath.quad(integrand, [left, right])
        return float(total)


@st.composite
def rules(draw, count=2):
    made = []
    for _ in range(count):
        size = draw(st.integers(1, 6))
        nodes = draw(st.lists(st.floats(-1e6, 1e6, width=32), min_size=size, max_size=size))
        weights = draw(st.lists(st.floats(0, 1), min_size=size, max_size=size))
        weights[0] += 1e-3
        made.append((np.sort(nodes), np.array(weights) / np.sum(weights)))
    return made


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (([0.0], [1.0]), ([0.04], [1.0])),
        (([0.0], [1.0]), ([0.3], [1.0])),
        (([-1.0, 0.0, 0.1], [0.2, 0.5, 0.3]), ([-0.97, 0.02, 2.0], [0.1, 0.6, 0.3])),
        (([0.0, 1.0], [1 - 1e-9, 1e-9]), ([0.0, 3.0], [1.0 - 1e-3, 1e-3])),
        (([0.0, 0.013], [0.5, 0.5]), ([0.0, 0.017], [0.5, 0.5])),
    ],
)
def test_agrees_with_integration_at_30_digits(p, q):
    p, q = (tuple(np.array(x) for x in rule) for rule in (p, q))
    # What lies beyond 5 widths has a mass of 6e-7.
    found = divergences([p, q], 0.05)[0, 1]
    assert found == pytest.approx(mpmath_divergence(p, q, 0.05), abs=2e-6)


def test_agrees_with_a_dense_grid_on_spectra_of_slq():
    rng = np.random.default_rng(0)
    rows = slq_rows([like_a_network(rng, 1200) for _ in range(3)], 3, 40, rng)
    rules = []
    for _, group in rows.groupby("block"):
        nodes = np.concatenate(group["nodes"].to_list())
        weights = np.concatenate(group["weights"].to_list()) / 3
        rules.append((nodes / np.abs(nodes).max(), weights))
    t = np.arange(-1.5, 1.5, 1e-4)
    P = [
        sum(w * np.exp(-0.5 * ((t - x) / 0.01) ** 2) for x, w in zip(*rule, strict=True))
        / (0.01 * np.sqrt(2 * np.pi))
        for rule in rules
    ]
    found = divergences(rules, 0.01)
    for k in range(3):
        for j in range(k):
            m = (P[k] + P[j]) / 2
            with np.errstate(divide="ignore", invalid="ignore"):
                terms = [np.where(x > 0, x * np.log(x / m), 0.0) for x in (P[k], P[j])]
            assert found[k, j] == pytest.approx(0.5 * np.sum(terms) * 1e-4, abs=1e-5)


@given(rules())
@settings(deadline=None)
def test_divergence_is_symmetric_bounded_and_finite(pair):
    D = divergences(pair, 0.05)
    assert np.isfinite(D).all()
    assert D[0, 1] == pytest.approx(D[1, 0], abs=1e-12)
    assert 0 <= D[0, 1] <= np.log(2)
    assert (np.diag(D) == 0).all()


@given(rules(count=1))
@settings(deadline=None)
def test_divergence_of_equals_is_zero(one):
    assert divergences([one[0], one[0]], 0.05)[0, 1] == pytest.approx(0, abs=1e-12)


@given(rules(), st.floats(-300, 300), st.sampled_from([1e-3, 0.05]))
@settings(deadline=None)
def test_divergence_is_finite_at_any_magnitude(pair, exponent, sigma):
    scaled = [(nodes * 10.0**exponent, weights) for nodes, weights in pair]
    D = divergences(scaled, sigma)
    assert np.isfinite(D).all()
    assert (np.log(2) >= D).all()


@pytest.mark.parametrize("weight", [0.0, 5e-324])
def test_spectra_that_meet_only_at_a_node_of_no_weight_are_at_the_largest_distance(weight):
    first, second = [(np.array([at, 1.0]), np.array([1 - weight, weight])) for at in (0.0, -1.0)]
    assert divergences([first, second], 0.001)[0, 1] == pytest.approx(np.log(2), abs=1e-6)


def test_apart_spectra_are_at_the_largest_distance():
    D = divergences([(np.zeros(1), np.ones(1)), (np.ones(1), np.ones(1))], 0.01)
    assert D[0, 1] == pytest.approx(np.log(2), abs=1e-6)


def test_denormal_weights_give_no_infinity():
    tiny = np.array([1 - 5e-324, 5e-324])
    D = divergences([(np.array([0.0, 0.2]), tiny), (np.array([0.01, 0.2]), tiny[::-1])], 0.05)
    assert np.isfinite(D).all()


def test_raw_eigenvalues_over_a_million_widths_are_cheap():
    rng = np.random.default_rng(0)
    some = [(np.sort(rng.uniform(-1e4, 1e4, 500)), np.full(500, 1 / 500)) for _ in range(20)]
    lattice, densities = lattice_densities(some, 0.01)
    assert len(lattice) < 20 * 500 * 31 < 2e6 * 3
    assert densities.nnz < 20 * 500 * 31 + 1


@given(rules(count=3))
@settings(deadline=None, max_examples=50)
def test_wasserstein_distances_agree_with_scipy(some):
    found = w1_distances(some, np.arange(3), 3)
    for k in range(3):
        for j in range(3):
            expected = wasserstein_distance(some[k][0], some[j][0], some[k][1], some[j][1])
            assert found[k, j] == pytest.approx(expected, rel=1e-9, abs=1e-9 * 1e6)


def test_wasserstein_distances_of_spectra_are_within_a_thousandth_of_scipy():
    rng = np.random.default_rng(1)
    some = [(like_a_network(rng, 2000), np.full(2000, 1 / 2000)) for _ in range(4)]
    found = w1_distances(some, np.arange(4), 4)
    for k in range(4):
        for j in range(k):
            expected = wasserstein_distance(some[k][0], some[j][0])
            assert found[k, j] == pytest.approx(expected, rel=1e-3)


def test_a_hundred_blocks_with_their_jackknife_take_seconds():
    rng = np.random.default_rng(0)
    # Rules of 100 nodes, 10 a block, as 100 steps leave them: outliers shared, bulk scattered.
    rows = slq_rows([like_a_network(rng, 400) for _ in range(10)], 10, 100, rng)
    rows = rows.loc[rows.index.repeat(10)].reset_index(drop=True)
    rows["block"] = [f"{b}.{i % 10}" for i, b in enumerate(rows["block"])]
    factors = {block: rng.uniform(0.5, 2) for block in rows["block"].unique()}
    rows["nodes"] = [x * factors[b] for x, b in zip(rows["nodes"], rows["block"], strict=True)]
    begin = time.process_time()
    pairwise_js(rows)
    # 1.5 s on one core; the bound leaves room for slower ones.
    assert time.process_time() - begin < 5


def test_metrics_of_few_blocks_take_no_time():
    rng = np.random.default_rng(0)
    rows = slq_rows([like_a_network(rng, 500) for _ in range(4)], 3, 40, rng)
    begin = time.process_time()
    metrics(rows)
    assert time.process_time() - begin < 2
