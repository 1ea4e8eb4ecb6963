"""Whether two quadrature rules are of the same probe of the same Hessian, but for rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # its stats take a second to import, and only where they are used
from scipy.linalg import eigh_tridiagonal

from spectra_db.densities import Array
from spectra_db.heterogeneity import TRUNCATION
from spectra_db.quadrature import gauss_rule

# Rounding of a product, relative to its norm. float32 against float64 differed by up to 200 eps on
# perceptrons of 266,000 parameters, and in eigenvalues by up to 300 eps of the largest on those
# whose outputs are scaled by 15; another probe differs by 1 / sqrt(num_params) and more.
_PRODUCT_EPS = 1000
# Rules of the same probe differed by up to 1.2 times the change from 3/4 of their steps where each
# product was disturbed by one rounding error of float32 (small and demo models). Their ends hardly
# move then: tests/spectra_db/test_rules.py.
_TRUNCATIONS = 2.0
_DTYPE_EPS = {"float32": 2.0**-23, "float64": 2.0**-52}
_PRECISION_EPS = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}


@dataclass(frozen=True)
class Difference:
    """How far apart two rules are, and how far rounding and truncation explain.

    Attributes:
        distance: Wasserstein-1 distance, in units of the eigenvalues; of exact rules the largest
            difference of an eigenvalue, to each of which rounding's bound applies (Weyl).
        allowed: 1,000 rounding errors of the largest node, for the products, and one for each node;
            where an eigenvalue has converged, plus twice the first rule's change against three
            quarters of its steps.
        first: By how much the first alphas and betas differ: those of the first step relative to
            |Hv|, the others to the largest node. They are those until an eigenvalue has converged
            to the root of a rounding error, before which rounding does not grow (Paige 1980, Linear
            Algebra Appl. 34). Later ones it decides, while the rule stays (Greenbaum 1989, Linear
            Algebra Appl. 113).
        is_first_alike: first is at most 1,000 rounding errors.
        are_ends_alike: The smallest and the largest node differ by no more than rounding and twice
            their own change: a weight of nothing moves no distance, and its node every maximum.
    """

    distance: float
    allowed: float
    first: float
    is_first_alike: bool = True
    are_ends_alike: bool = True

    @property
    def is_explained(self) -> bool:
        """Whether rounding and truncation explain all of it."""
        return self.is_first_alike and self.are_ends_alike and self.distance <= self.allowed


def compare(row: Mapping[Any, Any], other: Mapping[Any, Any]) -> Difference:
    """Compare the rules of two rows of table `spectra`, of the same method and not empty.

    Args:
        row: What is known to be so: what is allowed follows from it alone.
        other: The same probe, taken again or said to be so: alphas, betas, nodes and weights.
    """
    eps = epsilon(row)
    count = max(len(row["nodes"]), len(other["nodes"]))
    rounding = (_PRODUCT_EPS + count) * eps
    largest = float(np.abs(row["nodes"]).max())
    if row["method"] == "exact":
        values, others = (_eigenvalues(rule, row["num_params"]) for rule in (row, other))
        as_many = len(values) == len(others)
        distance = float(np.abs(values - others).max()) if as_many else np.inf
        return Difference(distance, rounding * largest, 0.0)
    norm = float(np.hypot(row["alphas"][0], row["betas"][0]))  # of Hv
    largest = max(largest, norm)
    settled = _settled(row["alphas"], row["betas"], eps)
    change, changes = 0.0, np.zeros(2)
    if not row["breakdown"] and settled < len(row["alphas"]):
        steps = max(1, int(TRUNCATION * len(row["alphas"])))
        nodes, weights = gauss_rule(row["alphas"][:steps], row["betas"])
        change, changes = _distances(row, {"nodes": nodes, "weights": weights})
    allowed, allowed_of_ends = (
        rounding * largest + _TRUNCATIONS * found for found in (change, changes)
    )
    distance, ends = _distances(row, other)
    same = min(settled, len(other["alphas"]))
    moved = np.max(
        [np.abs(np.subtract(row[name][:same], other[name][:same])) for name in ("alphas", "betas")],
        axis=0,
    )
    first = float(np.max(moved / [norm, *[largest] * (same - 1)])) if norm else np.inf
    return Difference(
        distance,
        float(allowed),
        first,
        is_first_alike=first <= product_rounding(row),
        are_ends_alike=bool((ends <= allowed_of_ends).all()),
    )


def _eigenvalues(rule: Mapping[Any, Any], num_params: int) -> Array:
    """Return all eigenvalues of an exact rule, whose node 0 may stand for several."""
    counts = np.rint(np.asarray(rule["weights"]) * num_params).astype(np.intp)
    return np.repeat(np.asarray(rule["nodes"], dtype=np.float64), counts)


def _distances(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> tuple[float, Array]:
    """Return the Wasserstein-1 distance of two rules, and how far their two ends are apart."""
    nodes = np.asarray(a["nodes"]), np.asarray(b["nodes"])
    distance = scipy.stats.wasserstein_distance(*nodes, a["weights"], b["weights"])
    return float(distance), np.abs(nodes[0][[0, -1]] - nodes[1][[0, -1]])


def _settled(alphas: Array, betas: Array, eps: float) -> int:
    """Return after how many steps a Ritz value has converged to the root of eps, or all steps."""
    for step in range(1, len(alphas)):
        nodes, vectors = eigh_tridiagonal(alphas[:step], betas[: step - 1])
        if (betas[step - 1] * np.abs(vectors[-1])).min() < eps**0.5 * np.abs(nodes).max():
            return step
    return len(alphas)


def epsilon(row: Mapping[Any, Any]) -> float:
    """Return the spacing of the numbers that a row's products are taken with, relative to 1."""
    return max(_DTYPE_EPS[row["dtype"]], _PRECISION_EPS[row["matmul_precision"]])


def product_rounding(row: Mapping[Any, Any]) -> float:
    """Return the largest difference of a product, relative to its norm, that is rounding's."""
    return _PRODUCT_EPS * epsilon(row)
