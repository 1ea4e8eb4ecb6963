"""The theory of section 3, checked numerically: every function returns plain numbers.

"Holds" means: was not violated in what was computed. A check is no proof.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from harness.paper.quadratic import (
    HETEROGENEOUS,
    KAPPA,
    Array,
    Quadratic,
    Spectra,
    from_spectra,
    least_steps,
    steps_to,
)

# A bound that holds with equality may be exceeded by rounding: of the loss itself, and of what is
# left of the first loss.
_RELATIVE, _ABSOLUTE = 1e-10, 1e-24
_STEPS = 50


def gradient_descent_bound(kappa: float = KAPPA, num_rates: int = 20_001) -> dict[str, Any]:
    """Check Proposition 1 on H = diag(1, κ) over a dense sweep of constant learning rates.

    With ρ = 1 − 2/(κ + 1): as printed, (4) says that some H and w₀ have L(w_{t+1}) ≥ ρ L(w_t) for
    every η. At η = 2/(μ + L) the loss contracts by ρ² < ρ, whatever w₀. What holds is that no η has
    a worst case over w₀ below ρ² a step for the loss, or below ρ for ‖w‖, and that from
    w₀ with equal loss in both modes every η leaves L(w_t) ≥ ½ ρ^2t L(w₀).

    Returns:
        One minus each factor, as the factors are near 1: printed_gap 1 − ρ, loss_gap at η =
        2/(μ + L), the largest of the worst-case gaps of loss and norm over the sweep; and the least
        L(w_t) / (½ ρ^2t L(w₀)) over the sweep and t ≤ 10 κ.
    """
    eigenvalues = np.array([1.0, kappa])
    rho = 1 - 2 / (kappa + 1)
    best = 2 / (1 + kappa)
    rates = np.sort(np.append(np.geomspace(1e-3, 2, num_rates) * best, best))
    factors = np.abs(1 - rates[:, None] * eigenvalues)  # (E, 2)
    worst = factors.max(axis=1)
    # Equal loss in both modes: w_i² = 1 / λ_i.
    times = np.unique(np.geomspace(1, 10 * kappa, 60).round())
    with np.errstate(divide="ignore", over="ignore"):
        logs = 2 * np.log(factors)[:, None, :] * times[:, None]  # (E, T, 2)
        left = np.logaddexp(logs[..., 0], logs[..., 1])
    return {
        "kappa": kappa,
        "num_rates": len(rates),
        "printed_gap": 1 - rho,
        "loss_gap": float(1 - ((1 - best * eigenvalues) ** 2).max()),
        "largest_loss_gap": float((1 - worst**2).max()),
        "largest_norm_gap": float((1 - worst).max()),
        "best_eta_over_2_by_mu_plus_l": float(rates[worst.argmin()] / best),
        "least_loss_over_bound": float(np.exp((left - 2 * times * np.log(rho)).min())),
    }


def start_constants(quadratic: Quadratic, start: Array) -> tuple[Array, Array]:
    """Return C_{l,1} and C_{l,2}: least and largest |∇L(w₀)_i| over block l's largest eigenvalue.

    The condition number that Theorem 1 gives Adam is r κ_l with r = (max C_{l,2} / min C_{l,1})².
    """
    gradients = quadratic.split(quadratic.hessian @ start)
    sizes = [np.abs(g) / e[-1] for g, e in zip(gradients, quadratic.block_eigenvalues, strict=True)]
    return np.array([s.min() for s in sizes]), np.array([s.max() for s in sizes])


def initial_ratio(quadratic: Quadratic, start: Array) -> float:
    """Return r of (6)."""
    least, largest = start_constants(quadratic, start)
    return float((largest.max() / least.min()) ** 2)


def adam_bound(quadratic: Quadratic, start: Array) -> dict[str, bool]:
    """Tell whether Adam's losses keep (6) in each of the first steps, for both learning rates.

    (6) is L(w_{t+1}) ≤ max_l (1 − 1/(r κ_l)) L(w_t).

    Returns:
        proof: with η = min C_{l,1}, which the proof uses; statement: with η = min 1 / C_{l,1},
        which the statement prints.
    """
    least, _ = start_constants(quadratic, start)
    bound = 1 - 1 / (initial_ratio(quadratic, start) * quadratic.block_conditions.max())
    D = np.abs(quadratic.hessian @ start)
    holds = {}
    for name, eta in (("proof", least.min()), ("statement", (1 / least).min())):
        w, losses = start, []
        with np.errstate(over="ignore", invalid="ignore"):
            for _ in range(_STEPS):
                g = quadratic.hessian @ w
                losses.append(0.5 * float(w @ g))
                w = w - eta * g / D
        before, after = np.array(losses[:-1]), np.array(losses[1:])
        before, after = before[np.isfinite(before)], after[np.isfinite(before)]
        allowed = (1 + _RELATIVE) * bound * before + _ABSOLUTE * losses[0]
        holds[name] = bool((after <= allowed).all())
    return holds


def adam_bound_counts(
    quadratics: list[Quadratic], rng: np.random.Generator
) -> dict[str, int | float]:
    """Count violations of (6) over quadratics, a standard Gaussian start each."""
    held = [adam_bound(q, rng.standard_normal(len(q.hessian))) for q in quadratics]
    return {
        "num_draws": len(held),
        "violations_proof": sum(not h["proof"] for h in held),
        "violations_statement": sum(not h["statement"] for h in held),
    }


def random_quadratic(rng: np.random.Generator) -> Quadratic:
    """Draw an instance: 1 to 5 blocks of 1 to 8 eigenvalues, log-uniform over 4 decades."""
    sizes = rng.integers(1, 9, size=rng.integers(1, 6))
    return from_spectra([10 ** rng.uniform(-2, 2, n) for n in sizes], rng)


def case3(rng: np.random.Generator, *, orthonormal: bool = True) -> Quadratic:
    """Draw an instance of case 3."""
    return from_spectra(HETEROGENEOUS, rng, orthonormal=orthonormal)


def initial_ratio_probability(num_draws: int, seed: int, *, orthonormal: bool) -> float:
    """Return the share of draws of case 3 with r ≤ 1000."""
    rng = np.random.default_rng(seed)
    drawn = (case3(rng, orthonormal=orthonormal) for _ in range(num_draws))
    ratios = (initial_ratio(q, rng.standard_normal(len(q.hessian))) for q in drawn)
    return sum(ratio <= 1000 for ratio in ratios) / num_draws


def preconditioned_conditions(
    num_draws: int, seed: int, *, orthonormal: bool = True
) -> dict[str, list[float]]:
    """Return quantiles over draws of κ(D⁻¹ H_l) / κ(H_l) for the blocks of case 3, and the mean.

    D is Adam's preconditioner at the start. The ratio is heavy-tailed: a coordinate of the gradient
    near zero makes it as large as one likes, so that means of few draws say little.
    """
    rng = np.random.default_rng(seed)
    ratios = np.empty((num_draws, len(HETEROGENEOUS)))
    for i in range(num_draws):
        quadratic = case3(rng, orthonormal=orthonormal)
        gradient = quadratic.hessian @ rng.standard_normal(len(quadratic.hessian))
        for k, (H, g) in enumerate(zip(quadratic.blocks, quadratic.split(gradient), strict=True)):
            root = np.sqrt(np.abs(g))
            ratios[i, k] = np.linalg.cond(H / np.outer(root, root))
        ratios[i] /= quadratic.block_conditions
    names = {"q10": 0.1, "median": 0.5, "q90": 0.9, "q99": 0.99}
    quantiles = {name: np.quantile(ratios, q, axis=0).tolist() for name, q in names.items()}
    return quantiles | {"mean": ratios.mean(axis=0).tolist()}


def limit_cycle(
    eta: float = 0.01,
    num_steps: int = 100_000,
    betas: tuple[float, ...] = (0.5, 0.9, 0.99, 0.999, 1.0),
) -> list[dict[str, float]]:
    """Run Adam with a constant rate on L(w) = ½ w² and report where it ends (Proposition 2).

    w = ±η/2 with v = w² is a cycle of period 2 for every β₂ < 1: g/√v = ±1. With β₂ = 1 the
    method is gradient descent with a fixed rate, and converges. For β₂ near 1 |w| first falls far
    below what a float holds (while √v falls by β₂^½ a step, w falls faster), hence logarithms.

    Returns:
        Per β₂ the base-10 logarithms of the least |w| on the way and of the largest |w| over the
        last 100 steps, and the latter |w| over η/2.
    """
    rows = []
    for beta2 in betas:
        log_w, log_v = 0.0, 0.0  # natural logarithms of |w| and v
        sizes = np.empty(num_steps)
        for t in range(num_steps):
            if beta2 < 1:
                log_v = np.logaddexp(np.log(beta2) + log_v, np.log1p(-beta2) + 2 * log_w)
            # w - η w / √v; exactly zero would be the minimum itself.
            log_w += np.log(max(abs(1 - eta * np.exp(-0.5 * log_v)), 1e-300))
            sizes[t] = log_w
        end = float(sizes[-100:].max())
        rows.append(
            {
                "beta2": beta2,
                "log10_least": float(sizes.min() / np.log(10)),
                "log10_end": end / float(np.log(10)),
                "end_over_half_eta": 2 * float(np.exp(end)) / eta,
            }
        )
    return rows


def complexity(
    num_draws: int, seed: int, tolerance: float = 1e-6
) -> dict[str, dict[str, list[float] | float]]:
    """Measure steps to a loss of `tolerance` of the first against κ (Table 2).

    Two families of three blocks with three eigenvalues each, both of condition number κ: in
    `heterogeneous` the blocks lie apart and every κ_l is at most 3; in `homogeneous` every
    block has κ_l = κ. The table says O(κ) for gradient descent and O(r max κ_l) for Adam with
    β₂ = 1, so Adam's steps should grow with κ in the second family alone.

    Returns:
        Per family: kappa, median steps over draws of both (η = 2/(μ + L); grid search), and the
        slopes of log steps against log κ.
    """
    kappas = [30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0]
    families: dict[str, Any] = {
        "heterogeneous": lambda k: [np.array([1, 2, 3]) * f for f in (1, np.sqrt(k / 3), k / 3)],
        "homogeneous": lambda k: [np.array([1, np.sqrt(k), k])] * 3,
    }
    result: dict[str, dict[str, list[float] | float]] = {}
    for name, spectra in families.items():
        steps = [_steps(spectra(kappa), num_draws, seed, tolerance) for kappa in kappas]
        descent, adam = np.median(steps, axis=1).T.tolist()
        slopes = [float(np.polyfit(np.log(kappas), np.log(s), 1)[0]) for s in (descent, adam)]
        result[name] = {
            "kappa": kappas,
            "gradient_descent": descent,
            "adam": adam,
            "gradient_descent_slope": slopes[0],
            "adam_slope": slopes[1],
        }
    return result


def steps_of_cases(
    spectra: Mapping[str, Spectra], num_draws: int, seed: int, tolerance: float = 1e-6
) -> dict[str, dict[str, float]]:
    """Compare gradient descent and Adam (β₂ = 1) on the cases over draws of Q and w₀.

    Args:
        spectra: Case name -> spectra of its blocks.
        num_draws: Draws per case.
        seed: Of the draws.
        tolerance: Loss to reach, of the first.

    Returns:
        Per case the median steps of both, and the quantiles 0.1, 0.5, 0.9 of their ratio.
    """
    result = {}
    for name, blocks in spectra.items():
        descent, adam = _steps(blocks, num_draws, seed, tolerance).T
        ratio = descent / adam
        result[name] = {
            "gradient_descent": float(np.median(descent)),
            "adam": float(np.median(adam)),
            "ratio_q10": float(np.quantile(ratio, 0.1)),
            "ratio": float(np.median(ratio)),
            "ratio_q90": float(np.quantile(ratio, 0.9)),
        }
    return result


def _steps(spectra: Spectra, num_draws: int, seed: int, tolerance: float) -> Array:
    """Return the steps of gradient descent at η = 2/(μ + L) and of Adam at its best η, (D, 2)."""
    rng = np.random.default_rng(seed)
    steps = []
    for _ in range(num_draws):
        quadratic = from_spectra(spectra, rng)
        H = quadratic.hessian
        start = rng.standard_normal(len(H))
        descent = steps_to(H, start, np.ones(len(H)), 2 / sum(quadratic.extremes), tolerance)
        steps.append((descent, least_steps(H, start, np.abs(H @ start), tolerance)[0]))
    return np.array(steps)
