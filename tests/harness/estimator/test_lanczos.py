from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from harness.estimator.lanczos import advance, lanczos, start
from spectra_db.quadrature import gauss_rule, residual_bounds

n = 60


def matrix(eigenvalues, seed=0):
    """Return a symmetric matrix of the given spectrum in a random basis, float64."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return Q @ torch.diag(torch.as_tensor(eigenvalues, dtype=torch.float64)) @ Q.T


def vector(size=n, seed=1, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


SPECTRA = {
    "linear": np.linspace(-1, 3, n),
    "geometric": np.geomspace(1e-6, 1, n),
    "outliers": np.r_[np.zeros(n - 3), 5.0, 50.0, -20.0],
}


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_basis_is_orthonormal_and_satisfies_the_recurrence(spectrum):
    A = matrix(spectrum)
    run = lanczos(A.mv, vector(), 20, reorthogonalize=True)
    m = len(run.alphas)
    off_diagonal = run.betas[:-1]
    T = torch.from_numpy(np.diag(run.alphas) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1))
    Q = torch.stack(run.basis[:m], 1)
    R = A @ Q - Q @ T
    scale = np.abs(spectrum).max()
    torch.testing.assert_close(Q.T @ Q, torch.eye(m, dtype=torch.float64), atol=1e-13, rtol=0)
    assert R[:, :-1].abs().max() < 1e-13 * scale
    assert float(R[:, -1].norm()) == pytest.approx(run.betas[-1], abs=1e-13 * scale)


@pytest.mark.parametrize("reorthogonalize", [False, True])
def test_gauss_rule_integrates_polynomials_up_to_degree_2m_minus_1(reorthogonalize):
    A, v0 = matrix(SPECTRA["linear"]), vector()
    m = 8
    run = lanczos(A.mv, v0, m, reorthogonalize=reorthogonalize)
    nodes, weights = gauss_rule(run.alphas, run.betas)
    v = v0 / v0.norm()
    moment = v.clone()
    for degree in range(2 * m):
        assert weights @ nodes**degree == pytest.approx(float(v @ moment), rel=1e-10)
        moment = A @ moment
    assert weights @ nodes ** (2 * m) != pytest.approx(float(v @ moment), rel=1e-10)


def test_rule_is_exact_at_full_order_with_reorthogonalisation():
    A, v0 = matrix(SPECTRA["linear"]), vector()
    run = lanczos(A.mv, v0, n + 10, reorthogonalize=True)
    nodes, weights = gauss_rule(run.alphas, run.betas)
    eigenvalues, U = torch.linalg.eigh(A)
    assert run.breakdown
    np.testing.assert_allclose(nodes, eigenvalues, atol=1e-12)
    np.testing.assert_allclose(weights, (U.T @ (v0 / v0.norm())).square(), atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_steps_after_the_space_is_exhausted_leave_the_rule(scale, dtype):
    eigenvalues = np.r_[np.zeros(n - 2), 1.0, 3.0]
    A, v0 = matrix(eigenvalues), vector(dtype=dtype)
    run = lanczos((A * scale).to(dtype).mv, v0, 20)
    nodes, weights = gauss_rule(run.alphas, run.betas)
    exact = gauss_rule(*[getattr(lanczos(A.mv, v0.double(), 3), x) for x in ("alphas", "betas")])
    distance = wasserstein_distance(nodes / scale, exact[0], weights, exact[1])
    assert distance <= 10 * torch.finfo(dtype).eps
    assert weights.sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [2.0**-40, 1.0, 2.0**40])
@pytest.mark.parametrize(("roundings", "ends"), [(0.9, True), (1.1, False), (64, False)])
def test_a_residual_below_a_rounding_error_of_the_norm_ends_at_any_scale(
    roundings, ends, scale, dtype
):
    small = roundings * 2 * torch.finfo(dtype).eps  # 2: the norm after two steps
    A = torch.tensor([[1, 1, 0], [1, 1, small], [0, small, 1]], dtype=dtype) * scale
    run = lanczos(A.mv, torch.tensor([1, 0, 0], dtype=dtype), 2)
    assert run.breakdown is ends


@pytest.mark.parametrize("ratio", [1e4, 1e5, 1e6, 1e7])
def test_an_outlier_leaves_the_bulk_its_spectrum_in_float32(ratio):
    size = 300
    bulk = np.random.default_rng(0).standard_normal(size - 1)
    A, v0 = matrix(np.r_[bulk, ratio]), vector(size, dtype=torch.float32)
    moments = []
    for operator, start_vector in ((A, v0.double()), (A.float(), v0)):
        run = lanczos(operator.mv, start_vector, 40)
        nodes, weights = gauss_rule(run.alphas, run.betas)
        inside = np.abs(nodes) < ratio / 2
        moments.append([weights[inside] @ nodes[inside] ** k for k in (0, 1, 2)])
        assert not run.breakdown
    # A product's rounding, 6e-8 of the outlier, is a perturbation of the bulk.
    np.testing.assert_allclose(moments[1], moments[0], atol=0.01 + 6e-8 * ratio)


def test_rank_one_operator_ends_after_two_steps_with_its_eigenvalue():
    u = vector(seed=3)
    u /= u.norm()
    run = lanczos(lambda v: 7.0 * u * (u @ v), vector(), 10)
    nodes, _ = gauss_rule(run.alphas, run.betas)
    np.testing.assert_allclose(nodes, [0, 7], atol=1e-12)


def test_zero_operator_ends_after_one_step_with_all_weight_at_zero():
    run = lanczos(torch.zeros_like, vector(), 10)
    nodes, weights = gauss_rule(run.alphas, run.betas)
    assert (run.alphas, run.betas, run.breakdown) == ([0.0], [0.0], True)
    assert (nodes.tolist(), weights.tolist()) == ([0.0], [1.0])


def test_block_smaller_than_num_steps_never_takes_more_steps_than_parameters():
    A = matrix([1.0, 2.0, 4.0])
    run = lanczos(A.mv, vector(3), 50)
    assert len(run.alphas) == 3
    assert run.breakdown
    np.testing.assert_allclose(gauss_rule(run.alphas, run.betas)[0], [1, 2, 4], atol=1e-12)


def test_eigenvector_start_breaks_down_at_once():
    A = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
    run = lanczos(A.mv, torch.eye(5, dtype=torch.float64)[2], 4)
    assert (run.alphas, run.breakdown) == ([3.0], True)


def test_lockstep_equals_one_at_a_time():
    operators = [matrix(s) for s in SPECTRA.values()]
    alone = [lanczos(A.mv, vector(), 6) for A in operators]
    together = [start(vector()) for _ in operators]
    for _ in range(6):
        live = [(A, r) for A, r in zip(operators, together, strict=True) if not r.breakdown]
        advance([r for _, r in live], [A @ r.vector for A, r in live])
    for a, b in zip(alone, together, strict=True):
        assert (a.alphas, a.betas) == (b.alphas, b.betas)


def test_float32_products_keep_moments_to_float32_rounding():
    A = matrix(SPECTRA["linear"])
    exact = lanczos(A.mv, vector(dtype=torch.float32).double(), 15)
    rounded = lanczos(A.float().mv, vector(dtype=torch.float32), 15)
    for degree in (1, 2):
        a, b = (w @ t**degree for t, w in (gauss_rule(r.alphas, r.betas) for r in (exact, rounded)))
        assert a == pytest.approx(b, rel=1e-6)


def test_an_eigenvalue_lies_within_the_residual_bound_of_every_node():
    A = matrix(SPECTRA["geometric"])
    run = lanczos(A.mv, vector(), 12, reorthogonalize=True)
    nodes, _ = gauss_rule(run.alphas, run.betas)
    distance = np.abs(nodes[:, None] - SPECTRA["geometric"]).min(1)
    assert (distance <= residual_bounds(run.alphas, run.betas) + 1e-14).all()


def test_infinite_products_are_reported_with_their_step():
    with pytest.raises(FloatingPointError, match=r"product 1 .* not finite"):
        lanczos(lambda v: v * float("inf"), vector(), 3)


@pytest.mark.parametrize("v0", [torch.zeros(3), torch.tensor([1.0, float("nan"), 0.0])])
def test_a_zero_or_nan_start_vector_is_refused(v0):
    with pytest.raises(ValueError, match="start vector has norm"):
        start(v0)


def test_at_least_one_step_is_needed():
    with pytest.raises(ValueError, match="num_steps is 0"):
        lanczos(torch.zeros_like, vector(), 0)
