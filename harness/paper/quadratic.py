"""The quadratic models of section 3: four cases, gradient descent, and Adam as Algorithm 3.

All minimise L(w) = ½ wᵀHw, with H block diagonal, from a standard Gaussian w₀. (The paper has
½ wᵀHw − hᵀw and sets h = 0; another h moves the minimum and nothing else.)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy
from numpy.typing import NDArray

Array = NDArray[np.float64]

KAPPA = 5000.0
# Eigenvalues per block of cases 1 and 2.
BLOCK_SIZE = 25
# Cases 3 and 4: the eigenvalues that the paper gives.
Spectra = Sequence[Sequence[float]] | Sequence[Array]  # per block its eigenvalues
HETEROGENEOUS = ((1.0, 2.0, 3.0), (99.0, 100.0, 101.0), (4998.0, 4999.0, 5000.0))
HOMOGENEOUS = ((1.0, 99.0, 4998.0), (2.0, 100.0, 4999.0), (3.0, 101.0, 5000.0))


@dataclass(frozen=True)
class Quadratic:
    """Hold the blocks of a positive definite, block diagonal Hessian.

    Attributes:
        blocks: H_l, each symmetric, shape (d_l, d_l).
    """

    blocks: tuple[Array, ...]

    @cached_property
    def hessian(self) -> Array:
        """The whole H, shape (d, d)."""
        return np.asarray(scipy.linalg.block_diag(*self.blocks))

    @cached_property
    def block_eigenvalues(self) -> tuple[Array, ...]:
        """Per block its eigenvalues, ascending."""
        return tuple(np.asarray(np.linalg.eigvalsh(H), dtype=np.float64) for H in self.blocks)

    @property
    def extremes(self) -> tuple[float, float]:
        """The least eigenvalue μ and the largest, L."""
        every = np.concatenate(self.block_eigenvalues)
        return float(every.min()), float(every.max())

    @property
    def block_conditions(self) -> Array:
        """Per block κ_l, the largest over the least eigenvalue."""
        return np.array([e[-1] / e[0] for e in self.block_eigenvalues])

    def split(self, vector: Array) -> list[Array]:
        """Cut a vector of shape (d,) into the blocks' parts."""
        return np.split(vector, np.cumsum([len(H) for H in self.blocks])[:-1])


def from_spectra(
    spectra: Spectra, rng: np.random.Generator, *, orthonormal: bool = True
) -> Quadratic:
    """Build H_l = Q_l Λ_l Q_lᵀ with random Q_l.

    The paper says that Q_l has independent Gaussian entries. Then the eigenvalues of H_l are not
    those of Λ_l, and r ≤ 1000 in case 3 has a probability of 0.54, against the paper's 2/3; with
    the Q factor of such a matrix it has 0.64 (`make paper`). Hence the default.

    Args:
        spectra: Per block the diagonal of Λ_l.
        rng: Draws the entries of Q_l.
        orthonormal: Take the orthonormal factor (QR) of the Gaussian matrix, or the matrix itself.
    """
    blocks = []
    for values in spectra:
        Q = rng.standard_normal((len(values), len(values)))
        if orthonormal:
            Q = np.linalg.qr(Q)[0]
        H = (Q * np.asarray(values)) @ Q.T
        blocks.append((H + H.T) / 2)
    return Quadratic(tuple(blocks))


def joint_affine(
    spectra: Sequence[Array], low: float = 1.0, high: float = KAPPA
) -> tuple[Array, ...]:
    """Map the spectra of all blocks by one affine map onto [low, high].

    One map for all, so that the ranges of the blocks relative to each other are kept.

    >>> [block.tolist() for block in joint_affine([np.array([-1.0, 0.0]), np.array([1.0])], 1, 3)]
    [[1.0, 2.0], [3.0]]

    Raises:
        ValueError: All values are the same.
    """
    every = np.concatenate(spectra)
    least, span = every.min(), np.ptp(every)
    if not span > 0:
        raise ValueError("the spectra are a single value, which no affine map spreads")
    return tuple(low + (high - low) * (s - least) / span for s in spectra)


def sample_rule(nodes: Array, weights: Array, rng: np.random.Generator | None, size: int) -> Array:
    """Sample eigenvalues from a block's quadrature rule, ascending.

    Args:
        nodes: θ of the probe-averaged rule.
        weights: w̄, sum 1.
        rng: Draws independently; None takes evenly spaced quantiles, the ends included, which
            every time gives the outliers that a draw of 25 out of 50,000 would miss.
        size: How many.
    """
    order = np.argsort(nodes)
    mass = np.cumsum(weights[order])
    levels = np.linspace(0, 1, size) if rng is None else np.sort(rng.random(size))
    found = np.searchsorted(mass, levels * mass[-1])
    return nodes[order][np.minimum(found, len(nodes) - 1)]


def preconditioned_losses(
    hessian: Array, start: Array, preconditioner: Array, eta: Array, steps: Array
) -> Array:
    """Return L(w_t) of w ← w − η D⁻¹ H w in closed form.

    With M = D^-½ H D^-½ = U diag(s) Uᵀ and c = Uᵀ D^½ w₀: L(w_t) = ½ Σ s_i c_i² (1 − η s_i)^2t.
    D = 1 is gradient descent; D = |∇L(w₀)| is Adam with β₁ = 0, β₂ = 1, ε = 0 (Algorithm 3 of the
    paper without bias correction), whose second moment stays what it is at the first step.

    Args:
        hessian: H, shape (d, d).
        start: w₀, shape (d,).
        preconditioner: The diagonal of D, shape (d,).
        eta: Learning rates, shape (E,).
        steps: Numbers of steps t, shape (T,).

    Returns:
        Losses, shape (E, T); overflow is infinite.
    """
    s, shares = _modes(hessian, start, preconditioner)
    factors = np.abs(1 - np.multiply.outer(eta, s))  # (E, d)
    with np.errstate(over="ignore", under="ignore"):
        powers = factors[:, None, :] ** (2.0 * np.asarray(steps)[None, :, None])
        return np.asarray(powers @ shares)


def steps_to(
    hessian: Array, start: Array, preconditioner: Array, eta: float, tolerance: float
) -> float:
    """Return the least t with L(w_t) ≤ tolerance · L(w₀), infinite where it diverges.

    By bisection on the closed form of `preconditioned_losses`, which falls in t while all
    |1 − η s_i| ≤ 1.
    """
    s, shares = _modes(hessian, start, preconditioner)
    logs = 2 * np.log(np.maximum(np.abs(1 - eta * s), np.finfo(float).tiny))
    target = tolerance * shares.sum()
    if (logs >= 0).any():
        return float("inf")

    def reached(t: int) -> bool:
        return bool(shares @ np.exp(logs * t) <= target)

    high = 1
    while not reached(high):
        high *= 2
    return float(bisect_left(range(high), True, high // 2 + 1, high, key=reached))


def least_steps(
    hessian: Array, start: Array, preconditioner: Array, tolerance: float, num_rates: int = 61
) -> tuple[float, float]:
    """Search η on a grid for the least number of steps to a tolerance.

    The grid is log-spaced over two decades below 2 / s_max, above which the iteration diverges.

    Returns:
        (steps, η).
    """
    s, _ = _modes(hessian, start, preconditioner)
    rates = np.geomspace(0.01, 0.999, num_rates) * 2 / s.max()
    found = [steps_to(hessian, start, preconditioner, eta, tolerance) for eta in rates]
    best = int(np.argmin(found))
    return found[best], float(rates[best])


def adam(hessian: Array, start: Array, eta: Array, num_steps: int, *, beta2: float) -> Array:
    """Run Adam as Algorithm 3: β₁ = 0, ε = 0, no bias correction, v₀ = ∇L(w₀)².

    Args:
        hessian: H, shape (d, d).
        start: w₀, shape (d,).
        eta: Learning rates, all run at once, shape (E,).
        num_steps: Number of steps T.
        beta2: Decay of the second moment; 1 keeps v₀.

    Returns:
        Losses before each step and after the last, shape (E, T + 1).
    """
    w = np.tile(start, (len(eta), 1))
    v = np.tile((hessian @ start) ** 2, (len(eta), 1))
    rate = np.asarray(eta)[:, None]
    losses = np.empty((len(eta), num_steps + 1))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for t in range(num_steps + 1):
            g = w @ hessian
            losses[:, t] = 0.5 * np.einsum("ed,ed->e", w, g)
            v = beta2 * v + (1 - beta2) * g**2
            # Where the gradient has never been other than zero there is nothing to do.
            w = w - rate * np.divide(g, np.sqrt(v), out=np.zeros_like(g), where=v > 0)
    return np.where(np.isfinite(losses), losses, np.inf)


def _modes(hessian: Array, start: Array, preconditioner: Array) -> tuple[Array, Array]:
    """Return the eigenvalues s of M, and the loss ½ s c² that each mode starts with."""
    root = np.sqrt(preconditioner)
    s, U = np.linalg.eigh(hessian / np.outer(root, root))
    c = U.T @ (root * start)
    return s, 0.5 * s * c**2
