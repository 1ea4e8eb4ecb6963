from __future__ import annotations

import numpy as np
import pytest

from harness.paper.quadratic import (
    Quadratic,
    adam,
    from_spectra,
    joint_affine,
    least_steps,
    preconditioned_losses,
    sample_rule,
    steps_to,
)


@pytest.fixture
def problem():
    rng = np.random.default_rng(1)
    quadratic = from_spectra([np.array([1.0, 2, 3]), np.array([30.0, 50])], rng)
    return quadratic, rng.standard_normal(5)


def test_orthonormal_factors_keep_the_eigenvalues_and_gaussian_ones_do_not():
    spectra = [np.array([1.0, 2, 3]), np.array([99.0, 100])]
    kept = from_spectra(spectra, np.random.default_rng(0))
    for found, given in zip(kept.block_eigenvalues, spectra, strict=True):
        np.testing.assert_allclose(found, given, rtol=1e-12)
    assert kept.extremes == pytest.approx((1, 100))
    np.testing.assert_allclose(kept.block_conditions, [3, 100 / 99])
    other = from_spectra(spectra, np.random.default_rng(0), orthonormal=False)
    assert not np.allclose(other.block_eigenvalues[0], spectra[0], rtol=0.1)


def test_the_hessian_is_zero_outside_its_blocks(problem):
    quadratic, _ = problem
    assert not quadratic.hessian[:3, 3:].any()
    np.testing.assert_array_equal(quadratic.hessian[3:, 3:], quadratic.blocks[1])


def test_one_affine_map_keeps_the_blocks_relative_ranges():
    small, large = joint_affine([np.array([0.0, 1.0]), np.array([-1.0, 9.0])])
    assert (large.min(), large.max()) == (1, 5000)
    assert np.ptp(large) / np.ptp(small) == pytest.approx(10)
    with pytest.raises(ValueError, match="single value"):
        joint_affine([np.ones(3)])


def test_sampled_eigenvalues_follow_the_rule():
    nodes, weights = np.array([5.0, 0.0, 1.0]), np.array([0.01, 0.9, 0.09])
    quantiles = sample_rule(nodes, weights, None, 25)
    assert quantiles.max() == 5  # the outlier is there however light it is
    assert (quantiles == 0).mean() == pytest.approx(0.9, abs=0.04)
    drawn = sample_rule(nodes, weights, np.random.default_rng(0), 20_000)
    np.testing.assert_allclose([(drawn == x).mean() for x in nodes], weights, atol=0.01)


def test_the_closed_form_is_gradient_descent_step_by_step(problem):
    quadratic, start = problem
    H, w, losses = quadratic.hessian, start, []
    for _ in range(20):
        losses.append(0.5 * w @ H @ w)
        w = w - 0.03 * H @ w
    closed = preconditioned_losses(H, start, np.ones(5), np.array([0.03]), np.arange(20))
    np.testing.assert_allclose(closed[0], losses, rtol=1e-10)


def test_the_closed_form_is_adam_where_the_second_moment_stays(problem):
    quadratic, start = problem
    H, rates = quadratic.hessian, np.array([0.01, 0.05])
    closed = preconditioned_losses(H, start, np.abs(H @ start), rates, np.arange(31))
    np.testing.assert_allclose(adam(H, start, rates, 30, beta2=1.0), closed, rtol=1e-9)


def test_adam_with_decay_follows_algorithm_3(problem):
    quadratic, start = problem
    H, w = quadratic.hessian, start
    v, losses = (H @ start) ** 2, []
    for _ in range(25):
        g = H @ w
        losses.append(0.5 * w @ g)
        v = 0.9 * v + 0.1 * g**2
        w = w - 0.02 * g / np.sqrt(v)
    found = adam(H, start, np.array([0.02]), 24, beta2=0.9)
    np.testing.assert_allclose(found[0], losses, rtol=1e-10)


def test_steps_are_the_first_below_the_tolerance(problem):
    quadratic, start = problem
    H, ones = quadratic.hessian, np.ones(5)
    steps = steps_to(H, start, ones, 0.02, 1e-3)
    losses = preconditioned_losses(H, start, ones, np.array([0.02]), np.arange(steps + 1))[0]
    assert losses[-1] <= 1e-3 * losses[0] < losses[-2]
    assert steps_to(H, start, ones, 1.0, 1e-3) == np.inf  # 1.0 > 2 / 50 diverges


def test_least_steps_beats_every_other_rate_of_the_grid(problem):
    quadratic, start = problem
    H, ones = quadratic.hessian, np.ones(5)
    steps, eta = least_steps(H, start, ones, 1e-4)
    assert steps == steps_to(H, start, ones, eta, 1e-4)
    others = [steps_to(H, start, ones, rate, 1e-4) for rate in np.geomspace(0.001, 0.1, 20)]
    assert steps <= 1.05 * min(others)


def test_a_scalar_block_is_solved_in_one_step():
    quadratic = Quadratic((np.array([[4.0]]),))
    assert steps_to(quadratic.hessian, np.ones(1), np.ones(1), 0.25, 1e-12) == 1
