"""From a Lanczos run to a Gauss quadrature rule of the spectral measure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

Values = Sequence[float] | NDArray[np.float64]

# Steps to which T is continued, the fewest that it is continued from, and the part of them whose
# mean continues it: docs/accuracy.md has what others give.
LENGTH, MIN_STEPS, WINDOW = 60, 6, 1 / 3


def gauss_rule(alphas: Values, betas: Values) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the nodes and weights of the Gauss rule of T (paper Algorithm 5; Golub-Welsch).

    Σ_i w_i θ_iʲ = vᵀ Aʲ v for j ≤ 2m − 1, v the unit start vector.

    Args:
        alphas: Diagonal of T, length m ≥ 1.
        betas: Off-diagonal, length m − 1, or m with the residual last, which is not used.

    Returns:
        Nodes θ, ascending, and weights τ² ≥ 0 of sum 1, both of shape (m,).

    Example:
        >>> gauss_rule([2.0, 2.0], [1.0])
        (array([1., 3.]), array([0.5, 0.5]))
    """
    nodes, vectors = _eigh(alphas, betas)
    return nodes, vectors[0] ** 2


def extended(
    alphas: Values,
    betas: Values,
    *,
    length: int = LENGTH,
    window: float = WINDOW,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Continue T by the mean of its last alphas and betas: the recursion method's terminator.

    The coefficients of a measure without gaps settle (Haydock, Heine & Kelly 1972, J. Phys. C 5;
    Haydock 1980, Solid State Physics 35): the constant chain stands for the steps not taken. The
    first m rows of T and the residual stay, so that the Gauss rule of the result has the moments
    vᵀ Aʲ v for j ≤ 2m, and no node beyond the largest row sum of T.

    Args:
        alphas: Diagonal of T, length m.
        betas: Off-diagonal with the residual last, length m.
        length: Rows of the result.
        window: Part of the last steps to average, at least three.

    Returns:
        alphas and betas of `length` rows; as they are if m < 6 or m ≥ length.

    Example:
        >>> extended([3.0, 1.0, 1.0, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0, 1.0, 1.0, 1.0], length=7)[0]
        array([3., 1., 1., 2., 2., 2., 2.])
    """
    T = np.array([alphas, betas], dtype=np.float64)
    steps = len(alphas)
    if not MIN_STEPS <= steps < length:
        return T[0], T[1]
    tail = T[:, -max(3, int(window * steps)) :].mean(axis=1, keepdims=True)
    T = np.hstack([T, np.repeat(tail, length - steps, axis=1)])
    return T[0], T[1]


def residual_bounds(alphas: Values, betas: Values) -> NDArray[np.float64]:
    """Return for each node θ_i how far an eigenvalue of A can be: β_m |s_{m,i}|.

    Some eigenvalue of A lies within the bound (Parlett 1998, section 13.2), in exact arithmetic.

    Args:
        alphas: Diagonal of T, length m.
        betas: Off-diagonal with the residual last, length m.

    Returns:
        Bounds in the order of the nodes, shape (m,).
    """
    if len(betas) != len(alphas):
        raise ValueError(f"{len(betas)} betas for {len(alphas)} alphas; the residual is needed")
    _, vectors = _eigh(alphas, betas)
    return np.abs(betas[-1] * vectors[-1])


def _eigh(alphas: Values, betas: Values) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Diagonalise T, scaled to 1 against under- and overflow."""
    diagonal = np.asarray(alphas, dtype=np.float64)
    off_diagonal = np.asarray(betas, dtype=np.float64)[: len(diagonal) - 1]
    scale = max(np.abs(diagonal).max(), np.abs(off_diagonal).max(initial=0.0)) or 1.0
    nodes, vectors = eigh_tridiagonal(diagonal / scale, off_diagonal / scale)
    return nodes * scale, vectors
