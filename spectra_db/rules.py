"""Whether two quadrature rules are of the same probe of the same Hessian, but for rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # its stats take a second to import, and only where they are used
from scipy.linalg import eigh_tridiagonal

from spectra_db.densities import Array, Recurrence
from spectra_db.truncation import TRUNCATION

# Rounding of a product, relative to its norm. float32 against float64 differed by up to 200 eps on
# perceptrons of 266,000 parameters; another probe differs by 1 / sqrt(num_params) and more.
_PRODUCT_EPS = 1000
# Two machines' first coefficients differed by up to 18 times what the first product of one of them
# is off from float64's (36 rows of 7 models, also those whose outputs are scaled by 8 to 15, where
# that is up to 4,000 eps).
_PRODUCT_ERRORS = 30
# Rules of the same probe differed by up to 1.2 times the change from 3/4 of their steps where each
# product was disturbed by one rounding error of float32 (small and demo models). Their ends hardly
# move then: tests/spectra_db/test_rules.py.
_TRUNCATIONS = 2.0
# The ends of rules that are continued differed by up to 0.06 of the largest node more than that
# (155 disturbed pairs, 36 of two machines): the last beta, by which they go on, is any of what
# rounding makes of it once an eigenvalue has settled.
_CONTINUED = 0.2
_DTYPE_EPS = {"float32": 2.0**-23, "float64": 2.0**-52}
_PRECISION_EPS = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}


@dataclass(frozen=True)
class Difference:
    """How far apart two rules are, and how far rounding and truncation explain.

    Attributes:
        distance: Wasserstein-1 distance, in units of the eigenvalues; of exact rules the largest
            difference of an eigenvalue, to each of which rounding's bound applies (Weyl).
        allowed: 1,000 rounding errors of the largest node, for the products, or 30 times what a
            product was measured to be off, and one for each node; where an eigenvalue has
            converged, plus twice the first rule's change against three quarters of its steps.
        first: By how much the first alphas and betas differ: those of the first step relative to
            |Hv|, the others to the largest node. They are those until an eigenvalue has converged
            to the root of a rounding error, before which rounding does not grow (Paige 1980, Linear
            Algebra Appl. 34). Later ones it decides, while the rule stays (Greenbaum 1989, Linear
            Algebra Appl. 113).
        is_first_alike: first is at most what products may differ by.
        are_ends_alike: The smallest and the largest node differ by no more than rounding and twice
            their own change: a weight of nothing moves no distance, and its node every maximum.
            Those of the rules continued, as metrics take them, by a fifth of the largest more: the
            last beta is in no other rule.
        product: By how much of its norm a product may be off.
        is_telling: That is less than what another probe's products differ by, 1 / sqrt(num_params).
    """

    distance: float
    allowed: float
    first: float
    product: float
    is_telling: bool
    is_first_alike: bool = True
    are_ends_alike: bool = True

    @property
    def is_explained(self) -> bool:
        """Whether rounding and truncation explain all of it."""
        return self.is_first_alike and self.are_ends_alike and self.distance <= self.allowed


def compare(
    row: Mapping[Any, Any], other: Mapping[Any, Any], *, product_error: float = 0.0
) -> Difference:
    """Compare the rules of two rows of table `spectra`, of the same method and not empty.

    Args:
        row: What is known to be so: what is allowed follows from it alone.
        other: The same probe, taken again or said to be so: alphas, betas, nodes and weights.
        product_error: By how much a product of the row's arithmetic is off, relative to its norm,
            where that was measured.
    """
    eps = epsilon(row)
    count = max(len(row["nodes"]), len(other["nodes"]))
    of_product = max(product_rounding(row), _PRODUCT_ERRORS * product_error)
    is_telling = of_product < row["num_params"] ** -0.5
    rounding = of_product + count * eps
    largest = float(np.abs(row["nodes"]).max())
    if row["method"] == "exact":
        values, others = (_eigenvalues(rule, row["num_params"]) for rule in (row, other))
        as_many = len(values) == len(others)
        distance = float(np.abs(values - others).max()) if as_many else np.inf
        return Difference(distance, rounding * largest, 0.0, of_product, is_telling)
    norm = float(np.hypot(row["alphas"][0], row["betas"][0]))  # of Hv
    largest = max(largest, norm)
    settled = _settled(row["alphas"], row["betas"], eps)
    mine, its = (
        Recurrence(np.asarray(r["alphas"]), np.asarray(r["betas"]), bool(row["breakdown"]))
        for r in (row, other)
    )
    fewer = mine.cut(max(1, int(TRUNCATION * len(row["alphas"]))))
    change, moves = 0.0, np.zeros(2)
    if not row["breakdown"] and settled < len(row["alphas"]):
        shorter = fewer.rule(extend=False)
        change, moves = _distance(_rule(row), shorter), _ends_apart(_rule(row), shorter)
    rounded = rounding * largest
    on, its_on, fewer_on = (r.rule(extend=True) for r in (mine, its, fewer))
    moves_on = _TRUNCATIONS * _ends_apart(on, fewer_on) + _CONTINUED * largest
    are_ends_alike = (
        _ends_apart(_rule(row), _rule(other)) <= rounded + _TRUNCATIONS * moves
    ).all() and (_ends_apart(on, its_on) <= rounded + moves_on).all()
    same = min(settled, len(other["alphas"]))
    moved = np.max(
        [np.abs(np.subtract(row[name][:same], other[name][:same])) for name in ("alphas", "betas")],
        axis=0,
    )
    first = float(np.max(moved / [norm, *[largest] * (same - 1)])) if norm else np.inf
    return Difference(
        _distance(_rule(row), _rule(other)),
        rounded + _TRUNCATIONS * change,
        first,
        of_product,
        is_telling,
        is_first_alike=first <= of_product,
        are_ends_alike=bool(are_ends_alike),
    )


def _eigenvalues(rule: Mapping[Any, Any], num_params: int) -> Array:
    """Return all eigenvalues of an exact rule, whose node 0 may stand for several."""
    counts = np.rint(np.asarray(rule["weights"]) * num_params).astype(np.intp)
    return np.repeat(np.asarray(rule["nodes"], dtype=np.float64), counts)


def _rule(row: Mapping[Any, Any]) -> tuple[Array, Array]:
    return np.asarray(row["nodes"]), np.asarray(row["weights"])


def _distance(a: tuple[Array, Array], b: tuple[Array, Array]) -> float:
    """Return the Wasserstein-1 distance of two rules."""
    return float(scipy.stats.wasserstein_distance(a[0], b[0], a[1], b[1]))


def _ends_apart(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
    """Return how far the smallest nodes of two rules are apart, and the largest."""
    return np.abs(a[0][[0, -1]] - b[0][[0, -1]])


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
