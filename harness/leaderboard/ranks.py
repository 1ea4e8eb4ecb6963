"""Ranks and rank correlations of n weighted values in B draws at once: arrays (B, n) in.

Σ_j w_j sign(x_i − x_j) is twice the rank of i among the weighted values, centred; ties have the
mean of their ranks. The weights are counts, so that all sums are exact.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def signs(x: Array) -> npt.NDArray[np.float32]:
    """Return sign(x_i − x_j), shape (B, n, n)."""
    one, other = x[:, :, None], x[:, None, :]
    return (one > other).astype(np.float32) - (one < other)


def ranks(signs: npt.NDArray[np.float32], weights: Array) -> Array:
    """Return Σ_j w_j s_ij, shape (B, n): ranks if s are the `signs` of values."""
    return np.matmul(signs, weights.astype(np.float32)[..., None])[..., 0].astype(np.float64)


def concordance(
    one: npt.NDArray[np.float32], other: npt.NDArray[np.float32], weights: Array
) -> Array:
    """Return Σ_ij w_i w_j s_ij t_ij, shape (B,); of one `signs` alone, how many are unequal."""
    return (weights * ranks(one * other, weights)).sum(axis=1)


def pearson(x: Array, y: Array, weights: Array) -> Array:
    """Return the weighted correlation of each draw; nan where one of both is constant."""
    total = np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
    dx = x - (weights * x).sum(axis=1, keepdims=True) / total
    dy = y - (weights * y).sum(axis=1, keepdims=True) / total
    variances = [(weights * a * a).sum(axis=1) for a in (dx, dy)]
    scale = np.sqrt(variances[0] * variances[1])
    flat = scale <= 1e-12 * total[:, 0]
    return np.where(flat, np.nan, (weights * dx * dy).sum(axis=1) / np.where(flat, 1, scale))
