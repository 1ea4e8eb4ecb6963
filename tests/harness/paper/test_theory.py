from __future__ import annotations

import numpy as np
import pytest

from harness.paper import theory
from harness.paper.quadratic import Quadratic


def test_gradient_descent_contracts_by_the_square_of_the_printed_bound_and_no_better():
    found = theory.gradient_descent_bound(kappa=100.0, num_rates=2001)
    rho = 1 - 2 / 101
    assert found["loss_gap"] == pytest.approx(1 - rho**2)
    assert found["loss_gap"] > found["printed_gap"]
    assert found["largest_loss_gap"] == pytest.approx(1 - rho**2)
    assert found["largest_norm_gap"] == pytest.approx(1 - rho)
    assert found["best_eta_over_2_by_mu_plus_l"] == 1
    assert found["least_loss_over_bound"] >= 1


def test_r_is_the_squared_ratio_of_scaled_gradients():
    quadratic = Quadratic((np.diag([1.0, 2.0]), np.diag([10.0])))
    start = np.array([3.0, 1.0, 5.0])  # gradients 3, 2 and 50, over 2, 2 and 10
    least, largest = theory.start_constants(quadratic, start)
    np.testing.assert_allclose(least, [1.0, 5.0])
    np.testing.assert_allclose(largest, [1.5, 5.0])
    assert theory.initial_ratio(quadratic, start) == pytest.approx(25.0)


def test_the_bound_holds_with_the_proofs_rate_and_fails_with_the_printed_one():
    rng = np.random.default_rng(2)
    counts = theory.adam_bound_counts([theory.random_quadratic(rng) for _ in range(200)], rng)
    assert counts["violations_proof"] == 0
    cases = theory.adam_bound_counts([theory.case3(rng) for _ in range(100)], rng)
    assert cases["violations_proof"] == 0
    assert cases["violations_statement"] > 90


def test_a_rate_that_breaks_the_bound_is_seen():
    # One eigenvalue at η = C + its double: the loss does not fall at all.
    quadratic = Quadratic((np.diag([1.0]),))
    assert theory.adam_bound(quadratic, np.array([0.4])) == {"proof": True, "statement": False}


def test_orthonormal_factors_fit_the_papers_probability_better():
    orthonormal = theory.initial_ratio_probability(2000, 0, orthonormal=True)
    gaussian = theory.initial_ratio_probability(2000, 0, orthonormal=False)
    assert abs(orthonormal - 2 / 3) < 0.06 < abs(gaussian - 2 / 3)


def test_preconditioned_conditions_are_heavy_tailed():
    found = theory.preconditioned_conditions(500, 0)
    for k in range(3):
        assert found["q10"][k] < found["median"][k] < found["q90"][k] < found["q99"][k]
        assert found["mean"][k] > 1.5 * found["median"][k]


@pytest.mark.parametrize("beta2", [0.5, 0.99, 0.999])
def test_adam_with_decay_ends_in_the_cycle_of_half_the_rate(beta2):
    [row] = theory.limit_cycle(eta=0.03, betas=(beta2,), num_steps=40_000)
    assert row["end_over_half_eta"] == pytest.approx(1, rel=1e-3)  # at 0.999 it is still settling


def test_adam_without_decay_converges():
    [row] = theory.limit_cycle(betas=(1.0,), num_steps=2000)
    assert row["log10_end"] < -8


def test_only_the_condition_numbers_of_the_blocks_count_for_adam():
    found = theory.complexity(6, 0)
    for family in ("heterogeneous", "homogeneous"):
        assert found[family]["gradient_descent_slope"] == pytest.approx(1, abs=0.05)
    assert abs(found["heterogeneous"]["adam_slope"]) < 0.2 < found["homogeneous"]["adam_slope"]
