"""What stochastic Lanczos quadrature gives at the paper's m = 100, n_v = 10 (appendix D.1).

Two errors are told apart: that of the quadrature, for one start vector against the exact measure
of the same vector; and that of the probes, the average over ten vectors against the spectrum.
"""

from __future__ import annotations

import numpy as np
import torch

from harness.estimator import find_blocks
from harness.estimator.lanczos import lanczos
from harness.estimator.operators import opened
from harness.estimator.probes import draw_probe, probe_seed
from harness.estimator.settings import Settings
from harness.paper.quadratic import Array
from harness.registry import get
from harness.training import load_problem
from spectra_db.densities import SIGMA, lambda10
from spectra_db.heterogeneity import RAW_SIGMA
from spectra_db.quadrature import gauss_rule

NUM_STEPS, NUM_PROBES = 100, 10
# Real blocks of 1,024 parameters, whose dense Hessian takes seconds on this many samples.
BLOCKS = (("gpt-pydoc", "h.0.attn.query.weight"), ("vit-digits", "blocks.0.attn.query.weight"))
NUM_SAMPLES = 16


def dense_block(model: str, block: str, num_samples: int = NUM_SAMPLES) -> Array:
    """Return the exact Hessian of a block at initialisation, float64, shape (n, n)."""
    problem = load_problem(get(model))
    objective = problem.objective.first(num_samples)
    found = [b for b in find_blocks(problem.model) if b.name == block]
    with opened(objective, found, Settings(dtype="float64", device="cpu")) as hessian:
        return np.asarray(hessian.dense(0).numpy())


def slq_error(matrix: Array) -> dict[str, float]:
    """Measure the errors of SLQ on a symmetric matrix in float64.

    Returns:
        n; the L1 distance between smoothed densities (0 to 2) at both widths, largest over probes
        for the quadrature and of the average for the whole; relative errors of ‖H‖_F² and of the
        largest |eigenvalue|.
    """
    values, vectors = np.linalg.eigh(matrix)
    n = len(values)
    A = torch.from_numpy(matrix)
    rules, measures = [], []
    for probe in range(NUM_PROBES):
        v = draw_probe(n, probe_seed(0, "paper", "init", "slq", probe), "gaussian").double()
        run = lanczos(lambda x: A @ x, v, NUM_STEPS)
        rules.append(gauss_rule(run.alphas, run.betas))
        measures.append((vectors.T @ (v / v.norm()).numpy()) ** 2)
    scale = lambda10(values, np.full(n, 1 / n), n)
    result: dict[str, float] = {"n": n}
    for name, sigma in (("raw", RAW_SIGMA), ("lambda10", SIGMA * scale)):
        grid = _grid(values, sigma)
        exact = _density(values, np.full(n, 1 / n), sigma, grid)
        estimates = [_density(nodes, weights, sigma, grid) for nodes, weights in rules]
        per_vector = [_density(values, w, sigma, grid) for w in measures]
        result[f"quadrature_{name}"] = max(
            _l1(p - q, grid) for p, q in zip(estimates, per_vector, strict=True)
        )
        result[f"total_{name}"] = _l1(np.mean(estimates, axis=0) - exact, grid)
    square = float(np.mean([w @ nodes**2 for nodes, w in rules]) * n)
    result["frobenius_squared"] = float(abs(square / (values @ values) - 1))
    largest = np.abs(values).max()
    result["largest"] = float(abs(max(np.abs(x).max() for x, _ in rules) / largest - 1))
    return result


def _grid(values: Array, sigma: float) -> Array:
    """Return points spaced at most σ/3, only where there is mass.

    The lattice of `spectra_db.densities` ends at 5 σ, which leaves 6e-7: the claim is of 1e-14.
    """
    step = sigma / 3
    near = np.unique(np.round(values / step).astype(np.int64))
    points = np.unique((near[:, None] + np.arange(-24, 25)).ravel())
    return points * step


def _density(nodes: Array, weights: Array, sigma: float, grid: Array) -> Array:
    """Evaluate Σ w N(t; θ, σ²) on the grid."""
    p = np.zeros_like(grid)
    order = np.argsort(nodes)
    for theta, w in zip(nodes[order], weights[order], strict=True):
        low, high = np.searchsorted(grid, [theta - 9 * sigma, theta + 9 * sigma])
        p[low:high] += w * np.exp(-0.5 * ((grid[low:high] - theta) / sigma) ** 2)
    return p / (sigma * np.sqrt(2 * np.pi))


def _l1(difference: Array, grid: Array) -> float:
    """Integrate |difference|; the grid has the spacing of its first two points."""
    return float(np.abs(difference).sum() * (grid[1] - grid[0]))
