"""Predictors that need Hessian-vector products: with each block, and with the whole Hessian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.campaign.spectrum import source_of
from harness.estimator.blocks import FULL_BLOCK
from harness.estimator.lanczos import advance, start
from harness.estimator.probes import draw_probe, probe_seed
from harness.estimator.settings import Settings
from harness.estimator.spectrum import gathered, rules
from harness.predictors import Value
from harness.training import Problem
from spectra_db.heterogeneity import spread
from spectra_db.quadrature import gauss_rule, residual_bounds

# Statistic of a block's spectrum, probes and steps that it is taken with.
_SPREADS = (("lambda_rms", 3, 1), ("lambda_max", 1, 10))
NUM_RADEMACHER, NUM_CAUCHY = 10, 50
# Of the Cauchy probes, for the error: as many estimates of ten probes each.
_GROUPS = 5
MAX_STEPS, TOLERANCE = 30, 0.01


def of_blocks(problem: Problem, settings: Settings) -> dict[str, Value]:
    """Measure the spread over blocks of log10 rms and of log10 largest |eigenvalue|.

    The standard deviation over blocks that are not zero of log10 √(tr H_l² / n_l), tr H_l² / n_l
    being the mean of ‖H_l v‖² over three Gaussian unit vectors v, corrected for their bias, with
    the jackknife's error; and of log10 max |θ| after ten Lanczos steps from the first of them.
    They say how far the locations of the blocks' eigenvalues differ (Zhang et al. 2024, arXiv
    2402.16788, section 3, where a rate per block is what Adam has and SGD lacks).

    Args:
        problem: The model and its batch.
        settings: Where and in which arithmetic; the partition of the blocks.
    """
    return {
        f"{statistic}_spread": _spread(problem, settings, statistic, num_probes, num_steps)
        for statistic, num_probes, num_steps in _SPREADS
    }


def _spread(
    problem: Problem, settings: Settings, statistic: str, num_probes: int, num_steps: int
) -> Value:
    # Small blocks are sampled too.
    how = replace(settings, num_probes=num_probes, num_steps=num_steps, exact_size=0)
    with problem.hessian(how) as hessian:
        rows = gathered(rules(hessian, how, source_of(problem) | {"run_id": ""}), hessian.blocks)
    spent = num_probes * num_steps
    try:
        found = spread(rows, statistic)
    except ValueError as error:
        return Value(None, num_products=spent, reason=str(error))
    if num_probes == 1:  # no jackknife
        return Value(found.value, num_products=spent)
    return Value(found.corrected, found.standard_error, num_products=spent)


def of_full(problem: Problem, settings: Settings) -> dict[str, Value]:
    """Measure directional sharpness, ℓ∞ smoothness and the ratio of the diagonal.

    Of the Hessian H of all d trainable parameters, with all its blocks. The probes depend on the
    seed alone: they are the same on the whole batch and on its halves.

    Args:
        problem: The model and its batch.
        settings: Where and in which arithmetic.
    """
    with problem.hessian(replace(settings, partition="full")) as hessian:
        [block] = hessian.blocks
        gradient = hessian.gradient()
        names = [part.parameter for part in block.parts]
        found = [(gradient[name], hessian.parameter(name)) for name in names]
        pieces = [torch.zeros_like(p) if piece is None else piece for piece, p in found]
        g = torch.cat([piece.flatten() for piece in pieces])
        signs = _rademacher(problem, g)
        vectors = [g, g.sign(), *signs, *_cauchy(problem, g)]
        products = hessian.products([(0, v) for v in vectors])
        [seed] = _seeds(problem, block.name, 1)  # as a spectrum of the whole Hessian begins
        v0 = draw_probe(block.num_params, seed, "gaussian").to(g)
        largest, steps = largest_eigenvalue(lambda v: hessian.products([(0, v)])[0], v0)
    first = 2 + NUM_RADEMACHER
    return sharpness(g, products[0], products[1]) | {
        "diagonal_ratio": diagonal_ratio(signs, products[2:first]),
        "linf_smoothness": linf_smoothness(products[first:], largest, steps),
    }


def _seeds(problem: Problem, name: str, count: int) -> list[int]:
    return [
        probe_seed(problem.init_seed, problem.entry.name, "init", name, i) for i in range(count)
    ]


def _rademacher(problem: Problem, like: Tensor) -> list[Tensor]:
    """Return unit vectors of equal entries with random signs, of the whole Hessian's size."""
    seeds = _seeds(problem, f"{FULL_BLOCK}/rademacher", NUM_RADEMACHER)
    return [draw_probe(len(like), seed, "rademacher").to(like) for seed in seeds]


def _cauchy(problem: Problem, like: Tensor) -> list[Tensor]:
    """Return vectors of independent standard Cauchy entries, over d, drawn as other probes are."""
    d, seeds = len(like), _seeds(problem, f"{FULL_BLOCK}/cauchy", NUM_CAUCHY)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [(torch.empty(d).cauchy_(generator=g) / d).to(like) for g in generators]


def sharpness(g: Tensor, Hg: Tensor, Hs: Tensor) -> dict[str, Value]:
    """Measure b = s′Hs / s′s, s = sign g, and how much a = g′Hg / g′g is above it.

    The directional sharpness vᵀHv of the unit vectors along which sign descent and gradient
    descent move (Pan & Li 2023, arXiv 2306.00204, section 3): what a step of that length costs.
    s′s counts the coordinates that have a gradient: d, but for what the batch does not touch.

    The contrast is (a − b) / √(2 (a² + b²)), in [−1, 1]. Where a and b are positive it ranks as
    a / b: 0 for 1, 1/√2 for ∞. Either may be negative at initialisation, where that ratio jumps.

    Args:
        g: The gradient, shape (d,).
        Hg: H g, shape (d,).
        Hs: H s, shape (d,).
    """
    g, s = g.double(), g.double().sign()
    if not s.any():
        zero = Value(None, reason="the gradient is zero")
        return {"sign_sharpness": zero, "sharpness_contrast": zero}
    b = float(s @ Hs.double() / (s @ s))
    a = float(g @ Hg.double() / (g @ g))
    contrast = Value(None, num_full_products=2, reason="both curvatures are zero")
    if a or b:
        contrast = Value((a - b) / (2 * (a**2 + b**2)) ** 0.5, num_full_products=2)
    return {"sign_sharpness": Value(b, num_full_products=1), "sharpness_contrast": contrast}


def diagonal_ratio(probes: list[Tensor], products: list[Tensor]) -> Value:
    """Measure max_i |H_ii| / median_i |H_ii| (R_med of Jiang, Malik & Li 2023, arXiv 2211.02254).

    The diagonal is the mean over ten Rademacher vectors z of z ⊙ H z (Hutchinson; Bekas,
    Kokiopoulou & Saad 2007). Its error of entry i, √(Σ_{j≠i} H_ij² / 10), is part of the measure.

    Args:
        probes: Unit vectors z / √d, each of shape (d,).
        products: H z / √d, each of shape (d,).
    """
    d = len(probes[0])
    scaled = [(v.double() * Hv.double()) * d for v, Hv in zip(probes, products, strict=True)]
    sizes = torch.stack(scaled).mean(dim=0).abs().cpu().numpy()
    median, spent = float(np.median(sizes)), len(probes)
    if median == 0:
        reason = "half of the Hessian's diagonal is zero"
        return Value(None, num_full_products=spent, reason=reason)
    return Value(float(sizes.max()) / median, num_full_products=spent)


def linf_smoothness(products: list[Tensor], largest: float, num_steps: int) -> Value:
    """Measure (‖H‖₁,₁ / d) / λmax, ‖H‖₁,₁ = Σ_ij |H_ij| and λmax the largest |eigenvalue|.

    Adam's rate has ‖H‖₁,₁ / d where that of SGD has λmax (Xie, Mohamadi & Li 2025, arXiv
    2410.08198): where the ratio is small Adam gains. `row_norms` has the estimator; the error is
    that of the mean of five estimates from ten of the fifty probes each.

    Args:
        products: H v for vectors v of independent standard Cauchy entries over d, shape (d,).
        largest: λmax.
        num_steps: Products that it took.
    """
    spent = len(products) + num_steps
    if largest == 0:
        return Value(None, num_full_products=spent, reason="the Hessian is zero")
    sizes = torch.stack(products).cpu().numpy()
    parts = [row_norms(part).sum() / largest for part in np.split(sizes, _GROUPS)]
    error = float(np.std(parts, ddof=1) / _GROUPS**0.5)
    return Value(float(row_norms(sizes).sum()) / largest, error, num_full_products=spent)


def row_norms(products: NDArray[np.floating]) -> NDArray[np.float64]:
    """Estimate Σ_j |H_ij| of each row from products with Cauchy vectors.

    (H v)_i is Cauchy with the scale Σ_j |H_ij|, and the median of its absolute value is that scale
    (Indyk 2006, section 3; as in the code of Xie et al., which takes fifty vectors too). The median
    of n values is too high by π² / (8 (n + 2)) of it, to first order: 2.4 % for fifty. The bias is
    the same for every matrix and is left.

    Args:
        products: H v for n vectors, shape (n, d).

    Returns:
        Shape (d,).
    """
    return np.median(np.abs(products), axis=0).astype(np.float64)


def largest_eigenvalue(product: Callable[[Tensor], Tensor], v0: Tensor) -> tuple[float, int]:
    """Find the largest |eigenvalue| by Lanczos from v0, and the products that it took.

    Until the residual bound of the Ritz value is at most 1 % of it, or 30 products: some eigenvalue
    lies within the bound (Parlett 1998, section 13.2).

    Args:
        product: v ↦ H v.
        v0: Start vector, shape (d,), nonzero.
    """
    state = start(v0)
    while True:
        advance([state], [product(state.vector)])
        nodes = np.abs(gauss_rule(state.alphas, state.betas)[0])
        bound = residual_bounds(state.alphas, state.betas)[nodes.argmax()]
        if state.is_done(MAX_STEPS) or bound <= TOLERANCE * nodes.max():
            return float(nodes.max()), len(state.alphas)
