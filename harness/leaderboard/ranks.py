"""Ranks and rank correlations of n weighted values in B draws at once: arrays (B, n) in.

Σ_j w_j sign(x_i − x_j) is twice the rank of i among the weighted values, centred; ties have the
mean of their ranks. The weights are counts, so that all sums are exact.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Order:
    """How the values of every draw are ordered, from which ranks follow for any weights."""

    def __init__(self, x: Array) -> None:
        """Sort x, shape (B, n)."""
        self._order = np.argsort(x, axis=1)
        ordered = np.take_along_axis(x, self._order, axis=1)
        places = np.arange(x.shape[1])
        # Of each place the first and the last of the values that are equal to its own.
        self._first, self._last = np.empty((2, *x.shape), dtype=np.intp)
        self._first[:, :1], self._last[:, -1:] = 0, len(places) - 1
        differs = ordered[:, 1:] != ordered[:, :-1]
        self._first[:, 1:] = np.where(differs, places[1:], 0)
        self._last[:, :-1] = np.where(differs, places[:-1], len(places) - 1)
        np.maximum.accumulate(self._first, axis=1, out=self._first)
        backwards = self._last[:, ::-1]
        np.minimum.accumulate(backwards, axis=1, out=backwards)

    def _sides(self, weights: Array) -> tuple[Array, Array, Array]:
        """Return each place's weight, and what lies below its value and up to it."""
        ordered = np.take_along_axis(weights, self._order, axis=1)
        sums = np.pad(ordered.cumsum(axis=1), ((0, 0), (1, 0)))
        below, upto = (np.take_along_axis(sums, at, 1) for at in (self._first, self._last + 1))
        return ordered, below, upto

    def ranks(self, weights: Array) -> Array:
        """Return Σ_j w_j sign(x_i − x_j), shape (B, n)."""
        _, below, upto = self._sides(weights)
        found = np.empty_like(below)
        np.put_along_axis(found, self._order, below + upto - upto[:, -1:], axis=1)
        return found

    def unequal(self, weights: Array) -> Array:
        """Return Σ_ij w_i w_j [x_i ≠ x_j], shape (B,)."""
        ordered, below, upto = self._sides(weights)
        result: Array = (ordered * (upto[:, -1:] + below - upto)).sum(axis=1)
        return result


def concordance(x: Array, y: Array, weights: Array) -> Array:
    """Return Σ_ij w_i w_j sign(x_i − x_j) sign(y_i − y_j), shape (B,)."""
    signs = (_signs(x) * _signs(y)).astype(np.float32)
    sums = np.matmul(signs, weights.astype(np.float32)[..., None])[..., 0]
    result: Array = (weights * sums).sum(axis=1)
    return result


def _signs(x: Array) -> npt.NDArray[np.int8]:
    """Return sign(x_i - x_j), shape (B, n, n)."""
    one, other = x[:, :, None], x[:, None, :]
    return (one > other).view(np.int8) - (one < other).view(np.int8)


def pearson(x: Array, y: Array, weights: Array) -> Array:
    """Return the weighted correlation of each draw; nan where one of both is constant."""
    total = np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
    dx = x - (weights * x).sum(axis=1, keepdims=True) / total
    dy = y - (weights * y).sum(axis=1, keepdims=True) / total
    variances = [(weights * a * a).sum(axis=1) for a in (dx, dy)]
    scale = np.sqrt(variances[0] * variances[1])
    flat = scale <= 1e-12 * total[:, 0]
    result: Array = np.where(
        flat, np.nan, (weights * dx * dy).sum(axis=1) / np.where(flat, 1, scale)
    )
    return result
